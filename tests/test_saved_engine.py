"""Engines as files: the same pictures without PyTorch, and what is refused when loading."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext

import numpy as np
import pytest

import fuseengine as fe
from fuseengine import saved_engine
from fuseengine.errors import (
    BackendUnavailableError,
    BundleError,
    SettingError,
    SizeMismatchError,
    UnknownNameError,
)
from fuseengine.runtime import bundle
from fuseengine.runtime.bundle import SCHEMA, Bundle
from fuseengine.runtime.gpu import Gpu
from tests.helpers import ROOT, psnr, run_python, system
from tests.runtime.test_bundle import spoil
from tests.saved import DATA, SIZE, frames, little_engine, little_model

IR, VIS = frames()

WITHOUT_TORCH = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "safetensors", "onnxscript"):
            raise ModuleNotFoundError(f"{name} is blocked here", name=name)


sys.meta_path.insert(0, Blocker())
"""
"""Put before a script: as on a device with the runtime's packages alone."""


@pytest.fixture(scope="module")
def engine():
    return little_engine()


@pytest.fixture(scope="module")
def sound(engine, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "little.fuse"
    engine.save(path)
    return path


@pytest.fixture
def path(sound, tmp_path):
    copy = tmp_path / "copy.fuse"
    copy.write_bytes(sound.read_bytes())
    return copy


class TestRoundTrip:
    def test_the_same_picture(self, engine, sound):
        loaded = fe.load(sound, threads=1)
        np.testing.assert_array_equal(loaded(IR, VIS), engine(IR, VIS))
        assert loaded.report == engine.report and loaded.size == SIZE
        assert loaded.device == "cpu" and loaded.choice == engine.choice

    def test_any_size(self, tmp_path):
        engine = little_engine(None)
        engine.save(tmp_path / "any.fuse")
        loaded = fe.load(tmp_path / "any.fuse", threads=1)
        assert loaded.size is None
        for size in (SIZE, (9, 40)):
            np.testing.assert_array_equal(loaded(*frames(size)), engine(*frames(size)))

    def test_saved_again(self, sound, tmp_path):
        fe.load(sound, threads=1).save(tmp_path / "copy.fuse")
        assert (tmp_path / "copy.fuse").read_bytes() == sound.read_bytes()

    def test_saved_over_itself(self, path):
        before = path.read_bytes()
        fe.load(path, threads=1).save(path)
        assert path.read_bytes() == before

    def test_with_another_backend(self, sound, engine, tmp_path):
        pytest.importorskip("openvino")
        loaded = fe.load(sound, backend="openvino", threads=1)
        assert set(loaded.choice.values()) == {("openvino", "fp32")}
        assert psnr(loaded(IR, VIS) / 255, engine(IR, VIS) / 255) > 60
        loaded.save(tmp_path / "other.fuse")
        with Bundle(tmp_path / "other.fuse") as opened:
            assert set(opened.description.choice.values()) == {("openvino", "fp32")}

    def test_an_engine_from_the_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path / "cache"))
        for _ in range(2):
            engine = little_engine(cache=True)
        assert engine.report.from_cache
        engine.save(tmp_path / "x.fuse")
        loaded = fe.load(tmp_path / "x.fuse", threads=1)
        np.testing.assert_array_equal(loaded(IR, VIS), engine(IR, VIS))
        assert not loaded.report.from_cache

    def test_threads(self, sound, engine):
        np.testing.assert_array_equal(fe.load(sound, threads=2)(IR, VIS), engine(IR, VIS))
        assert fe.load(sound).threads >= 1


class TestSaving:
    def test_stages_on_pytorch(self, tmp_path):
        engine = little_engine(backend="torch")
        with pytest.raises(BundleError, match="compile with portable=True before saving"):
            engine.save(tmp_path / "x.fuse")
        assert list(tmp_path.iterdir()) == []

    def test_portable_leaves_pytorch_out(self):
        engine = little_engine(backend="auto", portable=True)
        assert not {"torch", "inductor"} & {backend for backend, _ in engine.choice.values()}
        notes = {c.backend: c.note for c in engine.report.candidates}
        assert notes["torch"] == "runs the PyTorch module, which no bundle holds"

    def test_a_place_that_cannot_be_written(self, engine, tmp_path):
        with pytest.raises(BundleError, match="make its folder first"):
            engine.save(tmp_path / "no" / "x.fuse")


SYSTEMS = ("drfusion", "dmfuse-s", "drmf", "dmnet-s", "mask-difuser-s")
"""Every form of program there is: both of the sampler's steps, starting noise, stretching."""

