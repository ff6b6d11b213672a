"""Compares an engine's parts and pictures with the float32 reference, where no PyTorch is.

Each stage call and op gets the inputs that the reference made, so that errors do not add up: a
stage's reference is its float32 network in ONNX Runtime on the CPU, an op's its equation in NumPy
and float64 (:mod:`fuseengine.runtime.reference`). Then the whole program runs as frames run it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuseengine.backends import BACKENDS, StageSource
from fuseengine.description import Choice
from fuseengine.engine import Engine
from fuseengine.pairs import Pair, model_inputs
from fuseengine.program import Node, Program, StageVariant, resolve
from fuseengine.report import table
from fuseengine.runtime import ops, reference
from fuseengine.runtime.executor import CpuDevice, Executor

EXACT_DB = 80.0
"""Least signal-to-error ratio of what calls itself float32: rounding alone gives 100 dB or more."""

Array = NDArray[np.float32]


@dataclass
class Part:
    """A stage or an op, over all its calls and all pictures.

    Attributes:
        name: of the stage variant or op.
        how: "openvino/bf16", or where an op runs.
        calls: how many were compared.
        snr_db: worst ratio of the reference's power to the error's, in dB; 200 where equal.
        max_error: largest absolute difference.
        peak: largest absolute value of the reference.
        least_db: what is expected of it; None: the picture decides.
        note: why it was not compared.
    """

    name: str
    how: str
    calls: int = 0
    snr_db: float = 200.0
    max_error: float = 0.0
    peak: float = 0.0
    least_db: float | None = None
    note: str = ""

    @property
    def wrong(self) -> bool:
        """Whether it misses what is expected of it, or gives NaN."""
        return not self.snr_db >= (-math.inf if self.least_db is None else self.least_db)

    def add(self, made: Array, expected: NDArray[Any]) -> None:
        """Take one result of a call into account."""
        difference = np.asarray(made, np.float64) - expected
        power, error = float((expected**2).mean()), float((difference**2).mean())
        ratio = 200.0
        if not math.isfinite(error):
            ratio = math.nan
        elif error:
            ratio = 10 * math.log10(power / error) if power else -math.inf
        # A NaN stays: min() would lose it.
        self.snr_db = self.snr_db if self.snr_db < ratio or math.isnan(self.snr_db) else ratio
        self.max_error = float(np.fmax(self.max_error, np.abs(difference).max()))
        self.peak = max(self.peak, float(np.abs(expected).max()))


@dataclass
class Verification:
    """What was compared; printing it gives tables.

    Attributes:
        parts: stages and ops in the order of the program.
        pictures: name, PSNR in dB (peak 1; 200 where equal) and largest error per fused picture.
        least_db: PSNR that a picture is expected to reach.
    """

    parts: list[Part]
    least_db: float
    pictures: list[tuple[str, float, float]] = field(default_factory=list)

    @property
    def worst(self) -> tuple[str, float, float]:
        """The picture with the lowest PSNR."""
        return min(self.pictures, key=lambda row: -math.inf if math.isnan(row[1]) else row[1])

    @property
    def failures(self) -> list[str]:
        """What misses what is expected of it, in words."""
        found = [
            f"{part.name} ({part.how}): {part.snr_db:.1f} dB, expected {part.least_db or 0:.0f}"
            for part in self.parts
            if part.wrong
        ]
        found += [
            f"picture {name}: {psnr:.1f} dB, expected {self.least_db:.0f}"
            for name, psnr, _ in self.pictures
            if not psnr >= self.least_db
        ]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        parts = [{**vars(part), "wrong": part.wrong} for part in self.parts]
        pictures = [
            {"name": name, "psnr_db": psnr, "max_error": error}
            for name, psnr, error in self.pictures
        ]
        data = {"parts": parts, "pictures": pictures, "failures": self.failures}
        for row in (*parts, *pictures):
            for key, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    row[key] = None
        return data

    def __str__(self) -> str:
        rows = [["part", "runs on", "calls", "error dB", "max error", "of values up to", ""]]
        for part in self.parts:
            if part.note:
                rows.append([part.name, part.how, "-", "-", "-", "-", part.note])
                continue
            rows.append(
                [
                    part.name,
                    part.how,
                    str(part.calls),
                    _decibels(part.snr_db),
                    f"{part.max_error:.2g}",
                    f"{part.peak:.3g}",
                    "WRONG" if part.wrong else "",
                ]
            )
        name, psnr, error = self.worst
        count = f"{len(self.pictures)} pictures" if len(self.pictures) > 1 else "1 picture"
        return (
            f"{table(rows)}\n{count}, worst {name}: PSNR {_decibels(psnr)} dB, max error "
            f"{error:.2g} (expected {self.least_db:.0f} dB)"
        )


def _decibels(value: float) -> str:
    return "equal" if value >= 200.0 else f"{value:.1f}"


def verify(engine: Engine, examples: Iterable[tuple[str, Any, Any]]) -> Verification:
    """Compare everything that an engine computes with the float32 reference.

    Args:
        engine: loaded from a bundle, or with ONNX stages; nobody may fuse meanwhile.
        examples: name, infrared and visible frame per picture, of the engine's size.

    Returns:
        The comparison.

    Raises:
        FrameError: a frame that cannot be used.
    """
    parts: dict[str, Part] = {}
    exact = all(precision == "fp32" for _, precision in engine.choice.values())
    result = Verification([], EXACT_DB if exact else engine.report.guard_db)
    references: dict[tuple[int, int], _Reference] = {}
    for name, infrared, visible in examples:
        size = (visible.shape[0], visible.shape[1])
        executor = engine.executor(size)
        if size not in references:
            references = {size: _Reference(engine.program, engine.source, executor, engine.threads)}
        for pair in model_inputs(engine.program, size, [(infrared, visible)]):
            expected = _compare(executor, engine.choice, references[size], pair, parts)
            result.pictures.append((name, *_picture_error(executor, pair, expected)))
    result.parts = list(parts.values())
    return result


def _compare(
    executor: Executor,
    choice: Choice,
    runner: _Reference,
    pair: Pair,
    parts: dict[str, Part],
) -> Array:
    """Compare node by node; the reference's fused picture."""
    values = runner.start(pair)
    for index, node in enumerate(executor.nodes):
        given = [values[n] for n in node.inputs]
        expected = runner.compute(node, given)
        made = executor.replay(index, [_framed(executor, node, x) for x in given])
        part = _part(parts, node, choice, executor)
        part.calls += 1
        for have, want in zip(made, expected, strict=True):
            part.add(have, _framed(executor, node, want))
        values.update(zip(node.made(), (np.float32(x) for x in expected), strict=True))
    return values[executor.program.output]


