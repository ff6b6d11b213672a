"""ONNX without onnx: weights out and in again, byte for byte, and malformed networks refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fuseengine.errors import BundleError
from fuseengine.runtime import onnx_chunks


def network(*weights, **tensors):
    """A network with such initializers."""
    held = [numpy_helper.from_array(array, f"w{i}") for i, array in enumerate(weights)]
    held += [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"], domain="")
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    return helper.make_model(helper.make_graph([node], "g", [x], [y], held))


BIG = np.arange(1000, dtype=np.float32)
OTHER = BIG[::-1].copy()
SMALL = np.arange(4, dtype=np.int64)


class TestSplit:
    def test_large_weights_are_cut_out(self):
        content = network(BIG, SMALL, OTHER).SerializeToString()
        literal, cuts = onnx_chunks.split(content)
        assert [weight for _, weight in cuts] == [BIG.tobytes(), OTHER.tobytes()]
        assert len(literal) == len(content) - 8000
        assert onnx_chunks.join(literal, cuts) == content
        onnx_chunks.check(content)

    def test_nothing_to_cut(self):
        content = network(SMALL).SerializeToString()
        assert onnx_chunks.split(content) == (content, ())
        assert onnx_chunks.join(content, ()) == content

    def test_every_byte_may_be_cut(self):
        content = network(SMALL, BIG).SerializeToString()
        literal, cuts = onnx_chunks.split(content, least=1)
        assert len(cuts) == 2 and onnx_chunks.join(literal, cuts) == content

    @given(st.lists(st.integers(0, 700), max_size=6))
    def test_round_trip(self, sizes):
        arrays = [np.full(n, i, np.float32) for i, n in enumerate(sizes)]
        content = network(*arrays).SerializeToString()
        literal, cuts = onnx_chunks.split(content)
        assert len(cuts) == sum(n >= 256 for n in sizes)
        assert onnx_chunks.join(literal, cuts) == content

    @pytest.mark.parametrize("places", [[5, 3], [-1], [999]])
    def test_places_that_do_not_fit(self, places):
        with pytest.raises(BundleError, match="a weight at"):
            onnx_chunks.join(b"0123456789", [(at, b"x") for at in places])


def changed(function):
    model = network(BIG, SMALL)
    function(model)
    return model.SerializeToString()


def external(model):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def shorter(model):
    model.graph.initializer[0].raw_data = b"1234"


def longer(model):
    model.graph.initializer[0].dims[0] = 2**40


def inside_a_branch(model):
    branch = network(BIG).graph
    shorter(onnx.ModelProto(graph=branch))
    branch.initializer[0].dims.append(3)
    model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=branch))


def in_a_constant(model):
    tensor = numpy_helper.from_array(SMALL, "c")
    tensor.dims[0] = 5
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def of_unknown_type(model):
    model.graph.initializer[0].data_type = 99


class TestCheck:
    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (external, "in another file"),
            (shorter, r"shape \[1000\] with 4 bytes"),
            (longer, "with 4000 bytes"),
            (inside_a_branch, "with 4000 bytes"),
            (in_a_constant, r"shape \[5\] with 32 bytes"),
            (of_unknown_type, "data type 99"),
        ],
    )
    def test_tensors(self, function, message):
        with pytest.raises(BundleError, match=message):
            onnx_chunks.check(changed(function))

    def test_types_of_all_widths(self):
        arrays = [np.zeros(7, t) for t in (np.float16, np.uint8, np.int32, np.float64, np.bool_)]
        onnx_chunks.check(network(*arrays).SerializeToString())
        nibbles = helper.make_tensor("n", TensorProto.INT4, [3], bytes(2), raw=True)
        model = network()
        model.graph.initializer.append(nibbles)
        onnx_chunks.check(model.SerializeToString())

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\x08",
            b"hello",
            b"\x3a\xff\xff\xff\xff\x0f",
            b"\x3a\x02\x0a",
            b"\x38\x01",
            b"\xff" * 11,
            b"\x00\x00",
            b"\x3b",
            bytes.fromhex("3a00") * 2,
        ],
    )
    def test_what_is_no_network(self, content):
        with pytest.raises(BundleError, match="ONNX"):
            onnx_chunks.check(content)

    def test_deep(self):
        graph = network().graph
        for _ in range(16):  # three levels each; protobuf itself gives up at 100
            node = helper.make_node("If", ["x"], ["y"], then_branch=graph)
            graph = helper.make_graph([node], "g", [], [])
        with pytest.raises(BundleError, match="deep"):
            onnx_chunks.check(helper.make_model(graph).SerializeToString())

    @given(st.binary(max_size=60), st.integers(0, 4000))
    def test_damage_is_refused_or_harmless(self, noise, place):
        content = bytearray(network(BIG[:9], SMALL).SerializeToString())
        place %= len(content)
        content[place : place + len(noise)] = noise
        try:
            onnx_chunks.check(bytes(content))
            literal, cuts = onnx_chunks.split(bytes(content))
        except BundleError:
            return
        assert onnx_chunks.join(literal, cuts) == content
