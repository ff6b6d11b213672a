"""``fuseengine video``: two cameras or recordings in, a fused video out."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuseengine.cli.common import (
    RawHelp,
    add_engine_options,
    add_temporal,
    frame_size,
    make_engine,
    note,
    one_line,
    positive_float,
    positive_int,
)
from fuseengine.cli.fuse import infrared_range
from fuseengine.errors import SettingError

if TYPE_CHECKING:
    from fuseengine.thermal import ThermalInput
    from fuseengine.video import Event, Source, StreamStats

_DESCRIPTION = """\
Fuse the frames of an infrared and a visible camera, paired by time.

Cameras are followed as well as the engine can: the newest pair is fused, the
others are counted as dropped. Of recordings no pair is dropped, unless there
is a deadline: then they are played at their own speed.

sources: a video file, a folder or pattern of images (DIR, 'DIR/*.png',
DIR/%04d.tif), /dev/video1 or 'v4l2:///dev/video1?format=y16&rate=30',
csi://0, rtsp://..., a GStreamer pipeline with '!', shm://NAME.
outputs: .mp4, .mkv, .mov, a folder or pattern of images, shm://NAME, null."""

_EPILOG = """\
examples:
  fuseengine video --infrared ir.mp4 --visible vis.mp4 -o fused.mp4
  fuseengine video --infrared /dev/video1 --visible rtsp://10.0.0.5/live \\
      --show --deadline 33ms --engine drfusion.fuse
  fuseengine video --infrared thermal/%05d.tif --visible vis.mp4 \\
      --infrared-range 7000,9500 --resize infrared --offset=-40ms -o fused.mkv

exit code: 0 when frames were fused; 2 an error, or no frame was fused; 130
interrupted: the file is finished and plays."""


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "video",
        help="fuse two cameras or videos as they come",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RawHelp,
    )
    parser.add_argument("--infrared", required=True, metavar="URI", help="infrared source")
    parser.add_argument("--visible", required=True, metavar="URI", help="visible source")
    parser.add_argument("-o", "--output", metavar="OUT", help="where the fused frames go")
    parser.add_argument(
        "--show", action="store_true", help="show them in a window too; q or Escape ends"
    )
    parser.add_argument(
        "--engine",
        type=Path,
        metavar="FILE",
        help="fuse with a compiled file, see 'fuseengine compile'; needs no PyTorch",
    )
    add_engine_options(parser)
    timing = parser.add_argument_group("time")
    timing.add_argument(
        "--deadline",
        type=milliseconds,
        metavar="TIME",
        help="largest time from a frame's capture to its fused frame, as 33ms or 0.1s",
    )
    timing.add_argument(
        "--strict", action="store_true", help="a deadline that cannot be kept is an error"
    )
    timing.add_argument(
        "--tolerance",
        type=milliseconds,
        metavar="TIME",
        help="largest time between the frames of a pair (default: half the slower camera's "
        "interval)",
    )
    timing.add_argument(
        "--offset",
        type=milliseconds,
        default=0.0,
        metavar="TIME",
        help="infrared time minus visible time of one moment (negative: --offset=-40ms)",
    )
    timing.add_argument(
        "--rate",
        type=positive_float,
        metavar="FPS",
        help="of images (default: 30), or what cameras are asked for",
    )
    timing.add_argument("--max-frames", type=positive_int, metavar="N", help="end after N frames")
    frames = parser.add_argument_group("frames")
    frames.add_argument(
        "--resize",
        choices=("infrared",),
        help="'infrared': resample infrared frames to the visible ones' size",
    )
    frames.add_argument(
        "--infrared-range",
        type=infrared_range,
        metavar="minmax|LO,HI",
        help="values of the infrared frames that become black and white",
    )
    frames.add_argument(
        "--agc",
        choices=("percentile", "plateau", "clahe"),
        help="gain control of thermal counts, smoothed over time",
    )
    frames.add_argument(
        "--destreak", action="store_true", help="take a thermal sensor's column noise out"
    )
    frames.add_argument(
        "--dead-pixels",
        type=Path,
        metavar="FILE",
        help="CSV file of the thermal sensor's bad pixels, a row and a column per line",
    )
    frames.add_argument(
        "--alignment",
        type=Path,
        metavar="RIG.json",
        help="bring both cameras onto one grid, see 'fuseengine calibrate'",
    )
    frames.add_argument(
        "--size",
        type=frame_size,
        metavar="WxH",
        help="of that grid (default: the engine's, or the visible camera's)",
    )
    add_temporal(frames)
    talk = parser.add_argument_group("what is printed")
    talk.add_argument(
        "--progress", action="store_true", help="show the progress line even without a terminal"
    )
    talk.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.set_defaults(run=run)