def _part(parts: dict[str, Part], node: Node, choice: Choice, executor: Executor) -> Part:
    if node.kind == "op":
        where = "native" if isinstance(executor.device, CpuDevice) else "GPU"
        return parts.setdefault(node.target, Part(node.target, where, least_db=EXACT_DB))
    variant = StageVariant.of(node)
    backend, precision = choice[variant]
    least = EXACT_DB if precision == "fp32" else None
    return parts.setdefault(
        f"stage {variant.label}",
        Part(f"stage {variant.label}", f"{backend}/{precision}", least_db=least),
    )


def _framed(executor: Executor, node: Node, array: Array) -> Array:
    """The part of a value that the node sees."""
    if node.target not in ops.FRAMED:
        return array
    return array[..., : executor.frame[0], : executor.frame[1]]


def _picture_error(executor: Executor, pair: Pair, expected: Array) -> tuple[float, float]:
    """PSNR in dB (peak 1) and largest error of the fused picture, inside the frame."""
    device, (height, width) = executor.device, executor.frame
    for target, array in zip(executor.inputs, pair, strict=True):
        device.host(target)[...] = array
        device.send(target)
    executor.run()
    fused = device.fetch(executor.output)[..., :height, :width].astype(np.float64)
    difference = fused - expected[..., :height, :width]
    square = float((difference**2).mean())
    if not math.isfinite(square):
        return math.nan, math.inf
    psnr = -10 * math.log10(square) if square else 200.0
    return psnr, float(np.abs(difference).max())


class _Reference:
    """Computes nodes in float32 (stages) and float64 (ops), on values of full size."""

    def __init__(
        self, program: Program, source: StageSource, executor: Executor, threads: int
    ) -> None:
        self.program, self.source, self.executor = program, source, executor
        self.threads = threads
        self._stages: dict[StageVariant, Callable[[Sequence[Array]], list[Array]]] = {}

    def start(self, pair: Pair) -> dict[str, Array]:
        """The values that no node computes per frame."""
        values = dict(zip(self.program.inputs, pair, strict=True))
        values.update(self.program.constants)
        values.update(self.executor.made_once())
        return values

    def compute(self, node: Node, given: Sequence[Array]) -> list[Any]:
        """The node's results, of full size even where it sees the frame's part alone."""
        if node.kind == "stage":
            return self._stage(node, given)
        made = reference.compute(
            node.target, [_framed(self.executor, node, x) for x in given], node.attrs
        )
        if node.target in ops.FRAMED:
            whole = np.zeros_like(given[0], np.float64)
            whole[..., : made.shape[-2], : made.shape[-1]] = made
            made = whole
        return [made]

    def _stage(self, node: Node, given: Sequence[Array]) -> list[Array]:
        variant = StageVariant.of(node)
        if variant not in self._stages:
            shapes = tuple(x.shape for x in given)
            lowered = BACKENDS["onnxruntime"].lower(
                self.source, variant, shapes, precision="fp32", device="cpu", threads=self.threads
            )
            device = CpuDevice()
            inputs = [device.empty(shape) for shape in shapes]
            outputs = [device.empty(self._shape(name)) for name in node.made()]
            call = lowered.bind(inputs, outputs)

            def run(arrays: Sequence[Array]) -> list[Array]:
                for target, array in zip(inputs, arrays, strict=True):
                    target[...] = array
                call()
                return [output.copy() for output in outputs]

            self._stages[variant] = run
        return self._stages[variant](given)

    def _shape(self, name: str) -> tuple[int, ...]:
        return resolve(self.program.values[name].shape, self.executor.size)
