"""The windows' mutual information against its definition, cell by cell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fuseengine import _native


def plain(v, w):
    """2 I / (H + H) of two windows of nine values in column-major order."""
    if (v == w).all() or (np.ptp(v) == 0 and np.ptp(w) == 0):
        return 1.0
    if np.ptp(v) == 0 or np.ptp(w) == 0:
        return 0.0
    place = np.arange(1, 10)
    p, q = ((x - x.min()) / (x - x.min()).sum() for x in (v, w))
    covariance = ((v - v.mean()) * (w - w.mean())).sum()
    # Exact for whole numbers, which is where it can be 0.
    if 9 * (v * w).sum() == v.sum() * w.sum():
        return 0.0
    c = covariance / np.sqrt(((v - v.mean()) ** 2).sum() * ((w - w.mean()) ** 2).sum())
    sd = [np.sqrt(max((place**2 * x).sum() - (place * x).sum() ** 2, 0)) for x in (p, q)]
    if sd[0] < 1e-9 or sd[1] < 1e-9:
        return 0.0
    rows, columns = q.cumsum()[:, None], p.cumsum()[None, :]
    bound = np.minimum(rows, columns) if c > 0 else np.maximum(rows + columns - 1, 0)
    phi = c * sd[0] * sd[1] / (bound - rows * columns).sum()
    mass = np.diff(np.diff(np.pad(bound, ((1, 0), (1, 0))), axis=0), axis=1)
    joint = phi * mass + (1 - phi) * q[:, None] * p

    def entropy(x):
        x = x[x != 0]
        return -(x * np.log2(abs(x))).sum()

    both = entropy(p) + entropy(q)
    return 2 * (both - entropy(joint)) / both


def expected(x, f):
    height, width = x.shape[0] - 2, x.shape[1] - 2
    return np.array(
        [
            [plain(*(m[r : r + 3, c : c + 3].ravel("F") for m in (x, f))) for c in range(width)]
            for r in range(height)
        ]
    )


def native(x, f):
    out = np.full((x.shape[0] - 2, x.shape[1] - 2), np.nan)
    _native.window_information(x, f, out)
    return out


def maps(kind, shape, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "levels":
        return rng.integers(0, 256, (2, *shape)).astype(float)
    if kind == "binary":
        return rng.integers(0, 2, (2, *shape)).astype(float)
    if kind == "few levels":
        return rng.integers(0, 4, (2, *shape)).astype(float)
    if kind == "dots":
        return (rng.random((2, *shape)) < 0.1) * rng.integers(1, 9, (2, *shape)).astype(float)
    if kind == "related":
        x = rng.normal(size=shape)
        return np.stack([x, -3 * x + 0.2 * rng.normal(size=shape)])
    return rng.normal(size=(2, *shape)) * 1e3


KINDS = ["levels", "binary", "few levels", "dots", "related", "floats"]


class TestValues:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(3, 3), (3, 10), (4, 11), (5, 18), (6, 19), (9, 27)])
    def test_definition(self, kind, shape):
        """Widths around multiples of the vectors' lengths."""
        x, f = maps(kind, shape)
        np.testing.assert_allclose(native(x, f), expected(x, f), rtol=0, atol=1e-11)
        np.testing.assert_allclose(native(f, x), native(x, f), rtol=0, atol=1e-11)

    @given(arrays.arrays(np.int8, (2, 3, 4), elements=st.integers(0, 5)))
    def test_small_whole_numbers(self, pair):
        """Ties, zeros, constant and identical windows."""
        x, f = pair.astype(float)
        np.testing.assert_allclose(native(x, f), expected(x, f), rtol=0, atol=1e-11)

    def test_identical_and_constant(self):
        x, f = maps("levels", (6, 20))
        assert (native(x, x) == 1).all()
        assert (native(x, x * 0) == 0).all()
        assert (native(x * 0 + 3, x * 0) == 1).all()
        mixed = np.where(np.arange(20) < 10, x, f)
        assert (native(x, mixed)[:, :8] == 1).all() and (native(x, mixed)[:, 10:] < 1).all()

    def test_bounds(self):
        """Stretched windows: the scale and the offset do not matter."""
        x, f = maps("levels", (20, 40))
        values = native(x, f)
        assert (values > -1e-12).all() and (values < 1).all()
        np.testing.assert_allclose(native(4 * x + 8, f / 2 - 3), values, rtol=0, atol=1e-12)


class TestReproducible:
    def test_the_same_bits_on_every_instruction_set(self):
        best = _native.simd_level()
        found = {}
        try:
            for level in ("baseline", "avx2", "avx512"):
                try:
                    _native.set_simd_level(level)
                except ValueError:
                    continue
                found[level] = [native(*maps(kind, (9, 41))) for kind in KINDS]
        finally:
            _native.set_simd_level(best)
        for values in found.values():
            np.testing.assert_array_equal(values, found["baseline"])

    def test_any_number_of_threads(self):
        x, f = maps("levels", (40, 33))
        before = _native.num_threads()
        try:
            results = []
            for count in (1, 2, 5):
                _native.set_num_threads(count)
                results.append(native(x, f))
        finally:
            _native.set_num_threads(before)
        np.testing.assert_array_equal(results[1], results[0])
        np.testing.assert_array_equal(results[2], results[0])


class TestRefused:
    @pytest.mark.parametrize(
        ("x", "f", "out", "message"),
        [
            (np.zeros((4, 5), np.float32), None, None, "x: got float32.*expected aligned float64"),
            (np.zeros((4, 10))[:, ::2], None, None, "x: got .*expected C-contiguous"),
            (np.zeros((2, 5)), None, None, r"x: got float64\(2, 5\), expected shape \(H, W\), at"),
            (np.zeros((4, 2)), None, None, r"at least \(3, 3\)"),
            (np.zeros(12), None, None, r"x: got float64\(12,\), expected shape \(H, W\)"),
            (None, np.zeros((4, 6)), None, r"f: got float64\(4, 6\), expected the shape of x"),
            (None, None, np.zeros((4, 5)), "out: got .*expected two rows and two columns less"),
            (None, None, np.zeros((2, 3), np.float32), "out: got float32"),
        ],
    )
    def test_arrays(self, x, f, out, message):
        x = np.zeros((4, 5)) if x is None else x
        f = np.zeros((4, 5)) if f is None else f
        out = np.zeros((2, 3)) if out is None else out
        with pytest.raises(ValueError, match=message):
            _native.window_information(x, f, out)

    def test_read_only_and_overlapping(self):
        x, out = np.zeros((4, 5)), np.zeros((2, 3))
        out.setflags(write=False)
        with pytest.raises(ValueError, match="out: got .*expected a writeable array"):
            _native.window_information(x, x, out)
        with pytest.raises(ValueError, match="out overlaps x in memory"):
            _native.window_information(x, x.copy(), x.ravel()[:6].reshape(2, 3))
