"""Two cameras brought onto one grid of pixels: rig files, and frames sampled through them.

A rig says how each camera draws (pinhole matrix and lens distortion, where calibrated) and
which pixel of the infrared picture shows what a pixel of the visible one shows: a homography
between the undistorted pictures, which is exact for one plane (or far scenes) and for cameras in
one place. ``fuseengine calibrate`` finds it. No torch, no OpenCV.

    rig = Rig.load("rig.json")
    align = Alignment(rig, size=(480, 640))
    infrared, visible = align(infrared_frame, visible_frame)

For each pixel p of the result, on the visible camera's undistorted view scaled to the size:

    visible place  = distort_vis(S p)
    infrared place = distort_ir(H S p)

Both pictures are sampled bilinearly there (``_native.frame_warp``: sampling, scaling and conversion
in one pass). Lens distortion: Brown's model as OpenCV has it, (k1, k2, p1, p2[, k3[, k4, k5, k6]]).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuseengine import _native
from fuseengine.errors import FrameError, SettingError, SizeMismatchError

Matrix = NDArray[np.float64]
VERSION = 1
"""Of rig files."""

_FULL_SCALE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0, "float64": 1.0}


@dataclass(frozen=True)
class Camera:
    """How a camera draws.

    Attributes:
        size: (height, width) of its frames in pixels.
        matrix: (3, 3) pinhole matrix in pixels; None where the lens was not calibrated.
        distortion: k1, k2, p1, p2, and k3, k4, k5, k6 where known; empty for none.
    """

    size: tuple[int, int]
    matrix: Matrix | None = None
    distortion: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            SettingError: a size below 2x2, another number of coefficients, or a distortion without
                a matrix.
        """
        if min(self.size) < 2:
            raise SettingError(f"camera size: got {self.size}, expected at least 2x2 pixels")
        if len(self.distortion) not in (0, 4, 5, 8):
            raise SettingError(
                f"distortion: got {len(self.distortion)} coefficients, expected 4 (k1, k2, p1, "
                "p2), 5 (and k3) or 8 (and k4, k5, k6)"
            )
        if self.matrix is None and any(self.distortion):
            raise SettingError("distortion: got coefficients without a matrix; expected both")
        if self.matrix is not None:
            _require_matrix("matrix", self.matrix)

    def distort(self, places: Matrix) -> Matrix:
        """Where the lens draws what an ideal one would draw at these places.

        Args:
            places: (..., 2), column and row in pixels.

        Returns:
            The same shape.
        """
        if self.matrix is None or not any(self.distortion):
            return places
        k1, k2, p1, p2, k3, k4, k5, k6 = (*self.distortion, *([0.0] * 8))[:8]
        fx, fy = self.matrix[0, 0], self.matrix[1, 1]
        cx, cy, skew = self.matrix[0, 2], self.matrix[1, 2], self.matrix[0, 1]
        y = (places[..., 1] - cy) / fy
        x = (places[..., 0] - cx - skew * y) / fx
        r2 = x * x + y * y
        radial = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
        bent_x = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
        bent_y = y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
        return np.stack([fx * bent_x + skew * bent_y + cx, fy * bent_y + cy], axis=-1)

    def undistort(self, places: Matrix) -> Matrix:
        """The inverse of :meth:`distort`, by fixed-point iteration, to 1e-9 pixels where it holds.

        Args:
            places: (..., 2), column and row in pixels, inside the picture.

        Returns:
            The same shape.
        """
        found = places
        for _ in range(100):
            error = places - self.distort(found)
            found = found + error
            if float(np.abs(error).max(initial=0.0)) < 1e-9:
                break
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a rig file."""
        matrix = None if self.matrix is None else self.matrix.tolist()
        return {"size": list(self.size), "matrix": matrix, "distortion": list(self.distortion)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Camera:
        """The inverse of :meth:`to_dict`."""
        height, width = (int(n) for n in data["size"])
        matrix = data.get("matrix")
        return cls(
            (height, width),
            None if matrix is None else np.array(matrix, np.float64),
            tuple(float(k) for k in data.get("distortion", ())),
        )


@dataclass(frozen=True)
class Rig:
    """Two cameras and what joins them.

    Attributes:
        infrared: the infrared camera.
        visible: the visible camera.
        homography: (3, 3) from undistorted visible pixels (column, row, 1) to undistorted infrared
            ones.
        error_px: root mean square reprojection error of the calibration in infrared pixels; None
            where it is not known.
        notes: anything else that is worth keeping, plain data.
    """

    infrared: Camera
    visible: Camera
    homography: Matrix
    error_px: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a matrix that cannot be.

        Raises:
            SettingError: no invertible (3, 3) of finite numbers.
        """
        _require_matrix("homography", self.homography)

    @classmethod
    def of_same_view(cls, infrared: tuple[int, int], visible: tuple[int, int]) -> Rig:
        """Two cameras that show the same view at two sizes (height, width)."""
        scale = [infrared[1] / visible[1], infrared[0] / visible[0]]
        return cls(Camera(infrared), Camera(visible), _scaling(*scale))

    def save(self, path: str | Path) -> None:
        """Write a rig file (JSON), beside its place first."""
        data = {
            "version": VERSION,
            "infrared": self.infrared.to_dict(),
            "visible": self.visible.to_dict(),
            "homography": self.homography.tolist(),
            "error_px": self.error_px,
            "notes": dict(self.notes),
        }
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Rig:
        """Read a rig file.

        Raises:
            SettingError: it cannot be read, is of a newer version, or holds something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            version = data["version"]
            if version != VERSION:
                raise SettingError(
                    f"{path}: got version {version!r} of rig files, expected {VERSION}; calibrate "
                    "again with this version of FuseEngine"
                )
            error = data.get("error_px")
            return cls(
                Camera.from_dict(data["infrared"]),
                Camera.from_dict(data["visible"]),
                np.array(data["homography"], np.float64),
                None if error is None else float(error),
                dict(data.get("notes", {})),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, SettingError):
                raise SettingError(f"{path}: {error}") from None
            told = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise SettingError(
                f"{path} cannot be read as a rig file ({told}); expected what 'fuseengine "
                "calibrate' writes"
            ) from error


class Alignment:
    """Frames of a rig's cameras, sampled on one grid.

    Args:
        rig: the cameras.
        size: (height, width) of the result; the visible camera's by default.
        clamp: whether places outside a picture take the nearest pixel inside; otherwise they are
            black.

    Raises:
        SettingError: a size below 2x2.

    Attributes:
        size: (height, width) of the result.
        covered: share of the result that the infrared picture covers, 0 to 1.
        keeps_visible: whether the grid is the visible camera's own, so that its frames stay as they
            are.
    """

    def __init__(
        self, rig: Rig, size: tuple[int, int] | None = None, *, clamp: bool = False
    ) -> None:
        self.rig, self.size, self.clamp = rig, size or rig.visible.size, clamp
        if min(self.size) < 2:
            raise SettingError(f"size: got {self.size}, expected at least 2x2 pixels")
        (height, width), (h, w) = rig.visible.size, self.size
        scale = _scaling(width / w, height / h)
        self._visible = _coordinates(rig.visible, scale, self.size)
        self.keeps_visible = self._visible.ndim == 2 and np.array_equal(self._visible, np.eye(3))
        self._infrared = _coordinates(rig.infrared, rig.homography @ scale, self.size)
        places = _places(self._infrared, self.size)
        rows, columns = rig.infrared.size
        inside = (places >= -0.5).all(-1) & (places[..., 0] <= columns - 0.5)
        self.covered = float((inside & (places[..., 1] <= rows - 0.5)).mean())
        # Where frame_warp writes what is not wanted of the visible frame: its luma.
        self._unused = np.empty((1, *self.size), np.float32)

    def __call__(
        self, infrared: NDArray[Any], visible: NDArray[Any]
    ) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Both frames on the grid.

        Args:
            infrared: (H, W) or (H, W, 3) of the infrared camera's size; uint8, uint16 (full scale
                is 1), float32 or float64 in [0, 1].
            visible: likewise of the visible camera's.

        Returns:
            The infrared frame as float32 (h, w) in [0, 1], the visible one in its own dtype, (h, w)
            or (h, w, 3), for an engine of this size.

        Raises:
            SizeMismatchError: a frame of another size than its camera's.
            FrameError: another dtype or shape, NaN or infinity.
        """
        return self.infrared(infrared), self.visible(visible)

    def infrared(
        self, frame: NDArray[Any], *, table: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """The infrared frame on the grid, float32 (h, w) in [0, 1].

        Args:
            frame: as in :meth:`__call__`.
            table: for counts (H, W) of uint8 or uint16: what each count means in [0, 1], such as
                :meth:`fuseengine.thermal.PercentileGain.table` gives. Gain, sampling and conversion
                are one pass then.

        Raises:
            SizeMismatchError, FrameError: see :meth:`__call__`.
        """
        frame = _usable("infrared", frame, self.rig.infrared.size)
        out = np.empty((1, *self.size), np.float32)
        scale = 1.0 if table is not None else 1.0 / _FULL_SCALE[frame.dtype.name]
        # The pass would make four look-ups per place of the grid.
        first = table is not None and frame.dtype.kind == "u" and frame.size < out.size
        if table is not None and first and frame.ndim == 2:
            looked_up = np.empty(frame.shape, np.float32)
            _native.look_up(frame, table, looked_up)
            frame, table = looked_up, None
        if not _native.frame_warp(
            frame,
            self._infrared,
            out,
            size=self.size,
            scale=scale,
            table=table,
            clamp=self.clamp,
        ):
            raise FrameError("infrared frame: got NaN or infinity; expected finite numbers")
        return out[0]

    def visible(self, frame: NDArray[Any]) -> NDArray[Any]:
        """The visible frame on the grid, in its own dtype; the frame itself if it is there already.

        Raises:
            SizeMismatchError, FrameError: see :meth:`__call__`.
        """
        frame = _usable("visible", frame, self.rig.visible.size)
        if self.keeps_visible:
            if frame.dtype.kind == "f" and not np.isfinite(frame).all():
                raise FrameError("visible frame: got NaN or infinity; expected finite numbers")
            return frame
        kept = np.empty((*self.size, *frame.shape[2:]), frame.dtype)
        if not _native.frame_warp(
            frame,
            self._visible,
            self._unused,
            size=self.size,
            scale=1.0 / _FULL_SCALE[frame.dtype.name],
            kept=kept,
            clamp=self.clamp,
        ):
            raise FrameError("visible frame: got NaN or infinity; expected finite numbers")
        return kept


def transfer(homography: Matrix, places: Matrix) -> Matrix:
    """Places (..., 2) through a homography (3, 3)."""
    points = places @ homography[:, :2].T + homography[:, 2]
    return points[..., :2] / points[..., 2:]


def _scaling(x: float, y: float) -> Matrix:
    """Pixel centres of a grid to those of one with x times the columns and y times the rows."""
    return np.array([[x, 0.0, 0.5 * (x - 1.0)], [0.0, y, 0.5 * (y - 1.0)], [0.0, 0.0, 1.0]])


def _coordinates(camera: Camera, matrix: Matrix, size: tuple[int, int]) -> NDArray[np.float32]:
    """What frame_warp takes: the homography itself, or a map where a lens bends it."""
    if camera.matrix is None or not any(camera.distortion):
        return np.ascontiguousarray(matrix / matrix[2, 2], np.float32)
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float64)
    places = camera.distort(transfer(matrix, np.stack([columns, rows], axis=-1)))
    # What lies behind the camera has no place; far outside is as good.
    far = 4.0 * max(camera.size)
    return np.nan_to_num(np.clip(places, -far, far), nan=-far).astype(np.float32)


