"""The TensorRT backend: when it can be used, which network it takes, how a plan's calls are made.

The library of the last part is a stand-in that records what it is asked: addresses, shapes, the
stream, scratch memory. Plans are built in tests/export/test_tensorrt.py and run in tests/gpu.
"""

from __future__ import annotations

import sys
import types

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from fuseengine.backends import BACKENDS, get_backend
from fuseengine.backends import tensorrt as backend
from fuseengine.backends.tensorrt import PlanRunner, address_of, dense_strides, typed_network
from fuseengine.errors import BackendUnavailableError, CompileError, SettingError
from fuseengine.export import tensorrt
from fuseengine.program import StageVariant
from fuseengine.runtime.gpu import Gpu
from tests.helpers import BLOCK_TORCH, run_python, tiny
from tests.runtime import fake_cupy

VARIANT = StageVariant("unet", (0,))
ORIN = Gpu(0, "Orin", 87, 1 << 36, 12060)


def library(name="tensorrt", version="10.3.0", targets=()):
    capabilities = types.SimpleNamespace(**{f"SM{n}": n for n in targets})
    return tensorrt.Library(types.SimpleNamespace(ComputeCapability=capabilities), name, version)


class TestUnavailable:
    def reason(self, monkeypatch, found, present):
        monkeypatch.setattr(tensorrt, "find_library", lambda name=None: found)
        monkeypatch.setattr(backend, "gpus", lambda: present)
        return BACKENDS["tensorrt"].unavailable("cuda")

    def test_on_the_cpu(self):
        with pytest.raises(BackendUnavailableError, match="device='cuda'"):
            get_backend("tensorrt", "cpu")

    def test_available(self, monkeypatch):
        assert self.reason(monkeypatch, library(), (ORIN,)) is None

    def test_no_gpu(self, monkeypatch):
        assert "shows no GPU" in self.reason(monkeypatch, library(), ())

    def test_rtx_knows_some_gpus(self, monkeypatch):
        rtx = library("tensorrt_rtx", "1.7.1", (86, 89))
        assert "87: install tensorrt" in self.reason(monkeypatch, rtx, (ORIN,))
        ada = Gpu(0, "RTX 4000", 89, 1 << 34, 13000)
        assert self.reason(monkeypatch, rtx, (ada,)) is None

    def test_not_installed(self, monkeypatch):
        monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: None)
        assert "JetPack brings" in BACKENDS["tensorrt"].unavailable("cuda")

    def test_needs_no_torch(self):
        run_python(f"{BLOCK_TORCH}import fuseengine.backends.tensorrt, fuseengine.export.tensorrt")


@pytest.fixture(scope="module")
def stages():
    """Networks of a model, and one of its variants."""
    from fuseengine.stages import ModelStages
    from fuseengine.tracing import capture

    model = tiny()
    program = capture(model)
    return ModelStages(model, program), next(iter(program.variants()))


class TestNetwork:
    @pytest.mark.parametrize("precision", ["fp32", "tf32"])
    def test_float32_as_it_is(self, stages, precision):
        source, variant = stages
        assert typed_network(source, variant, precision) == source.onnx(variant)

    @pytest.mark.parametrize(
        ("precision", "kind"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)]
    )
    def test_half_precision_inside_float32_borders(self, stages, precision, kind):
        model = onnx.load_model_from_string(typed_network(*stages, precision))
        border = [*model.graph.input, *model.graph.output]
        assert {v.type.tensor_type.elem_type for v in border} == {TensorProto.FLOAT}
        assert kind in {w.data_type for w in model.graph.initializer}

    def test_transposed_convolutions_stay_float32_in_bfloat16(self, stages):
        model = onnx.load_model_from_string(typed_network(*stages, "bf16"))
        weights = {w.name: w.data_type for w in model.graph.initializer}
        upward = [n for n in model.graph.node if n.op_type == "ConvTranspose"]
        assert upward
        assert all(weights.get(n.input[1]) != TensorProto.BFLOAT16 for n in upward)

    def test_int8_is_the_sources(self):
        class Source:
            def onnx(self, variant, precision="fp32"):
                return f"{variant.label} {precision}".encode()

        assert typed_network(Source(), VARIANT, "int8") == b"unet-0 int8"

    def test_half_precision_without_onnx(self, stages, monkeypatch):
        monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(BackendUnavailableError, match="pip install onnx"):
            typed_network(*stages, "fp16")


class FakeContext:
    """Stands for an execution context: remembers, and adds one to what it is given."""

    def __init__(self, engine):
        self.engine, self.shapes, self.addresses, self.runs = engine, {}, {}, []
        self.memory = None

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return shape == self.engine.shape

    def get_tensor_shape(self, name):
        return self.shapes["in0"]

    def set_device_memory(self, address, size):
        self.memory = address, size

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        self.runs.append((dict(self.addresses), stream))
        return not self.engine.broken


