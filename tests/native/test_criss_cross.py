"""Criss-cross attention against its equation in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseengine import _native

# (N, Cq, C, H, W): one pixel, one row, one column, primes, more than one block of keys (64), tile
# of queries (32) and block of columns (16).
SHAPES = [
    (1, 4, 8, 1, 1),
    (1, 2, 9, 1, 70),
    (1, 1, 1, 67, 1),
    (2, 3, 5, 7, 9),
    (3, 4, 32, 16, 32),
    (1, 8, 17, 131, 33),
    (1, 5, 3, 33, 130),
]


def arrays(n, cq, c, h, w, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(0, scale, (n, cq, h, w)).astype(np.float32) for _ in range(2))
    return q, k, rng.standard_normal((n, c, h, w)).astype(np.float32)


def reference(q, k, v):
    """CCNet's equation: the column leaves the pixel itself out, the row has it. Largest |score|."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    h, w = q.shape[2:]
    row = np.einsum("ncyx,ncyj->nyxj", q, k)
    column = np.einsum("ncyx,ncjx->nyxj", q, k)
    column[:, np.arange(h), :, np.arange(h)] = -np.inf
    scores = np.concatenate([row, column], -1)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("nyxj,ncyj->ncyx", p[..., :w], v)
    return out + np.einsum("nyxj,ncjx->ncyx", p[..., w:], v), np.abs(row).max()


def run(q, k, v):
    out = np.full_like(v, np.nan)
    _native.criss_cross_attention(q, k, v, out)
    return out


def assert_attends(q, k, v):
    # A score of size s is known to a few s * 2^-24 in float32, and so is its weight's logarithm.
    expected, largest = reference(q, k, v)
    tolerance = 2.0**-24 * (16 + 4 * largest) * np.abs(v).max()
    np.testing.assert_allclose(run(q, k, v), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_values(level, shape):
    assert_attends(*arrays(*shape))


@given(st.integers(1, 2), *[st.integers(1, 10)] * 2, *[st.integers(1, 40)] * 2)
def test_any_shape(n, cq, c, h, w):
    assert_attends(*arrays(n, cq, c, h, w, seed=h * w))


@pytest.mark.parametrize("scale", [0.0, 5.0, 40.0])
def test_scores_of_any_size(level, scale):
    """All equal (a mean), sharp, and thousands: the maximum is taken off before the exponential."""
    assert_attends(*arrays(1, 4, 6, 35, 81, scale))


def test_the_pixel_counts_once():
    """With equal scores out is the mean over H + W - 1 pixels."""
    q, k, v = arrays(1, 4, 4, 5, 7, 0.0)
    v[:] = 0
    v[0, :, 2, 3] = 11
    out = run(q, k, v)
    cross = np.zeros((5, 7))
    cross[2], cross[:, 3] = 1, 1
    np.testing.assert_allclose(out[0], np.broadcast_to(cross, (4, 5, 7)), rtol=1e-6)


def test_a_peak_far_above_the_rest_of_the_row_in_the_column():
    """The running maximum of the column survives the row, and the other way round."""
    for axis in (0, 1):
        q, k, v = arrays(1, 1, 3, 70, 75)
        q[:], k[:] = 1, 0
        at = (60, 3) if axis == 0 else (3, 60)
        k[0, 0][at] = 80
        out = run(q, k, v)
        cross = out[0][:, :, at[1]] if axis == 0 else out[0][:, at[0]]
        expected = np.broadcast_to(v[0][:, at[0], at[1], None], cross.shape)
        np.testing.assert_allclose(cross, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("which", "value"), [(0, np.nan), (1, np.nan), (2, np.nan), (0, np.inf), (1, np.inf)]
)
def test_nan_spreads_as_in_the_equation(level, which, value):
    inputs = arrays(1, 2, 9, 18, 37)
    inputs[which][0, 1, 5, 20] = value
    with np.errstate(invalid="ignore"):
        expected, _ = reference(*inputs)
    np.testing.assert_array_equal(np.isnan(run(*inputs)), np.isnan(expected))


def test_an_infinite_value_reaches_its_cross(level):
    q, k, v = arrays(1, 2, 9, 18, 37)
    v[0, 1, 5, 20] = np.inf
    cross = np.zeros(v.shape, bool)
    cross[0, 1, 5], cross[0, 1, :, 20] = True, True
    np.testing.assert_array_equal(~np.isfinite(run(q, k, v)), cross)


def test_threads_give_the_same_bits(level, same_bits):
    q, k, v = arrays(2, 4, 9, 45, 83)
    same_bits(lambda out: _native.criss_cross_attention(q, k, v, out), np.full_like(v, np.nan))


def test_nothing_beside_out_is_written():
    q, k, v = arrays(1, 3, 5, 17, 19)
    whole = np.full(v.size + 64, 42, np.float32)
    out = whole[32:-32].reshape(v.shape)
    kept = [a.copy() for a in (q, k, v)]
    _native.criss_cross_attention(q, k, v, out)
    np.testing.assert_array_equal(out, run(q, k, v))
    assert (whole[:32] == 42).all() and (whole[-32:] == 42).all()
    for a, b in zip((q, k, v), kept, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(0, 4, 8, 5, 6), (1, 4, 0, 5, 6), (1, 4, 8, 0, 6)])
