"""A dense network (stage) as an ONNX model, height and width left open.

The module is traced with ``torch.fx`` and written node by node, which takes a fraction of a second
(``torch.onnx.export`` takes ten or more for the same U-Net) and leaves the form of each layer to
us: GroupNorm as channel means plus a small matrix, so that no runtime has to leave its
channels-last layout; space-to-depth folded into the convolution beside it. Networks with layers
outside the table go through ``torch.onnx.export``.

Opset 18, standard operators only (TensorRT 10.3, ONNX Runtime and OpenVINO import them).
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from fuseengine.errors import CompileError
from fuseengine.export.divided import divide_convolutions
from fuseengine.kernels import onnx_forms
from fuseengine.program import resolve

OPSET = 18


_PROBE_SIZE = (64, 96)
"""Picture size at which PyTorch's exporter runs a network that the table does not know."""


class UnsupportedLayerError(CompileError):
    """The table has no ONNX form for a layer."""


class OnnxWriter:
    """Collects nodes and weights of one ONNX graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.ranks: dict[str, int] = {}
        self._count = 0

    def add(
        self, op: str, *inputs: str, name: str = "", rank: int | None = None, **attributes: Any
    ) -> str:
        """Append a node with one output and return the output's name.

        Args:
            op: operator.
            inputs: names; "" for one that is left out.
            name: of the output; made up by default.
            rank: number of the output's dimensions; the largest of the inputs' by default, which
                is right for all but what changes the number of dimensions.
            attributes: of the operator.
        """
        self._count += 1
        output = name or f"{op.lower()}_{self._count}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        if rank is None:
            rank = max((self.ranks[i] for i in inputs if i in self.ranks), default=0)
        self.ranks[output] = rank
        return output

    def axis(self, x: str, dim: int) -> int:
        """A dimension of x counted from the front."""
        return dim % self.ranks[x]

    def constant(self, value: Any, name: str = "") -> str:
        """An initializer; equal unnamed constants are stored once."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        array = np.ascontiguousarray(array)
        if not name:
            shape = "x".join(map(str, array.shape))
            name = f"const_{array.dtype}_{shape}_{array.tobytes().hex()}"
            if array.size > 8:
                name = f"const_{len(self.initializers)}"
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
            self.ranks[name] = array.ndim
        return name

    def integers(self, *values: int) -> str:
        """A list of int64 as a constant: axes, shapes, bounds."""
        return self.constant(np.array(values, dtype=np.int64))

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        name: str,
    ) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self.nodes, name, list(inputs), list(outputs), list(self.initializers.values())
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=9,
            producer_name="fuseengine",
        )


def stage_to_onnx(
    module: nn.Module,
    inputs: Sequence[tuple[str, Sequence[int | str]]],
    outputs: Sequence[tuple[str, Sequence[int | str]]],
    *,
    name: str = "stage",
    use: Sequence[int] | None = None,
    fallback: bool = True,
) -> onnx.ModelProto:
    """Write a module as an ONNX model in float32.

    Args:
        module: the network, float32, in evaluation mode.
        inputs: name and shape per argument of its forward; text dimensions stay open.
        outputs: name and shape per result that is used.
        name: graph name.
        use: which of the forward's results are wanted, by index; what only others need is left
            out. All by default.
        fallback: whether a network with layers outside the table goes through PyTorch's exporter
            (which takes ten seconds or more) or is refused.

    Returns:
        A checked model whose dead nodes are gone.

    Raises:
        UnsupportedLayerError: a layer has no ONNX form here, and ``fallback`` is False.
    """
    writer = OnnxWriter()
    if type(module) in _LAYERS:
        module = nn.Sequential(module)  # tracing enters the root; inside, a layer is one node
    writer.ranks.update({n: len(shape) for n, shape in inputs})
    try:
        graph = _Tracer([n for n, _ in inputs]).trace(module)
        results = _Lowering(writer, module, [n for n, _ in inputs]).run(graph)
    except (UnsupportedLayerError, fx.proxy.TraceError, TypeError, ValueError) as error:
        if fallback:
            return _through_pytorch(module, inputs, outputs, use)
        if isinstance(error, UnsupportedLayerError):
            raise
        raise UnsupportedLayerError(f"{type(module).__name__} cannot be traced: {error}") from error
    results = [results[i] for i in (use if use is not None else range(len(results)))]
    for result, (output, _) in zip(results, outputs, strict=True):
        writer.add("Identity", result, name=output)
    writer.nodes = divide_convolutions(writer.nodes, writer.initializers)
    _drop_dead(writer, [n for n, _ in outputs])
    model = writer.model(
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in outputs],
        name,
    )
    onnx.checker.check_model(model)
    return model


