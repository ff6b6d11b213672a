"""Int8 networks by explicit QuantizeLinear/DequantizeLinear pairs (Q/DQ) in ONNX.

Symmetric throughout, zero point 0, levels -127 .. 127: weights per output channel, activations per
tensor. TensorRT takes nothing else, and ONNX Runtime and OpenVINO run it too, so one network serves
all three. Biases stay float32: the sums are.

ONNX Runtime's quantiser is not used to place the pairs: it rounds a tensor for all its readers, so
that a residual or a norm beside a quantised convolution would read rounded values as well, and
TensorRT wants neither its int32 biases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fuseengine.export.calibration import LEVELS

SWITCHES = "keep_float"
"""The input of a network of :func:`switchable`: bool (layers,), True where a layer is float."""

_LITTLE = 0.002
"""A layer with less than this share of a network's multiplications stays float: nothing to gain."""


@dataclass(frozen=True)
class Layer:
    """A node that can be computed in int8.

    Attributes:
        node: its name in the graph.
        label: where its weights come from, for people.
        input: tensor that it reads.
        weight: its initializer.
        output: tensor that it makes.
        readers: number of nodes that read the output.
        axis: of the output channels in the weight.
    """

    node: str
    label: str
    input: str
    weight: str
    output: str
    readers: int
    axis: int


def layers_of(model: onnx.ModelProto) -> list[Layer]:
    """The convolutions and products with constant weights, in the order of the graph.

    Transposed convolutions are left out: int8 ones lose time in every runtime that was measured.
    """
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer if t.data_type == 1}
    readers = Counter(name for node in model.graph.node for name in node.input)
    layers = []
    for node in model.graph.node:
        axis = _channel_axis(node, shapes)
        if axis is not None:
            given, weight, made = node.input[0], node.input[1], node.output[0]
            label = weight.removesuffix("_t").removesuffix(".weight")
            name = node.name or made
            layers.append(Layer(name, label, given, weight, made, readers[made], axis))
    return layers


