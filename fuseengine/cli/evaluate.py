"""``fuseengine evaluate``: metrics of folders of fused images, side by side, and a page."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuseengine.cli.common import (
    RawHelp,
    add_engine_options,
    make_engine,
    note,
    positive_int,
    progress_bar,
)
from fuseengine.cli.fuse import FolderSummary, fuse_pairs, infrared_range, pair_label
from fuseengine.errors import ImageFileError, SettingError

if TYPE_CHECKING:
    from fuseengine.evaluation.pairing import Refusal
    from fuseengine.evaluation.published import PublishedTable
    from fuseengine.evaluation.run import Evaluation, Latency

_PAGE, _CSV, _JSON = "index.html", "results.csv", "results.json"

_DESCRIPTION = """\
Measure folders of fused images against their sources.

Images belong together that have the same name without the suffix. Prints a
table per method, and the means of all methods with ranks; writes results.csv,
results.json and index.html, one file with sortable tables, box plots and the
pictures, that needs no network.

Metrics see 8-bit grey levels: of colour images the luma Y, of 16-bit images
the levels divided by 257. Nothing is resized: sizes that differ are an error."""

_EPILOG = """\
examples:
  fuseengine evaluate FUSED_DIR --infrared IR_DIR --visible VIS_DIR
  fuseengine evaluate OURS --compare THEIRS=DIR2 DIR3 --paper tno \\
      --infrared IR_DIR --visible VIS_DIR -o report
  fuseengine evaluate --model drfusion-s --infrared IR_DIR --visible VIS_DIR

