"""Everything of TorchDevice but the CUDA graph, on the CPU: the same programs as CpuDevice."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fuseengine as fe
from fuseengine.backends import BACKENDS
from fuseengine.backends.cuda_device import _OPS, _SPECTRA, TorchDevice, TorchLane, TorchLanes
from fuseengine.errors import CaptureError
from fuseengine.models.observation import Blur, Compose, Downsample, Identity
from fuseengine.pipelined import Slot
from fuseengine.program import Node, resolve
from fuseengine.runtime import ops
from fuseengine.runtime.executor import CpuDevice, Executor
from fuseengine.stages import ModelStages
from fuseengine.tracing import capture

SIZE = (32, 48)


def _degraded() -> tuple:
    return Compose(Blur.gaussian(1.0), Downsample(2)), Identity()


def _model(**settings):
    torch.manual_seed(0)
    return fe.build("drfusion-s", **settings)


def _executors(model, size=SIZE):
    """The program through eager stages on both devices, with inputs of their own."""
    program = capture(model)
    stages = ModelStages(model, program)
    made = []
    for device in (CpuDevice(), TorchDevice("cpu")):
        runners = {
            variant: BACKENDS["torch"].lower(
                stages,
                variant,
                tuple(resolve(program.values[name].shape, size) for name in calls[0].inputs),
                precision="fp32",
                device="cpu",
                threads=torch.get_num_threads(),
            )
            for variant, calls in program.variants().items()
        }
        made.append(Executor(program, size, runners, device))
    return made


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"update": "paper"},
        {"correct_last": True},
        {"steps": 1},
        {"operators": _degraded()},
        {"operators": (Downsample(2), Blur.gaussian(0.7))},
    ],
    ids=["s", "paper", "correct-last", "one-step", "blur-and-down", "down-and-blur"],
)
def test_program_equals_cpu_device(settings):
    on_cpu, on_torch = _executors(_model(**settings))
    rng = np.random.default_rng(1)
    # Twice with other pictures: a result left over from the first frame would show.
    for _ in range(2):
        for first, second in zip(on_cpu.inputs, on_torch.inputs, strict=True):
            picture = rng.random(first.shape, dtype=np.float32)
            first[...] = picture
            second[...] = on_torch.device.constant(picture)
        on_cpu.run()
        on_torch.run()
        fused = on_torch.output.numpy()
        # Float32 rounding through three U-Nets; FFT libraries differ in the last bits.
        np.testing.assert_allclose(fused, on_cpu.output, rtol=0, atol=1e-5)
        assert fused.std() > 1e-3


def test_program_leaves_its_inputs_alone():
    _, executor = _executors(_model())
    rng = np.random.default_rng(2)
    pictures = [rng.random(tuple(t.shape), dtype=np.float32) for t in executor.inputs]
    for target, picture in zip(executor.inputs, pictures, strict=True):
        target[...] = executor.device.constant(picture)
    executor.run()
    once = executor.output.clone()
    executor.run()
    assert torch.equal(executor.output, once)
    for target, picture in zip(executor.inputs, pictures, strict=True):
        np.testing.assert_array_equal(target.numpy(), picture)


def test_buffers_keep_their_addresses():
    # A captured graph reads and writes fixed addresses.
    _, executor = _executors(_model())
    before = {name: array.data_ptr() for name, array in executor._arrays.items()}
    for _ in range(3):
        executor.run()
    assert {name: array.data_ptr() for name, array in executor._arrays.items()} == before


def test_knows_every_op_of_the_run_side():
    assert {*_OPS, *_SPECTRA} == set(ops.OPS)


CASES = [
    ("add", [(2, 3)], {"scalar": 0.5}),
    ("add", [(2, 3), (2, 3)], {}),
    ("sub", [(2, 3)], {"scalar": 1.0, "scalar_first": True}),
    ("sub", [(2, 3)], {"scalar": 1.0}),
    ("mul", [(2, 3), (1, 3)], {}),
    ("div", [(2, 3)], {"scalar": 3.0}),
    ("div", [(2, 3)], {"scalar": 3.0, "scalar_first": True}),
    ("concat", [(1, 1, 3, 5), (1, 2, 3, 5)], {"axis": 1}),
    ("clamp", [(7,)], {"min": 0.2, "max": 0.7}),
    ("slice", [(1, 3, 4, 5)], {"bounds": [[0, 1], [1, 2], [0, 4], [0, 5]]}),
    ("block_mean", [(1, 2, 6, 9)], {"scale": 3}),
    ("block_repeat", [(1, 2, 3, 1)], {"scale": 2}),
    ("circular_convolution", [(1, 2, 7, 9), (3, 5)], {}),
    ("circular_convolution", [(1, 1, 4, 4), (5, 5)], {}),
    ("wiener_deconvolution", [(1, 1, 8, 6), (3, 3)], {"regularisation": 1e-2}),
]
RESULTS = {
    "concat": (1, 3, 3, 5),
    "slice": (1, 1, 4, 5),
    "block_mean": (1, 2, 2, 3),
    "block_repeat": (1, 2, 6, 2),
}


@pytest.mark.parametrize(("target", "shapes", "attrs"), CASES)
def test_op_equals_run_side(target, shapes, attrs):
    rng = np.random.default_rng(3)
    arrays = [rng.random(shape, dtype=np.float32) + 0.1 for shape in shapes]
    node = Node("op", target, tuple("xy"[: len(shapes)]), ("out",), attrs)
    shape = RESULTS.get(target, shapes[0])
    results = []
    for device in (CpuDevice(), TorchDevice("cpu")):
        given, out = [device.constant(a) for a in arrays], device.empty(shape)
        out[...] = float("nan")
        device.bind_op(node, given, out)()
        results.append(np.asarray(out))
    np.testing.assert_allclose(results[1], results[0], rtol=2e-6, atol=2e-6)


def test_unknown_op_is_refused():
    device = TorchDevice("cpu")
    node = Node("op", "sharpen", ("x",), ("y",), {})
    with pytest.raises(CaptureError, match="'sharpen' is unknown on cpu"):
        device.bind_op(node, [device.empty((1,))], device.empty((1,)))


def test_constant_is_a_copy():
    array = np.ones((2, 2), dtype=np.float32)
    tensor = TorchDevice("cpu").constant(array)
    array[:] = 0
    assert tensor.sum() == 4


def test_staging_is_made_once():
    device = TorchDevice("cpu")
    tensors = [device.empty((1, 1, 4, 6)), device.empty((1, 1, 4, 6))]
    first, second = device.staging(tensors)
    assert first.shape == tensors[0].shape
    assert first.data_ptr() != second.data_ptr()
    again = device.staging(tensors)
    assert [t.data_ptr() for t in again] == [first.data_ptr(), second.data_ptr()]


class FakeStream:
    """Of the order of calls only: tensors stay where they are, and are copied at once."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_event(self, event):
        self.log.append(("wait", self.name, event.name))

    def wait_stream(self, other):
        self.log.append(("wait", self.name, other.name))

    def synchronize(self):
        self.log.append(("synchronize", self.name))


