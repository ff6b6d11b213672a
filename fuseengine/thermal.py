"""Thermal frames: from 14- or 16-bit counts to what a fusion model takes, [0, 1].

A radiometric camera gives counts of which a scene uses a few hundred. Gain control spreads them:

* :class:`PercentileGain`: a straight line between two percentiles;
* :class:`PlateauEqualisation`: histogram equalisation with a limited slope, so that a large even
  background does not take all levels (Vickers, "Plateau equalization algorithm for real-time
  display of high-quality infrared imagery", Optical Engineering 35, 1996);
* :class:`LocalEqualisation`: CLAHE (Zuiderveld, Graphics Gems IV, 1994).

Before it, sensor faults can be taken out: :class:`DeadPixels`, :class:`StreakFilter`.
:class:`ThermalInput` does all of it in order. Gain that jumps from frame to frame flickers, so
bounds and tables are smoothed over time; each object belongs to one camera. No torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fuseengine import _native
from fuseengine.errors import FrameError, SettingError, UnknownNameError

Counts = NDArray[Any]
"""(H, W) uint8 or uint16."""


class GainControl(Protocol):
    """Counts (H, W), uint8 or uint16 -> float32 (H, W) in [0, 1]."""

    def __call__(self, counts: Counts, out: NDArray[np.float32] | None = None) -> Any:
        """The picture of a frame, into ``out`` if it is given."""

    def reset(self) -> None:
        """Forget the frames before, as after a cut."""


class _Table(ABC):
    """A gain control that is one table for the whole frame, smoothed over time."""

    def __init__(self, smoothing: float) -> None:
        if not 0.0 <= smoothing < 1.0:
            raise SettingError(f"smoothing={smoothing}; expected 0 (none) to below 1")
        self.smoothing = smoothing

    @abstractmethod
    def reset(self) -> None:
        """Forget the frames before, as after a cut."""

    @abstractmethod
    def table(self, counts: Counts) -> NDArray[np.float32]:
        """What each count means in this frame: (256,) or (65536,) float32 in [0, 1].

        Raises:
            FrameError: counts of another shape or dtype.
        """

    def __call__(
        self, counts: Counts, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """The picture of a frame.

        Args:
            counts: (H, W) uint8 or uint16.
            out: (H, W) float32 to write into; a new array by default.

        Returns:
            (H, W) float32 in [0, 1].

        Raises:
            FrameError: counts of another shape or dtype.
        """
        table = self.table(counts)
        out = np.empty(counts.shape, np.float32) if out is None else out
        _native.look_up(counts, table, out)
        return out


class PercentileGain(_Table):
    """A straight line from a low percentile's count (0) to a high one's (1).

    Args:
        low: percentile that becomes 0, in percent.
        high: percentile that becomes 1.
        smoothing: share of the bounds before in a frame's bounds: 0.9 follows a change in some ten
            frames. Bounds that no longer overlap with the frame's are dropped at once.
        least: counts that the line spans at least, so that an even scene's noise stays noise.

    Raises:
        SettingError: numbers outside what is said.
    """

    def __init__(
        self, low: float = 0.5, high: float = 99.5, *, smoothing: float = 0.9, least: float = 16.0
    ) -> None:
        super().__init__(smoothing)
        if not 0.0 <= low < high <= 100.0 or not least > 0.0:
            raise SettingError(
                f"low={low}, high={high}, least={least}; expected 0 <= low < high <= 100 percent "
                "and least > 0 counts"
            )
        self.low, self.high, self.least = low, high, least
        self.bounds: tuple[float, float] | None = None

    def reset(self) -> None:
        """Forget the frames before, as after a cut."""
        self.bounds = None

    def table(self, counts: Counts) -> NDArray[np.float32]:
        """See :meth:`_Table.table`."""
        below = np.cumsum(histogram(counts))
        found = [
            float(np.searchsorted(below, max(share / 100.0 * below[-1], 1.0)))
            for share in (self.low, self.high)
        ]
        if found[1] - found[0] < self.least:
            middle = (found[0] + found[1]) / 2
            found = [middle - self.least / 2, middle + self.least / 2]
        if self.bounds is not None and found[0] < self.bounds[1] and self.bounds[0] < found[1]:
            share = self.smoothing
            found = [share * b + (1.0 - share) * f for b, f in zip(self.bounds, found, strict=True)]
        self.bounds = found[0], found[1]
        levels = np.arange(len(below), dtype=np.float32)
        line = (levels - np.float32(found[0])) / np.float32(found[1] - found[0])
        return np.clip(line, 0.0, 1.0, out=line)


class PlateauEqualisation(_Table):
    """Histogram equalisation of a histogram that is cut at a plateau.

    Args:
        plateau: a count's share of the pixels counts for no more than this; 1 is plain
            equalisation, a small number nearly a straight line between the smallest and the largest
            count.
        smoothing: share of the table before in a frame's table.

    Raises:
        SettingError: numbers outside what is said.
    """

    def __init__(self, plateau: float = 0.002, *, smoothing: float = 0.9) -> None:
        super().__init__(smoothing)
        if not 0.0 < plateau <= 1.0:
            raise SettingError(
                f"plateau={plateau}; expected a share of the pixels, above 0, up to 1"
            )
        self.plateau = plateau
        self._before: NDArray[np.float32] | None = None

    def reset(self) -> None:
        """Forget the frames before, as after a cut."""
        self._before = None

    def table(self, counts: Counts) -> NDArray[np.float32]:
        """See :meth:`_Table.table`."""
        found = histogram(counts).astype(np.float64)
        found = np.minimum(found, self.plateau * counts.size)
        sums = np.cumsum(found)
        table = ((sums - 0.5 * found) / sums[-1]).astype(np.float32)
        before = self._before
        if before is not None and before.shape == table.shape:
            table += np.float32(self.smoothing) * (before - table)
        self._before = table
        return table


class LocalEqualisation:
    """CLAHE on counts: contrast by surroundings, limited where a neighbourhood is even.

    Args:
        tiles: rows and columns of tiles.
        limit: largest slope, in units of that of a straight line between the bounds.
        bins: levels that the counts between the bounds are sorted into.
        bounds: gain control that says which counts are told apart; its smoothing smooths this one.

    Raises:
        SettingError: numbers outside what is said.
    """

    def __init__(
        self,
        tiles: tuple[int, int] = (8, 8),
        *,
        limit: float = 3.0,
        bins: int = 512,
        bounds: PercentileGain | None = None,
    ) -> None:
        if min(tiles) < 1 or not limit >= 1.0 or not 2 <= bins <= 65536:
            raise SettingError(
                f"tiles={tiles}, limit={limit}, bins={bins}; expected at least 1 x 1 tiles, a "
                "limit >= 1 and 2 to 65536 bins"
            )
        self.tiles, self.limit, self.bins = tiles, limit, bins
        self.bounds = bounds or PercentileGain(0.1, 99.9)

    def reset(self) -> None:
        """Forget the frames before, as after a cut."""
        self.bounds.reset()

    def __call__(
        self, counts: Counts, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """The picture of a frame; see :meth:`PercentileGain.__call__`."""
        line = self.bounds.table(counts)
        bins = np.minimum(line * self.bins, self.bins - 1).astype(np.uint16)
        out = np.empty(counts.shape, np.float32) if out is None else out
        height, width = counts.shape
        _native.equalise_locally(
            counts,
            bins,
            out,
            tiles=(min(self.tiles[0], height), min(self.tiles[1], width)),
            count=self.bins,
            limit=self.limit,
        )
        return out


class DeadPixels:
    """Replaces known bad pixels by the median of their good neighbours (3x3, wider if need be).

    Args:
        places: (row, column) of each.

    Raises:
        SettingError: places that are no pairs of numbers from 0.
    """

    def __init__(self, places: Sequence[tuple[int, int]] | NDArray[Any]) -> None:
        array = np.asarray(places, dtype=np.int64).reshape(-1, 2) if len(places) else _NOWHERE
        if array.size and array.min() < 0:
            raise SettingError(f"places: got {places!r}; expected (row, column) pairs from 0")
        self.places = np.unique(array, axis=0)
        self._neighbours: dict[tuple[int, int], tuple[NDArray[Any], ...]] = {}

    @classmethod
    def find(cls, frames: Iterable[Counts], *, sigmas: float = 8.0) -> DeadPixels:
        """Pixels that differ from their surroundings in the same way in all frames.

        Args:
            frames: several frames of changing scenes, or of a shutter.
            sigmas: how far from the median of the eight neighbours, in the median of the frames and
                in units of what is usual there.

        Raises:
            FrameError: no frames, or frames of several sizes.
        """
        differences: list[NDArray[np.float32]] = []
        for frame in frames:
            _check(frame)
            found = (frame.astype(np.float32) - _median_around(frame)).astype(np.float32)
            if differences and found.shape != differences[0].shape:
                raise FrameError(
                    f"got frames of {differences[0].shape} and {found.shape}; expected one size"
                )
            differences.append(found)
        if not differences:
            raise FrameError("got no frames to find dead pixels in; expected at least one")
        # The median over frames: a corner of the scene passes by, a dead pixel stays.
        lasting = np.median(np.stack(differences), axis=0)
        usual = 1.4826 * float(np.median(np.abs(lasting - np.median(lasting))))
        return cls(np.argwhere(np.abs(lasting) > sigmas * max(usual, 0.5)))

    def __call__(self, counts: Counts, out: Counts | None = None) -> Counts:
        """The frame with its bad pixels replaced; ``out`` may be the frame itself.

        Raises:
            FrameError: a frame that does not hold the places.
        """
        _check(counts)
        if out is None:
            out = counts.copy()
        elif out is not counts:
            out[...] = counts
        if len(self.places):
            rows, columns, wide = self._around(counts.shape)
            around = np.ma.array(out[rows, columns], mask=wide)
            replaced = np.ma.median(around, axis=1).filled(0)
            out[self.places[:, 0], self.places[:, 1]] = np.rint(replaced).astype(out.dtype)
        return out

    def _around(self, shape: tuple[int, ...]) -> tuple[NDArray[Any], ...]:
        """Rows and columns of each place's surroundings, and which of them are not to be used."""
        key = (shape[0], shape[1])
        if key not in self._neighbours:
            if (self.places >= np.array(key)).any():
                raise FrameError(
                    f"got a frame of {key[0]}x{key[1]} (height x width), but dead pixels up to "
                    f"{tuple(self.places.max(axis=0).tolist())}; expected a frame of their camera"
                )
            bad = np.zeros(key, bool)
            bad[self.places[:, 0], self.places[:, 1]] = True
            for radius in (1, 2, 4, 8, 16):
                found = _surroundings(self.places, key, bad, radius)
                if not found[2].all(axis=1).any():
                    break
            self._neighbours[key] = found
        return self._neighbours[key]


