"""TensorRT plans, built by TensorRT-RTX with no GPU: every stage of every small system.

They are built, not run: that needs a device, and tests/gpu/test_tensorrt.py.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import fuseengine as fe
from fuseengine.backends.tensorrt import typed_network
from fuseengine.errors import BackendUnavailableError, CompileError, SettingError
from fuseengine.export import tensorrt
from fuseengine.export.qdq import layers_of, quantise
from fuseengine.export.tensorrt import BuildSettings, Plan, Range, Summary, build
from fuseengine.export.typed import typed
from fuseengine.export.whole import whole_to_onnx
from fuseengine.program import resolve
from fuseengine.stages import ModelStages
from fuseengine.tracing import capture
from tests.helpers import BLOCK_TORCH, run_python, system

SYSTEMS = ("drfusion-s", "drmf-s", "dmfuse-s", "dmnet-s", "mask-difuser-s")
PRECISIONS = ("fp32", "fp16", "int8")
FEWER_STEPS = {
    "drmf-s": {"steps": 1},
    "mask-difuser-s": {"steps": 1},
    "dmfuse-s": {"times": (500,)},
}
"""Whole models have their steps unrolled, and building takes as long as there are nodes."""
WHOLE = {"drfusion-s": {"precision": "fp16", "frames": True}}
"""What is not the default: float32 planes."""

SIZE = (64, 64)  # the smallest that all of them take
RTX = "tensorrt_rtx"
QUICK = BuildSettings(level=0, capability=86)


def rtx_missing():
    try:
        tensorrt.find_library(RTX)
    except BackendUnavailableError as error:
        return str(error)
    return ""


needs_rtx = pytest.mark.skipif(bool(rtx_missing()), reason=rtx_missing())


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def stages():
    """Program and networks of a system, made once; plans depend on layers, not on training."""
    made = {}

    def stages(name):
        if name not in made:
            torch.manual_seed(0)
            model = fe.build(name).eval()
            program = capture(model)
            made[name] = program, ModelStages(model, program)
        return made[name]

    return stages


def network(precision, content):
    """A float32 network in a precision; of int8 the ranges do not matter for building."""
    if precision != "int8":
        return typed(content, precision)
    model = onnx.load_model_from_string(content)
    values = {n for node in model.graph.node for n in (*node.input, *node.output)}
    return quantise(model, dict.fromkeys(values, 4.0), layers_of(model))


def shapes_of(program, call, size=SIZE):
    return {f"in{i}": resolve(program.values[n].shape, size) for i, n in enumerate(call.inputs)}


@needs_rtx
class TestEveryStage:
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("name", SYSTEMS)
    def test_builds(self, stages, name, precision):
        program, networks = stages(name)
        for variant, calls in program.variants().items():
            model = network(precision, networks.onnx(variant))
            settings = dataclasses.replace(QUICK, shapes=shapes_of(program, calls[0]))
            plan = build(model.SerializeToString(), settings, library=RTX, cache=False)
            assert len(plan.content) > 1000, variant.label
            assert (plan.package, plan.target, plan.from_cache) == (RTX, "sm_86", False)

    @pytest.mark.parametrize("name", SYSTEMS)
    def test_whole_model_builds(self, name):
        model = system(name, **FEWER_STEPS.get(name, {}))
        program = capture(model)
        kind = WHOLE.get(name, {})
        whole = whole_to_onnx(program, ModelStages(model, program), SIZE, **kind)
        assert len(build(whole.SerializeToString(), QUICK, library=RTX, cache=False).content) > 1000

    def test_bfloat16_builds(self, stages):
        program, networks = stages("drfusion-s")
        variant, calls = next(iter(program.variants().items()))
        content = typed_network(networks, variant, "bf16")
        settings = dataclasses.replace(QUICK, shapes=shapes_of(program, calls[0]))
        build(content, settings, library=RTX, cache=False)

    def test_reading_needs_no_building(self, stages):
        program, networks = stages("drfusion-s")
        content = networks.onnx(next(iter(program.variants())))
        nodes = len(onnx.load_model_from_string(content).graph.node)
        assert tensorrt.check(content, library=RTX) >= nodes / 2


# --- small networks -------------------------------------------------------------------------------


def small(*ops, kind=TensorProto.FLOAT, shape=(1, 4, "H", "W"), domain=""):
    """x -> ops -> y, one after the other."""
    names = ["x", *(f"value_{i}" for i in range(len(ops) - 1)), "y"]
    nodes = [
        helper.make_node(op, [names[i]], [names[i + 1]], name=f"{op.lower()}_{i}", domain=domain)
        for i, op in enumerate(ops)
    ]
    border = [helper.make_tensor_value_info(n, kind, list(shape)) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "small", border[:1], border[1:])
    opsets = [helper.make_opsetid("", 18)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def fixed(*shape, **settings):
    return dataclasses.replace(QUICK, shapes={"x": shape}, **settings)


@needs_rtx
class TestBuild:
    def test_a_range_of_sizes(self):
        sizes = Range((1, 4, 8, 8), (1, 4, 48, 64), (1, 4, 96, 128))
        settings = dataclasses.replace(QUICK, shapes={"x": sizes})
        assert build(small("Relu", "Sigmoid"), settings, library=RTX, cache=False).content

    def test_all_settings(self):
        settings = fixed(1, 4, 8, 8, tf32=True, workspace_bytes=1 << 28)
        assert build(small("Relu"), settings, library=RTX, cache=False).content

    @pytest.mark.parametrize(
        ("shapes", "match"),
        [
            ({}, r"no shape for input 'x' \(1, 4, -1, -1\)"),
            ({"z": (1,)}, r"shapes of \['z'\]; expected some of \['x'\]"),
            ({"x": (1, 4, 8)}, r"shape \(1, 4, 8\) for input 'x'; expected \(1, 4, -1, -1\)"),
            ({"x": (2, 4, 8, 8)}, r"expected \(1, 4, -1, -1\)"),
            ({"x": Range((2, 4, 8, 8), (2, 4, 8, 8), (2, 4, 8, 8))}, r"expected \(1, 4, -1, -1\)"),
        ],
    )
    def test_shapes_that_do_not_fit(self, shapes, match):
        with pytest.raises(SettingError, match=match):
            build(small("Relu"), dataclasses.replace(QUICK, shapes=shapes), library=RTX)

    def test_all_unknown_operators_are_named_in_one_error(self):
        with pytest.raises(CompileError) as caught:
            build(small("Warp", "Blend", domain="mine"), fixed(1, 4, 8, 8), library=RTX)
        message = str(caught.value)
        assert "2 problems" in message and "\n" not in message
        assert "node 'warp_0' (Warp)" in message and "node 'blend_1' (Blend)" in message

    @pytest.mark.parametrize("content", [b"", b"no model" * 9, small("Relu")[:40]])
    def test_what_is_no_model(self, content):
        with pytest.raises(CompileError, match="cannot read the network"):
            build(content, QUICK, library=RTX)

    def test_an_error_leaves_the_next_build_alone(self):
        with pytest.raises(CompileError):
            build(small("Warp", domain="mine"), fixed(1, 4, 8, 8), library=RTX)
        assert build(small("Relu"), fixed(1, 4, 8, 8), library=RTX).content

    def test_messages_go_to_logging(self, caplog):
        with caplog.at_level(logging.INFO, "fuseengine.tensorrt"), pytest.raises(CompileError):
            build(small("Warp", domain="mine"), fixed(1, 4, 8, 8), library=RTX)
        assert any("Warp" in record.message for record in caplog.records)

    @pytest.mark.parametrize("capability", [87, 90, 110])
    def test_capabilities_that_are_built_on_the_device_only(self, capability):
        with pytest.raises(BackendUnavailableError, match="75, 80, 86.*build on the device"):
            build(small("Relu"), fixed(1, 4, 8, 8, capability=capability), library=RTX)

    def test_without_a_gpu_a_capability_must_be_named(self, monkeypatch):
        monkeypatch.setattr(tensorrt, "gpus", lambda: ())
        with pytest.raises(BackendUnavailableError, match="name a capability"):
            build(small("Relu"), fixed(1, 4, 8, 8, capability=None), library=RTX)

    def test_a_gpu_that_rtx_does_not_know(self, monkeypatch):
        orin = tensorrt.Gpu(0, "Orin", 87, 1 << 33, 12060)
        monkeypatch.setattr(tensorrt, "gpus", lambda: (orin,))
        with pytest.raises(BackendUnavailableError, match="Orin has compute capability 87"):
            build(small("Relu"), fixed(1, 4, 8, 8, capability=None), library=RTX)

    def test_runs_without_torch(self, tmp_path):
        (tmp_path / "small.onnx").write_bytes(small("Relu"))
        script = (
            f"{BLOCK_TORCH}from fuseengine.export.tensorrt import *\n"
            f"content = open({str(tmp_path / 'small.onnx')!r}, 'rb').read()\n"
            "settings = BuildSettings({'x': (1, 4, 8, 8)}, level=0, capability=86)\n"
            "print(len(build(content, settings, library='tensorrt_rtx').content))"
        )
        assert int(run_python(script)) > 0


@needs_rtx
class TestCache:
    def test_the_second_time_nothing_is_built(self, monkeypatch):
        first = build(small("Relu"), fixed(1, 4, 8, 8), library=RTX)
        monkeypatch.setattr(tensorrt, "_build", None)
        second = build(small("Relu"), fixed(1, 4, 8, 8), library=RTX)
        assert (first.from_cache, second.from_cache) == (False, True)
        assert second.content == first.content

    def test_everything_that_decides_a_plan_is_in_the_key(self, monkeypatch):
        library = tensorrt.find_library(RTX)
        other = dataclasses.replace(library, version="0.0")
        relu, settings = small("Relu"), fixed(1, 4, 8, 8)
        keys = [
            tensorrt._key(relu, library, "sm_86", settings),
            tensorrt._key(small("Tanh"), library, "sm_86", settings),
            tensorrt._key(relu, other, "sm_86", settings),
            tensorrt._key(relu, library, "Orin sm_87", settings),
            tensorrt._key(relu, library, "sm_86", fixed(1, 4, 8, 16)),
            tensorrt._key(relu, library, "sm_86", fixed(1, 4, 8, 8, tf32=True)),
            tensorrt._key(relu, library, "sm_86", fixed(1, 4, 8, 8, level=1)),
            tensorrt._key(relu, library, "sm_86", fixed(1, 4, 8, 8, workspace_bytes=1)),
        ]
        assert len(set(keys)) == len(keys)
        assert keys[0] == tensorrt._key(relu, library, "sm_86", fixed(1, 4, 8, 8))

    def test_a_damaged_plan_is_built_again(self, tmp_path):
        plan = build(small("Relu"), fixed(1, 4, 8, 8), library=RTX)
        (file,) = (tmp_path / "cache").glob("plan-*/plan")
        file.write_bytes(plan.content[:-1])
        assert build(small("Relu"), fixed(1, 4, 8, 8), library=RTX).content == plan.content

    def test_a_folder_that_cannot_be_written(self, monkeypatch, tmp_path, caplog):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path / "file"))
        assert build(small("Relu"), fixed(1, 4, 8, 8), library=RTX).content
        assert "not kept" in caplog.text


class FakeTimings:
    """Stands for the library's timing cache: a set of lines. TensorRT-RTX has none that works."""

    def __init__(self, content):
        self.lines = set(content.decode().split())

    def combine(self, other, *, ignore_mismatch):
        assert not ignore_mismatch
        self.lines |= other.lines

    def serialize(self):
        return " ".join(sorted(self.lines)).encode()


