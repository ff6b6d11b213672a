"""Half precision written into the graph: Casts, half weights, islands of float32.

TensorRT 11 has no other way to ask for fp16 or bf16, and the same file gives the same precision in
every runtime. ``typed`` decides per node, by what it computes, not by its name:

* Convolutions, matrix products, activations and what only moves values are half.
* What adds up many values or divides stays float32: means, norms, softmax, exp, roots. So does the
  arithmetic on its result (x - mean, its square, the scaling) up to the next convolution, matrix
  product or bounded activation (sigmoid, tanh, softmax): of GroupNorm all of it, and the Sigmoid
  and Mul of the SiLU after it. A statistic that a 1x1 convolution mixes is still one.
* A node that the half type cannot serve stays float32: the operator has no such type, a constant
  overflows (a mask of -1e9, a weight of 1e5) or underflows (an epsilon of 1e-12), or a number
  comes from the picture's size (H W = 307200 overflows). Infinite constants stay infinite.
* What moves values between two islands is float32, so that nothing is rounded on the way.

In bf16 the model becomes opset 22, the first in which convolutions have that type.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fuseengine.errors import CompileError, UnknownNameError
from fuseengine.export.graph import (
    Info,
    annotate,
    constants_to_initializers,
    drop_identities,
    drop_unused,
    infer,
    initializer,
    load_model,
    opset_of,
    rounded,
)

PRECISIONS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}

KEEP = "fuseengine.float32"
"""Entry of a model's metadata: JSON list of what stays in float32 (see ``keep``) by its author's
will. :func:`fuseengine.export.whole.whole_to_onnx` names the sampler's arithmetic there."""

_FLOAT = TensorProto.FLOAT
_BF16_OPSET = 22

_SUMMING = frozenset().union(
    ("ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd"),
    ("ReduceLogSum", "ReduceLogSumExp", "GlobalAveragePool", "CumSum", "Softmax", "LogSoftmax"),
    ("InstanceNormalization", "GroupNormalization", "LayerNormalization", "BatchNormalization"),
    ("LRN", "Exp", "Log", "Sqrt", "Reciprocal", "Pow"),
)
"""Operators that start an island: sums over many values, and functions with a wide range."""

_ARITHMETIC = frozenset().union(
    ("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Max", "Min", "Clip", "Where", "Floor"),
    ("Relu", "LeakyRelu", "Elu", "Softplus", "Sigmoid", "HardSigmoid", "Tanh", "Erf"),
    ("Greater", "Less", "Equal", "Squeeze", "Unsqueeze", "Expand"),
)
"""Operators that go on with an island: one value in, one value out."""

_BOUNDED = frozenset(("Sigmoid", "HardSigmoid", "Tanh", "Erf", "Softmax"))
"""Operators whose results are within [-1, 1], where half precision serves: an island ends."""

_MOVING = frozenset().union(
    ("Identity", "Concat", "Split", "Slice", "Gather", "Reshape", "Flatten", "Transpose", "Pad"),
    ("Squeeze", "Unsqueeze", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "Resize"),
    ("ReduceMax", "ReduceMin", "MaxPool"),
)
"""Operators that pass values on (Resize: or averages of neighbours)."""

_LOSS = 2.0**-7
"""Relative rounding error of a constant above which it counts as underflowing."""


@dataclass(frozen=True)
class TypeCount:
    """What a typed model consists of.

    Attributes:
        half: nodes that compute in a half type.
        float32: nodes that compute in float32, Casts left out.
        casts: Casts between the two.
        half_bytes: of the weights in half types.
        float32_bytes: of the weights in float32.
    """

    half: int
    float32: int
    casts: int
    half_bytes: int
    float32_bytes: int

    def __str__(self) -> str:
        weights = f"weights {self.half_bytes / 1e6:.1f} + {self.float32_bytes / 1e6:.1f} MB"
        return f"{self.half} half, {self.float32} float32, {self.casts} casts, {weights}"


