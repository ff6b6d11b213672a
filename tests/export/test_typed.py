"""Half precision by explicit types: what is half, what is not, and what it computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from fuseengine.backends import openvino
from fuseengine.errors import CompileError, UnknownNameError
from fuseengine.export.graph import fixed, infer, opset_of
from fuseengine.export.onnx import OnnxWriter
from fuseengine.export.typed import PRECISIONS, check_names, count_types, emulated, fits, typed
from fuseengine.kernels import onnx_forms
from fuseengine.stages import ModelStages
from fuseengine.tracing import capture
from tests.helpers import TINY, system

HALVES = sorted(PRECISIONS)


class Graph(OnnxWriter):
    """A graph with one picture "x" in and one "y" out, both (1, 4, H, W) unless told."""

    def finish(self, y, channels=4, *, type=TensorProto.FLOAT, size=("H", "W")):
        self.add("Identity", y, name="y")
        given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, *size])
        shape = [1, channels, *(f"{n}out" if isinstance(n, str) else n for n in size)]
        return self.model([given], [helper.make_tensor_value_info("y", type, shape)], "test")

    def conv(self, x, scale=1.0, size=1, name=""):
        rng = np.random.default_rng(len(self.nodes))
        weight = scale * rng.normal(size=(4, 4, size, size)).astype(np.float32)
        pads = [size // 2] * 4
        return self.add("Conv", x, self.constant(weight.astype(np.float32)), pads=pads, name=name)

    def norm(self, x):
        ones = np.ones(4, np.float32)
        return onnx_forms.group_norm_silu(self, x, ones, 0 * ones, groups=2)


def network(precision="", **options):
    """Two convolutions with a norm between them."""
    w = Graph()
    model = w.finish(w.conv(w.norm(w.conv("x", name="first")), size=3, name="last"))
    return typed(model, precision, **options) if precision else model


def run(model, x, *, exactly=False):
    """Outputs in ONNX Runtime; ``exactly`` as the graph says, without optimisation."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if exactly:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = model.SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def picture(size=(8, 6), seed=0, scale=1.0):
    noise = np.random.default_rng(seed).normal(size=(1, 4, *size))
    return (scale * noise).astype(np.float32)


def types(model):
    """Name of each value -> "half", "float32" or "" for all else."""
    names = {TensorProto.FLOAT: "float32", **dict.fromkeys(PRECISIONS.values(), "half")}
    return {name: names.get(info.type, "") for name, info in infer(model).items()}


def computed_in(model, op):
    """The types of the results of all nodes of an operator."""
    known = types(model)
    return {known[name] for n in model.graph.node if n.op_type == op for name in n.output}


def check_valid(model):
    onnx.checker.check_model(model, full_check=True)
    assert not pairs_of_casts(model)


def pairs_of_casts(model):
    """Casts of what a Cast between floating point types made."""
    known = types(model)
    maker = {n.output[0]: n for n in model.graph.node if n.op_type == "Cast"}
    return [n.name for n in maker.values() if n.input[0] in maker and known[n.input[0]]]


