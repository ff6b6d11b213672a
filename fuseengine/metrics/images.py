"""The three pictures of one evaluation: checked, on grey levels, remembering shared results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fuseengine.errors import FrameError, SizeMismatchError

Levels = NDArray[np.uint8]
"""Grey levels, (H, W)."""
Image = NDArray[np.float64]
"""A map in float64, mostly (H, W)."""

NAMES = ("f", "a", "b")
"""The pictures by their short names: fused, first source, second source."""
SOURCES = ("a", "b")

_T = TypeVar("_T")


class Images:
    """Fused image and sources on grey levels 0..255.

    Metrics take one of these; what several of them need is computed by a function of the images
    that goes through :meth:`once`.

    Args:
        fused: (H, W) grey or (H, W, 3) RGB. uint8; uint16, whose 0..65535 is scaled to 0..255;
            other integers of 0..255; floats of 0..255. Everything is rounded to grey levels, as
            saving does. Of colour the BT.601 luma is taken.
        a: first source (infrared), likewise; None only where `sources` is False.
        b: second source (visible).
        sources: whether there have to be sources.

    Attributes:
        shape: (H, W).
        levels: the pictures by name, uint8.
        floats: the same in float64.

    Raises:
        FrameError: a dtype, shape or range that is none of these, NaN, a source missing.
        SizeMismatchError: the pictures differ in size.
    """

    def __init__(
        self,
        fused: ArrayLike,
        a: ArrayLike | None = None,
        b: ArrayLike | None = None,
        *,
        sources: bool = True,
    ) -> None:
        given = dict(zip(NAMES, (fused, a, b), strict=True))
        titles = dict(zip(NAMES, ("fused", "a", "b"), strict=True))
        missing = [titles[name] for name in SOURCES if given[name] is None]
        if missing and sources:
            raise FrameError(
                f"no {' and no '.join(missing)}; expected the fused image and both of its sources"
            )
        self.levels: dict[str, Levels] = {
            name: grey_levels(picture, titles[name])
            for name, picture in given.items()
            if picture is not None
        }
        shapes = {titles[name]: levels.shape for name, levels in self.levels.items()}
        if len(set(shapes.values())) != 1:
            sizes = ", ".join(f"{title} {shape}" for title, shape in shapes.items())
            raise SizeMismatchError(
                f"{sizes}; expected three (H, W) of one size; crop or resample them alike"
            )
        self.shape: tuple[int, int] = self.levels["f"].shape
        self._known: dict[Hashable, Any] = {}
        keep_freed_memory()

    @functools.cached_property
    def floats(self) -> dict[str, Image]:
        """The pictures in float64, by name."""
        return {name: levels.astype(np.float64) for name, levels in self.levels.items()}

    @functools.cached_property
    def stretched(self) -> dict[str, Levels]:
        """round(255 (x - min) / (max - min)) of each picture; a constant one becomes 0."""
        return {name: _stretch(levels) for name, levels in self.levels.items()}

    def once(self, compute: Callable[..., _T], *args: Hashable) -> _T:
        """``compute(self, *args)``, computed at the first call and remembered."""
        key = (compute, args)
        if key not in self._known:
            self._known[key] = compute(self, *args)
        return self._known[key]


def grey_levels(picture: ArrayLike, name: str = "image") -> Levels:
    """Grey levels of a picture, (H, W) uint8.

    Args:
        picture: as :class:`Images` takes it.
        name: of the picture in messages.

    Raises:
        FrameError: see :class:`Images`.
    """
    x = np.asarray(picture)
    if x.ndim not in (2, 3) or (x.ndim == 3 and x.shape[2] != 3) or min(x.shape[:2]) < 2:
        raise FrameError(
            f"{name} has shape {x.shape}; expected (H, W), or (H, W, 3) for colour, at least 2x2; "
            "take one frame out of a batch and put channels last"
        )
    if x.dtype == np.uint16:
        x = (x.astype(np.uint32) + 128) // 257
    elif x.dtype.kind == "f":
        x = _rounded(x, name)
    elif x.dtype.kind not in "iu":
        raise FrameError(
            f"{name} has dtype {x.dtype}; expected uint8, uint16, or numbers of 0..255; convert it"
        )
    if x.dtype != np.uint8:
        _check_range(x, name)
        x = x.astype(np.uint8)
    return luma(x) if x.ndim == 3 else x


def luma(rgb: Levels) -> Levels:
    """BT.601 luma of (H, W, 3) RGB, rounded; the same numbers as Pillow's ``convert("L")``."""
    weights = np.array([19595, 38470, 7471], np.uint32)  # 0.299, 0.587, 0.114 times 2^16
    return ((rgb @ weights + 32768) >> 16).astype(np.uint8)


def _rounded(x: NDArray[Any], name: str) -> NDArray[Any]:
    if not np.isfinite(x).all():
        raise FrameError(f"{name} holds NaN or infinity; expected 0..255; replace those pixels")
    rounded = np.rint(x)
    if x.min() >= 0 and x.max() <= 1 and (rounded != x).any():
        raise FrameError(
            f"{name} holds {x.min():.3g}..{x.max():.3g}; expected grey levels 0..255; "
            "multiply it by 255"
        )
    return rounded


def _check_range(x: NDArray[Any], name: str) -> None:
    low, high = x.min(), x.max()
    if low < 0 or high > 255:
        raise FrameError(
            f"{name} holds {low}..{high}; expected 0..255; scale it, or give 16-bit data as uint16"
        )


def _stretch(levels: Levels) -> Levels:
    low, high = int(levels.min()), int(levels.max())
    if low == high:
        return np.zeros_like(levels)
    # Halves round away from zero, as MATLAB does it.
    table = np.floor(255 * (np.arange(256) - low) / (high - low) + 0.5)
    return np.clip(table, 0, 255).astype(np.uint8)[levels]


def strips(height: int, width: int, pixels: int = 12_288) -> Iterator[slice]:
    """Rows in blocks of about so many pixels: intermediate results stay in the cache."""
    step = max(1, pixels // width)
    for first in range(0, height, step):
        yield slice(first, min(first + step, height))


@functools.cache
def keep_freed_memory() -> None:
    """Makes glibc keep the memory of freed arrays for the next ones.

    By default it gives arrays of this size back to the system one by one, and the page faults of
    getting them again cost several times what NumPy's arithmetic on them does. Freeing one mapped
    block (never touched, so it costs nothing) raises both of its thresholds, as the first large
    array of any program does. Elsewhere this has no effect.
    """
    np.empty(30 << 20, np.uint8)