def _places(coordinates: NDArray[np.float32], size: tuple[int, int]) -> Matrix:
    if coordinates.ndim == 3:
        return coordinates.astype(np.float64)
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float64)
    return transfer(coordinates.astype(np.float64), np.stack([columns, rows], axis=-1))


def _usable(name: str, frame: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    if frame.ndim == 3 and frame.shape[2] == 1:
        frame = frame[..., 0]
    fits = frame.ndim == 2 or (frame.ndim == 3 and frame.shape[2] == 3)
    if not fits or frame.dtype.name not in _FULL_SCALE:
        raise FrameError(
            f"{name} frame: got {frame.dtype} {frame.shape}; expected (H, W) or (H, W, 3) of "
            f"{', '.join(_FULL_SCALE)}"
        )
    if frame.shape[:2] != size:
        raise SizeMismatchError(
            f"{name} frame: got {frame.shape[0]}x{frame.shape[1]} (height x width), expected "
            f"{size[0]}x{size[1]}, for which this rig was calibrated; calibrate at the size that "
            "the camera gives, or set the camera to that size"
        )
    return np.ascontiguousarray(frame)


def _require_matrix(name: str, matrix: Matrix | Sequence[Any]) -> None:
    array = np.asarray(matrix, np.float64)
    good = array.shape == (3, 3) and bool(np.isfinite(array).all())
    if not good or math.isclose(float(np.linalg.det(array)), 0.0, abs_tol=1e-12):
        raise SettingError(f"{name}: got {array.tolist()}; expected an invertible 3x3 matrix")
