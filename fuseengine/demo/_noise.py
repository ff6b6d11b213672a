"""Repeatable noise and small image filters for the demo renderer.

The noise comes from an integer hash, not from `numpy.random`: it depends only on the position and
a salt, so a texture stays on its surface whatever the picture's size, and it is the same on every
platform and numpy version.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# float32 throughout; numpy's stubs make float64 of too many expressions to say so in the type.
Array = NDArray[Any]


def hash01(x: NDArray[np.int64], y: NDArray[np.int64], salt: int) -> Array:
    """Uniform noise on an integer lattice.

    Args:
        x: lattice column, any integer shape.
        y: lattice row, broadcastable with `x`.
        salt: selects an independent field.

    Returns:
        float32 in [0, 1), of the broadcast shape.
    """
    h = x.astype(np.uint32) * np.uint32(0x9E3779B1) ^ y.astype(np.uint32) * np.uint32(0x85EBCA77)
    h ^= np.uint32((salt * 0xC2B2AE3D) & 0xFFFFFFFF)
    # The finaliser of MurmurHash3 (public domain): every input bit reaches every output bit.
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return (h >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def cell01(x: Array, y: Array, salt: int) -> Array:
    """Uniform noise constant over each unit cell: `hash01` of the floors of float coordinates."""
    return hash01(np.floor(x).astype(np.int64), np.floor(y).astype(np.int64), salt)


def value_noise(x: Array, y: Array, salt: int) -> Array:
    """Smooth noise with one feature per unit length, float32 in [0, 1)."""
    fx, fy = np.floor(x), np.floor(y)
    ix, iy = fx.astype(np.int64), fy.astype(np.int64)
    tx, ty = x - fx, y - fy
    tx, ty = tx * tx * (3 - 2 * tx), ty * ty * (3 - 2 * ty)
    top = hash01(ix, iy, salt)
    top = top + tx * (hash01(ix + 1, iy, salt) - top)
    low = hash01(ix, iy + 1, salt)
    low = low + tx * (hash01(ix + 1, iy + 1, salt) - low)
    return top + ty * (low - top)


def fbm(x: Array, y: Array, salt: int, octaves: int = 4) -> Array:
    """Fractal sum of `value_noise`, each octave twice as fine and half as strong, in [0, 1)."""
    total, gain = np.zeros_like(x), 0.5
    for octave in range(octaves):
        total += np.float32(gain) * value_noise(x, y, salt + 101 * octave)
        x, y, gain = x * np.float32(2.03) + 17, y * np.float32(2.03) + 31, gain / 2
    return total / np.float32(1 - 0.5**octaves)


def gaussian(shape: tuple[int, int], salt: int) -> Array:
    """White noise of mean 0 and variance 1, a sum of four uniforms, so within +-3.5.

    Args:
        shape: (height, width).
        salt: selects an independent field.

    Returns:
        float32 (height, width).
    """
    y, x = np.mgrid[: shape[0], : shape[1]]
    total = sum(hash01(x, y, salt + 7919 * k) for k in range(4))
    return ((total - 2) * np.float32(np.sqrt(3.0))).astype(np.float32)


def smoothstep(low: float, high: float, x: Array) -> Array:
    """0 below `low`, 1 above `high`, a smooth cubic between; `low > high` turns it round."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def blur(image: Array, sigma: float) -> Array:
    """Gaussian blur with edge replication.

    Args:
        image: float32 (H, W) or (H, W, C).
        sigma: standard deviation in pixels; below 0.05 the image is returned as it is.

    Returns:
        float32, the same shape.
    """
    if sigma < 0.05:
        return image
    out = image
    for axis in (0, 1):
        out = _blur_axis(out, sigma, axis)
    return out


def _blur_axis(image: Array, sigma: float, axis: int) -> Array:
    lines = np.moveaxis(image, axis, 0)
    if sigma < 4:
        radius = max(1, int(np.ceil(3 * sigma)))
        taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2).astype(np.float32)
        wide = _extend(lines, radius)
        out = sum(tap * wide[k : k + len(lines)] for k, tap in enumerate(taps / taps.sum()))
    else:
        # Three boxes come within 3% of a Gaussian's width, at a cost that does not grow with it.
        small = int((np.sqrt(4 * sigma * sigma + 1) - 1) / 2)
        wider = round((sigma * sigma - small * (small + 1)) * 1.5 / (small + 1))
        out = lines
        for radius in [small + 1] * wider + [small] * (3 - wider):
            total = np.cumsum(_extend(out, radius + 1)[:-1], axis=0, dtype=np.float64)
            span = 2 * radius + 1
            out = ((total[span:] - total[:-span]) / span).astype(np.float32)
    return np.moveaxis(out, 0, axis)


def _extend(lines: Array, radius: int) -> Array:
    return np.pad(lines, [(radius, radius)] + [(0, 0)] * (lines.ndim - 1), mode="edge")
