"""Q/DQ networks, the search for float layers, and int8 engines."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

import fuseengine as fe
from fuseengine.backends import BACKENDS
from fuseengine.errors import CompileError, FrameError, SettingError, SizeMismatchError
from fuseengine.export.calibration import calibration_pairs, observe
from fuseengine.export.onnx import stage_to_onnx
from fuseengine.export.qdq import (
    SWITCHES,
    layers_of,
    multiplications,
    quantise,
    quantise_weight,
    switchable,
    worthwhile,
)
from fuseengine.export.quantize import quantise_stages
from fuseengine.export.sensitivity import Judge, fewest_floats
from fuseengine.program import StageVariant
from fuseengine.stages import ModelStages
from tests.helpers import psnr, randomise, tiny

SIZE = (64, 96)
SMALL = (24, 32)
NEEDS_OPENVINO = pytest.mark.skipif(
    BACKENDS["openvino"].unavailable("cpu") is not None, reason="needs OpenVINO"
)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEENGINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Net(nn.Module):
    """Convolutions, a product, and a residual that reads what a convolution reads."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 1, bias=False)
        self.mix = nn.Linear(8, 8)
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        x = nn.functional.silu(self.first(x))
        x = x + self.third(nn.functional.silu(self.second(x)))
        flat = self.mix(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return self.last(x + flat.unflatten(2, (x.shape[2], x.shape[3])))


def run(model, *inputs, **more):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {**dict(zip(names, inputs, strict=False)), **more})


@pytest.fixture(scope="module")
def network():
    shape = (1, 1, "H", "W")
    model = stage_to_onnx(randomise(Net()), [("in0", shape)], [("out0", shape)], fallback=False)
    x = np.random.default_rng(0).normal(size=(1, 1, 24, 20)).astype(np.float32)
    layers = layers_of(model)
    seen = observe(model, [name for y in layers for name in (y.input, y.output)], [[x]])
    return model, layers, seen.ranges("max"), x, seen


class TestWeights:
    @pytest.mark.parametrize(("shape", "axis"), [((5, 3, 3, 3), 0), ((7, 4), 1), ((1, 1), 0)])
    def test_per_channel(self, shape, axis):
        rng = np.random.default_rng(1)
        weight = np.moveaxis(rng.normal(size=shape).astype(np.float32), axis, 0)
        weight *= np.geomspace(1e-3, 10, len(weight), dtype=np.float32).reshape(
            -1, *[1] * (weight.ndim - 1)
        )
        weight = np.moveaxis(weight, 0, axis)
        whole, scales = quantise_weight(weight, axis)
        assert whole.dtype == np.int8 and whole.shape == shape and scales.shape == (shape[axis],)
        channels = np.moveaxis(whole, axis, 0).reshape(shape[axis], -1).astype(int)
        assert (np.abs(channels).max(axis=1) == 127).all()
        steps = scales.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        assert (np.abs(whole * steps - weight) <= 0.501 * steps).all()

    def test_a_channel_of_zeros(self):
        whole, scales = quantise_weight(np.zeros((2, 1, 1, 1), np.float32), 0)
        assert not whole.any() and (scales > 0).all()