class TestTypes:
    @pytest.mark.parametrize("precision", HALVES)
    def test_products_are_half_and_borders_are_not(self, precision):
        model = network(precision)
        check_valid(model)
        assert opset_of(model) == {"fp16": 18, "bf16": 22}[precision]
        known = types(model)
        assert known["first"] == known[f"y_{precision}"] == "half"
        assert known["x"] == known["y"] == "float32"
        weights = [
            i.data_type for i in model.graph.initializer if len(i.dims) == 4 and i.dims[2] > 1
        ]
        assert weights == [PRECISIONS[precision]]

    def test_norms_are_float32_as_a_whole(self):
        model = network("fp16")
        known = types(model)
        for op in ("ReduceMean", "Sub", "Sqrt", "Reciprocal", "Mul", "Sigmoid", "Add"):
            assert computed_in(model, op) == {"float32"}, op
        mixes = [
            n
            for n in model.graph.node
            if n.op_type == "Conv" and n.name not in ("first", "last_fp16", "last")
        ]
        assert len(mixes) == 3
        assert {known[n.output[0]] for n in mixes} == {"float32"}
        # Into the island the pixels and the sampled rows, one out of it, and the borders'.
        assert count_types(model).casts == 5

    @pytest.mark.parametrize(
        ("borders", "expected"),
        [
            (True, "half half"),
            (["x"], "half float32"),
            (["y"], "float32 half"),
            ([], "float32 float32"),
        ],
    )
    def test_half_borders(self, borders, expected):
        model = network("fp16", half_borders=borders)
        check_valid(model)
        known = types(model)
        assert f"{known['x']} {known['y']}" == expected
        x = picture()
        result = run(model, x.astype(np.float16) if expected.startswith("half") else x)
        assert result.dtype == (np.float16 if expected.endswith("half") else np.float32)
        np.testing.assert_allclose(result, run(network(), x), atol=0.02)

    @pytest.mark.parametrize("keep", ["Conv", "first", "fir*"])
    def test_keep(self, keep):
        model = network("fp16", keep=[keep])
        check_valid(model)
        assert types(model)["first"] == "float32"
        assert (computed_in(model, "Conv") == {"float32"}) is (keep == "Conv")

    @pytest.mark.parametrize(
        ("precision", "options", "message"),
        [
            ("fp8", {}, "unknown precision 'fp8'; expected one of: bf16, fp16, fp32"),
            ("fp16", {"half_borders": ["z"]}, "unknown input or output 'z'"),
        ],
    )
    def test_names_that_do_not_exist(self, precision, options, message):
        with pytest.raises(UnknownNameError, match=message):
            network(precision, **options)

    def test_entries_that_name_nothing(self):
        check_names(["Softmax", "first", "la*"], network())
        with pytest.raises(UnknownNameError, match="float32 'frist'.*Did you mean 'first'"):
            check_names(["first", "frist"], network())

    def test_fp32_is_a_copy(self):
        model = network()
        assert typed(model, "fp32") == model
        assert typed(model.SerializeToString(), "fp32") == model

    @pytest.mark.parametrize("precision", HALVES)
    def test_typing_twice_changes_nothing(self, precision):
        once = network(precision)
        assert count_types(typed(once, precision)) == count_types(once)

    def test_what_moves_values_between_islands_is_float32(self):
        w = Graph()
        turned = w.add("Transpose", w.add("Exp", "x"), perm=[0, 1, 3, 2])
        model = typed(w.finish(w.conv(w.add("Log", turned))), "fp16")
        assert computed_in(model, "Transpose") == {"float32"}
        assert count_types(model).casts == 2
        w = Graph()
        turned = w.add("Transpose", w.add("Exp", "x"), perm=[0, 1, 3, 2])
        model = typed(w.finish(w.conv(turned)), "fp16")
        assert computed_in(model, "Transpose") == {"half"}

    def test_an_output_that_is_read_as_well(self):
        w = Graph()
        first = w.conv("x", name="y0")
        model = w.finish(w.conv(first))
        model.graph.output.append(
            helper.make_tensor_value_info("y0", TensorProto.FLOAT, [1, 4, "H", "W"])
        )
        made = typed(model, "fp16")
        check_valid(made)
        assert types(made)["y0"] == "float32"
        assert sum(n.op_type == "Cast" for n in made.graph.node) == 3

    def test_resize_keeps_its_factors(self):
        w = Graph()
        model = typed(w.finish(onnx_forms.block_repeat(w, w.conv("x"), 2)), "fp16")
        check_valid(model)
        assert computed_in(model, "Resize") == {"half"}
        factors = next(n for n in model.graph.node if n.op_type == "Resize").input[2]
        assert types(model)[factors] == "float32"
        assert run(model, picture()).shape == (1, 4, 16, 12)

    def test_numbers_from_the_size_are_float32(self):
        """400 x 400 pixels are more than the largest half."""
        w = Graph()
        sides = w.add("Shape", "x", start=2, end=4, rank=1)
        pixels = w.add("ReduceProd", sides, keepdims=1)
        whole = w.add("Cast", pixels, to=TensorProto.FLOAT)
        share = w.add("Div", w.conv("x"), whole)
        model = w.finish(w.conv(w.add("Mul", share, whole)))
        made = typed(model, "fp16")
        check_valid(made)
        assert types(made)[sides] == ""
        assert computed_in(made, "Div") == computed_in(made, "Mul") == {"float32"}
        x = picture((400, 400))
        np.testing.assert_allclose(run(emulated(made), x), run(model, x), atol=0.05)

    def test_an_operator_without_the_type_stays_float32(self):
        w = Graph()
        # Opset 18 quantises float32 only.
        scale, zero = w.constant(np.float32(0.05)), w.constant(np.array([0], np.int8))
        scale = w.add("Squeeze", scale, w.integers(0), rank=0)
        zero = w.add("Squeeze", zero, w.integers(0), rank=0)
        q = w.add("QuantizeLinear", w.conv("x"), scale, zero)
        model = typed(w.finish(w.conv(w.add("DequantizeLinear", q, scale, zero))), "fp16")
        check_valid(model)
        assert computed_in(model, "DequantizeLinear") == {"float32"}
        assert computed_in(model, "Conv") == {"half"}

    def test_control_flow_is_refused(self):
        body = helper.make_graph(
            [helper.make_node("Identity", ["x"], ["inner"])],
            "body",
            [],
            [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
        )
        w = Graph()
        w.nodes.append(
            helper.make_node(
                "If", [w.constant(np.array(True))], ["z"], then_branch=body, else_branch=body
            )
        )
        with pytest.raises(CompileError, match="If .* holds a graph of its own"):
            typed(w.finish("z"), "fp16")

    def test_bytes_that_are_no_model(self):
        with pytest.raises(CompileError, match="not an ONNX model"):
            typed(b"\xff" * 40, "fp16")


class TestNumbersThatDoNotFit:
    def test_a_weight_that_overflows(self):
        w = Graph()
        model = typed(w.finish(w.conv(w.conv("x", scale=1e5, name="huge"), name="next")), "fp16")
        check_valid(model)
        known = types(model)
        assert (known["huge"], known["y_fp16"]) == ("float32", "half")

    @pytest.mark.parametrize(
        ("precision", "number", "inside"),
        [
            ("fp16", -1e9, "float32"),
            ("fp16", -np.inf, "half"),
            ("bf16", -1e9, "half"),
            ("bf16", float(np.finfo(np.float32).min), "float32"),
        ],
    )
    def test_masks(self, precision, number, inside):
        """Most negative numbers before a softmax; every row has one, none is NaN."""
        w = Graph()
        scores = w.conv("x")
        mask = w.constant(np.eye(6, dtype=np.bool_)[:1].repeat(8, 0))
        masked = w.add("Where", mask, w.constant(np.float32(number)), scores)
        model = w.finish(w.conv(w.add("Softmax", masked, axis=3)), size=(8, 6))
        made = typed(model, precision)
        check_valid(made)
        assert computed_in(made, "Where") == {inside}
        x = picture()
        result = run(emulated(made), x)
        assert np.isfinite(result).all()
        np.testing.assert_allclose(result, run(model, x), atol=0.03)

    @pytest.mark.parametrize("precision", HALVES)
    def test_an_epsilon_that_underflows(self, precision):
        """x / max(x^2, 1e-12) of a black picture: in fp16 the epsilon is 0 and 0 / 0 is NaN."""
        w = Graph()
        scaled = w.conv("x")
        square = w.add("Max", w.add("Mul", scaled, scaled), w.constant(np.float32(1e-12)))
        model = typed(w.finish(w.conv(w.add("Div", scaled, square))), precision)
        check_valid(model)
        assert computed_in(model, "Max") == {"float32" if precision == "fp16" else "half"}
        assert np.isfinite(run(emulated(model), 0 * picture())).all()

    @pytest.mark.parametrize(
        ("array", "fp16", "bf16"),
        [
            ([1.0, 65504.0], True, True),
            ([1.0, 65520.0], False, True),
            ([np.inf, -np.inf, np.nan], True, True),
            ([1e-12], False, True),
            ([1e-12, 1.0], True, True),
            ([0.0], True, True),
            ([3.4e38], False, False),
        ],
    )
    def test_fits(self, array, fp16, bf16):
        array = np.array(array, np.float32)
        assert fits(array, TensorProto.FLOAT16) is fp16
        assert fits(array, TensorProto.BFLOAT16) is bf16

    def test_squares_beyond_the_largest_half(self):
        """Deviations of 1000 have squares of a million: the norm of counts must not overflow."""
        w = Graph()
        model = w.finish(w.conv(w.norm(w.conv("x"))))
        x = picture(scale=2000.0)
        result = run(emulated(typed(model, "fp16")), x)
        np.testing.assert_allclose(result, run(model, x), atol=0.02)


class TestEmulated:
    @pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
    def test_fp16_is_what_numpy_computes(self, op):
        w = Graph()
        number = np.float32(0.3)
        model = typed(w.finish(w.add(op, "x", w.constant(number))), "fp16")
        x = picture()
        function = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}[op]
        wanted = function(x.astype(np.float16), np.float16(number))
        np.testing.assert_array_equal(run(emulated(model), x), wanted.astype(np.float32))

    def test_bf16_is_rounded_to_nearest_even(self):
        w = Graph()
        model = typed(w.finish(w.add("Neg", "x")), "bf16")
        check_valid(model)
        x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], np.float32)
        found = run(emulated(model), np.resize(x, (1, 4, 2, 2))).ravel()[:4]
        wanted = -np.array([1.0, 1.0, 1 + 2**-6, 1 + 2**-7], np.float32)
        np.testing.assert_array_equal(np.sort(found), np.sort(wanted))

    @pytest.mark.parametrize("name", ["drfusion-s", "dmfuse-s"])
    def test_near_what_fp16_kernels_give(self, name):
        """ONNX Runtime runs the fp16 model itself; rounding differs in places, not in size."""
        model = system(name)
        program = capture(model)
        stages = ModelStages(model, program)
        variant = max(program.variants(), key=lambda v: len(stages.onnx(v)))
        exact = onnx.load_from_string(stages.onnx(variant))
        made = typed(exact, "fp16")
        feeds = inputs_of(exact, model.multiple)
        results = [session_run(m, feeds) for m in (exact, made, emulated(made))]
        for wanted, native, simulated in zip(*results, strict=True):
            error = np.abs(simulated - wanted).max()
            assert 0 < error < 0.02 * np.abs(wanted).max()
            assert 0.1 * error < np.abs(native - wanted).max() < 10 * error


