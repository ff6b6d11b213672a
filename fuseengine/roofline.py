"""How long a program should take on a target: a roofline over its networks and ops, no device.

    prediction = predict(program, stages, get_target("orin"), "fp16", size=(480, 640))
    print(prediction)

A kernel takes the longest of its operations over the target's rate, its memory traffic over the
bandwidth, its exponentials over their rate, each divided by the target's efficiency, and a little
beyond that to be launched. Kernels follow each other; a frame is their sum.

**What is a kernel.** Of a network: every convolution, matrix product, reduction and resampling;
anything else is taken as fused into its neighbours, as runtimes mostly do. Of the program: every
op. So

* operations are those of convolutions and matrix products, two per multiply-add;
* a kernel reads each input and its weights once and writes its outputs once, in the precision's
  width; caches are left out;
* a reduction reads its input once: a norm has two (mean and squared deviations), and what it
  normalises is read again by the convolution behind it;
* a sum of two results (a skip connection) reads the one that was not just made;
* attention inside a network keeps its map on the chip on a GPU, not on a CPU;
* a network's own inputs and outputs are float32, as all values of a program are.

This is optimistic about fusion and pessimistic about caches. **How far to trust it**: operations
are PyTorch's own count, to one part in a hundred thousand (tests). On a CPU the efficiency
(``matrix``: 0.7 of the rate of NumPy's matrix product) lies in the middle of what four small
systems reached in float32 on one core of an AMD EPYC (0.62 to 0.8); ``python -m
benchmarks.roofline`` measures it again. For a Jetson nothing has been measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from fuseengine.errors import CompileError
from fuseengine.program import Node, Program, StageVariant, resolve
from fuseengine.report import table
from fuseengine.runtime import ops
from fuseengine.runtime.frames import FrameAdapter
from fuseengine.targets import Target

if TYPE_CHECKING:
    from fuseengine.backends.base import StageSource

WIDTHS = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1}
"""Bytes that an activation or weight has in memory."""

_FLOAT32 = 4

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """What a kernel must do at least.

    Attributes:
        operations: additions and multiplications of matrix products.
        nbytes: read and written.
        exponentials: of a softmax.
    """

    operations: float = 0.0
    nbytes: float = 0.0
    exponentials: float = 0.0

    def seconds(self, target: Target, precision: str) -> tuple[float, str]:
        """How long it takes, and what bounds it."""
        parts = {
            "arithmetic": self.operations / (target.peak(precision) * target.matrix_efficiency),
            "memory": self.nbytes / (target.bandwidth * target.memory_efficiency),
            "exponentials": self.exponentials / (target.exponentials * target.matrix_efficiency),
        }
        bound = max(parts, key=lambda part: parts[part])
        if target.kernel_seconds > parts[bound]:
            bound = "launches"
        return max(parts.values()) + target.kernel_seconds, bound


@dataclass(frozen=True)
class Row:
    """One stage, op or step of a frame, all its calls together.

    Attributes:
        name: of the op, or the stage variant's label.
        kind: "stage", "op" or "frame".
        precision: of its arithmetic.
        calls: per frame.
        kernels: per frame.
        operations: per frame.
        nbytes: per frame.
        milliseconds: per frame, predicted.
        bound: what most of that time is bound by: "arithmetic", "memory", "exponentials" or
            "launches".
    """

    name: str
    kind: str
    precision: str
    calls: int
    kernels: int
    operations: float
    nbytes: float
    milliseconds: float
    bound: str


@dataclass(frozen=True)
class Prediction:
    """What :func:`predict` gives; printing it gives a table.

    Attributes:
        model: the program's model.
        size: (height, width) of the frames.
        target: name of the target.
        title: what the target is.
        rows: in the order of execution.
        frame_ms: what a frame takes beyond its kernels.
        efficiency: parts of the target's matrix and memory rates that were reckoned with.
        sources: of the target's numbers.
        hint: what to know about the target's mode.
        memory_bytes: of the target.
    """

    model: str
    size: tuple[int, int]
    target: str
    title: str
    rows: tuple[Row, ...]
    frame_ms: float
    efficiency: tuple[float, float]
    sources: tuple[str, ...]
    hint: str
    memory_bytes: int

    @property
    def milliseconds(self) -> float:
        """Of one frame."""
        return sum(row.milliseconds for row in self.rows) + self.frame_ms

    @property
    def operations(self) -> float:
        """Additions and multiplications of matrix products in one frame."""
        return sum(row.operations for row in self.rows)

    def summary(self) -> str:
        """One line, which says that nothing was measured."""
        height, width = self.size
        return (
            f"predicted, not measured: {self.model} {width}x{height} on {self.title}: "
            f"{self.milliseconds:.3g} ms per frame, {1e3 / self.milliseconds:.3g} frames per second"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**asdict(self), "milliseconds": self.milliseconds, "measured": False}

    def __str__(self) -> str:
        head = ["part", "calls", "precision", "GFLOP", "MB", "kernels", "ms", "bound by"]
        rows = [
            [
                row.name,
                str(row.calls),
                row.precision,
                f"{row.operations / 1e9:.2f}",
                f"{row.nbytes / 1e6:.1f}",
                str(row.kernels),
                f"{row.milliseconds:.3f}",
                row.bound,
            ]
            for row in self.rows
        ]
        whole = ["frame", "", "", f"{self.operations / 1e9:.2f}"]
        whole.append(f"{sum(row.nbytes for row in self.rows) / 1e6:.1f}")
        whole += [str(sum(row.kernels for row in self.rows)), f"{self.milliseconds:.3f}", ""]
        matrix, memory = self.efficiency
        lines = [
            self.summary(),
            table([head, *rows, whole]),
            f"Reckoned with {matrix:.0%} of the peak and {memory:.0%} of the bandwidth, and "
            f"{self.frame_ms:.2f} ms per frame beside its kernels. {self.title}:",
            *(f"* {source}" for source in self.sources),
        ]
        return "\n".join([*lines, self.hint] if self.hint else lines)


def predict(
    program: Program,
    stages: StageSource,
    target: Target,
    precision: str | Mapping[StageVariant, str],
    size: tuple[int, int] = (480, 640),
) -> Prediction:
    """Predict how long a frame takes.

    Args:
        program: the captured model.
        stages: its networks; needs the package ``onnx``.
        target: see :func:`fuseengine.targets.get_target`.
        precision: of all stages, or of each variant; ops are float32.
        size: (height, width) of the frames.

    Returns:
        The time of each part and of the frame.

    Raises:
        SettingError: the target does not compute in a precision.
        CompileError: a network's shapes cannot be found.
    """
    adapter = FrameAdapter(size, program.channels, program.multiple, program.padding)
    padded = adapter.padded
    rows = [_row("frame in", "frame", "fp32", [_frame_in(size, padded, adapter.planes)], target)]
    counted: dict[StageVariant, list[Work]] = {}
    for node in program.nodes:
        if node.kind == "stage":
            variant = StageVariant.of(node)
            named = precision if isinstance(precision, str) else precision[variant]
            chosen = named.partition("+")[0]  # "int8+bf16" is int8 but for a few layers
            target.peak(chosen)  # refuses before anything is counted
            if variant not in counted:
                shapes = {
                    f"in{index}": resolve(program.values[name].shape, padded)
                    for index, name in enumerate(node.inputs)
                }
                counted[variant] = network_work(
                    stages.onnx(variant), shapes, chosen, fused_attention=target.kind == "gpu"
                )
            row = _row(variant.label, "stage", chosen, counted[variant], target)
        elif node.target in ops.MAKERS:  # made once, when an engine is built
            continue
        else:
            row = _row(node.target, "op", "fp32", [op_work(node, program, padded)], target)
        rows.append(row)
    rows.append(_row("frame out", "frame", "fp32", [_frame_out(size, adapter.planes)], target))
    return Prediction(
        model=program.model,
        size=size,
        target=target.name,
        title=target.title,
        rows=tuple(_merged(rows)),
        frame_ms=target.frame_seconds * 1e3,
        efficiency=(target.matrix_efficiency, target.memory_efficiency),
        sources=target.sources,
        hint=target.hint,
        memory_bytes=target.memory_bytes,
    )


def _row(name: str, kind: str, precision: str, works: Sequence[Work], target: Target) -> Row:
    times: dict[str, float] = {}
    for work in works:
        seconds, bound = work.seconds(target, precision)
        times[bound] = times.get(bound, 0.0) + seconds
    return Row(
        name=name,
        kind=kind,
        precision=precision,
        calls=1,
        kernels=len(works),
        operations=sum(work.operations for work in works),
        nbytes=sum(work.nbytes for work in works),
        milliseconds=sum(times.values()) * 1e3,
        bound=max(times, key=lambda part: times[part], default="launches"),
    )


def _merged(rows: Sequence[Row]) -> list[Row]:
    """One row per part, where it is called first; equal parts' longest call says the bound."""
    merged: dict[tuple[str, str], Row] = {}
    for row in rows:
        seen = merged.get((row.kind, row.name))
        merged[row.kind, row.name] = row if seen is None else _sum(seen, row)
    return list(merged.values())


