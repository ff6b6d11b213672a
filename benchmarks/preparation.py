"""From two cameras' frames to an engine's buffers: colour, gain, alignment; against OpenCV.

    python -m benchmarks.preparation                     # 1080x1920 and 512x640; one thread and all
    python -m benchmarks.preparation --only nv12 --threads 1 --rounds 100

A pair is a colour frame, rgb24, nv12 or yuyv, and a 16-bit thermal frame. The thermal frame goes
through plateau equalisation and, in the same pass, through a rig's homography onto the colour
frame's pixels; of the colour frame a luma model takes one plane, an RGB model three (the thermal
frame three times then). All becomes float32 in [0, 1], padded. Target: 6 ms.

Peers in the same turns: OpenCV with the same steps, each the quickest way there is from Python, in
8 bits as long as possible and into arrays that are there, its table by NumPy's arithmetic; and
what a Stream with this rig does. All are compared first with the float64 definition.
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

from benchmarks import harness
from benchmarks.frames import MULTIPLE, picture, to_float
from fuseengine import _native
from fuseengine.alignment import Alignment, Camera, Rig
from fuseengine.kernels import warp_reference
from fuseengine.runtime.frames import FrameAdapter, prepare_pair
from fuseengine.thermal import PlateauEqualisation, ThermalInput
from fuseengine.video import CameraFrame, Stream
from fuseengine.video.frames import Format

TARGET_MS = 6.0
FORMATS: tuple[Format, ...] = ("rgb24", "nv12", "yuyv")
CHANNELS = ("luma", "rgb")
TOLERANCE = 2e-3
"""Half a level of 8 bits: frames in YUV become luma or RGB in 8 bits first."""
PEER_TOLERANCE = 0.07
"""OpenCV before version 5 samples in steps of 1/32 pixel."""

Array = NDArray[Any]
Pair = tuple[Array, Array]
Run = Callable[[], Pair]


@dataclasses.dataclass(frozen=True)
class Scene:
    """What the cameras give, and where it goes.

    Attributes:
        counts: uint16, the thermal frame.
        visible: the colour frame.
        rig: both cameras.
        adapter: size, planes and padding of the engine's buffers.
    """

    counts: Array
    visible: CameraFrame
    rig: Rig
    adapter: FrameAdapter

    def buffers(self) -> Pair:
        """Of the infrared and the visible frame, (1, C, H, W) float32."""
        shape = 2, 1, self.adapter.planes, *self.adapter.padded
        infrared, visible = np.zeros(shape, np.float32)
        return infrared, visible


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of pair.

    Attributes:
        name: of the colour frame and the model.
        exact: the buffers' content in float64.
        ours: fills buffers and gives them.
        peers: name -> the same.
    """

    name: str
    exact: Pair
    ours: Run
    peers: Mapping[str, Run]


def cases(visible: tuple[int, int], infrared: tuple[int, int]) -> Iterator[Case]:
    """Every format for both kinds of models, at (height, width) of the two cameras."""
    for kind in FORMATS:
        for channels in CHANNELS:
            made = scene(kind, channels, visible, infrared)
            yield Case(
                name=f"{kind} for {'a luma' if channels == 'luma' else 'an RGB'} model",
                exact=exact(made),
                ours=ours(made),
                peers={"OpenCV": opencv(made), "a Stream": in_a_stream(made)},
            )


def scene(
    kind: Format, channels: str, visible: tuple[int, int], infrared: tuple[int, int]
) -> Scene:
    """A made-up pair: colours that YUV holds, a few hundred counts, cameras side by side."""
    frame = 64 + picture(*visible) // 2
    counts = 20_000 + 4 * picture(*infrared)[..., 0].astype(np.uint16)
    (height, width), (rows, columns) = visible, infrared
    homography = np.array(
        [
            [columns / width, 0.01, 0.02 * columns],
            [-0.005, rows / height, 0.01 * rows],
            [1e-6, -2e-6, 1.0],
        ]
    )
    return Scene(
        counts,
        CameraFrame(as_format(frame, kind), kind),
        Rig(Camera(infrared), Camera(visible), homography),
        FrameAdapter(visible, channels, MULTIPLE),
    )