def typed(
    model: bytes | onnx.ModelProto,
    precision: str,
    keep: Iterable[str] = (),
    *,
    half_borders: bool | Collection[str] = False,
) -> onnx.ModelProto:
    """Write half precision into a float32 model.

    Args:
        model: float32, opset 18 or newer, of standard operators without control flow.
        precision: "fp16" or "bf16"; "fp32" gives a plain copy.
        keep: what else stays in float32: operators ("Softmax"), names of nodes, or patterns of
            names ("unet_0/*"). Entries that name nothing have no effect; :func:`check_names`
            finds them.
        half_borders: names of inputs and outputs that take and give the half type, or True for all
            floating point ones. The others stay float32.

    Returns:
        A model with the same names of inputs and outputs, of valid types throughout.

    Raises:
        UnknownNameError: another precision, or an entry of half_borders that names nothing.
        CompileError: not a model that this can type.
    """
    if precision == "fp32":
        return load_model(model)
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, ("fp32", *PRECISIONS))
    made = load_model(model)
    _refuse_control_flow(made)
    if PRECISIONS[precision] == TensorProto.BFLOAT16:
        _raise_opset(made)
    constants_to_initializers(made.graph)
    drop_identities(made.graph)
    drop_unused(made.graph)
    borders = {value.name for value in (*made.graph.input, *made.graph.output)}
    if isinstance(half_borders, bool):
        wanted = borders if half_borders else set()
    else:
        wanted = set(half_borders)
    for name in wanted - borders:
        raise UnknownNameError("input or output", name, borders)
    plan = _Plan(made, PRECISIONS[precision], _kept(made, tuple(keep)))
    _write(made, plan, wanted)
    return made


def count_types(model: onnx.ModelProto) -> TypeCount:
    """How much of a model is half and how much float32."""
    known, halves = infer(model), set(PRECISIONS.values())
    half = single = casts = 0
    for node in model.graph.node:
        types = {known[name].type for name in (*node.input, *node.output) if name in known}
        if node.op_type == "Cast":
            casts += _FLOAT in types and bool(types & halves)
        elif types & halves:
            half += 1
        elif _FLOAT in types:
            single += 1
    weights = {True: 0, False: 0}
    for tensor in model.graph.initializer:
        if tensor.data_type in (_FLOAT, *halves):
            size = 2 if tensor.data_type in halves else 4
            weights[size == 2] += size * int(np.prod(tensor.dims, dtype=np.int64))
    return TypeCount(half, single, casts, weights[True], weights[False])


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """A typed model in float32 with every half value rounded where it is made.

    It computes what the typed model computes on hardware that multiplies halves and adds in
    float32, as tensor cores do, in any runtime that has a Cast: ONNX Runtime's CPU provider has few
    kernels for fp16 and fewer for bf16, and puts float32 in their place without rounding.

    Args:
        model: of :func:`typed`.

    Returns:
        A model with float32 inputs and outputs.
    """
    made = load_model(model)
    graph, known, halves = made.graph, infer(made), set(PRECISIONS.values())
    for tensor in graph.initializer:
        if tensor.data_type in halves:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    nodes = []
    for node in graph.node:
        type = known[node.output[0]].type
        if node.op_type == "Cast" and {type, known[node.input[0]].type} <= {_FLOAT, *halves}:
            node = helper.make_node("Identity", list(node.input), list(node.output))
        nodes.append(node)
        for index, name in enumerate(node.output if type in halves else ()):
            node.output[index] = f"{name}_exact"
            nodes.append(helper.make_node("Cast", [f"{name}_exact"], [f"{name}_low"], to=type))
            nodes.append(helper.make_node("Cast", [f"{name}_low"], [name], to=_FLOAT))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in halves:
            value.type.tensor_type.elem_type = _FLOAT
    annotate(made)
    return made


# --- preparing a model ----------------------------------------------------------------------------


def _refuse_control_flow(model: onnx.ModelProto) -> None:
    if model.functions:
        raise CompileError(
            "a model with functions of its own cannot be typed; inline them with onnx.inliner"
        )
    for node in model.graph.node:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise CompileError(
                f"{node.op_type} {node.name!r} holds a graph of its own; only graphs without "
                "control flow can be typed"
            )


