"""The executor's GPU device without PyTorch, with the stand-in for CuPy of fake_cupy.py.

What is checked here is order, memory and errors: what goes to which stream, what is captured, what
is kept alive. Kernels of ours are computed by NumPy in their place (their code needs a GPU:
tests/gpu/test_cupy_device.py), the words that they are launched with are compared with what was
compiled.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import random
import sys
import threading

import numpy as np
import pytest

from fuseengine.errors import (
    BackendUnavailableError,
    CaptureError,
    CompileError,
    FrameError,
    SettingError,
    SizeMismatchError,
)
from fuseengine.pipelined import Pipelined
from fuseengine.program import Node, Program, StageVariant, Value
from fuseengine.runtime import cubins, gpu_frames, ops
from fuseengine.runtime.cubins import Entry, Pointer, variant_of
from fuseengine.runtime.executor import Executor
from fuseengine.runtime.frames import FrameAdapter
from fuseengine.runtime.launches import Array, Launch, Launches, Number, OpCall, frame_key, key_of
from fuseengine.video import Stream
from tests.helpers import BLOCK_TORCH, run_python
from tests.runtime import fake_cupy

SIZE, PADDED = (6, 10), (8, 16)
GRAY = (1, 1, "H", "W")
STEP = {
    "sqrt_abar": 0.6,
    "sqrt_one_minus_abar": 0.8,
    "sqrt_abar_prev": 0.8,
    "sqrt_one_minus_abar_prev": 0.6,
}


@pytest.fixture
def cupy(monkeypatch):
    modules = fake_cupy.make()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("FUSEENGINE_CUBINS", raising=False)
    return modules["cupy"]


def step_program():
    """y = 0.5 step(a, stage(a, b)): a stage, an op of ours, an elementwise op."""
    names = ("a", "b", "eps", "x", "y")
    nodes = (
        Node("stage", "net", ("a", "b"), ("eps",)),
        Node("op", "ddim_step", ("a", "eps"), ("x",), STEP),
        Node("op", "mul", ("x",), ("y",), {"scalar": 0.5}),
    )
    values = {n: Value(n, GRAY) for n in names}
    return Program("test", "luma", 8, ("a", "b"), "y", values, {}, nodes)


class Net:
    """A stage on the fake device: eps = a - b, queued on the current stream."""

    def __init__(self, cupy, refuses=False):
        self.cupy, self.refuses, self.bound_on = cupy, refuses, []

    def bind(self, inputs, outputs):
        self.bound_on.append(self.cupy.cuda.get_current_stream().name)
        (a, b), (eps,) = inputs, outputs

        def call():
            if self.refuses and self.cupy.cuda.get_current_stream().captured is not None:
                raise CompileError("not while a graph is captured")
            self.cupy.subtract(a, b, out=eps)

        return call


def launch(kernel, arguments):
    return Launch(
        kernel, kernel, (2,), tuple(arguments.items()), {"BLOCK": 64}, {"num_warps": 4}, ()
    )


def calls():
    """One launch per op, whose kernels take what :func:`compute` needs."""
    planes, shape = (1, 1, *PADDED), (1, 1, *PADDED)
    f32, u8 = "*fp32", "*u8"
    step = launch(
        "step",
        {"x": Array("in0", f32), "eps": Array("in1", f32), "out": Array("out", f32),
         "scratch": Array("scratch0", f32), "table": Array("table0", f32), "count": 128,
         "scale_x": 4 / 3, "scale_eps": -0.46666666},
    )  # fmt: skip
    found = [
        OpCall(
            key_of("ddim_step", [shape, shape], shape, STEP), 87, (step,), (512,),
            (np.arange(4, dtype=np.float32),),
        )
    ]  # fmt: skip
    for frame in ((*SIZE, 3), SIZE):
        into = launch(
            "into",
            {"frame": Array("in0", u8), "out": Array("out", f32), "channels": len(frame),
             "low": Number("low"), "scale": Number("scale")},
        )  # fmt: skip
        back = launch(
            "back",
            {"fused": Array("in0", f32), "visible": Array("in1", u8), "out": Array("out", u8),
             "channels": len(frame)},
        )  # fmt: skip
        key = frame_key("frame_in", "|u1", frame, planes, "luma")
        found.append(OpCall(key, 87, (into,)))
        key = frame_key("frame_out", "|u1", frame, planes, "luma")
        found.append(OpCall(key, 87, (back,)))
    return found


def entry(planned):
    values = {
        name: Pointer(1 << 20, a.type) if isinstance(a, Array) else 0.5 if isinstance(a, Number)
        else a
        for name, a in planned.arguments
    }  # fmt: skip
    variant = variant_of(planned.kernel, values, planned.constants, (), planned.options)
    code = planned.kernel.encode()
    sha256 = hashlib.sha256(code).hexdigest()
    return Entry(
        op="op", label=planned.label, dtype="float32", capability=87, form="cubin",
        file=f"{planned.kernel}.cubin", sha256=sha256, kernel=planned.kernel, entry=planned.kernel,
        parameters=variant.parameters, hidden=2, constants=dict(variant.constants), assumes={},
        options=dict(variant.options), threads=128, shared_bytes=0, grid_rule="", triton_version="",
    ), code  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Compiled kernels whose code nobody reads, and what to launch."""
    found = calls()
    kernels = {planned.kernel: entry(planned) for call in found for planned in call.launches}
    cubins.write(tmp_path, kernels.values())
    Launches(found).write(tmp_path)
    return tmp_path