class FakePlan:
    """Stands for a plan that was read: one input, one output, scratch memory."""

    inputs, outputs, activation_bytes = ["in0"], ["out0"], 4096

    def __init__(self, shape=(1, 2, 4, 4), broken=False, memory=True):
        strategy = types.SimpleNamespace(USER_MANAGED="user managed")
        module = types.SimpleNamespace(ExecutionContextAllocationStrategy=strategy)
        self.reader = tensorrt.Library(module, "tensorrt", "10.3.0")
        self.contexts = []
        self.engine = types.SimpleNamespace(shape=shape, broken=broken)
        self.engine.get_tensor_shape = lambda name: shape
        self.engine.create_execution_context = lambda how: self.context(how) if memory else None

    def context(self, how):
        assert how == "user managed"
        self.contexts.append(FakeContext(self.engine))
        return self.contexts[-1]


@pytest.fixture
def cupy(monkeypatch):
    modules = fake_cupy.make()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["cupy"]


def array(cupy, *shape):
    return cupy.zeros(shape, np.float32)


class TestRunner:
    def test_each_call_has_its_addresses(self, cupy):
        plan = FakePlan()
        runner = PlanRunner(plan)
        pairs = [[array(cupy, 1, 2, 4, 4) for _ in range(2)] for _ in range(3)]
        bound = [runner.bind([x], [y]) for x, y in pairs]
        for call in (*bound, bound[0]):
            call()
        (context,) = plan.contexts  # one for all calls of the stage
        expected = [{"in0": x.data.ptr, "out0": y.data.ptr} for x, y in (*pairs, pairs[0])]
        assert [addresses for addresses, _ in context.runs] == expected

    def test_on_the_stream_that_is_current(self, cupy):
        plan = FakePlan()
        call = PlanRunner(plan).bind([array(cupy, 1, 2, 4, 4)], [array(cupy, 1, 2, 4, 4)])
        stream = cupy.cuda.Stream(non_blocking=True)
        call()
        with stream:
            call()
        assert [s for _, s in plan.contexts[0].runs] == [cupy.cuda.null.ptr, stream.ptr]

    def test_scratch_memory_is_the_array_librarys_and_kept(self, cupy):
        plan = FakePlan()
        runner = PlanRunner(plan)
        for _ in range(2):
            runner.bind([array(cupy, 1, 2, 4, 4)], [array(cupy, 1, 2, 4, 4)])
        assert isinstance(runner._scratch, cupy.ndarray) and runner._scratch.nbytes == 4096
        assert plan.contexts[0].memory == (runner._scratch.data.ptr, 4096)

    def test_a_refused_execution_is_an_error(self, cupy):
        runner = PlanRunner(FakePlan(broken=True))
        call = runner.bind([array(cupy, 1, 2, 4, 4)], [array(cupy, 1, 2, 4, 4)])
        with pytest.raises(CompileError, match="tensorrt 10.3.0 could not enqueue"):
            call()

    def test_no_context(self, cupy):
        with pytest.raises(CompileError, match="out of device memory"):
            PlanRunner(FakePlan(memory=False))

    def test_another_size(self, cupy):
        runner = PlanRunner(FakePlan())
        with pytest.raises(SettingError, match=r"in0 \(1, 2, 8, 8\).*\(1, 2, 4, 4\)"):
            runner.bind([array(cupy, 1, 2, 8, 8)], [array(cupy, 1, 2, 8, 8)])
        with pytest.raises(SettingError, match=r"out0 \(1, 1, 4, 4\); expected \(1, 2, 4, 4\)"):
            runner.bind([array(cupy, 1, 2, 4, 4)], [array(cupy, 1, 1, 4, 4)])


class Device:
    """An array of any library on the GPU."""

    def __init__(self, shape=(2, 3), typestr="<f4", strides=None):
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": typestr, "strides": strides, "data": (4096, False),
            "version": 3,
        }  # fmt: skip


class TestAddress:
    def test_dense(self):
        assert address_of(Device(), "x") == 4096
        assert address_of(Device(strides=(12, 4)), "x") == 4096
        assert dense_strides((2, 3, 5), 4) == (60, 20, 4)

    @pytest.mark.parametrize(
        ("given", "match"),
        [
            (np.zeros((2, 3), np.float32), "expected an array on the GPU"),
            (Device(typestr="<f2"), "elements <f2; expected <f4"),
            (Device(strides=(24, 4)), "expected a dense array"),
            (Device(strides=(4, 8)), "expected a dense array"),
        ],
    )
    def test_refused(self, given, match):
        with pytest.raises(SettingError, match=match):
            address_of(given, "x")
