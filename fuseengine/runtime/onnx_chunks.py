"""ONNX files without the ``onnx`` package: weights cut out and put back, and a check of the form.

A serialised ONNX model is a protobuf message: fields with numbers, some of which are messages
themselves. The weights are the ``raw_data`` of initializers. :func:`split` cuts the large ones out,
so that several networks of a model store the weights that they share once; :func:`join` puts them
back, byte for byte. :func:`check` walks a model before a runtime sees it, and refuses what runtimes
follow blindly: tensors in other files, sizes that do not fit.

Field numbers are those of onnx.proto (ONNX 1.18, IR version 11).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fuseengine.errors import BundleError

LEAST_CUT = 1024
"""Bytes from which a weight is cut out: below, a file of its own costs more than it saves."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Message -> {field: (name, its message, or None for a plain field)}, as far as anybody looks here.
_MODEL = {7: "graph", 25: "function"}
_GRAPH = {1: "node", 5: "tensor", 15: "sparse"}
_FUNCTION = {7: "node"}
_NODE = {5: "attribute"}
_ATTRIBUTE = {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"}
_SPARSE = {1: "tensor", 2: "tensor"}
_INSIDE: Mapping[str, Mapping[int, str]] = {
    "model": _MODEL,
    "graph": _GRAPH,
    "function": _FUNCTION,
    "node": _NODE,
    "attribute": _ATTRIBUTE,
    "sparse": _SPARSE,
    "tensor": {},
}
_DIMS, _TYPE, _RAW, _EXTERNAL, _LOCATION = 1, 2, 9, 13, 14
_DEEPEST = 32

_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64,
    15: 128, 16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4,
}  # fmt: skip
"""Bits of an element per ONNX data type, as far as ``raw_data`` may hold it."""


class Split(NamedTuple):
    """A model without its large weights.

    Attributes:
        literal: what is left, in order.
        cuts: place in ``literal`` and weight that stood there, in order.
    """

    literal: bytes
    cuts: tuple[tuple[int, bytes], ...]


class _Field(NamedTuple):
    """A field of a message: its number, wire type, value (of a varint) or place (of bytes)."""

    number: int
    wire: int
    begin: int
    end: int
    value: int


def split(content: bytes, least: int = LEAST_CUT) -> Split:
    """Cut the initializers' ``raw_data`` out of a model.

    Args:
        content: a serialised ONNX model.
        least: bytes from which a weight is cut out.

    Raises:
        BundleError: it is no ONNX model.
    """
    data = memoryview(content)
    literal, cuts, place, kept = [], [], 0, 0
    for begin, end in _weights(data):
        if end - begin >= least:
            literal.append(data[place:begin])
            kept += begin - place
            cuts.append((kept, bytes(data[begin:end])))
            place = end
    return Split(b"".join([*literal, data[place:]]), tuple(cuts))


def join(literal: bytes, cuts: Sequence[tuple[int, bytes]]) -> bytes:
    """The inverse of :func:`split`.

    Raises:
        BundleError: the places are not in order or beyond the literal.
    """
    return b"".join(pieces(literal, cuts))


def pieces(literal: bytes, cuts: Sequence[tuple[int, bytes]]) -> Iterator[bytes | memoryview]:
    """What :func:`join` joins, in order."""
    data, place = memoryview(literal), 0
    for at, weight in cuts:
        if not place <= at <= len(data):
            raise BundleError(f"a weight at {at} of a network; expected {place} to {len(data)}")
        yield data[place:at]
        yield weight
        place = at
    yield data[place:]


def check(content: bytes) -> None:
    """Walk a model and refuse what is not well formed.

    Raises:
        BundleError: fields that overrun, no graph, tensors in other files, or with sizes that do
            not fit their data.
    """
    data = memoryview(content)
    graphs = [field for field in _fields(data, 0, len(data)) if field.number == 7]
    if len(graphs) != 1:
        raise BundleError(f"an ONNX network with {len(graphs)} graphs; expected one")
    _check(data, 0, len(data), "model", 0)


def _check(data: memoryview, begin: int, end: int, kind: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise BundleError(f"an ONNX network nested more than {_DEEPEST} deep; expected a plain one")
    if kind == "tensor":
        _check_tensor(data, begin, end)
        return
    for field in _fields(data, begin, end):
        inner = _INSIDE[kind].get(field.number)
        if inner is None:
            continue
        if field.wire != _BYTES:
            raise BundleError(f"an ONNX network whose {kind} has a number for a {inner}")
        _check(data, field.begin, field.end, inner, depth + 1)


def _check_tensor(data: memoryview, begin: int, end: int) -> None:
    dims: list[int] = []
    kind, raw = 0, None
    for field in _fields(data, begin, end):
        if field.number == _DIMS and field.wire == _BYTES:
            place = field.begin
            while place < field.end:
                value, place = _varint(data, place, field.end)
                dims.append(value)
        elif field.number == _DIMS:
            dims.append(field.value)
        elif field.number == _TYPE:
            kind = field.value
        elif field.number == _RAW:
            raw = field.end - field.begin
        elif field.number == _EXTERNAL or (field.number == _LOCATION and field.value):
            raise BundleError("an ONNX network with a tensor in another file; expected it inside")
    if raw is None:
        return
    if kind not in _BITS:
        raise BundleError(f"an ONNX tensor of data type {kind}; expected one of {sorted(_BITS)}")
    expected = -(-math.prod(dims) * _BITS[kind] // 8)
    if len(dims) > 64 or raw != expected:
        raise BundleError(f"an ONNX tensor of shape {dims[:8]} with {raw} bytes of data")


def _weights(data: memoryview) -> Iterator[tuple[int, int]]:
    """Place of every initializer's raw_data, in order."""
    for graph in _fields(data, 0, len(data)):
        if graph.number != 7 or graph.wire != _BYTES:
            continue
        for tensor in _fields(data, graph.begin, graph.end):
            if tensor.number != 5 or tensor.wire != _BYTES:
                continue
            for field in _fields(data, tensor.begin, tensor.end):
                if field.number == _RAW and field.wire == _BYTES:
                    yield field.begin, field.end


def _fields(data: memoryview, place: int, end: int) -> Iterator[_Field]:
    """The fields of the message that lies from a place to an end."""
    while place < end:
        tag, place = _varint(data, place, end)
        number, wire = tag >> 3, tag & 7
        begin, value = place, 0
        if wire == _VARINT:
            value, place = _varint(data, place, end)
        elif wire == _BYTES:
            length, begin = _varint(data, place, end)
            place = begin + length
        elif wire == _FIXED64:
            place += 8
        elif wire == _FIXED32:
            place += 4
        else:
            raise BundleError(f"a malformed ONNX network: wire type {wire} at byte {begin}")
        if place > end or not number:
            raise BundleError(f"a malformed ONNX network: field {number} overruns at byte {begin}")
        yield _Field(number, wire, begin, place, value)


def _varint(data: memoryview, place: int, end: int) -> tuple[int, int]:
    """An unsigned number of up to 64 bits and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            break
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise BundleError(f"a malformed ONNX network: no whole number at byte {place}")