WHOLE = (32, 32)
"""A size that needs no padding."""


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """Every system as a bundle, and what its engine makes of a pair, on the compile side."""
    folder = tmp_path_factory.mktemp("device")
    made = {}
    models = {name: system(name) for name in SYSTEMS}
    models.update({f"packaged-{name}": name for name in fe.packaged_models()})
    for name, model in models.items():
        size = WHOLE if name in SYSTEMS else SIZE
        engine = fe.compile(
            model, size, backend="onnxruntime", precision="fp32", threads=1, cache=False
        )
        engine.save(folder / f"{name}.fuse")
        made[name] = engine(*frames(size))
        np.savez(folder / f"{name}.npz", ir=frames(size)[0], vis=frames(size)[1])
    return folder, made


class TestWithoutTorch:
    def test_every_system(self, device):
        """The definition of the run side: no PyTorch, no onnx, no safetensors."""
        folder, expected = device
        script = WITHOUT_TORCH + (
            "import pathlib\n"
            "import numpy as np\n"
            "import fuseengine as fe\n"
            f"folder = pathlib.Path({str(folder)!r})\n"
            "made = {}\n"
            "for path in sorted(folder.glob('*.fuse')):\n"
            "    pair = np.load(path.with_suffix('.npz'))\n"
            "    made[path.stem] = fe.load(path, threads=1)(pair['ir'], pair['vis'])\n"
            "np.savez(folder / 'made.npz', **made)\n"
            "assert not {'torch', 'onnx', 'safetensors'} & set(sys.modules)\n"
        )
        run_python(script)
        with np.load(folder / "made.npz") as made:
            assert set(made) == set(expected)
            for name in expected:
                assert psnr(made[name] / 255, expected[name] / 255) >= 60, name

    def test_against_the_eager_model(self, device):
        """What the loaded engines fuse is what PyTorch fuses."""
        import torch

        folder, _ = device
        for name in SYSTEMS:
            loaded = fe.load(folder / f"{name}.fuse", threads=1)
            (a, b), model = loaded.executor().inputs, system(name)
            rng = np.random.default_rng(3)
            for array in (a, b):
                array[...] = rng.random(array.shape)
            pair = [torch.from_numpy(array.copy()) for array in (a, b)]
            loaded.executor().run()
            with torch.inference_mode():
                eager = model(*pair).numpy()
            assert psnr(loaded.executor().output, eager) >= 80, name

    def test_commands(self, device, tmp_path):
        folder, _ = device
        path = folder / "packaged-drfusion-s.fuse"
        script = WITHOUT_TORCH + (
            "from fuseengine.cli import main\n"
            f"assert main(['inspect', {str(path)!r}]) == 0\n"
            f"assert main(['verify', {str(path)!r}, '--threads', '1']) == 0\n"
            "assert not {'torch', 'onnx', 'safetensors'} & set(sys.modules)\n"
        )
        out = run_python(script)
        assert "stage unet-0" in out and "1 picture, worst the demo pair" in out

    def test_imports(self, sound):
        """What loading pulls in, one backend's library at most."""
        script = WITHOUT_TORCH + (
            "import json\n"
            "import fuseengine as fe\n"
            f"fe.load({str(sound)!r}, threads=1)\n"
            "print(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))\n"
        )
        modules = set(json.loads(run_python(script)))
        assert {"numpy", "onnxruntime", "PIL"} <= modules
        assert not {"torch", "onnx", "openvino", "scipy", "tqdm", "triton", "cupy"} & modules

    def test_import_is_quick(self):
        script = (
            "import time\n"
            "import numpy\n"  # whose time is not ours
            "begin = time.process_time()\n"
            "import fuseengine as fe\n"
            "fe.load, fe.Engine\n"
            "print(time.process_time() - begin)\n"
        )
        # 0.05 s on an idle core; the bound is wide for a busy one.
        assert min(float(run_python(WITHOUT_TORCH + script)) for _ in range(2)) < 0.3


