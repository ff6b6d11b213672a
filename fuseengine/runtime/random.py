"""Random numbers that are the same everywhere: Philox4x32-10 and Box-Muller.

The stream of a seed is a function of the position alone, so any part of it can be made
anywhere, in any order:

* key = (low, high 32 bits of the seed); counter = (low, high 32 bits of the block, 0, 0);
* word ``i`` of the stream is word ``i mod 4`` of block ``i div 4``;
* normal number ``i`` comes from words ``2j, 2j+1`` with ``j = i div 2``: in float64,
  ``u = (word[2j] + 0.5) / 2**32``, ``v = (word[2j+1] + 0.5) / 2**32``, then
  ``sqrt(-2 ln u) cos(2 pi v)`` for even ``i`` and ``sqrt(-2 ln u) sin(2 pi v)`` for odd ``i``,
  rounded to float32.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fuseengine import _native
from fuseengine.errors import SettingError

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def normal(shape: Sequence[int], *, seed: int, offset: int = 0) -> NDArray[np.float32]:
    """Standard normal numbers ``offset, offset + 1, ...`` of a seed's stream.

    Args:
        shape: Shape of the array to make, filled in C order.
        seed: 0 to 2**64 - 1. The same seed gives the same numbers on every machine.
        offset: Position in the stream of the first number, 0 to 2**64 - 1.

    Returns:
        float32 array of that shape.

    Raises:
        SettingError: If seed or offset is out of range.
    """
    _check(seed=seed, offset=offset)
    out = np.empty(tuple(shape), np.float32)
    _native.philox_normal(out, seed, offset)
    return out


def philox4x32_10(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10 in NumPy, the definition against which the native code is tested.

    Args:
        counter: (..., 4) uint32.
        key: Two 32-bit words.

    Returns:
        (..., 4) uint32, four random words per counter.
    """
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c[0], _MULTIPLIERS[1] * c[2]
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & np.uint64(_MASK),
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & np.uint64(_MASK),
        ]
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return np.stack(c, axis=-1).astype(np.uint32)


def words_reference(count: int, *, seed: int, offset: int = 0) -> NDArray[np.uint32]:
    """Words ``offset .. offset + count - 1`` of a seed's stream, in NumPy: (count,) uint32."""
    _check(seed=seed, offset=offset)
    first = offset // 4
    blocks = np.uint64(first) + np.arange((offset + count + 3) // 4 - first, dtype=np.uint64)
    counter = np.zeros((len(blocks), 4), np.uint32)
    counter[:, 0] = blocks & np.uint64(_MASK)
    counter[:, 1] = blocks >> np.uint64(32)
    words = philox4x32_10(counter, (seed & _MASK, seed >> 32)).reshape(-1)
    return words[offset - 4 * first :][:count]


def normal_reference(count: int, *, seed: int, offset: int = 0) -> NDArray[np.float64]:
    """Normals ``offset .. offset + count - 1`` of a seed's stream, in NumPy: (count,) float64."""
    start = offset // 2 * 2
    words = words_reference((offset + count + 1) // 2 * 2 - start, seed=seed, offset=start)
    u, v = ((words.astype(np.float64) + 0.5) * 2.0**-32).reshape(-1, 2).T
    radius, angle = np.sqrt(-2.0 * np.log(u)), 2.0 * np.pi * v
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(-1)[offset - start :][:count]


def _check(**values: int) -> None:
    for name, value in values.items():
        if not 0 <= value < 2**64:
            raise SettingError(f"{name}: got {value}, expected an integer from 0 to 2**64 - 1")