_CHANGED = frozenset(("GroupNormalization", "DFT"))
"""Operators that mean something else in opset 22 than in 18."""

_RENAMED_MODES = {b"bilinear": b"linear", b"bicubic": b"cubic"}


def _raise_opset(model: onnx.ModelProto) -> None:
    """Opset 22, where half of the operators have bfloat16; in place."""
    if opset_of(model) >= _BF16_OPSET:
        return
    for node in model.graph.node:
        if node.op_type in _CHANGED:
            raise CompileError(
                f"{node.op_type} {node.name!r} changed its meaning between opset "
                f"{opset_of(model)} and {_BF16_OPSET}, which bf16 needs; use fp16"
            )
        for attribute in node.attribute:
            if node.op_type == "GridSample" and attribute.name == "mode":
                attribute.s = _RENAMED_MODES.get(attribute.s, attribute.s)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = _BF16_OPSET
    model.ir_version = max(model.ir_version, 10)


def check_names(keep: Iterable[str], *models: onnx.ModelProto) -> None:
    """Refuse entries of ``keep`` that name neither an operator nor a node of any of the models.

    Raises:
        UnknownNameError: with what there is.
    """
    nodes = [node for model in models for node in model.graph.node]
    names = [node.name for node in nodes]
    for entry in keep:
        if not onnx.defs.has(entry) and not fnmatch.filter(names, entry):
            known = {*names, *(node.op_type for node in nodes)}
            raise UnknownNameError("node or operator to keep in float32", entry, known)


def _kept(model: onnx.ModelProto, keep: tuple[str, ...]) -> Callable[[onnx.NodeProto], bool]:
    """Whether a node is to stay in float32 by the caller's or the author's will."""
    own = [json.loads(entry.value) for entry in model.metadata_props if entry.key == KEEP]
    patterns = [*keep, *(pattern for entry in own for pattern in entry)]

    def kept(node: onnx.NodeProto) -> bool:
        return any(node.op_type == p or fnmatch.fnmatchcase(node.name, p) for p in patterns)

    return kept


# --- deciding -------------------------------------------------------------------------------------