def inputs_of(model, multiple, seed=0):
    """Noise for every input, for a picture of 2 x 3 multiples."""
    from fuseengine.program import resolve

    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.input:
        shape = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        feeds[value.name] = 0.5 * rng.normal(size=resolve(shape, (2 * multiple, 3 * multiple)))
    return {name: array.astype(np.float32) for name, array in feeds.items()}


def session_run(model, feeds):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    content = model.SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("name", TINY)
def test_system(name):
    """Every network of every system, in both types, with open and with fixed sizes."""
    model = system(name)
    program = capture(model)
    stages = ModelStages(model, program)
    for variant in program.variants():
        network = onnx.load_from_string(stages.onnx(variant))
        feeds = inputs_of(network, model.multiple)
        wanted = session_run(network, feeds)
        still = fixed(network, {name: array.shape for name, array in feeds.items()})
        assert not {n.op_type for n in still.graph.node} & {"Shape", "Range", "Equal"}
        for precision, given, nearness in (("fp16", still, 0.03), ("bf16", network, 0.25)):
            made = typed(given, precision)
            check_valid(made)
            assert count_types(made).half
            runs = [emulated(made)] + [made] * (precision == "fp16")  # its own kernels
            for model_run in runs:
                for result, exact in zip(session_run(model_run, feeds), wanted, strict=True):
                    assert np.abs(result - exact).max() <= nearness * max(1.0, np.abs(exact).max())