class StreakFilter:
    """Takes fixed column offsets out, as uncooled sensors have them.

    Args:
        radius: pixels to each side that a column is compared with.
        limit: counts; a larger difference from the surroundings is the scene's and counts no more.
        smoothing: share of the offsets before in a frame's offsets. The sensor's drift takes
            seconds: high values keep the scene's own columns.

    Raises:
        SettingError: numbers outside what is said.
    """

    def __init__(self, radius: int = 8, *, limit: float = 32.0, smoothing: float = 0.95) -> None:
        if radius < 1 or not limit > 0.0 or not 0.0 <= smoothing < 1.0:
            raise SettingError(
                f"radius={radius}, limit={limit}, smoothing={smoothing}; expected a radius >= 1, "
                "a limit > 0 and 0 <= smoothing < 1"
            )
        self.radius, self.limit, self.smoothing = radius, limit, smoothing
        self.offsets: NDArray[np.float64] | None = None

    def reset(self) -> None:
        """Forget the frames before."""
        self.offsets = None

    def __call__(self, counts: Counts, out: Counts | None = None) -> Counts:
        """The frame without its offsets, in its dtype; ``out`` may be the frame itself."""
        _check(counts)
        found = np.empty(counts.shape[1], np.float64)
        _native.column_offsets(counts, found, radius=self.radius, most=self.limit)
        before = self.offsets
        if before is not None and before.shape == found.shape:
            found = self.smoothing * before + (1.0 - self.smoothing) * found
        self.offsets = found
        out = np.empty_like(counts) if out is None else out
        _native.subtract_columns(counts, found.astype(np.float32), out)
        return out


