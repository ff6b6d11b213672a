"""What a stream adds to its engine, what it does when the engine is too slow, and its memory.

    python -m benchmarks.stream
    python -m benchmarks.stream --model drfusion-s --size 240x320 --frames 20000
    python -m benchmarks.stream --only soak
    python -m benchmarks.stream --only pipelining --device cuda --size 1080x1920

Measurements, with an engine that sleeps (60 ms, the interpreter's lock released) and with a real
one:

* overhead: time from fused frame to fused frame at steady state, recorded sources, beside calls of
  the engine alone, in turns; target: below 10 % of the engine's own p50;
* too slow: live 30 fps sources and the 60 ms engine: fused frames a second, drops, latency, and
  whether latency grows; target: 16 frames a second, no growth;
* soak: resident memory over many frames; target: no growth.
* pipelining, on a GPU: time from fused frame to fused frame with two frames under way, beside the
  same stream that calls the engine, in turns; target: not slower.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import harness
from fuseengine.video import Stream, open_source

Array = NDArray[Any]
Engine = Callable[..., Array]

TARGET_OVERHEAD = 1.10
TARGET_FPS = 16.0
TARGET_GROWTH_MB = 4.0
FILL = 3
"""Fused frames of a run before it is at steady state."""


class Sleeping:
    """An engine that takes this long and computes nothing."""

    def __init__(self, milliseconds: float) -> None:
        self._seconds = milliseconds / 1e3

    def __call__(self, infrared: Array, visible: Array, **_: Any) -> Array:
        if self._seconds:
            time.sleep(self._seconds)
        return visible


def pair(size: tuple[int, int]) -> tuple[Array, Array]:
    """A random infrared and a random visible frame."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, size, np.uint8), rng.integers(0, 256, (*size, 3), np.uint8)


def repeat(frame: Array, count: int) -> Iterator[Array]:
    """A recording of one frame."""
    for _ in range(count):
        yield frame


def camera(frame: Array, count: int, rate: float) -> Iterator[tuple[float, Array]]:
    """A live camera; it does not make up for frames that nobody fetched."""
    due = time.monotonic()
    for _ in range(count):
        time.sleep(max(0.0, due - time.monotonic()))
        now = time.monotonic()
        yield now, frame
        due = max(due, now - 1 / rate) + 1 / rate


# --- measurements ---------------------------------------------------------------------------------


def overhead(
    result: harness.Result, name: str, engine: Engine, size: tuple[int, int], rounds: int
) -> None:
    """Rows of the engine alone and in a stream; batches of each in turns."""
    infrared, visible = pair(size)
    batch = 12
    alone: list[int] = []
    streamed: list[int] = []
    for _ in range(3):
        engine(infrared, visible)
    _in_turns(
        rounds,
        lambda: alone.extend(_calls(engine, infrared, visible, batch)),
        lambda: streamed.extend(_intervals(engine, infrared, visible, batch)),
    )
    own = harness.Samples(f"{name}, alone", np.asarray(alone, np.int64))
    ours = harness.Samples(f"{name}, in a stream", np.asarray(streamed, np.int64))
    ratio = harness.paired_ratio(_medians(ours, batch), _medians(own, batch))
    result.add(own.name, own)
    result.add(
        ours.name,
        ours,
        ratio=str(ratio),
        outcome="PASS" if ratio.median < TARGET_OVERHEAD else "MISS",
    )


def pipelining(
    result: harness.Result, name: str, engine: Engine, size: tuple[int, int], rounds: int
) -> None:
    """Rows of a stream that calls its engine and of one with two frames under way, in turns."""
    infrared, visible = pair(size)
    batch = 48
    called: list[int] = []
    pipelined: list[int] = []
    call = engine.__call__  # the stream sees a function, and calls it
    expected = engine(infrared, visible)
    for way in (call, engine):
        frames = Stream(way).run(repeat(infrared, 8), repeat(visible, 8))
        if not all(np.array_equal(frame.image, expected) for frame in frames):
            raise AssertionError(f"{name}: a stream's pictures are not the engine's")
    _in_turns(
        rounds,
        lambda: called.extend(_intervals(call, infrared, visible, batch)),
        lambda: pipelined.extend(_intervals(engine, infrared, visible, batch)),
    )
    theirs = harness.Samples(f"{name}, stream that calls", np.asarray(called, np.int64))
    ours = harness.Samples(f"{name}, stream with two under way", np.asarray(pipelined, np.int64))
    ratio = harness.paired_ratio(_means(ours, batch), _means(theirs, batch))
    result.add(theirs.name, theirs, fps=1e9 / theirs.ns.mean())
    result.add(
        ours.name,
        ours,
        fps=1e9 / ours.ns.mean(),
        ratio=str(ratio),
        outcome="PASS" if ratio.median <= 1.0 else "MISS",
    )


def _means(samples: harness.Samples, batch: int) -> harness.Samples:
    """One sample per round: with two under way results may come in twos, so means, not medians."""
    return harness.Samples(
        samples.name, np.mean(samples.ns.reshape(-1, batch), axis=1).astype(np.int64)
    )


def _in_turns(rounds: int, *steps: Callable[[], None]) -> None:
    """Take all steps in every round, in alternating order."""
    for turn in range(rounds):
        for step in steps if turn % 2 == 0 else reversed(steps):
            step()
        gc.collect(0)


def _calls(engine: Engine, infrared: Array, visible: Array, count: int) -> list[int]:
    times = []
    for _ in range(count):
        start = time.perf_counter_ns()
        engine(infrared, visible)
        times.append(time.perf_counter_ns() - start)
    return times


