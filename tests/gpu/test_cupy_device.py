"""The run side on the device: CuPy arrays, compiled kernels, one graph; frames already there."""

from __future__ import annotations

import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
cupy = pytest.importorskip("cupy", reason="CuPy is not installed: the run side's GPU arrays")
pytest.importorskip("triton", reason="Triton is not installed: it compiles the kernels")

from fuseengine.kernels import recording  # noqa: E402
from fuseengine.kernels._triton import _capability  # noqa: E402
from fuseengine.pipelined import Pipelined  # noqa: E402
from fuseengine.runtime import gpu_frames  # noqa: E402
from fuseengine.runtime.cupy_device import CupyDevice  # noqa: E402
from fuseengine.runtime.executor import CpuDevice, Executor  # noqa: E402
from fuseengine.runtime.frames import FrameAdapter  # noqa: E402
from fuseengine.stages import ModelStages  # noqa: E402
from fuseengine.tracing import capture  # noqa: E402
from tests.helpers import pictures_for, system  # noqa: E402

SYSTEMS = ("drfusion-s", "drmf-s", "dmfuse-s", "dmnet-s", "mask-difuser-s")
SIZE = (60, 94)


class TorchStage:
    """A stage as the reference module on the same memory, so that only the device differs."""

    def __init__(self, module, variant, device):
        self.module, self.use, self.device = module, variant.use, device

    def bind(self, inputs, outputs):
        given = [torch.as_tensor(x, device=self.device) for x in inputs]
        made = [torch.as_tensor(y, device=self.device) for y in outputs]

        def call():
            stream = None
            if self.device == "cuda":
                stream = torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)
            with torch.inference_mode(), torch.cuda.stream(stream):
                results = self.module(*given)
                results = results if isinstance(results, (tuple, list)) else (results,)
                for index, target in zip(self.use, made, strict=True):
                    target.copy_(results[index])

        return call


@pytest.fixture(scope="module", params=SYSTEMS)
def engine(request, tmp_path_factory):
    """Model, program, adapter, executors on the CPU and on the GPU."""
    model = system(request.param)
    program = capture(model)
    source = ModelStages(model, program)
    capability = _capability(torch.device("cuda", 0))
    folder = tmp_path_factory.mktemp("kernels")
    recording.write(program, SIZE, folder, (capability,), ptx=False)
    adapter = FrameAdapter(SIZE, program.channels, program.multiple, program.padding)

    def executor(device, where):
        runners = {v: TorchStage(source.module(v).to(where), v, where) for v in program.variants()}
        return Executor(program, adapter.padded, runners, device, SIZE)

    inputs = pictures_for(model, adapter.padded)
    on_cpu = executor(CpuDevice(), "cpu")
    for target, plane in zip(on_cpu.inputs, inputs, strict=True):
        target[...] = plane.numpy()
    on_cpu.run()
    expected = on_cpu.output.copy()
    return adapter, executor(CupyDevice(folder), "cuda"), [x.numpy() for x in inputs], expected


def run(executor, planes):
    for target, plane in zip(executor.inputs, planes, strict=True):
        executor.device.host(target)[...] = plane
        executor.device.send(target)
    executor.run()
    return executor.device.fetch(executor.output).copy()


def test_equals_the_cpu(engine):
    _, executor, planes, expected = engine
    found = run(executor, planes)
    # Float32 networks in another order of sums, and cuDNN's rounding to TF32 is off.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)
    np.testing.assert_array_equal(run(executor, planes), found)


def test_the_frame_is_one_graph(engine):
    _, executor, planes, _ = engine
    run(executor, planes)
    assert executor.device.why_no_graph == ""


def test_replay_follows_its_inputs(engine):
    _, executor, planes, _ = engine
    first = run(executor, planes)
    run(executor, planes[::-1])
    np.testing.assert_array_equal(run(executor, planes), first)


def test_no_allocation_inside_a_frame(engine):
    _, executor, planes, _ = engine
    run(executor, planes)
    before = cupy.get_default_memory_pool().total_bytes()
    for _ in range(20):
        run(executor, planes)
    assert cupy.get_default_memory_pool().total_bytes() == before


def test_pipelined_pictures_are_those_of_single_frames(engine, pictures):
    adapter, executor, _, _ = engine
    pairs = [pictures(SIZE, seed) for seed in range(12)]
    expected = []
    for ir, vis in pairs:
        planes = [np.empty(x.shape, np.float32) for x in executor.inputs]
        adapter.load(ir, vis, *planes)
        expected.append(adapter.store(run(executor, planes), vis))
    with Pipelined(lambda size: (adapter, executor), threading.Lock()) as pipeline:
        for _ in range(2):
            found = list(pipeline.map(pairs))
            for fused, picture in zip(found, expected, strict=True):
                np.testing.assert_array_equal(fused, picture)
        before = cupy.get_default_memory_pool().total_bytes()
        list(pipeline.map(pairs))
        assert cupy.get_default_memory_pool().total_bytes() == before


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_frames_that_are_on_the_gpu(engine, pictures, library):
    adapter, executor, _, _ = engine
    ir, vis = pictures(SIZE)
    planes = [np.empty(x.shape, np.float32) for x in executor.inputs]
    adapter.load(ir, vis, *planes)
    expected = adapter.store(run(executor, planes), vis)
    give = cupy.asarray if library == "cupy" else lambda x: torch.from_numpy(x).cuda()
    fused = gpu_frames.fuse(lambda size: (adapter, executor), give(ir), give(vis))
    assert isinstance(fused, cupy.ndarray if library == "cupy" else torch.Tensor)
    found = (fused.get() if library == "cupy" else fused.cpu().numpy()).astype(int)
    assert np.abs(found - expected).max() <= 1


def test_cufft_for_a_length_without_a_kernel():
    from fuseengine.program import Node
    from fuseengine.runtime import ops

    rng = np.random.default_rng(0)
    x, kernel = rng.random((2, 1, 33, 50), np.float32), rng.random((3, 5), np.float32)
    attrs = {"regularisation": 0.1}
    device = CupyDevice()
    given, out = [device.constant(a) for a in (x, kernel)], device.empty(x.shape)
    node = Node("op", "wiener_deconvolution", ("x", "k"), ("y",), attrs)
    device.wrap([device.bind_op(node, given, out)])()
    assert device.why_no_graph == ""
    expected = np.empty_like(x)
    ops.bind("wiener_deconvolution", [x, kernel], expected, attrs)()
    np.testing.assert_allclose(device.fetch(out), expected, rtol=0, atol=1e-4)
