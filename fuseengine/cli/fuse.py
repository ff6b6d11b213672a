"""``fuseengine fuse``: one pair of files, or two folders paired by file name."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fuseengine.cli.common import (
    RawHelp,
    add_engine_options,
    check_bundle_options,
    check_output_file,
    make_engine,
    note,
    one_line,
    progress_bar,
)
from fuseengine.errors import FuseEngineError, ImageFileError, SettingError
from fuseengine.runtime.formats import SUFFIXES

if TYPE_CHECKING:
    from fuseengine.distributed import Job
    from fuseengine.engine import Engine

_T = TypeVar("_T")
_R = TypeVar("_R")

_AHEAD = 2
"""Pairs read before their turn, and outputs not yet written, in folder mode."""

_DESCRIPTION = """\
Fuse an infrared and a visible image, or all pairs of two folders.

Folders: images are paired by file name without the suffix; each output keeps
that name. A pair that fails is listed at the end and does not stop the others.
An output file that exists is replaced, but only once the new one is written
whole."""

_EPILOG = """\
examples:
  fuseengine fuse ir.png vis.png -o fused.png
  fuseengine fuse thermal16.tif rgb.jpg -o fused.png --infrared-range minmax
  fuseengine fuse IR_DIR VIS_DIR -o OUT_DIR --precision fp32
  fuseengine fuse IR_DIR VIS_DIR -o OUT_DIR --ray --threads 2
  fuseengine fuse ir.png vis.png -o fused.png --engine drfusion.fuse

