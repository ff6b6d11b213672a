"""Tools on finished ONNX graphs: types and shapes, a fixed size, folding, smaller attention maps.

They work on copies. Weights are never copied where a graph's structure is enough.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fuseengine.errors import CompileError, SettingError

Dims = tuple[int | str | None, ...]

_SMALL = 4096
"""Elements up to which a constant is folded or looked into: axes, shapes, scalars."""


@dataclass(frozen=True)
class Info:
    """What is known of a value.

    Attributes:
        type: element type as onnx.TensorProto numbers it; 0 where it is unknown.
        shape: a number, a name or None (unknown) per dimension; None where the rank is unknown.
    """

    type: int
    shape: Dims | None


def load_model(model: bytes | onnx.ModelProto) -> onnx.ModelProto:
    """A model of one's own: parsed from bytes, or copied.

    Raises:
        CompileError: the bytes are no ONNX model.
    """
    if isinstance(model, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy
    try:
        return onnx.load_model_from_string(model)
    except Exception as error:  # protobuf's own DecodeError, whose place depends on its version
        raise CompileError(f"not an ONNX model ({len(model)} bytes): {error}") from error


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the standard operators that a model imports.

    Raises:
        CompileError: it imports none.
    """
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            return int(entry.version)
    raise CompileError("the model imports no standard operators; expected opset 18 or newer")


