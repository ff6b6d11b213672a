"""A whole program as one ONNX model: networks inlined, ops in standard operators.

For runtimes that take one file: no Python runs between the networks. What the staged engine does
with its own kernels is written out here (``kernels/onnx_forms.py``), which costs memory for
attention maps and for the matrices of Fourier transforms; the picture is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fuseengine.backends.base import StageSource
from fuseengine.errors import CompileError, SettingError
from fuseengine.export.graph import (
    annotate,
    constants_to_initializers,
    drop_identities,
    drop_unused,
    fixed,
    load_model,
    opset_of,
    split_attention,
)
from fuseengine.export.onnx import OPSET, OnnxWriter
from fuseengine.export.typed import KEEP, check_names, typed
from fuseengine.kernels import onnx_forms
from fuseengine.program import Dim, Node, Program, StageVariant, resolve
from fuseengine.runtime import random

INPUTS = ("infrared", "visible")
OUTPUT = "fused"

NOISE = "fuseengine.noise"
"""Entry of the metadata: JSON, the seed of each input that is starting noise."""

_FLOAT = TensorProto.FLOAT
_NOISE_KINDS = ("constant", "input")
_PLANES = {"luma": 1, "rgb": 3}


def whole_to_onnx(
    program: Program,
    stages: StageSource,
    size: tuple[int, int] | None = None,
    *,
    precision: str = "fp32",
    keep: Iterable[str] = (),
    frames: bool = False,
    noise: str | None = None,
    attention_limit: int | None = None,
) -> onnx.ModelProto:
    """Write a program as one model.

    Inputs are "infrared" and "visible", the output is "fused": (1, C, H, W) float32 in [0, 1] with
    C = 1 (luma models) or 3 and sides that are multiples of ``program.multiple``; or uint8 frames,
    with what happens to them at an engine's borders inside the model: infrared (1, H, W), visible
    and fused (1, H, W, 3) RGB of any size. Weights that several calls use are stored once.

    Args:
        program: the captured model.
        stages: its networks.
        size: height and width, of the frames with ``frames``; None leaves them open.
        precision: "fp32", "fp16" or "bf16": what the networks compute in. The arithmetic between
            them stays in float32, as in an engine.
        keep: what else stays in float32, see :func:`fuseengine.export.typed.typed`. Nodes of the
            n-th node of the program are named after it: "unet_0/...", "joint_ddim_step_1/...".
        frames: whether inputs and output are uint8 frames.
        noise: "constant": starting noise is in the model, the same that engines draw; "input": it
            is an input, for which :func:`noise_for` makes the numbers. By default constant for a
            known size, and an input for open ones.
        attention_limit: bytes that a self-attention's map may take in float32, for a known size;
            see :func:`fuseengine.export.graph.split_attention`. No limit by default.

    Returns:
        A checked model of opset 18 (22 in bf16).

    Raises:
        SettingError: a size that the networks do not take, a setting that needs a known size, or a
            wrong word for noise.
        UnknownNameError: another precision, or an entry of keep that names nothing.
        CompileError: a network or op has no form here.
    """
    noise = noise or ("constant" if size else "input")
    if noise not in _NOISE_KINDS:
        raise SettingError(f"noise={noise!r}; expected one of {', '.join(_NOISE_KINDS)}")
    if size is None and attention_limit is not None:
        raise SettingError("attention_limit: only a known size tells how large a map is; give one")
    if size is not None:
        _check_size(program, size, frames)
    model = _Builder(program, stages, size, frames, noise).build()
    if size is not None:
        model = fixed(model, {v.name: _dims(v) for v in model.graph.input})
        if attention_limit is not None:
            model = split_attention(model, attention_limit)
    keep = tuple(keep)
    check_names(keep, model)
    model = typed(model, precision, keep)
    if size is None:
        annotate(model)
    onnx.checker.check_model(model, full_check=model.ByteSize() < onnx.checker.MAXIMUM_PROTOBUF)
    return model


def noise_for(model: onnx.ModelProto, size: tuple[int, int]) -> dict[str, NDArray[np.float32]]:
    """The starting noise that a model of :func:`whole_to_onnx` takes as inputs.

    Args:
        model: the model.
        size: height and width of the padded pictures.

    Returns:
        An array per noise input, the numbers that engines draw; empty where noise is inside.
    """
    seeds: dict[str, int] = {}
    for entry in model.metadata_props:
        if entry.key == NOISE:
            seeds = json.loads(entry.value)
    shapes = {v.name: resolve(_dims(v), size) for v in model.graph.input if v.name in seeds}
    return {name: random.normal(shape, seed=seeds[name]) for name, shape in shapes.items()}


def _dims(value: onnx.ValueInfoProto) -> tuple[Any, ...]:
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


def _check_size(program: Program, size: tuple[int, int], frames: bool) -> None:
    height, width = size
    if min(size) < 2:
        raise SettingError(f"size {height}x{width}; expected at least 2x2 pixels")
    if not frames and any(n % program.multiple for n in size):
        good = [-(-n // program.multiple) * program.multiple for n in size]
        raise SettingError(
            f"size {height}x{width} (height x width): {program.model} takes multiples of "
            f"{program.multiple}; pad pictures to {good[0]}x{good[1]}, or let the model do it with "
            "frames=True"
        )


class _Builder(OnnxWriter):
    """The graph under construction: names by scope, constants by content.

    Args:
        program: what to write.
        stages: its networks.
        size: height and width, None where they are open; see :func:`whole_to_onnx`.
        frames: whether inputs and output are uint8 frames.
        noise: "constant" or "input".
    """

    def __init__(
        self,
        program: Program,
        stages: StageSource,
        size: tuple[int, int] | None,
        frames: bool,
        noise: str,
    ) -> None:
        super().__init__()
        self.program, self.stages, self.size = program, stages, size
        self.frames, self.noise = frames, noise
        self.padded = size
        if size is not None:
            rows, columns = (-(-n // program.multiple) * program.multiple for n in size)
            self.padded = rows, columns
        self.scope = ""
        self.inputs: list[onnx.ValueInfoProto] = []
        self.values: dict[str, str] = {}  # of the program -> of the graph
        self.seeds: dict[str, int] = {}
        self._by_content: dict[tuple[Any, ...], str] = {}
        self._models: dict[StageVariant, onnx.ModelProto] = {}
        self._arithmetic: list[str] = []  # scopes outside the networks

    def build(self) -> onnx.ModelProto:
        """The model, float32."""
        self._borders_in()
        for name, array in self.program.constants.items():
            self.values[name] = self.constant(array, name)
        for index, node in enumerate(self.program.nodes):
            self.scope = f"{node.target.replace('.', '_') or 'model'}_{index}"
            if node.kind == "stage":
                self._inline(node)
            else:
                self._arithmetic.append(self.scope)
                self.values[node.made()[0]] = self._op(node)
        outputs = self._borders_out()
        model = self.model(self.inputs, outputs, self.program.model or "whole")
        entries = {KEEP: json.dumps([f"{scope}/*" for scope in self._arithmetic])}
        if self.seeds:
            entries[NOISE] = json.dumps(self.seeds)
        helper.set_model_props(model, entries)
        drop_identities(model.graph)
        drop_unused(model.graph)
        return model

    # --- names and constants

    def add(
        self, op: str, *inputs: str, name: str = "", rank: int | None = None, **attributes: Any
    ) -> str:
        """See :meth:`OnnxWriter.add`; names begin with the scope."""
        name = name or f"{self.scope}/{op.lower()}_{len(self.nodes)}"
        return super().add(op, *inputs, name=name, rank=rank, **attributes)

    def constant(self, value: Any, name: str = "") -> str:
        """An initializer; equal ones, whatever their names, are stored once."""
        return self._store(numpy_helper.from_array(np.asarray(value, order="C")), name)

    def _store(self, tensor: onnx.TensorProto, name: str) -> str:
        content = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
        key = (tensor.data_type, tuple(tensor.dims), hashlib.sha256(content).digest())
        if key not in self._by_content:
            name = name or f"const_{len(self._by_content)}"
            while name in self.initializers:
                name += "_"
            stored = onnx.TensorProto()
            stored.CopyFrom(tensor)
            stored.name = name
            self.initializers[name] = stored
            self.ranks[name] = len(tensor.dims)
            self._by_content[key] = name
        return self._by_content[key]

    # --- borders

    def _input(self, name: str, type: int, shape: Sequence[Dim]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, type, shape))
        self.ranks[name] = len(shape)
        return name

    def _borders_in(self) -> None:
        for name, value in zip(INPUTS, self.program.inputs, strict=True):
            if not self.frames:
                shape = self.program.values[value].shape
                self.values[value] = self._input(name, _FLOAT, self._known(shape))
                continue
            colour = name == "visible"
            sides: tuple[Dim, ...] = self.size or ("height", "width")
            shape = (1, *sides, 3) if colour else (1, *sides)
            frame = self._input(name, TensorProto.UINT8, shape)
            self.scope = f"{name}_in"
            self._arithmetic.append(self.scope)
            plane = onnx_forms.frame_in(self, frame, self.program.channels, colour=colour)
            self.values[value] = self._padded(plane)

    def _padded(self, x: str) -> str:
        """A picture (1, C, H, W) with sides that are multiples, as an engine pads it."""
        white = self.program.padding == "white"
        if self.size is None:
            return self._padded_open(x, white)
        assert self.padded is not None
        if not white:
            return onnx_forms.pad_reflect(self, x, self.size, self.padded)
        below, right = (p - n for p, n in zip(self.padded, self.size, strict=True))
        if not below and not right:
            return x
        return self.add("Pad", x, self.integers(0, 0, 0, 0, 0, 0, below, right), self._one())

    def _padded_open(self, x: str, white: bool) -> str:
        """The same with the sizes read at run time; sides below the multiple do not reflect."""
        multiple = self.integers(self.program.multiple)
        sides = self.add("Shape", x, start=2, end=4, rank=1)
        blocks = self.add(
            "Div", self.add("Add", sides, self.integers(self.program.multiple - 1)), multiple
        )
        extra = self.add("Sub", self.add("Mul", blocks, multiple), sides)
        pads = self.add("Concat", self.integers(0, 0, 0, 0, 0, 0), extra, axis=0)
        if white:
            return self.add("Pad", x, pads, self._one())
        return self.add("Pad", x, pads, mode="reflect")

    def _one(self) -> str:
        return self.constant(np.array(1.0, np.float32))

    def _borders_out(self) -> list[onnx.ValueInfoProto]:
        fused = self.values[self.program.output]
        shape = self._known(self.program.values[self.program.output].shape)
        if not self.frames:
            self.add("Identity", fused, name=OUTPUT)
            return [helper.make_tensor_value_info(OUTPUT, _FLOAT, shape)]
        self.scope = "frame_out"
        self._arithmetic.append(self.scope)
        planes = _PLANES[self.program.channels]
        if self.size is None:
            sides = self.add("Shape", INPUTS[1], start=1, end=3, rank=1)
            fused = self.add("Slice", fused, self.integers(0, 0), sides, self.integers(2, 3))
        elif self.size != self.padded:
            fused = onnx_forms.crop(self, fused, *self.size)
        last = onnx_forms.frame_out(self, fused, INPUTS[1], planes=planes, colour=True)
        # The Cast itself is the output: TensorRT takes nothing after it.
        assert self.nodes[-1].output[0] == last
        self.nodes[-1].output[0] = OUTPUT
        shown = self.size or ("height", "width")
        return [helper.make_tensor_value_info(OUTPUT, TensorProto.UINT8, (1, *shown, 3))]

    def _known(self, shape: Sequence[Dim]) -> tuple[Dim, ...]:
        return tuple(shape) if self.padded is None else resolve(shape, self.padded)

    # --- networks

    def _inline(self, node: Node) -> None:
        """The nodes of a stage's network under the call's own names."""
        variant = StageVariant.of(node)
        if variant not in self._models:
            self._models[variant] = self._network(variant)
        graph = self._models[variant].graph
        names = {
            tensor.name: self._store(tensor, f"{node.target or 'model'}.{tensor.name}")
            for tensor in graph.initializer
        }
        given = [value.name for value in graph.input]
        names.update(zip(given, (self.values[n] for n in node.inputs), strict=True))
        for part in graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(part)
            copy.name = f"{self.scope}/{part.name or part.output[0]}"
            names.update({name: f"{self.scope}/{name}" for name in part.output if name})
            copy.input[:] = [names[name] if name else "" for name in part.input]
            copy.output[:] = [names[name] if name else "" for name in part.output]
            self.nodes.append(copy)
        for value, made in zip(graph.output, node.made(), strict=True):
            self.values[made] = names[value.name]

    def _network(self, variant: StageVariant) -> onnx.ModelProto:
        model = load_model(self.stages.onnx(variant))
        if opset_of(model) != OPSET or model.functions:
            raise CompileError(
                f"the network {variant.label} is opset {opset_of(model)} with "
                f"{len(model.functions)} functions; expected opset {OPSET} and none"
            )
        for node in model.graph.node:
            if any(a.HasField("g") or a.graphs for a in node.attribute):
                raise CompileError(
                    f"{node.op_type} in the network {variant.label} is control flow, which cannot "
                    "be inlined; export its stages one by one"
                )
        constants_to_initializers(model.graph)
        return model

    # --- ops

    def _op(self, node: Node) -> str:
        form = _FORMS.get(node.target)
        if form is None:
            raise CompileError(f"op {node.target!r} has no ONNX form; export the stages one by one")
        return form(self, node, *(self.values[name] for name in node.inputs))

    def noise_of(self, node: Node) -> str:
        """Starting noise: numbers, or an input."""
        shape, seed = self.program.values[node.made()[0]].shape, int(node.attrs["seed"])
        if self.noise == "constant":
            if self.padded is None:
                raise SettingError("noise='constant' needs a known size; expected noise='input'")
            return self.constant(random.normal(resolve(shape, self.padded), seed=seed))
        for name, known in self.seeds.items():
            if known == seed:
                return name
        name = f"noise_{len(self.seeds)}"
        self.seeds[name] = seed
        return self._input(name, _FLOAT, self._known(shape))

    def filled(self, node: Node) -> str:
        """One number everywhere."""
        number = self.constant(np.array(node.attrs["value"], np.float32))
        return self.add("Expand", number, self._shape(self.program.values[node.made()[0]].shape))

    def _shape(self, shape: Sequence[Dim]) -> str:
        """A shape of the program as a tensor."""
        if self.padded is not None:
            return self.integers(*resolve(shape, self.padded))
        picture = self.values[self.program.inputs[0]]
        parts = []
        for dim in shape:
            if isinstance(dim, int):
                parts.append(self.integers(dim))
            elif dim in ("H", "W"):
                axis = 2 + "HW".index(dim)
                parts.append(self.add("Shape", picture, start=axis, end=axis + 1, rank=1))
            else:
                raise CompileError(f"a shape {tuple(shape)} with {dim} needs a known size")
        return self.add("Concat", *parts, axis=0)

    def stretched(self, node: Node, x: str) -> str:
        """(x - min) / (max - min), of what a frame covers; a constant picture becomes 0."""
        seen = x
        if self.frames and self.size is None:
            sides = self.add("Shape", INPUTS[1], start=1, end=3, rank=1)
            seen = self.add("Slice", x, self.integers(0, 0), sides, self.integers(2, 3))
        elif self.frames and self.size is not None and self.size != self.padded:
            seen = onnx_forms.crop(self, x, *self.size)
        axes = self.integers(*((2, 3) if node.attrs["per"] == "channel" else (1, 2, 3)))
        low = self.add("ReduceMin", seen, axes, keepdims=1)
        span = self.add("Sub", self.add("ReduceMax", seen, axes, keepdims=1), low)
        zero = self.constant(np.array(0.0, np.float32))
        span = self.add("Where", self.add("Greater", span, zero), span, self._one())
        return self.add("Div", self.add("Sub", x, low), span)

    def size_of(self, node: Node) -> tuple[int, int]:
        """Height and width of an op's first input, which its form needs.

        Raises:
            SettingError: they are open.
        """
        shape = self.program.values[node.inputs[0]].shape
        if self.padded is None:
            raise SettingError(
                f"{node.target} is written for one size only (its Fourier transforms are products "
                "with matrices); give a size"
            )
        height, width = resolve(shape[-2:], self.padded)
        return height, width

    def kernel_of(self, node: Node) -> NDArray[np.float32]:
        """The constant kernel (h, w) of a filter.

        Raises:
            CompileError: it is no constant of the program.
        """
        if node.inputs[1] not in self.program.constants:
            raise CompileError(f"{node.target} with a computed kernel has no ONNX form")
        return self.program.constants[node.inputs[1]]


class _PartBuilder(_Builder):
    """A part of a program, with the inputs and outputs that it has as a stage."""

    def __init__(self, program: Program, stages: StageSource, outputs: Sequence[str]) -> None:
        super().__init__(program, stages, None, False, "input")
        self.outputs = outputs

    def _borders_in(self) -> None:
        for index, name in enumerate(self.program.inputs):
            shape = self.program.values[name].shape
            self.values[name] = self._input(f"in{index}", _FLOAT, shape)

    def _borders_out(self) -> list[onnx.ValueInfoProto]:
        made = []
        for index, name in enumerate(self.outputs):
            self.add("Identity", self.values[name], name=f"out{index}")
            shape = self.program.values[name].shape
            made.append(helper.make_tensor_value_info(f"out{index}", _FLOAT, shape))
        return made


def part_to_onnx(
    program: Program,
    stages: StageSource,
    nodes: Sequence[Node],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """Write some nodes of a program as one network, height and width open.

    Args:
        program: the program.
        stages: its networks.
        nodes: stage calls and ops, in order; no op whose form needs a known size.
        inputs: names of the values that become "in0", "in1", ...
        outputs: of those that become "out0", "out1", ...

    Returns:
        A checked model of opset 18.

    Raises:
        CompileError: a network or op has no form here.
    """
    used = {name for node in nodes for name in node.inputs}
    part = replace(
        program,
        inputs=tuple(inputs),
        nodes=tuple(nodes),
        constants={n: array for n, array in program.constants.items() if n in used},
    )
    model = _PartBuilder(part, stages, outputs).build()
    onnx.checker.check_model(model, full_check=model.ByteSize() < onnx.checker.MAXIMUM_PROTOBUF)
    return model


# --- ops: (builder, node, names of its inputs) -> name of its result ------------------------------

_Form = Callable[..., str]

_SCALES = ("sqrt_abar", "sqrt_one_minus_abar", "sqrt_abar_prev", "sqrt_one_minus_abar_prev")


def _binary(op: str) -> _Form:
    def write(w: _Builder, node: Node, *inputs: str) -> str:
        operands = list(inputs)
        if "scalar" in node.attrs:
            place = 0 if node.attrs.get("scalar_first") else 1
            operands.insert(place, w.constant(np.array(node.attrs["scalar"], np.float32)))
        return w.add(op, *operands)

    return write


def _slice(w: _Builder, node: Node, x: str) -> str:
    starts, ends, axes = [], [], []
    for axis, (start, end) in enumerate(node.attrs["bounds"]):
        if start is not None or end is not None:
            starts.append(start or 0)
            ends.append(np.iinfo(np.int64).max if end is None else end)
            axes.append(axis)
    if not axes:
        return x
    return w.add("Slice", x, w.integers(*starts), w.integers(*ends), w.integers(*axes))


def _clamp(w: _Builder, node: Node, x: str) -> str:
    bounds = (node.attrs[name] for name in ("min", "max"))
    return w.add(
        "Clip", x, *("" if b is None else w.constant(np.array(b, np.float32)) for b in bounds)
    )


def _criss_cross(w: _Builder, node: Node, q: str, k: str, v: str) -> str:
    size = w.size_of(node) if w.padded is not None else None
    return onnx_forms.criss_cross_attention(w, q, k, v, size)


def _scales(attrs: Mapping[str, Any]) -> list[float]:
    return [float(attrs[name]) for name in _SCALES]


def _ddim_step(w: _Builder, node: Node, x: str, eps: str, noise: str = "") -> str:
    eta = float(node.attrs.get("eta", 0.0))
    return onnx_forms.ddim_step(w, x, eps, *_scales(node.attrs), noise, eta)


def _joint_ddim_step(w: _Builder, node: Node, *inputs: str) -> str:
    numbers = (*_scales(node.attrs), float(node.attrs["lam"]))
    return onnx_forms.joint_ddim_step(w, *inputs, *numbers, form=node.attrs["form"])


def _compose_priors(w: _Builder, node: Node, *inputs: str) -> str:
    return onnx_forms.compose_priors(w, *inputs, *_scales(node.attrs), form=node.attrs["form"])


def _by_scale(form: _Form, w: _Builder, node: Node, x: str) -> str:
    return form(w, x, node.attrs["scale"])


def _circular_convolution(w: _Builder, node: Node, x: str, kernel: str) -> str:
    return onnx_forms.circular_convolution(w, x, w.kernel_of(node), w.size_of(node))


def _wiener_deconvolution(w: _Builder, node: Node, x: str, kernel: str) -> str:
    regularisation = float(node.attrs["regularisation"])
    size = w.size_of(node)
    return onnx_forms.wiener_deconvolution(w, x, w.kernel_of(node), regularisation, size)


_FORMS: dict[str, _Form] = {
    "add": _binary("Add"),
    "sub": _binary("Sub"),
    "mul": _binary("Mul"),
    "div": _binary("Div"),
    "concat": lambda w, node, *inputs: w.add("Concat", *inputs, axis=node.attrs["axis"]),
    "slice": _slice,
    "clamp": _clamp,
    "stretch": _Builder.stretched,
    "compose_priors": _compose_priors,
    "criss_cross_attention": _criss_cross,
    "ddim_step": _ddim_step,
    "joint_ddim_step": _joint_ddim_step,
    "block_mean": partial(_by_scale, onnx_forms.block_mean),
    "block_repeat": partial(_by_scale, onnx_forms.block_repeat),
    "circular_convolution": _circular_convolution,
    "wiener_deconvolution": _wiener_deconvolution,
    "standard_normal": _Builder.noise_of,
    "full": _Builder.filled,
}
