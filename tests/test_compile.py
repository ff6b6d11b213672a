"""compile() and the engine it gives: choice, guard, frames of all kinds, threads."""

from __future__ import annotations

import json
import logging
import threading

import numpy as np
import pytest
import torch
from torch import nn

import fuseengine as fe
from fuseengine.backends import BACKENDS
from fuseengine.engine import Engine
from fuseengine.errors import (
    CompileError,
    FrameError,
    SettingError,
    SizeMismatchError,
    UnknownNameError,
)
from fuseengine.report import Report
from tests.helpers import TINY, psnr, randomise, system, tiny

SIZE = (37, 53)  # odd, and no multiple of the model's 4
TOP = {"uint8": 255, "uint16": 65535, "float32": 1, "float64": 1}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEENGINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def quick(model, **options):
    """Compiled with the backend that lowers fastest, on one thread, without the cache."""
    given = {"size": SIZE, "backend": "onnxruntime", "threads": 1, "cache": False, **options}
    return fe.compile(model, **given)


def for_any_size(engine):
    """What compile(size=None) gives, without measuring at 480x640."""
    source, choice = engine._source, engine._choice
    given = {"size": None, "device": "cpu", "threads": 1}
    return Engine(engine.program, source, choice, engine.report, **given)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def engine(model):
    return quick(model)


@pytest.fixture(scope="module")
def any_size(model):
    return quick(model, size=None)