class FakeConfig:
    """Stands for the builder's configuration, as far as it keeps timings."""

    def create_timing_cache(self, content):
        return None if content.startswith(b"damaged") else FakeTimings(content)

    def set_timing_cache(self, timings, *, ignore_mismatch):
        assert not ignore_mismatch
        self.timings = timings
        return True

    def get_timing_cache(self):
        return self.timings


class TestTimings:
    """What is read before a build and written after it, with a fake library."""

    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "cache" / "timings.bin"

    def build(self, path, measured, meanwhile=None):
        config = FakeConfig()
        read = tensorrt._load_timings(config, path)
        known = set(config.timings.lines)
        config.timings.lines |= measured
        if meanwhile is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(meanwhile)
        tensorrt._store_timings(config, path, read=read)
        assert not list(path.parent.glob(".*"))
        return known

    def test_the_next_build_knows_them(self, path):
        assert self.build(path, {"a", "b"}) == set()
        assert self.build(path, {"c"}) == {"a", "b"}
        assert path.read_bytes() == b"a b c"

    def test_those_of_a_build_at_the_same_time_stay(self, path):
        self.build(path, {"a"})
        self.build(path, {"b"}, meanwhile=b"a c")
        assert path.read_bytes() == b"a b c"

    def test_damaged_ones_are_written_anew(self, path, caplog):
        path.parent.mkdir()
        path.write_bytes(b"damaged")
        assert self.build(path, {"a"}) == set()
        assert path.read_bytes() == b"a"
        assert "cannot be read" in caplog.text

    def test_nothing_new_is_not_written(self, path):
        self.build(path, {"a"})
        before = path.stat().st_mtime_ns, path.stat().st_ino
        self.build(path, set())
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == before

    def test_a_folder_that_cannot_be_written(self, tmp_path, caplog):
        (tmp_path / "file").write_text("")
        config = FakeConfig()
        path = tmp_path / "file" / "timings.bin"
        read = tensorrt._load_timings(config, path)
        config.timings.lines.add("a")
        tensorrt._store_timings(config, path, read=read)
        assert "not kept" in caplog.text

    def test_one_file_per_version_and_gpu(self):
        library = tensorrt.Library(None, "tensorrt", "10.3.0")
        other = tensorrt.Library(None, "tensorrt", "10.16.2")
        paths = [
            tensorrt._timings_path(library, "Orin sm_87"),
            tensorrt._timings_path(other, "Orin sm_87"),
            tensorrt._timings_path(library, "NVIDIA H100 sm_90"),
        ]
        assert len(set(paths)) == 3
        assert all(re.fullmatch(r"[\w.-]+", path.name) for path in paths)


