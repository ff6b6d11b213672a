"""Each installed backend, in each precision, against the float32 reference."""

from __future__ import annotations

import importlib.util
import tracemalloc

import numpy as np
import pytest
import torch

import fuseengine as fe
from fuseengine.backends import BACKENDS, get_backend
from fuseengine.engine import build_executor
from fuseengine.errors import BackendUnavailableError, UnknownNameError
from fuseengine.stages import ModelStages
from fuseengine.tracing import capture
from tests.helpers import picture_pair, psnr, tiny

SIZE = (48, 64)

# float32: another order of sums in some tens of layers, three times over. bfloat16 has 8 bits, so
# the noise of a layer is 50 dB below its signal; a random network amplifies it, a trained one less.
LEAST_DB = {"fp32": 95.0, "tf32": 60.0, "fp16": 45.0, "bf16": 25.0}


@pytest.fixture(scope="module")
def captured():
    model = tiny()
    program = capture(model)
    pair = picture_pair(SIZE)
    with torch.no_grad():
        expected = model.double()(*(x.double() for x in pair)).numpy()
    model.float()
    return program, ModelStages(model, program), pair, expected


def run(captured, backend, precision, size=SIZE, pair=None):
    program, source, own, _ = captured
    choice = dict.fromkeys(program.variants(), (backend, precision))
    executor = build_executor(program, source, choice, size, "cpu", 1)
    for target, picture in zip(executor.inputs, pair or own, strict=True):
        target[...] = picture.numpy()
    executor.run()
    return executor


def quick():
    return [name for name, backend in BACKENDS.items() if backend.quick]


class Small(torch.nn.Module):
    """A network small enough for torch.compile."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, a, b):
        return torch.nn.functional.silu(self.net(torch.cat([a, b], 1)))


@pytest.fixture
def installed(request):
    """Skip with the backend's own reason where it is not installed."""
    name = request.getfixturevalue("backend")
    reason = BACKENDS[name].unavailable("cpu")
    if reason:
        pytest.skip(reason)


@pytest.mark.usefixtures("installed")
class TestAgainstReference:
    @pytest.mark.parametrize("backend", quick())
    def test_every_precision(self, captured, backend):
        offered = BACKENDS[backend].precisions("cpu")
        assert offered[0] == "fp32"
        # int8 needs networks of its own: tests/export/test_quantize.py.
        offered = [precision for precision in offered if not precision.startswith("int8")]
        for precision in offered:
            executor = run(captured, backend, precision)
            assert psnr(executor.output, captured[3]) > LEAST_DB[precision], precision
            if precision != "fp32":  # really another arithmetic, no relabelled float32
                assert psnr(executor.output, captured[3]) < LEAST_DB["fp32"], precision

    @pytest.mark.parametrize("backend", quick())
    def test_same_input_same_output(self, captured, backend):
        executor = run(captured, backend, "fp32")
        first = executor.output.copy()
        executor.inputs[0][...] = 0.5
        executor.run()
        assert np.abs(executor.output - first).max() > 1e-3
        executor.inputs[0][...] = captured[2][0].numpy()
        executor.run()
        np.testing.assert_array_equal(executor.output, first)

    @pytest.mark.parametrize("backend", quick())
    def test_two_sizes_of_one_source(self, captured, backend):
        """The second size must not disturb the first: runners of both live side by side."""
        first = run(captured, backend, "fp32")
        pair = picture_pair((36, 28), seed=4)
        second = run(captured, backend, "fp32", (36, 28), pair)
        with torch.no_grad():
            expected = captured[1].model(*pair).numpy()
        assert psnr(second.output, expected) > LEAST_DB["fp32"]
        first.run()
        assert psnr(first.output, captured[3]) > LEAST_DB["fp32"]

    @pytest.mark.parametrize("backend", ["inductor"])
    @pytest.mark.filterwarnings("ignore")  # torch.compile's own, which differ by version
    def test_inductor(self, backend):
        # One layer and its activation: a U-Net takes a minute and more.
        model = Small()
        program = capture(model)
        pair = picture_pair((16, 16))
        with torch.no_grad():
            expected = model(*pair).numpy()
        own = program, ModelStages(model, program), pair, expected
        assert psnr(run(own, backend, "fp32", (16, 16)).output, expected) > LEAST_DB["fp32"]


class Fresh:
    """A source whose networks are new bytes each time, as those that a bundle puts together."""

    settled = False

    def __init__(self, source):
        self.source = source

    def onnx(self, variant, precision="fp32"):
        return bytes(bytearray(self.source.onnx(variant, precision)))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.usefixtures("installed")
def test_nothing_keeps_the_serialised_network(captured, backend):
    """Beside the weights of a network of gigabytes a device has no room for its file."""
    program, source, _, _ = captured
    choice = dict.fromkeys(program.variants(), (backend, "fp32"))
    size = min(len(source.onnx(variant)) for variant in choice)
    build_executor(program, Fresh(source), choice, SIZE, "cpu", 1)  # what is made once
    tracemalloc.start()
    try:
        executor = build_executor(program, Fresh(source), choice, SIZE, "cpu", 1)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held - executor.buffer_bytes < size / 2


class TestAvailability:
    def hide(self, monkeypatch, library):
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, *a: None if n == library else find(n, *a)
        )

    @pytest.mark.parametrize(
        ("name", "library", "extra"),
        [
            ("openvino", "openvino", "openvino"),
            ("onnxruntime", "onnxruntime", "compile"),
            ("torch", "torch", "compile"),
            ("inductor", "torch", "compile"),
        ],
    )
    def test_not_installed(self, monkeypatch, name, library, extra):
        self.hide(monkeypatch, library)
        with pytest.raises(BackendUnavailableError) as caught:
            get_backend(name, "cpu")
        message = str(caught.value)
        assert f"backend {name!r}" in message and f"{library} is not installed" in message
        # onnxruntime comes with the base install; any command that brings it will do.
        assert f"pip install 'fuseengine[{extra}]'" in message or name == "onnxruntime"

    def test_asked_for_by_name_is_never_replaced(self, monkeypatch):
        self.hide(monkeypatch, "openvino")
        with pytest.raises(BackendUnavailableError, match="pip install"):
            fe.compile(tiny(), size=SIZE, backend="openvino", cache=False)

    def test_left_out_of_an_automatic_choice_with_a_reason(self, monkeypatch):
        self.hide(monkeypatch, "openvino")
        engine = fe.compile(tiny(), size=SIZE, cache=False, threads=1)
        (row,) = [c for c in engine.report.candidates if c.backend == "openvino"]
        assert "not installed" in row.note and row.milliseconds is None
        assert "openvino" not in " ".join(engine.report.choice.values())

    @pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
    def test_cpu_only_backends_say_so(self, name):
        with pytest.raises(BackendUnavailableError, match="device='cpu'"):
            get_backend(name, "cuda")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no CUDA device")
    def test_no_cuda_device(self):
        with pytest.raises(BackendUnavailableError, match="no CUDA device"):
            get_backend("torch", "cuda")
        with pytest.raises(BackendUnavailableError, match="use device='cpu'"):
            fe.compile(tiny(), size=SIZE, device="cuda")

    def test_unknown(self):
        with pytest.raises(UnknownNameError, match="Did you mean 'openvino'"):
            get_backend("openvin", "cpu")