def frame(shape, dtype="uint8", seed=0):
    """A random picture with structure, not noise alone."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((*(-(-n // 8) for n in shape[:2]), *shape[2:]))
    values = coarse.repeat(8, axis=0).repeat(8, axis=1)[: shape[0], : shape[1]]
    values = np.clip(values + 0.05 * rng.normal(size=shape), 0, 1)
    return values.astype(dtype) if "float" in dtype else np.rint(values * TOP[dtype]).astype(dtype)


def luma(picture):
    scaled = picture.astype(np.float64) / TOP[str(picture.dtype)]
    return scaled @ [0.299, 0.587, 0.114] if picture.ndim == 3 else scaled


def expected(model, ir, vis):
    """The fused frame on the scale [0, 1], worked out beside the engine."""
    height, width = vis.shape[:2]
    pad = [(0, -height % model.multiple), (0, -width % model.multiple)]
    a, b = (np.pad(luma(x), pad, mode="reflect")[None, None] for x in (ir, vis))
    with torch.no_grad():
        fused = model(*(torch.from_numpy(x.astype(np.float32)) for x in (a, b)))
    fused = fused[0, 0, :height, :width].double().numpy()
    if vis.ndim == 2:
        return fused
    scaled = vis.astype(np.float64) / TOP[str(vis.dtype)]
    return np.clip(scaled + (fused - luma(vis))[..., None], 0, 1)


def check(result, model, ir, vis):
    """Equal to the eager model up to rounding to the output's dtype, and float32's errors."""
    top = TOP[str(vis.dtype)]
    wanted = expected(model, ir, vis)
    assert result.shape == vis.shape and result.dtype == vis.dtype
    assert np.abs(result / top - wanted).max() <= 0.5 / top * (top > 1) + 5e-5


class TestFrames:
    @pytest.mark.parametrize("dtype", list(TOP))
    @pytest.mark.parametrize("colour", [False, True])
    def test_kinds(self, engine, model, dtype, colour):
        ir, vis = frame(SIZE), frame((*SIZE, 3) if colour else SIZE, dtype, seed=1)
        check(engine(ir, vis), model, ir, vis)

    @pytest.mark.parametrize("dtype", list(TOP))
    def test_infrared_of_another_kind(self, engine, model, dtype):
        ir, vis = frame(SIZE, dtype), frame((*SIZE, 3), seed=1)
        check(engine(ir, vis), model, ir, vis)
        three = np.repeat(ir[..., None], 3, axis=2)
        result = engine(three, vis)
        # The luma of three equal channels is the channel, but for rounding of the weights' sum.
        assert np.abs(result.astype(int) - engine(ir, vis)).max() <= 1

    @pytest.mark.parametrize("colour", [False, True])
    def test_batch(self, engine, colour):
        shape = (3, *SIZE, 3) if colour else (3, *SIZE)
        ir = np.stack([frame(SIZE, seed=i) for i in range(3)])
        vis = np.stack([frame(shape[1:], seed=i + 5) for i in range(3)])
        together = engine(ir, vis)
        assert together.shape == shape and together.dtype == np.uint8
        for i in range(3):
            np.testing.assert_array_equal(together[i], engine(ir[i], vis[i]))
        assert not np.array_equal(together[0], together[1])

    def test_torch(self, engine):
        ir, vis = frame(SIZE), frame((*SIZE, 3), seed=1)
        result = engine(torch.from_numpy(ir), torch.from_numpy(vis))
        assert isinstance(result, torch.Tensor) and result.dtype == torch.uint8
        np.testing.assert_array_equal(result.numpy(), engine(ir, vis))
        # The kind is the visible frame's.
        assert isinstance(engine(torch.from_numpy(ir), vis), np.ndarray)

    def test_dlpack(self, engine):
        class Foreign:
            def __init__(self, array):
                self.array = array

            def __dlpack__(self, **options):
                return self.array.__dlpack__(**options)

            def __dlpack_device__(self):
                return self.array.__dlpack_device__()

        ir, vis = frame(SIZE), frame(SIZE, seed=1)
        np.testing.assert_array_equal(engine(Foreign(ir), Foreign(vis)), engine(ir, vis))

    def test_strided_and_read_only(self, engine):
        ir, vis = frame(SIZE), frame((*SIZE, 3), seed=1)
        big = np.zeros((SIZE[0] * 2, SIZE[1] * 2, 3), np.uint8)
        big[::2, ::2] = vis
        ir.flags.writeable = False
        np.testing.assert_array_equal(engine(ir, big[::2, ::2]), engine(ir, vis))
        np.testing.assert_array_equal(engine(ir[::-1], vis[::-1, ::-1]).shape, vis.shape)

    def test_inputs_are_left_alone(self, engine):
        ir, vis = frame(SIZE), frame((*SIZE, 3), seed=1)
        kept = ir.copy(), vis.copy()
        first = engine(ir, vis)
        assert np.array_equal(ir, kept[0]) and np.array_equal(vis, kept[1])
        second = engine(vis, ir)  # another picture
        assert not np.array_equal(first[..., 0], second)
        np.testing.assert_array_equal(engine(ir, vis), first)  # no memory of calls before

    def test_results_belong_to_the_caller(self, engine):
        pair = frame(SIZE), frame(SIZE, seed=1)
        first = engine(*pair)
        kept = first.copy()
        engine(frame(SIZE, seed=2), frame(SIZE, seed=3))
        np.testing.assert_array_equal(first, kept)
        first[...] = 0
        np.testing.assert_array_equal(engine(*pair), kept)

    def test_out(self, engine):
        ir, vis = frame(SIZE), frame((*SIZE, 3), seed=1)
        out = np.full_like(vis, 42)
        assert engine(ir, vis, out=out) is out
        np.testing.assert_array_equal(out, engine(ir, vis))
        frame_buffer = np.full((SIZE[0] + 2, SIZE[1] + 4, 3), 42, np.uint8)
        inner = frame_buffer[1:-1, 2:-2]
        assert engine(ir, vis, out=inner) is inner
        np.testing.assert_array_equal(inner, out)
        inner[...] = 42
        assert (frame_buffer == 42).all()  # nothing was written beside it

    def test_out_in_place_of_the_visible_frame(self, engine):
        ir, vis = frame(SIZE), frame((*SIZE, 3), seed=1)
        wanted = engine(ir, vis)
        assert engine(ir, vis, out=vis) is vis
        np.testing.assert_array_equal(vis, wanted)

    @pytest.mark.parametrize(
        ("shape", "dtype"), [(SIZE, "uint16"), ((*SIZE, 3), "uint8"), ((36, 53), "uint8")]
    )
    def test_wrong_out(self, engine, shape, dtype):
        with pytest.raises(FrameError, match="out: got"):
            engine(frame(SIZE), frame(SIZE, seed=1), out=np.zeros(shape, dtype))

    def test_resize_and_range(self, engine):
        ir, vis = frame((20, 30)), frame(SIZE, seed=1)
        with pytest.raises(SizeMismatchError, match=r"20x30 .*37x53|resize='infrared'"):
            engine(ir, vis)
        assert engine(ir, vis, resize="infrared").shape == SIZE
        counts = (30_000 + 20 * frame(SIZE, "float64")).astype(np.uint16)
        flat = engine(counts, vis)
        lively = engine(counts, vis, infrared_range=(30_000, 30_020))
        assert np.abs(flat.astype(int) - lively).mean() > 1

    @pytest.mark.parametrize(
        "bad",
        [
            np.zeros((37, 53, 2), np.uint8),
            np.zeros((1, 53), np.uint8),
            np.zeros((0, 53), np.uint8),
            np.full(SIZE, np.nan, np.float32),
            np.full(SIZE, np.inf, np.float32),
            np.full(SIZE, 200.0, np.float32),
            np.zeros(SIZE, np.int32),
            "ir.png",
            None,
        ],
        ids=["channels", "one row", "empty", "nan", "inf", "range", "int32", "text", "none"],
    )
    def test_bad_frames(self, engine, bad):
        good = frame(SIZE)
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(FrameError):
                engine(*pair)
        assert engine(good, good).shape == SIZE  # and the engine lives on


@pytest.fixture(scope="module", params=TINY)
def compiled(request):
    model = system(request.param)
    return model, for_any_size(quick(model))


class TestSystems:
    """Each family, at its official structure and its small one, padded by its own rule."""

    @pytest.mark.parametrize("offset", [(0, 0), (-1, -5), (3, 1)])
    def test_equals_the_model(self, compiled, offset):
        """Sizes that are multiples, and such that are not."""
        model, engine = compiled
        unit = max(model.multiple, 16)
        size = (2 * unit + offset[0], 3 * unit + offset[1])
        colour = (3,) if model.channels == "rgb" else ()
        ir, vis = frame((*size, *colour), "float32"), frame((*size, *colour), "float32", seed=1)
        pair = [
            torch.from_numpy(x.reshape(*size, -1)).permute(2, 0, 1)[None].contiguous()
            for x in (ir, vis)
        ]
        with torch.no_grad():
            wanted = model(*pair)[0].permute(1, 2, 0).numpy().reshape(vis.shape)
        # Samplers divide float32 rounding by sqrt(abar), 0.04 at their first step.
        np.testing.assert_allclose(engine(ir, vis), wanted, rtol=0, atol=5e-5)
        assert wanted.std() > 1e-3

    def test_sizes_that_pad_alike_do_not_mix(self):
        """min-max looks at the frame alone, so such sizes share networks but no buffers."""
        model = system("drmf")
        engine = for_any_size(quick(model))
        results = {}
        for size in ((30, 31), (32, 32), (17, 32), (30, 31)):
            ir, vis = frame((*size, 3), seed=2), frame((*size, 3), seed=3)
            result = engine(ir, vis)
            assert np.array_equal(results.setdefault(size, result), result)
            assert (result.min((0, 1)) == 0).all() and (result.max((0, 1)) == 255).all()
        runners = [set(map(id, e.runners.values())) for _, e in engine._plans.values()]
        assert runners[0] == runners[1] == runners[2]

    @pytest.mark.parametrize("name", ["dmfuse-s", "mask-difuser"])
    def test_every_backend(self, name):
        """Stages with several shapes, several outputs, attention: each backend inside the guard."""
        engine = quick(system(name), size=SIZE, backend="auto", effort="quick")
        exact = [c for c in engine.report.candidates if c.precision == "fp32" and c.milliseconds]
        installed = {n for n, b in BACKENDS.items() if b.quick and not b.unavailable("cpu")}
        assert {"openvino", "onnxruntime"} & installed <= {c.backend for c in exact}
        assert all(c.psnr_db > 80 and "refused" not in c.note for c in exact)
        assert engine.report.psnr_db > 45

    def test_cache(self):
        model = system("dmfuse-s", padding="white")
        first = quick(model, cache=True)
        second = quick(system("dmfuse-s", padding="white"), cache=True)
        assert not first.report.from_cache and second.report.from_cache
        assert second.program.padding == model.padding == "white"
        pair = frame(SIZE), frame((*SIZE, 3), seed=1)
        np.testing.assert_array_equal(first(*pair), second(*pair))
        other = quick(system("dmfuse-s", padding="white", seed=1), cache=True)
        assert not other.report.from_cache


class TestSizes:
    def test_wrong_size_is_refused(self, engine):
        with pytest.raises(SizeMismatchError, match="38x53 .*expected 37x53"):
            engine(frame((38, 53)), frame((38, 53)))
        assert engine.size == SIZE

    @pytest.mark.parametrize("size", [(2, 2), (3, 61), (40, 2), (48, 64), (37, 53)])
    def test_any_size(self, any_size, model, size):
        ir, vis = frame(size), frame((*size, 3), seed=1)
        if min(size) > 3:
            check(any_size(ir, vis), model, ir, vis)
        else:  # too small to be padded by reflection alone: its content is not defined here
            assert any_size(ir, vis).shape == vis.shape

    def test_many_sizes_then_the_first_again(self, any_size, model):
        pairs = [(frame((16 + 4 * i, 20)), frame((16 + 4 * i, 20), seed=1)) for i in range(5)]
        first = [any_size(*pair) for pair in pairs]
        for pair, result in zip(pairs, first, strict=True):
            check(result, model, *pair)
            np.testing.assert_array_equal(any_size(*pair), result)
        assert any_size.size is None

    def test_sizes_that_pad_alike_do_not_mix(self, any_size, model):
        """They share buffers; the padding of one must not show in the other."""
        for size in ((22, 23), (24, 24), (21, 24), (22, 23)):
            ir, vis = frame(size, seed=size[0]), frame(size, seed=1)
            check(any_size(ir, vis), model, ir, vis)


class TestThreads:
    @pytest.mark.parametrize("which", ["engine", "any_size"])
    def test_calls_at_once(self, request, which):
        engine = request.getfixturevalue(which)
        sizes = [SIZE] if which == "engine" else [SIZE, (24, 32), (37, 50)]
        pairs = [
            (frame(sizes[i % len(sizes)], seed=i), frame(sizes[i % len(sizes)], seed=i + 50))
            for i in range(6)
        ]
        alone = [engine(*pair) for pair in pairs]
        wrong = []
        start = threading.Barrier(len(pairs))

        def work(index):
            start.wait()
            for _ in range(8):
                if not np.array_equal(engine(*pairs[index]), alone[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(pairs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []


class Colour(fe.FusionModel):
    """An RGB network of a user's own, one stage and one op."""

    channels = "rgb"
    stages = ("net",)
    multiple = 2

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 1))

    def forward(self, a, b):
        return (self.net(torch.cat([a, b], 1)) * 0.1 + b).clamp(0.0, 1.0)