def _channel_axis(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    if len(node.input) < 2 or node.input[1] not in shapes or node.input[0] in shapes:
        return None
    rank = len(shapes[node.input[1]])
    if node.op_type == "Conv":
        return 0
    if node.op_type == "MatMul" and rank == 2:
        return 1
    if node.op_type == "Gemm":
        given = {a.name: a.i for a in node.attribute}
        return None if given.get("transA") else (0 if given.get("transB") else 1)
    return None


def multiplications(
    model: onnx.ModelProto, layers: Iterable[Layer], elements: Mapping[str, int]
) -> dict[str, int]:
    """Multiply-adds of each layer (by node name) in one call.

    Args:
        model: the network.
        layers: of it.
        elements: number of elements of the layers' outputs, as calibration saw them.
    """
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    return {
        layer.node: elements[layer.output]
        * (int(np.prod(shapes[layer.weight])) // shapes[layer.weight][layer.axis])
        for layer in layers
    }


def worthwhile(layers: Sequence[Layer], costs: Mapping[str, int]) -> list[Layer]:
    """The layers whose arithmetic counts; gates and norms on one number per channel do not."""
    least = _LITTLE * sum(costs[layer.node] for layer in layers)
    return [layer for layer in layers if costs[layer.node] >= least]


def quantise(
    model: onnx.ModelProto,
    ranges: Mapping[str, float],
    layers: Collection[Layer],
    *,
    outputs: bool = True,
) -> onnx.ModelProto:
    """A copy of a network with Q/DQ pairs around some layers.

    Args:
        model: the network in float32.
        ranges: magnitude of the largest level, for the layers' inputs and outputs.
        layers: which are to be computed in int8; the others' values are not touched.
        outputs: whether a layer's result is rounded as well where it has one reader. ONNX Runtime
            has integer convolutions only for that; OpenVINO and TensorRT are as fast without, and
            the picture gains some 3 dB. Results with several readers, the residual streams, stay
            exact in any case: ONNX Runtime does not fuse those.

    Returns:
        A checked model of the same inputs and outputs.
    """
    return _Rewriter(model, ranges, outputs).with_pairs({layer.node: layer for layer in layers})


def switchable(
    model: onnx.ModelProto,
    ranges: Mapping[str, float],
    layers: Sequence[Layer],
    *,
    outputs: bool = True,
) -> onnx.ModelProto:
    """A network that emulates int8 in float32, each layer of it switched on or off by an input.

    Its values are those of :func:`quantise` with the same layers, up to float32 rounding; trying
    another set of layers costs a run, not a new session.

    Args:
        model: the network in float32.
        ranges: as for :func:`quantise`.
        layers: the layers that can be switched.
        outputs: as for :func:`quantise`.

    Returns:
        A model with one more input, :data:`SWITCHES`: True keeps layer i float.
    """
    return _Rewriter(model, ranges, outputs).with_switches(list(layers))


class _Rewriter:
    def __init__(self, model: onnx.ModelProto, ranges: Mapping[str, float], outputs: bool) -> None:
        self.model, self.ranges, self.outputs = model, ranges, outputs
        self.weights = {t.name: t for t in model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.made: dict[str, onnx.TensorProto] = {}

    def with_pairs(self, layers: Mapping[str, Layer]) -> onnx.ModelProto:
        rounded: dict[str, str] = {}  # tensor -> its rounded form
        for node in self.model.graph.node:
            node = _copy(node)
            layer = layers.get(node.name or node.output[0])
            if layer is None:
                self.nodes.append(node)
                continue
            for position in (0, 1):
                name = node.input[position]
                if name not in rounded:
                    rounded[name] = (
                        self._weight(layer) if position else self._pair(name, f"{name}_rounded")
                    )
                node.input[position] = rounded[name]
            self.nodes.append(node)
            if self._rounds(layer):
                node.output[0] = f"{layer.output}_exact"
                rounded[layer.output] = self._pair(node.output[0], layer.output, like=layer.output)
        return self._model(self.model.graph.input)

    def with_switches(self, layers: Sequence[Layer]) -> onnx.ModelProto:
        places = {layer.node: index for index, layer in enumerate(layers)}
        by_node = {layer.node: layer for layer in layers}
        for node in self.model.graph.node:
            node = _copy(node)
            name = node.name or node.output[0]
            layer = by_node.get(name)
            if layer is None:
                self.nodes.append(node)
                continue
            place = self._initializer(f"{name}_place", np.array(places[name], dtype=np.int64))
            switch = self._node("Gather", [SWITCHES, place], f"{name}_switch")
            given = self._pair(layer.input, f"{name}_in_rounded", like=layer.input)
            node.input[0] = self._where(switch, layer.input, given, f"{name}_in")
            weight = self._float_weight(layer)
            node.input[1] = self._where(switch, layer.weight, weight, f"{name}_weight")
            self.nodes.append(node)
            if self._rounds(layer):
                node.output[0] = f"{layer.output}_exact"
                made = self._pair(node.output[0], f"{layer.output}_rounded", like=layer.output)
                self._where(switch, node.output[0], made, layer.output)
        switches = helper.make_tensor_value_info(SWITCHES, TensorProto.BOOL, [len(layers)])
        return self._model([*self.model.graph.input, switches])

    def _rounds(self, layer: Layer) -> bool:
        return self.outputs and layer.readers == 1

    def _pair(self, tensor: str, output: str, *, like: str = "") -> str:
        """Q and DQ behind a tensor; the name of what they give."""
        like = like or tensor
        scale = self._initializer(f"{like}_scale", np.float32(self.ranges[like] / LEVELS))
        zero = self._initializer("zero_point", np.int8(0))
        whole = self._node("QuantizeLinear", [tensor, scale, zero], f"{output}_int8")
        return self._node("DequantizeLinear", [whole, scale, zero], output)

    def _weight(self, layer: Layer) -> str:
        whole, scales = quantise_weight(
            numpy_helper.to_array(self.weights[layer.weight]), layer.axis
        )
        return self._node(
            "DequantizeLinear",
            [
                self._initializer(f"{layer.weight}_int8", whole),
                self._initializer(f"{layer.weight}_scale", scales),
                self._initializer(f"zero_points_{len(scales)}", np.zeros(len(scales), np.int8)),
            ],
            f"{layer.weight}_rounded",
            axis=layer.axis,
        )

    def _float_weight(self, layer: Layer) -> str:
        weight = numpy_helper.to_array(self.weights[layer.weight])
        whole, scales = quantise_weight(weight, layer.axis)
        shape = [1] * weight.ndim
        shape[layer.axis] = -1
        rounded = whole.astype(np.float32) * scales.reshape(shape)
        return self._initializer(f"{layer.weight}_rounded", rounded)

    def _where(self, switch: str, exact: str, rounded: str, output: str) -> str:
        return self._node("Where", [switch, exact, rounded], output)

    def _node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        # Names of nodes are unique too, and the tensor may have the name of a node of old.
        name = f"{op.lower()}:{output}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def _initializer(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        if name not in self.made:
            self.made[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _model(self, inputs: Iterable[onnx.ValueInfoProto]) -> onnx.ModelProto:
        read = {name for node in self.nodes for name in node.input}
        kept = [t for name, t in self.weights.items() if name in read]
        old = self.model.graph
        graph = helper.make_graph(
            self.nodes, old.name, list(inputs), list(old.output), [*kept, *self.made.values()]
        )
        model = helper.make_model(
            graph,
            opset_imports=list(self.model.opset_import),
            ir_version=self.model.ir_version,
            producer_name="fuseengine",
        )
        onnx.checker.check_model(model)
        return model


def quantise_weight(
    weight: NDArray[np.float32], axis: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 per output channel.

    Args:
        weight: of any shape.
        axis: of the output channels.

    Returns:
        int8 of the same shape in -127 .. 127, and float32 scales (channels,);
        ``weight ~ int8 * scale``. A channel of zeros has the scale 1 / 127.
    """
    other = tuple(i for i in range(weight.ndim) if i != axis)
    tops = np.abs(weight).max(axis=other)
    scales = (np.where(tops > 0, tops, 1.0) / LEVELS).astype(np.float32)
    shape = [1] * weight.ndim
    shape[axis] = -1
    # The quotient in float64: a scale that was rounded down must not give 128 levels.
    levels = np.rint(weight / scales.astype(np.float64).reshape(shape))
    return np.clip(levels, -LEVELS, LEVELS).astype(np.int8), scales


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    return copied
