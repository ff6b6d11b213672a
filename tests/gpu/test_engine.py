"""An engine on a CUDA device: the CPU's pictures, at every precision, size and kind of frame."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import fuseengine as fe
from benchmarks.harness import psnr
from fuseengine.models.observation import Blur, Compose, Downsample, Identity
from fuseengine.runtime.frames import FrameAdapter

torch = pytest.importorskip("torch")

SIZE = (96, 128)


@pytest.fixture(scope="module")
def on_cuda(model, make):
    return make(model, None)


@pytest.fixture(scope="module")
def on_cpu(model):
    return fe.compile(model, None, device="cpu", backend="torch", precision="fp32", cache=False)


def floats(size, pictures, seed=0):
    adapter = FrameAdapter(size, "luma", 4)
    a, b = np.empty((2, 1, 1, *adapter.padded), dtype=np.float32)
    adapter.load(*pictures(size, seed), a, b)
    return a, b


def program_result(engine, a, b):
    _, executor = engine._plan(engine.size)
    for target, source in zip(executor.inputs, (a, b), strict=True):
        target[...] = executor.device.constant(source)
    executor.run()
    executor.device.synchronize()
    return executor.output.cpu().numpy()


# Against float32 eager on the CPU. fp32 differs by summation order; TF32 keeps 10 bits of each
# factor like fp16, bfloat16 7. The floors are 10 dB below what those give on trained weights.
@pytest.mark.parametrize(
    ("precision", "least_db"), [("fp32", 80), ("tf32", 50), ("fp16", 50), ("bf16", 33)]
)
def test_precision_against_float32_eager(model, make, pictures, precision, least_db):
    engine = make(model, SIZE, precision, guard_db=20.0, max_error=1.0)
    assert set(engine.report.choice.values()) == {f"torch/{precision}"}
    a, b = floats(SIZE, pictures)
    with torch.inference_mode():
        expected = model(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    found = program_result(engine, a, b)
    decibels = psnr(found, expected, 1.0)
    assert decibels >= least_db
    if precision != "fp32":
        assert decibels < 120, "nothing was rounded: was the precision applied?"


def test_auto_stays_inside_the_guard(model, pictures):
    engine = fe.compile(model, SIZE, device="cuda", precision="auto", guard_db=45.0, cache=False)
    assert engine.report.psnr_db >= 45.0
    tried = {(c.backend, c.precision) for c in engine.report.candidates if c.milliseconds}
    assert {("torch", p) for p in ("fp32", "tf32", "bf16", "fp16")} <= tried


@pytest.mark.parametrize("size", [(96, 128), (63, 95), (2, 2), (5, 200), (97, 33), (480, 640)])
def test_any_size(on_cuda, on_cpu, pictures, size):
    ir, vis = pictures(size)
    fused = on_cuda(ir, vis)
    assert fused.shape == vis.shape and fused.dtype == vis.dtype
    difference = fused.astype(int) - on_cpu(ir, vis)
    assert abs(difference).max() <= 1


def test_sizes_take_turns(on_cuda, on_cpu, pictures):
    # More sizes than an engine keeps, and back to the first: its plan is built again.
    for size in [(32, 32), (32, 48), (48, 32), (64, 32), (32, 64), (80, 32), (32, 32)]:
        ir, vis = pictures(size)
        assert abs(on_cuda(ir, vis).astype(int) - on_cpu(ir, vis)).max() <= 1


def _kinds(ir, vis):
    wide = ir.astype(np.uint16) * 257
    batch = np.stack([ir, ir[::-1], ir[:, ::-1]]), np.stack([vis, vis[::-1], vis[:, ::-1]])
    return {
        "gray": (ir, vis[..., 1]),
        "colour": (ir, vis),
        "three equal channels": (np.repeat(ir[..., None], 3, axis=-1), vis),
        "uint16 infrared": (wide, vis),
        "uint16 both": (wide, vis.astype(np.uint16) * 257),
        "float32": ((ir / 255).astype(np.float32), (vis / 255).astype(np.float32)),
        "float64": (ir / 255, vis / 255),
        "batch": batch,
        "not contiguous": (ir[:, ::-1], vis[:, ::-1]),
        "torch tensors": (torch.from_numpy(ir), torch.from_numpy(vis)),
        "torch batch": tuple(torch.from_numpy(x) for x in batch),
    }


@pytest.mark.parametrize("kind", list(_kinds(*np.zeros((2, 4, 4, 3), np.uint8))))
def test_frames_of_all_kinds(on_cuda, on_cpu, pictures, kind):
    ir, vis = _kinds(*pictures(SIZE))[kind]
    fused, expected = on_cuda(ir, vis), on_cpu(ir, vis)
    assert type(fused) is type(vis)
    assert fused.dtype == vis.dtype and tuple(fused.shape) == tuple(vis.shape)
    fused, expected = np.asarray(fused, np.float64), np.asarray(expected, np.float64)
    full = {"u": 255.0, "f": 1.0}[np.asarray(vis).dtype.kind]
    full = 65535.0 if np.asarray(vis).dtype == np.uint16 else full
    # One grey level of 8 bits: float32 differences of 1e-5 may round to either side.
    assert abs(fused - expected).max() <= full / 255
    assert fused.std() > 0


def test_out_is_written_and_returned(on_cuda, pictures):
    ir, vis = pictures(SIZE)
    out = np.full_like(vis, 42)
    assert on_cuda(ir, vis, out=out) is out
    np.testing.assert_array_equal(out, on_cuda(ir, vis))


def test_results_are_the_callers_own(on_cuda, pictures):
    first = on_cuda(*pictures(SIZE, 0))
    kept = first.copy()
    second = on_cuda(*pictures(SIZE, 1))
    np.testing.assert_array_equal(first, kept)
    assert (first != second).any()


def test_a_bad_frame_leaves_the_engine_working(on_cuda, pictures):
    ir, vis = pictures(SIZE)
    before = on_cuda(ir, vis)
    bad = (ir / 255).astype(np.float32)
    bad[3, 4] = np.nan
    with pytest.raises(fe.FuseEngineError):
        on_cuda(bad, vis)
    np.testing.assert_array_equal(on_cuda(ir, vis), before)


def test_a_tensor_on_the_gpu_is_refused_with_a_remedy(on_cuda, pictures):
    ir, vis = (torch.from_numpy(x) for x in pictures(SIZE))
    with pytest.raises(fe.FuseEngineError, match=r"\.cpu\(\)"):
        on_cuda(ir.cuda(), vis)


def test_report_lists_backends_with_reasons(model):
    engine = fe.compile(model, (32, 32), device="cuda", cache=False)
    assert engine.report.device == "cuda"
    notes = {c.backend: c.note for c in engine.report.candidates}
    assert "CPU" in notes["openvino"] and "CPU" in notes["onnxruntime"]
    assert "effort='full'" in notes["inductor"]
    assert "chosen" in {c.note for c in engine.report.candidates if c.backend == "torch"}
    text = str(engine.report)
    assert all(word in text for word in ("on cuda", "openvino", "onnxruntime", "inductor"))


def test_profile_covers_the_call(model, make):
    profile = make(model, SIZE).profile(5)
    labels = [label for label, _ in profile.parts]
    assert labels[0] == "frames in" and labels[-1] == "frames out"
    assert any("unet" in label for label in labels)
    assert all((times > 0).all() for _, times in profile.parts)


def test_model_that_is_on_the_gpu_already(model, make, on_cpu, pictures):
    import copy

    engine = make(copy.deepcopy(model).cuda(), SIZE)
    ir, vis = pictures(SIZE)
    assert abs(engine(ir, vis).astype(int) - on_cpu(ir, vis)).max() <= 1


def test_auto_device_is_the_gpu(model):
    engine = fe.compile(model, (32, 32), backend="torch", precision="fp32", cache=False)
    assert engine.device == "cuda"


def test_degradation_operators(make, pictures):
    torch.manual_seed(0)
    operators = (Compose(Blur.gaussian(1.0), Downsample(2)), Identity())
    model = fe.build("drfusion-s", operators=operators)
    engine = make(model, SIZE)
    a, b = floats(SIZE, pictures)
    with torch.inference_mode():
        expected = model(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    # Float32 through three U-Nets and cuFFT against another FFT library.
    np.testing.assert_allclose(program_result(engine, a, b), expected, rtol=0, atol=1e-4)


def test_from_the_cache(monkeypatch, tmp_path, model, pictures):
    monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path))
    engines = [
        fe.compile(model, SIZE, device="cuda", backend="torch", precision="fp32") for _ in range(2)
    ]
    assert [e.report.from_cache for e in engines] == [False, True]
    frames = pictures(SIZE)
    np.testing.assert_array_equal(engines[0](*frames), engines[1](*frames))


def test_compiling_leaves_global_settings_alone(model, make):
    def settings():
        backends = torch.backends
        return (
            backends.cudnn.allow_tf32,
            backends.cudnn.benchmark,
            backends.cuda.matmul.allow_tf32,
            torch.is_inference_mode_enabled(),
            torch.cuda.current_stream(),
        )

    before = settings()
    make(model, (32, 32), "tf32", guard_db=20.0)(*np.zeros((2, 32, 32), np.uint8))
    assert settings() == before


def test_compiling_while_another_engine_fuses(model, make, on_cuda, pictures):
    # Capturing a graph must not break, or be broken by, CUDA calls of other threads.
    ir, vis = pictures(SIZE)
    expected = on_cuda(ir, vis)
    stop, wrong = threading.Event(), []

    def fuse():
        while not stop.is_set():
            try:
                if (on_cuda(ir, vis) != expected).any():
                    wrong.append("another picture")
            except Exception as error:
                wrong.append(error)
                return

    thread = threading.Thread(target=fuse)
    thread.start()
    try:
        for _ in range(3):
            engine = make(model, SIZE)
            assert abs(engine(ir, vis).astype(int) - expected).max() <= 1
    finally:
        stop.set()
        thread.join(30)
    assert not wrong


def test_one_engine_in_two_threads(on_cuda, pictures):
    frames = [pictures(SIZE, seed) for seed in range(4)]
    expected = [on_cuda(*pair) for pair in frames]
    results: dict[int, list] = {}

    def fuse(k):
        results[k] = [on_cuda(*frames[k]) for _ in range(20)]

    threads = [threading.Thread(target=fuse, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for k in range(4):
        assert len(results[k]) == 20
        assert all((result == expected[k]).all() for result in results[k])
