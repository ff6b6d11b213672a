"""Runs a program: a list of bound calls over buffers made beforehand. No torch.

Nothing is looked up, allocated or decided while a frame is fused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fuseengine import _native
from fuseengine.errors import CaptureError
from fuseengine.program import Node, Program, StageVariant, resolve
from fuseengine.runtime import ops
from fuseengine.runtime.lanes import Lanes

Call = Callable[[], object]


class StageRunner(Protocol):
    """A lowered stage variant for one picture size."""

    def bind(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Call:
        """A call that computes the outputs (only the used results) from the inputs, in place.

        Arrays keep their addresses as long as the call is used. Calls of one runner are made one
        after the other, never at once.
        """


class Device(Protocol):
    """Where arrays live and ops run."""

    def empty(self, shape: tuple[int, ...]) -> Any:
        """A float32 array, contiguous."""

    def constant(self, array: NDArray[np.float32]) -> Any:
        """An array of the device with these values."""

    def bind_op(self, node: Node, inputs: Sequence[Any], output: Any) -> Call:
        """The call that computes an op in place."""

    def wrap(self, calls: Sequence[Call]) -> Call:
        """One call that makes all of them (on a GPU: a captured graph)."""

    def active(self) -> AbstractContextManager[object]:
        """What calls are bound, and made one by one, inside of (on a GPU: its stream)."""

    def host(self, array: Any) -> NDArray[np.float32]:
        """The host's side of an array of the device: the array itself where there is no other."""

    def send(self, array: Any) -> None:
        """Start to copy an array from its host's side."""

    def fetch(self, array: Any) -> NDArray[np.float32]:
        """The host's side of an array, with what stands in the array when all calls are done."""

    def synchronize(self) -> None:
        """Wait until everything called has been done."""

    def lanes(self) -> Lanes | None:
        """Where copies run beside computation; None: the device is the host, and has none."""


