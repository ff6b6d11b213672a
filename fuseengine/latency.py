"""How long frames take when they come at their own rate, whether or not the engine is ready.

A loop that calls an engine, waits for it and calls it again measures service time, and leaves out
what a camera's frame waits while the engine is late ("coordinated omission", Gil Tene). Here frame
k is due at ``start + k / rate``, and its latency counts from then:

    latency = done - due,  service = done - begin,  latency - service = what it waited

Like a camera with a buffer of one frame, the newest frame wins: when the engine is free, frames
that a later one has overtaken are dropped and counted; ``queue=True`` keeps them all instead, and
latency grows without bound where the rate is beyond the engine.

Clock: ``time.perf_counter_ns`` (monotonic). The garbage collector is off while frames are fused,
but for its youngest generation between frames. No torch.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuseengine.errors import SettingError

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_SPIN_NS = 500_000
"""The last part of a wait, spent looking at the clock: a sleeping thread wakes late."""


@dataclass(frozen=True)
class Schedule:
    """When frames come.

    Attributes:
        frames: that are due, fused or dropped.
        rate: frames per second.
        deadline_ms: latency above which a frame is a miss; the time between frames by default.
        warmup: frames fused as fast as they go before, not counted.
        queue: whether frames that are overtaken are fused all the same.
        collect: whether the garbage collector runs as it likes.
    """

    frames: int = 2000
    rate: float = 30.0
    deadline_ms: float | None = None
    warmup: int = 20
    queue: bool = False
    collect: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work.

        Raises:
            SettingError: no frames, or a rate or deadline that is not above 0.
        """
        if self.frames < 1 or self.warmup < 0:
            raise SettingError(
                f"frames={self.frames}, warmup={self.warmup}; expected frames >= 1 and warmup >= 0"
            )
        if not 0.0 < self.rate < math.inf or not self.limit_ms > 0.0:
            raise SettingError(
                f"rate={self.rate}, deadline_ms={self.deadline_ms}; expected numbers above 0"
            )

    @property
    def limit_ms(self) -> float:
        """The deadline in milliseconds."""
        return 1e3 / self.rate if self.deadline_ms is None else self.deadline_ms


@dataclass(frozen=True)
class Latencies:
    """What one run gave; times in nanoseconds since its start.

    Attributes:
        schedule: of the run.
        frame: which frames were fused, (n,).
        due: when each was due.
        begin: when the engine began with it.
        done: when it was ready.
    """

    schedule: Schedule
    frame: NDArray[np.int64]
    due: NDArray[np.int64]
    begin: NDArray[np.int64]
    done: NDArray[np.int64]

    @property
    def latency_ms(self) -> NDArray[np.float64]:
        """From due to done, per fused frame."""
        return (self.done - self.due) / 1e6

    @property
    def service_ms(self) -> NDArray[np.float64]:
        """From begin to done: the engine's own time."""
        return (self.done - self.begin) / 1e6

    @property
    def dropped(self) -> int:
        """Frames that a later one overtook."""
        return self.schedule.frames - len(self.frame)

    @property
    def misses(self) -> int:
        """Frames that were dropped, or ready after the deadline."""
        return self.dropped + int((self.latency_ms > self.schedule.limit_ms).sum())

    @property
    def jitter_ms(self) -> float:
        """Mean change of the latency from one fused frame to the next (as RFC 3550 has it)."""
        return float(np.abs(np.diff(self.latency_ms)).mean()) if len(self.frame) > 1 else 0.0

    @property
    def fused_per_s(self) -> float:
        """Frames per second that came out, over the time in which frames were due."""
        span = max(int(self.done[-1]), round(self.schedule.frames * 1e9 / self.schedule.rate))
        return len(self.frame) * 1e9 / span

    def summary(self) -> dict[str, float]:
        """The numbers of a row: percentiles of latency and service, jitter, misses, drops."""
        row = {f"p{p:g}_ms": float(np.percentile(self.latency_ms, p)) for p in PERCENTILES}
        return {
            **row,
            "max_ms": float(self.latency_ms.max()),
            "service_p50_ms": float(np.percentile(self.service_ms, 50)),
            "service_p99_ms": float(np.percentile(self.service_ms, 99)),
            "jitter_ms": self.jitter_ms,
            "fused_per_s": self.fused_per_s,
            "fused": float(len(self.frame)),
            "dropped": float(self.dropped),
            "misses": float(self.misses),
        }

    def histogram(self) -> Any:
        """An HdrHistogram of the latencies in microseconds, 1 us to an hour, 3 digits.

        Raises:
            ModuleNotFoundError: no ``hdrh`` (``pip install 'fuseengine[video]'``).
        """
        from hdrh.histogram import HdrHistogram

        made = HdrHistogram(1, 3_600_000_000, 3)
        for value in np.maximum(1, np.rint(self.latency_ms * 1e3)).astype(np.int64):
            made.record_value(int(value))
        return made