def _sum(a: Row, b: Row) -> Row:
    return Row(
        name=a.name,
        kind=a.kind,
        precision=a.precision,
        calls=a.calls + b.calls,
        kernels=a.kernels + b.kernels,
        operations=a.operations + b.operations,
        nbytes=a.nbytes + b.nbytes,
        milliseconds=a.milliseconds + b.milliseconds,
        bound=a.bound if a.milliseconds / a.calls >= b.milliseconds else b.bound,
    )


# --- ops and frames -------------------------------------------------------------------------------


def op_work(node: Node, program: Program, size: tuple[int, int]) -> Work:
    """What an op of a program does, float32.

    Args:
        node: the call.
        program: knows the shapes.
        size: padded height and width.
    """
    inputs = [resolve(program.values[name].shape, size) for name in node.inputs]
    output = resolve(program.values[node.made()[0]].shape, size)
    count = _OP_WORK.get(node.target, _pointwise)
    return count(inputs, output)


def _pointwise(inputs: Sequence[Shape], output: Shape) -> Work:
    """Every input is read and the output written, once."""
    return Work(nbytes=_FLOAT32 * (sum(map(math.prod, inputs)) + math.prod(output)))


def _slice(inputs: Sequence[Shape], output: Shape) -> Work:
    return Work(nbytes=_FLOAT32 * 2 * math.prod(output))


