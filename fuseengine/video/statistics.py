"""What a stream counts. Memory does not grow with the number of frames."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_STEP = 1.01
_LOWEST_MS = 1e-3
_BUCKETS = 2100
"""Steps of one per cent from a microsecond to twenty minutes."""


class LatencyHistogram:
    """Latencies of any number of frames in buckets one per cent wide."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BUCKETS, np.int64)
        self._largest = 0.0

    def add(self, milliseconds: float) -> None:
        """Count one latency."""
        steps = math.log(max(milliseconds, _LOWEST_MS) / _LOWEST_MS) / math.log(_STEP)
        self._counts[min(int(steps), _BUCKETS - 1)] += 1
        self._largest = max(self._largest, milliseconds)

    def percentile(self, q: float) -> float:
        """The q-th percentile (0 to 100) in milliseconds, within one per cent; NaN of nothing."""
        total = int(self._counts.sum())
        if total == 0:
            return math.nan
        if q >= 100:
            return self._largest
        below = np.cumsum(self._counts)
        bucket = int(np.searchsorted(below, max(1.0, total * q / 100)))
        return min(_LOWEST_MS * _STEP ** (bucket + 0.5), self._largest)


@dataclass
class CameraStats:
    """Of one camera.

    Attributes:
        captured: frames that its source gave.
        unpaired: frames without a frame of the other camera within the tolerance, or pushed out
            while waiting for one.
        broken: damaged frames that the source skipped.
        missed: frames that the source saw pass but could not fetch in time.
        stalls: times that it gave nothing for a while.
        reconnects: times that it broke off and came back.
    """

    captured: int = 0
    unpaired: int = 0
    broken: int = 0
    missed: int = 0
    stalls: int = 0
    reconnects: int = 0


@dataclass
class StreamStats:
    """Of a run of a stream.

    Attributes:
        infrared: counts of the infrared camera.
        visible: counts of the visible camera.
        paired: pairs found.
        dropped: pairs that gave way to a newer one.
        refused: pairs that could not be fused: of another size, or not usable.
        fused: frames that were fused.
        late: of these, those that took longer than the deadline.
        seconds: from the first fused frame to the last.
    """

    infrared: CameraStats = field(default_factory=CameraStats)
    visible: CameraStats = field(default_factory=CameraStats)
    paired: int = 0
    dropped: int = 0
    refused: int = 0
    fused: int = 0
    late: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._latency = LatencyHistogram()
        self._first_s = math.nan

    @property
    def cameras(self) -> tuple[CameraStats, CameraStats]:
        """Infrared, visible."""
        return self.infrared, self.visible

    @property
    def stalls(self) -> int:
        """Of both cameras."""
        return self.infrared.stalls + self.visible.stalls

    @property
    def fps(self) -> float:
        """Fused frames per second; NaN before the second frame."""
        return (self.fused - 1) / self.seconds if self.seconds > 0 else math.nan

    def latency_ms(self, q: float) -> float:
        """The q-th percentile (0 to 100) of the fused frames' latency, within one per cent."""
        with self._lock:
            return self._latency.percentile(q)

    def count_fused(self, now_s: float, latency_ms: float, late: bool) -> None:
        """Count a fused frame."""
        with self._lock:
            if self.fused == 0:
                self._first_s = now_s
            self.fused += 1
            self.late += late
            self.seconds = now_s - self._first_s
            self._latency.add(latency_ms)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; None where there is no number."""
        values = {name: getattr(self, name) for name in _COUNTS}
        values["stalls"] = self.stalls
        values["fps"] = self.fps
        values["latency_ms"] = {f"p{q}": self.latency_ms(q) for q in (50, 90, 99, 100)}
        for name in ("infrared", "visible"):
            values[name] = dict(vars(getattr(self, name)))
        return _plain(values)


_COUNTS = ("paired", "dropped", "refused", "fused", "late", "seconds")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