def test_nothing_to_do(shape):
    q, k, v = arrays(*shape)
    assert run(q, k, v).shape == v.shape


def test_no_channels_to_compare_is_a_mean():
    q, k, v = arrays(1, 0, 3, 4, 5)
    expected = v.astype(np.float64).sum(2, keepdims=True) + v.sum(3, keepdims=True) - v
    np.testing.assert_allclose(run(q, k, v), expected / 8, rtol=0, atol=1e-6)


def test_memory(extra_memory):
    """Below a quarter of the output: two numbers per pixel and one block of columns."""
    setup = """
q, k = np.ones((2, 1, 4, 240, 320), np.float32)
v, out = np.ones((2, 1, 64, 240, 320), np.float32)
small = [np.ascontiguousarray(a[..., :8, :8]) for a in (q, k, v, out)]
_native.criss_cross_attention(*small)"""
    extra = extra_memory(setup, "_native.criss_cross_attention(q, k, v, out)")
    assert 0 < extra < 64 * 240 * 320 * 4 / 4


class TestRefuses:
    def call(self, *given_arrays):
        _native.criss_cross_attention(*given_arrays)

    def test_shapes_and_dtypes(self):
        q, k, v = arrays(1, 4, 8, 6, 10)
        out = np.empty_like(v)
        good = [q, k, v, out]
        self.call(*good)
        for i, name in enumerate(["q", "k", "v", "out"]):
            for bad in (
                good[i].astype(np.float64),
                np.concatenate([good[i]] * 2, 3)[..., ::2],
                good[i][0],
                np.ascontiguousarray(good[i][:, :, :-1]),
                np.ascontiguousarray(good[i][..., :-1]),
                np.concatenate([good[i]] * 2),
            ):
                with pytest.raises(ValueError, match=r"(?:q|k|v|out): got .*expected"):
                    self.call(*[bad if j == i else a for j, a in enumerate(good)])
            with pytest.raises(ValueError, match=f"{name}: got float64"):
                self.call(*[a.astype(np.float64) if j == i else a for j, a in enumerate(good)])
        with pytest.raises(ValueError, match=r"k: got float32\(1, 3, 6, 10\), expected the shape"):
            self.call(q, np.ascontiguousarray(k[:, :3]), v, out)
        with pytest.raises(ValueError, match=r"out: got .*expected the shape of v"):
            self.call(q, k, v, np.empty_like(q))

    def test_memory(self):
        q, k, v = arrays(1, 8, 8, 6, 10)
        for i, name in enumerate("qkv"):
            with pytest.raises(ValueError, match=f"out overlaps {name}"):
                self.call(q, k, v, [q, k, v][i])
        out = np.empty_like(v)
        out.flags.writeable = False
        with pytest.raises(ValueError, match="writeable"):
            self.call(q, k, v, out)
        with pytest.raises(TypeError):
            self.call(q.tolist(), k, v, np.empty_like(v))


def test_level_names():
    best = None
    for name in ("baseline", "avx2", "avx512"):
        try:
            _native.set_simd_level(name)
        except ValueError as error:
            assert best is not None, error
            continue
        best = name
        assert _native.simd_level() == name
    with pytest.raises(ValueError, match=f"level: got 'sse9', expected .* at most '{best}'"):
        _native.set_simd_level("sse9")
