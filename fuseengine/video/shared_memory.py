"""Frames from and for other processes: rings in POSIX shared memory.

The memory's layout, and functions for C and C++ programs, are in ``csrc/fuse_shm.h``; this module
runs the same functions. The header is installed with the package: :func:`include_dir`.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from fuseengine import _native
from fuseengine.errors import SinkError, SourceError
from fuseengine.video.frames import CameraFrame, Colour, Format, Image, Picture
from fuseengine.video.sources import Source

_CODES: dict[Format, int] = {
    "gray8": 1,
    "gray16": 2,
    "rgb24": 3,
    "yuyv": 4,
    "nv12": 5,
    "i420": 6,
}
_FORMATS = {code: name for name, code in _CODES.items()}
_FULL_RANGE, _BT709 = 1, 2
_SLOTS = 4
_WAIT_S = 0.05
_SILENT_S = 1.0
"""A producer without a sign of life for so long is looked after."""


class SharedMemorySource(Source):
    """Reads a ring that another process fills.

    A producer that closes its ring ends the stream, unless there is another ring of the name by
    then, as for frames of another size. One that dies or falls silent is reported, and the source
    waits until a producer makes a ring of this name again.
    """

    def __init__(self, name: str) -> None:
        """Opens the ring.

        Args:
            name: without slashes.

        Raises:
            SourceError: there is no ring of this name, or it cannot be used.
        """
        super().__init__(f"shm://{name}", live=True, rate=None, size=(0, 0))
        self._ring_name = name
        self._ring = _open(name)
        self._next = 0
        self._silent_since: float | None = None
        self._attach()
        # What was there before is old.
        self._next = max(0, self._ring.written - 1)

    def read(self) -> CameraFrame | None:  # noqa: D102
        while not self._stopped.is_set():
            if self._ring.wait(self._next, _WAIT_S):
                frame = self._fetch()
                if frame is not None:
                    return frame
            elif not (self._ring.ended and self._ring.written <= self._next):
                self._look_after_producer()
            elif not (self._ring.replaced and self._change_ring()):
                return None
        return None

    def close(self) -> None:  # noqa: D102
        self._ring.close()

    def _attach(self) -> None:
        ring = self._ring
        self._format: Format = _FORMATS[ring.format]
        self._colour = Colour(
            bool(ring.flags & _FULL_RANGE), "bt709" if ring.flags & _BT709 else "bt601"
        )
        self.size = ring.height, ring.width
        self._next = 0

    def _fetch(self) -> CameraFrame | None:
        written, index = self._ring.written, self._next
        if written - index >= self._ring.slots:
            # The oldest slot is about to be written again: go to the newest.
            self.missed += written - 1 - index
            index = written - 1
        self._next = index + 1
        image = _empty(self._format, self.size)
        capture_ns = self._ring.read(index, image)
        if capture_ns is None:
            self.missed += 1
            return None
        self._silent_since = None
        return CameraFrame(
            image, self._format, self._colour, capture_ns / 1e9, index, time.monotonic()
        )

    def _look_after_producer(self) -> None:
        ring, now = self._ring, time.monotonic()
        silent = now - ring.heartbeat_ns / 1e9
        # In another container its process id means nothing here; a sign of life always does.
        dead = not _alive(ring.producer) and silent > 2 * _WAIT_S
        if not dead and silent < _SILENT_S:
            return
        if self._silent_since is None:
            self._silent_since = now
            what = "is gone" if dead else f"has given no sign of life for {silent:.1f} s"
            self.report(
                "lost",
                f"{self.name}: its producer (process {ring.producer}) {what}; waiting for frames",
            )
        if ring.replaced and self._change_ring():
            gone = now - self._silent_since
            self._silent_since = None
            self.reconnects += 1
            self.report(
                "reconnect",
                f"{self.name} has a new producer (process {self._ring.producer}) after "
                f"{gone:.1f} s",
            )

    def _change_ring(self) -> bool:
        """Go over to the ring that has the name now, if there is one."""
        try:
            ring = _open(self._ring_name)
        except SourceError:
            return False  # none, or not ready
        self._ring.close()
        self._ring = ring
        self._attach()
        return True


class SharedMemoryWriter:
    """Fills a ring that other processes read."""

    def __init__(self, name: str, *, slots: int = _SLOTS) -> None:
        """Describes the ring; it is made with the first frame, whose size and format it takes.

        Args:
            name: without slashes.
            slots: frames that the ring holds, at least 2.
        """
        self._name, self._slots = name, slots
        self._ring: Any = None
        self._kind: tuple[Any, ...] = ()

    def write(self, picture: Picture, capture_s: float) -> None:
        """Show readers a frame.

        Args:
            picture: of another size or format than the last: a new ring takes the old one's place.
            capture_s: when it was captured, seconds of ``time.monotonic()``.

        Raises:
            SinkError: the ring cannot be made.
        """
        kind = (picture.size, picture.format, picture.colour)
        if kind != self._kind:
            self._make(picture)
            self._kind = kind
        self._ring.write(np.ascontiguousarray(picture.image), int(max(0.0, capture_s) * 1e9))

    def close(self) -> None:
        """Tell readers that the stream has ended."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
            self._kind = ()

    def _make(self, picture: Picture) -> None:
        (height, width), colour = picture.size, picture.colour
        flags = _FULL_RANGE * colour.full_range + _BT709 * (colour.matrix == "bt709")
        old = self._ring
        try:
            self._ring = _rings().create(
                self._name, width, height, _CODES[picture.format], flags, self._slots
            )
        except OSError as error:
            raise SinkError(
                f"shm://{self._name}: cannot make a ring of {self._slots} {picture.format} frames "
                f"of {width}x{height}: {error.strerror}; expected a name without '/', 2 to 1024 "
                "slots, even sides for YUV, and room in /dev/shm"
            ) from None
        if old is not None:
            old.close()


def include_dir() -> Path:
    """The folder of ``fuse_shm.h``, for C and C++ programs that feed or read ``shm://`` frames.

    ``cc camera.c -I"$(python -c 'import fuseengine.video as v; print(v.include_dir())')" -lrt``

    Returns:
        An absolute path. The header has the version of the installed native module.
    """
    # The build installs both, also where the package itself is run from its source.
    return Path(_native.__file__).resolve().parent / "include"


def _rings() -> Any:
    rings = getattr(_native, "SharedRing", None)
    if rings is None:
        raise SourceError("shm:// needs POSIX shared memory, which this system lacks; use a file")
    return rings


def _open(name: str) -> Any:
    try:
        return _rings().open(name)
    except OSError as error:
        what, remedy = {
            errno.ENOENT: ("there is no such ring", "start its producer first"),
            errno.EAGAIN: ("it is not ready yet", "start its producer first"),
            errno.EPROTO: (
                "it is no ring of frames of version 1",
                "build its producer with this version's fuse_shm.h",
            ),
            errno.EACCES: ("permission denied", "run both programs as one user"),
        }.get(error.errno or 0, (error.strerror or str(error), "check the name"))
        raise SourceError(f"source: cannot open shm://{name}: {what}; {remedy}") from None


def _empty(name: Format, size: tuple[int, int]) -> Image:
    height, width = size
    if name == "gray16":
        return np.empty((height, width), np.uint16)
    shape: tuple[int, ...] = {
        "gray8": (height, width),
        "rgb24": (height, width, 3),
        "yuyv": (height, width, 2),
    }.get(name, (height * 3 // 2, width))
    return np.empty(shape, np.uint8)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