def _stretch(inputs: Sequence[Shape], output: Shape) -> Work:
    """The range is found first, so the picture is read twice."""
    return Work(nbytes=_FLOAT32 * 3 * math.prod(output))


def _criss_cross(inputs: Sequence[Shape], output: Shape) -> Work:
    """Each pixel meets H + W - 1 others, with Cq multiply-adds for a score and C for a sum."""
    (batch, queries, height, width), channels = inputs[0], output[1]
    meetings = batch * height * width * (height + width - 1)
    traffic = _pointwise(inputs, output).nbytes
    return Work(2.0 * meetings * (queries + channels), traffic, float(meetings))


def _spectral(inputs: Sequence[Shape], output: Shape) -> Work:
    """Two transforms; the half spectrum (complex) goes out and in twice, the filter's in once.

    5 N log2 N operations a complex transform (Cooley and Tukey 1965), half of that for real ones.
    """
    pictures, pixels = math.prod(output[:-2]), math.prod(output[-2:])
    operations = 5.0 * pixels * math.log2(max(pixels, 2)) * pictures
    return Work(operations, pixels * (pictures * (2 * _FLOAT32 + 16) + _FLOAT32))


_OP_WORK: dict[str, Callable[[Sequence[Shape], Shape], Work]] = {
    "slice": _slice,
    "stretch": _stretch,
    "criss_cross_attention": _criss_cross,
    "circular_convolution": _spectral,
    "wiener_deconvolution": _spectral,
}
"""Ops that do something else than read all inputs and write the output; the formulas are those of
the docstrings in ``kernels/``."""