exit code: 0 all pairs were fused; 2 an error, or at least one pair failed; 130
interrupted. Files without a partner in the other folder are listed and are not
failures."""


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "fuse",
        help="fuse a pair of images, or two folders of them",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RawHelp,
    )
    parser.add_argument("infrared", type=Path, metavar="IR", help="infrared image, or folder")
    parser.add_argument(
        "visible", type=Path, metavar="VIS", help="visible image of the same view, or folder"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="file to write, or folder (made if missing); a file's suffix says the format",
    )
    parser.add_argument(
        "--engine",
        type=Path,
        metavar="FILE.fuse",
        help="fuse with a compiled file, see 'fuseengine compile'; needs no PyTorch",
    )
    add_engine_options(parser)
    frames = parser.add_argument_group("frames")
    frames.add_argument(
        "--resize",
        metavar="infrared",
        help="'infrared': resample infrared images to the visible ones' size; by default sizes "
        "that differ are an error",
    )
    frames.add_argument(
        "--infrared-range",
        type=infrared_range,
        metavar="minmax|LO,HI",
        help="values of the infrared image that become black and white: those of each image, or "
        "two numbers (a negative one needs '=': --infrared-range=-20,120)",
    )
    frames.add_argument(
        "--suffix",
        metavar=".EXT",
        help=f"of the outputs in folder mode (default: .png): {', '.join(SUFFIXES)}",
    )
    many = parser.add_argument_group("many pairs")
    many.add_argument(
        "--ray",
        action="store_true",
        help="spread folders over a Ray cluster; run again, it goes on where it stopped",
    )
    many.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of the cluster, such as ray://host:10001 (default: $RAY_ADDRESS, else a cluster on "
        "this machine)",
    )
    many.add_argument(
        "--restart", action="store_true", help="with --ray: make finished outputs again"
    )
    talk = parser.add_argument_group("what is printed")
    talk.add_argument(
        "--report", action="store_true", help="print what compiling tried, measured and chose"
    )
    talk.add_argument(
        "--progress", action="store_true", help="show the progress bar even without a terminal"
    )
    talk.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.resize not in (None, "infrared"):
        raise SettingError(f"--resize: got {args.resize!r}, expected 'infrared'")
    if (args.ray_address or args.restart) and not args.ray:
        raise SettingError("--ray-address, --restart: they say how --ray works; give --ray too")
    folders = args.infrared.is_dir(), args.visible.is_dir()
    if args.ray and not all(folders):
        raise SettingError(
            f"--ray spreads two folders; got {args.infrared} and {args.visible}, expected folders"
        )
    if all(folders):
        return _fuse_folders(args)
    if any(folders):
        folder, file = args.infrared, args.visible
        if folders[1]:
            folder, file = file, folder
        if not file.exists():
            raise ImageFileError(f"{file}: no such folder; expected one, as {folder} is")
        raise ImageFileError(
            f"{folder} is a folder and {file} is not; expected two image files or two folders"
        )
    return _fuse_files(args)


def _fuse_files(args: argparse.Namespace) -> int:
    from fuseengine.runtime.frames import prepare_pair
    from fuseengine.runtime.images import read_image, write_image

    if args.suffix is not None:
        raise SettingError(
            f"--suffix {args.suffix}: it is for folders; for files, -o says the format"
        )
    infrared, visible = read_image(args.infrared), read_image(args.visible)
    check_output_file(args.output, args.infrared, args.visible)
    # Checked before compiling, which takes seconds.
    size = prepare_pair(infrared, visible, **_frame_options(args)).size
    engine = make_engine(args, size)
    begin = time.perf_counter()
    fused = engine(infrared, visible, **_frame_options(args))
    elapsed = time.perf_counter() - begin
    write_image(args.output, fused)
    _print_engine(args, engine)
    if not args.quiet:
        print(f"{args.output}: {size[1]}x{size[0]}, fused in {elapsed * 1e3:.1f} ms")
    return 0


@dataclass
class FolderSummary:
    """What became of the pairs of two folders.

    The first pair of each size also prepares the engine for that size, so it is timed apart.
    """

    pairs: int
    milliseconds: list[float] = field(default_factory=list)
    first_milliseconds: dict[tuple[int, ...], float] = field(default_factory=dict)
    written: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)

    def lines(
        self, output: Path, seconds: float, lonely: Sequence[tuple[str, Sequence[Path]]]
    ) -> str:
        """The summary as text; `lonely` names the files without a partner, per folder."""
        head = f"fused {self.written} of {self.pairs} pairs into {output} in {seconds:.1f} s"
        lines = [head]
        if self.milliseconds:
            lines.append(f"median {statistics.median(self.milliseconds):.1f} ms per pair")
        if self.first_milliseconds:
            median = statistics.median(self.first_milliseconds.values())
            lines.append(
                f"sizes met: {len(self.first_milliseconds)}; median {median:.1f} ms for the first "
                "pair of a size, which prepares the engine for it"
            )
        if self.failures:
            lines.append(f"failed: {len(self.failures)}")
            lines += [f"  {name}: {reason}" for name, reason in sorted(self.failures)]
        return "\n".join([*lines, *_lonely_lines(lonely)])


def _lonely_lines(lonely: Iterable[tuple[str, Sequence[Path]]]) -> list[str]:
    """Files without a partner in the other folder, a line per folder that has some."""
    return [
        f"{kind} without a partner: {', '.join(file.name for file in files)}"
        for kind, files in lonely
        if files
    ]


def _fuse_folders(args: argparse.Namespace) -> int:
    from fuseengine.runtime.images import pair_files

    suffix = args.suffix or ".png"
    if suffix.lower() not in SUFFIXES:
        raise SettingError(f"--suffix: got {suffix!r}, expected one of {', '.join(SUFFIXES)}")
    if args.output.exists() and not args.output.is_dir():
        raise ImageFileError(
            f"{args.output} is a file; expected a folder, as {args.infrared} and {args.visible} are"
        )
    for folder in (args.infrared, args.visible):
        if args.output.exists() and args.output.samefile(folder):
            raise ImageFileError(
                f"the output folder {args.output} is one of the inputs; choose another one, so "
                "that no input is replaced"
            )
    found = pair_files(args.infrared, args.visible)
    if not found.pairs:
        raise ImageFileError(
            f"no pairs in {args.infrared} ({len(found.only_infrared)} images) and {args.visible} "
            f"({len(found.only_visible)} images); expected names that are the same up to the suffix"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    lonely = (("infrared", found.only_infrared), ("visible", found.only_visible))
    if args.ray:
        return _fuse_over_ray(args, found.pairs, suffix, lonely)
    engine = make_engine(args, None)
    _print_engine(args, engine)
    summary = FolderSummary(len(found.pairs))
    begin = time.perf_counter()
    try:
        fuse_pairs(args, engine, found.pairs, args.output, suffix, summary)
    finally:  # after Ctrl-C too: what is done is done
        failed = summary.failures or summary.written < summary.pairs
        if not args.quiet or failed:
            text = summary.lines(args.output, time.perf_counter() - begin, lonely)
            print(text, file=sys.stderr if args.quiet else sys.stdout)
    return 2 if summary.failures else 0


def _fuse_over_ray(
    args: argparse.Namespace,
    pairs: Sequence[tuple[Path, Path]],
    suffix: str,
    lonely: Iterable[tuple[str, Sequence[Path]]],
) -> int:
    from fuseengine.distributed import Outcome, fuse_over_ray

    outcome = Outcome(len(pairs))
    try:
        fuse_over_ray(
            pairs,
            args.output,
            make_job(args, suffix),
            outcome,
            address=args.ray_address,
            threads=args.threads,
            gpu=args.device == "cuda",
            restart=args.restart,
            progress=lambda done, total: progress_bar(
                args, done, total, unit="pair", desc=_label(args)
            ),
        )
    finally:  # after Ctrl-C too
        left = outcome.pairs - outcome.finished - outcome.made
        named = [(name, one_line(FuseEngineError(why))) for name, why in outcome.failures]
        outcome.failures = named
        if outcome.seconds and (left or not args.quiet):
            text = "\n".join([outcome.lines(args.output), *_lonely_lines(lonely)])
            print(text, file=sys.stderr if args.quiet else sys.stdout)
    return 2 if left else 0


def make_job(args: argparse.Namespace, suffix: str) -> Job:
    """What the actors of ``--ray`` do, by the options of the engine and of the frames."""
    from fuseengine.distributed import Job

    named = {name: getattr(args, name) for name in ("device", "backend", "precision")}
    if args.engine is not None:
        check_bundle_options(args)
        asked = {name: None if value == "auto" else value for name, value in named.items()}
        return Job(asked, str(args.engine.resolve()), _frame_options(args), suffix)
    asked = {"model": args.model, **named, "effort": args.effort, "cache": not args.no_cache}
    return Job(asked, "", _frame_options(args), suffix)


def fuse_pairs(
    args: argparse.Namespace,
    engine: Engine,
    pairs: Sequence[tuple[Path, Path]],
    output: Path,
    suffix: str,
    summary: FolderSummary,
    *,
    warm: bool = False,
) -> None:
    """Fuse pair after pair; threads read the next and write the last ones meanwhile.

    Args:
        args: the options of frames and of what is printed.
        engine: takes any size.
        pairs: infrared and visible files; those of one size are fused one after the other.
        output: an existing folder.
        suffix: of the files written.
        summary: takes times, counts and failures.
        warm: fuse the first pair of a size twice, so that every pair has a time of a ready engine.
    """
    options = _frame_options(args)
    pairs = sorted(pairs, key=_size)
    writing: deque[tuple[str, Future[None]]] = deque()

    def fail(name: str, error: Exception) -> None:
        if args.traceback:
            traceback.print_exception(error)
        # Anything else than our own errors is a fault, of a backend perhaps: name its kind.
        kind = "" if isinstance(error, FuseEngineError) else f"{type(error).__name__}: "
        summary.failures.append((name, kind + one_line(error)))

    def finish_write() -> None:
        name, future = writing.popleft()
        if future.cancelled():
            return
        try:
            future.result()
            summary.written += 1
        except Exception as error:
            fail(name, error)

    pool = ThreadPoolExecutor(_AHEAD)
    try:
        for (infrared, visible), reading in progress_bar(
            args, _ahead(pool, _read, pairs), len(pairs), unit="pair", desc=_label(args)
        ):
            name = pair_label(infrared, visible)
            try:
                frames = reading.result()
                size = frames[1].shape[:2]
                ready = size in summary.first_milliseconds
                fused, elapsed = _timed(engine, frames, options)
                if not ready:
                    summary.first_milliseconds[size] = elapsed
                    if warm:
                        fused, elapsed = _timed(engine, frames, options)
                if ready or warm:
                    summary.milliseconds.append(elapsed)
            except Exception as error:
                fail(name, error)
                continue
            target = output / (visible.stem + suffix)
            writing.append((name, pool.submit(_write, target, fused)))
            if len(writing) > _AHEAD:
                finish_write()
        while writing:
            finish_write()
    finally:
        pool.shutdown(cancel_futures=True)
        while writing:  # after Ctrl-C: those that were being written are whole
            finish_write()


def _label(args: argparse.Namespace) -> str:
    """What fuses, for the progress bar."""
    file = getattr(args, "engine", None)
    return args.model if file is None else file.stem


def pair_label(infrared: Path, visible: Path) -> str:
    """What a pair is called in a list: its file name, or the stem where suffixes differ."""
    return infrared.name if infrared.name == visible.name else visible.stem


def _timed(engine: Engine, frames: tuple[Any, Any], options: dict[str, Any]) -> tuple[Any, float]:
    """The fused frame and the milliseconds it took."""
    begin = time.perf_counter()
    fused = engine(*frames, **options)
    return fused, (time.perf_counter() - begin) * 1e3


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[_T], _R], items: Iterable[_T]
) -> Iterator[tuple[_T, Future[_R]]]:
    """Each item with the future of ``function(item)``, submitted a few items before its turn."""
    waiting: deque[tuple[_T, Future[_R]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > _AHEAD:
            yield waiting.popleft()
    yield from waiting


def _size(pair: tuple[Path, Path]) -> tuple[int, int]:
    """The visible image's size by its file's header: pairs of one size go one after the other.

    An engine keeps a few sizes only; mixed sizes would have it prepare itself again and again.
    """
    from PIL import Image

    try:
        with Image.open(pair[1]) as image:
            return image.size
    except Exception:  # reading it in its turn will say why
        return 0, 0


def _read(pair: tuple[Path, Path]) -> tuple[Any, Any]:
    from fuseengine.runtime.images import read_image

    return read_image(pair[0]), read_image(pair[1])


def _write(path: Path, fused: Any) -> None:
    from fuseengine.runtime.images import write_image

    write_image(path, fused)


def _print_engine(args: argparse.Namespace, engine: Engine) -> None:
    if args.report:
        print(engine.report)
    else:
        note(args, engine.report.summary())


def _frame_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"resize": args.resize, "infrared_range": args.infrared_range}


def infrared_range(text: str) -> tuple[float, float] | Literal["minmax"]:
    """An argument that says what becomes black and white."""
    if text == "minmax":
        return "minmax"
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not float("-inf") < low < high < float("inf"):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected minmax or two numbers LO,HI with LO < HI, such as 7000,9500"
        )
    return low, high
