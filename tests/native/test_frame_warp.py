"""frame_warp is frame_in of the warped picture: against these two, which have their own tests."""

from __future__ import annotations

import numpy as np
import pytest

from fuseengine import _native

TILTED = np.array([[0.8, 0.1, 2.3], [-0.1, 0.9, 1.7], [1e-3, -2e-3, 1.0]], np.float32)
SIZE, PADDED = (21, 75), (24, 80)


def frame(channels=1, dtype=np.uint8, shape=(30, 70)):
    rng = np.random.default_rng(0)
    shape = shape if channels == 1 else (*shape, 3)
    top = {np.uint8: 255, np.uint16: 65535}.get(dtype, 1.0)
    return (rng.random(shape) * top).astype(dtype)


def warped(x, coordinates, clamp):
    """The frame's channels as float32 planes, sampled by the plain warp: (C, H, W)."""
    planes = np.ascontiguousarray(np.atleast_3d(x).transpose(2, 0, 1)[None].astype(np.float32))
    out = np.empty((1, planes.shape[1], *SIZE), np.float32)
    _native.warp(planes, coordinates[None], out, clamp=clamp)
    return out[0]


def expected(x, coordinates, planes, scale, clamp, low=0.0):
    sampled = warped(x, coordinates, clamp)
    picture = np.ascontiguousarray(sampled.transpose(1, 2, 0))
    out = np.empty((planes, *PADDED), np.float32)
    _native.frame_in(picture[..., 0] if len(sampled) == 1 else picture, out, low=low, scale=scale)
    return out


def as_map():
    row, column = np.mgrid[: SIZE[0], : SIZE[1]]
    rng = np.random.default_rng(1)
    places = np.stack([column * 0.9 - 2, row * 1.4 - 1], -1) + rng.random((*SIZE, 2))
    return places.astype(np.float32)


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_as_warp_then_frame_in(dtype, planes, channels, clamp, same_bits):
    x = frame(channels, dtype)
    scale = 1.0 / {np.uint8: 255, np.uint16: 65535}.get(dtype, 1.0)
    for coordinates in (TILTED, as_map()):
        out = np.full((planes, *PADDED), np.nan, np.float32)

        def run(out, coordinates=coordinates):
            return _native.frame_warp(x, coordinates, out, size=SIZE, scale=scale, clamp=clamp)

        same_bits(run, out)
        assert run(out)
        # Rounding differs only where a map is fused differently by the compiler.
        np.testing.assert_allclose(
            out, expected(x, coordinates, planes, scale, clamp), rtol=0, atol=2e-6
        )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_table_says_what_a_count_means(dtype):
    x = frame(dtype=dtype)
    table = np.random.default_rng(2).random(1 << (8 * x.itemsize)).astype(np.float32)
    out = np.empty((1, *PADDED), np.float32)
    _native.frame_warp(x, TILTED, out, size=SIZE, low=0.1, scale=1.25, table=table)
    np.testing.assert_allclose(
        out, expected(table[x], TILTED, 1, 1.25, False, low=0.1), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_the_sampled_frame_can_be_kept(channels):
    x, out = frame(channels), np.empty((1, *PADDED), np.float32)
    kept = np.full((*SIZE, 3) if channels == 3 else SIZE, 77, np.uint8)
    _native.frame_warp(x, TILTED, out, size=SIZE, scale=1 / 255, kept=kept)
    sampled = warped(x, TILTED, False).transpose(1, 2, 0).reshape(kept.shape)
    assert np.abs(kept - np.rint(sampled)).max() <= 1  # ties
    assert (kept == np.rint(sampled)).mean() > 0.999


def test_identity_is_frame_in():
    x = frame(3, shape=SIZE)
    out, same = np.empty((2, 1, *PADDED), np.float32)
    _native.frame_warp(x, np.eye(3, dtype=np.float32), out, size=SIZE, scale=1 / 255)
    _native.frame_in(x, same, scale=1 / 255)
    np.testing.assert_allclose(out, same, atol=1e-7)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_frames_of_one_row_or_column(shape):
    x, out = np.full(shape, 200, np.uint8), np.empty((1, 4, 4), np.float32)
    _native.frame_warp(x, np.eye(3, dtype=np.float32), out, size=(4, 4), scale=1 / 255, clamp=True)
    np.testing.assert_allclose(out, 200 / 255, atol=1e-6)


def test_what_is_not_finite_is_told():
    x, out = frame(dtype=np.float32), np.empty((1, *PADDED), np.float32)
    x[10, 10] = np.nan
    assert not _native.frame_warp(x, np.eye(3, dtype=np.float32), out, size=SIZE, scale=1.0)
    assert np.isfinite(out).all()


def test_refusals():
    x, out = frame(), np.empty((1, *PADDED), np.float32)
    eye = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="out: .*at least the result's height"):
        _native.frame_warp(x, eye, out, size=(25, 75), scale=1.0)
    with pytest.raises(ValueError, match=r"coordinates: .*\(3, 3\), or \(H, W, 2\)"):
        _native.frame_warp(x, np.zeros((21, 74, 2), np.float32), out, size=SIZE, scale=1.0)
    with pytest.raises(ValueError, match="table: .*256 or 65536 numbers"):
        _native.frame_warp(x, eye, out, size=SIZE, scale=1.0, table=np.zeros(65536, np.float32))
    with pytest.raises(ValueError, match="kept: .*channels and type of src"):
        _native.frame_warp(x, eye, out, size=SIZE, scale=1.0, kept=np.zeros((*SIZE, 3), np.uint8))
    with pytest.raises(ValueError, match="src: .*C_CONTIGUOUS|src: .*contiguous"):
        _native.frame_warp(x[:, :50], eye, out, size=SIZE, scale=1.0)