def at(word, shape, kind=np.float32):
    count = int(np.prod(shape))
    raw = (ctypes.c_uint8 * (count * np.dtype(kind).itemsize)).from_address(int(word))
    return np.frombuffer(raw, kind).reshape(shape)


def compute(path, name, grid, block, words, shared_mem):
    """What the kernels would do, from the words that they are launched with."""
    assert (grid, block, shared_mem) == ((2, 1, 1), (128, 1, 1), 0)
    assert [int(w) for w in words[-2:]] == [0, 0]  # Triton's hidden pointers
    planes = (1, 1, *PADDED)
    if name == "step":
        x, eps, out = (at(w, planes) for w in words[:3])
        assert at(words[4], 4).tolist() == [0, 1, 2, 3]
        at(words[3], 128)[...] = 1.0  # scratch memory is there
        assert [type(w) for w in words[5:8]] == [np.int32, np.float32, np.float32]
        out[...] = words[6] * x + words[7] * eps
        return
    channels = int(words[2 if name == "into" else 3])
    frame = (*SIZE, 3) if channels == 3 else SIZE
    adapter = FrameAdapter(SIZE, "luma", 8)
    if name == "into":
        given, out = at(words[0], frame, np.uint8), at(words[1], planes)
        assert words[3:5] == (np.float32(0.0), np.float32(1 / 255))
        adapter.load(given, given, out, np.empty_like(out))
    else:
        fused, visible = at(words[0], planes), at(words[1], frame, np.uint8)
        at(words[2], frame, np.uint8)[...] = adapter.store(fused.copy(), visible)


@pytest.fixture
def device(cupy, folder):
    from fuseengine.runtime.cupy_device import CupyDevice

    cupy.run_kernel = compute
    return CupyDevice(folder)


@pytest.fixture
def executor(device, cupy):
    return Executor(step_program(), PADDED, {StageVariant("net", (0,)): Net(cupy)}, device, SIZE)


def pictures(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.random((1, 1, *PADDED), np.float32) for _ in range(2)]


def expected(a, b):
    out = np.empty_like(a)
    ops.bind("ddim_step", [a, a - b], out, STEP)()
    return 0.5 * out


def fuse(executor, pair):
    for target, plane in zip(executor.inputs, pair, strict=True):
        executor.device.host(target)[...] = plane
        executor.device.send(target)
    executor.run()
    return executor.device.fetch(executor.output).copy()


