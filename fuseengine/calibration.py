"""A rig from pictures: checkerboards that both cameras see, or points chosen by hand.

Each camera's lens is calibrated where there are enough views of a board (Zhang, "A flexible new
technique for camera calibration", PAMI 2000, by OpenCV); the homography between the undistorted
pictures is fitted to all points by RANSAC and least squares. OpenCV is needed for this, not for
using the rig (:mod:`fuseengine.alignment`).

A homography joins two cameras exactly for one plane, or for cameras in one place. A rig with a
baseline should be calibrated with boards at the distance at which it is to be exact.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuseengine.alignment import Camera, Rig, transfer
from fuseengine.errors import CalibrationError
from fuseengine.runtime.images import pair_files, read_image

Points = NDArray[np.float64]

LEAST_VIEWS = 5
"""Of a board, for calibrating a lens: fewer leave its numbers to chance."""


@dataclass(frozen=True)
class View:
    """A board, or chosen points, as both cameras see them.

    Attributes:
        name: of the files.
        infrared: (n, 2) columns and rows in the infrared picture.
        visible: the same points in the visible one.
    """

    name: str
    infrared: Points
    visible: Points


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        rig: for :meth:`fuseengine.alignment.Rig.save`.
        errors_px: per view, root mean square distance in infrared pixels.
        lens_errors_px: of the infrared and the visible lens's own calibration; None where the lens
            was not calibrated.
        skipped: names of pictures in which no board was found, and why.
    """

    rig: Rig
    errors_px: dict[str, float]
    lens_errors_px: tuple[float | None, float | None]
    skipped: dict[str, str]


def from_boards(
    infrared: str | Path,
    visible: str | Path,
    board: tuple[int, int],
    *,
    lens: bool = True,
) -> Calibration:
    """Calibrate from pictures of a checkerboard, one file name per moment.

    Thermal boards often have their polarity inverted (printed black is warm): both are tried.

    Args:
        infrared: folder of infrared pictures.
        visible: folder of visible pictures of the same names.
        board: inner corners per row and per column.
        lens: whether lens distortion is calibrated, where there are views enough.

    Returns:
        The rig and its errors.

    Raises:
        CalibrationError: no OpenCV, no pairs, pictures of several sizes, or no board found in any.
        ImageFileError: a picture that cannot be read.
    """
    if min(board) < 3:
        raise CalibrationError(
            f"board={board}: expected inner corners, at least 3 by 3; 10x7 squares have 9x6"
        )
    pairs = pair_files(infrared, visible).pairs
    if not pairs:
        raise CalibrationError(
            f"{infrared} and {visible} hold no two pictures of one name; expected the same file "
            "name (without suffix) for one moment"
        )
    views: list[View] = []
    skipped: dict[str, str] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for paths in pairs:
        found = []
        for camera, path in zip(("infrared", "visible"), paths, strict=True):
            picture = grey_levels(read_image(path))
            size = sizes.setdefault(camera, picture.shape)
            if picture.shape != size:
                raise CalibrationError(
                    f"{path}: got {_by(picture.shape)}, but {_by(size)} before; expected one size "
                    "per camera"
                )
            corners = find_board(picture, board)
            if corners is None:
                skipped.setdefault(paths[0].stem, f"no {board[0]}x{board[1]} corners in {path}")
            found.append(corners)
        if found[0] is not None and found[1] is not None:
            views.append(View(paths[0].stem, _same_order(found[0], found[1]), found[1]))
    if not views:
        raise CalibrationError(
            f"no board of {board[0]}x{board[1]} inner corners was found in both pictures of any of "
            f"{len(pairs)} pairs; check --board, the light, and that the board's edges have "
            "thermal contrast"
        )
    return calibrate(views, sizes["infrared"], sizes["visible"], skipped, board=board, lens=lens)


