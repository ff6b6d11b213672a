"""Padding, cropping and stretching of pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuseengine.models.pictures import crop_like, pad_picture, stretch


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 8, 16]))
def test_reflection_is_numpys(height, width, multiple):
    """Also where the picture is smaller than what is added."""
    x = torch.arange(2.0 * height * width).reshape(1, 2, height, width)
    padded = pad_picture(x, 2, multiple, "reflect")
    below, right = -height % multiple, -width % multiple
    # NumPy reflects a line of one pixel as that pixel, like we do.
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (0, below), (0, right)), mode="reflect")
    assert np.array_equal(padded.numpy(), expected)
    assert torch.equal(crop_like(padded, x), x)


def test_white():
    x = torch.zeros(1, 1, 3, 8)
    padded = pad_picture(x, 1, 4, "white")
    assert padded.shape == (1, 1, 4, 8) and (padded[:, :, 3:] == 1).all()
    assert (padded[:, :, :3] == 0).all()


def test_planes_are_repeated():
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(pad_picture(x, 3, 4, "reflect"), x.repeat(1, 3, 1, 1))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 5)])
def test_stretch(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = stretch(x)
    if x[0, 0].numel() > 1:
        assert (y.amin((2, 3)) == 0).all() and (y.amax((2, 3)) == 1).all()
        scale = x.amax((2, 3), keepdim=True) - x.amin((2, 3), keepdim=True)
        torch.testing.assert_close(y * scale + x.amin((2, 3), keepdim=True), x)
    else:
        assert (y == 0).all()  # a flat channel has nothing to stretch