def _frame_in(size: tuple[int, int], padded: tuple[int, int], planes: int) -> Work:
    """A grey and a colour frame of bytes become two inputs of ``planes`` float32 planes."""
    return Work(nbytes=4 * math.prod(size) + 2 * planes * _FLOAT32 * math.prod(padded))


def _frame_out(size: tuple[int, int], planes: int) -> Work:
    """The fused planes and the visible frame, for its chroma, become a frame."""
    return Work(nbytes=(_FLOAT32 * planes + 3 + 3) * math.prod(size))


# --- networks -------------------------------------------------------------------------------------

_KERNELS = frozenset(
    (
        "AveragePool",
        "GlobalAveragePool",
        "GridSample",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "MaxPool",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceSum",
        "Resize",
    )
)
"""Operators without matrix products that are kernels of their own."""

_VIEWS = frozenset(
    (
        "Concat",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Pad",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    )
)
"""Operators that only say where elements lie: fused, and no join of their inputs."""


def network_work(
    model: bytes, shapes: Mapping[str, Shape], precision: str, *, fused_attention: bool = False
) -> list[Work]:
    """The kernels of a network.

    Args:
        model: ONNX, height and width open.
        shapes: of each input.
        precision: says how wide activations and weights are.
        fused_attention: whether a softmax between two matrix products keeps its map on the chip.

    Raises:
        CompileError: the shape of a tensor cannot be found.
    """
    return _Network(model, shapes, WIDTHS[precision], fused_attention).kernels()


class _Network:
    """Walks an ONNX graph of known shapes and collects its kernels.

    ``behind[t]`` are the kernels' results (and the network's inputs) that tensor t is made of by
    what is fused; means, scales and the like are left out.
    """

    def __init__(
        self, model: bytes, shapes: Mapping[str, Shape], width: int, fused_attention: bool
    ) -> None:
        # Reading shapes needs ``onnx``, which a machine that only runs engines does not have.
        from fuseengine.export.graph import fixed, infer

        fixed_model = fixed(model, shapes)
        self.graph, self.width = fixed_model.graph, width
        self.sizes = {name: info.shape for name, info in infer(fixed_model).items()}
        inputs = [value.name for value in self.graph.input]
        self.outside = {*inputs, *(value.name for value in self.graph.output)}
        for node in self.graph.node:
            if node.op_type == "Identity" and node.output[0] in self.outside:
                self.outside.add(node.input[0])
        self.on_chip = _attention_maps(self.graph) if fused_attention else frozenset()
        self.behind: dict[str, frozenset[str]] = {}
        self.maker: dict[str, int] = {}
        for name in inputs:
            self.behind[name] = self._itself(name)
        self.works: list[Work] = []

    def kernels(self) -> list[Work]:
        for node in self.graph.node:
            work = self._kernel(node)
            if work is None:
                self._fuse(node)
                continue
            for name in filter(None, node.output):
                self.behind[name] = self._itself(name)
                self.maker[name] = len(self.works)
            self.works.append(work)
        return self.works

    def _kernel(self, node: Any) -> Work | None:
        """What a node does by a kernel of its own; None where it is fused."""
        if node.op_type in {*_OPERATIONS, *_KERNELS} and self._small(node.input[0]):
            return None  # from means to means, such as a norm's groups
        if node.op_type in _OPERATIONS:
            return Work(_OPERATIONS[node.op_type](node, self._shape), self._traffic(node))
        if node.op_type == "Softmax":
            return Work(0.0, self._traffic(node), self._elements(node.input[0]))
        if node.op_type in _KERNELS:
            return Work(nbytes=self._traffic(node))
        return None

    def _fuse(self, node: Any) -> None:
        """Note what is behind a fused node's results; a join reads what was not just made."""
        sources = {name: self.behind[name] for name in node.input if self.behind.get(name)}
        union = frozenset[str]().union(*sources.values())
        joins = len(sources) > 1 and all(union - behind for behind in sources.values())
        if joins and node.op_type not in _VIEWS:
            self._join(node.output[0], sources)
            return
        for name in node.output:
            self.behind[name] = union

    def _join(self, output: str, sources: Mapping[str, frozenset[str]]) -> None:
        """A sum of two results: done where the later was made, reading the other."""
        made = {
            name: max(self.maker.get(s, -1) for s in behind) for name, behind in sources.items()
        }
        latest = max(made, key=lambda name: made[name])
        read = sum(self._bytes(name) for name in sources if name != latest)
        index = made[latest]
        if index < 0:  # of two inputs of the network: a kernel of its own
            index = len(self.works)
            self.works.append(Work(nbytes=self._bytes(latest) + self._bytes(output)))
        work = self.works[index]
        self.works[index] = replace(work, nbytes=work.nbytes + read)
        self.behind[output] = self._itself(output)
        self.maker[output] = index

    def _itself(self, name: str) -> frozenset[str]:
        return frozenset(() if self._small(name) else (name,))

    def _small(self, name: str) -> bool:
        """Whether a tensor is one number per channel: a mean, a scale, a time's shift."""
        shape = self._shape(name)
        return math.prod(shape) == max(shape, default=1)

    def _traffic(self, node: Any) -> int:
        return sum(self._bytes(name) for name in (*node.input, *node.output) if name)

    def _bytes(self, name: str) -> int:
        if name in self.on_chip:
            return 0
        return self._elements(name) * (_FLOAT32 if name in self.outside else self.width)

    def _elements(self, name: str) -> int:
        return math.prod(self._shape(name))

    def _shape(self, name: str) -> Shape:
        shape = self.sizes.get(name)
        if shape is None or not all(isinstance(size, int) for size in shape):
            raise CompileError(
                f"the network {self.graph.name!r} has a tensor {name!r} whose shape ONNX cannot "
                f"find ({shape}); its time cannot be predicted"
            )
        return shape


def _attention_maps(graph: Any) -> frozenset[str]:
    """Scores and weights of softmax(q k) v: what a fused attention never writes."""
    products = {n.output[0] for n in graph.node if n.op_type == "MatMul"}
    read_by_products = {name for n in graph.node if n.op_type == "MatMul" for name in n.input}
    maps: set[str] = set()
    for node in graph.node:
        if node.op_type != "Softmax" or node.input[0] not in products:
            continue
        if node.output[0] in read_by_products:
            maps.update((node.input[0], node.output[0]))
    return frozenset(maps)


def _convolution(node: Any, shape: Callable[[str], Shape]) -> float:
    """Weights are (Cout, Cin / groups, kh, kw)."""
    return 2.0 * math.prod(shape(node.output[0])) * math.prod(shape(node.input[1])[1:])


def _transposed_convolution(node: Any, shape: Callable[[str], Shape]) -> float:
    """Weights are (Cin, Cout / groups, kh, kw)."""
    return 2.0 * math.prod(shape(node.input[0])) * math.prod(shape(node.input[1])[1:])


def _product(node: Any, shape: Callable[[str], Shape]) -> float:
    return 2.0 * math.prod(shape(node.output[0])) * shape(node.input[0])[-1]


def _general_product(node: Any, shape: Callable[[str], Shape]) -> float:
    turned = any(item.name == "transA" and item.i for item in node.attribute)
    return 2.0 * math.prod(shape(node.output[0])) * shape(node.input[0])[0 if turned else -1]


_OPERATIONS: dict[str, Callable[[Any, Callable[[str], Shape]], float]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "Gemm": _general_product,
    "MatMul": _product,
}