def from_points(
    path: str | Path, infrared: tuple[int, int], visible: tuple[int, int]
) -> Calibration:
    """Calibrate from points chosen by hand; lenses are taken as straight.

    Args:
        path: CSV file with the columns visible_x, visible_y, infrared_x, infrared_y, in pixels;
            at least 4 rows.
        infrared: (height, width) of the infrared pictures.
        visible: of the visible ones.

    Returns:
        The rig and its errors.

    Raises:
        CalibrationError: a file that cannot be read, or fewer than 4 points.
    """
    names = ("visible_x", "visible_y", "infrared_x", "infrared_y")
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = [[float(row[name]) for name in names] for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(
            f"{path} cannot be read as points ({error}); expected a CSV file with the columns "
            f"{', '.join(names)}"
        ) from error
    points = np.array(rows, np.float64).reshape(-1, 4)
    if not np.isfinite(points).all():
        raise CalibrationError(f"{path}: got a number that is not finite; expected pixels")
    view = View(Path(path).stem, points[:, 2:], points[:, :2])
    return calibrate([view], infrared, visible, {}, board=None, lens=False)


def calibrate(
    views: Sequence[View],
    infrared: tuple[int, ...],
    visible: tuple[int, ...],
    skipped: dict[str, str],
    *,
    board: tuple[int, int] | None,
    lens: bool,
) -> Calibration:
    """A rig from points.

    Args:
        views: points that both cameras see.
        infrared: (height, width) of the infrared pictures.
        visible: of the visible ones.
        skipped: goes into the result.
        board: inner corners per row and column, where the points are a board's.
        lens: whether lens distortion is calibrated; needs a board and :data:`LEAST_VIEWS` views.

    Returns:
        The rig and its errors.

    Raises:
        CalibrationError: no OpenCV, fewer than 4 points, or points that no homography joins.
    """
    cv2 = _opencv()
    cameras, lens_errors = [], []
    for size, points in (
        (infrared, [view.infrared for view in views]),
        (visible, [view.visible for view in views]),
    ):
        camera, error = Camera((size[0], size[1])), None
        if lens and board is not None and len(views) >= LEAST_VIEWS:
            camera, error = _lens(points, board, camera.size)
        cameras.append(camera)
        lens_errors.append(error)
    straight = [
        (cameras[0].undistort(view.infrared), cameras[1].undistort(view.visible)) for view in views
    ]
    to, given = (np.concatenate(points) for points in zip(*straight, strict=True))
    if len(given) < 4:
        raise CalibrationError(f"got {len(given)} points; expected at least 4, not three on a line")
    matrix, _ = cv2.findHomography(given, to, cv2.RANSAC, 3.0, maxIters=10_000, confidence=0.9999)
    if matrix is None or not np.isfinite(matrix).all():
        raise CalibrationError(
            f"no homography joins the {len(given)} points; expected points spread over the "
            "picture, no three of four on a line, the same place in each row"
        )
    errors = {
        view.name: _rms(cameras[0].distort(transfer(matrix, b)), view.infrared)
        for view, (_, b) in zip(views, straight, strict=True)
    }
    squares = [errors[view.name] ** 2 * len(view.infrared) for view in views]
    rig = Rig(
        cameras[0],
        cameras[1],
        matrix,
        float(np.sqrt(sum(squares) / len(given))),
        {"views": len(views), "points": len(given)},
    )
    return Calibration(rig, errors, (lens_errors[0], lens_errors[1]), skipped)


def find_board(picture: NDArray[np.uint8], board: tuple[int, int]) -> Points | None:
    """The board's inner corners, row by row, (n, 2) columns and rows; None if it is not seen.

    Args:
        picture: (H, W) grey levels; polarity does not matter.
        board: inner corners per row and per column.
    """
    cv2 = _opencv()
    flags = cv2.CALIB_CB_NORMALIZE_IMAGE | cv2.CALIB_CB_EXHAUSTIVE | cv2.CALIB_CB_ACCURACY
    for seen in (picture, 255 - picture):
        found, corners = cv2.findChessboardCornersSB(seen, board, flags=flags)
        if found:
            return np.asarray(corners, np.float64).reshape(-1, 2)
    return None


def _lens(
    points: Sequence[Points], board: tuple[int, int], size: tuple[int, int]
) -> tuple[Camera, float]:
    cv2 = _opencv()
    columns, rows = board
    grid = np.zeros((rows * columns, 3), np.float32)
    grid[:, :2] = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
    error, matrix, distortion, *_ = cv2.calibrateCamera(
        [grid] * len(points),
        [p.astype(np.float32).reshape(-1, 1, 2) for p in points],
        size[::-1],
        None,
        None,
    )
    return Camera(size, matrix, tuple(float(k) for k in distortion.ravel()[:5])), float(error)


def _same_order(corners: Points, like: Points) -> Points:
    """The corners in the order of the other picture's.

    A board read from its other end is the same board, but two cameras of one rig are not upside
    down to each other.
    """
    along = like[-1] - like[0]
    return corners if float((corners[-1] - corners[0]) @ along) > 0.0 else corners[::-1].copy()


def _rms(found: Points, expected: Points) -> float:
    return float(np.sqrt(((found - expected) ** 2).sum(axis=1).mean()))


def grey_levels(picture: NDArray[Any]) -> NDArray[np.uint8]:
    """A picture (H, W[, 3]) as uint8 (H, W); 16-bit counts spread between their percentiles."""
    if picture.ndim == 3:
        picture = np.rint(picture @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    if picture.dtype == np.uint8:
        return np.ascontiguousarray(picture)
    low, high = np.percentile(picture, [0.5, 99.5])
    line = (picture.astype(np.float64) - low) / max(high - low, 1.0)
    return np.rint(255.0 * line.clip(0.0, 1.0)).astype(np.uint8)


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]} (height x width)"


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise CalibrationError(
            "calibrating needs OpenCV, which is not installed; install it with: "
            "pip install 'fuseengine[video]'"
        ) from error
    return cv2