class CpuDevice:
    """NumPy arrays and the project's native ops.

    Args:
        threads: that native ops may use (process-wide, as in every such library); None leaves it.
    """

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None:
            _native.set_num_threads(threads)

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A float32 array; 64-byte aligned, as runtimes like it."""
        count = int(np.prod(shape))
        raw = np.zeros(count * 4 + 64, dtype=np.uint8)
        offset = -raw.ctypes.data % 64
        return raw[offset : offset + count * 4].view(np.float32).reshape(shape)

    def constant(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """The array itself, contiguous."""
        out = self.empty(array.shape)
        out[...] = array
        return out

    def bind_op(self, node: Node, inputs: Sequence[Any], output: Any) -> Call:
        """See :func:`fuseengine.runtime.ops.bind`."""
        return ops.bind(node.target, inputs, output, node.attrs)

    def wrap(self, calls: Sequence[Call]) -> Call:
        """A loop."""
        calls = tuple(calls)

        def run() -> None:
            for call in calls:
                call()

        return run

    def active(self) -> AbstractContextManager[object]:
        """Nothing."""
        return nullcontext()

    def host(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """The array."""
        return array

    def send(self, array: NDArray[np.float32]) -> None:
        """It is there."""

    def fetch(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """The array."""
        return array

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def lanes(self) -> None:
        """None: there is nothing to copy."""


@dataclass(frozen=True)
class Timing:
    """Time of one node over several runs, in milliseconds."""

    label: str
    variant: StageVariant | None
    samples: NDArray[np.float64]


class Executor:
    """A program bound to a picture size, a device and lowered stages.

    Attributes:
        inputs: arrays (N, C, H, W) to fill with sources a and b, and where the program has a third
            input the fused image of the frame before, ahead of :meth:`run`.
        output: array that holds the fused picture after it.
    """

    def __init__(
        self,
        program: Program,
        size: tuple[int, int],
        runners: Mapping[StageVariant, StageRunner],
        device: Device | None = None,
        frame: tuple[int, int] | None = None,
        given: Sequence[Any] = (),
    ) -> None:
        """Bind everything.

        Args:
            program: what to run.
            size: padded height and width; multiples of ``program.multiple``.
            runners: a lowered network, for this size, per variant in ``program.variants()``.
            device: where to run; the CPU by default.
            frame: height and width of the part, at the upper left, that a frame covers; the rest
                is padding. All of it by default.
            given: arrays to take as the first inputs, those of an executor on the same device.

        Raises:
            CaptureError: the program does not fit the size or names unknown ops.
        """
        self.program, self.size, self.frame = program, size, frame or size
        self.device: Device = device or CpuDevice()
        arrays = self._place(given)
        self._arrays = arrays
        self.inputs = tuple(arrays[name] for name in program.inputs)
        self.output = arrays[program.output]
        self.runners = dict(runners)
        self._calls: list[tuple[Node, Call]] = []
        self._operands: list[tuple[list[Any], list[Any]]] = []
        for node in program.nodes:
            if _is_made(node):
                continue
            given = [arrays[name] for name in node.inputs]
            made = [arrays[name] for name in node.made()]
            if node.target in ops.FRAMED:
                given, made = (
                    [x[..., : self.frame[0], : self.frame[1]] for x in xs] for xs in (given, made)
                )
            if node.kind == "stage":
                with self.device.active():
                    call = runners[StageVariant.of(node)].bind(given, made)
            else:
                call = self.device.bind_op(node, given, made[0])
            self._calls.append((node, call))
            self._operands.append((given, made))
        self._run: Call | None = None

    def of_frame(self, frame: tuple[int, int]) -> Executor:
        """This executor if it serves such frames, else one with buffers of its own.

        Both share the lowered stages, so they must not run at once.
        """
        if frame == self.frame or not any(n.target in ops.FRAMED for n in self.program.nodes):
            return self
        return Executor(self.program, self.size, self.runners, self.device, frame)

    def resumed(self, program: Program) -> Executor:
        """One for a program that goes on from the frame before, on this one's inputs and stages.

        Both share the lowered stages, so they must not run at once.

        Args:
            program: whose stages are among this executor's.

        Raises:
            CaptureError: one is not.
        """
        missing = [v.label for v in program.variants() if v not in self.runners]
        if missing:
            raise CaptureError(f"the stages {missing} are not those of {self.program.model}")
        return Executor(program, self.size, self.runners, self.device, self.frame, self.inputs)

    def run(self) -> None:
        """Fuse what stands in the input arrays; the result stands in ``output``."""
        if self._run is None:
            self._run = self.device.wrap([call for _, call in self._calls])
        self._run()

    def run_timed(self) -> list[float]:
        """Like :meth:`run`, call by call; the milliseconds of each node."""
        times = []
        self.device.synchronize()
        with self.device.active():
            for _, call in self._calls:
                begin = time.perf_counter()
                call()
                self.device.synchronize()
                times.append((time.perf_counter() - begin) * 1e3)
        return times

    def made_once(self) -> dict[str, NDArray[np.float32]]:
        """Values that depend on the picture's size alone, such as the starting noise."""
        nodes = filter(_is_made, self.program.nodes)
        names = [name for node in nodes for name in node.made()]
        return {name: np.array(self.device.fetch(self._arrays[name])) for name in names}

    @property
    def nodes(self) -> list[Node]:
        """The nodes that are computed per frame, in order."""
        return [node for node, _ in self._calls]

    def replay(
        self, index: int, inputs: Sequence[NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        """Compute one node alone; what the buffers held is lost.

        Args:
            index: of the node in :attr:`nodes`.
            inputs: its inputs, of the size that its buffers have.

        Returns:
            Its results.
        """
        given, made = self._operands[index]
        with self.device.active():
            for target, source in zip(given, inputs, strict=True):
                target[...] = self.device.constant(source)
            self._calls[index][1]()
        return [np.array(self.device.fetch(array)) for array in made]

    def profile(self, runs: int) -> list[Timing]:
        """Time each node over several runs of the whole program."""
        return self.timings([self.run_timed() for _ in range(runs)])

    def timings(self, runs: Sequence[Sequence[float]]) -> list[Timing]:
        """What several calls of :meth:`run_timed` gave, per node."""
        samples = np.array(runs, dtype=np.float64).T
        return [
            Timing(
                node.target if node.kind == "op" else StageVariant.of(node).label,
                StageVariant.of(node) if node.kind == "stage" else None,
                samples[index],
            )
            for index, (node, _) in enumerate(self._calls)
        ]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all distinct buffers, constants included."""
        seen = {id(owner): owner for owner in map(_owner, self._arrays.values())}
        return sum(owner.nbytes for owner in seen.values())

    def _place(self, given: Sequence[Any]) -> dict[str, Any]:
        """Give every value an array; one whose reader is gone serves the next of its shape."""
        program = self.program
        last = {name: index for index, node in enumerate(program.nodes) for name in node.inputs}
        last[program.output] = len(program.nodes)
        keep = {*program.inputs, *program.constants, program.output}
        arrays = {name: self.device.constant(a) for name, a in program.constants.items()}
        arrays |= dict(zip(program.inputs, given, strict=False))
        for name in program.inputs[len(given) :]:
            arrays[name] = self.device.empty(resolve(program.values[name].shape, self.size))
        for node in filter(_is_made, program.nodes):
            for name in node.made():
                shape = resolve(program.values[name].shape, self.size)
                arrays[name] = self.device.constant(ops.MAKERS[node.target](shape, node.attrs))
                keep.add(name)
        free: dict[tuple[int, ...], list[Any]] = {}
        for index, node in enumerate(program.nodes):
            if _is_made(node):
                continue
            dying = [n for n in dict.fromkeys(node.inputs) if n not in keep and last[n] == index]
            in_place = ops.OPS[node.target].in_place if node.target in ops.OPS else ()
            reusable = [n for n in dying if node.inputs.index(n) in in_place]
            for name in node.made():
                shape = resolve(program.values[name].shape, self.size)
                same = [n for n in reusable if tuple(arrays[n].shape) == shape]
                if node.kind == "op" and same:
                    arrays[name] = arrays[same[0]]
                    dying.remove(same[0])
                elif free.get(shape):
                    arrays[name] = free[shape].pop()
                else:
                    arrays[name] = self.device.empty(shape)
                if name not in last:
                    dying.append(name)
            for name in dying:
                free.setdefault(tuple(arrays[name].shape), []).append(arrays[name])
        return arrays


def _is_made(node: Node) -> bool:
    """Whether the node's result is known when the picture's size is."""
    return node.kind == "op" and node.target in ops.MAKERS


def _owner(array: Any) -> Any:
    base = array
    while getattr(base, "base", None) is not None:
        base = base.base
    return base
