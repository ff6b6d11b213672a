"""What the commands share: argument types, the engine's options, the outputs' places."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fuseengine.errors import ImageFileError, SettingError
from fuseengine.runtime.formats import SUFFIXES

if TYPE_CHECKING:
    from fuseengine.engine import Engine

_T = TypeVar("_T")

_SPELLINGS = {
    "cache=False": "--no-cache",
    "backend='onnxruntime'": "--backend onnxruntime",
    "device='cpu'": "--device cpu",
    "effort='full'": "--effort full",
    "init=FILE": "--init FILE",
    "infrared_range=(lo, hi)": "--infrared-range LO,HI",
    "jobs=N": "--jobs N",
    "precision='fp32'": "--precision fp32",
    "restart=True": "--restart",
    "resize='infrared'": "--resize infrared",
    "skip=True": "--skip",
    "stage='...'": "--stage NAME",
    "temporal='warm'": "--temporal warm",
}
"""How remedies spell an argument in Python -> how it is spelt here."""


class RawHelp(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and examples."""


def one_line(error: BaseException) -> str:
    """An error's message in one line, its remedies as command line options."""
    text = " ".join(str(error).split())
    for python, option in _SPELLINGS.items():
        text = text.replace(python, option)
    return text


def positive_int(text: str) -> int:
    """An argument that is a whole number above zero."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of 1 or more")
    return value


def positive_float(text: str) -> float:
    """An argument that is a finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return value


def frame_size(text: str) -> tuple[int, int]:
    """An argument WIDTHxHEIGHT, as (height, width)."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and min(int(width), int(height)) >= 2):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected WIDTHxHEIGHT in pixels of at least 2, such as 640x480"
        )
    return int(height), int(width)


def add_engine_options(parser: argparse.ArgumentParser, *, model: bool = True) -> None:
    """Add the options of ``fuseengine.compile``; names are checked there, with suggestions."""
    group = parser.add_argument_group("engine")
    if model:
        group.add_argument(
            "--model",
            default="drfusion-s",
            metavar="NAME",
            help="packaged model, see 'fuseengine models' (default: drfusion-s)",
        )
    group.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help="auto (the fastest that is exact enough), openvino, onnxruntime, torch or inductor",
    )
    group.add_argument(
        "--precision",
        default="auto",
        metavar="NAME",
        help="auto (the fastest within 45 dB of float32), fp32, tf32, bf16 or fp16",
    )
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    group.add_argument(
        "--effort",
        default="quick",
        metavar="NAME",
        help="quick (default), or full: also try what takes minutes to compile",
    )
    group.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads (default: one per core)"
    )
    group.add_argument(
        "--no-cache", action="store_true", help="compile anew; leave the cache of engines alone"
    )


def add_temporal(parser: Any) -> None:
    """Add ``--temporal``."""
    parser.add_argument(
        "--temporal",
        choices=("warm",),
        help="warm: a frame starts from what the one before became, in fewer sampling steps",
    )


def load_engine(args: argparse.Namespace) -> Engine:
    """The engine in the bundle ``args.engine``; other options than "auto" replace its choices."""
    import fuseengine as fe

    given = {name: getattr(args, name) for name in ("device", "backend", "precision")}
    asked = {name: None if value == "auto" else value for name, value in given.items()}
    return fe.load(args.engine, threads=args.threads, **asked)


def check_bundle_options(args: argparse.Namespace) -> None:
    """Refuse what only compiling takes beside ``--engine``.

    Raises:
        SettingError: ``--model``, ``--effort`` or ``--no-cache`` was given.
    """
    if args.model != "drfusion-s" or args.effort != "quick" or args.no_cache:
        raise SettingError(
            f"--engine {args.engine}: it is compiled already; expected no --model, --effort or "
            "--no-cache with it"
        )


def make_engine(args: argparse.Namespace, size: tuple[int, int] | None) -> Engine:
    """The engine that the options ask for.

    Args:
        args: parsed options of :func:`add_engine_options`.
        size: (height, width), or None for an engine that takes any size.

    Raises:
        SettingError: a bundle, and options that only compiling takes.
    """
    if getattr(args, "engine", None) is not None:
        check_bundle_options(args)
        return load_engine(args)
    import fuseengine as fe

    video = {"temporal": args.temporal} if "temporal" in args else {}
    return fe.compile(
        getattr(args, "model", "drfusion-s"),
        size,
        device=args.device,
        precision=args.precision,
        backend=args.backend,
        effort=args.effort,
        threads=args.threads,
        cache=not args.no_cache,
        **video,
    )


def check_output_file(path: Path, *inputs: Path) -> None:
    """Refuse early what cannot become the output file, or would replace an input.

    Raises:
        ImageFileError: a wrong suffix, a missing folder, a folder, or one of the inputs.
    """
    if path.is_dir():
        raise ImageFileError(f"cannot write {path}: it is a folder, expected a file name")
    if path.suffix.lower() not in SUFFIXES:
        raise ImageFileError(
            f"cannot write {path}: got suffix {path.suffix!r}, expected one of "
            f"{', '.join(SUFFIXES)}"
        )
    if not path.parent.is_dir():
        raise ImageFileError(f"cannot write {path}: no folder {path.parent}; make it first")
    for source in inputs:
        if path.exists() and path.samefile(source):
            raise ImageFileError(
                f"cannot write {path}: it is one of the inputs; choose another output name"
            )


def progress_bar(
    args: argparse.Namespace, items: Iterable[_T], total: int, *, unit: str, desc: str
) -> Iterable[_T]:
    """The items, with a bar on standard error where that is a terminal or ``--progress`` is given.

    Args:
        args: has quiet and progress.
        items: to pass on.
        total: number of them.
        unit: what one of them is.
        desc: what is done, or by whom.
    """
    if args.quiet or not (args.progress or sys.stderr.isatty()):
        return items
    from tqdm import tqdm

    return tqdm(items, total=total, unit=unit, desc=desc, file=sys.stderr)


def note(args: argparse.Namespace, *lines: Any) -> None:
    """Say something beside the results, on standard error, unless ``--quiet``."""
    if not args.quiet:
        for line in lines:
            print(line, file=sys.stderr)
