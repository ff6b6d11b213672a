"""A synthetic two-camera rig: boards and scenes drawn by known lenses and a known homography.

The visible camera sees a plane through its lens; the infrared camera sees the same plane through
``homography`` and its own lens, with inverted polarity, 16-bit counts and noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fuseengine.alignment import Camera, Rig, transfer

VISIBLE = Camera(
    (360, 480),
    np.array([[420.0, 0.0, 238.0], [0.0, 418.0, 182.0], [0.0, 0.0, 1.0]]),
    (-0.22, 0.06, 0.001, -0.0015, 0.0),
)
INFRARED = Camera(
    (240, 320),
    np.array([[300.0, 0.0, 161.0], [0.0, 301.0, 118.0], [0.0, 0.0, 1.0]]),
    (-0.15, 0.03, -0.001, 0.0012, 0.0),
)
HOMOGRAPHY = np.array([[0.68, 0.02, -4.0], [-0.015, 0.69, 3.0], [1.2e-5, -2e-5, 1.0]])


def rig(*, lens: bool = True) -> Rig:
    """The truth."""
    if lens:
        return Rig(INFRARED, VISIBLE, HOMOGRAPHY)
    return Rig(Camera(INFRARED.size), Camera(VISIBLE.size), HOMOGRAPHY)


@dataclass(frozen=True)
class Board:
    """A checkerboard somewhere on the visible camera's undistorted view.

    Attributes:
        pose: (3, 3) from board units (squares, from the first inner corner) to visible pixels.
        corners: inner corners per row and per column.
    """

    pose: np.ndarray
    corners: tuple[int, int] = (9, 6)

    def shade(self, places: np.ndarray) -> np.ndarray:
        """How bright the visible plane is at places (..., 2): 0 or 1, grey where no board is."""
        at = transfer(np.linalg.inv(self.pose), places)
        columns, rows = self.corners
        x, y = at[..., 0], at[..., 1]
        inside = (x > -1) & (x < columns) & (y > -1) & (y < rows)
        margin = (x > -1.6) & (x < columns + 0.6) & (y > -1.6) & (y < rows + 0.6)
        dark = (np.floor(x) + np.floor(y)) % 2 == 0
        return np.where(inside, np.where(dark, 0.05, 0.95), np.where(margin, 0.95, 0.4))


def board_poses(count: int, seed: int = 0) -> list[Board]:
    """Boards of several tilts all over the picture, as a plane seen by a pinhole camera."""
    rng, boards = np.random.default_rng(seed), []
    camera = VISIBLE.matrix
    for _ in range(count):
        angles = rng.uniform(-0.45, 0.45, 3) * (1.0, 1.0, 0.5)
        turn = np.eye(3)
        for axis, angle in enumerate(angles):
            c, s = np.cos(angle), np.sin(angle)
            i, j = [k for k in range(3) if k != axis]
            step = np.eye(3)
            step[i, i], step[i, j], step[j, i], step[j, j] = c, -s, s, c
            turn = turn @ step
        centre = np.array([4.0, 2.5, 0.0])
        place = np.array([*rng.uniform(-4.5, 4.5, 2) * (1.0, 0.65), rng.uniform(15.0, 19.0)])
        shift = place - turn @ centre
        boards.append(Board(camera @ np.stack([turn[:, 0], turn[:, 1], shift], axis=1)))
    return boards


def _rays(camera: Camera, oversampling: int) -> np.ndarray:
    """Undistorted places of every sample of a camera's pixels, (H n, W n, 2)."""
    n = oversampling
    row, column = np.mgrid[: camera.size[0] * n, : camera.size[1] * n].astype(np.float64)
    places = np.stack([(column + 0.5) / n - 0.5, (row + 0.5) / n - 0.5], -1)
    return camera.undistort(places)


@dataclass
class Renderer:
    """Draws a plane's shade as both cameras see it.

    Attributes:
        truth: the rig.
        oversampling: samples per pixel along each axis.
    """

    truth: Rig
    oversampling: int = 3
    _places: dict = field(default_factory=dict)

    def places(self, which: str) -> np.ndarray:
        """Where on the visible undistorted plane each sample of a camera looks."""
        if which not in self._places:
            camera = getattr(self.truth, which)
            seen = _rays(camera, self.oversampling)
            if which == "infrared":
                seen = transfer(np.linalg.inv(self.truth.homography), seen)
            self._places[which] = seen
        return self._places[which]

    def draw(self, which: str, shade) -> np.ndarray:
        """(H, W) float: the mean of ``shade(places)`` over each pixel's samples."""
        height, width = getattr(self.truth, which).size
        n = self.oversampling
        return shade(self.places(which)).reshape(height, n, width, n).mean((1, 3))

    def visible(self, shade) -> np.ndarray:
        """uint8 (H, W, 3)."""
        grey = np.rint(255 * self.draw("visible", shade)).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)

    def infrared(self, shade, *, noise: float = 6.0, seed: int = 0) -> np.ndarray:
        """uint16 counts (H, W): bright is cold, with the sensor's noise."""
        counts = 22_000 - 900 * self.draw("infrared", shade)
        counts += noise * np.random.default_rng(seed).standard_normal(counts.shape)
        return np.rint(counts).astype(np.uint16)
