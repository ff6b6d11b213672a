"""Frames one after the other on a GPU: the copies of one while another is computed. No torch."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fuseengine.errors import FrameError, SettingError
from fuseengine.runtime.executor import Executor
from fuseengine.runtime.frames import FrameAdapter, FramePair, prepare_pair
from fuseengine.runtime.gpu_frames import Plan
from fuseengine.runtime.lanes import Lanes

SLOTS = 2
"""Frames under way. While one is computed, the one before is fetched or the one behind is loaded;
more would only wait, and be older when their turn comes."""


class Slot:
    """What one frame on its way needs: memory on both sides, and marks.

    A captured graph reads and writes fixed addresses. So the slot has arrays of its own on the
    device, and copies between them and the graph's in the compute lane. A graph per slot would save
    three copies within the device's memory, which are far below a hundredth of a frame's time, and
    cost a second capture and a second set of all buffers.

    Attributes:
        inputs: arrays of the host to fill with a frame's planes, while the slot is free.
    """

    def __init__(self, executor: Executor, lanes: Lanes) -> None:
        """Make the memory.

        Args:
            executor: what computes the frames.
            lanes: of its device.
        """
        self.executor, self._lanes = executor, lanes
        shapes = [tuple(array.shape) for array in executor.inputs]
        self._hosts = [lanes.pinned(shape) for shape in shapes]
        self._staged = [lanes.empty(shape) for shape in shapes]
        self._fused = lanes.empty(tuple(executor.output.shape))
        self._fused_host = lanes.pinned(tuple(executor.output.shape))
        self.inputs: tuple[NDArray[np.float32], ...] = tuple(map(np.asarray, self._hosts))
        self._loaded, self._computed, self._done = (lanes.mark() for _ in range(3))
        # New memory may be some that the compute lane has still to fill, or to read.
        lanes.synchronize()

    def start(self) -> None:
        """Queue the frame in :attr:`inputs`; waits for nothing.

        Raises:
            Exception: what queueing raised; nothing of the frame is under way then.
        """
        executor = self.executor
        into, compute, out = self._lanes.into, self._lanes.compute, self._lanes.out
        try:
            for staged, host in zip(self._staged, self._hosts, strict=True):
                into.send(staged, host)
            into.record(self._loaded)
            compute.after(self._loaded)
            for target, staged in zip(executor.inputs, self._staged, strict=True):
                compute.copy(target, staged)
            with compute.active():
                executor.run()
            compute.copy(self._fused, executor.output)
            compute.record(self._computed)
            out.after(self._computed)
            out.fetch(self._fused_host, self._fused)
            out.record(self._done)
        except BaseException:
            # What was queued would meet the next frame in this memory.
            for lane in (into, compute, out):
                lane.record(self._done)
                self._done.synchronize()
            raise

    def computed(self) -> None:
        """Wait until the device has nothing more to compute of this frame."""
        self._computed.synchronize()

    def result(self) -> NDArray[np.float32]:
        """Wait for this slot's frame, and for nothing behind it.

        Returns:
            The fused planes (1, C, H, W), in memory that the slot's next frame overwrites.
        """
        self._done.synchronize()
        return np.asarray(self._fused_host)


class Ticket:
    """A frame that is under way; made by :meth:`Pipelined.submit`."""

    def __init__(
        self, owner: Pipelined, slot: Slot, adapter: FrameAdapter, pair: FramePair, visible: Any
    ) -> None:
        """Private: call :meth:`Pipelined.submit`."""
        self._owner, self._slot = owner, slot
        self._adapter, self._pair, self._visible = adapter, pair, visible
        self._taken = self._over = False

    def computed(self) -> None:
        """Wait until the device can compute another frame; this one may still be on its way."""
        if not self._over:
            self._slot.computed()

    def result(self) -> Any:
        """Wait for the frame, and make room for another; once, from any thread.

        Returns:
            The fused frame, the caller's own, in the kind, shape and dtype of the visible one.

        Raises:
            SettingError: the result was taken before.
        """
        if self._taken:
            raise SettingError("a frame's result was taken before; expected one call of result()")
        self._taken = True
        try:
            fused = self._adapter.store(self._slot.result(), self._visible)
        finally:
            self._over = True  # the slot's marks are another frame's from here on
            self._owner._release(self._slot)
        return self._pair.restore([fused])


class Pipelined:
    """Fuses pairs on a GPU, two of them under way. See :meth:`fuseengine.engine.Engine.pipelined`.

    ::

        with engine.pipelined() as pipeline:
            for fused in pipeline.map(zip(infrared_frames, visible_frames)):
                show(fused)

    :meth:`map` serves a loop. Where frames come one by one, a thread calls :meth:`submit` and
    another one takes the results from the tickets. Pictures are those of the engine's own calls,
    bit for bit; such calls may be made meanwhile.
    """

    def __init__(self, plan: Plan, queueing: threading.Lock) -> None:
        """Allocates nothing before the first frame.

        Args:
            plan: of the engine: frame size -> what it runs frames of that size with.
            queueing: the engine's lock, held while memory is made or a frame queued, none of
                which may get into a graph that another thread captures.
        """
        self._plan, self._queueing = plan, queueing
        self._state = threading.Lock()
        self._busy: list[Slot] = []
        self._free: list[Slot] = []
        self._closed = False

    def submit(
        self,
        infrared: Any,
        visible: Any,
        *,
        resize: Literal["infrared"] | None = None,
        infrared_range: tuple[float, float] | Literal["minmax"] | None = None,
    ) -> Ticket:
        """Start to fuse a pair; returns when it is queued.

        Args:
            infrared: a frame of the host, as an engine takes it; no batch.
            visible: likewise. The result needs it again: do not change it before.
            resize: as for an engine.
            infrared_range: as for an engine.

        Raises:
            FrameError: a frame that cannot be used; frames under way are not touched. As for an
                engine, SizeMismatchError where sizes do not fit.
            SettingError: two frames are under way, or the pipeline is closed.
        """
        pair = prepare_pair(infrared, visible, resize=resize, infrared_range=infrared_range)
        if len(pair) != 1:
            raise FrameError(
                f"got a batch of {len(pair)} pairs, expected one pair: submit one after the other"
            )
        with self._queueing:
            adapter, executor = self._plan(pair.size)
            slot = self._slot(executor)
        try:
            ((given_infrared, given_visible),) = pair
            adapter.load(given_infrared, given_visible, *slot.inputs)
            with self._queueing:
                self._check_open()
                slot.start()
        except BaseException:
            self._release(slot)
            raise
        return Ticket(self, slot, adapter, pair, given_visible)

    def map(
        self,
        pairs: Iterable[tuple[Any, Any]],
        *,
        resize: Literal["infrared"] | None = None,
        infrared_range: tuple[float, float] | Literal["minmax"] | None = None,
    ) -> Iterator[Any]:
        """Fuse pairs in their order; the device computes one while the caller has another.

        Args:
            pairs: infrared and visible frames, as :meth:`submit` takes them.
            resize: as for an engine.
            infrared_range: as for an engine.

        Returns:
            An iterator over the fused frames. What goes wrong with a frame, or in ``pairs``, is
            raised in its place, after the frames before it.
        """
        waiting: deque[Ticket] = deque()
        error: BaseException | None = None
        remaining = iter(pairs)
        try:
            while error is None:
                try:
                    given = next(remaining)
                    ticket = self.submit(*given, resize=resize, infrared_range=infrared_range)
                except StopIteration:
                    break
                except Exception as raised:
                    error = raised
                    break
                waiting.append(ticket)
                if len(waiting) == SLOTS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for ticket in waiting:  # nobody wants these any more
                ticket.result()
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for what is under way. Results can still be taken; nothing more can be submitted."""
        with self._queueing:
            self._closed = True
        with self._state:
            busy, self._free = list(self._busy), []
        for slot in busy:
            slot.result()

    def __enter__(self) -> Pipelined:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Memory may not go while a copy to or from it is under way. No lock: this may run anywhere.
        with contextlib.suppress(Exception):
            for slot in self._busy:
                slot.result()

    def _check_open(self) -> None:
        if self._closed:
            raise SettingError("the pipeline is closed; expected frames before, or a new pipeline")

    def _slot(self, executor: Executor) -> Slot:
        with self._state:
            self._check_open()
            if len(self._busy) >= SLOTS:
                raise SettingError(
                    f"{SLOTS} frames are under way, which is all that a pipeline takes; take a "
                    "ticket's result() before the next submit(), or use map()"
                )
            # Frames of another size: the memory of the size before goes.
            self._free = [slot for slot in self._free if slot.executor is executor]
            slot = self._free.pop() if self._free else _new_slot(executor)
            self._busy.append(slot)
        return slot

    def _release(self, slot: Slot) -> None:
        with self._state:
            self._busy.remove(slot)
            if not self._closed:
                self._free.append(slot)


def _new_slot(executor: Executor) -> Slot:
    lanes = executor.device.lanes()
    if lanes is None:
        raise SettingError(
            "a pipeline on the CPU, which has nothing to overlap; expected an engine on a GPU: "
            "call the engine itself"
        )
    return Slot(executor, lanes)
