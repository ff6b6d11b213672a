"""Pictures for the metrics' tests, made by whole-number arithmetic: the same everywhere."""

from __future__ import annotations

import numpy as np


def waves(shape, *periods):
    """Triangular waves along both axes and their sum, 0..255."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    total = np.zeros(shape, np.int64)
    for k, period in enumerate(periods):
        position = (2 * k + 1) * y + (3 - k) * x
        total += np.abs(position % (2 * period) - period) * 255 // period
    return total // len(periods)


def grain(shape, seed, amplitude=8):
    """Noise of a linear congruential generator, -amplitude..amplitude."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    state = (x * 73_856_093 + y * 19_349_663 + seed * 83_492_791) % 2**31
    for _ in range(3):
        state = (state * 1_103_515_245 + 12_345) % 2**31
    return (state >> 16) % (2 * amplitude + 1) - amplitude


def picture(seed, shape=(40, 50)):
    """Something with structure and grain, (H, W) uint8; another one per seed."""
    periods = 11 + seed % 7, 23 + seed % 5, 5 + seed % 3
    return np.clip(waves(shape, *periods) + grain(shape, seed), 0, 255).astype(np.uint8)


def triple(shape=(40, 50), seed=0):
    """A fused picture that holds something of both of its sources, and these."""
    a, b = picture(seed, shape), picture(seed + 1, shape)
    mixed = (3 * a.astype(np.int64) + 2 * b) // 5 + grain(shape, seed + 2, 3)
    return np.clip(mixed, 0, 255).astype(np.uint8), a, b
