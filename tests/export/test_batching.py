"""A batch in a model for one picture: what is opened, what is repeated, what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fuseengine.errors import CompileError

batching = pytest.importorskip("fuseengine.export.batching")
RNG = np.random.default_rng(0)


def graph(nodes, constants=(), *, out=(1, 4, 6, 8)):
    made = helper.make_graph(
        [helper.make_node(op, i, [o], name=o, **a) for op, i, o, a in nodes],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4, 6, 8))],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def pictures(count):
    return {"x": RNG.random((count, 4, 6, 8), dtype=np.float32)}


def weights(*shape):
    return RNG.random(shape, dtype=np.float32)


def check(model, count=3):
    onnx.checker.check_model(model, full_check=True)
    batching.check_batches(model, pictures(count), 1e-4)


def test_convolutions_need_nothing():
    model = graph(
        [("Conv", ["x", "w"], "y", {"pads": [1] * 4}), ("Relu", ["y"], "out", {})],
        [("w", weights(4, 4, 3, 3))],
    )
    opened = batching.open_batch(model)
    assert opened.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1  # a copy
    check(opened)


def test_reshapes_keep_their_batch():
    model = graph(
        [
            ("Reshape", ["x", "tokens"], "t", {}),
            ("Transpose", ["t"], "u", {"perm": [0, 2, 1]}),
            ("MatMul", ["u", "w"], "v", {}),
            ("Transpose", ["v"], "s", {"perm": [0, 2, 1]}),
            ("Reshape", ["s", "picture"], "out", {}),
        ],
        [
            ("tokens", np.array([1, 4, 48])),
            ("picture", np.array([1, 4, 6, 8])),
            ("w", weights(4, 4)),
        ],
    )
    check(batching.open_batch(model))


def test_windows_merge_the_batch_into_another_dimension():
    model = graph(
        [
            ("Reshape", ["x", "split"], "a", {}),
            ("Transpose", ["a"], "b", {"perm": [0, 2, 1, 3]}),
            ("Reshape", ["b", "merged"], "c", {}),
            ("Softmax", ["c"], "d", {"axis": -1}),
            ("Reshape", ["d", "apart"], "e", {}),
            ("Transpose", ["e"], "f", {"perm": [0, 2, 1, 3]}),
            ("Reshape", ["f", "picture"], "out", {}),
        ],
        [
            ("split", np.array([1, 4, 3, 16])),
            ("merged", np.array([3, 64])),
            ("apart", np.array([1, 3, 4, 16])),
            ("picture", np.array([1, 4, 6, 8])),
        ],
    )
    check(batching.open_batch(model))


def test_noise_is_repeated():
    model = graph(
        [
            ("Concat", ["noise", "x"], "both", {"axis": 1}),
            ("Conv", ["both", "w"], "out", {"pads": [1] * 4}),
        ],
        [("noise", weights(1, 2, 6, 8)), ("w", weights(4, 6, 3, 3))],
    )
    check(batching.open_batch(model))


def test_a_batch_that_is_moved_is_refused():
    model = graph(
        [("Reshape", ["x", "s"], "y", {}), ("Reshape", ["y", "back"], "out", {})],
        [("s", np.array([2, -1])), ("back", np.array([1, 4, 6, 8]))],
    )
    with pytest.raises(CompileError, match="moves the batch into another dimension"):
        batching.open_batch(model)


def test_borders_without_a_batch_are_refused():
    with pytest.raises(CompileError, match="out has no first dimension of 1"):
        batching.open_batch(
            graph([("Reshape", ["x", "s"], "out", {})], [("s", np.array([4, 48]))], out=(4, 48))
        )


class TestCheck:
    def test_finds_a_mixture(self):
        model = graph(
            [("ReduceMean", ["x", "axis"], "m", {"keepdims": 1}), ("Add", ["x", "m"], "out", {})],
            [("axis", np.array([0]))],
        )
        with pytest.raises(CompileError, match="other pictures than one by one"):
            check(batching.open_batch(model))

    def test_finds_a_model_that_takes_one_only(self):
        model = graph(
            [
                ("Concat", ["noise", "x"], "both", {"axis": 1}),
                ("Slice", ["both", "a", "b", "c"], "out", {}),
            ],
            [
                ("noise", weights(1, 1, 6, 8)),
                ("a", np.array([1])),
                ("b", np.array([5])),
                ("c", np.array([1])),
            ],
        )
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        with pytest.raises(CompileError, match="takes no batch"):
            batching.check_batches(model, pictures(2), 1e-4)