class TestFrame:
    def test_result(self, executor):
        for seed in range(3):
            pair = pictures(seed)
            np.testing.assert_allclose(fuse(executor, pair), expected(*pair), atol=1e-6)

    def test_the_graph_is_all_that_runs(self, executor, cupy):
        fuse(executor, pictures())
        cupy.cuda.events.clear()
        fuse(executor, pictures(1))
        stream = executor.device.stream.name
        count = 4 * PADDED[0] * PADDED[1]
        assert cupy.cuda.events == [
            ("to device", count, stream),
            ("to device", count, stream),
            ("graph", stream),
            ("to host", count, stream),
            ("synchronize", stream),
        ]

    def test_captured_after_two_warm_runs_and_a_wait(self, executor, cupy):
        cupy.cuda.events.clear()
        executor.run()
        kinds = [event[0] for event in cupy.cuda.events]
        once = ["subtract", "kernel", "multiply"]
        assert kinds == [
            *once, *once, "synchronize", "begin capture", *once, "end capture", "graph",
        ]  # fmt: skip

    def test_everything_is_on_the_one_stream(self, executor, cupy):
        cupy.cuda.events.clear()
        fuse(executor, pictures())
        executor.run_timed()
        stream = executor.device.stream.name
        assert {event[-1] for event in cupy.cuda.events} == {stream}
        assert executor.runners[StageVariant("net", (0,))].bound_on == [stream]

    def test_what_a_graph_allocates_is_its_own(self, executor, cupy, monkeypatch):
        seen = []
        monkeypatch.setattr(
            cupy, "multiply",
            lambda *given, out: seen.append(list(cupy.cuda.pools)) or np.multiply(*given, out=out),
        )  # fmt: skip
        again = Executor(executor.program, PADDED, executor.runners, executor.device, SIZE)
        again.run()
        assert len(seen) == 3 and all(len(pools) == 1 for pools in seen)
        assert len({id(pools[0]) for pools in seen}) == 1

    def test_arrays_live_as_long_as_the_graph(self, executor):
        run_frame = executor.run
        executor.run()
        inputs, output, device = executor.inputs, executor.output, executor.device
        pair = pictures()
        executor._calls.clear()
        executor._arrays.clear()
        gc.collect()
        for target, plane in zip(inputs, pair, strict=True):
            target[...] = plane
        run_frame()
        np.testing.assert_allclose(device.fetch(output), expected(*pair), atol=1e-6)

    def test_page_locked_memory_is_made_once(self, executor):
        first = executor.device.host(executor.output)
        assert executor.device.host(executor.output) is first

    def test_a_profile_has_all_nodes(self, executor):
        assert [t.label for t in executor.profile(2)] == ["net-0", "ddim_step", "mul"]