GAINS = {
    "percentile": PercentileGain,
    "plateau": PlateauEqualisation,
    "clahe": LocalEqualisation,
}
"""Gain controls by the name that the command line takes."""


class ThermalInput:
    """What a thermal camera's frames go through: dead pixels, streaks, gain.

    Args:
        gain: one of :data:`GAINS`, or a gain control.
        dead_pixels: (row, column) pairs, or a :class:`DeadPixels`.
        destreak: whether column offsets are taken out, or a :class:`StreakFilter`.

    Raises:
        UnknownNameError: another gain.
    """

    def __init__(
        self,
        gain: str | GainControl = "percentile",
        *,
        dead_pixels: Sequence[tuple[int, int]] | DeadPixels | None = None,
        destreak: bool | StreakFilter = False,
    ) -> None:
        if isinstance(gain, str):
            if gain not in GAINS:
                raise UnknownNameError("gain control", gain, GAINS)
            self.gain: GainControl = GAINS[gain]()
        else:
            self.gain = gain
        if dead_pixels is not None and not isinstance(dead_pixels, DeadPixels):
            dead_pixels = DeadPixels(dead_pixels)
        self.dead_pixels = dead_pixels
        self.destreak = StreakFilter() if destreak is True else (destreak or None)

    def reset(self) -> None:
        """Forget the frames before, as after a cut."""
        self.gain.reset()
        if self.destreak is not None:
            self.destreak.reset()

    def correct(self, counts: Counts) -> Counts:
        """The frame without dead pixels and streaks, still counts; the given one is not changed.

        Raises:
            FrameError: counts of another shape or dtype.
        """
        _check(counts)
        corrected = counts
        if self.dead_pixels is not None:
            corrected = self.dead_pixels(corrected)
        if self.destreak is not None:
            corrected = self.destreak(corrected, None if corrected is counts else corrected)
        return corrected

    def __call__(
        self, counts: Counts, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """The picture of a frame.

        Args:
            counts: (H, W) uint8 or uint16.
            out: (H, W) float32 to write into; a new array by default.

        Returns:
            (H, W) float32 in [0, 1].

        Raises:
            FrameError: counts of another shape or dtype.
        """
        picture: NDArray[np.float32] = self.gain(self.correct(counts), out)
        return picture


def histogram(counts: Counts) -> NDArray[np.uint32]:
    """How often each count occurs: (256,) or (65536,).

    Raises:
        FrameError: counts of another shape or dtype.
    """
    _check(counts)
    found = np.empty(1 << (8 * counts.itemsize), np.uint32)
    _native.histogram(counts, found)
    return found


_NOWHERE = np.zeros((0, 2), np.int64)


def _check(counts: Counts) -> None:
    if counts.ndim != 2 or counts.dtype not in (np.uint8, np.uint16) or not counts.size:
        raise FrameError(
            f"thermal frame: got {counts.dtype} {counts.shape}; expected counts (H, W) of uint8 or "
            "uint16: take one channel of a coloured one, and convert signed counts"
        )


def _median_around(frame: Counts) -> NDArray[np.float32]:
    padded = np.pad(frame.astype(np.float32), 1, mode="reflect")
    height, width = frame.shape
    around = [
        padded[dy : dy + height, dx : dx + width]
        for dy in range(3)
        for dx in range(3)
        if (dy, dx) != (1, 1)
    ]
    return np.median(np.stack(around), axis=0)


def _surroundings(
    places: NDArray[Any], size: tuple[int, int], bad: NDArray[np.bool_], radius: int
) -> tuple[NDArray[Any], ...]:
    steps = np.arange(-radius, radius + 1)
    dy, dx = (grid.ravel() for grid in np.meshgrid(steps, steps, indexing="ij"))
    rows, columns = places[:, :1] + dy, places[:, 1:] + dx
    outside = (rows < 0) | (rows >= size[0]) | (columns < 0) | (columns >= size[1])
    rows, columns = rows.clip(0, size[0] - 1), columns.clip(0, size[1] - 1)
    return rows, columns, outside | bad[rows, columns]