class TestNetworks:
    def test_layers(self, network):
        model, layers, _, _, seen = network
        assert [x.label for x in layers] == ["first", "second", "third", "mix", "last"]
        assert [x.axis for x in layers] == [0, 0, 0, 1, 0]
        pixels = 24 * 20
        costs = multiplications(model, layers, seen.elements)
        assert [costs[x.node] for x in layers] == [n * pixels for n in (72, 576, 64, 64, 8)]

    def test_little_layers_stay_float(self, network):
        layers = network[1]
        costs = {layer.node: 1000 for layer in layers} | {layers[0].node: 1}
        assert worthwhile(layers, costs) == layers[1:]

    def test_form(self, network):
        """Symmetric int8, weights per channel, activations per tensor, biases as they were."""
        model, layers, ranges, _, _ = network
        made = quantise(model, ranges, layers)
        onnx.checker.check_model(made, full_check=True)
        assert made.graph.input == model.graph.input and made.graph.output == model.graph.output
        constants = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
        pairs = [n for n in made.graph.node if n.op_type.endswith("quantizeLinear")]
        pairs += [n for n in made.graph.node if n.op_type == "QuantizeLinear"]
        weights = 0
        for node in pairs:
            scale, zero = constants[node.input[1]], constants[node.input[2]]
            assert zero.dtype == np.int8 and not zero.any() and (scale > 0).all()
            if node.input[0] in constants:
                weights += 1
                assert constants[node.input[0]].dtype == np.int8
                assert scale.shape == zero.shape == (max(constants[node.input[0]].shape[-2:]),) or (
                    scale.shape == (constants[node.input[0]].shape[0],)
                )
            else:
                assert scale.shape == zero.shape == ()
        assert weights == len(layers)
        kept = {t.name for t in made.graph.initializer if t.data_type == TensorProto.FLOAT}
        assert not kept & {layer.weight for layer in layers}
        old = {t.name: t for t in model.graph.initializer}
        for name in ("first.bias", "second.bias", "mix.bias", "last.bias"):
            np.testing.assert_array_equal(constants[name], numpy_helper.to_array(old[name]))

    def test_what_is_not_asked_for_is_not_touched(self, network):
        model, layers, ranges, *_ = network
        assert quantise(model, ranges, []).graph.node == model.graph.node
        made = quantise(model, ranges, layers[1:2])
        readers = [n for n in made.graph.node if layers[1].input in n.input]
        # The residual reads the exact tensor beside the pair in front of the convolution.
        assert sorted(n.op_type for n in readers) == ["Add", "QuantizeLinear"]
        assert {n.op_type for n in made.graph.node if n.name == layers[0].node} == {"Conv"}

    @pytest.mark.parametrize(("index", "rounds"), [(0, False), (2, True), (4, True)])
    @pytest.mark.parametrize("outputs", [True, False])
    def test_values(self, network, index, rounds, outputs):
        """Against a convolution in float64 of what NumPy rounded."""
        model, layers, ranges, x, _ = network
        layer = layers[index]
        made = quantise(model, ranges, [layer], outputs=outputs)
        del made.graph.output[:]
        for name in (layer.input, layer.output):
            made.graph.output.append(
                onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            )
        given, result = run(made, x)
        constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        whole, scales = quantise_weight(constants[layer.weight], 0)

        def rounded(values, name):
            step = np.float64(ranges[name]) / 127
            return np.clip(np.rint(values / step), -127, 127) * step

        kernel = whole * scales.astype(np.float64)[:, None, None, None]
        bias = constants.get(f"{layer.label}.bias")
        exact = nn.functional.conv2d(
            torch.from_numpy(rounded(given.astype(np.float64), layer.input)),
            torch.from_numpy(kernel),
            None if bias is None else torch.from_numpy(bias.astype(np.float64)),
            padding=kernel.shape[2] // 2,
        ).numpy()
        step = ranges[layer.output] / 127
        wanted = rounded(exact, layer.output) if rounds and outputs else exact
        # A tie may fall on the other side.
        assert (np.abs(result - wanted) > 0.01 * step).mean() < 0.01
        assert np.abs(result - wanted).max() <= 1.01 * step

    def test_switches_give_the_same_values(self, network):
        """Any set of layers, without building the network again."""
        model, layers, ranges, x, _ = network
        emulated = switchable(model, ranges, layers)
        exact = run(model, x)[0]
        seen = set()
        for floats in itertools.product([False, True], repeat=len(layers)):
            (value,) = run(emulated, x, **{SWITCHES: np.array(floats)})
            chosen = [layer for layer, is_float in zip(layers, floats, strict=True) if not is_float]
            (wanted,) = run(quantise(model, ranges, chosen), x)
            # A tie that falls on the other side moves a result by a step, which is rare.
            assert np.abs(value - wanted).mean() < 0.02 * np.abs(exact - wanted).mean() + 1e-6
            seen.add(float(np.abs(value - exact).mean()))
        assert len(seen) == 2 ** len(layers)  # every switch does something

    def test_runs_in_int8(self, network, tmp_path):
        """ONNX Runtime takes the pairs into its integer kernels, with float biases."""
        model, layers, ranges, _, _ = network
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(
            quantise(model, ranges, layers).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
        kinds = [n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node]
        assert kinds.count("QLinearConv") >= 2
        assert "QLinearMatMul" in kinds and "MatMul" not in kinds


class Additive:
    """Stands for an emulation: layers add known errors to a picture of zeros."""

    def __init__(self, squares):
        self.variant = StageVariant("net", (0,))
        self.squares = {(self.variant, name): value for name, value in squares.items()}
        self.items = list(self.squares)

    def fuse(self, pair, floats):
        total = sum(square for item, square in self.squares.items() if item not in floats)
        return np.full((1, 1, 2, 2), total**0.5)


def searched(squares, **options):
    zeros = np.zeros((1, 1, 2, 2), np.float32)
    emulation = Additive(squares)
    judge = Judge(emulation, [(zeros, zeros)] * 2, [zeros] * 2)
    found = fewest_floats(judge, **{"guard_db": 40.0, "max_error": 1.0, **options})
    return {name for _, name in found.floats}, found


class TestSearch:
    """Guard 40 dB is a mean square error of 1e-4."""

    def test_nothing_to_do(self):
        floats, found = searched({"a": 4e-5, "b": 5e-5})
        assert floats == set() and found.alone == ()
        assert found.psnr_db == pytest.approx(-10 * np.log10(9e-5))

    def test_fewest(self):
        squares = {f"small{i}": 1e-5 for i in range(9)} | {"worst": 3e-4, "bad": 1e-4}
        floats, found = searched(squares)
        assert floats == {"worst", "bad"}
        assert found.psnr_db == pytest.approx(-10 * np.log10(9e-5))
        assert found.max_error == pytest.approx(9e-5**0.5)
        assert [items[0][1] for items, _ in found.alone[:2]] == ["worst", "bad"]
        assert [square for _, square in found.alone[:2]] == pytest.approx([3e-4, 1e-4])

    def test_largest_error_counts_too(self):
        floats, _ = searched({"a": 5e-5, "b": 1e-5, "c": 1e-5}, max_error=2.5e-5**0.5)
        assert floats == {"a"}

    def test_unreachable(self):
        floats, found = searched({"a": 1.0, "b": 2.0}, guard_db=150.0, max_error=1e-9)
        assert floats == {"a", "b"} and found.psnr_db == 200

    def test_put_back(self):
        """The order says b before c, but c's error cancels a's."""

        class Cancelling(Additive):
            def fuse(self, pair, floats):
                signs = {"a": 1, "b": 1, "c": -1}
                total = sum(
                    signs[item[1]] * square**0.5
                    for item, square in self.squares.items()
                    if item not in floats
                )
                return np.full((1, 1, 2, 2), abs(total))

        zeros = np.zeros((1, 1, 2, 2), np.float32)
        emulation = Cancelling({"a": 0.02**2, "c": 0.021**2, "b": 0.05**2})
        found = fewest_floats(
            Judge(emulation, [(zeros, zeros)], [zeros]), guard_db=50.0, max_error=1.0
        )
        assert {name for _, name in found.floats} == {"b"}

    def test_little_time(self):
        """Neighbours are judged together; the guard is met all the same."""
        squares = {f"x{i}": 1e-5 * (50 if i == 30 else 0.1) for i in range(64)}
        floats, found = searched(squares, seconds=0.0)
        assert "x30" in floats and len(floats) == 8
        assert found.psnr_db >= 40


def frames(count=2, size=SIZE):
    """Cuts of the demo pair."""
    infrared, visible = fe.demo_pair()
    h, w = size
    return [
        (infrared[40 * i : 40 * i + h, 90 * i : 90 * i + w].copy(),
         visible[40 * i : 40 * i + h, 90 * i : 90 * i + w].copy())
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return fe.load_model("drfusion-s")


def compiled(model, **options):
    given = {
        "size": SIZE, "backend": "onnxruntime", "precision": "int8", "threads": 1, "cache": False,
        "calibration": frames(), "examples": frames(1),
    }  # fmt: skip
    return fe.compile(model, **{**given, **options})


def small(**options):
    """A model with random weights, whose pictures nobody looks at."""
    pairs = frames(2, SMALL)
    given = {"size": SMALL, "calibration": pairs, "examples": pairs[:1], "max_error": 1.0}
    return compiled(tiny(), **{**given, **options})


@pytest.fixture(scope="module")
def loose():
    return small(guard_db=5.0, examples=None, cache=True)


@pytest.fixture(scope="module")
def engine(model):
    return compiled(model)


@pytest.fixture(scope="module")
def exact(model):
    return compiled(model, precision="fp32", calibration=None)


class TestEngines:
    def test_guard_is_met(self, engine, exact):
        record = engine.report.quantised
        assert set(engine.report.choice.values()) == {"onnxruntime/int8"}
        assert engine.report.psnr_db >= 45 and engine.report.max_error <= 0.1
        ((ir, vis),) = frames(1)
        assert psnr(engine(ir, vis) / 255, exact(ir, vis) / 255) > 44  # both rounded to 8 bits
        assert sum(record["int8_layers"].values()) > 0.5 * record["layers"]
        floats = sum(map(len, record["float_layers"].values()))
        assert floats + sum(record["int8_layers"].values()) == record["layers"]
        text = str(engine.report)
        assert f"{floats} of {record['layers']} layers stay float" in text
        assert "2 given pairs" in text

    def test_a_stricter_guard_keeps_more_float(self, loose):
        kept = loose.report.quantised["int8_layers"]
        assert sum(kept.values()) == loose.report.quantised["layers"]
        least = loose.report.psnr_db + 4
        strict = small(guard_db=least)
        assert 0 < sum(strict.report.quantised["int8_layers"].values()) < sum(kept.values())
        assert strict.report.psnr_db >= least

    def test_out_of_reach(self):
        with pytest.raises(CompileError, match="no layer of drfusion-s can be int8 within 250"):
            small(guard_db=250.0)

    @NEEDS_OPENVINO
    def test_openvino_gives_the_same_picture(self, engine, exact):
        """One Q/DQ network. Sums round otherwise, and rounded layers make steps of it: the two
        differ as two draws of the same noise do, at most 3 dB more than from float32."""
        other = fe.engine.Engine(
            engine.program,
            engine._source,
            dict.fromkeys(engine._choice, ("openvino", "int8")),
            engine.report,
            size=SIZE,
            device="cpu",
            threads=1,
        )
        ((ir, vis),) = frames(1)
        pictures = [e(ir, vis) / 255 for e in (engine, other, exact)]
        apart = min(psnr(pictures[i], pictures[2]) for i in (0, 1))
        assert apart > 44 and psnr(pictures[0], pictures[1]) > apart - 3.5
        assert not np.array_equal(pictures[1], pictures[2])

    def test_same_network_for_every_size(self, engine):
        ((ir, vis),) = frames(1, (50, 66))
        source, choice = engine._source, engine._choice
        other = fe.engine.Engine(
            engine.program, source, choice, engine.report, size=None, device="cpu", threads=1
        )
        assert other(ir, vis).shape == (50, 66, 3)

    def test_no_int8_network_yet(self, model):
        program = fe.capture(model)
        stages = ModelStages(model, program)
        with pytest.raises(SettingError, match="no int8 network for .*precision='int8'"):
            stages.onnx(next(iter(program.variants())), "int8")

    def test_auto_does_not_calibrate_unasked(self):
        engine = small(precision="auto", calibration=None)
        notes = {c.precision: c.note for c in engine.report.candidates}
        assert "needs calibration" in notes["int8"] and engine.report.quantised is None

    def test_auto_with_calibration(self):
        engine = small(precision="auto", guard_db=5.0)
        (int8,) = [c for c in engine.report.candidates if c.precision == "int8"]
        assert int8.milliseconds > 0 and int8.psnr_db >= 5

    def test_cache(self, loose):
        options = {"cache": True, "examples": None, "guard_db": 5.0}
        first, again = loose, small(**options)
        assert not first.report.from_cache and again.report.from_cache
        assert again.report.quantised == first.report.quantised
        ((ir, vis),) = frames(1, SMALL)
        np.testing.assert_array_equal(first(ir, vis), again(ir, vis))
        assert not small(**options, calibration=frames(1, SMALL)).report.from_cache

    @pytest.mark.parametrize(
        ("calibration", "error", "message"),
        [
            ([], SettingError, "got no pairs; expected at least one"),
            ([(frames(1)[0][0],)], FrameError, "pair 0: got a tuple"),
            ([frames(1)[0], (frames(1)[0][0], frames(1, (40, 40))[0][1])], SizeMismatchError,
             "calibration pair 1: "),
            ([(np.full(SIZE, np.nan), np.zeros(SIZE))], FrameError, "calibration pair 0: .*NaN"),
        ],
        ids=["none", "one frame", "sizes", "nan"],
    )  # fmt: skip
    def test_bad_calibration(self, calibration, error, message):
        with pytest.raises(error, match=message):
            compiled(tiny(), calibration=calibration)

    def test_nan_in_the_model(self):
        broken = tiny()
        nn.init.constant_(broken.unet.stem.weight, float("nan"))
        program = fe.capture(broken)
        with pytest.raises(FrameError, match="NaN or infinity inside a network"):
            pairs = calibration_pairs(program, frames(1, (32, 32)))
            quantise_stages(program, ModelStages(broken, program), pairs)