class TestSettings:
    @pytest.mark.parametrize(
        "wrong",
        [{"level": 6}, {"level": -1}, {"workspace_bytes": 0}, {"shapes": {"x": (1, 0)}}],
    )
    def test_wrong_numbers(self, wrong):
        with pytest.raises(SettingError, match="expected"):
            BuildSettings(**wrong)

    @pytest.mark.parametrize(
        "shapes", [((1, 8), (1, 4), (1, 8)), ((0, 1), (1, 1), (1, 1)), ((1,), (1, 1), (1, 1))]
    )
    def test_wrong_ranges(self, shapes):
        with pytest.raises(SettingError, match="ascending"):
            Range(*shapes)

    def test_a_library_that_is_not_installed(self, monkeypatch):
        monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(BackendUnavailableError, match=r"fuseengine\[tensorrt\].*\[rtx\]"):
            tensorrt.find_library()

    def test_a_library_that_cannot_be_imported(self, monkeypatch, tmp_path):
        (tmp_path / "tensorrt_rtx.py").write_text("raise ImportError('libnvinfer.so.10')")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(tensorrt.importlib.import_module("sys").modules, RTX, raising=False)
        tensorrt._imported.cache_clear()
        with pytest.raises(BackendUnavailableError, match=r"cannot be imported.*libnvinfer"):
            tensorrt.find_library(RTX)
        tensorrt._imported.cache_clear()