class TestPipelined:
    """Copies on streams of their own, on a device that orders nothing by itself."""

    SHAPE = (*SIZE, 3)

    @pytest.fixture(params=range(6))
    def chance(self, request, cupy, executor):
        executor.run()  # captured before: what follows is frames
        cupy.cuda.chance = random.Random(request.param)

    @pytest.fixture
    def adapter(self):
        return FrameAdapter(SIZE, "luma", 8)

    @pytest.fixture
    def pipeline(self, executor, adapter):
        with Pipelined(lambda size: (adapter, executor), threading.Lock()) as made:
            yield made

    def frames(self, count):
        rng = np.random.default_rng(7)
        shapes = SIZE, self.SHAPE
        return [tuple(rng.integers(0, 256, s, np.uint8) for s in shapes) for _ in range(count)]

    def want(self, adapter, ir, vis):
        a, b = np.empty((2, 1, 1, *PADDED), np.float32)
        adapter.load(ir, vis, a, b)
        return adapter.store(expected(a, b), vis)

    def check(self, adapter, found, frames):
        for fused, pair in zip(found, frames, strict=True):
            np.testing.assert_allclose(fused.astype(int), self.want(adapter, *pair), atol=1)

    def test_pictures_in_order(self, chance, pipeline, adapter):
        frames = self.frames(25)
        self.check(adapter, list(pipeline.map(frames)), frames)

    def test_results_in_any_order(self, chance, pipeline, adapter):
        frames = self.frames(12)
        found = []
        for first, second in zip(frames[::2], frames[1::2], strict=True):
            tickets = pipeline.submit(*first), pipeline.submit(*second)
            tickets[0].computed()
            found += [ticket.result() for ticket in tickets[::-1]][::-1]
        self.check(adapter, found, frames)

    def test_beside_the_engines_own_frames(self, chance, pipeline, executor, adapter):
        frames = self.frames(10)
        for k in range(0, 10, 2):
            ticket = pipeline.submit(*frames[k])
            planes = np.empty((2, 1, 1, *PADDED), np.float32)
            adapter.load(*frames[k + 1], *planes)
            own = adapter.store(fuse(executor, planes), frames[k + 1][1])
            self.check(adapter, [ticket.result(), own], frames[k : k + 2])

    @pytest.mark.parametrize("lane", ["compute", "out"])
    def test_the_device_hurts_where_a_lane_does_not_wait(
        self, cupy, pipeline, executor, adapter, lane, monkeypatch
    ):
        executor.run()
        monkeypatch.setattr(getattr(executor.device.lanes(), lane), "after", lambda mark: None)
        frames, wrong = self.frames(12), 0
        for seed in range(6):
            cupy.cuda.chance = random.Random(seed)
            try:
                self.check(adapter, pipeline.map(frames), frames)
            except AssertionError:
                wrong += 1
        assert wrong

    def test_a_result_that_is_not_waited_for_is_wrong(
        self, cupy, pipeline, executor, adapter, monkeypatch
    ):
        executor.run()
        cupy.cuda.chance = random.Random(0)
        frames = self.frames(8)
        list(pipeline.map(frames[:2]))
        with monkeypatch.context() as patched:
            for slot in pipeline._free:
                patched.setattr(slot._done, "synchronize", lambda: None)
            with pytest.raises(AssertionError):
                self.check(adapter, pipeline.map(frames), frames)
        for stream in cupy.cuda.all_streams:
            stream.synchronize()

    def test_streams(self, pipeline, executor, cupy):
        """One frame: where everything goes, and that only the copy back is waited for."""
        list(pipeline.map(self.frames(1)))
        cupy.cuda.events.clear()
        ticket = pipeline.submit(*self.frames(1)[0])
        lanes = executor.device.lanes()
        into, compute, out = (x.stream.name for x in (lanes.into, lanes.compute, lanes.out))
        assert compute == executor.device.stream.name and len({into, compute, out}) == 3
        count = 4 * PADDED[0] * PADDED[1]
        assert cupy.cuda.events == [
            ("to device", count, into), ("to device", count, into),
            ("wait", compute, into),
            ("on device", count, compute), ("on device", count, compute),
            ("graph", compute),
            ("on device", count, compute),
            ("wait", out, compute),
            ("to host", count, out),
        ]  # fmt: skip
        cupy.cuda.events.clear()
        ticket.result()
        assert not [event for event in cupy.cuda.events if event[0] == "synchronize"]

    def test_memory_is_made_once(self, pipeline, executor, cupy):
        frames = self.frames(3)
        list(pipeline.map(frames))
        made = []
        for name in ("zeros", "empty", "asarray"):
            setattr(cupy, name, lambda *given, name=name: made.append(name))
        list(pipeline.map(frames))
        assert made == []

    def test_a_frame_that_cannot_be_queued(self, chance, pipeline, executor, adapter, monkeypatch):
        frames = self.frames(4)
        ahead = pipeline.submit(*frames[0])
        with monkeypatch.context() as patched:
            patched.setattr(executor, "_run", lambda: pipeline.no_such_thing)
            with pytest.raises(AttributeError):
                pipeline.submit(*frames[1])
        behind = pipeline.submit(*frames[2])
        self.check(adapter, [ahead.result(), behind.result()], [frames[0], frames[2]])

    def test_closing_waits(self, cupy, executor, adapter):
        executor.run()
        cupy.cuda.chance = random.Random(1)
        pipeline = Pipelined(lambda size: (adapter, executor), threading.Lock())
        frames = self.frames(2)
        tickets = [pipeline.submit(*pair) for pair in frames]
        assert any(stream.queue for stream in cupy.cuda.all_streams)
        pipeline.close()
        assert not any(stream.queue for stream in cupy.cuda.all_streams)
        self.check(adapter, [ticket.result() for ticket in tickets], frames)
        with pytest.raises(SettingError, match="closed"):
            pipeline.submit(*frames[0])

    def test_forgetting_it_waits(self, cupy, executor, adapter):
        executor.run()
        cupy.cuda.chance = random.Random(1)
        pipeline = Pipelined(lambda size: (adapter, executor), threading.Lock())
        pipeline.submit(*self.frames(1)[0])
        del pipeline
        gc.collect()
        assert not any(stream.queue for stream in cupy.cuda.all_streams)