class _Plan:
    """Which nodes and values are half.

    Args:
        model: prepared.
        half: the half type.
        kept: whether a node is to stay in float32.

    Attributes:
        known: type and shape of every value before.
        wide: places of the nodes that stay in float32.
    """

    def __init__(
        self, model: onnx.ModelProto, half: int, kept: Callable[[onnx.NodeProto], bool]
    ) -> None:
        self.half, self.opset = half, opset_of(model)
        self.nodes = list(model.graph.node)
        self.known: dict[str, Info] = infer(model)
        self.constants = {i.name: i for i in model.graph.initializer if i.data_type == _FLOAT}
        self._fitting: dict[str, bool] = {}
        self.slots = [self._slots_of(node) for node in self.nodes]
        self.wide = self._islands(kept, {value.name for value in model.graph.input})
        self.wide |= self._between()

    def is_float(self, name: str) -> bool:
        """Whether a value is float32 before."""
        info = self.known.get(name)
        return info is not None and info.type == _FLOAT

    def needs(self, place: int, index: int) -> int:
        """The type that a node's input has to have, if it is a floating point one."""
        flexible = self.slots[place].inputs[index]
        return self.half if flexible and place not in self.wide else _FLOAT

    def gives(self, place: int, index: int) -> int:
        """The type that a node's output has, if it is a floating point one."""
        flexible = self.slots[place].outputs[index]
        return self.half if flexible and place not in self.wide else _FLOAT

    def _slots_of(self, node: onnx.NodeProto) -> _Slots:
        """Which inputs and outputs of a node may change their type, by the operator's schema."""
        given, made = len(node.input), len(node.output)
        if node.op_type == "Cast" or not onnx.defs.has(node.op_type, node.domain):
            return _Slots([False] * given, [False] * made, False)
        schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
        wanted = _TYPE_NAMES[self.half]

        def variables(formal: Any, names: Iterable[str]) -> list[str]:
            """The type variable of each floating point value; "" for the others."""
            found = []
            for index, name in enumerate(names):
                kind = formal[min(index, len(formal) - 1)].type_str
                found.append(kind if kind in allowed and self.is_float(name) else "")
            return found

        inputs = variables(schema.inputs, node.input)
        outputs = variables(schema.outputs, node.output)
        used = {*inputs, *outputs} - {""}
        # A type that no input has comes from an attribute, which this leaves alone.
        capable = bool(used) and used <= {*inputs} and all(wanted in allowed[k] for k in used)
        return _Slots([bool(k) for k in inputs], [bool(k) for k in outputs], capable)

    def _fits(self, node: onnx.NodeProto, slots: _Slots) -> bool:
        return all(
            self._constant_fits(name)
            for name, flexible in zip(node.input, slots.inputs, strict=True)
            if flexible and name in self.constants
        )

    def _constant_fits(self, name: str) -> bool:
        if name not in self._fitting:
            array = numpy_helper.to_array(self.constants[name])
            self._fitting[name] = fits(array, self.half)
        return self._fitting[name]

    def _islands(self, kept: Callable[[onnx.NodeProto], bool], inputs: set[str]) -> set[int]:
        wide: set[int] = set()
        of_data = set(inputs)  # values that depend on what the inputs hold, not on their shape
        spreading: set[str] = set()
        for place, (node, slots) in enumerate(zip(self.nodes, self.slots, strict=True)):
            dependent = node.op_type not in ("Shape", "Size") and any(
                name in of_data for name in node.input
            )
            if dependent:
                of_data.update(node.output)
            touched = any(name in spreading for name in node.input)
            # A number of pixels may be beyond the largest half.
            counts = dependent and any(
                self.is_float(n) and n not in of_data and n not in self.constants
                for n in node.input
            )
            starts = counts or node.op_type in _SUMMING or not self._fits(node, slots)
            goes_on = touched and (node.op_type in _ARITHMETIC or self._mixes(node, spreading))
            if starts or goes_on or not slots.capable or kept(node):
                wide.add(place)
            if dependent and (starts or goes_on) and node.op_type not in _BOUNDED:
                spreading.update(name for name in node.output if self.is_float(name))
        return wide

    def _mixes(self, node: onnx.NodeProto, spreading: set[str]) -> bool:
        """Whether a convolution mixes statistics: picture and kernel are one pixel."""
        if node.op_type != "Conv" or node.input[0] not in spreading:
            return False
        shapes = [self.known[name].shape for name in node.input[:2]]
        return all(shape is not None and set(shape[2:]) == {1} for shape in shapes)

    def _between(self) -> set[int]:
        """Nodes that move values from island to island."""
        free = {
            place
            for place, node in enumerate(self.nodes)
            if node.op_type in _MOVING and self.slots[place].capable and place not in self.wide
        }
        maker = {n: place for place, node in enumerate(self.nodes) for n in node.output}
        readers: dict[str, list[int]] = {}
        for place, node in enumerate(self.nodes):
            for name in node.input:
                readers.setdefault(name, []).append(place)
        islands = self.wide

        def stays(place: int) -> bool:
            node = self.nodes[place]
            made_by = [maker[n] for n in node.input if n in maker and self.is_float(n)]
            read_by = [r for name in node.output for r in readers.get(name, ())]
            return all(other in free or other in islands for other in (*made_by, *read_by))

        while True:
            rest = {place for place in free if stays(place)}
            if rest == free:
                return free
            free = rest


@dataclass(frozen=True)
class _Slots:
    """Per input and output whether its type may change; whether the half type serves the node."""

    inputs: list[bool]
    outputs: list[bool]
    capable: bool


_TYPE_NAMES: dict[int, str] = {
    TensorProto.FLOAT16: "tensor(float16)",
    TensorProto.BFLOAT16: "tensor(bfloat16)",
}