def as_format(rgb: Array, kind: Format) -> Array:
    """An RGB frame of even sides in a camera's format (BT.601, limited range)."""
    if kind == "rgb24":
        return rgb
    height, width = rgb.shape[:2]
    planes = cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_I420)
    luma = planes[:height]
    chroma = planes[height:].reshape(2, height // 2, width // 2).transpose(1, 2, 0)
    pairs = np.ascontiguousarray(chroma).reshape(height // 2, width)  # U V U V ...
    if kind == "nv12":
        return np.concatenate([luma, pairs])
    return np.stack([luma, pairs.repeat(2, axis=0)], axis=-1)


# --- definition -----------------------------------------------------------------------------------


def exact(given: Scene) -> Pair:
    """What the buffers should hold, in float64."""
    table = PlateauEqualisation().table(given.counts)
    x = torch.from_numpy(table[given.counts].astype(np.float64))[None, None]
    matrix = torch.from_numpy(given.rig.homography)[None]
    infrared = warp_reference(x, matrix, *given.adapter.size, "zero")[0].numpy()
    rgb = given.visible.format == "rgb24"
    luma, colours = of_rgb(given.visible.image) if rgb else of_yuv(given.visible)
    if given.adapter.channels == "luma":
        return padded(given, infrared), padded(given, luma[None])
    return padded(given, infrared.repeat(3, axis=0)), padded(given, colours)


def of_rgb(image: Array) -> Pair:
    """Luma (H, W) and colours (3, H, W) in [0, 1]."""
    red, green, blue = colours = np.moveaxis(image, -1, 0) / 255
    return 0.299 * red + 0.587 * green + 0.114 * blue, colours


def of_yuv(frame: CameraFrame) -> Pair:
    """The same of a frame in limited range, BT.601, by H.273's equations."""
    if frame.format == "nv12":
        rows = frame.size[0]
        y, pairs = frame.image[:rows], frame.image[rows:].repeat(2, axis=0)
    else:
        y, pairs = frame.image[..., 0], frame.image[..., 1]
    u, v = ((pairs[:, k::2].repeat(2, axis=1) - 128.0) / 224 for k in (0, 1))
    luma = (y - 16.0) / 219
    red, blue = luma + 1.402 * v, luma + 1.772 * u
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return luma.clip(0, 1), np.stack([red, green, blue]).clip(0, 1)


def padded(given: Scene, planes: Array) -> Array:
    """(C, h, w) as (1, C, H, W), reflected to the right and below."""
    (height, width), size = given.adapter.padded, given.adapter.size
    edges = [(0, 0), (0, height - size[0]), (0, width - size[1])]
    return np.pad(planes, edges, mode="reflect")[None]


# --- contenders -----------------------------------------------------------------------------------


def ours(given: Scene) -> Run:
    """The package's functions, one after the other."""
    thermal, alignment = ThermalInput("plateau"), Alignment(given.rig)
    luma = given.adapter.channels == "luma" and given.visible.format != "rgb24"
    buffers = given.buffers()

    def run() -> Pair:
        counts = thermal.correct(given.counts)
        infrared = alignment.infrared(counts, table=thermal.gain.table(counts))
        visible = given.visible.luma() if luma else given.visible.rgb()
        for pair in prepare_pair(infrared, visible):
            given.adapter.load(*pair, *buffers)
        return buffers

    return run


def in_a_stream(given: Scene) -> Run:
    """What a stream's thread and its engine do with a pair."""
    stream = Stream(
        lambda infrared, visible: visible,
        thermal=ThermalInput("plateau"),
        alignment=Alignment(given.rig),
    )
    thermal = CameraFrame(given.counts, "gray16")
    buffers = given.buffers()

    def run() -> Pair:
        for pair in prepare_pair(stream.infrared(thermal), stream.visible(given.visible)):
            given.adapter.load(*pair, *buffers)
        return buffers

    return run


def opencv(given: Scene) -> Run:
    """OpenCV, and NumPy where it has no such function."""
    infrared, visible = given.buffers()
    (height, width), rows = given.adapter.size, given.visible.size[0]
    warmed = np.zeros(given.counts.shape, np.float32)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    levels = np.clip(np.rint((np.arange(256) - 16) * (255 / 219)), 0, 255).astype(np.uint8)
    plateau = PlateauEqualisation().plateau * given.counts.size
    image, kind = given.visible.image, given.visible.format
    to_rgb = {"nv12": cv2.COLOR_YUV2RGB_NV12, "yuyv": cv2.COLOR_YUV2RGB_YUY2}
    rgb = np.zeros((height, width, 3), np.uint8)
    parts = [np.zeros((height, width), np.uint8) for _ in range(given.adapter.planes)]

    def load_infrared() -> None:
        found = cv2.calcHist([given.counts], [0], None, [65536], [0, 65536])
        found = np.minimum(found.ravel(), plateau)
        sums = np.cumsum(found, dtype=np.float64)
        table = ((sums - 0.5 * found) / sums[-1]).astype(np.float32)
        np.take(table, given.counts, out=warmed, mode="clip")
        first = infrared[0, 0, :height, :width]
        cv2.warpPerspective(warmed, given.rig.homography, (width, height), dst=first, flags=flags)
        for plane in infrared[0, 1:]:
            plane[:height, :width] = first

    def split() -> None:
        if len(parts) == 3:
            cv2.split(image if kind == "rgb24" else cv2.cvtColor(image, to_rgb[kind], rgb), parts)
        elif kind == "rgb24":
            cv2.cvtColor(image, cv2.COLOR_RGB2GRAY, dst=parts[0])
        else:
            luma = image[:rows] if kind == "nv12" else cv2.extractChannel(image, 0, parts[0])
            cv2.LUT(luma, levels, dst=parts[0])

    split()
    peaks = [int(part.max()) for part in parts]

    def run() -> Pair:
        load_infrared()
        split()
        for plane, part, peak in zip(visible[0], parts, peaks, strict=True):
            to_float(part, plane[:height, :width], peak)
        for planes in (infrared, visible):
            mirror(planes, height, width)
        return infrared, visible

    return run


def mirror(planes: Array, height: int, width: int) -> None:
    """Reflect what is there to the right and below, the edge pixel not repeated."""
    below, right = planes.shape[2] - height, planes.shape[3] - width
    if below:
        planes[:, :, height:] = planes[:, :, height - 1 - below : height - 1][:, :, ::-1]
    if right:
        planes[..., width:] = planes[..., width - 1 - right : width - 1][..., ::-1]


# --- command line ---------------------------------------------------------------------------------


def measure(result: harness.Result, case: Case, threads: int, rounds: int) -> None:
    """Rows of one case: checked first, then timed in turns."""
    _native.set_num_threads(threads)
    cv2.setNumThreads(threads)
    contenders = {"ours": case.ours, **case.peers}
    errors = {name: error(run(), case.exact) for name, run in contenders.items()}
    for name, found in errors.items():
        limit = TOLERANCE if name == "ours" else PEER_TOLERANCE
        if not found <= limit:
            raise SystemExit(f"{case.name}, {name}: differs by {found}, expected at most {limit}")
    times = harness.interleave(contenders, rounds=rounds, warmup=3)
    own = times["ours"]
    for peer in case.peers:
        result.add(
            f"{case.name} vs {peer}, {threads} thread{'s' * (threads > 1)}",
            own,
            max_abs_error=errors["ours"],
            ratio=str(harness.paired_ratio(times[peer], own)),
            outcome="PASS" if own.p50 < TARGET_MS else "MISS",
            **{"peer p50 ms": times[peer].p50, "peer error": errors[peer]},
        )


def error(found: Pair, expected: Pair) -> float:
    """The larger of the two buffers' errors."""
    return max(harness.max_abs_error(a, b) for a, b in zip(found, expected, strict=True))


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.preparation", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--visible", type=_size, default=(1080, 1920), metavar="HxW", help="even")
    made.add_argument("--infrared", type=_size, default=(512, 640), metavar="HxW")
    every = sorted({1, _native.num_threads()})
    made.add_argument("--threads", nargs="+", type=int, default=every)
    made.add_argument("--only", default="", help="part of a case's name, any case of letters")
    made.add_argument("--rounds", type=int, default=50)
    made.add_argument("--out", type=Path, help="folder of results instead of benchmarks/results")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    sizes = {name: "{}x{}".format(*getattr(args, name)) for name in ("visible", "infrared")}
    settings = {**sizes, "threads": " ".join(map(str, args.threads)), "opencv": cv2.__version__}
    title = "Pairs of camera frames made an engine's inputs, against OpenCV"
    result = harness.Result("preparation", "cpu", title, settings)
    result.command = harness.command_line("benchmarks.preparation", words)
    result.notes = [
        "ratio: the peer's time over ours, median of the rounds' own ratios, 95% interval.",
        f"outcome: whether our p50 is below {TARGET_MS:g} ms, the target for 1080x1920 and "
        "512x640.",
        "OpenCV writes into arrays that are there; the package's functions make theirs anew.",
    ]
    for case in cases(args.visible, args.infrared):
        if args.only.lower() in case.name.lower():
            for threads in args.threads:
                measure(result, case, threads, args.rounds)
    result.note_slower()
    result.finish(args.out, write=not args.only)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
