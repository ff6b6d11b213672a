"""Frames from a Python iterable."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from fuseengine.errors import SourceError
from fuseengine.video.frames import CameraFrame, check_picture, format_of
from fuseengine.video.sources import IMAGE_RATE, Source


class ArraySource(Source):
    """Arrays, pairs ``(time_s, array)`` or :class:`CameraFrame` of an iterable.

    Arrays: uint8 (H, W) or (H, W, 3) RGB, or uint16 (H, W). The first one is taken when the source
    is opened, to know its size.
    """

    def __init__(
        self, frames: Iterable[Any], *, rate: float | None = None, live: bool = False
    ) -> None:
        """Takes the first frame.

        Args:
            frames: the iterable; read by the thread that reads the source.
            rate: frames per second of arrays without a time; by default 30, and unknown if live.
            live: arrays without a time have that of their arrival.

        Raises:
            SourceError: there is no frame.
            FrameError: the first is none.
        """
        if rate is None and not live:
            rate = IMAGE_RATE
        super().__init__(f"{type(frames).__name__} of frames", live=live, rate=rate, size=(0, 0))
        self._frames: Iterator[Any] = iter(frames)
        self._count = 0
        self._first = self._next()
        if self._first is None:
            raise SourceError(
                f"source: the {type(frames).__name__} holds no frame, expected at least one; "
                "an iterator can be used once only"
            )
        self.size = self._first.size

    def read(self) -> CameraFrame | None:  # noqa: D102
        if self._stopped.is_set():
            return None
        frame, self._first = self._first, None
        return frame if frame is not None else self._next()

    def close(self) -> None:  # noqa: D102
        close = getattr(self._frames, "close", None)
        if callable(close):
            close()

    def _next(self) -> CameraFrame | None:
        item = next(self._frames, None)
        if item is None:
            return None
        index, now = self._count, time.monotonic()
        self._count += 1
        if isinstance(item, CameraFrame):
            check_picture(item)
            return replace(item, arrived_s=item.arrived_s or now)
        moment: float | None = None
        if isinstance(item, tuple) and len(item) == 2:
            moment, item = float(item[0]), item[1]
        if moment is None:
            moment = now if self.live else index / (self.rate or IMAGE_RATE)
        image = np.asarray(item)
        return CameraFrame(image, format_of(image), time_s=moment, index=index, arrived_s=now)