def fits(array: NDArray[np.float32], half: int) -> bool:
    """Whether a constant survives in a half type.

    Args:
        array: the constant.
        half: FLOAT16 or BFLOAT16.

    Returns:
        False if a finite number overflows, or if rounding changes the array by more than 2^-7 of
        its largest number, as it does where all of it is near or below the smallest half.
    """
    finite = array[np.isfinite(array)]
    if not finite.size:
        return True
    change = np.abs(rounded(finite, half) - finite).max()
    return bool(change <= _LOSS * np.abs(finite).max())


# --- writing --------------------------------------------------------------------------------------


def _write(model: onnx.ModelProto, plan: _Plan, half_borders: set[str]) -> None:
    """Rewrite the graph as planned; in place."""
    graph = model.graph
    home: dict[str, int] = {}
    for value in graph.input:
        if plan.is_float(value.name):
            home[value.name] = plan.half if value.name in half_borders else _FLOAT
            value.type.tensor_type.elem_type = home[value.name]
    border: dict[str, int] = {}
    for value in graph.output:
        if plan.is_float(value.name):
            border[value.name] = plan.half if value.name in half_borders else _FLOAT
            value.type.tensor_type.elem_type = border[value.name]
    constants = _Constants(plan)
    nodes: list[onnx.NodeProto] = []
    casts: dict[tuple[str, int], str] = {}
    inner: dict[str, str] = {}  # an output that is cast last -> its name before

    def cast(name: str, type: int, made: str) -> str:
        nodes.append(helper.make_node("Cast", [name], [made], name=made, to=type))
        return made

    def given(name: str, type: int) -> str:
        if not plan.is_float(name):
            return name
        if name in plan.constants:
            return constants.name(name, type)
        if home[name] == type:
            return inner.get(name, name)
        if border.get(name) == type:
            return name
        if (name, type) not in casts:
            made = f"{name}_{_SUFFIXES[type]}"
            casts[name, type] = cast(inner.get(name, name), type, made)
        return casts[name, type]

    for place, node in enumerate(plan.nodes):
        inputs = [given(n, plan.needs(place, i)) for i, n in enumerate(node.input)]
        outputs = list(node.output)
        late = []
        for index, name in enumerate(outputs):
            if not plan.is_float(name):
                continue
            home[name] = plan.gives(place, index)
            if border.get(name, home[name]) != home[name]:
                inner[name] = outputs[index] = f"{name}_{_SUFFIXES[home[name]]}"
                late.append(name)
        node.input[:] = inputs
        node.output[:] = outputs
        nodes.append(node)
        for name in late:
            cast(inner[name], border[name], name)
    del graph.node[:]
    graph.node.extend(nodes)
    constants.store(graph)
    drop_unused(graph)
    infer(model)  # refuses what is not valid


_SUFFIXES: dict[int, str] = {_FLOAT: "float32", **{type: name for name, type in PRECISIONS.items()}}


class _Constants:
    """The float32 constants in the types that nodes read them in."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.types: dict[str, set[int]] = {}
        for place, node in enumerate(plan.nodes):
            for index, name in enumerate(node.input):
                if name in plan.constants:
                    self.types.setdefault(name, set()).add(plan.needs(place, index))

    def name(self, name: str, type: int) -> str:
        """Its name in a type; the half one has another name only where both are read."""
        both = len(self.types[name]) == 2 and type != _FLOAT
        return f"{name}_{_SUFFIXES[type]}" if both else name

    def store(self, graph: onnx.GraphProto) -> None:
        """Put them into the graph in the types that are read."""
        for tensor in list(graph.initializer):
            types = self.types.get(tensor.name, set())
            if self.plan.half not in types:
                continue
            half = self.name(tensor.name, self.plan.half)
            made = initializer(numpy_helper.to_array(tensor), half, self.plan.half)
            if half == tensor.name:
                tensor.CopyFrom(made)
            else:
                graph.initializer.append(made)
