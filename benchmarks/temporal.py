"""Video with ``temporal="warm"``: time, flicker and distance beside frames sampled in full.

    python -m benchmarks.temporal
    python -m benchmarks.temporal --model mask-difuser-s --size 480x640 --frames 24 --steps 1 2

The video is made of one pair: a window wanders over it, half a pixel to a pixel and a half per
frame, a warm disc crosses it, both cameras have noise of their own (2 grey levels), and half way
the scene is mirrored: a cut. Flicker is what changes from frame to frame beyond both sources' own
change (:func:`fuseengine.video.flicker.flicker`), the cut left out. Engines take the same frames in
turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fuseengine as fe
from benchmarks import harness
from fuseengine.video.flicker import flicker

Frames = NDArray[np.uint8]

TARGET_FLICKER = 1.0
"""Of warm frames over that of frames sampled in full: not above it."""
_TOLERANCE = 0.005


def video(
    infrared: Frames, visible: Frames, size: tuple[int, int], count: int, noise: float = 2.0
) -> tuple[Frames, Frames]:
    """A moving scene cut out of a pair: (T, H, W) and (T, H, W, 3), uint8.

    Args:
        infrared: (h, w), larger than the frames.
        visible: (h, w, 3).
        size: height and width of the frames.
        count: of frames; the second half shows the scene mirrored.
        noise: standard deviation of each camera's noise, grey levels.
    """
    from scipy.ndimage import shift

    rng = np.random.default_rng(0)
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    made: tuple[list[Frames], list[Frames]] = ([], [])
    for t in range(count):
        mirrored = t >= (count + 1) // 2
        down, right = 0.5 * t, 1.5 * t
        disc = (rows - height * 0.6) ** 2 + (columns - 40 - 4 * t) ** 2 < (height / 16) ** 2
        for frames, picture, warm in zip(made, (infrared, visible), (235.0, 60.0), strict=True):
            whole = picture[:, ::-1] if mirrored else picture
            part = whole[int(down) : int(down) + height + 1, int(right) : int(right) + width + 1]
            moves = (-(down % 1), -(right % 1)) + (0,) * (part.ndim - 2)
            part = shift(part.astype(np.float32), moves, order=1, mode="nearest")[:height, :width]
            part[disc] = warm
            part += rng.normal(0, noise, part.shape)
            frames.append(np.rint(part).clip(0, 255).astype(np.uint8))
    return np.stack(made[0]), np.stack(made[1])


def luma(frames: Frames) -> NDArray[np.float32]:
    """BT.601 luma of RGB frames."""
    return frames @ np.array([0.299, 0.587, 0.114], np.float32)


def measure(
    result: harness.Result, engines: dict[str, Any], infrared: Frames, visible: Frames
) -> dict[str, Frames]:
    """A row per engine; gives the fused videos."""
    memories = {name: fe.Memory() for name in engines}
    times: dict[str, list[int]] = {name: [] for name in engines}
    fused: dict[str, list[Frames]] = {name: [] for name in engines}
    for engine in engines.values():
        engine(infrared[0], visible[0])
    for t, pair in enumerate(zip(infrared, visible, strict=True)):
        for name in list(engines) if t % 2 else reversed(engines):
            options = {} if name == "full" else {"memory": memories[name]}
            begin = time.perf_counter_ns()
            frame = engines[name](*pair, **options)
            times[name].append(time.perf_counter_ns() - begin)
            fused[name].append(frame)
    videos = {name: np.stack(frames) for name, frames in fused.items()}
    warm = [t for t in range(1, len(infrared)) if t != (len(infrared) + 1) // 2]
    still = np.array(warm) - 1  # flicker's index of frame t is t - 1

    def flickering(name: str) -> float:
        return float(flicker(luma(videos[name]), infrared, luma(visible))[still].mean())

    samples = {
        name: harness.Samples(name, np.asarray(taken, np.int64)[warm])
        for name, taken in times.items()
    }
    full = flickering("full")
    for name in engines:
        apart = [harness.psnr(videos[name][t], videos["full"][t], 255.0) for t in warm]
        fields: dict[str, Any] = {"flicker": flickering(name)}
        if name != "full":
            ratio = harness.paired_ratio(samples[name], samples["full"])
            fields |= {
                "psnr_db": min(apart),
                "resumed": memories[name].resumed,
                "in_full": memories[name].full,
                "ratio": str(ratio),
                "outcome": "PASS"
                if flickering(name) <= full * (TARGET_FLICKER + _TOLERANCE)
                else "MISS",
            }
        result.add(name, samples[name], **fields)
    return videos


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.temporal", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--model", default="mask-difuser-s")
    made.add_argument("--size", type=_size, default=(480, 640), metavar="HxW")
    made.add_argument("--frames", type=int, default=24)
    made.add_argument("--steps", type=int, nargs="+", default=[1, 2], metavar="K")
    made.add_argument("--precision", default="auto")
    made.add_argument("--threads", type=int)
    made.add_argument(
        "--pair", nargs=2, type=Path, help="images to wander over; by default the demo's"
    )
    made.add_argument("--out", type=Path, help="folder of results, and frames to look at")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    (height, width), count = args.size, args.frames
    settings = {
        "model": args.model, "size": f"{height}x{width}", "frames": count,
        "precision": args.precision, "steps": args.steps,
    }  # fmt: skip
    result = harness.Result("temporal", "cpu", "Frames that start from the one before", settings)
    result.command = harness.command_line("benchmarks.temporal", words)
    larger = height + count // 2 + 2, width + count * 3 // 2 + 2
    if args.pair:
        infrared, visible = (fe.read_image(path) for path in args.pair)
        infrared = infrared if infrared.ndim == 2 else luma(infrared).round().astype(np.uint8)
    else:
        infrared, visible = fe.demo_pair(larger)
    if min(np.subtract(infrared.shape[:2], larger)) < 0 or visible.ndim != 3:
        raise SystemExit(f"--pair: got {infrared.shape[:2]}; expected {larger} or more, in colour")
    frames = video(infrared, visible, args.size, count)
    engines = {
        f"warm, {steps} of the steps": fe.compile(
            args.model, args.size, precision=args.precision, threads=args.threads,
            temporal="warm", warm_steps=steps,
        )
        for steps in args.steps
    }  # fmt: skip
    engines["full"] = next(iter(engines.values()))
    videos = measure(result, engines, *frames)
    result.notes += [
        f"engine: {engines['full'].report.summary()}",
        "flicker: grey levels, of luma; target: not above that of frames sampled in full.",
        "psnr_db: the worst warm frame against the same frame sampled in full, 8-bit.",
        "times: of frames that started from the one before; ratio: over the same frame in full.",
        *(f"missed: {row['name']}" for row in result.rows if row.get("outcome") == "MISS"),
    ]
    result.finish(args.out)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, fused in videos.items():
            for t in (1, count // 2 - 1, count // 2 + 1, count - 1):
                fe.write_image(args.out / f"{harness.slug(name)}-{t}.png", fused[t])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
