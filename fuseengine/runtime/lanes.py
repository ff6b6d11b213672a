"""Queues of a device that computes by itself: copies to it, computation, copies back. No torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol


class Mark(Protocol):
    """A place in a lane; recorded again, it is another place."""

    def synchronize(self) -> None:
        """Wait until the lane has come there, without the interpreter's lock."""


class Lane(Protocol):
    """One queue (on a GPU: a stream). What is put there is done in order; nothing here waits."""

    def send(self, array: Any, host: Any) -> None:
        """Copy page-locked memory to an array of the device."""

    def copy(self, target: Any, source: Any) -> None:
        """Copy an array of the device to another."""

    def fetch(self, host: Any, array: Any) -> None:
        """Copy an array of the device to page-locked memory."""

    def record(self, mark: Mark) -> None:
        """The mark is where the lane ends now."""

    def after(self, mark: Mark) -> None:
        """What is put here from now on comes after the mark, a place in another lane."""

    def active(self) -> AbstractContextManager[object]:
        """What an executor runs inside of so that its call goes into this lane."""


class Lanes(Protocol):
    """A device's lanes, and the memory and marks that go with them."""

    @property
    def into(self) -> Lane:
        """Copies to the device."""

    @property
    def compute(self) -> Lane:
        """The lane that executors run in anyway."""

    @property
    def out(self) -> Lane:
        """Copies from the device."""

    def empty(self, shape: tuple[int, ...]) -> Any:
        """A float32 array of the device."""

    def pinned(self, shape: tuple[int, ...]) -> Any:
        """Page-locked float32 memory of the host; ``np.asarray`` gives it as an array."""

    def mark(self) -> Mark:
        """A new mark, at no place yet: nobody waits for it."""

    def synchronize(self) -> None:
        """Wait for all that is in the compute lane."""
