"""A convolution whose result is split by channels, as one convolution per part.

The two halves of a gated layer come out of one convolution and are told apart at once. OpenVINO
copies them for that (a tenth of ``dmnet-s``'s time), and no runtime can write halves apart that one
convolution makes together. Each output channel of a convolution depends on its own weights only, so
the division is exact.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def divide_convolutions(
    nodes: list[onnx.NodeProto], initializers: dict[str, TensorProto]
) -> list[onnx.NodeProto]:
    """Take out every Split into equal parts of what a convolution alone made for it.

    The convolution before a depthwise one is divided along with it.

    Args:
        nodes: in the order of execution, the graph's outputs read by Identity nodes.
        initializers: the weights by name; the parts' are added, and no weights taken away.

    Returns:
        The nodes in the order of execution; untouched where nothing can be divided.
    """
    made = _Divider(nodes, initializers)
    for node in nodes:
        if node.op_type == "Split":
            made.split(node)
    return made.nodes()


class _Divider:
    def __init__(self, nodes: list[onnx.NodeProto], initializers: dict[str, TensorProto]) -> None:
        self.given, self.weights = nodes, initializers
        self.makers = {output: node for node in nodes for output in node.output}
        self.readers = Counter(name for node in nodes for name in node.input)
        self.instead: dict[str, list[onnx.NodeProto]] = {}
        """First output of a node that was there -> what takes its place."""

    def nodes(self) -> list[onnx.NodeProto]:
        return [new for node in self.given for new in self.instead.get(node.output[0], [node])]

    def split(self, node: onnx.NodeProto) -> None:
        """Take out a Split, if it can be."""
        parts = list(node.output)
        settings = _attributes(node)
        by_channels = settings.get("axis") == 1 and settings.get("num_outputs") == len(parts)
        if by_channels and self.can_divide(node.input[0], len(parts)):
            self.divide(node.input[0], parts)
            self.instead[parts[0]] = []

    def can_divide(self, value: str, count: int) -> bool:
        """Whether a convolution makes a value for one reader alone, in equal parts."""
        node = self.makers.get(value)
        if node is None or node.op_type != "Conv" or self.readers[value] != 1:
            return False
        if any(name not in self.weights for name in node.input[1:]):
            return False
        out, per_group = self.weights[node.input[1]].dims[:2]
        group = _attributes(node).get("group", 1)
        if out % count:
            return False
        if group == 1:
            return True
        depthwise = group == out and per_group == 1
        return depthwise and self.can_divide(node.input[0], count)

    def divide(self, value: str, parts: list[str]) -> None:
        """Write the convolution that makes a value as one per part, each with its name."""
        node, count = self.makers[value], len(parts)
        settings = _attributes(node)
        given = [node.input[0]] * count
        if settings.get("group", 1) > 1:
            given = [f"{node.input[0]}.{i}of{count}" for i in range(count)]
            self.divide(node.input[0], given)
            settings["group"] //= count
        self.instead[node.output[0]] = [
            helper.make_node(
                "Conv",
                [x, *(self.part(name, i, count) for name in node.input[1:])],
                [part],
                name=part,
                **settings,
            )
            for i, (x, part) in enumerate(zip(given, parts, strict=True))
        ]

    def part(self, name: str, index: int, count: int) -> str:
        """Weights of one part: "path.weight" becomes "path.0of2.weight"."""
        path, _, kind = name.rpartition(".")
        part = f"{path}.{index}of{count}.{kind}" if path else f"{name}.{index}of{count}"
        if part not in self.weights:
            values = np.split(numpy_helper.to_array(self.weights[name]), count)[index]
            self.weights[part] = numpy_helper.from_array(np.ascontiguousarray(values), part)
        return part


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
