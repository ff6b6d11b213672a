"""Pairs the frames of two cameras by time."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from fuseengine.errors import SettingError
from fuseengine.video.frames import CameraFrame

INFRARED, VISIBLE = 0, 1
CAMERAS = ("infrared", "visible")

_INTERVALS = 15
_USUAL_RATE = 30.0
_ROUNDING_S = 1e-4
"""Time stamps of files are rounded: milliseconds of Matroska, 1/90000 s and others."""


class Pair(NamedTuple):
    """Two frames that belong together."""

    infrared: CameraFrame
    visible: CameraFrame


class Pairer:
    """Finds for each frame the nearest frame of the other camera.

    Two frames make a pair when their times differ by at most the tolerance and no other frame that
    is known is nearer. Frames come in the order of their times, camera by camera; each is used at
    most once.

    Attributes:
        unpaired: frames without a partner so far, per camera (infrared, visible).
        paired: pairs so far.
    """

    def __init__(
        self,
        tolerance_s: float | None = None,
        offset_s: float = 0.0,
        rates: tuple[float | None, float | None] = (None, None),
    ) -> None:
        """Describes the cameras.

        Args:
            tolerance_s: largest difference of the times of a pair; by default half the interval
                between frames of the slower camera.
            offset_s: infrared time minus visible time of one moment.
            rates: frames per second of the cameras; None: told from their frames' times.

        Raises:
            SettingError: a negative tolerance.
        """
        if tolerance_s is not None and not tolerance_s >= 0:
            raise SettingError(f"tolerance: got {tolerance_s * 1e3:g} ms, expected 0 or more")
        self._tolerance_s, self._offset_s = tolerance_s, offset_s
        self._rates = rates
        self._waiting: tuple[deque[CameraFrame], ...] = (deque(), deque())
        self._intervals: tuple[deque[float], ...] = (
            deque(maxlen=_INTERVALS),
            deque(maxlen=_INTERVALS),
        )
        self._last: list[float | None] = [None, None]
        self._ended = [False, False]
        self.unpaired = [0, 0]
        self.paired = 0

    @property
    def tolerance_s(self) -> float:
        """Largest difference of the times of a pair, seconds."""
        if self._tolerance_s is not None:
            return self._tolerance_s
        return 0.5 * max(self._interval(INFRARED), self._interval(VISIBLE))

    def waiting(self, camera: int) -> int:
        """Frames of a camera that have not been paired or given up."""
        return len(self._waiting[camera])

    def add(self, camera: int, frame: CameraFrame) -> None:
        """A camera's next frame."""
        last = self._last[camera]
        if last is not None and frame.time_s > last:
            self._intervals[camera].append(frame.time_s - last)
        self._last[camera] = frame.time_s
        self._waiting[camera].append(frame)

    def give_up(self, camera: int) -> None:
        """Drop a camera's oldest waiting frame."""
        self._waiting[camera].popleft()
        self.unpaired[camera] += 1

    def end(self, camera: int) -> None:
        """A camera has no more frames."""
        self._ended[camera] = True

    def next(self, *, patient: bool) -> Pair | None:
        """The next pair, if there is one yet.

        Args:
            patient: do not decide before it is known whether the next frame is nearer: the same
                pairs whatever the speed of reading. Otherwise what is there is compared.
        """
        infrared, visible = self._waiting
        while infrared and visible:
            apart = infrared[0].time_s - self._offset_s - visible[0].time_s
            # Only the earlier frame can have a successor that is nearer to the other one.
            earlier = INFRARED if apart < 0 else VISIBLE
            queue = self._waiting[earlier]
            if len(queue) > 1:
                gain = queue[1].time_s - queue[0].time_s
                if abs(abs(apart) - gain) < abs(apart) - _ROUNDING_S:
                    self.give_up(earlier)
                    continue
            elif patient and not self._ended[earlier] and abs(apart) > _ROUNDING_S:
                return None
            if abs(apart) <= self.tolerance_s + _ROUNDING_S:
                self.paired += 1
                return Pair(infrared.popleft(), visible.popleft())
            self.give_up(earlier)
        return None

    def finished(self) -> bool:
        """Whether no pair can come any more: a camera has ended and none of its frames waits."""
        return any(
            ended and not queue for ended, queue in zip(self._ended, self._waiting, strict=True)
        )

    def give_up_all(self) -> None:
        """Count what still waits as unpaired."""
        for camera, queue in enumerate(self._waiting):
            while queue:
                self.give_up(camera)

    def _interval(self, camera: int) -> float:
        rate, seen = self._rates[camera], self._intervals[camera]
        if rate:
            return 1.0 / rate
        if not seen:
            return 1.0 / _USUAL_RATE
        return sorted(seen)[len(seen) // 2]
