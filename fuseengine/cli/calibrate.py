"""``fuseengine calibrate``: a rig file from boards that both cameras see, or from points."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fuseengine.cli.common import RawHelp
from fuseengine.errors import CalibrationError

if TYPE_CHECKING:
    from fuseengine.calibration import Calibration

_DESCRIPTION = """\
Find how an infrared and a visible camera look at the same scene.

Give two folders of pictures of a checkerboard, the same file name for the same
moment, or a file of points chosen by hand. The rig file goes to
'fuseengine video --alignment'; the overlay shows how well it fits."""

_EPILOG = """\
examples:
  fuseengine calibrate --infrared board_ir/ --visible board_vis/ --board 9x6 -o rig.json
  fuseengine calibrate --infrared ir.png --visible vis.png --points points.csv -o rig.json

points.csv has the columns visible_x, visible_y, infrared_x, infrared_y in pixels
and at least four rows. A heated board, or one of two materials, shows up in a
thermal camera; its polarity does not matter. Lens distortion needs five views
and more, with the board also in the corners of the picture."""


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "calibrate",
        help="find how two cameras look at the same scene",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RawHelp,
    )
    parser.add_argument("--infrared", type=Path, required=True, metavar="PATH", help="see above")
    parser.add_argument("--visible", type=Path, required=True, metavar="PATH", help="see above")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--board",
        type=_corners,
        default=(9, 6),
        metavar="CxR",
        help="inner corners per row and column of the board (default: 9x6)",
    )
    kind.add_argument("--points", type=Path, metavar="FILE", help="CSV file of points")
    parser.add_argument(
        "--no-lens", action="store_true", help="take both lenses as straight, with boards too"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="RIG.json", help="rig file to write"
    )
    parser.add_argument(
        "--overlay", type=Path, metavar="FILE", help="picture to write (default: RIG.png)"
    )
    parser.set_defaults(run=run, extra="video")


def run(args: argparse.Namespace) -> int:
    """Calibrate, write, report."""
    from fuseengine.alignment import Alignment
    from fuseengine.calibration import from_boards, from_points
    from fuseengine.runtime.images import pair_files, read_image, write_image

    if args.points is not None:
        paths = args.infrared, args.visible
        for path in paths:
            if path.is_dir():
                raise CalibrationError(f"{path} is a folder; with --points expected one picture")
        frames = [read_image(path) for path in paths]
        found = from_points(args.points, frames[0].shape[:2], frames[1].shape[:2])
    else:
        found = from_boards(args.infrared, args.visible, args.board, lens=not args.no_lens)
        best = min(found.errors_px, key=lambda name: found.errors_px[name])
        pairs = pair_files(args.infrared, args.visible).pairs
        paths = next(pair for pair in pairs if pair[0].stem == best)
        frames = [read_image(path) for path in paths]
    found.rig.save(args.output)
    overlay = args.overlay or args.output.with_suffix(".png")
    align = Alignment(found.rig)
    write_image(overlay, _overlay(align, frames[0], frames[1]))
    _report(found, align.covered, args.output, overlay)
    return 0


def _report(found: Calibration, covered: float, output: Path, overlay: Path) -> None:
    for name, reason in found.skipped.items():
        print(f"skipped {name}: {reason}")
    for name, error in found.errors_px.items():
        print(f"{name}: {error:.3f} px")
    for camera, lens in zip(("infrared", "visible"), found.lens_errors_px, strict=True):
        told = "straight (not calibrated)" if lens is None else f"calibrated to {lens:.3f} px"
        print(f"{camera} lens: {told}")
    points = found.rig.notes.get("points")
    print(f"reprojection error {found.rig.error_px:.3f} px of the infrared camera, {points} points")
    print(f"the infrared picture covers {covered:.0%} of the visible one")
    print(f"wrote {output} and {overlay}")


def _overlay(align: Any, infrared: Any, visible: Any) -> Any:
    """Infrared in red, visible in cyan, on the visible camera's grid: what fits is grey."""
    from fuseengine.calibration import grey_levels

    warm = np.rint(255.0 * align.infrared(grey_levels(infrared))).astype(np.uint8)
    seen = align.visible(grey_levels(visible))
    return np.stack([warm, seen, seen], axis=-1)


def _corners(text: str) -> tuple[int, int]:
    columns, _, rows = text.lower().partition("x")
    if not (columns.isdecimal() and rows.isdecimal() and min(int(columns), int(rows)) >= 3):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected inner corners as COLUMNSxROWS of at least 3, such as 9x6"
        )
    return int(columns), int(rows)