exit code: 0 everything was measured, but for files without a partner and pairs
that --skip left out, which are listed; 2 an error; 130 interrupted."""


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "evaluate",
        help="measure folders of fused images, with a report to look at",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RawHelp,
    )
    parser.add_argument(
        "fused", nargs="?", metavar="FUSED", help="folder of fused images: DIR or NAME=DIR"
    )
    parser.add_argument(
        "--infrared", type=Path, required=True, metavar="DIR", help="folder of infrared images"
    )
    parser.add_argument(
        "--visible", type=Path, required=True, metavar="DIR", help="folder of visible images"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of other methods, DIR or NAME=DIR; only images that all have are measured",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="also fuse with this packaged model, into OUT/fused"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="folder for the report (made if missing; default: report)",
    )
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--metrics",
        type=_keys,
        metavar="KEY,KEY",
        help="such as EN,SD,VIF, or all (default: what the convention's paper prints, else "
        "EN,SD,SF,AG,SCD,MI,VIF,Qabf)",
    )
    measuring.add_argument(
        "--convention",
        default="default",
        metavar="NAME",
        help="whose form of the metrics: default, matlab, cddfuse, or a paper's, such as dmnet",
    )
    measuring.add_argument(
        "--infrared-range",
        type=infrared_range,
        metavar="minmax|LO,HI",
        help="values of the infrared images that count as black and white, as for 'fuse'",
    )
    measuring.add_argument(
        "--skip",
        action="store_true",
        help="leave out pairs that cannot be measured; by default they are an error",
    )
    measuring.add_argument(
        "--jobs", type=positive_int, metavar="N", help="processes (default: one per core)"
    )
    add_engine_options(parser, model=False)
    report = parser.add_argument_group("report")
    report.add_argument(
        "--paper",
        metavar="SET",
        help="put published numbers of this image set beside the measured ones, such as tno, "
        "roadscene, msrs, llvip, m3fd",
    )
    report.add_argument(
        "--picture-mb",
        type=_megabytes,
        default=24.0,
        metavar="MB",
        help="most that the page's pictures may take (default: 24; 0: none)",
    )
    talk = parser.add_argument_group("what is printed")
    talk.add_argument(
        "--json",
        action="store_true",
        help="print JSON and nothing else; files are written only where -o is given",
    )
    talk.add_argument(
        "--progress", action="store_true", help="show progress bars even without a terminal"
    )
    talk.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    engine_defaults = {
        name: parser.get_default(name)
        for name in ("backend", "precision", "device", "effort", "threads", "no_cache")
    }
    # Never resized: an image must have the size of its sources.
    parser.set_defaults(run=run, resize=None, engine_defaults=engine_defaults)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from fuseengine.evaluation.pairing import name_methods, pair_folders
    from fuseengine.evaluation.published import published_tables
    from fuseengine.evaluation.run import measure

    _check_options(args)
    published = published_tables(args.paper) if args.paper else []
    output = args.output or Path("report")
    if output.exists() and not output.is_dir():
        raise SettingError(f"-o: {output} is a file, expected a folder")
    methods = name_methods([*([args.fused] if args.fused else []), *args.compare])
    latencies: dict[str, Latency] = {}
    failed: list[Refusal] = []
    if args.model:
        if args.model in methods:
            raise SettingError(
                f"the folder {methods[args.model]} has the model's name {args.model!r}; give it "
                "another one as NAME=DIR"
            )
        methods[args.model] = output / "fused"
        latencies[args.model], failed = _fuse(args, methods[args.model])
    evaluation = measure(
        pair_folders(args.infrared, args.visible, methods, failed),
        metrics=args.metrics,
        convention=args.convention,
        infrared_range=args.infrared_range,
        jobs=args.jobs,
        skip=args.skip,
        track=lambda items, total: progress_bar(args, items, total, unit="image", desc="measuring"),
    )
    evaluation = replace(evaluation, latencies=latencies)
    _say(args, evaluation, published)
    if args.output or not args.json:
        _write(args, output, evaluation, published)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    if not args.fused and not args.compare and not args.model:
        raise SettingError("nothing to measure; give a folder of fused images, or --model NAME")
    for name, default in args.engine_defaults.items():
        if not args.model and getattr(args, name) != default:
            option = f"--{name.replace('_', '-')}"
            raise SettingError(f"{option} is for fusing; give --model NAME with it, or leave it")
    for role in ("infrared", "visible"):
        folder = getattr(args, role)
        if not folder.is_dir():
            raise ImageFileError(f"--{role}: no folder {folder}; expected one of images")


def _fuse(args: argparse.Namespace, folder: Path) -> tuple[Latency, list[Refusal]]:
    """Fuse all pairs into the folder; their times, and what failed."""
    from fuseengine.evaluation.pairing import Refusal, UnusablePairsError
    from fuseengine.evaluation.run import Latency, machine_name
    from fuseengine.runtime.images import pair_files

    for source in (args.infrared, args.visible):
        if folder.exists() and folder.samefile(source):
            raise ImageFileError(
                f"the folder for fused images, {folder}, is one of the inputs; choose another -o, "
                "so that no input is replaced"
            )
    pairs = pair_files(args.infrared, args.visible).pairs
    if not pairs:
        raise ImageFileError(
            f"no pairs in {args.infrared} and {args.visible}; expected names that are the same up "
            "to the suffix"
        )
    folder.mkdir(parents=True, exist_ok=True)
    engine = make_engine(args, None)
    note(args, engine.report.summary())
    summary = FolderSummary(len(pairs))
    fuse_pairs(args, engine, pairs, folder, ".png", summary, warm=True)
    stems = {pair_label(*pair): pair[1].stem for pair in pairs}
    failed = [Refusal(stems[label], f"not fused: {reason}") for label, reason in summary.failures]
    if failed and (not args.skip or not summary.written):
        raise UnusablePairsError(failed, len(pairs))
    return (
        Latency(
            tuple(summary.milliseconds),
            machine_name(engine.report.device),
            engine.report.summary(),
            len(summary.first_milliseconds),
        ),
        failed,
    )


def _say(args: argparse.Namespace, evaluation: Evaluation, published: list[PublishedTable]) -> None:
    from fuseengine.evaluation.tables import json_text, text_tables

    if args.json:
        sys.stdout.write(json_text(evaluation, published))
    elif not args.quiet:
        width = shutil.get_terminal_size((120, 24)).columns
        print(text_tables(evaluation, published, width))


def _write(
    args: argparse.Namespace,
    output: Path,
    evaluation: Evaluation,
    published: list[PublishedTable],
) -> None:
    from fuseengine.evaluation.previews import make_previews, plan_previews
    from fuseengine.evaluation.report import make_page
    from fuseengine.evaluation.run import run_all
    from fuseengine.evaluation.tables import csv_text, json_text

    tasks = plan_previews(evaluation.cases, evaluation.infrared_range, args.picture_mb)
    done = progress_bar(
        args, run_all(make_previews, tasks, args.jobs), len(tasks), unit="pair", desc="pictures"
    )
    previews = {tasks[index].case.name: pictures for index, pictures in done}
    page = make_page(evaluation, published, previews, datetime.now().astimezone())
    output.mkdir(parents=True, exist_ok=True)
    for name, text in (
        (_CSV, csv_text(evaluation)),
        (_JSON, json_text(evaluation, published)),
        (_PAGE, page),
    ):
        (output / name).write_text(text, encoding="utf-8", newline="\n")
    if not args.quiet and not args.json:
        megabytes = (output / _PAGE).stat().st_size / 1e6
        print(f"\nwrote {output / _PAGE} ({megabytes:.1f} MB), {_CSV}, {_JSON}")


def _keys(text: str) -> list[str]:
    keys = [key.strip() for key in text.split(",")]
    if not all(keys) or len(set(keys)) < len(keys):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected different metrics between commas, such as EN,SD,VIF"
        )
    return keys


def _megabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of 0 or more")
    return value
