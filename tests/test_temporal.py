"""Video: frames that start from the one before, in the model, the engine, the file, the stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fuseengine as fe
from fuseengine.errors import BundleError, CaptureError, SettingError, UnknownNameError
from fuseengine.program import Program
from fuseengine.runtime.bundle import Bundle
from fuseengine.temporal import Memory
from fuseengine.tracing import capture, capture_resumed
from fuseengine.video import Stream
from fuseengine.video.flicker import flicker
from tests.helpers import pictures_for, psnr, system

SIZE = (32, 48)
OTHERS = ("drfusion-s", "dmfuse-s", "dmnet-s", "drmf-s")


@pytest.fixture(scope="module")
def model():
    return system("mask-difuser-s")


@pytest.fixture(scope="module")
def engine(model):
    return fe.compile(
        model, SIZE, backend="onnxruntime", precision="fp32", temporal="warm", threads=1,
        guard_db=30.0, cache=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def path(engine, tmp_path_factory):
    path = tmp_path_factory.mktemp("temporal") / "warm.fuse"
    engine.save(path)
    return path


def moving(count, size=SIZE, seed=0):
    """Coloured 8-bit pairs of a scene that moves by a pixel per frame, with a little noise."""
    rng = np.random.default_rng(seed)
    height, width = size
    scene = rng.integers(0, 256, (2, height, width + count, 3), np.uint8)
    scene = (scene.astype(int) + np.roll(scene, 1, 2) + np.roll(scene, 1, 1)) // 4
    for t in range(count):
        pair = scene[:, :, t : t + width] + rng.integers(0, 3, (2, *size, 3))
        yield pair.astype(np.uint8)


def as_picture(frame):
    return torch.from_numpy(frame).permute(2, 0, 1)[None] / 255


def by_hand(model, pairs, steps=1):
    """What the model itself makes of a video."""
    made = []
    with torch.no_grad():
        for a, b in pairs:
            a, b = as_picture(a), as_picture(b)
            made.append(model.resume(a, b, made[-1], steps=steps) if made else model(a, b))
    return [np.rint(x[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8) for x in made]


def decibels(one, other):
    return psnr(one / 255.0, other / 255.0)


class TestModel:
    def test_all_but_the_first_step(self, model):
        """From the exact x of a step, resuming gives what sampling gives."""
        a, b = pictures_for(model, SIZE)
        schedule, seen = model.schedule(), []

        def noise(x, step, *sources, base):
            seen.append((step, x.clone()))
            return type(model).noise(model, x, step, *sources, base=base)

        with torch.no_grad():
            model.noise = noise
            try:
                x = model.sample(a, b)
            finally:
                del model.noise
            step, start = seen[2]
            assert step == schedule[2]
            again = model.denoise(start, a, b, schedule[2:])
        torch.testing.assert_close(again, x)

    def test_start_is_the_frame_before_with_noise(self, model):
        a, b = pictures_for(model, SIZE)
        before, _ = pictures_for(model, SIZE, seed=5)
        steps, seen = 2, []

        def denoise(x, *rest):
            seen.append(x)
            return type(model).denoise(model, x, *rest)

        model.denoise = denoise
        try:
            with torch.no_grad():
                model.resume(a, b, before, steps=steps)
        finally:
            del model.denoise
        step = model.schedule()[-steps]
        noise = (seen[0] - step.sqrt_abar * (before * 2 - 1)) / step.sqrt_one_minus_abar
        assert abs(float(noise.mean())) < 0.05 and float(noise.std()) == pytest.approx(1, abs=0.05)

    @pytest.mark.parametrize("steps", [0, 5, -1])
    def test_steps(self, model, steps):
        a, b = pictures_for(model, SIZE)
        with pytest.raises(SettingError, match="expected 1 to 4"):
            model.resume(a, b, a, steps=steps)

    @pytest.mark.parametrize("name", OTHERS)
    def test_others_say_that_they_cannot(self, name):
        model = system(name)
        with pytest.raises(SettingError, match=f"{name} cannot start from the frame before"):
            fe.compile(model, SIZE, temporal="warm", cache=False)


class TestProgram:
    @pytest.mark.parametrize("steps", [1, 3])
    def test_shares_the_stages(self, model, steps):
        program = capture(model)
        resumed = capture_resumed(model, program, steps)
        assert [name.removeprefix("resumed.") for name in resumed.inputs] == ["a", "b", "previous"]
        assert resumed.variants().keys() == program.variants().keys()
        calls = [node.target for node in resumed.stage_calls()]
        assert calls.count("unet") == steps
        assert not resumed.values.keys() & program.values.keys()

    def test_as_plain_data(self, model):
        resumed = capture_resumed(model, capture(model), 2)
        again = Program.from_json(resumed.to_json(), resumed.constants)
        assert again.to_dict() == resumed.to_dict() and "previous" in str(again)

    def test_of_another_model(self, model):
        with pytest.raises(CaptureError, match="only resumed"):
            capture_resumed(model, capture(system("drmf-s")))


class TestEngine:
    def test_a_video(self, model, engine):
        pairs = list(moving(4))
        memory = fe.Memory(cut=0.9)
        made = [engine(a, b, memory=memory) for a, b in pairs]
        assert (memory.full, memory.resumed) == (1, 3)
        for one, other in zip(made, by_hand(model, pairs), strict=True):
            assert decibels(one, other) > 55
        plain = engine(*pairs[-1])
        assert decibels(made[-1], plain) < 50, "as if the memory had not been used"

    @pytest.mark.parametrize("size", [(30, 41), (47, 33)])
    @pytest.mark.parametrize("scaling", ["clamp", "min-max"])
    def test_sizes_that_are_padded(self, scaling, size):
        model = system("mask-difuser-s", scaling=scaling)
        engine = fe.compile(
            model, size, backend="onnxruntime", precision="fp32", temporal="warm", warm_steps=2,
            threads=1, guard_db=20.0, cache=False,
        )  # fmt: skip
        pairs = list(moving(3, size))
        memory = fe.Memory(cut=0.9)
        made = [engine(a, b, memory=memory) for a, b in pairs]
        assert memory.resumed == 2
        for one, other in zip(made, by_hand(model, pairs, 2), strict=True):
            assert decibels(one, other) > 50

    def test_on_pytorch_s_device(self, model, monkeypatch):
        """What a GPU runs but for its streams: arrays are tensors, results are fetched."""
        import fuseengine.engine as module
        from fuseengine.backends.cuda_device import TorchDevice
        from fuseengine.runtime.executor import Executor

        size = (30, 41)
        plain = fe.compile(
            model, size, backend="torch", precision="fp32", temporal="warm", warm_steps=2,
            threads=1, guard_db=30.0, cache=False,
        )  # fmt: skip
        runners = plain.executor().runners

        def build(program, source, choice, padded, device, threads):
            return Executor(program, padded, runners, TorchDevice("cpu"))

        monkeypatch.setattr(module, "build_executor", build)
        engine = module.Engine(
            plain.program, plain.source, plain.choice, plain.report, size=size, device="cuda",
            threads=1, resumed=plain.resumed,
        )  # fmt: skip
        one, two = fe.Memory(cut=0.9), fe.Memory(cut=0.9)
        for a, b in moving(3, size):
            assert decibels(engine(a, b, memory=one), plain(a, b, memory=two)) > 55
        assert one.resumed == 2

    def test_cuts(self, engine):
        (a, b), (c, d) = moving(2)
        memory = fe.Memory()
        engine(a, b, memory=memory)
        engine(c, d, memory=memory)
        assert memory.full == 2  # random pixels that move change much
        engine(c, d, memory=memory)
        assert (memory.full, memory.resumed) == (2, 1)
        after = engine(255 - c, d, memory=memory)
        assert memory.full == 3
        np.testing.assert_array_equal(after, engine(255 - c, d))
        memory.reset()
        engine(255 - c, d, memory=memory)
        assert memory.full == 4

    def test_two_videos_at_once(self, engine):
        one, two = list(moving(3)), list(moving(3, seed=9))
        alone = [[], []]
        for video, made in zip((one, two), alone, strict=True):
            memory = fe.Memory(cut=0.9)
            made += [engine(a, b, memory=memory) for a, b in video]
        memories = fe.Memory(cut=0.9), fe.Memory(cut=0.9)
        for t in range(3):
            for video, memory, made in zip((one, two), memories, alone, strict=True):
                np.testing.assert_array_equal(engine(*video[t], memory=memory), made[t])

    def test_a_batch_is_a_piece_of_a_video(self, engine):
        pairs = np.stack(list(moving(3)), axis=1)
        memory = fe.Memory(cut=0.9)
        together = engine(*pairs, memory=memory)
        memory = fe.Memory(cut=0.9)
        for t in range(3):
            np.testing.assert_array_equal(engine(*pairs[:, t], memory=memory), together[t])

    def test_refused(self, model):
        plain = fe.compile(model, SIZE, backend="onnxruntime", precision="fp32", guard_db=30.0)
        a, b = next(moving(1))
        with pytest.raises(SettingError, match="temporal='warm'"):
            plain(a, b, memory=fe.Memory())
        with pytest.raises(SettingError, match="temporal='warm'"):
            Stream(plain, temporal="warm")
        with pytest.raises(SettingError, match="expected None or 'warm'"):
            Stream(plain, temporal="hot")
        with pytest.raises(SettingError, match="warm_steps=2 without temporal"):
            fe.compile(model, SIZE, warm_steps=2)
        with pytest.raises(SettingError, match="expected 1 or more"):
            fe.compile(model, SIZE, temporal="warm", warm_steps=0)
        with pytest.raises(UnknownNameError, match="warm"):
            fe.compile(model, SIZE, temporal="hot")
        with pytest.raises(SettingError, match=r"has no resume\(a, b, previous"):
            fe.compile(Mean(), SIZE, temporal="warm", cache=False)
        for cut in (0, 2, float("nan")):
            with pytest.raises(SettingError, match="expected above 0 to 1"):
                Memory(cut=cut)

    def test_from_the_cache(self, model, tmp_path, monkeypatch):
        monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path))
        settings = {"backend": "onnxruntime", "precision": "fp32", "guard_db": 30.0, "threads": 1}
        first = fe.compile(model, SIZE, temporal="warm", **settings)
        again = fe.compile(model, SIZE, temporal="warm", **settings)
        assert again.report.from_cache and again.resumed is not None
        assert again.resumed.to_dict() == first.resumed.to_dict()
        assert fe.compile(model, SIZE, **settings).resumed is None


class Mean(torch.nn.Module):
    def forward(self, a, b):
        return (a + b) / 2


class TestFile:
    def test_the_same_video(self, engine, path):
        loaded = fe.load(path, threads=1)
        one, two = fe.Memory(cut=0.9), fe.Memory(cut=0.9)
        for a, b in moving(3):
            np.testing.assert_array_equal(loaded(a, b, memory=one), engine(a, b, memory=two))
        assert one.resumed == 2

    def test_schemas(self, model, path, tmp_path):
        with Bundle(path) as bundle:
            assert bundle.manifest["schema"] == 2
            assert bundle.description.resumed is not None
            both = bundle.manifest["buffers"]["bytes"]
            networks = len(bundle.networks)
        plain = fe.compile(
            model, SIZE, backend="onnxruntime", precision="fp32", guard_db=30.0, cache=False
        )
        plain.save(tmp_path / "plain.fuse")
        with Bundle(tmp_path / "plain.fuse") as bundle:
            assert bundle.manifest["schema"] == 1  # older versions read it
            assert bundle.manifest["buffers"]["bytes"] < both
            assert len(bundle.networks) == networks  # no network stands there twice

    def test_saved_again(self, path, tmp_path):
        fe.load(path, threads=1).save(tmp_path / "again.fuse")
        assert (tmp_path / "again.fuse").read_bytes() == path.read_bytes()

    @pytest.mark.parametrize("spoilt", ["inputs", "program", "missing", "schema"])
    def test_spoilt(self, path, tmp_path, spoilt):
        import shutil

        from tests.runtime.test_bundle import spoil

        copy = shutil.copy(path, tmp_path / "copy.fuse")

        def change(manifest, _):
            engine = manifest["engine"]
            if spoilt == "inputs":
                engine["resumed"]["inputs"].pop()
            elif spoilt == "program":
                engine["resumed"]["nodes"] = engine["resumed"]["nodes"][:-1]
            elif spoilt == "missing":
                del engine["resumed"]
            else:
                manifest["schema"] = 1

        spoil(copy, change)
        with pytest.raises(BundleError):
            Bundle(copy)


class TestPackagedModel:
    def test_fewer_steps_and_no_more_flicker(self):
        """A window that wanders over the demo pair, with sensor noise."""
        engine = fe.compile(
            "mask-difuser-s", (96, 128), backend="onnxruntime", precision="fp32", temporal="warm",
            threads=1, cache=False,
        )  # fmt: skip
        rng = np.random.default_rng(0)
        infrared, visible = fe.demo_pair()
        videos = [[], []]
        for t in range(5):
            for video, picture in zip(videos, (infrared, visible), strict=True):
                part = picture[100 + t : 196 + t, 200 + 2 * t : 328 + 2 * t]
                noisy = part + rng.normal(0, 2, part.shape)
                video.append(np.clip(noisy, 0, 255).astype(np.uint8))
        memory = fe.Memory()
        warm = [engine(a, b, memory=memory) for a, b in zip(*videos, strict=True)]
        full = [engine(a, b) for a, b in zip(*videos, strict=True)]
        assert memory.resumed == 4
        assert min(decibels(x, y) for x, y in zip(warm[1:], full[1:], strict=True)) > 45
        a, b, warm, full = (np.stack([luma(x) for x in v]) for v in (*videos, warm, full))
        assert flicker(warm, a, b).mean() < 1.02 * flicker(full, a, b).mean()


def luma(frame):
    return frame if frame.ndim == 2 else frame @ np.array([0.299, 0.587, 0.114])


class TestStream:
    def test_frames_start_from_the_one_before(self, engine):
        pairs = [np.repeat(p, 2, axis=1) for p in moving(6)]
        pairs = [p[:, : SIZE[0]] for p in pairs]
        stream = Stream(engine, temporal="warm")
        stream.memory.cut = 0.9
        frames = [frame.image.copy() for frame in stream.run(*zip(*pairs, strict=True))]
        assert (stream.memory.full, stream.memory.resumed) == (1, 5)
        memory = fe.Memory(cut=0.9)
        for frame, (a, b) in zip(frames, pairs, strict=True):
            np.testing.assert_array_equal(frame, engine(a, b, memory=memory))
        next(iter(stream.run(*zip(*pairs, strict=True))))
        assert stream.memory.full == 1  # a new run is a new video
        stream.close()