class TestNoGraph:
    def test_a_call_that_cannot_be_captured(self, device, cupy, caplog):
        net = Net(cupy, refuses=True)
        executor = Executor(step_program(), PADDED, {StageVariant("net", (0,)): net}, device, SIZE)
        pair = pictures()
        np.testing.assert_allclose(fuse(executor, pair), expected(*pair), atol=1e-6)
        assert "not while a graph is captured" in device.why_no_graph
        assert "call by call" in caplog.text
        assert device.stream.captured is None

    def test_a_capture_that_the_driver_ends(self, executor, cupy, caplog):
        cupy.cuda.broken_capture = True
        pair = pictures()
        np.testing.assert_allclose(fuse(executor, pair), expected(*pair), atol=1e-6)
        assert "CaptureInvalidated" in executor.device.why_no_graph

    def test_an_error_before_capture_is_the_callers(self, device, cupy):
        net = Net(cupy)
        executor = Executor(step_program(), PADDED, {StageVariant("net", (0,)): net}, device, SIZE)
        cupy.subtract = None
        with pytest.raises(TypeError):
            executor.run()
        assert cupy.cuda.streams == [cupy.cuda.null] and not cupy.cuda.pools


class TestOps:
    def bound(self, device, op, inputs, attrs, shape):
        given = [device.constant(x) for x in inputs]
        out = device.empty(shape)
        names = tuple(f"x{i}" for i in range(len(inputs)))
        call = device.bind_op(Node("op", op, names, ("y",), attrs), given, out)
        with device.active():
            call()
        return np.asarray(out)

    @pytest.mark.parametrize("op", ["circular_convolution", "wiener_deconvolution"])
    def test_filters_without_a_kernel_are_cuffts(self, device, cupy, op):
        rng = np.random.default_rng(0)
        x, kernel = rng.random((2, 1, 9, 10), np.float32), rng.random((3, 3), np.float32)
        attrs = {"regularisation": 0.1}
        found = self.bound(device, op, [x, kernel], attrs, x.shape)
        want = np.empty_like(x)
        ops.bind(op, [x, kernel], want, attrs)()
        np.testing.assert_allclose(found, want, atol=1e-5)
        assert [e[:2] for e in cupy.cuda.events if e[0] == "fft"] == [
            ("fft", "R2C"),
            ("fft", "C2R"),
        ]

    @pytest.mark.parametrize(
        ("op", "attrs", "shapes", "shape"),
        [
            ("add", {}, [(1, 2, 4, 4)] * 2, (1, 2, 4, 4)),
            ("sub", {"scalar": 1.0, "scalar_first": True}, [(1, 2, 4, 4)], (1, 2, 4, 4)),
            ("div", {"scalar": 3.0}, [(1, 2, 4, 4)], (1, 2, 4, 4)),
            ("concat", {"axis": 1}, [(1, 2, 4, 4), (1, 1, 4, 4)], (1, 3, 4, 4)),
            ("slice", {"bounds": [[0, 1], [1, 2]]}, [(1, 2, 4, 4)], (1, 1, 4, 4)),
            ("clamp", {"min": 0.2, "max": 0.7}, [(1, 2, 4, 4)], (1, 2, 4, 4)),
            ("stretch", {"per": "channel"}, [(1, 2, 4, 4)], (1, 2, 4, 4)),
            ("block_repeat", {"scale": 2}, [(1, 1, 2, 3)], (1, 1, 4, 6)),
        ],
    )  # fmt: skip
    def test_elementwise_ones_equal_the_cpus(self, device, op, attrs, shapes, shape):
        rng = np.random.default_rng(0)
        inputs = [rng.random(s, np.float32) for s in shapes]
        want = np.empty(shape, np.float32)
        ops.bind(op, inputs, want, attrs)()
        np.testing.assert_array_equal(self.bound(device, op, inputs, attrs, shape), want)

    def test_every_op_is_known(self):
        from fuseengine.runtime.cupy_device import _FILTERS, _PLANNED

        assert set(ops.OPS) == {*ops.PORTABLE, *_FILTERS, *_PLANNED}

    def test_an_unknown_op(self, device):
        with pytest.raises(CaptureError, match="'sharpen' is unknown"):
            self.bound(device, "sharpen", [], {}, (1,))

    def test_shapes_that_were_not_planned(self, device):
        x = np.zeros((1, 1, 8, 8), np.float32)
        with pytest.raises(BackendUnavailableError, match=r"ddim_step for .*1, 8, 8.*1x1x8x16"):
            self.bound(device, "ddim_step", [x, x], STEP, x.shape)

    def test_no_kernels_at_all(self, cupy):
        from fuseengine.runtime.cupy_device import CupyDevice

        x = np.zeros((1, 1, 8, 8), np.float32)
        with pytest.raises(BackendUnavailableError, match="brings none.*FUSEENGINE_CUBINS"):
            self.bound(CupyDevice(), "ddim_step", [x, x], STEP, x.shape)

    def test_a_gpu_that_the_kernels_are_not_for(self, monkeypatch, folder):
        from fuseengine.runtime.cupy_device import CupyDevice

        for name, module in fake_cupy.make(capability=90).items():
            monkeypatch.setitem(sys.modules, name, module)
        with pytest.raises(BackendUnavailableError, match="capability 90.*sm_87"):
            CupyDevice(folder)

    def test_the_environment_names_kernels(self, cupy, folder, monkeypatch):
        from fuseengine.runtime.cupy_device import CupyDevice

        monkeypatch.setenv("FUSEENGINE_CUBINS", str(folder))
        assert len(CupyDevice()._launches.calls) == len(calls())

    def test_without_cupy(self, monkeypatch):
        from fuseengine.runtime.cupy_device import CupyDevice

        monkeypatch.setitem(sys.modules, "cupy", None)
        with pytest.raises(BackendUnavailableError, match="cupy-cuda13x"):
            CupyDevice()

    def test_imports_no_torch(self):
        names = "cupy_device, gpu, gpu_frames, launches"
        run_python(f"{BLOCK_TORCH}from fuseengine.runtime import {names}")


