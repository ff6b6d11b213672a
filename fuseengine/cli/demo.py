"""``fuseengine demo``: fuse the packaged pair and say what was done."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from fuseengine.cli.common import RawHelp, add_engine_options, check_output_file, make_engine

_RUNS = 10


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "demo",
        help="fuse the packaged demo pair: the quickest way to a picture",
        description="Fuse the packaged infrared/visible pair, a rendered street at dusk,\n"
        "with drfusion-s.",
        epilog="example:\n  fuseengine demo -o fused.png --keep-sources",
        formatter_class=RawHelp,
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("fused.png"),
        metavar="FILE",
        help="image to write (default: fused.png)",
    )
    parser.add_argument(
        "--keep-sources",
        action="store_true",
        help="also write the two sources beside it, as FILE-infrared and FILE-visible",
    )
    add_engine_options(parser, model=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from fuseengine.demo import demo_pair
    from fuseengine.runtime.images import write_image

    check_output_file(args.output)
    infrared, visible = demo_pair()
    height, width = infrared.shape
    engine = make_engine(args, (height, width))
    fused, times = engine(infrared, visible), []
    for _ in range(_RUNS):
        begin = time.perf_counter()
        engine(infrared, visible, out=fused)
        times.append((time.perf_counter() - begin) * 1e3)
    write_image(args.output, fused)
    print(f"wrote {args.output.resolve()}")
    if args.keep_sources:
        for name, frame in (("infrared", infrared), ("visible", visible)):
            path = args.output.with_stem(f"{args.output.stem}-{name}")
            write_image(path, frame)
            print(f"wrote {path.resolve()}")
    report = engine.report
    print(f"model: {report.model}, {width}x{height} on {report.device}, {report.threads} threads")
    for stage, how in report.choice.items():
        backend, _, precision = how.partition("/")
        print(f"stage {stage}: backend {backend}, precision {precision}")
    print(f"time: {statistics.median(times):.1f} ms per pair (median of {_RUNS})")
    print(
        f"against float32: {report.psnr_db:.1f} dB PSNR, largest error "
        f"{report.max_error:.2g} (1 is white)"
    )
    return 0
