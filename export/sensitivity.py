"""Which layers must stay float, so that the int8 rest keeps the fused picture within the guard.

Each layer is judged by what counts: the error of the *fused picture* when it alone is int8. From
the order that this gives, the shortest head that must stay float is found by bisection (all other
layers int8 together), and what the order misjudged is then put back one by one. A stage in which no
layer survives is float as a whole. The judging runs an emulation (:func:`export.qdq.switchable`),
so a set of layers costs one run of the program on a few pictures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from fuseengine.backends.onnxruntime import session_options
from fuseengine.export.qdq import SWITCHES, Layer, switchable
from fuseengine.pairs import Pair
from fuseengine.program import Program, StageVariant
from fuseengine.runtime.executor import Executor

Item = tuple[StageVariant, str]
"""A layer of a program: the network it is in, and its node."""

_LEAST_GROUPS = 8
_RANKING = 2
"""Pictures that single layers are judged on."""


class Emulation:
    """A program in float32 some of whose layers are rounded as int8 would be.

    Args:
        program: the captured model.
        networks: its networks in float32.
        layers: the layers that can be int8, per network.
        ranges: their tensors' ranges, per network.
        outputs: whether results are rounded, see :func:`fuseengine.export.qdq.quantise`.
        threads: CPU threads.
    """

    def __init__(
        self,
        program: Program,
        networks: Mapping[StageVariant, onnx.ModelProto],
        layers: Mapping[StageVariant, Sequence[Layer]],
        ranges: Mapping[StageVariant, Mapping[str, float]],
        *,
        outputs: bool = True,
        threads: int = 1,
    ) -> None:
        self.program = program
        self.places = {v: {layer.node: i for i, layer in enumerate(layers[v])} for v in layers}
        self.runners = {
            v: _Switched(
                switchable(network, ranges[v], layers[v], outputs=outputs), len(layers[v]), threads
            )
            for v, network in networks.items()
        }
        self._executors: dict[tuple[int, int], Executor] = {}

    @property
    def items(self) -> list[Item]:
        """All layers that can be switched, in the order of the networks."""
        return [(variant, node) for variant, nodes in self.places.items() for node in nodes]

    def fuse(self, pair: Pair, floats: set[Item]) -> NDArray[np.float32]:
        """The fused picture with these layers in float32 and all others rounded."""
        for variant, nodes in self.places.items():
            switches = self.runners[variant].switches
            for node, place in nodes.items():
                switches[place] = (variant, node) in floats
        size = (pair[0].shape[2], pair[0].shape[3])
        if size not in self._executors:
            self._executors[size] = Executor(self.program, size, self.runners)
        executor = self._executors[size]
        for target, source in zip(executor.inputs, pair, strict=True):
            target[...] = source
        executor.run()
        return executor.output.copy()


class _Switched:
    """A stage runner of a switchable network; the switches are read at every call."""

    def __init__(self, model: onnx.ModelProto, layers: int, threads: int) -> None:
        import onnxruntime as ort

        options = session_options(threads)
        # Setting up costs more than the runs on small pictures; higher levels nearly double it.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self.session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [v.name for v in self.session.get_inputs() if v.name != SWITCHES]
        self.outputs = [v.name for v in self.session.get_outputs()]
        self.switches = np.ones(layers, dtype=np.bool_)

    def bind(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Callable[[], object]:
        given = dict(zip(self.inputs, inputs, strict=True))
        given[SWITCHES] = self.switches

        def call() -> None:
            for target, made in zip(outputs, self.session.run(self.outputs, given), strict=True):
                target[...] = made

        return call


@dataclass(frozen=True)
class Selection:
    """What the search found.

    Attributes:
        floats: layers that stay float.
        alone: mean square error of the fused picture when one group of layers alone is int8, the
            worst group first; empty when everything may be int8.
        psnr_db: worst PSNR over the pictures with all other layers int8.
        max_error: the largest absolute error.
        evaluations: pictures that were fused for it.
        seconds: that it took.
    """

    floats: frozenset[Item]
    alone: tuple[tuple[tuple[Item, ...], float], ...]
    psnr_db: float
    max_error: float
    evaluations: int
    seconds: float


class Judge:
    """Compares fused pictures with their references.

    Args:
        emulation: makes them.
        pairs: model inputs, those that are quick to fuse first.
        references: what float32 makes of them.
    """

    def __init__(
        self, emulation: Emulation, pairs: Sequence[Pair], references: Sequence[NDArray[np.float32]]
    ) -> None:
        self.emulation, self.pairs, self.references = emulation, list(pairs), list(references)
        self.evaluations = 0

    def squares(self, floats: set[Item], most: int | None = None) -> list[float]:
        """Mean square error of the first pictures, all by default."""
        return [self._errors(number, floats)[0] for number in range(len(self.pairs))[:most]]

    def worst(
        self, floats: set[Item], least_db: float = -np.inf, most_error: float = np.inf
    ) -> tuple[float, float]:
        """Worst PSNR in dB (peak 1; 200 for equal pictures) and largest absolute error.

        Pictures after the first that misses ``least_db`` or ``most_error`` are not looked at.
        """
        psnr, error = 200.0, 0.0
        for number in range(len(self.pairs)):
            square, most = self._errors(number, floats)
            psnr = min(psnr, -10 * float(np.log10(square))) if square else psnr
            error = max(error, most)
            if not (psnr >= least_db and error <= most_error):
                break
        return psnr, error

    def _errors(self, number: int, floats: set[Item]) -> tuple[float, float]:
        self.evaluations += 1
        fused = self.emulation.fuse(self.pairs[number], floats)
        difference = fused.astype(np.float64) - self.references[number]
        return float((difference**2).mean()), float(np.abs(difference).max())


def fewest_floats(
    judge: Judge, *, guard_db: float, max_error: float, seconds: float = 60.0
) -> Selection:
    """Find a small set of layers to keep float.

    Args:
        judge: the emulation with its pictures.
        guard_db: least PSNR of every fused picture against float32, in dB.
        max_error: largest absolute error allowed.
        seconds: time to spend, about. Where single layers would take longer, neighbours are judged
            together.

    Returns:
        The layers, and what was seen on the way. All of them, where nothing else is enough.
    """
    begin = time.perf_counter()
    items = judge.emulation.items
    tries: dict[frozenset[Item], tuple[float, float]] = {}

    def passes(floats: set[Item]) -> bool:
        key = frozenset(floats)
        if key not in tries:
            tries[key] = judge.worst(floats, guard_db, max_error)
        psnr, error = tries[key]
        return psnr >= guard_db and error <= max_error

    def selected(floats: set[Item], alone: list[tuple[tuple[Item, ...], float]]) -> Selection:
        passes(floats)
        spent = time.perf_counter() - begin
        key = frozenset(floats)
        return Selection(key, tuple(alone), *tries[key], judge.evaluations, spent)

    if passes(set()):
        return selected(set(), [])
    one = time.perf_counter()
    judge.squares(set(), _RANKING)
    one = time.perf_counter() - one
    groups = _groups(items, max(_LEAST_GROUPS, int(0.6 * seconds / one)))
    alone = [
        (group, float(np.mean(judge.squares(set(items).difference(group), _RANKING))))
        for group in groups
    ]
    alone.sort(key=lambda entry: -entry[1])

    def head(count: int) -> set[Item]:
        return {item for group, _ in alone[:count] for item in group}

    low, high = 0, len(alone)  # head(low) fails, head(high) passes
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(head(middle)) else (middle, high)
    floats = head(high)
    for group, _ in reversed(alone[:high]):
        if time.perf_counter() - begin > seconds:
            break
        if passes(floats.difference(group)):
            floats.difference_update(group)
    return selected(floats, alone)


def _groups(items: Sequence[Item], count: int) -> list[tuple[Item, ...]]:
    """Neighbouring items of one network together, about so many groups."""
    size = -(-len(items) // count)
    groups: list[list[Item]] = []
    for item in items:
        if not groups or len(groups[-1]) == size or groups[-1][0][0] != item[0]:
            groups.append([])
        groups[-1].append(item)
    return [tuple(group) for group in groups]