class TestOwnModels:
    def test_colour(self):
        model = randomise(Colour())
        engine = quick(model)
        ir, vis = frame(SIZE), frame((*SIZE, 3), seed=1)
        pad = [(0, 1), (0, 1), (0, 0)]
        a = np.repeat(ir[..., None], 3, axis=2)
        planes = [np.pad(x, pad, mode="reflect").transpose(2, 0, 1) / 255 for x in (a, vis)]
        with torch.no_grad():
            fused = model(*(torch.from_numpy(p[None].astype(np.float32)) for p in planes))
        wanted = fused[0, :, : SIZE[0], : SIZE[1]].permute(1, 2, 0).numpy() * 255
        assert np.abs(engine(ir, vis) - wanted).max() <= 0.5 + 5e-5 * 255
        assert engine.report.model == "Colour"

    def test_plain_module_in_training_mode(self):
        class Plain(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Conv2d(2, 1, 3, padding=1)
                self.drop = nn.Dropout(0.5)

            def forward(self, a, b):
                return torch.sigmoid(self.drop(self.net(torch.cat([a, b], 1))))

        model = Plain().train()
        engine = quick(model)
        assert model.training  # as it was
        ir, vis = frame(SIZE), frame(SIZE, seed=1)
        model.eval()
        model.multiple = 1
        check(engine(ir, vis), model, ir, vis)


class TestChoice:
    def test_report(self, engine):
        report = engine.report
        assert report.model == "drfusion-s" and report.size == SIZE and report.device == "cpu"
        assert report.choice == {"unet-0-1": "onnxruntime/fp32", "unet-0": "onnxruntime/fp32"}
        assert report.psnr_db > 95 and report.max_error < 1e-4 and not report.from_cache
        text = str(report)
        assert "drfusion-s 53x37 on cpu" in text and "chosen" in text
        assert "backend" in text and "PSNR dB" in text
        assert report.summary() in repr(engine)

    def test_report_round_trip(self, engine):
        again = Report.from_dict(json.loads(json.dumps(engine.report.to_dict())))
        assert again == engine.report and str(again) == str(engine.report)

    def test_everything_tried_is_listed(self, model, caplog):
        with caplog.at_level(logging.INFO, logger="fuseengine"):
            engine = quick(model, backend="auto")
        tried = {c.backend for c in engine.report.candidates}
        assert tried == {"openvino", "onnxruntime", "torch", "inductor", "tensorrt"}
        (inductor,) = [c for c in engine.report.candidates if c.backend == "inductor"]
        assert inductor.milliseconds is None and "effort='full'" in inductor.note
        assert any(c.note == "chosen" for c in engine.report.candidates)
        assert engine.report.summary() in caplog.text
        ir, vis = frame(SIZE), frame((*SIZE, 3), seed=1)
        assert psnr(engine(ir, vis) / 255, expected(model, ir, vis)) > 45

    def test_guard_refuses_bf16_and_keeps_fp32(self, model):
        engine = quick(model, backend="torch", guard_db=200.0)
        notes = {c.precision: c.note for c in engine.report.candidates}
        assert "below the guard's 200 dB" in notes["bf16"] and notes["fp32"] == "chosen"
        assert set(engine.report.choice.values()) == {"torch/fp32"}

    def test_what_was_asked_for_and_misses_the_guard(self, model):
        with pytest.raises(CompileError, match=r"torch/bf16: refused: .* dB is below") as caught:
            quick(model, backend="torch", precision="bf16", guard_db=200.0)
        assert "guard 200.0 dB" in str(caught.value)

    def test_largest_error_is_a_guard_too(self, model):
        with pytest.raises(CompileError, match=r"an error of .* is above 1e-09"):
            quick(model, precision="fp32", max_error=1e-9)

    def test_lossy_where_it_is_allowed(self, model):
        engine = quick(model, backend="torch", precision="bf16", guard_db=10.0, max_error=1.0)
        assert set(engine.report.choice.values()) == {"torch/bf16"}
        assert 10 < engine.report.psnr_db < 80

    def test_precision_that_is_not_offered(self, model):
        with pytest.raises(CompileError, match="onnxruntime/bf16: offers fp32, int8 only"):
            quick(model, precision="bf16")

    def test_examples(self, model):
        pairs = [(frame(SIZE), frame((*SIZE, 3), seed=1))]
        assert quick(model, examples=pairs).report.psnr_db > 95
        with pytest.raises(SizeMismatchError):
            quick(model, examples=[(frame((8, 8)), frame((8, 8)))])

    def test_by_name(self):
        engine = quick("drfusion-s", size=(24, 32))
        model = fe.load_model("drfusion-s")
        ir, vis = frame((24, 32)), frame((24, 32), seed=1)
        check(engine(ir, vis), model, ir, vis)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"backend": "onnxrutnime"}, "unknown backend .*Did you mean 'onnxruntime'"),
            ({"precision": "fp8"}, "unknown precision 'fp8'; expected one of: auto, bf16"),
            ({"device": "tpu"}, "unknown device 'tpu'"),
            ({"effort": "max"}, "unknown effort 'max'"),
        ],
    )
    def test_unknown_names(self, model, options, message):
        with pytest.raises(UnknownNameError, match=message):
            quick(model, **options)

    @pytest.mark.parametrize("name", ["drfusion-xl", "drfusion", "nonsense"])
    def test_unknown_models(self, name):
        with pytest.raises(UnknownNameError, match="expected one of: .*drfusion-s"):
            quick(name)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"size": (1, 64)},
                r"size=\(1, 64\); expected \(height, width\), two integers of at least 2",
            ),
            ({"size": (64,)}, "expected .height, width."),
            ({"size": (64.5, 64)}, "expected .height, width."),
            ({"threads": 0}, "threads=0; expected a number >= 1"),
            ({"guard_db": 0}, "expected both above 0"),
            ({"guard_db": float("nan")}, "expected both above 0"),
            ({"max_error": -1.0}, "expected both above 0"),
        ],
    )
    def test_bad_settings(self, model, options, message):
        with pytest.raises(SettingError, match=message):
            quick(model, **options)


class TestProfile:
    def test_parts(self, engine):
        profile = engine.profile(runs=5)
        names = [name for name, _ in profile.parts]
        assert names[0] == "frames in" and names[-1] == "frames out"
        assert names.count("unet-0-1") == 2 and names.count("unet-0") == 1
        assert all(len(times) == 5 and (times > 0).all() for _, times in profile.parts)
        assert len(profile.frame) == 5
        assert (profile.frame > 0).all()
        text = str(profile)
        assert "p50 ms" in text and "whole call" in text and "overhead" in text
        data = json.loads(json.dumps(profile.to_dict()))
        assert {"frame", *names} <= {row["part"] for row in data["parts"]}
        assert all(row["n"] == 5 and row["p50"] <= row["p99"] for row in data["parts"])
        assert data["overhead_ms"] == profile.overhead_ms

    def test_of_another_size(self, any_size, engine):
        assert len(any_size.profile(runs=2, size=(20, 24)).frame) == 2
        with pytest.raises(SizeMismatchError):
            engine.profile(runs=2, size=(20, 24))