def measure(
    fuse: Callable[[int], object],
    schedule: Schedule,
    *,
    on_frame: Callable[[int], object] | None = None,
) -> Latencies:
    """Fuse frames as they become due.

    Args:
        fuse: fuses the frame of this number, and returns when it is ready.
        schedule: when frames come.
        on_frame: called after each fused frame with its number, outside of the clock.

    Returns:
        The times of every fused frame.
    """
    for index in range(schedule.warmup):
        fuse(index)
    period = 1e9 / schedule.rate
    rows: list[tuple[int, int, int, int]] = []
    with _collector(off=not schedule.collect):
        start = time.perf_counter_ns() + 1_000_000
        frame = 0
        while frame < schedule.frames:
            due = round(frame * period)
            now = time.perf_counter_ns() - start
            if now < due:
                now = _wait_until(start + due) - start
            elif not schedule.queue:
                # The newest frame that is due by now; those before it are gone.
                frame = min(max(frame, int(now / period)), schedule.frames - 1)
                due = round(frame * period)
            fuse(frame)
            rows.append((frame, due, now, time.perf_counter_ns() - start))
            if on_frame is not None:
                on_frame(frame)
            frame += 1
            if not schedule.collect:
                gc.collect(0)
    columns = np.array(rows, np.int64).T
    return Latencies(schedule, *columns)