class TestFramesOnTheGpu:
    @pytest.fixture
    def plan(self, executor):
        return lambda size: (FrameAdapter(size, "luma", 8), executor)

    def frames(self, cupy, *shapes):
        rng = np.random.default_rng(0)
        return [cupy.asarray(rng.integers(0, 256, s, dtype=np.uint8)) for s in shapes]

    def want(self, ir, vis):
        adapter = FrameAdapter(SIZE, "luma", 8)
        a, b = np.empty((2, 1, 1, *PADDED), np.float32)
        adapter.load(np.array(ir), np.array(vis), a, b)
        return adapter.store(expected(a, b), np.array(vis))

    @pytest.mark.parametrize("shape", [(*SIZE, 3), SIZE, (*SIZE, 1)])
    def test_result(self, cupy, plan, shape):
        ir, vis = self.frames(cupy, SIZE, shape)
        fused = gpu_frames.fuse(plan, ir, vis)
        assert isinstance(fused, cupy.ndarray) and fused.shape == shape
        if shape == (*SIZE, 1):
            vis, fused = vis[..., 0], fused[..., 0]
        np.testing.assert_allclose(fused.astype(int), self.want(ir, vis), atol=1)

    def test_nothing_goes_through_the_host(self, cupy, plan):
        ir, vis = self.frames(cupy, SIZE, (*SIZE, 3))
        gpu_frames.fuse(plan, ir, vis)
        cupy.cuda.events.clear()
        gpu_frames.fuse(plan, ir, vis)
        kinds = [event[:2] for event in cupy.cuda.events]
        stream = cupy.cuda.events[1][-1]
        assert kinds == [
            ("wait", stream), ("kernel", "into"), ("kernel", "into"), ("graph", stream),
            ("kernel", "back"), ("wait", "null"),
        ]  # fmt: skip

    def test_it_waits_for_the_caller_and_the_caller_for_it(self, cupy, plan):
        ir, vis = self.frames(cupy, SIZE, SIZE)
        mine = cupy.cuda.Stream(non_blocking=True)
        with mine:
            gpu_frames.fuse(plan, ir, vis)
        waits = [event for event in cupy.cuda.events if event[0] == "wait"]
        ours = waits[0][1]
        assert waits == [("wait", ours, mine.name), ("wait", mine.name, ours)]

    def test_out(self, cupy, plan):
        ir, vis = self.frames(cupy, SIZE, (*SIZE, 3))
        out = cupy.asarray(np.zeros((*SIZE, 3), np.uint8))
        assert gpu_frames.fuse(plan, ir, vis, out=out) is out
        np.testing.assert_array_equal(out, gpu_frames.fuse(plan, ir, vis))

    @pytest.mark.parametrize("kind", ["other shape", "the visible frame", "on the host"])
    def test_out_that_does_not_fit(self, cupy, plan, kind):
        ir, vis = self.frames(cupy, SIZE, SIZE)
        out = {
            "other shape": cupy.asarray(np.zeros((*SIZE, 3), np.uint8)),
            "the visible frame": vis,
            "on the host": np.zeros(SIZE, np.uint8),
        }[kind]
        with pytest.raises(FrameError, match="out: got"):
            gpu_frames.fuse(plan, ir, vis, out=out)

    def test_a_batch(self, cupy, plan):
        ir, vis = self.frames(cupy, (3, *SIZE), (3, *SIZE, 3))
        fused = gpu_frames.fuse(plan, ir, vis)
        for one, a, b in zip(fused, ir, vis, strict=True):
            np.testing.assert_allclose(one.astype(int), self.want(a, b), atol=1)

    def test_a_frame_on_the_host_is_uploaded(self, cupy, plan):
        ir, vis = self.frames(cupy, SIZE, SIZE)
        fused = gpu_frames.fuse(plan, np.array(ir), vis)
        np.testing.assert_array_equal(fused, gpu_frames.fuse(plan, ir, vis))

    def test_a_slice_is_copied(self, cupy, plan):
        ir, vis = self.frames(cupy, SIZE, SIZE)
        wide = cupy.asarray(np.concatenate([np.array(ir)] * 2, axis=1))
        part = wide[:, : SIZE[1]]
        np.testing.assert_array_equal(
            gpu_frames.fuse(plan, part, vis), gpu_frames.fuse(plan, ir, vis)
        )

    def test_white_padding(self, executor, device):
        planes = executor.inputs[0]
        frame = device._cp.asarray(np.zeros(SIZE, np.uint8))
        load = {"low": 0.0, "scale": 1 / 255, "padding": "white"}
        device.load_frame(frame, planes, "luma", **load)
        assert (planes[..., : SIZE[0], : SIZE[1]] == 0).all()
        assert (planes[..., SIZE[0] :, :] == 1).all() and (planes[..., SIZE[1] :] == 1).all()

    @pytest.mark.parametrize(
        ("ir", "vis", "settings", "error", "match"),
        [
            (SIZE, (4, 10), {}, SizeMismatchError, "equal sizes"),
            ((2, *SIZE), (3, *SIZE), {}, FrameError, "2 infrared and 3 visible"),
            ((0, *SIZE), (0, *SIZE), {}, FrameError, "empty batch"),
            ((*SIZE, 4), SIZE, {}, FrameError, "alpha"),
            (SIZE, SIZE, {"infrared_range": "minmax"}, FrameError, "wait for the GPU"),
            (SIZE, SIZE, {"infrared_range": (3, 1)}, SettingError, "lo < hi"),
        ],
    )
    def test_bad_input(self, cupy, plan, ir, vis, settings, error, match):
        with pytest.raises(error, match=match):
            gpu_frames.fuse(plan, *self.frames(cupy, ir, vis), **settings)

    def test_a_type_without_a_kernel(self, cupy, plan):
        (vis,) = self.frames(cupy, SIZE)
        with pytest.raises(FrameError, match=r"float64 on the GPU.*astype"):
            gpu_frames.fuse(plan, cupy.asarray(np.zeros(SIZE)), vis)
        with pytest.raises(FrameError, match="no conversion of it was compiled"):
            gpu_frames.fuse(plan, cupy.asarray(np.zeros(SIZE, np.uint16)), vis)

    def test_no_array(self, cupy, plan):
        (vis,) = self.frames(cupy, SIZE)
        with pytest.raises(FrameError, match="infrared: got a str"):
            gpu_frames.fuse(plan, "frame.png", vis)

    def test_what_is_on_the_gpu(self, cupy):
        (frame,) = self.frames(cupy, SIZE)

        class Camera:
            def __init__(self, kind):
                self.kind = kind

            def __dlpack_device__(self):
                return self.kind, 0

        assert gpu_frames.on_gpu(frame) and gpu_frames.on_gpu(Camera(2))
        assert not gpu_frames.on_gpu(Camera(1)) and not gpu_frames.on_gpu(np.zeros(SIZE))
        assert not gpu_frames.on_gpu("frame.png")