def infer(model: onnx.ModelProto) -> dict[str, Info]:
    """Type and shape of every value, as far as ONNX's shape inference finds them.

    Raises:
        CompileError: the graph contradicts itself.
    """
    graph = _inferred(model).graph
    known = {i.name: Info(i.data_type, tuple(i.dims)) for i in model.graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        known.setdefault(value.name, _info(value))
    return known


def annotate(model: onnx.ModelProto) -> None:
    """Store what is known of the values between, in place.

    ONNX Runtime opens a graph of 2,500 nodes with open sizes in a sixth of the time then.
    """
    found = _inferred(model).graph.value_info
    del model.graph.value_info[:]
    model.graph.value_info.extend(found)


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The structure with types and shapes."""
    try:
        return onnx.shape_inference.infer_shapes(
            _without_weights(model), strict_mode=True, data_prop=True
        )
    except onnx.shape_inference.InferenceError as error:
        raise CompileError(f"shape inference refuses the graph: {error}") from error


def _info(value: onnx.ValueInfoProto) -> Info:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return Info(tensor.elem_type, None)
    dims: list[int | str | None] = []
    for dim in tensor.shape.dim:
        dims.append(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None)
    return Info(tensor.elem_type, tuple(dims))


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The structure: large constants stand as inputs of their type and shape."""
    graph = model.graph
    small = [i for i in graph.initializer if np.prod(i.dims, dtype=np.int64) <= _SMALL]
    kept = {i.name for i in small}
    inputs = [
        *graph.input,
        *(
            helper.make_tensor_value_info(i.name, i.data_type, i.dims)
            for i in graph.initializer
            if i.name not in kept
        ),
    ]
    bare = helper.make_graph(graph.node, graph.name, inputs, graph.output, small)
    made = helper.make_model(bare, opset_imports=model.opset_import, functions=model.functions)
    made.ir_version = model.ir_version
    return made


def fixed(model: bytes | onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """A model for inputs of given shapes, with everything folded that follows from them.

    Args:
        model: with open dimensions.
        shapes: per input.

    Returns:
        A copy in which no shape is computed at run time (as far as ONNX's shape inference sees).

    Raises:
        SettingError: an input has no shape here, another rank, or a dimension that contradicts.
        CompileError: the graph does not take these shapes.
    """
    made = load_model(model)
    for value in made.graph.input:
        old, new = _info(value), tuple(shapes.get(value.name, ()))
        if value.name not in shapes or old.shape is None or len(old.shape) != len(new):
            raise SettingError(
                f"shape of {value.name}: got {new or None}; expected {len(old.shape or ())} numbers"
            )
        for is_now, wanted in zip(old.shape, new, strict=True):
            if isinstance(is_now, int) and is_now != wanted:
                raise SettingError(f"shape of {value.name}: got {new}; expected {old.shape}")
        value.CopyFrom(helper.make_tensor_value_info(value.name, old.type, new))
    made = fold(made)
    known = infer(made)
    for value in made.graph.output:
        info = known[value.name]
        value.CopyFrom(helper.make_tensor_value_info(value.name, info.type, info.shape))
    return made


def fold(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace what follows from constants and from known shapes by constants; in place.

    Only small results (indices, shapes, factors) are stored: folding never makes a model larger.
    """
    graph = model.graph
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    while True:
        known = infer(model)
        values = {
            i.name: numpy_helper.to_array(i)
            for i in graph.initializer
            if np.prod(i.dims, dtype=np.int64) <= _SMALL
        }
        found: dict[str, NDArray[Any]] = {}
        left = []
        for node in graph.node:
            result = _value_of(node, values, known, opsets)
            if result is None:
                left.append(node)
            else:
                values[node.output[0]] = found[node.output[0]] = result
        if not found:
            break
        del graph.node[:]
        graph.node.extend(left)
        for name, array in found.items():
            graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    _keep_outputs(graph)
    drop_unused(graph)
    return model


def _value_of(
    node: onnx.NodeProto,
    values: Mapping[str, NDArray[Any]],
    known: Mapping[str, Info],
    opsets: dict[str, int],
) -> NDArray[Any] | None:
    """What a node gives, if that is known and small."""
    if len(node.output) != 1 or node.domain not in ("", "ai.onnx"):
        return None
    info = known.get(node.output[0])
    if info is None or info.shape is None:
        return None
    sizes = [n for n in info.shape if isinstance(n, int)]
    if len(sizes) < len(info.shape) or np.prod(sizes, dtype=np.int64) > _SMALL:
        return None
    if node.op_type == "Shape":
        return _shape_of(node, known.get(node.input[0]))
    if any(name and name not in values for name in node.input) or not any(node.input):
        return None
    given = {name: values[name] for name in node.input if name}
    (result,) = ReferenceEvaluator(node, opsets=opsets).run(None, given)
    return np.asarray(result)


def _shape_of(node: onnx.NodeProto, info: Info | None) -> NDArray[np.int64] | None:
    if info is None or info.shape is None:
        return None
    bounds = {a.name: a.i for a in node.attribute}
    part = info.shape[bounds.get("start", 0) : bounds.get("end")]
    return np.array(part, np.int64) if all(isinstance(n, int) for n in part) else None


def _keep_outputs(graph: onnx.GraphProto) -> None:
    """A folded output still needs a node: a graph's outputs are made by one."""
    constants = {i.name: i for i in graph.initializer}
    for value in graph.output:
        if value.name in constants:
            tensor = constants[value.name]
            tensor.name = f"{value.name}_value"
            graph.node.append(helper.make_node("Identity", [tensor.name], [value.name]))


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and constants that no output needs; in place."""
    needed, kept = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(_read_by(node))
    if len(kept) != len(graph.node):
        kept.reverse()
        del graph.node[:]
        graph.node.extend(kept)
    unused = [n for n, i in enumerate(graph.initializer) if i.name not in needed]
    for index in reversed(unused):
        del graph.initializer[index]
    del graph.value_info[:]


def _read_by(node: onnx.NodeProto) -> Iterable[str]:
    """Names that a node and the graphs inside it read."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
            for part in inner.node:
                yield from _read_by(part)
            yield from (value.name for value in inner.output)


def drop_identities(graph: onnx.GraphProto) -> None:
    """Remove Identity nodes but for those between a graph's own borders; in place."""
    borders = {v.name for v in graph.input} | {i.name for i in graph.initializer}
    outputs = {v.name for v in graph.output}
    source: dict[str, str] = {}  # what an Identity gives -> what it reads
    taken: dict[str, str] = {}  # a value that becomes an output -> the output's name
    kept = []
    for node in graph.node:
        if node.op_type != "Identity":
            kept.append(node)
            continue
        read, made = source.get(node.input[0], node.input[0]), node.output[0]
        if made not in outputs:
            source[made] = read
        elif read in borders or read in outputs or read in taken:
            kept.append(node)
        else:
            taken[read] = made

    def name(value: str) -> str:
        value = source.get(value, value)
        return taken.get(value, value)

    for node in kept:
        for names in (node.input, node.output):
            names[:] = [name(value) for value in names]
    del graph.node[:]
    graph.node.extend(kept)


def constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Give Constant nodes' tensors to the graph; in place."""
    kept = []
    for node in graph.node:
        if node.op_type != "Constant":
            kept.append(node)
            continue
        (attribute,) = node.attribute
        value = helper.get_attribute_value(attribute)
        if attribute.name == "value":
            array = numpy_helper.to_array(value)
        elif attribute.name in ("value_float", "value_floats"):
            array = np.asarray(value, np.float32)
        elif attribute.name in ("value_int", "value_ints"):
            array = np.asarray(value, np.int64)
        else:
            kept.append(node)
            continue
        graph.initializer.append(initializer(array, node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)


# --- attention ------------------------------------------------------------------------------------


def split_attention(model: onnx.ModelProto, limit: int) -> onnx.ModelProto:
    """Cut the queries of large attentions into parts, so that no map is larger than a limit.

    ``softmax(q k) v`` treats each query by itself: the parts' results, one after another, are the
    whole result, bit for bit where the runtime's matrix products are. A map of 19,200 queries and
    keys, which self-attention at a quarter of 480x640 has, takes 1.5 GB in float32.

    Args:
        model: with fixed shapes (:func:`fixed`); attention whose shape is open stays as it is.
        limit: bytes that one map may take in float32.

    Returns:
        A copy.

    Raises:
        SettingError: a limit below 1.
    """
    if limit < 1:
        raise SettingError(f"limit of attention maps: got {limit} bytes; expected 1 or more")
    made = load_model(model)
    graph, known = made.graph, infer(made)
    maker = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    replaced: dict[str, list[onnx.NodeProto]] = {}  # name of the last product -> its parts
    dropped: set[str] = set()
    for softmax in graph.node:
        chain = _attention_around(softmax, maker, readers, known)
        if chain is None:
            continue
        scores, apply, shape = chain
        queries = shape[-2]
        bytes_per_query = 4 * int(np.prod(shape, dtype=np.int64)) // max(queries, 1)
        at_once = max(limit // max(bytes_per_query, 1), 1)
        if queries <= at_once:
            continue
        sizes = [min(at_once, queries - i) for i in range(0, queries, at_once)]
        split = initializer(np.array(sizes, np.int64), f"{apply.output[0]}_sizes")
        graph.initializer.append(split)
        axis = len(shape) - 2
        replaced[apply.output[0]] = _in_parts(
            (scores, softmax, apply), split.name, len(sizes), axis
        )
        dropped.update((scores.output[0], softmax.output[0]))
    nodes = [
        replaced.get(node.output[0], [node]) for node in graph.node if node.output[0] not in dropped
    ]
    del graph.node[:]
    graph.node.extend(itertools.chain.from_iterable(nodes))
    return made


def _attention_around(
    softmax: onnx.NodeProto,
    maker: Mapping[str, onnx.NodeProto],
    readers: Mapping[str, list[onnx.NodeProto]],
    known: Mapping[str, Info],
) -> tuple[onnx.NodeProto, onnx.NodeProto, tuple[int, ...]] | None:
    """The products before and after a softmax over keys, and the map's shape."""
    if softmax.op_type != "Softmax":
        return None
    scores, after = maker.get(softmax.input[0]), readers.get(softmax.output[0], [])
    if scores is None or [n.op_type for n in (scores, *after)] != ["MatMul", "MatMul"]:
        return None
    shape, queries = known[softmax.output[0]].shape, known[scores.input[0]].shape
    axis = next((a.i for a in softmax.attribute if a.name == "axis"), -1)
    if shape is None:
        return None
    over_keys = axis in (-1, len(shape) - 1)
    first = after[0].input[0] == softmax.output[0]
    if len(readers[scores.output[0]]) != 1 or not over_keys or not first:
        return None
    if any(not isinstance(n, int) for n in shape) or len(queries or ()) != len(shape):
        return None
    return scores, after[0], shape  # type: ignore[return-value]


def _in_parts(
    chain: tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto], sizes: str, parts: int, axis: int
) -> list[onnx.NodeProto]:
    """Scores, softmax and their product with the values, once per part of the queries."""
    scores, softmax, apply = chain
    out = apply.output[0]
    names = [f"{out}_queries{i}" for i in range(parts)]
    split = [scores.input[0], sizes]
    nodes = [helper.make_node("Split", split, names, name=f"{out}_split", axis=axis)]
    results = []
    for index, name in enumerate(names):
        given = name
        for node, rest in ((scores, scores.input[1]), (softmax, None), (apply, apply.input[1])):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = copy.output[0] = f"{node.output[0]}_part{index}"
            copy.input[:] = [given] if rest is None else [given, rest]
            nodes.append(copy)
            given = copy.output[0]
        results.append(given)
    nodes.append(helper.make_node("Concat", results, [out], name=out, axis=axis))
    return nodes


def initializer(array: NDArray[Any], name: str, type: int | None = None) -> onnx.TensorProto:
    """A constant; of another element type than the array's, where one is given.

    Args:
        array: the values; float32 for FLOAT16 and BFLOAT16, which are rounded to nearest even.
        name: its name.
        type: FLOAT16, BFLOAT16 or None.
    """
    if type == TensorProto.BFLOAT16:
        tensor = onnx.TensorProto(name=name, data_type=type, dims=array.shape)
        tensor.raw_data = bfloat16_bits(array).tobytes()
        return tensor
    if type == TensorProto.FLOAT16:
        with np.errstate(over="ignore"):
            array = array.astype(np.float16)
    return numpy_helper.from_array(np.asarray(array, order="C"), name)


def bfloat16_bits(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32 numbers, rounded to nearest even: (...) uint16."""
    bits = np.asarray(array, np.float32, order="C").view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded.astype(np.uint16))


def rounded(array: NDArray[np.float32], type: int) -> NDArray[np.float32]:
    """Float32 numbers as FLOAT16 or BFLOAT16 holds them; infinite where it overflows."""
    if type == TensorProto.BFLOAT16:
        return (bfloat16_bits(array).astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore"):
        return array.astype(np.float16).astype(np.float32)