def test_what_a_device_installs():
    """``pip install fuseengine[runtime]`` pulls neither PyTorch nor onnx."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["runtime"]]
    names = {re.split(r"[^\w-]", need)[0] for need in needed}
    assert (
        {"numpy", "onnxruntime"} <= names <= {"numpy", "onnxruntime", "openvino", "pillow", "tqdm"}
    )


class TestOldBundles:
    @pytest.mark.parametrize("schema", range(1, SCHEMA + 1))
    def test_still_load_and_give_their_picture(self, schema):
        """Written by ``python -m tests.saved`` when the schema was new; never written again."""
        loaded = fe.load(DATA / f"schema-{schema}.fuse", threads=1)
        recorded = fe.read_image(DATA / f"schema-{schema}.png")
        # Half a grey level: runtimes round differently.
        assert np.abs(loaded(IR, VIS).astype(int) - recorded).max() <= 1
        assert psnr(loaded(IR, VIS) / 255, recorded / 255) >= 60

    @pytest.mark.parametrize("schema", range(2, SCHEMA + 1))
    def test_a_frame_from_the_one_before(self, schema):
        engine = little_engine(temporal="warm", warm_steps=1)
        loaded = fe.load(DATA / f"schema-{schema}.fuse", threads=1)
        made = []
        for one in (engine, loaded):
            memory = fe.Memory()
            made.append([one(IR, VIS, memory=memory) for _ in range(2)][1])
            assert memory.resumed == 1
        assert psnr(made[0] / 255, made[1] / 255) >= 60
        assert psnr(made[0] / 255, engine(IR, VIS) / 255) < 55

    def test_the_model_is_still_that_one(self, engine):
        recorded = fe.read_image(DATA / f"schema-{SCHEMA}.png")
        assert psnr(engine(IR, VIS) / 255, recorded / 255) >= 60

    def test_they_are_small(self):
        assert all(path.stat().st_size < 100_000 for path in DATA.glob("schema-*"))


GPU = Gpu(index=0, name="Other", capability=90, memory_bytes=1 << 34, driver=12060)


@pytest.fixture
def for_orin(sound, tmp_path):
    """The little engine as it would be compiled for a GPU."""
    from dataclasses import replace

    with Bundle(sound) as opened:
        choice = dict.fromkeys(opened.description.choice, ("tensorrt", "fp16"))
        bundle.write(
            tmp_path / "orin.fuse",
            replace(opened.description, choice=choice, device="cuda"),
            {key: opened.onnx(*key) for key in opened.networks},
            target=bundle.BuiltFor("orin", "Orin", 87),
        )
    return tmp_path / "orin.fuse"


class TestRefused:
    def test_frames_of_another_size(self, sound):
        with pytest.raises(SizeMismatchError, match=r"the frames are 24x30.*expected 22x30"):
            fe.load(sound, threads=1)(*frames((24, 30)))

    @pytest.mark.parametrize(
        ("present", "message"),
        [((), "this machine has no NVIDIA GPU"), ((GPU,), r"this machine has Other of 9\.0")],
    )
    def test_another_capability(self, for_orin, monkeypatch, present, message):
        monkeypatch.setattr(saved_engine, "gpus", lambda: present)
        with pytest.raises(BackendUnavailableError, match=rf"compute capability 8\.7; {message}"):
            fe.load(for_orin)

    def test_a_gpu_s_bundle_runs_on_a_cpu_if_told(self, for_orin, engine):
        with pytest.raises(BackendUnavailableError, match="was compiled for tensorrt"):
            fe.load(for_orin, device="cpu")
        loaded = fe.load(for_orin, device="cpu", backend="onnxruntime", threads=1)
        np.testing.assert_array_equal(loaded(IR, VIS), engine(IR, VIS))

    def test_a_precision_that_is_not_offered(self, sound):
        with pytest.raises(BackendUnavailableError, match="fp16 on onnxruntime, which here offers"):
            fe.load(sound, precision="fp16")

    def test_a_network_that_is_not_held(self, sound):
        with pytest.raises(BundleError, match="no int8 network of the stage"):
            fe.load(sound, precision="int8")

    def test_a_backend_that_is_not_installed(self, sound, monkeypatch):
        from fuseengine.backends import BACKENDS

        monkeypatch.setattr(
            type(BACKENDS["onnxruntime"]), "unavailable", lambda self, device: "it is not there"
        )
        with pytest.raises(BackendUnavailableError, match=r"onnxruntime.*it is not there; or load"):
            fe.load(sound)

    def test_names(self, sound):
        with pytest.raises(UnknownNameError, match="unknown backend 'onnx'"):
            fe.load(sound, backend="onnx")
        with pytest.raises(SettingError, match="device='gpu'"):
            fe.load(sound, device="gpu")
        with pytest.raises(BundleError, match="no PyTorch module"):
            fe.load(sound, backend="torch")

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(BundleError, match="there is no such file"):
            fe.load(tmp_path / "none.fuse")

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda p: p["nodes"][0].update(target="no_such_op"), id="op"),
            pytest.param(lambda p: p["nodes"][-1].update(attrs={}), id="attributes"),
            pytest.param(lambda p: p["nodes"][2]["attrs"].update(axis=7), id="axis"),
            pytest.param(lambda p: p["nodes"][2]["inputs"].pop(), id="inputs"),
        ],
    )
    def test_programs_that_do_not_fit_together(self, path, change):
        spoil(path, lambda manifest, members: change(manifest["engine"]["program"]))
        with pytest.raises(BundleError, match=r"copy\.fuse is refused"):
            fe.load(path, threads=1)

    @pytest.mark.parametrize("size", [SIZE, None])
    def test_a_network_that_the_runtime_refuses(self, path, capfd, size):
        def change(manifest, members):
            manifest["engine"]["size"] = size and list(size)
            for name in members:
                if name.startswith("networks/"):
                    members[name] = members[name].replace(b"Conv", b"Cons")

        spoil(path, change)
        with pytest.raises(BundleError, match=r"copy\.fuse is refused: its engine cannot be built"):
            fe.load(path, threads=1)

    def test_files_are_closed_again(self, path):
        """Or a warning would become an error here."""
        spoil(path, lambda manifest, members: manifest["engine"]["choice"].clear())
        for _ in range(3):
            with pytest.raises(BundleError):
                fe.load(path)


class TestPlans:
    """What a device builds is saved with the engine; the builder is a stand-in."""

    @pytest.fixture
    def builds(self, tmp_path, monkeypatch):
        from types import SimpleNamespace

        from fuseengine.export import tensorrt

        built = []

        def build(network, *args, **kwargs):
            built.append(network)
            return b"plan of " + network[:9]

        monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path / "cache"))
        library = SimpleNamespace(name="tensorrt", version="10.3.0")
        monkeypatch.setattr(tensorrt, "find_library", lambda name=None: library)
        monkeypatch.setattr(tensorrt, "_target", lambda library, settings: "sm_87")
        monkeypatch.setattr(tensorrt, "_collected_errors", lambda library: nullcontext([]))
        monkeypatch.setattr(tensorrt, "_build", build)
        return built

    def test_built_once_and_carried_along(self, path, builds):
        from fuseengine.export.tensorrt import build

        engine = fe.load(path, threads=1)
        network = engine.source.onnx(next(iter(engine.choice)))
        plan = build(network, cache=False, bundle=engine.source)
        assert len(builds) == 1 and not plan.from_cache
        engine.save(path)
        with Bundle(path) as opened:
            again = build(network, cache=False, bundle=opened)
            assert again.content == plan.content and again.from_cache and len(builds) == 1
            assert opened.built == {}  # the file holds it
            (entry,) = opened.manifest["plans"].values()
            assert entry["about"] == {"library": "tensorrt", "version": "10.3.0", "for": "sm_87"}
            build(b"other", cache=False, bundle=opened)
        assert len(builds) == 2
        np.testing.assert_array_equal(fe.load(path, threads=1)(IR, VIS), engine(IR, VIS))

    def test_from_the_cache_into_the_bundle(self, sound, tmp_path, builds):
        from fuseengine.export.tensorrt import build

        plan = build(b"network")
        engine = fe.load(sound, threads=1)
        assert build(b"network", bundle=engine.source).from_cache and len(builds) == 1
        engine.save(tmp_path / "more.fuse")
        with Bundle(tmp_path / "more.fuse") as opened:
            (key,) = opened.manifest["plans"]
            assert opened.plan(key) == plan.content


def test_the_model_s_own_engine_is_not_changed_by_saving(engine, sound, tmp_path):
    before = engine(IR, VIS)
    engine.save(tmp_path / "x.fuse")
    np.testing.assert_array_equal(engine(IR, VIS), before)


def test_lower_precision(tmp_path):
    """What bfloat16 gives on the compile side, it gives on the run side."""
    from fuseengine.backends import BACKENDS

    backend = BACKENDS["openvino"]
    if backend.unavailable("cpu") or "bf16" not in backend.precisions("cpu"):
        pytest.skip("needs OpenVINO on a processor that computes in bfloat16")
    engine = fe.compile(
        little_model(), SIZE, backend="openvino", precision="bf16", threads=1, guard_db=20,
        cache=False,
    )  # fmt: skip
    engine.save(tmp_path / "bf16.fuse")
    loaded = fe.load(tmp_path / "bf16.fuse", threads=1)
    assert psnr(loaded(IR, VIS) / 255, engine(IR, VIS) / 255) >= 60
