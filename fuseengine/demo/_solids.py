"""Shapes of the demo scene and where a ray from the camera meets them.

Coordinates are metres: x to the right, y up from the road, z along the view. Rays start at the eye
and have directions (u, v, 1), so a ray's parameter t is the depth z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fuseengine.demo._noise import Array, fbm

Index = NDArray[np.intp]


@dataclass
class Surface:
    """What both cameras need to know of n surface points.

    Attributes:
        albedo: (n, 3) diffuse reflectance, linear RGB in [0, 1].
        normal: (n, 3) unit normals.
        glow: (n, 3) emitted linear RGB, 0 and up.
        heat: (n,) thermal radiance, 0 cold sky to 1 bare skin.
        gloss: (n,) strength of the mirror-like reflection, 0 to 1.
    """

    albedo: Array
    normal: Array
    glow: Array
    heat: Array
    gloss: Array

    @classmethod
    def plain(
        cls, normal: Array, albedo: Sequence[float], heat: float, gloss: float = 0.0
    ) -> Surface:
        """A uniform surface with the given (n, 3) normals."""
        n = len(normal)
        return cls(
            albedo=np.tile(np.asarray(albedo, np.float32), (n, 1)),
            normal=normal,
            glow=np.zeros((n, 3), np.float32),
            heat=np.full(n, heat, np.float32),
            gloss=np.full(n, gloss, np.float32),
        )

    def paint(
        self,
        where: NDArray[np.bool_],
        albedo: Sequence[float] | Array | None = None,
        heat: float | Array | None = None,
        glow: Sequence[float] | Array | None = None,
        gloss: float | None = None,
    ) -> None:
        """Overwrite some attributes where the mask (n,) is true; arrays are for those points."""
        for name, value in (("albedo", albedo), ("heat", heat), ("glow", glow), ("gloss", gloss)):
            if value is not None:
                getattr(self, name)[where] = value


Material = Callable[[Array, Array, Array], Surface]
"""(points (n, 3), ray directions (n, 3), normals (n, 3)) -> Surface."""


def _through_box(low: Array, high: Array, d: Array) -> tuple[Index, Array, Array]:
    """Rays from the origin that cross a box: their indices, entry depths and exit depths."""
    near = np.full(len(d), low[2], np.float32)
    far = np.full(len(d), high[2], np.float32)
    for axis in (0, 1):
        inverse = 1 / np.where(np.abs(d[:, axis]) < 1e-7, np.float32(1e-7), d[:, axis])
        a, b = low[axis] * inverse, high[axis] * inverse
        np.maximum(near, np.minimum(a, b), out=near)
        np.minimum(far, np.maximum(a, b), out=far)
    idx = np.flatnonzero((near < far) & (near > 0.1))
    return idx, near[idx], far[idx]


class Ground:
    """The plane y = 0."""

    def __init__(self, material: Material) -> None:
        self.material = material

    def hit(self, eye: Array, d: Array) -> tuple[Index, Array]:
        """Indices of the rays that meet the solid, and their depths."""
        idx = np.flatnonzero(d[:, 1] < -1e-4)
        return idx, -eye[1] / d[idx, 1]

    def surface(self, p: Array, d: Array) -> Surface:
        """The surface at points on the solid."""
        normal = np.zeros_like(p)
        normal[:, 1] = 1
        return self.material(p, d, normal)


class Box:
    """An axis-aligned box.

    Args:
        low: smallest (x, y, z).
        high: largest (x, y, z).
        material: its look.
    """

    def __init__(self, low: Sequence[float], high: Sequence[float], material: Material) -> None:
        self.low, self.high = np.asarray(low, np.float32), np.asarray(high, np.float32)
        self.material = material

    def hit(self, eye: Array, d: Array) -> tuple[Index, Array]:
        """Indices of the rays that meet the solid, and their depths."""
        idx, near, _ = _through_box(self.low - eye, self.high - eye, d)
        return idx, near

    def surface(self, p: Array, d: Array) -> Surface:
        """The surface at points on the solid."""
        half = (self.high - self.low) / 2
        off = (p - (self.low + self.high) / 2) / half
        axis = np.argmax(np.abs(off), axis=1)
        normal = np.zeros_like(p)
        rows = np.arange(len(p))
        normal[rows, axis] = np.sign(off[rows, axis])
        return self.material(p, d, normal)


class Foliage:
    """A leafy blob: a card facing the camera whose outline and holes are cut by noise.

    Args:
        centre: (x, y, z).
        radius: horizontal and vertical half size.
        material: its look; it is given normals that bulge towards the camera.
        salt: selects its noise.
        leaf: leaves per metre.
    """

    def __init__(
        self,
        centre: Sequence[float],
        radius: tuple[float, float],
        material: Material,
        salt: int,
        leaf: float = 9.0,
    ) -> None:
        self.centre, self.radius = np.asarray(centre, np.float32), radius
        self.material, self.salt, self.leaf = material, salt, np.float32(leaf)

    def _local(self, p: Array) -> tuple[Array, Array]:
        return (
            (p[:, 0] - self.centre[0]) / np.float32(self.radius[0]),
            (p[:, 1] - self.centre[1]) / np.float32(self.radius[1]),
        )

    def hit(self, eye: Array, d: Array) -> tuple[Index, Array]:
        """Indices of the rays that meet the solid, and their depths."""
        depth = self.centre[2] - eye[2]
        x = (d[:, 0] * depth + (eye[0] - self.centre[0])) / np.float32(self.radius[0])
        idx = np.flatnonzero(np.abs(x) < 1.1)
        p = eye + d[idx] * depth
        x, y = self._local(p)
        keep = (x * x + y * y < 1.2) & (p[:, 1] > 0)
        idx, p, x, y = idx[keep], p[keep], x[keep], y[keep]
        clumps = fbm(p[:, 0] * self.leaf * 0.2, p[:, 1] * self.leaf * 0.2, self.salt, 2)
        leaves = fbm(p[:, 0] * self.leaf, p[:, 1] * self.leaf, self.salt + 5, 2)
        keep = 1.15 - (x * x + y * y) + 0.9 * (clumps - 0.5) + 1.1 * (leaves - 0.5) > 0.45
        idx = idx[keep]
        return idx, np.full(len(idx), depth, np.float32)

    def surface(self, p: Array, d: Array) -> Surface:
        """The surface at points on the solid."""
        x, y = self._local(p)
        a = fbm(p[:, 0] * self.leaf, p[:, 1] * self.leaf, self.salt + 5, 2) - 0.5
        b = fbm(p[:, 0] * self.leaf + 40, p[:, 1] * self.leaf, self.salt + 9, 2) - 0.5
        normal = np.stack([x * 0.8 + 2 * a, y * 0.8 + 2 * b + 0.2, np.full_like(x, -0.6)], axis=1)
        return self.material(p, d, normal / np.linalg.norm(normal, axis=1, keepdims=True))


class Marched:
    """A solid given by a signed distance, found by sphere tracing within a bounding box.

    Args:
        low: smallest (x, y, z) of the bounding box.
        high: its largest (x, y, z).
        distance: (n, 3) points -> (n,) signed distances, never far above the true distance.
        material: its look.
    """

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        distance: Callable[[Array], Array],
        material: Material,
    ) -> None:
        self.low, self.high = np.asarray(low, np.float32), np.asarray(high, np.float32)
        self.distance, self.material = distance, material

    def hit(self, eye: Array, d: Array) -> tuple[Index, Array]:
        """Indices of the rays that meet the solid, and their depths."""
        idx, t, end = _through_box(self.low - eye, self.high - eye, d)
        speed = np.linalg.norm(d[idx], axis=1)
        hits = np.zeros(len(idx), bool)
        live = np.arange(len(idx))
        tolerance = np.float32(2e-4) * self.low[2]
        for _ in range(56):
            gap = self.distance(eye + d[idx[live]] * t[live, None])
            near = gap < tolerance
            hits[live[near]] = True
            live, gap = live[~near], gap[~near]
            t[live] += np.float32(0.9) * gap / speed[live]
            live = live[t[live] < end[live]]
            if not len(live):
                break
        return idx[hits], t[hits]

    def surface(self, p: Array, d: Array) -> Surface:
        """The surface at points on the solid."""
        step = np.float32(2e-3)
        normal = np.empty_like(p)
        for axis in range(3):
            shift = np.zeros(3, np.float32)
            shift[axis] = step
            normal[:, axis] = self.distance(p + shift) - self.distance(p - shift)
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
        return self.material(p, d, normal)


def limb_distance(p: Array, a: Array, b: Array, ra: float, rb: float) -> Array:
    """Distance from points (n, 3) to a limb from `a` to `b` whose radius goes from `ra` to `rb`."""
    # One array per coordinate: three times as fast as arithmetic on rows of three.
    x, y, z = p[:, 0] - a[0], p[:, 1] - a[1], p[:, 2] - a[2]
    ex, ey, ez = b - a
    t = (x * ex + y * ey + z * ez) * np.float32(1 / max(ex * ex + ey * ey + ez * ez, 1e-12))
    t = np.minimum(np.maximum(t, 0), 1)
    x -= t * ex
    y -= t * ey
    z -= t * ez
    return np.sqrt(x * x + y * y + z * z) - (np.float32(ra) + t * np.float32(rb - ra))


def smooth_min(a: Array, b: Array, k: float) -> Array:
    """Minimum whose crease is rounded over a width `k`."""
    h = np.maximum(np.float32(k) - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h / np.float32(4 * k)


def polygon_distance(x: Array, y: Array, corners: Sequence[tuple[float, float]]) -> Array:
    """Signed distance to a closed polygon, negative inside."""
    best = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = x - np.float32(ax), y - np.float32(ay)
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        best = np.minimum(best, (wx - ex * t) ** 2 + (wy - ey * t) ** 2)
        crosses = (wy >= 0) != (y >= by)
        inside ^= crosses & (wx * np.float32(ey) * np.sign(ey) < wy * np.float32(ex) * np.sign(ey))
    root = np.sqrt(best)
    return np.where(inside, -root, root)
