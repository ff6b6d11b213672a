"""Frames in and out on the CPU against OpenCV, Pillow and NumPy, in turns, in one process.

    python -m benchmarks.frames                          # 480x640 and 1080x1920, 1 and 2 threads
    python -m benchmarks.frames --only ycbcr --threads 1 --rounds 100

Each row is one peer: our time, the peer's, their ratio. Every contender writes into arrays that are
there, where it can. OpenCV and Pillow take the quickest way there is from Python, in 8 bits as long
as possible, and so are wrong by up to 1.5 of 255 levels in, 4 out. All are compared first with the
float64 definition of the op. OpenCV gets as many threads as ours; NumPy and Pillow have one.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks import harness
from fuseengine import _native
from fuseengine.kernels import (
    frame_in_reference,
    frame_out_reference,
    warp_reference,
)

SIZES = ((480, 640), (1080, 1920))
MULTIPLE = 16
"""Height and width of the planes are multiples of this, as a network asks for."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
HOMOGRAPHY = np.array([[0.98, 0.03, 5.0], [-0.02, 1.01, -7.0], [1e-5, -2e-5, 1.0]])
"""As between two cameras side by side: some pixels and per cent."""

Array = NDArray[Any]
Run = Callable[[], Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        name: op and size.
        exact: the result in float64.
        tolerance: largest error of ours.
        peer_tolerance: largest error of a peer.
        nbytes: read and written once, without what a peer makes on the way.
        ours: writes the result and gives it.
        peers: name -> the same.
    """

    name: str
    exact: Array
    tolerance: float
    peer_tolerance: float
    nbytes: int
    ours: Run
    peers: Mapping[str, Run]


def picture(height: int, width: int) -> Array:
    """A colour frame with edges and grain; every channel reaches 0 and 255."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    frame = np.asarray(image).astype(np.int16) + rng.integers(-8, 9, (height, width, 3))
    frame[0, 0], frame[0, 1] = 0, 255
    return np.clip(frame, 0, 255).astype(np.uint8)


def cases(height: int, width: int) -> Iterator[Case]:
    """Every op at a size."""
    frame = picture(height, width)
    padded = tuple(-(-n // MULTIPLE) * MULTIPLE for n in (height, width))
    yield to_ycbcr(frame, padded)
    yield to_luma(frame, padded)
    yield thermal(height, width, padded)
    yield with_chroma(frame, padded)
    yield warped(height, width)


# --- frames in ------------------------------------------------------------------------------------


def exact_in(frame: Array, channels: str, size: tuple[int, ...], scale: float) -> Array:
    given = torch.from_numpy(frame)[None], channels, *size, 0.0, scale
    return frame_in_reference(*given, torch.float64)[0].numpy()


def to_float(plane: Array, out: Array, peak: int) -> None:
    """OpenCV's quickest conversion from Python: ``convertTo``, by way of a norm that is known."""
    cv2.normalize(plane, out, peak / 255, 0, cv2.NORM_INF, cv2.CV_32F)


def to_ycbcr(frame: Array, size: tuple[int, ...]) -> Case:
    """uint8 RGB to three float planes, padded."""
    height, width = frame.shape[:2]
    below, right = size[0] - height, size[1] - width
    ours = np.zeros((3, *size), np.float32)
    theirs = np.zeros_like(ours)
    wide, colours = np.zeros((*size, 3), np.uint8), np.zeros((*size, 3), np.uint8)
    parts = [np.zeros(size, np.uint8) for _ in range(3)]
    cv2.cvtColor(frame, cv2.COLOR_RGB2YCrCb, dst=colours[:height, :width])
    peaks = colours.max((0, 1)).tolist()

    def native() -> Array:
        _native.frame_in(frame, ours, scale=1 / 255, ycbcr=True)
        return ours

    def opencv() -> Array:
        cv2.copyMakeBorder(frame, 0, below, 0, right, cv2.BORDER_REFLECT_101, dst=wide)
        cv2.cvtColor(wide, cv2.COLOR_RGB2YCrCb, dst=colours)
        cv2.split(colours, parts)
        for part, index, peak in zip(parts, (0, 2, 1), peaks, strict=True):  # Y, Cr, Cb
            to_float(part, theirs[index], peak)
        return theirs

    def opencv_float() -> Array:
        values = np.multiply(frame, np.float32(1 / 255), dtype=np.float32)
        values = cv2.cvtColor(values, cv2.COLOR_RGB2YCrCb)
        values = cv2.copyMakeBorder(values, 0, below, 0, right, cv2.BORDER_REFLECT_101)
        cv2.split(values, [theirs[0], theirs[2], theirs[1]])
        return theirs

    def numpy() -> Array:
        red, green, blue = np.moveaxis(frame.astype(np.float32) / 255, -1, 0)
        y = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
        planes = np.stack([y, 0.5 + (blue - y) / 1.772, 0.5 + (red - y) / 1.402])
        return np.pad(planes, [(0, 0), (0, below), (0, right)], mode="reflect")

    def pillow() -> Array:
        values = np.asarray(Image.fromarray(frame).convert("YCbCr")).transpose(2, 0, 1)
        values = np.pad(values, [(0, 0), (0, below), (0, right)], mode="reflect")
        return np.multiply(values, np.float32(1 / 255), out=theirs)

    return Case(
        name=f"uint8 to YCbCr {height}x{width}",
        exact=exact_in(frame, "ycbcr", size, 1 / 255),
        tolerance=1e-6,
        peer_tolerance=1.5 / 255,
        nbytes=frame.nbytes + ours.nbytes,
        ours=native,
        peers={
            "OpenCV": opencv,
            "OpenCV in float32": opencv_float,
            "Pillow": pillow,
            "NumPy": numpy,
        },
    )


def to_luma(frame: Array, size: tuple[int, ...]) -> Case:
    """uint8 RGB to one float plane, padded: what an engine does with every visible frame."""
    height, width = frame.shape[:2]
    below, right = size[0] - height, size[1] - width
    ours, theirs = np.zeros((1, *size), np.float32), np.zeros((1, *size), np.float32)
    gray, wide = np.zeros((height, width), np.uint8), np.zeros(size, np.uint8)
    peak = int(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).max())

    def native() -> Array:
        _native.frame_in(frame, ours, scale=1 / 255)
        return ours

    def opencv() -> Array:
        cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY, dst=gray)
        cv2.copyMakeBorder(gray, 0, below, 0, right, cv2.BORDER_REFLECT_101, dst=wide)
        to_float(wide, theirs[0], peak)
        return theirs

    def numpy() -> Array:
        luma = (frame.astype(np.float32) @ LUMA) / 255
        return np.pad(luma, [(0, below), (0, right)], mode="reflect")[None]

    def pillow() -> Array:
        values = np.asarray(Image.fromarray(frame).convert("L"))
        values = np.pad(values, [(0, below), (0, right)], mode="reflect")
        return np.multiply(values, np.float32(1 / 255), out=theirs[0])[None]

    return Case(
        name=f"uint8 to luma {height}x{width}",
        exact=exact_in(frame, "luma", size, 1 / 255),
        tolerance=1e-6,
        peer_tolerance=1.5 / 255,
        nbytes=frame.nbytes + ours.nbytes,
        ours=native,
        peers={"OpenCV": opencv, "Pillow": pillow, "NumPy": numpy},
    )


def thermal(height: int, width: int, size: tuple[int, ...]) -> Case:
    """uint16 counts to one float plane, padded."""
    counts = np.random.default_rng(0).integers(0, 65536, (height, width), dtype=np.uint16)
    counts[0, 0] = 65535
    below, right = size[0] - height, size[1] - width
    ours, theirs = np.zeros((1, *size), np.float32), np.zeros((1, *size), np.float32)
    wide = np.zeros(size, np.uint16)

    def native() -> Array:
        _native.frame_in(counts, ours, scale=1 / 65535)
        return ours

    def opencv() -> Array:
        cv2.copyMakeBorder(counts, 0, below, 0, right, cv2.BORDER_REFLECT_101, dst=wide)
        cv2.normalize(wide, theirs[0], 1.0, 0, cv2.NORM_INF, cv2.CV_32F)
        return theirs

    def numpy() -> Array:
        values = np.pad(counts, [(0, below), (0, right)], mode="reflect")
        return np.multiply(values, np.float32(1 / 65535), out=theirs[0])[None]

    return Case(
        name=f"uint16 to a plane {height}x{width}",
        exact=exact_in(counts, "luma", size, 1 / 65535),
        tolerance=1e-6,
        peer_tolerance=1e-6,
        nbytes=counts.nbytes + ours.nbytes,
        ours=native,
        peers={"OpenCV": opencv, "NumPy": numpy},
    )


# --- frames out -----------------------------------------------------------------------------------


def with_chroma(frame: Array, size: tuple[int, ...]) -> Case:
    """One float plane and the visible frame to a uint8 RGB frame."""
    height, width = frame.shape[:2]
    smooth = cv2.GaussianBlur(frame @ LUMA, (0, 0), 3) / 255
    fused = np.zeros((1, *size), np.float32)
    fused[0, :height, :width] = smooth
    ours, theirs = np.zeros_like(frame), np.zeros_like(frame)
    colours, luma = np.zeros_like(frame), np.zeros((height, width), np.uint8)

    def native() -> Array:
        _native.frame_out(fused, frame, ours)
        return ours

    def opencv() -> Array:
        cv2.cvtColor(frame, cv2.COLOR_RGB2YCrCb, dst=colours)
        cv2.convertScaleAbs(fused[0, :height, :width], luma, 255.0)
        cv2.insertChannel(luma, colours, 0)
        return cv2.cvtColor(colours, cv2.COLOR_YCrCb2RGB, dst=theirs)

    def numpy() -> Array:
        values = frame.astype(np.float32)
        values += (fused[0, :height, :width] * 255 - values @ LUMA)[..., None]
        return np.clip(values + 0.5, 0, 255).astype(np.uint8)

    def pillow() -> Array:
        _, cb, cr = Image.fromarray(frame).convert("YCbCr").split()
        values = np.clip(fused[0, :height, :width] * 255 + 0.5, 0, 255)
        bands = Image.fromarray(values.astype(np.uint8)), cb, cr
        return np.asarray(Image.merge("YCbCr", bands).convert("RGB"))

    wide = torch.from_numpy(frame)[None].double() / 255
    given = torch.from_numpy(fused)[None].double(), wide, height, width
    return Case(
        name=f"luma and chroma to uint8 {height}x{width}",
        exact=255 * frame_out_reference(*given, torch.float64)[0].numpy(),
        tolerance=0.5001,
        peer_tolerance=4.0,
        nbytes=4 * height * width + 2 * frame.nbytes,
        ours=native,
        peers={"OpenCV": opencv, "Pillow": pillow, "NumPy": numpy},
    )


def warped(height: int, width: int) -> Case:
    """A float plane through a homography."""
    x = np.random.default_rng(0).random((1, 1, height, width), dtype=np.float32)
    matrix = HOMOGRAPHY[None].astype(np.float32)
    ours, theirs = np.zeros_like(x), np.zeros_like(x)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP

    def native() -> Array:
        _native.warp(x, matrix, ours)
        return ours

    def opencv() -> Array:
        cv2.warpPerspective(x[0, 0], HOMOGRAPHY, (width, height), dst=theirs[0, 0], flags=flags)
        return theirs

    given = torch.from_numpy(x).double(), torch.from_numpy(matrix).double(), height, width
    return Case(
        name=f"homography {height}x{width}",
        exact=warp_reference(*given, "zero").numpy(),
        tolerance=1e-3,
        peer_tolerance=0.07,  # before version 5, weights in steps of 1/32
        nbytes=2 * x.nbytes,
        ours=native,
        peers={"OpenCV": opencv},
    )


# --- command line ---------------------------------------------------------------------------------


def measure(result: harness.Result, case: Case, threads: int, rounds: int) -> None:
    """Rows of one case: checked first, then timed in turns."""
    _native.set_num_threads(threads)
    cv2.setNumThreads(threads)
    contenders = {"ours": case.ours, **case.peers}
    errors = {name: harness.max_abs_error(run(), case.exact) for name, run in contenders.items()}
    for name, error in errors.items():
        limit = case.tolerance if name == "ours" else case.peer_tolerance
        if not error <= limit:
            raise SystemExit(f"{case.name}, {name}: differs by {error}, expected at most {limit}")
    times = harness.interleave(contenders, rounds=rounds, warmup=3)
    ours = times["ours"]
    for peer in case.peers:
        result.add(
            f"{case.name} vs {peer}, {threads} thread{'s' * (threads > 1)}",
            ours,
            max_abs_error=errors["ours"],
            gb_per_s=ours.gb_per_s(case.nbytes),
            ratio=str(harness.paired_ratio(times[peer], ours)),
            **{"peer p50 ms": times[peer].p50, "peer error": errors[peer]},
        )


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.frames", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--size", nargs="+", type=_size, default=list(SIZES), metavar="HxW")
    made.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    made.add_argument("--only", default="", help="part of a case's name, any case of letters")
    made.add_argument("--rounds", type=int, default=50)
    made.add_argument("--out", type=Path, help="folder of results instead of benchmarks/results")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    settings = {"threads": " ".join(map(str, args.threads)), "opencv": cv2.__version__}
    title = "Frames in and out against OpenCV, Pillow and NumPy"
    result = harness.Result("frames", "cpu", title, settings)
    result.command = harness.command_line("benchmarks.frames", words)
    result.notes = [
        "ratio: the peer's time over ours, median of the rounds' own ratios, 95% interval.",
        "Peers work in 8 bits as long as they can: see their error. NumPy and Pillow have one "
        "thread in every row.",
    ]
    for size in args.size:
        for case in cases(*size):
            if args.only.lower() in case.name.lower():
                for threads in args.threads:
                    measure(result, case, threads, args.rounds)
    result.note_slower()
    result.finish(args.out, write=not args.only)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