def _intervals(engine: Engine, infrared: Array, visible: Array, count: int) -> list[int]:
    """Times from fused frame to fused frame."""
    total = count + FILL
    stamps = []
    with Stream(engine) as stream:
        for _ in stream.run(repeat(infrared, total), repeat(visible, total)):
            stamps.append(time.perf_counter_ns())
    return np.diff(stamps)[FILL - 1 :].tolist()


def _medians(samples: harness.Samples, batch: int) -> harness.Samples:
    """One sample per round: batches of the two were taken in turns, calls were not."""
    return harness.Samples(
        samples.name, np.median(samples.ns.reshape(-1, batch), axis=1).astype(np.int64)
    )


def too_slow(result: harness.Result, size: tuple[int, int], seconds: float) -> None:
    """The row of a live 30 fps pair and an engine of 60 ms."""
    infrared, visible = pair(size)
    count = round(30 * seconds)
    stream = Stream(Sleeping(60.0))
    sources = (
        open_source(camera(frame, count, 30.0), live=True, rate=30.0)
        for frame in (infrared, visible)
    )
    latency = [frame.latency_ms for frame in stream.run(*sources)]
    stats, third = stream.stats, max(1, len(latency) // 3)
    first, last = statistics.median(latency[:third]), statistics.median(latency[-third:])
    samples = harness.Samples("", np.asarray([ms * 1e6 for ms in latency], np.int64))
    steady = last < 1.2 * first and samples.p99 < 60 + 2 * 1e3 / 30 + 20
    result.add(
        "60 ms engine, live 30 fps sources: latency",
        samples,
        fps=stats.fps,
        captured=stats.visible.captured,
        fused=stats.fused,
        dropped=stats.dropped,
        unpaired=stats.visible.unpaired,
        ratio=f"{last / first:.3f} (last third to first)",
        outcome="PASS" if steady and abs(stats.fps - TARGET_FPS) < 1.0 else "MISS",
    )


def soak(result: harness.Result, size: tuple[int, int], frames: int) -> None:
    """The row of memory over many frames; every frame is another array, as from a camera."""
    infrared, visible = pair(size)

    def fresh(frame: Array) -> Iterator[Array]:
        for _ in range(frames):
            yield frame.copy()

    settled, before, after, peak = max(1, frames // 10), 0.0, 0.0, 0.0
    begin = time.monotonic()
    with Stream(Sleeping(0.0)) as stream:
        for frame in stream.run(fresh(infrared), fresh(visible)):
            if frame.index + 1 == settled:
                before = resident_mb()
            if frame.index % 500 == 499:
                peak = max(peak, resident_mb())
        after = resident_mb()
    result.add(
        f"soak of {frames} frames {size[0]}x{size[1]}",
        fused=stream.stats.fused,
        fps=stream.stats.fused / (time.monotonic() - begin),
        resident_mb_after_a_tenth=before,
        resident_mb_at_the_end=after,
        resident_mb_peak=peak,
        outcome="PASS" if after - before < TARGET_GROWTH_MB else "MISS",
    )


def resident_mb() -> float:
    """Resident memory of this process, Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# --- command line ---------------------------------------------------------------------------------


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--model", default="drfusion-s", help="of the real engine; 'none': leave out")
    made.add_argument("--size", type=_size, default=(240, 320), metavar="HxW")
    made.add_argument("--rounds", type=int, default=8, help="turns of 12 frames each")
    made.add_argument("--seconds", type=float, default=20.0, help="of the live sources")
    made.add_argument("--frames", type=int, default=20_000, help="of the soak")
    made.add_argument("--only", choices=("overhead", "slow", "soak", "pipelining"))
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the real engine")
    made.add_argument("--out", type=Path, help="folder of results instead of benchmarks/results")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    if args.only == "pipelining" and (args.device != "cuda" or args.model == "none"):
        parser().error(
            "--only pipelining: expected --device cuda and a model: copies are the GPU's"
        )
    height, width = args.size
    settings = {"model": args.model, "size": f"{height}x{width}", "rounds": args.rounds}
    result = harness.Result("stream", args.device, "What a stream adds, drops and keeps", settings)
    result.command = harness.command_line("benchmarks.stream", words)
    if args.only in (None, "overhead"):
        overhead(result, "engine that sleeps 60 ms", Sleeping(60.0), args.size, args.rounds)
    if args.only in (None, "overhead", "pipelining") and args.model != "none":
        import fuseengine as fe

        engine = fe.compile(args.model, args.size, device=args.device)
        of_engine = (result, f"{args.model} {height}x{width}", engine, args.size, args.rounds)
        if args.only != "pipelining":
            overhead(*of_engine)
        if args.only != "overhead" and args.device == "cuda":
            pipelining(*of_engine)
        result.notes.append(f"engine: {engine.report.summary()}")
    if args.only in (None, "slow"):
        too_slow(result, args.size, args.seconds)
    if args.only in (None, "soak"):
        soak(result, args.size, args.frames)
    result.notes += [
        "in a stream: time from fused frame to fused frame at steady state; ratio: over the engine "
        "alone, median of the rounds' own ratios, 95% interval; target below 1.10.",
        "latency: from capture to the end of fusion. A frame waits up to one interval of the "
        "camera (33 ms) for the engine, beside the engine's own 60 ms.",
        "two under way: the ratio is of mean times between frames, over the stream that calls.",
    ]
    result.notes += [
        f"missed: {row['name']}" for row in result.rows if row.get("outcome") == "MISS"
    ]
    result.finish(args.out, write=args.only is None or args.out is not None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
