"""Flicker: what changes from frame to frame in a fused video and in neither of its sources."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuseengine.errors import FrameError, SettingError


def flicker(
    fused: NDArray[Any], infrared: NDArray[Any], visible: NDArray[Any]
) -> NDArray[np.float64]:
    """Frame-to-frame change of a fused video beyond its sources' own.

    Per pixel ``max(0, |f_t - f_{t-1}| - max(|a_t - a_{t-1}|, |b_t - b_{t-1}|))``, averaged over a
    frame. A still scene without noise has none, however it is fused; a sampler whose noise changes
    with every frame has much.

    Args:
        fused: luma of the frames, (T, H, W), T of at least 2; the three alike in shape and scale.
        infrared: the source a.
        visible: luma of the source b.

    Returns:
        (T - 1,), in units of the frames' values: grey levels of 8-bit frames.

    Raises:
        FrameError: frames of other shapes.
        SettingError: fewer than two frames.
    """
    shapes = {np.shape(video) for video in (fused, infrared, visible)}
    if len(shapes) > 1 or len(np.shape(fused)) != 3:
        raise FrameError(
            f"got videos {', '.join(map(str, sorted(shapes)))}; expected three of one shape "
            "(T, H, W): luma, frame by frame"
        )
    if len(fused) < 2:
        raise SettingError(f"got {len(fused)} frames; expected 2 or more")

    def changes(video: NDArray[Any], at: int) -> NDArray[np.float64]:
        return np.abs(video[at].astype(np.float64) - video[at - 1])

    return np.array(
        [
            np.maximum(
                changes(fused, t) - np.maximum(changes(infrared, t), changes(visible, t)), 0.0
            ).mean()
            for t in range(1, len(fused))
        ]
    )