class FakeEvent:
    def __init__(self, log, blocking):
        assert blocking, "a waiting thread would hold a processor"
        self.log, self.name = log, ""

    def record(self, stream):
        self.name = stream.name
        self.log.append(("record", stream.name))

    def synchronize(self):
        self.log.append(("synchronize", f"event of {self.name}"))


@pytest.fixture
def streams(monkeypatch):
    """TorchDevice for a GPU that is none; what goes to which stream."""
    log, names = [], iter(["into", "out"])
    current = ["default"]
    made = {"default": FakeStream(log, "default")}

    @contextlib.contextmanager
    def stream(chosen):
        current.append(chosen.name)
        yield
        current.pop()

    def empty(shape, device=None, pin_memory=False, **_):
        log.append(("pinned" if pin_memory else f"on {device and device.type}", current[-1]))
        return torch.zeros(shape)

    cuda = {
        "Stream": lambda device: FakeStream(log, next(names)),
        "Event": lambda blocking: FakeEvent(log, blocking),
        "default_stream": lambda device: made["default"],
        "current_stream": lambda device=None: made["default"],
        "stream": stream,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", empty)
    copy = TorchLane._copy

    def logged(self, target, source):
        with self.active():
            log.append(("copy", current[-1]))
        copy(self, target, source)

    for name in ("send", "copy", "fetch"):
        monkeypatch.setattr(TorchLane, name, logged)
    device = TorchDevice("cpu")
    monkeypatch.setattr(device, "_lanes", TorchLanes(SimpleNamespace(type="cuda")))
    return device, log, current


def test_what_a_slot_queues_on_which_stream(streams):
    device, log, current = streams
    given = [device.empty((1, 1, 4, 6)) for _ in range(2)]
    executor = SimpleNamespace(
        inputs=given,
        output=device.empty((1, 1, 4, 6)),
        run=lambda: log.append(("run", current[-1])) or executor.output.copy_(given[0] - given[1]),
    )
    slot = Slot(executor, device.lanes())
    memory = [("pinned", "default")] * 2 + [("on cuda", "default")] * 3 + [("pinned", "default")]
    assert log == [*memory, ("synchronize", "default")]
    log.clear()
    a, b = np.random.default_rng(0).random((2, 1, 1, 4, 6), np.float32)
    slot.inputs[0][...], slot.inputs[1][...] = a, b
    slot.start()
    assert log == [
        ("copy", "into"), ("copy", "into"), ("record", "into"), ("wait", "default", "into"),
        ("copy", "default"), ("copy", "default"), ("run", "default"), ("copy", "default"),
        ("record", "default"), ("wait", "out", "default"), ("copy", "out"), ("record", "out"),
    ]  # fmt: skip
    log.clear()
    np.testing.assert_array_equal(slot.result(), a - b)
    assert log == [("synchronize", "event of out")]
    slot.computed()
    assert log[1:] == [("synchronize", "event of default")]


def test_other_frames_wait_for_those_in_the_lanes(streams):
    """A caller on a stream of his own uses the same buffers."""
    device, log, _ = streams
    tensor = torch.zeros((1, 1, 4, 6))
    device.send(tensor)
    assert log.count(("wait", "default", "default")) == 1
    device._lanes = None
    device.send(tensor)
    assert log.count(("wait", "default", "default")) == 1


def test_lanes_are_made_once():
    device = TorchDevice("cpu")
    assert device.lanes() is device.lanes()
    device.lanes().synchronize()
    device.lanes().hold_back_current()
    device.send(device.empty((2, 3)))