def milliseconds(text: str) -> float:
    """An argument that is a time, as 33ms, 0.033s or 33 (milliseconds)."""
    number, factor = text.strip().lower(), 1.0
    if number.endswith("ms"):
        number = number[:-2]
    elif number.endswith("s"):
        number, factor = number[:-1], 1e3
    try:
        value = float(number) * factor
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a time such as 33ms or 0.1s")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from fuseengine.alignment import Alignment, Rig
    from fuseengine.video import Stream, open_sink, open_source

    if args.output is None and not args.show:
        raise SettingError("there is nowhere for the fused frames to go; give -o OUT or --show")
    _check_output(args)
    stats: StreamStats | None = None
    written, begin = 0, time.monotonic()
    with contextlib.ExitStack() as stack:
        # A run takes its sources over; until then they are closed here.
        infrared: Source = stack.enter_context(open_source(args.infrared, rate=args.rate))
        visible: Source = stack.enter_context(open_source(args.visible, rate=args.rate))
        outputs = [args.output] * (args.output is not None) + ["display://"] * args.show
        sinks = [
            stack.enter_context(open_sink(uri, rate=visible.rate or args.rate)) for uri in outputs
        ]
        if args.alignment is None and args.size is not None:
            raise SettingError("--size is the size of an alignment's grid; give --alignment too")
        rig = None if args.alignment is None else Rig.load(args.alignment)
        engine = make_engine(args, visible.size if rig is None else args.size or rig.visible.size)
        grid = None if rig is None else Alignment(rig, args.size or engine.size)
        note(args, engine.report.summary())
        talk = stack.enter_context(_Talk(args))
        stream = stack.enter_context(
            Stream(
                engine,
                deadline_ms=args.deadline,
                strict=args.strict,
                tolerance_ms=args.tolerance,
                offset_ms=args.offset,
                resize=args.resize,
                infrared_range=args.infrared_range,
                thermal=_thermal(args),
                alignment=grid,
                temporal=args.temporal,
                on_event=talk.event,
            )
        )
        try:
            begin = time.monotonic()
            for frame in stream.run(infrared, visible):
                for sink in sinks:
                    sink.write(frame)
                written += 1
                talk.frame(stream.stats)
                if written == args.max_frames or any(sink.dismissed for sink in sinks):
                    break
        finally:  # after Ctrl-C too: first the files, then the summary
            stream.close()
            for sink in sinks:
                sink.close()
            talk.close()
            stats = stream.stats
            if not args.quiet:
                seconds = time.monotonic() - begin
                print(summary(stats, args.output or "window", written, seconds))
    if stats.fused == 0:
        raise SettingError(
            f"no frame was fused of {stats.infrared.captured} infrared and "
            f"{stats.visible.captured} visible ones; expected frames of one size whose times are "
            "within the tolerance: see the events above, --tolerance and --offset"
        )
    return 0


def summary(stats: StreamStats, output: str, written: int, seconds: float) -> str:
    """What became of the frames, as text; `written` of them went to the output."""
    lines = [f"{output}: {written} frames in {seconds:.1f} s"]
    if stats.fused > 1:
        p50, p90, p99 = (stats.latency_ms(q) for q in (50, 90, 99))
        lines[0] += f", {stats.fps:.1f} fps"
        lines.append(f"latency: p50 {p50:.1f} ms, p90 {p90:.1f} ms, p99 {p99:.1f} ms")
    counts = {
        "dropped": stats.dropped,
        "late": stats.late,
        "refused": stats.refused,
    }
    lines.append(
        f"pairs: {stats.paired}, " + ", ".join(f"{name} {count}" for name, count in counts.items())
    )
    for name, camera in zip(("infrared", "visible"), stats.cameras, strict=True):
        line = f"{name}: {camera.captured} captured, {camera.unpaired} unpaired"
        rare = ("broken", "missed", "stalls", "reconnects")
        line += "".join(f", {getattr(camera, k)} {k}" for k in rare if getattr(camera, k))
        lines.append(line)
    return "\n".join(lines)


def _thermal(args: argparse.Namespace) -> ThermalInput | None:
    """What the infrared camera's counts go through; None for nothing."""
    from fuseengine.thermal import ThermalInput

    if args.agc is None and not args.destreak and args.dead_pixels is None:
        return None
    if args.infrared_range is not None:
        raise SettingError(
            "--infrared-range and --agc, --destreak or --dead-pixels exclude each other"
        )
    places = None
    if args.dead_pixels is not None:
        try:
            lines = args.dead_pixels.read_text(encoding="utf-8").split("\n")
            places = [(int(r), int(c)) for r, c in (x.split(",") for x in lines if x.strip())]
        except (OSError, ValueError) as error:
            raise SettingError(
                f"{args.dead_pixels} cannot be read ({error}); expected a row and a column per "
                "line, such as 17,240"
            ) from error
    return ThermalInput(args.agc or "percentile", dead_pixels=places, destreak=args.destreak)


def _check_output(args: argparse.Namespace) -> None:
    """Refuse to write over an input, which opening the output would empty."""
    if args.output is None:
        return
    path = Path(args.output.removeprefix("file://"))
    for name in (args.infrared, args.visible):
        source = Path(name.removeprefix("file://"))
        if path.exists() and source.exists() and path.samefile(source):
            raise SettingError(f"-o {args.output} is one of the inputs; choose another output")


class _Talk:
    """The progress line and the events, on standard error."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._quiet = args.quiet
        self._bar: Any = None
        if not args.quiet and (args.progress or sys.stderr.isatty()):
            from tqdm import tqdm

            self._bar = tqdm(total=args.max_frames, unit="frame", desc="video", file=sys.stderr)

    def event(self, event: Event) -> None:
        line = one_line(Exception(str(event)))
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif not self._quiet:
            print(line, file=sys.stderr)

    def frame(self, stats: StreamStats) -> None:
        if self._bar is not None:
            p50 = f"{stats.latency_ms(50):.0f} ms"
            self._bar.set_postfix(dropped=stats.dropped, p50=p50, refresh=False)
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> _Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
