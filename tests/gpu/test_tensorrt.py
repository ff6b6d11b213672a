"""TensorRT on the device: plans are built, read, described and run; engines and their graph."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fuseengine as fe  # noqa: E402
from fuseengine.backends import BACKENDS  # noqa: E402
from fuseengine.backends.tensorrt import PlanRunner, typed_network  # noqa: E402
from fuseengine.export.tensorrt import BuildSettings, LoadedPlan, build  # noqa: E402
from fuseengine.program import resolve  # noqa: E402
from fuseengine.stages import ModelStages  # noqa: E402
from fuseengine.tracing import capture  # noqa: E402
from tests.helpers import psnr, system  # noqa: E402

SYSTEMS = ("drfusion-s", "drmf-s", "dmfuse-s", "dmnet-s", "mask-difuser-s")
SIZE = (64, 96)
LEAST_DB = {"fp32": 90, "tf32": 55, "fp16": 50, "bf16": 35}
"""Of one network's results, peak 1: what the type keeps, less what a few layers lose."""


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", SYSTEMS)


@pytest.fixture(autouse=True)
def usable(monkeypatch, tmp_path):
    reason = BACKENDS["tensorrt"].unavailable("cuda")
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def stages():
    made = {}

    def stages(name):
        if name not in made:
            model = system(name)
            program = capture(model)
            made[name] = program, ModelStages(model, program)
        return made[name]

    return stages


def lowered(program, source, variant, call, precision):
    shapes = {f"in{i}": resolve(program.values[n].shape, SIZE) for i, n in enumerate(call.inputs)}
    settings = BuildSettings(shapes, tf32=precision == "tf32", level=1)
    return shapes, LoadedPlan(build(typed_network(source, variant, precision), settings))


@pytest.mark.parametrize("precision", LEAST_DB)
def test_every_stage(stages, name, precision):
    program, source = stages(name)
    generator = torch.Generator().manual_seed(0)
    for variant, calls in program.variants().items():
        shapes, plan = lowered(program, source, variant, calls[0], precision)
        inputs = [torch.rand(s, generator=generator) for s in shapes.values()]
        with torch.inference_mode():
            results = source.module(variant)(*inputs)
        results = results if isinstance(results, (tuple, list)) else (results,)
        expected = [results[i] for i in variant.use]
        made = [torch.full(e.shape, float("nan"), device="cuda") for e in expected]
        PlanRunner(plan).bind([x.cuda() for x in inputs], made)()
        torch.cuda.synchronize()
        for found, wanted in zip(made, expected, strict=True):
            peak = float(wanted.abs().max()) or 1.0
            quality = psnr(found.cpu() / peak, wanted / peak)
            assert quality >= LEAST_DB[precision], (variant.label, quality)


def test_summary(stages):
    program, source = stages("drfusion-s")
    variant, calls = next(iter(program.variants().items()))
    _, plan = lowered(program, source, variant, calls[0], "fp16")
    summary = plan.summary()
    assert summary.layers and {"in0", "out0"} <= set(summary.tensors)
    assert summary.activation_bytes > 0
    assert "fp16" in summary.types() or not summary.types()


def test_the_second_plan_comes_from_the_cache(stages):
    program, source = stages("drfusion-s")
    variant, calls = next(iter(program.variants().items()))
    shapes = {
        f"in{i}": resolve(program.values[n].shape, SIZE) for i, n in enumerate(calls[0].inputs)
    }
    first, second = (build(source.onnx(variant), BuildSettings(shapes, level=1)) for _ in range(2))
    assert (first.from_cache, second.from_cache) == (False, True)
    assert second.content == first.content


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_engine(model, make, pictures, precision):
    engine = make(model, SIZE, precision, backend="tensorrt", guard_db=40.0)
    assert set(engine.report.choice.values()) == {f"tensorrt/{precision}"}
    _, executor = engine._plan(SIZE)
    assert isinstance(executor._run.__self__, torch.cuda.CUDAGraph)
    ir, vis = pictures(SIZE)
    expected = fe.compile(model, SIZE, device="cpu", precision="fp32", cache=False)(ir, vis)
    difference = np.abs(engine(ir, vis).astype(int) - expected.astype(int))
    assert difference.max() <= (1 if precision == "fp32" else 4)
    np.testing.assert_array_equal(engine(ir, vis), engine(ir, vis))