class TestEngine:
    """Which device an engine gets."""

    def source(self, folder):
        class Source:
            has_kernels = True

            def kernels(self):
                return cubins.Store.load(folder)

        return Source()

    def test_kernels_of_its_own(self, cupy, folder):
        from fuseengine.engine import make_device
        from fuseengine.runtime.cupy_device import CupyDevice

        device = make_device("cuda", 1, self.source(folder))
        assert isinstance(device, CupyDevice) and len(device._launches.calls) == len(calls())

    def test_no_torch(self, cupy, monkeypatch):
        from fuseengine import engine
        from fuseengine.runtime.cupy_device import CupyDevice

        monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
        assert isinstance(engine.make_device("cuda", 1), CupyDevice)

    @pytest.fixture
    def engine(self, executor, folder, monkeypatch):
        """A whole one, which was not compiled."""
        import fuseengine.engine as module

        engine = module.Engine.__new__(module.Engine)
        adapter = FrameAdapter(SIZE, "luma", 8)
        monkeypatch.setattr(engine, "_plan", lambda size: (adapter, executor), raising=False)
        engine.size, engine.device, engine._source = SIZE, "cuda", self.source(folder)
        engine.program, engine.resumed, engine._lock = executor.program, None, threading.Lock()
        return engine

    @pytest.mark.parametrize("seed", range(3))
    def test_a_stream_of_it(self, engine, cupy, seed):
        """Two threads, two frames under way, and a device that orders nothing by itself."""
        rng = np.random.default_rng(seed)
        pairs = [[rng.integers(0, 256, s, np.uint8) for s in (SIZE, (*SIZE, 3))] for _ in range(30)]
        expected = [engine(*pair) for pair in pairs]
        cupy.cuda.chance = random.Random(seed)
        infrared, visible = zip(*pairs, strict=True)
        frames = Stream(engine).run(iter(infrared), iter(visible))
        for frame, picture in zip(frames, expected, strict=True):
            np.testing.assert_array_equal(frame.image, picture)

    def test_frames_in_and_out_of_it(self, engine, cupy):
        """NumPy frames through page-locked memory, CuPy frames without."""
        adapter = FrameAdapter(SIZE, "luma", 8)
        rng = np.random.default_rng(0)
        ir, vis = (rng.integers(0, 256, s, dtype=np.uint8) for s in (SIZE, (*SIZE, 3)))
        fused = engine(ir, vis)
        a, b = np.empty((2, 1, 1, *PADDED), np.float32)
        adapter.load(ir, vis, a, b)
        assert type(fused) is np.ndarray
        np.testing.assert_allclose(fused.astype(int), adapter.store(expected(a, b), vis), atol=1)
        there = engine(cupy.asarray(ir), cupy.asarray(vis))
        assert isinstance(there, cupy.ndarray)
        np.testing.assert_allclose(there.astype(int), fused, atol=1)
        with pytest.raises(SizeMismatchError, match="was compiled"):
            engine(cupy.asarray(ir[:4]), cupy.asarray(vis[:4]))