class _Selected(nn.Module):
    """A module that gives some of another's results."""

    def __init__(self, module: nn.Module, use: Sequence[int] | None) -> None:
        super().__init__()
        self.module, self.use = module, use

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        results = self.module(*inputs)
        if not isinstance(results, (tuple, list)):
            results = (results,)
        return tuple(results[i] for i in (self.use or range(len(results))))


def _through_pytorch(
    module: nn.Module,
    inputs: Sequence[tuple[str, Sequence[int | str]]],
    outputs: Sequence[tuple[str, Sequence[int | str]]],
    use: Sequence[int] | None,
) -> onnx.ModelProto:
    """``torch.onnx.export`` with open height and width."""
    examples = tuple(torch.zeros(resolve(shape, _PROBE_SIZE)) for _, shape in inputs)
    dynamic = tuple(
        {i: torch.export.Dim.DYNAMIC for i, dim in enumerate(shape) if isinstance(dim, str)}
        for _, shape in inputs
    )
    # The exporter warns about every optional package it does not find.
    chatter = logging.getLogger("torch.onnx")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        exported = torch.onnx.export(
            _Selected(module, use).eval(),
            examples,
            input_names=[n for n, _ in inputs],
            output_names=[n for n, _ in outputs],
            dynamic_shapes=(dynamic,),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    finally:
        chatter.setLevel(level)
    if exported is None:
        raise CompileError(f"PyTorch's ONNX exporter gave nothing for {type(module).__name__}")
    return exported.model_proto


class _Tracer(fx.Tracer):
    """Gives a forward the arguments that it is going to get, ``*args`` included."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        arguments = [self.create_proxy("placeholder", name, (), {}) for name in self.names]
        return root_fn, [self.root, *arguments]


class _Lowering:
    """Walks an fx graph and writes each node."""

    def __init__(self, writer: OnnxWriter, module: nn.Module, input_names: Sequence[str]) -> None:
        self.writer = writer
        self.module = module
        self.input_names = list(input_names)
        self.values: dict[fx.Node, Any] = {}

    def run(self, graph: fx.Graph) -> list[str]:
        names = iter(self.input_names)
        for node in graph.nodes:
            if node.op == "placeholder":
                self.values[node] = next(names)
            elif node.op == "get_attr":
                self.values[node] = self.writer.constant(
                    _fetch(self.module, node.target), node.target
                )
            elif node.op == "output":
                result = fx.map_arg(node.args[0], self.values.__getitem__)
                return list(result) if isinstance(result, (tuple, list)) else [result]
            else:
                self.values[node] = self._lower(node)
        raise CompileError("a traced graph without output")

    def _lower(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, self.values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self.values.__getitem__)
        if node.op == "call_module":
            layer = self.module.get_submodule(node.target)
            handler = _LAYERS.get(type(layer))
            if handler is None:
                raise UnsupportedLayerError(f"no ONNX form for layer {type(layer).__name__}")
            return handler(self.writer, layer, node.target, *args)
        key = node.target if node.op == "call_function" else str(node.target)
        handler = _FUNCTIONS.get(key)
        if handler is None:
            raise UnsupportedLayerError(f"no ONNX form for {key}")
        return handler(self.writer, *args, **kwargs)


def _fetch(module: nn.Module, path: str) -> Tensor:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _drop_dead(writer: OnnxWriter, outputs: Sequence[str]) -> None:
    needed, kept = set(outputs), []
    for node in reversed(writer.nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    writer.nodes = kept[::-1]
    writer.initializers = {n: v for n, v in writer.initializers.items() if n in needed}


# --- layers ---------------------------------------------------------------------------------------


class _Unshuffled:
    """``pixel_unshuffle(x, factor)`` not yet written, to be merged into the next convolution."""

    def __init__(self, x: str, factor: int) -> None:
        self.x, self.factor = x, factor


def _conv_on_blocks(w: OnnxWriter, layer: nn.Conv2d, path: str, x: _Unshuffled) -> str:
    """A k x k convolution over p x p blocks as channels = a kp x kp convolution with stride p."""
    plain = layer.stride == (1, 1) and layer.dilation == (1, 1) and layer.groups == 1
    if not plain or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UnsupportedLayerError("pixel_unshuffle before a convolution with other settings")
    p = x.factor
    out, channels, rows, columns = layer.weight.shape
    weight = layer.weight.detach().reshape(out, channels // p**2, p, p, rows, columns)
    weight = weight.permute(0, 1, 4, 2, 5, 3).reshape(out, channels // p**2, rows * p, columns * p)
    inputs = [x.x, w.constant(weight, f"{path}.weight")]
    if layer.bias is not None:
        inputs.append(w.constant(layer.bias, f"{path}.bias"))
    pad = [layer.padding[0] * p, layer.padding[1] * p]
    return w.add(
        "Conv", *inputs, kernel_shape=[rows * p, columns * p], strides=[p, p], pads=pad * 2
    )


def _conv(w: OnnxWriter, layer: nn.Conv2d, path: str, x: str | _Unshuffled) -> str:
    if isinstance(x, _Unshuffled):
        return _conv_on_blocks(w, layer, path, x)
    if layer.padding_mode not in ("zeros", "reflect") or isinstance(layer.padding, str):
        raise UnsupportedLayerError("convolutions with padding other than zeros or reflection")
    rows, columns = layer.padding
    if layer.padding_mode == "reflect" and (rows or columns):
        x = _pad(w, x, (columns, columns, rows, rows), mode="reflect")
        rows = columns = 0
    inputs = [x, w.constant(layer.weight, f"{path}.weight")]
    if layer.bias is not None:
        inputs.append(w.constant(layer.bias, f"{path}.bias"))
    pad = [rows, columns, rows, columns]
    return w.add(
        "Conv",
        *inputs,
        kernel_shape=list(layer.kernel_size),
        strides=list(layer.stride),
        pads=pad,
        dilations=list(layer.dilation),
        group=layer.groups,
    )


def _conv_transpose(w: OnnxWriter, layer: nn.ConvTranspose2d, path: str, x: str) -> str:
    inputs = [x, w.constant(layer.weight, f"{path}.weight")]
    if layer.bias is not None:
        inputs.append(w.constant(layer.bias, f"{path}.bias"))
    return w.add(
        "ConvTranspose",
        *inputs,
        kernel_shape=list(layer.kernel_size),
        strides=list(layer.stride),
        pads=[*layer.padding, *layer.padding],
        output_padding=list(layer.output_padding),
        dilations=list(layer.dilation),
        group=layer.groups,
    )


def _linear(w: OnnxWriter, layer: nn.Linear, path: str, x: str) -> str:
    product = w.add("MatMul", x, w.constant(layer.weight.detach().t(), f"{path}.weight_t"))
    return (
        product
        if layer.bias is None
        else w.add("Add", product, w.constant(layer.bias, f"{path}.bias"))
    )


def _group_norm(w: OnnxWriter, layer: nn.GroupNorm, path: str, x: str) -> str:
    """GroupNorm without leaving the (N, C, H, W) shape, which runtimes take two re-layouts for."""
    weight, bias = (
        np.full(layer.num_channels, number, np.float32)
        if parameter is None
        else parameter.detach().cpu().numpy()
        for parameter, number in ((layer.weight, 1.0), (layer.bias, 0.0))
    )
    return onnx_forms.group_norm_silu(
        w, x, weight, bias, groups=layer.num_groups, eps=layer.eps, silu=False, name=path
    )


def _silu(w: OnnxWriter, x: str, inplace: bool = False) -> str:
    return w.add("Mul", x, w.add("Sigmoid", x))


def _pass_through(w: OnnxWriter, layer: nn.Module, path: str, x: str) -> str:
    return x


def _upsample(w: OnnxWriter, layer: nn.Upsample, path: str, x: str) -> str:
    return _interpolate(
        w, x, layer.size, layer.scale_factor, mode=layer.mode, align_corners=layer.align_corners
    )


_LAYERS: dict[type, Callable[..., str]] = {
    nn.Conv2d: _conv,
    nn.ConvTranspose2d: _conv_transpose,
    nn.Linear: _linear,
    nn.GroupNorm: _group_norm,
    nn.Identity: _pass_through,
    nn.Dropout: _pass_through,
    nn.SiLU: lambda w, layer, path, x: _silu(w, x),
    nn.ReLU: lambda w, layer, path, x: w.add("Relu", x),
    nn.Sigmoid: lambda w, layer, path, x: w.add("Sigmoid", x),
    nn.Tanh: lambda w, layer, path, x: w.add("Tanh", x),
    nn.LeakyReLU: lambda w, layer, path, x: _leaky_relu(w, x, layer.negative_slope),
    nn.ReLU6: lambda w, layer, path, x: _clamp(w, x, 0.0, 6.0),
    nn.GELU: lambda w, layer, path, x: _gelu(w, x, layer.approximate),
    nn.Upsample: _upsample,
}


# --- functions and methods ------------------------------------------------------------------------


class _Shape:
    """A traced ``x.shape``: indexing it gives a dimension."""

    def __init__(self, x: str) -> None:
        self.x = x


class _Dim(str):
    """A dimension known at run time: the name of an int64 tensor (1,)."""


def _operand(w: OnnxWriter, value: Any, *, whole: bool = False) -> str:
    if isinstance(value, str):
        return value
    return w.integers(value) if whole else w.constant(np.float32(value))


def _binary(op: str) -> Callable[..., str]:
    def write(w: OnnxWriter, x: Any, y: Any) -> str:
        whole = isinstance(x, _Dim) or isinstance(y, _Dim)
        result = w.add(op, _operand(w, x, whole=whole), _operand(w, y, whole=whole))
        return _Dim(result) if whole else result

    return write


def _floor_divide(w: OnnxWriter, x: Any, y: Any) -> str:
    if not isinstance(x, _Dim):
        raise UnsupportedLayerError("no ONNX form for // of anything but dimensions")
    return _binary("Div")(w, x, y)


def _reduce(op: str) -> Callable[..., str]:
    def write(w: OnnxWriter, x: str, dim: Any = None, keepdim: bool = False) -> str:
        axes = [dim] if isinstance(dim, int) else list(dim)
        rank = w.ranks[x] if keepdim else w.ranks[x] - len(axes)
        return w.add(op, x, w.integers(*axes), keepdims=int(keepdim), rank=rank)

    return write


def _getattr(w: OnnxWriter, x: str, attribute: str) -> _Shape:
    if attribute != "shape":
        raise UnsupportedLayerError(f"no ONNX form for attribute {attribute}")
    return _Shape(x)


def _getitem(w: OnnxWriter, x: Any, index: Any) -> Any:
    if isinstance(x, _Shape):
        axis = w.axis(x.x, index)
        return _Dim(w.add("Shape", x.x, start=axis, end=axis + 1, rank=1))
    if isinstance(x, (list, tuple)):
        return x[index]
    if isinstance(x, _Unbound):
        return x.part(index)
    index = index if isinstance(index, tuple) else (index,)
    starts, ends, axes, gone, new = [], [], [], [], []
    axis, position = 0, 0  # in x, in the result
    for item in index:
        if item is None:
            new.append(position)
            position += 1
            continue
        if isinstance(item, int) and not isinstance(item, bool):
            # The last place has no end that is a number.
            start, end = item, item + 1 if item != -1 else None
            gone.append(axis)
        elif isinstance(item, slice) and item.step in (None, 1):
            start, end = item.start, item.stop
            position += 1
        else:
            raise UnsupportedLayerError(f"no ONNX form for index {index}")
        if start is not None or end is not None:
            starts.append(start or 0)
            ends.append(np.iinfo(np.int64).max if end is None else end)
            axes.append(axis)
        axis += 1
    if axes:
        x = w.add("Slice", x, _dimensions(w, starts), _dimensions(w, ends), w.integers(*axes))
    if gone:
        x = w.add("Squeeze", x, w.integers(*gone), rank=w.ranks[x] - len(gone))
    if new:
        x = w.add("Unsqueeze", x, w.integers(*new), rank=w.ranks[x] + len(new))
    return x


def _dimensions(w: OnnxWriter, values: Sequence[int | str]) -> str:
    numbers = [v for v in values if not isinstance(v, str)]
    if len(numbers) == len(values):
        return w.integers(*numbers)
    parts = [v if isinstance(v, str) else w.integers(v) for v in values]
    return parts[0] if len(parts) == 1 else w.add("Concat", *parts, axis=0)


def _concat(w: OnnxWriter, tensors: Sequence[str], dim: int = 0) -> str:
    return w.add("Concat", *tensors, axis=dim)


def _chunk(w: OnnxWriter, x: str, chunks: int, dim: int = 0) -> tuple[str, ...]:
    """Parts of equal size but for the last, which is smaller, in PyTorch as in ONNX."""
    parts = [f"{x}_part{i}_of_{chunks}_{len(w.nodes)}" for i in range(chunks)]
    w.nodes.append(helper.make_node("Split", [x], parts, axis=dim, num_outputs=chunks))
    w.ranks.update(dict.fromkeys(parts, w.ranks[x]))
    return tuple(parts)


# --- shapes ---------------------------------------------------------------------------------------


def _reshape(w: OnnxWriter, x: str, *sizes: Any) -> str:
    """One size -1 is what is left; 0 would copy a dimension, PyTorch has no such size."""
    if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
        sizes = tuple(sizes[0])
    return w.add("Reshape", x, _dimensions(w, sizes), rank=len(sizes))


def _flatten(w: OnnxWriter, x: str, start_dim: int = 0, end_dim: int = -1) -> str:
    """0 copies a dimension before, -1 is the flat one, those after are read at run time."""
    start, end = w.axis(x, start_dim), w.axis(x, end_dim)
    after = [_getitem(w, _Shape(x), i) for i in range(end + 1, w.ranks[x])]
    return _reshape(w, x, *[0] * start, -1, *after)


def _unflatten(w: OnnxWriter, x: str, dim: int, sizes: Sequence[Any]) -> str:
    axis = w.axis(x, dim)
    after = [_getitem(w, _Shape(x), i) for i in range(axis + 1, w.ranks[x])]
    if len(after) == 1 and -1 not in sizes:
        after = [-1]
    return _reshape(w, x, *[0] * axis, *sizes, *after)


def _transpose(w: OnnxWriter, x: str, dim0: int, dim1: int) -> str:
    order = list(range(w.ranks[x]))
    i, j = w.axis(x, dim0), w.axis(x, dim1)
    order[i], order[j] = order[j], order[i]
    return w.add("Transpose", x, perm=order)


def _unbind(w: OnnxWriter, x: str, dim: int = 0) -> _Unbound:
    return _Unbound(w, x, w.axis(x, dim))


class _Unbound:
    """``x.unbind(dim)``, whose parts are written when they are asked for."""

    def __init__(self, w: OnnxWriter, x: str, axis: int) -> None:
        self.w, self.x, self.axis = w, x, axis

    def part(self, index: int) -> str:
        where = (*[slice(None)] * self.axis, index)
        return _getitem(self.w, self.x, where)


# --- arithmetic -----------------------------------------------------------------------------------


def _clamp(w: OnnxWriter, x: str, min: float | None = None, max: float | None = None) -> str:
    bounds = ["" if v is None else w.constant(np.float32(v)) for v in (min, max)]
    return w.add("Clip", x, *bounds)


def _leaky_relu(w: OnnxWriter, x: str, negative_slope: float = 0.01, inplace: bool = False) -> str:
    return w.add("LeakyRelu", x, alpha=float(negative_slope))


def _gelu(w: OnnxWriter, x: str, approximate: str = "none") -> str:
    """``x (1 + erf(x / sqrt 2)) / 2``; opset 18 has no Gelu."""
    if approximate != "none":
        raise UnsupportedLayerError(f"no ONNX form for gelu with approximate={approximate!r}")
    wave = w.add("Erf", w.add("Mul", x, w.constant(np.float32(0.5**0.5))))
    half = w.add("Mul", x, w.constant(np.float32(0.5)))
    return w.add("Mul", half, w.add("Add", wave, w.constant(np.float32(1.0))))


def _rsqrt(w: OnnxWriter, x: str) -> str:
    return w.add("Reciprocal", w.add("Sqrt", x))


def _softmax(w: OnnxWriter, x: str, dim: int, dtype: Any = None) -> str:
    return w.add("Softmax", x, axis=dim)


def _normalize(
    w: OnnxWriter, x: str, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> str:
    if p != 2.0:
        raise UnsupportedLayerError(f"no ONNX form for normalize with p={p}")
    length = w.add("ReduceL2", x, w.integers(dim), keepdims=1)
    return w.add("Div", x, w.add("Max", length, w.constant(np.float32(eps))))


def _attention(w: OnnxWriter, query: str, key: str, value: str, **options: Any) -> str:
    """``softmax(q k^T / sqrt(width)) v`` with the scale on q, which is smaller than the scores."""
    if options:
        raise UnsupportedLayerError(f"no ONNX form for attention with {', '.join(options)}")
    rank = w.ranks[query]
    width = w.add("Cast", _getitem(w, _Shape(query), rank - 1), to=TensorProto.FLOAT)
    scaled = w.add("Mul", query, w.add("Reciprocal", w.add("Sqrt", width)))
    scores = w.add("MatMul", scaled, _transpose(w, key, -2, -1))
    return w.add("MatMul", w.add("Softmax", scores, axis=-1), value)


# --- pictures -------------------------------------------------------------------------------------


def _space_to_depth(w: OnnxWriter, x: str, factor: int) -> _Unshuffled:
    return _Unshuffled(x, factor)


def _depth_to_space(w: OnnxWriter, x: str, factor: int) -> str:
    return w.add("DepthToSpace", x, blocksize=factor, mode="CRD")


def _pad(
    w: OnnxWriter, x: str, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> str:
    """PyTorch names the last dimension first, ONNX all beginnings first."""
    if mode not in ("constant", "reflect") or any(isinstance(n, str) for n in pad):
        raise UnsupportedLayerError(f"no ONNX form for padding {tuple(pad)} with mode={mode!r}")
    before, after = list(pad[0::2])[::-1], list(pad[1::2])[::-1]
    rest = [0] * (w.ranks[x] - len(before))
    inputs = [x, w.integers(*rest, *before, *rest, *after)]
    if mode == "constant":
        inputs.append(w.constant(np.float32(value or 0.0)))
    return w.add("Pad", *inputs, mode=mode)


_RESIZE: dict[tuple[str, bool], dict[str, Any]] = {
    ("nearest", False): {
        "mode": "nearest",
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    },
    ("bilinear", False): {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    ("bilinear", True): {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
}


def _interpolate(
    w: OnnxWriter,
    x: str,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    **options: Any,
) -> str:
    """By a whole factor, where PyTorch and ONNX agree on the result's size."""
    factors = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * 2
    form = _RESIZE.get((mode, bool(align_corners)))
    whole = all(isinstance(f, (int, float)) and f == int(f) and f >= 1 for f in factors)
    if form is None or size is not None or not whole or any(options.values()):
        raise UnsupportedLayerError(
            f"no ONNX form for interpolation with mode={mode!r}, scale_factor={scale_factor}"
        )
    scales = w.constant(np.array([1, 1, *factors], dtype=np.float32))
    return w.add("Resize", x, "", scales, **form)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.silu: _silu,
    F.relu: lambda w, x, inplace=False: w.add("Relu", x),
    F.pixel_unshuffle: _space_to_depth,
    F.pixel_shuffle: _depth_to_space,
    F.leaky_relu: _leaky_relu,
    F.relu6: lambda w, x, inplace=False: _clamp(w, x, 0.0, 6.0),
    F.gelu: _gelu,
    F.normalize: _normalize,
    F.softmax: _softmax,
    F.pad: _pad,
    F.interpolate: _interpolate,
    F.scaled_dot_product_attention: _attention,
    torch.exp: lambda w, x: w.add("Exp", x),
    torch.rsqrt: _rsqrt,
    torch.softmax: _softmax,
    torch.matmul: _binary("MatMul"),
    torch.chunk: _chunk,
    torch.sigmoid: lambda w, x: w.add("Sigmoid", x),
    torch.tanh: lambda w, x: w.add("Tanh", x),
    torch.maximum: _binary("Max"),
    torch.minimum: _binary("Min"),
    torch.cat: _concat,
    operator.add: _binary("Add"),
    operator.sub: _binary("Sub"),
    operator.mul: _binary("Mul"),
    operator.truediv: _binary("Div"),
    operator.floordiv: _floor_divide,
    operator.matmul: _binary("MatMul"),
    operator.getitem: _getitem,
    getattr: _getattr,
    "mean": _reduce("ReduceMean"),
    "amax": _reduce("ReduceMax"),
    "clamp": _clamp,
    "chunk": _chunk,
    "unbind": _unbind,
    "reshape": _reshape,
    "view": _reshape,
    "flatten": _flatten,
    "unflatten": _unflatten,
    "transpose": _transpose,
    "exp": lambda w, x: w.add("Exp", x),
    "rsqrt": _rsqrt,
    "softmax": _softmax,
    "sigmoid": lambda w, x: w.add("Sigmoid", x),
    "tanh": lambda w, x: w.add("Tanh", x),
}
