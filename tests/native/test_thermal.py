"""Histograms, tables, CLAHE and column offsets against NumPy, and their refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseengine import _native

DTYPES = (np.uint8, np.uint16)


def frame(shape=(37, 53), dtype=np.uint16, seed=0):
    rng = np.random.default_rng(seed)
    x = (
        20_000 + 300 * rng.standard_normal(shape)
        if dtype == np.uint16
        else rng.integers(0, 256, shape)
    )
    return x.astype(dtype)


def strided(x):
    """The same numbers in rows that are further apart than they are long."""
    wide = np.zeros((x.shape[0], x.shape[1] + 5), x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def counts_of(dtype):
    return 1 << (8 * np.dtype(dtype).itemsize)


@pytest.mark.parametrize("dtype", DTYPES)
class TestTables:
    def test_histogram(self, dtype, same_bits):
        x = strided(frame((700, 90), dtype))
        expected = np.bincount(x.ravel(), minlength=counts_of(dtype))
        out = np.full(counts_of(dtype), 77, np.uint32)
        same_bits(lambda out: _native.histogram(x, out), out)
        _native.histogram(x, out)
        np.testing.assert_array_equal(out, expected)

    @pytest.mark.parametrize("result", [np.uint8, np.uint16, np.float32])
    def test_look_up(self, dtype, result):
        x, table = strided(frame(dtype=dtype)), np.arange(counts_of(dtype))[::-1].astype(result)
        out = np.full(x.shape, 77, result)
        _native.look_up(x, table, out)
        np.testing.assert_array_equal(out, table[x])

    def test_look_up_in_place(self, dtype):
        x = frame(dtype=dtype)
        table = np.arange(counts_of(dtype))[::-1].astype(dtype)
        expected = table[x]
        _native.look_up(x, table, x)
        np.testing.assert_array_equal(x, expected)


def clahe(x, bins, tiles, count, limit):
    """Float64, pixel by pixel."""
    height, width = x.shape
    tables = np.empty((*tiles, count))
    for i in range(tiles[0]):
        for j in range(tiles[1]):
            rows = slice(i * height // tiles[0], (i + 1) * height // tiles[0])
            columns = slice(j * width // tiles[1], (j + 1) * width // tiles[1])
            part = bins[x[rows, columns]]
            found = np.bincount(part.ravel(), minlength=count).astype(float)
            most = limit * part.size / count
            spread = np.maximum(found - most, 0).sum() / count
            found = np.minimum(found, most) + spread
            tables[i, j] = (np.cumsum(found) - found / 2) / part.size
    out = np.empty(x.shape)

    def between(i, size, n):
        at = np.clip((i + 0.5) * n / size - 0.5, 0, n - 1)
        first = int(at)
        return first, min(first + 1, n - 1), at - first

    for y in range(height):
        t, b, v = between(y, height, tiles[0])
        for i in range(width):
            left, right, u = between(i, width, tiles[1])
            k = bins[x[y, i]]
            above = tables[t, left, k] * (1 - u) + tables[t, right, k] * u
            below = tables[b, left, k] * (1 - u) + tables[b, right, k] * u
            out[y, i] = above * (1 - v) + below * v
    return out


class TestLocalEqualisation:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("tiles", "limit"), [((1, 1), 1e9), ((3, 4), 2.0), ((37, 53), 1.0)])
    def test_as_defined(self, dtype, tiles, limit, same_bits):
        x = strided(frame(dtype=dtype))
        low = int(x.min())
        bins = np.clip((np.arange(counts_of(dtype)) - low) // 8, 0, 63).astype(np.uint16)
        out = np.full(x.shape, np.nan, np.float32)

        def run(out):
            _native.equalise_locally(x, bins, out, tiles=tiles, count=64, limit=limit)

        same_bits(run, out)
        run(out)
        np.testing.assert_allclose(out, clahe(x, bins, tiles, 64, limit), atol=2e-6)

    def test_one_tile_without_a_limit_is_plain_equalisation(self):
        x = frame((64, 64), np.uint8)
        out = np.empty(x.shape, np.float32)
        bins = np.arange(256, dtype=np.uint16)
        _native.equalise_locally(x, bins, out, tiles=(1, 1), count=256, limit=1e9)
        found = np.bincount(x.ravel(), minlength=256)
        np.testing.assert_allclose(out, ((np.cumsum(found) - found / 2) / x.size)[x], atol=1e-6)


def offsets_of(x, radius, most):
    padded = x.astype(float)
    around = np.empty_like(padded)
    for i in range(x.shape[1]):
        around[:, i] = padded[:, max(0, i - radius) : i + radius + 1].mean(1)
    return np.clip(padded - around, -most, most).mean(0)


class TestColumns:
    @given(
        st.integers(1, 70),
        st.integers(1, 40),
        st.integers(1, 50),
        st.sampled_from(DTYPES),
        st.sampled_from([5.0, 1e9]),
    )
    def test_offsets(self, height, width, radius, dtype, most):
        x = frame((height, width), dtype, seed=height)
        out = np.full(width, np.nan)
        _native.column_offsets(x, out, radius=radius, most=most)
        np.testing.assert_allclose(out, offsets_of(x, radius, most), atol=1e-8)

    def test_threads_do_not_matter(self, same_bits):
        x = frame((333, 64))
        same_bits(
            lambda out: _native.column_offsets(x, out, radius=4, most=50.0),
            np.full(64, np.nan),
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_subtraction_rounds_and_clips(self, dtype):
        top = counts_of(dtype) - 1
        x = np.array([[0, 10, top], [5, 11, top - 1]], dtype)
        offsets = np.array([1.0, 0.4, -3.0], np.float32)
        _native.subtract_columns(x, offsets, x)
        np.testing.assert_array_equal(x, np.array([[0, 10, top], [4, 11, top]], dtype))


class TestRefusals:
    def test_everything_that_does_not_fit(self):
        x, table = frame(), np.zeros(65536, np.float32)
        out = np.empty(x.shape, np.float32)
        with pytest.raises(ValueError, match="x: got float32.*expected uint8 or uint16"):
            _native.histogram(out, np.zeros(256, np.uint32))
        with pytest.raises(
            ValueError, match=r"counts: got uint32\(256,\), expected shape \(65536,\)"
        ):
            _native.histogram(x, np.zeros(256, np.uint32))
        with pytest.raises(ValueError, match="table: got float32.*expected the type of out"):
            _native.look_up(x, table, x)
        with pytest.raises(ValueError, match="out: got .* expected the shape of x"):
            _native.look_up(x, table, out[1:])
        with pytest.raises(ValueError, match="expected 1 to H by 1 to W tiles"):
            _native.equalise_locally(
                x, np.zeros(65536, np.uint16), out, tiles=(0, 1), count=8, limit=2.0
            )
        with pytest.raises(ValueError, match="bins: .*expected numbers below 8"):
            _native.equalise_locally(
                x, np.full(65536, 8, np.uint16), out, tiles=(1, 1), count=8, limit=2.0
            )
        with pytest.raises(ValueError, match="expected a radius of at least 1"):
            _native.column_offsets(x, np.zeros(53), radius=0, most=1.0)
        with pytest.raises(ValueError, match="adjacent pixels"):
            _native.histogram(x[:, ::2], np.zeros(65536, np.uint32))
