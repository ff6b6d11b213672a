"""Predictions: operations against PyTorch's counter, bytes by hand, rows, words, refusals."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fuseengine.errors import CompileError, SettingError
from fuseengine.program import Node, Program, StageVariant, Value, resolve
from fuseengine.roofline import Work, network_work, op_work, predict
from fuseengine.targets import get_target

torch = pytest.importorskip("torch")

SIZE = (480, 640)


def graph(nodes, inputs, outputs, weights=()):
    """A model of opset 18 from (op, inputs, output, attributes) and shapes."""
    made = helper.make_graph(
        [helper.make_node(op, i, [o], name=o, **a) for op, i, o, a in nodes],
        "small",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(a, n) for n, a in weights],
    )
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(made, opset_imports=opsets, ir_version=9).SerializeToString()


def zeros(*shape):
    return np.zeros(shape, np.float32)


class TestOperations:
    @pytest.mark.parametrize(
        "name", ["drfusion-s", "dmfuse-s", "drmf-s", "mask-difuser-s", "dmnet-s"]
    )
    def test_networks_of_all_systems_are_pytorchs_count(self, name):
        from torch.utils.flop_counter import FlopCounterMode

        import fuseengine as fe
        from fuseengine.export.onnx import stage_to_onnx

        model = fe.build(name).eval()
        program = fe.capture(model)
        total = 0
        for variant, calls in program.variants().items():
            stage = model.get_submodule(variant.stage)
            shapes = [program.values[n].shape for n in calls[0].inputs]
            known = [resolve(shape, SIZE) for shape in shapes]
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                meta = copy.deepcopy(stage).to("meta")
                made = meta(*(torch.empty(shape, device="meta") for shape in known))
            made = made if isinstance(made, (tuple, list)) else (made,)
            network = stage_to_onnx(
                stage,
                [(f"in{i}", shape) for i, shape in enumerate(shapes)],
                [(f"out{i}", [f"d{i}_{j}" for j in range(x.ndim)]) for i, x in enumerate(made)],
            ).SerializeToString()
            works = network_work(network, {f"in{i}": s for i, s in enumerate(known)}, "fp32")
            # What one number per channel goes through (a norm's groups, a gate) is left out.
            expected = counter.get_total_flops()
            assert sum(w.operations for w in works) == pytest.approx(expected, rel=2e-5)
            total += expected
        assert total > 1e9

    def test_convolutions(self):
        model = graph(
            [
                ("Conv", ["x", "w"], "y", {"strides": [2, 2], "pads": [1, 1, 1, 1], "group": 2}),
                ("ConvTranspose", ["y", "v"], "z", {"strides": [2, 2]}),
            ],
            {"x": [1, 4, "H", "W"]},
            {"z": [1, 3, "a", "b"]},
            [("w", zeros(6, 2, 3, 3)), ("v", zeros(6, 3, 2, 2))],
        )
        down, up = network_work(model, {"x": (1, 4, 32, 48)}, "fp32")
        assert down.operations == 2 * (6 * 16 * 24) * (2 * 9)
        assert up.operations == 2 * (6 * 16 * 24) * (3 * 4)
        assert down.nbytes == 4 * (4 * 32 * 48 + 6 * 2 * 9 + 6 * 16 * 24)

    def test_products(self):
        model = graph(
            [
                ("MatMul", ["x", "w"], "y", {}),
                ("Gemm", ["y2", "v"], "z", {"transA": 1}),
            ],
            {"x": [2, 5, 7], "y2": [7, 5]},
            {"y": [2, 5, 11], "z": [5, 3]},
            [("w", zeros(7, 11)), ("v", zeros(7, 3))],
        )
        works = network_work(model, {"x": (2, 5, 7), "y2": (7, 5)}, "fp32")
        assert [w.operations for w in works] == [2 * 2 * 5 * 11 * 7, 2 * 5 * 3 * 7]


class TestTraffic:
    PIXELS = 32 * 32

    def net(self, nodes, weights=()):
        weights = [("w", zeros(8, 8, 3, 3)), *weights]
        return graph(nodes, {"x": [1, 8, "H", "W"]}, {"out": [1, 8, "H", "W"]}, weights)

    def works(self, model, precision="fp32"):
        return network_work(model, {"x": (1, 8, 32, 32)}, precision)

    CONV = {"pads": [1, 1, 1, 1]}

    def test_what_is_elementwise_is_fused(self):
        alone = self.net([("Conv", ["x", "w"], "out", self.CONV)])
        fused = self.net(
            [
                ("Sigmoid", ["x"], "s", {}),
                ("Mul", ["x", "s"], "m", {}),
                ("Conv", ["m", "w"], "y", self.CONV),
                ("Relu", ["y"], "out", {}),
            ]
        )
        (one,), (other,) = self.works(alone), self.works(fused)
        picture = 8 * self.PIXELS
        assert one.nbytes == 4 * (2 * picture + 8 * 8 * 9)
        assert one.operations == other.operations and one.nbytes == other.nbytes

    def test_half_precision_moves_half_but_at_the_borders(self):
        model = self.net(
            [
                ("Conv", ["x", "w"], "y", self.CONV),
                ("Conv", ["y", "w"], "z", self.CONV),
                ("Conv", ["z", "w"], "out", self.CONV),
            ]
        )
        picture, weights = 8 * self.PIXELS, 8 * 8 * 9
        first, middle, last = self.works(model, "fp16")
        assert first.nbytes == last.nbytes == 4 * picture + 2 * picture + 2 * weights
        assert middle.nbytes == 2 * (2 * picture + weights)

    def test_a_skip_connection_is_read(self):
        model = self.net(
            [
                ("Conv", ["x", "w"], "y", self.CONV),
                ("Conv", ["y", "w"], "z", self.CONV),
                ("Add", ["z", "y"], "out", {}),
            ]
        )
        first, second = self.works(model)
        assert second.nbytes - first.nbytes == 4 * 8 * self.PIXELS

    def test_a_norm_reads_twice(self):
        axes = [("axes", np.array([2, 3], np.int64)), ("mix", zeros(8, 8, 1, 1))]
        model = self.net(
            [
                ("Conv", ["x", "w"], "y", self.CONV),
                ("ReduceMean", ["y", "axes"], "mean", {}),
                ("Conv", ["mean", "mix"], "group", {}),
                ("Sub", ["y", "group"], "centred", {}),
                ("Mul", ["centred", "centred"], "square", {}),
                ("ReduceMean", ["square", "axes"], "variance", {}),
                ("Mul", ["centred", "variance"], "normed", {}),
                ("Conv", ["normed", "w"], "out", self.CONV),
            ],
            axes,
        )
        works = self.works(model)
        assert len(works) == 4  # the product of means is no kernel
        picture = 4 * 8 * self.PIXELS
        assert [round(w.nbytes / picture) for w in works] == [2, 1, 1, 2]

    @pytest.mark.parametrize("fused", [False, True])
    def test_attention(self, fused):
        model = graph(
            [
                ("MatMul", ["q", "k"], "scores", {}),
                ("Softmax", ["scores"], "weights", {"axis": -1}),
                ("MatMul", ["weights", "v"], "out", {}),
            ],
            {"q": [1, 2, "n", 16], "k": [1, 2, 16, "n"], "v": [1, 2, "n", 16]},
            {"out": [1, 2, "n", 16]},
        )
        shapes = {"q": (1, 2, 64, 16), "k": (1, 2, 16, 64), "v": (1, 2, 64, 16)}
        works = network_work(model, shapes, "fp16", fused_attention=fused)
        assert [w.operations for w in works] == [2 * 2 * 64 * 64 * 16, 0, 2 * 2 * 64 * 64 * 16]
        assert works[1].exponentials == 2 * 64 * 64
        outside = 4 * 2 * 64 * 16 * 4  # q, k, v and the result are borders: float32
        maps = 0 if fused else 4 * 2 * (2 * 64 * 64)
        assert sum(w.nbytes for w in works) == outside + maps

    def test_a_shape_that_nobody_knows(self):
        model = graph(
            [
                ("NonZero", ["x"], "i", {}),
                ("Cast", ["i"], "f", {"to": 1}),
                ("MatMul", ["f", "w"], "out", {}),
            ],
            {"x": [4, 4]},
            {"out": ["a", 3]},
            [("w", zeros(5, 3))],
        )
        with pytest.raises(CompileError, match="shape"):
            network_work(model, {"x": (4, 4)}, "fp32")


def program_of(op, shapes, output):
    names = [f"v{i}" for i in range(len(shapes))]
    values = {n: Value(n, s) for n, s in zip(names, shapes, strict=True)}
    values["out"] = Value("out", output)
    node = Node("op", op, tuple(names), ("out",))
    return node, Program("m", "luma", 1, ("v0", "v0"), "out", values, {}, (node,))


class TestOps:
    def test_reads_and_writes(self):
        planes = [(1, 3, "H", "W")] * 2 + [(1, 1, "H", "W")] * 3
        work = op_work(*program_of("joint_ddim_step", planes, (1, 3, "H", "W")), SIZE)
        assert work == Work(nbytes=4 * 480 * 640 * 12)  # nine reads, three writes

    def test_attention_meets_the_row_and_the_column(self):
        shapes = [(1, 4, "H", "W"), (1, 4, "H", "W"), (1, 32, "H", "W")]
        work = op_work(*program_of("criss_cross_attention", shapes, (1, 32, "H", "W")), SIZE)
        meetings = 480 * 640 * (480 + 640 - 1)
        assert work.operations == 2 * meetings * 36 and work.exponentials == meetings
        assert work.nbytes == 4 * 480 * 640 * (4 + 4 + 32 + 32)

    def test_transforms(self):
        shapes = [(1, 1, "H", "W"), (5, 5)]
        work = op_work(*program_of("wiener_deconvolution", shapes, (1, 1, "H", "W")), SIZE)
        assert work.operations == pytest.approx(5 * 480 * 640 * math.log2(480 * 640))
        assert work.nbytes == 480 * 640 * (8 + 16 + 4)


@pytest.fixture(scope="module")
def drfusion():
    import fuseengine as fe
    from fuseengine.stages import ModelStages

    model = fe.build("drfusion-s").eval()
    program = fe.capture(model)
    return program, ModelStages(model, program)


class TestPrediction:
    def test_rows(self, drfusion):
        target = get_target("orin")
        found = predict(*drfusion, target, "fp16", SIZE)
        names = [row.name for row in found.rows]
        assert names[0] == "frame in" and names[-1] == "frame out"
        assert {"unet-0-1", "unet-0", "joint_ddim_step"} <= set(names)
        rows = {row.name: row for row in found.rows}
        assert rows["unet-0-1"].calls == 2 and rows["unet-0"].calls == 1
        assert found.operations == pytest.approx(2 * 6.137e9 + 5.31e9, rel=1e-3)
        assert found.milliseconds == pytest.approx(
            sum(row.milliseconds for row in found.rows) + target.frame_seconds * 1e3
        )
        for row in found.rows:
            assert row.milliseconds > 0
            # No faster than either roof with nothing lost.
            assert row.milliseconds / 1e3 >= row.nbytes / target.bandwidth
            assert row.milliseconds / 1e3 >= row.operations / target.peak("fp16")

    def test_says_what_it_is(self, drfusion):
        found = predict(*drfusion, get_target("orin"), "fp16")
        assert found.summary().startswith("predicted, not measured: drfusion-s 640x480 on Jetson")
        text = str(found)
        assert text.startswith(found.summary())
        assert "45% of the peak and 70% of the bandwidth" in text and "nvpmodel_p3701" in text
        assert "--target orin:30w" in text
        data = json.loads(json.dumps(found.to_dict()))
        assert data["measured"] is False and data["milliseconds"] == found.milliseconds

    def test_a_slower_mode_and_wider_numbers_take_longer(self, drfusion):
        def ms(target, precision):
            return predict(*drfusion, get_target(target), precision).milliseconds

        assert ms("orin", "int8") < ms("orin", "fp16") < ms("orin", "fp32")
        assert ms("orin", "fp16") < ms("orin:50w", "fp16") < ms("orin:30w", "fp16")
        assert ms("thor", "fp16") < ms("orin", "fp16") < ms("orin-nano", "fp16")
        assert ms("orin-nano", "fp16") < ms("x86-cpu", "fp32")

    def test_more_pixels(self, drfusion):
        target = replace(get_target("orin"), kernel_seconds=0.0, frame_seconds=0.0)
        small, large = (
            predict(*drfusion, target, "fp16", size).milliseconds
            for size in ((240, 320), (480, 640))
        )
        assert large / small == pytest.approx(4, rel=0.05)

    def test_odd_sizes_are_padded(self, drfusion):
        target = get_target("orin")
        odd, even = (predict(*drfusion, target, "fp16", size) for size in ((237, 319), (240, 320)))
        assert odd.operations == even.operations

    def test_a_precision_per_stage(self, drfusion):
        program, stages = drfusion
        variants = list(program.variants())
        mixed = dict.fromkeys(variants, "fp32") | {variants[0]: "int8+fp16"}
        rows = {r.name: r for r in predict(program, stages, get_target("orin"), mixed).rows}
        assert rows[variants[0].label].precision == "int8"
        assert rows[variants[1].label].precision == "fp32"

    def test_refuses_what_the_target_does_not_do(self, drfusion):
        with pytest.raises(SettingError, match="computes in fp32"):
            predict(*drfusion, get_target("x86-cpu"), "fp16")

    def test_ops_bound_by_exponentials_and_launches(self):
        target = get_target("orin")
        assert Work(exponentials=1e9).seconds(target, "fp16")[1] == "exponentials"
        assert Work(nbytes=10).seconds(target, "fp16")[1] == "launches"
        assert Work(1e12).seconds(target, "fp16") == (
            pytest.approx(1e12 / (42.6e12 * 0.45), rel=1e-3),
            "arithmetic",
        )


def test_weights_are_not_needed_twice():
    """A variant called several times is read once."""
    asked = []
    model = graph(
        [("Conv", ["in0", "w"], "out0", {"pads": [1, 1, 1, 1]})],
        {"in0": [1, 1, "H", "W"]},
        {"out0": [1, 1, "H", "W"]},
        [("w", zeros(1, 1, 3, 3))],
    )

    class Stages:
        def onnx(self, variant, precision="fp32"):
            asked.append(variant)
            return model

    shape = (1, 1, "H", "W")
    values = {name: Value(name, shape) for name in ("a", "b", "c", "d")}
    nodes = (Node("stage", "net", ("a",), ("c",)), Node("stage", "net", ("c",), ("d",)))
    program = Program("m", "luma", 1, ("a", "b"), "d", values, {}, nodes)
    found = predict(program, Stages(), get_target("orin"), "fp16", (16, 16))
    assert asked == [StageVariant("net", (0,))]
    (row,) = (row for row in found.rows if row.kind == "stage")
    assert row.calls == row.kernels == 2 and row.operations == 2 * 2 * 9 * 256
    assert onnx.load_model_from_string(model).graph.name == "small"