@dataclass(frozen=True)
class Comparison:
    """Two engines' latencies, measured in turns.

    Attributes:
        ratio: of this engine's percentile to the first's, per percentile name.
        interval: 95 % interval of each, from resampled blocks.
    """

    ratio: Mapping[str, float]
    interval: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def measure_in_turns(
    engines: Mapping[str, Callable[[int], object]], schedule: Schedule, *, blocks: int = 10
) -> dict[str, list[Latencies]]:
    """Several engines on one schedule, block by block in changing order.

    Args:
        engines: name -> what :func:`measure` calls.
        schedule: of each engine in all; its frames are split over the blocks.
        blocks: turns per engine.

    Returns:
        name -> the runs of its blocks.

    Raises:
        SettingError: fewer frames than blocks.
    """
    if blocks < 1 or schedule.frames < blocks:
        raise SettingError(
            f"frames={schedule.frames}, blocks={blocks}; expected a frame per block at least"
        )
    part = Schedule(
        schedule.frames // blocks,
        schedule.rate,
        schedule.deadline_ms,
        max(2, schedule.warmup // blocks),
        schedule.queue,
        schedule.collect,
    )
    found: dict[str, list[Latencies]] = {name: [] for name in engines}
    names = list(engines)
    for block in range(blocks):
        shift = block % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(measure(engines[name], part))
    return found


def joined(runs: Sequence[Latencies]) -> Latencies:
    """Runs of one engine as one, frame after frame."""
    first = runs[0].schedule
    period, shift, frames = 1e9 / first.rate, 0, 0
    parts = []
    for run in runs:
        parts.append(
            np.stack([run.frame + frames, run.due + shift, run.begin + shift, run.done + shift])
        )
        frames += run.schedule.frames
        shift += round(run.schedule.frames * period)
    schedule = Schedule(
        frames, first.rate, first.deadline_ms, first.warmup, first.queue, first.collect
    )
    return Latencies(schedule, *np.concatenate(parts, axis=1))


def compare(
    runs: Mapping[str, Sequence[Latencies]], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Comparison]:
    """Each engine's latency over the first one's, with intervals from the blocks.

    Args:
        runs: from :func:`measure_in_turns`; blocks of the same number belong together.
        resamples: of the blocks.
        seed: of the resampling.

    Returns:
        name -> ratios of the 50th and 99th percentile, for every engine but the first.
    """
    names = list(runs)
    rng = np.random.default_rng(seed)
    count = len(runs[names[0]])
    drawn = rng.integers(count, size=(resamples, count))

    def at(name: str, chosen: NDArray[np.int64], percentile: float) -> float:
        pooled = np.concatenate([runs[name][i].latency_ms for i in chosen])
        return float(np.percentile(pooled, percentile))

    found = {}
    everything = np.arange(count)
    for name in names[1:]:
        ratio, interval = {}, {}
        for percentile in (50.0, 99.0):
            key = f"p{percentile:g}"
            ratio[key] = at(name, everything, percentile) / at(names[0], everything, percentile)
            seen = [at(name, c, percentile) / at(names[0], c, percentile) for c in drawn]
            low, high = np.percentile(seen, [2.5, 97.5])
            interval[key] = float(low), float(high)
        found[name] = Comparison(ratio, interval)
    return found


def plot(runs: Mapping[str, Latencies]) -> str:
    """Latency over percentile as an SVG picture, the way HdrHistogram plots it.

    Args:
        runs: name -> latencies.

    Returns:
        A whole SVG document. The horizontal axis is 1 / (1 - p), logarithmic: 90 %, 99 %, 99.9 %
        are equally far apart, because the tail is what misses a deadline.
    """
    width, height, left, bottom = 720, 360, 60, 320
    most = max(float(run.latency_ms.max()) for run in runs.values())
    limit = max(run.schedule.limit_ms for run in runs.values())
    top = 1.1 * max(most, limit)
    decades = math.log10(max(10, *(len(run.frame) for run in runs.values())))

    def x(share: float) -> float:
        return round(left + (width - left - 20) * min(-math.log10(1 - share) / decades, 1.0), 1)

    def y(ms: float) -> float:
        return round(bottom - (bottom - 30) * ms / top, 1)

    colours = ("#3465a4", "#cc3333", "#4e9a06", "#75507b", "#c17d11")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="60" y="18">Latency from when a frame was due, by percentile</text>',
    ]
    for share in (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999):
        if -math.log10(1 - share) <= decades:
            parts.append(f'<path d="M{x(share)} 30V{bottom}" stroke="#ddd"/>')
            parts.append(
                f'<text x="{x(share)}" y="{bottom + 16}" text-anchor="middle">{share:.6g}</text>'
            )
    for step in range(6):
        ms = top * step / 5
        parts.append(f'<path d="M{left} {y(ms)}H{width - 20}" stroke="#eee"/>')
        parts.append(f'<text x="{left - 6}" y="{y(ms) + 4}" text-anchor="end">{ms:.3g} ms</text>')
    parts.append(
        f'<path d="M{left} {y(limit)}H{width - 20}" stroke="#888" stroke-dasharray="5 4"/>'
    )
    parts.append(f'<text x="{width - 22}" y="{y(limit) - 4}" text-anchor="end">deadline</text>')
    for index, (name, run) in enumerate(runs.items()):
        colour = colours[index % len(colours)]
        values = np.sort(run.latency_ms)
        shares = np.arange(len(values)) / len(values)
        line = " ".join(f"{x(s)},{y(v)}" for s, v in zip(shares, values, strict=True))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{left + 12}" y="{46 + 16 * index}" fill="{colour}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _wait_until(moment: int) -> int:
    """Sleep, then look at the clock, until a moment of it; the clock when it is over."""
    while True:
        now = time.perf_counter_ns()
        left = moment - now
        if left <= 0:
            return now
        if left > _SPIN_NS:
            time.sleep((left - _SPIN_NS) / 1e9)


@contextmanager
def _collector(*, off: bool) -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    if off:
        gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