@pytest.mark.parametrize("name", ["drfusion-s", "dmnet-s"])
def test_bf16_in_openvino(name):
    """A runtime that reads bfloat16 models agrees with the emulation."""
    pytest.importorskip("openvino")
    core = openvino.core()
    model = system(name)
    program = capture(model)
    stages = ModelStages(model, program)
    for variant in program.variants():
        network = onnx.load_from_string(stages.onnx(variant))
        feeds = inputs_of(network, model.multiple)
        made = typed(network, "bf16")
        read = core.read_model(made.SerializeToString())
        compiled = core.compile_model(read, "CPU", {"INFERENCE_NUM_THREADS": 1})
        results = compiled([feeds[value.name] for value in made.graph.input])
        for index, wanted in enumerate(session_run(network, feeds)):
            np.testing.assert_allclose(results[index], wanted, atol=0.25 * np.abs(wanted).max())


def test_weights_are_halved():
    model = system("drfusion-s")
    stages = ModelStages(model, capture(model))
    variant = max(stages.program.variants(), key=lambda v: len(stages.onnx(v)))
    network = onnx.load_from_string(stages.onnx(variant))
    count = count_types(typed(network, "fp16"))
    before = sum(numpy_helper.to_array(i).nbytes for i in network.graph.initializer)
    assert count.half_bytes > 0.4 * before
    assert count.float32_bytes < 0.15 * before
    assert str(count).startswith(f"{count.half} half, {count.float32} float32, {count.casts} casts")
