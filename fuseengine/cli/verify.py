"""``fuseengine verify``: every stage and op of a bundle against the float32 reference."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuseengine.cli.common import RawHelp, load_engine, positive_int, progress_bar
from fuseengine.errors import SettingError

if TYPE_CHECKING:
    from fuseengine.engine import Engine

_DESCRIPTION = """\
Compare every stage and op of a bundle, as it runs on this machine, with the
float32 reference: a stage with its float32 network in ONNX Runtime, an op with
its equation in float64, each on the reference's inputs; and the fused pictures.

By default on the packaged demo pair. No PyTorch is needed."""

_EPILOG = """\
examples:
  fuseengine verify drfusion.fuse
  fuseengine verify drfusion.fuse --infrared IR_DIR --visible VIS_DIR --limit 20

exit code: 0 all is as exact as expected (what is float32: 80 dB; pictures of
lower precisions: the guard of the compilation); 2 something is not."""


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "verify",
        help="compare a compiled file with the float32 reference, part by part",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RawHelp,
    )
    parser.add_argument("engine", type=Path, metavar="FILE.fuse", help="bundle to verify")
    parser.add_argument("--infrared", type=Path, metavar="DIR", help="infrared images to verify on")
    parser.add_argument(
        "--visible", type=Path, metavar="DIR", help="visible images of the same names"
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="look at N pairs at most")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto (as compiled), cpu or cuda"
    )
    parser.add_argument(
        "--backend", default="auto", metavar="NAME", help="for all stages (default: as compiled)"
    )
    parser.add_argument(
        "--precision", default="auto", metavar="NAME", help="for all stages (default: as compiled)"
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads (default: one per core)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--progress", action="store_true", help="show the progress bar even without a terminal"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print failures only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if (args.infrared is None) != (args.visible is None):
        raise SettingError("--infrared and --visible: got one of them, expected both or none")
    from fuseengine.verify import verify

    pairs = _pairs(args)
    engine = load_engine(args)
    examples = _examples(engine, pairs)
    result = verify(
        engine, progress_bar(args, examples, len(pairs) or 1, unit="pair", desc="verify")
    )
    if args.json:
        print(json.dumps(result.to_dict(), indent=1))
    elif not args.quiet:
        print(engine.report.summary())
        print(result)
    for failure in result.failures:
        print(f"fuseengine: not as exact as expected: {failure}", file=sys.stderr)
    return 2 if result.failures else 0


def _pairs(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    from fuseengine.runtime.images import pair_files

    if args.infrared is None:
        return []
    found = pair_files(args.infrared, args.visible).pairs[: args.limit]
    if not found:
        raise SettingError(f"no pairs in {args.infrared} and {args.visible}; expected equal names")
    return found


def _examples(engine: Engine, pairs: Sequence[tuple[Path, Path]]) -> Iterator[tuple[str, Any, Any]]:
    """Name and frames of every picture; those of another size are resampled to the engine's."""
    from fuseengine.demo import demo_pair
    from fuseengine.runtime.images import read_image

    if not pairs:
        size = engine.size or engine.report.size
        yield ("the demo pair", *demo_pair(size))
        return
    for infrared, visible in pairs:
        ir, vis = read_image(infrared), read_image(visible)
        if engine.size is not None:
            ir, vis = (_fitted(frame, engine.size) for frame in (ir, vis))
        yield visible.stem, ir, vis


def _fitted(frame: Any, size: tuple[int, int]) -> Any:
    from fuseengine.runtime.frames import resample

    return frame if frame.shape[:2] == size else resample(frame, size)
