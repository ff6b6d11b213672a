"""Video: what a frame's sampling can start from. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuseengine.errors import SettingError

_THINNED = 8
"""Every so many rows and columns are compared for a cut."""


class Memory:
    """What the frames of one video became, for an engine compiled with ``temporal="warm"``.

    ::

        memory = fe.Memory()
        for infrared, visible in frames:
            fused = engine(infrared, visible, memory=memory)

    A frame starts from the fused image of the one before and needs fewer sampling steps. The first
    one, and the first after a cut, are sampled in full. One memory belongs to one video and one
    engine.

    Attributes:
        cut: mean absolute change of either source, on the scale [0, 1], above which a frame does
            not go on from the one before.
        resumed: frames that started from the one before.
        full: frames that were sampled in full.
    """

    def __init__(self, *, cut: float = 0.1) -> None:
        """An empty memory.

        Raises:
            SettingError: cut outside (0, 1].
        """
        if not 0 < cut <= 1:
            raise SettingError(f"cut={cut}; expected above 0 to 1, such as 0.1")
        self.cut = cut
        self.resumed = self.full = 0
        self.estimate: Any = None
        self._seen: list[NDArray[np.float32]] = []

    def reset(self) -> None:
        """Forget the frames before; the counts stay."""
        self.estimate, self._seen = None, []

    def goes_on(self, *sources: NDArray[np.float32]) -> bool:
        """Whether a frame goes on from the one before, whose place it takes.

        Args:
            sources: both as the engine has them, (N, C, H, W) in [0, 1].
        """
        before, self._seen = self._seen, [np.array(x[..., ::_THINNED, ::_THINNED]) for x in sources]
        same = (
            self.estimate is not None
            and [x.shape for x in before] == [x.shape for x in self._seen]
            and all(
                float(np.abs(x - y).mean()) <= self.cut  # not of NaN either
                for x, y in zip(before, self._seen, strict=True)
            )
        )
        self.resumed, self.full = self.resumed + same, self.full + (not same)
        return same

    def keep(self, output: Any, frame: tuple[int, int], padding: str, device: Any) -> None:
        """Remember a fused image, padded as a source is.

        Args:
            output: (N, C, H, W), of a device.
            frame: height and width of what is not padding.
            padding: "reflect" or "white".
            device: see :class:`fuseengine.runtime.executor.Device`.
        """
        shape = tuple(output.shape)
        if self.estimate is None or tuple(self.estimate.shape) != shape:
            self.estimate = device.empty(shape)
        kept = self.estimate
        kept[...] = output
        (height, width), (rows, columns) = frame, shape[2:]
        if padding == "white":
            kept[:, :, height:], kept[..., width:] = 1.0, 1.0
            return
        for row in range(height, rows):
            kept[:, :, row] = kept[:, :, _reflected(row, height)]
        for column in range(width, columns):
            kept[..., column] = kept[..., _reflected(column, width)]


def _reflected(at: int, size: int) -> int:
    """Where a place outside 0 .. size - 1 is taken from: size - 2, size - 3, ... and back."""
    period = max(2 * (size - 1), 1)
    return min(at % period, period - at % period, size - 1)
