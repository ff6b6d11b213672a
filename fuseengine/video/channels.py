"""What the stages of a stream hand frames through: bounded, and closed from either side."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from fuseengine.video.frames import CameraFrame
from fuseengine.video.pairing import CAMERAS, Pair, Pairer

T = TypeVar("T")


class Finished(Exception):
    """Nothing more comes, or nobody wants more."""


class Channel(Generic[T]):
    """A bounded queue from one thread to another.

    Attributes:
        dropped: items that gave way to newer ones.
    """

    def __init__(self, capacity: int, *, newest: bool) -> None:
        """Describes the channel.

        Args:
            capacity: items that may wait.
            newest: a full channel drops its oldest item; otherwise putting waits.
        """
        self._items: deque[T] = deque()
        self._capacity, self._newest = capacity, newest
        self._changed = threading.Condition()
        self._finished = False
        self._promised, self._takers = 0, 0
        self.dropped = 0

    def put(self, item: T, *, promised: bool = False) -> None:
        """Add an item.

        Args:
            item: what to add.
            promised: room for it was reserved.

        Raises:
            Finished: the channel was closed.
        """
        with self._changed:
            while len(self._items) >= self._capacity and not self._finished:
                if self._newest:
                    self._items.popleft()
                    self.dropped += 1
                else:
                    self._changed.wait()
            if self._finished:
                raise Finished
            self._items.append(item)
            self._promised -= promised
            self._changed.notify_all()

    def reserve(self) -> None:
        """Wait until one item more than those promised would be taken without waiting; promise it.

        A thread that waits in :meth:`get` counts as room for one.

        Raises:
            Finished: the channel was closed.
        """
        with self._changed:
            while not self._finished and (
                len(self._items) + self._promised >= self._capacity + self._takers
            ):
                self._changed.wait()
            if self._finished:
                raise Finished
            self._promised += 1

    def forgo(self) -> None:
        """A promised item does not come."""
        with self._changed:
            self._promised -= 1
            self._changed.notify_all()

    def wait_for_room(self) -> None:
        """Wait until putting would not wait.

        Raises:
            Finished: the channel was closed.
        """
        with self._changed:
            while len(self._items) >= self._capacity and not self._finished:
                self._changed.wait()
            if self._finished:
                raise Finished

    def get(self, skip: Callable[[T], bool] | None = None) -> T:
        """Wait for the oldest item.

        Args:
            skip: whether an item that is no longer worth it gives way to the one behind it.

        Raises:
            Finished: the channel was closed, or is empty and nothing more comes.
        """
        with self._changed:
            while not self._items:
                if self._finished:
                    raise Finished
                self._takers += 1
                self._changed.notify_all()
                self._changed.wait()
                self._takers -= 1
            item = self._items.popleft()
            while skip is not None and self._items and skip(item):
                self.dropped += 1
                item = self._items.popleft()
            self._changed.notify_all()
            return item

    def finish(self) -> None:
        """Nothing more comes; what waits can still be taken."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody wants more: what waits is forgotten."""
        with self._changed:
            self._finished = True
            self._items.clear()
            self._changed.notify_all()


class PairBox:
    """Where two capture threads put frames and the next stage takes pairs."""

    def __init__(
        self,
        pairer: Pairer,
        *,
        capacity: int,
        live: bool,
        stall_s: float,
        on_stall: Callable[[int, float], None],
    ) -> None:
        """Describes the box.

        Args:
            pairer: finds the pairs.
            capacity: frames of a camera that may wait, at least 2.
            live: a full box drops the camera's oldest frame; otherwise putting waits.
            stall_s: a live camera that gives nothing for so long stalls.
            on_stall: called once per stall with the camera and the seconds without a frame.
        """
        self._pairer, self._capacity = pairer, capacity
        self._live, self._stall_s, self._on_stall = live, stall_s, on_stall
        self._changed = threading.Condition()
        self._closed = False
        now = time.monotonic()
        self._arrived = [now, now]
        self._stalled = [False, False]
        self._ended = [False, False]

    def put(self, camera: int, frame: CameraFrame) -> float | None:
        """A camera's next frame.

        Returns:
            The seconds that the camera had stalled before this frame, if it had.

        Raises:
            Finished: the box was closed.
        """
        with self._changed:
            while self._pairer.waiting(camera) >= self._capacity and not self._over():
                if self._live:
                    self._pairer.give_up(camera)
                else:
                    self._changed.wait()
            if self._over():
                raise Finished
            now = time.monotonic()
            gap = now - self._arrived[camera] if self._stalled[camera] else None
            self._arrived[camera], self._stalled[camera] = now, False
            self._pairer.add(camera, frame)
            self._changed.notify_all()
            return gap

    def end(self, camera: int) -> None:
        """A camera has no more frames."""
        with self._changed:
            self._ended[camera] = True
            self._pairer.end(camera)
            self._changed.notify_all()

    def take(self) -> Pair:
        """Wait for the next pair.

        Raises:
            Finished: the box was closed, or no pair can come any more.
        """
        while True:
            with self._changed:
                pair = None if self._closed else self._pairer.next(patient=not self._live)
                if pair is not None:
                    self._changed.notify_all()
                    return pair
                if self._over():
                    self._pairer.give_up_all()
                    self._changed.notify_all()
                    raise Finished
                # Pairing may have made room.
                self._changed.notify_all()
                self._changed.wait(self._until_stall())
                stalls = self._new_stalls()
            for camera, seconds in stalls:  # outside the lock: a listener may take its time
                self._on_stall(camera, seconds)

    def close(self) -> None:
        """Nobody wants more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _over(self) -> bool:
        return self._closed or self._pairer.finished()

    def _watched(self) -> list[int]:
        if not self._live:
            return []
        return [
            camera
            for camera in range(len(CAMERAS))
            if not self._stalled[camera] and not self._ended[camera]
        ]

    def _until_stall(self) -> float | None:
        waits = [self._arrived[c] + self._stall_s - time.monotonic() for c in self._watched()]
        return max(0.001, min(waits)) if waits else None

    def _new_stalls(self) -> list[tuple[int, float]]:
        now = time.monotonic()
        found = []
        for camera in self._watched():
            gap = now - self._arrived[camera]
            if gap >= self._stall_s:
                self._stalled[camera] = True
                found.append((camera, gap))
        return found
