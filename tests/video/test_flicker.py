"""Flicker by hand, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from fuseengine.errors import FrameError, SettingError
from fuseengine.video.flicker import flicker


def test_by_hand():
    infrared = np.zeros((3, 2, 4), np.uint8)
    visible, fused = infrared.copy(), infrared.copy()
    visible[1, 0] = 10  # four of eight pixels change by 10, and back
    fused[1, 0] = 16  # 6 more than the source
    fused[2, 1] = 3  # nothing changed there
    np.testing.assert_allclose(flicker(fused, infrared, visible), [3.0, 3.0 + 1.5])


def test_none_where_the_sources_change_as_much():
    frames = np.random.default_rng(0).integers(0, 256, (4, 6, 5), np.uint8)
    still = np.full_like(frames, 200)
    assert not flicker(frames, still, frames).any()
    assert not flicker(still, frames, still).any()
    assert flicker(frames, still, still).mean() > 50


def test_refused():
    video = np.zeros((3, 4, 4), np.uint8)
    with pytest.raises(FrameError, match=r"\(3, 4, 4\).*expected three of one shape"):
        flicker(video, video, video[:2])
    with pytest.raises(FrameError, match=r"\(T, H, W\)"):
        flicker(video[0], video[0], video[0])
    with pytest.raises(SettingError, match="got 1 frames"):
        flicker(video[:1], video[:1], video[:1])
