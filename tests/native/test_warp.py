"""The native warp against a float64 sum over four pixels, and its refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseengine import _native

TILTED = np.array([[0.9, 0.15, 1.3], [-0.1, 1.05, -0.7], [4e-3, -7e-3, 1.0]])


def poisoned(shape):
    return np.full(shape, np.nan, np.float32)


def reference(x, places, clamp):
    """Float64: x (N, C, h, w), places (N, H, W, 2)."""
    h, w = x.shape[2:]
    u, v = places[..., 0].astype(np.float64), places[..., 1].astype(np.float64)
    if clamp:
        u, v = np.clip(u, 0, w - 1), np.clip(v, 0, h - 1)
    out = np.zeros((*x.shape[:2], *places.shape[1:3]))
    for n in range(len(x)):
        for dy in (0, 1):
            for dx in (0, 1):
                i, j = np.floor(v[n]) + dy, np.floor(u[n]) + dx
                weight = (1 - np.abs(v[n] - i)) * (1 - np.abs(u[n] - j))
                known = (i >= 0) & (i < h) & (j >= 0) & (j < w)
                rows, columns = (np.where(known, k, 0).astype(int) for k in (i, j))
                out[n] += np.where(known, weight * x[n][:, rows, columns], 0)
    return out


def places_of(matrix, size):
    row, column = np.mgrid[: size[0], : size[1]].astype(np.float64)
    points = np.stack([column, row, np.ones_like(row)], -1) @ matrix.astype(np.float64).T
    return points[..., :2] / points[..., 2:]


class TestValues:
    @pytest.mark.parametrize("clamp", [False, True])
    @pytest.mark.parametrize(
        ("shape", "size"),
        [
            ((1, 1, 1, 1), (3, 4)),
            ((2, 2, 1, 9), (5, 70)),
            ((2, 1, 9, 1), (7, 65)),
            ((1, 3, 17, 33), (20, 129)),
            ((3, 1, 40, 20), (1, 1)),
        ],
    )
    def test_maps_and_homographies(self, shape, size, clamp):
        rng = np.random.default_rng(0)
        x = rng.random(shape, dtype=np.float32)
        reach = (shape[3] + 4, shape[2] + 4)
        for count in {1, shape[0]}:
            places = (rng.random((count, *size, 2)) * reach - 2).astype(np.float32)
            out = poisoned((*shape[:2], *size))
            _native.warp(x, places, out, clamp=clamp)
            all_places = np.broadcast_to(places, (shape[0], *size, 2))
            expected = reference(x, all_places, clamp)
            np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)
            matrices = (TILTED + 0.02 * rng.random((count, 3, 3))).astype(np.float32)
            _native.warp(x, matrices, out, clamp=clamp)
            all_places = [places_of(m, size) for m in matrices]
            all_places = np.broadcast_to(all_places, (shape[0], *size, 2))
            # Places are float32, and as wrong as their size allows.
            atol = 4e-7 * max(4, np.abs(all_places).max())
            np.testing.assert_allclose(out, reference(x, all_places, clamp), rtol=0, atol=atol)

    @given(
        st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 2), min_size=1, max_size=70),
        st.integers(1, 4),
        st.integers(1, 4),
        st.booleans(),
    )
    def test_any_places(self, places, h, w, clamp):
        x = np.random.default_rng(h * w).random((1, 1, h, w), dtype=np.float32)
        given_places = np.array(places, np.float32).reshape(1, 1, -1, 2)
        out = poisoned((1, 1, 1, len(places)))
        _native.warp(x, given_places, out, clamp=clamp)
        np.testing.assert_allclose(out, reference(x, given_places, clamp), rtol=0, atol=1e-6)

    def test_integer_places_are_exact(self):
        x = np.random.default_rng(0).random((1, 2, 9, 130), dtype=np.float32)
        out = poisoned(x.shape)
        _native.warp(x, np.eye(3, dtype=np.float32)[None], out)
        np.testing.assert_array_equal(out, x)
        flip = np.array([[[-1, 0, 129], [0, -1, 8], [0, 0, 1]]], np.float32)
        _native.warp(x, flip, out)
        np.testing.assert_array_equal(out, x[..., ::-1, ::-1])

    def test_no_places(self):
        numbers = [np.nan, np.inf, -np.inf, 3e38, -3e38]
        places = np.array([[a, b] for a in numbers for b in numbers], np.float32)[None, None]
        x = 1 + np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3)
        out = poisoned((1, 1, 1, 25))
        _native.warp(x, places, out)
        np.testing.assert_array_equal(out, 0)
        _native.warp(x, places, out, clamp=True)
        columns, rows = [0, 2, 0, 2, 0], [0, 1, 0, 1, 0]
        expected = [x[0, 0, r, c] for c in columns for r in rows]
        np.testing.assert_array_equal(out[0, 0, 0], expected)

    def test_threads(self, same_bits):
        x = np.random.default_rng(0).random((2, 3, 100, 120), dtype=np.float32)
        matrix = TILTED[None].astype(np.float32)
        same_bits(lambda out: _native.warp(x, matrix, out), poisoned((2, 3, 130, 140)))

    def test_nothing_to_do(self):
        _native.warp(
            poisoned((0, 1, 4, 5)), np.eye(3, dtype=np.float32)[None], poisoned((0, 1, 2, 2))
        )
        _native.warp(
            poisoned((1, 1, 4, 5)), np.eye(3, dtype=np.float32)[None], poisoned((1, 1, 0, 2))
        )


def test_refuses():
    x, eye, out = poisoned((2, 1, 4, 5)), np.eye(3, dtype=np.float32)[None], poisoned((2, 1, 6, 7))
    for bad in (x[0], x[:, :, :0], x.astype(np.float64), x[..., ::2]):
        with pytest.raises(ValueError, match="x: got"):
            _native.warp(bad, eye, out)
    for shape in ((3, 3), (3, 3, 3), (1, 3, 2), (1, 6, 8, 2), (3, 6, 7, 2), (1, 6, 7, 3)):
        with pytest.raises(ValueError, match=r"coordinates: got .*expected \(1, 3, 3\)"):
            _native.warp(x, poisoned(shape), out)
    with pytest.raises(ValueError, match="coordinates: got float64"):
        _native.warp(x, eye.astype(np.float64), out)
    for bad_out in (out[:1], out[0], out.astype(np.float64), out[..., ::2]):
        with pytest.raises(ValueError, match="out: got"):
            _native.warp(x, eye, bad_out)
    with pytest.raises(ValueError, match="out overlaps x"):
        _native.warp(x, eye, x)
    places = poisoned((1, 4, 5, 2))
    with pytest.raises(ValueError, match="out overlaps coordinates"):
        _native.warp(x, places, places.reshape(2, 1, 4, 5))
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        _native.warp(x, eye, out)