# --- the engine inspector -------------------------------------------------------------------------

# Two layers as both versions write them: TensorRT's developer guide, and its guide to migrating
# from IEngineInspector's JSON of 10.x to that of 11.x.
CONVOLUTION = {
    "Name": "conv_1 + relu_2",
    "LayerType": "CaskConvolution",
    "Inputs": [{"Name": "in0", "Format/Datatype": "Row major linear FP32"}],
    "Outputs": [
        {"Name": "t", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}
    ],
    "Weights": {"Type": "Half", "Count": 864},
    "Bias": {"Type": "Float", "Count": 32},
}
FUSED = {
    "Name": "__myl_MeanSub",
    "LayerType": "kgen",
    "Inputs": [{"Name": "t", "Format/Datatype": "Half"}],
    "Outputs": [{"Name": "out0", "Format/Datatype": "Float"}],
}
TEN = {"Layers": [CONVOLUTION, FUSED], "Bindings": ["in0", "out0"]}
ELEVEN = {
    "Layers": [CONVOLUTION, FUSED],
    "I/O Tensors": [
        {"Name": "in0", "IOMode": "Input", "DataType": "Float", "Dimensions": [1, 3, 64, 64]},
        {"Name": "out0", "IOMode": "Output", "DataType": "Float", "Dimensions": [1, 1, 64, 64]},
    ],
}


class TestSummary:
    @pytest.mark.parametrize("form", [TEN, ELEVEN], ids=["10", "11"])
    def test_both_forms(self, form):
        summary = Summary.from_json(json.dumps(form), activation_bytes=1 << 20)
        assert summary.tensors == ("in0", "out0")
        assert [layer.types for layer in summary.layers] == [("fp16",), ("fp32",)]
        assert summary.kinds() == {"CaskConvolution": 1, "kgen": 1}
        assert summary.types() == {"fp16": 1, "fp32": 1}
        assert summary.weight_bytes == 864 * 2 + 32 * 4
        assert "2 layers" in str(summary) and "activations 1.0 MiB" in str(summary)

    def test_layers_by_name_only(self):
        data = {"Layers": ["conv_1", "relu_2"], "Bindings": ["x", "y"]}
        summary = Summary.from_json(json.dumps(data))
        assert [layer.name for layer in summary.layers] == ["conv_1", "relu_2"]
        assert summary.weight_bytes is None and "not told" in str(summary)

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("Row major linear FP32", "fp32"),
            ("Row major linear FP16 format", "fp16"),
            ("Half", "fp16"),
            ("BFloat16", "bf16"),
            ("Thirty-two wide channel vectorized row major Int8 format.", "int8"),
            ("FP8 E4M3", "fp8"),
            ("Int64", "int64"),
            ("Bool", "bool"),
            ("N/A due to dynamic shapes", ""),
        ],
    )
    def test_types(self, text, name):
        assert tensorrt._type(text) == name

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"Layers": [1], "Bindings": []}', "null"])
    def test_neither_form(self, text):
        with pytest.raises(CompileError, match="engine inspector"):
            Summary.from_json(text)


@needs_rtx
def test_a_plan_of_another_version_is_not_tried():
    with pytest.raises(BackendUnavailableError, match=r"one of tensorrt_rtx 0\.1"):
        tensorrt.LoadedPlan(Plan(b"", RTX, "0.1", "sm_86", 0.0))
