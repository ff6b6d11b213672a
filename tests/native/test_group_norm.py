"""GroupNorm, shift and SiLU against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseengine import _native

EPS = 1e-5
# (N, C, H, W), groups: one number per group, primes, more than a block of 4096, whole channels.
CASES = [
    ((1, 1, 1, 1), 1),
    ((2, 4, 1, 1), 2),
    ((1, 6, 3, 5), 3),
    ((3, 8, 17, 13), 1),
    ((1, 2, 67, 131), 2),
    ((2, 32, 16, 33), 8),
    ((1, 4, 1, 4097), 2),
]


def arrays(shape, seed=0, mean=0.0, sigma=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(mean, sigma, shape).astype(np.float32)
    weight, bias = rng.standard_normal((2, shape[1])).astype(np.float32)
    return x, weight, bias


def reference(x, weight, bias, shift, groups, silu=True, eps=EPS):
    n = x.shape[0]
    v = x.astype(np.float64).reshape(n, groups, -1)
    v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + eps)
    y = v.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    if shift is not None:
        y = y + shift[:, :, None, None]
    with np.errstate(over="ignore"):
        return y / (1 + np.exp(-y)) if silu else y


def run(x, weight, bias, shift, groups, silu=True, eps=EPS, out=None):
    out = np.full_like(x, np.nan) if out is None else out
    _native.group_norm_silu(x, weight, bias, shift, out, groups=groups, eps=eps, silu=silu)
    return out


def assert_norm(x, weight, bias, shift, groups, silu=True):
    # A handful of roundings of numbers of the size of the result or of its terms.
    expected = reference(x, weight, bias, shift, groups, silu)
    plain = np.abs(reference(x, weight, bias, shift, groups, False)).max()
    tolerance = 2.0**-24 * 8 * (1 + plain + np.abs(bias).max())
    got = run(x, weight, bias, shift, groups, silu)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("shape", "groups"), CASES)
@pytest.mark.parametrize("silu", [True, False])
def test_values(level, shape, groups, silu):
    x, weight, bias = arrays(shape)
    rng = np.random.default_rng(1)
    for rows in (None, 1, shape[0]):
        shift = None if rows is None else rng.standard_normal((rows, shape[1])).astype(np.float32)
        assert_norm(x, weight, bias, shift, groups, silu)


@given(*[st.integers(1, 3)] * 3, *[st.integers(1, 40)] * 2)
def test_any_shape(n, groups, per_group, h, w):
    x, weight, bias = arrays((n, groups * per_group, h, w), seed=h + w)
    assert_norm(x, weight, bias, weight[None], groups)


@pytest.mark.parametrize("dead", [0, 1])
def test_raw_thermal_counts(level, dead):
    """Mean 30,000, sigma 20, with and without a dead pixel in every block; float32 knows such x to
    2^-10, which is exact here, so that all of the error is ours."""
    x, weight, bias = arrays((1, 4, 120, 160), mean=30000, sigma=20)
    if dead:
        x.reshape(-1)[::4096] = 0
    expected = reference(x, weight, bias, None, 2)
    largest = np.abs(reference(x, weight, bias, None, 2, False)).max()
    got = run(x, weight, bias, None, 2)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * max(1, largest))


def test_mean_far_beyond_the_spread(level):
    """Even the mean of a block is then off by the spread; its variance must not be."""
    x, weight, bias = arrays((1, 4, 64, 192), mean=8e6, sigma=2)
    expected = reference(x, weight, bias, None, 2)
    np.testing.assert_allclose(run(x, weight, bias, None, 2), expected, rtol=0, atol=1e-5)


def test_constant_picture_is_the_bias(level):
    x, weight, bias = arrays((1, 4, 31, 67))
    x[:] = 1e6 / 3
    expected = np.broadcast_to(bias[:, None, None], x.shape[1:])
    np.testing.assert_array_equal(run(x, weight, bias, None, 2, silu=False)[0], expected)


def test_silu_from_end_to_end(level):
    """The exponential over its whole range, by a norm that only adds the bias. 4 ulp; where e^-y is
    beyond float32 the result is 0."""
    y = np.concatenate([np.linspace(-120, 120, 4801), [-1e4, 1e4, -3e38, 3e38, 0.0, -0.0]])
    bias = y.astype(np.float32)
    x = np.zeros((1, bias.size, 1, 1), np.float32)
    got = run(x, np.ones_like(bias), bias, None, bias.size)[0, :, 0, 0].astype(np.float64)
    with np.errstate(over="ignore"):
        expected = bias / (1 + np.exp(-bias.astype(np.float64)))
    normal = bias > -87
    np.testing.assert_allclose(got[normal], expected[normal], rtol=2.4e-7, atol=0)
    np.testing.assert_allclose(got[~normal], 0, rtol=0, atol=2e-36)


def test_not_finite_stays_in_its_group(level):
    for value in (np.nan, np.inf, -np.inf):
        x, weight, bias = arrays((2, 6, 9, 50))
        x[1, 3, 4, 5] = value
        bad = np.zeros(x.shape, bool)
        bad[1, 2:4] = True
        np.testing.assert_array_equal(np.isnan(run(x, weight, bias, None, 3)), bad)
    x, weight, bias = arrays((2, 6, 9, 50))
    weight[1] = np.nan
    assert np.isnan(run(x, weight, bias, None, 3)).sum() == 2 * 450


def test_threads_give_the_same_bits(level, same_bits):
    x, weight, bias = arrays((2, 8, 101, 203), mean=3)
    same_bits(lambda out: run(x, weight, bias, bias[None], 2, out=out), np.full_like(x, np.nan))


def test_in_place_and_nothing_beside():
    x, weight, bias = arrays((2, 6, 9, 37))
    expected = run(x, weight, bias, None, 3)
    whole = np.full(x.size + 32, 42, np.float32)
    view = whole[16:-16].reshape(x.shape)
    view[:] = x
    run(view, weight, bias, None, 3, out=view)
    np.testing.assert_array_equal(view, expected)
    assert (whole[:16] == 42).all() and (whole[-16:] == 42).all()


def test_nothing_to_do():
    for shape in [(0, 4, 3, 3), (1, 4, 0, 3)]:
        x, weight, bias = arrays(shape)
        assert run(x, weight, bias, None, 2).shape == shape


def test_refuses():
    x, weight, bias = arrays((2, 6, 4, 5))
    shift = np.zeros((2, 6), np.float32)
    out = np.empty_like(x)

    def call(x=x, weight=weight, bias=bias, shift=shift, out=out, groups=3, eps=EPS):
        _native.group_norm_silu(x, weight, bias, shift, out, groups=groups, eps=eps)

    call()
    for name, good in [
        ("x", x),
        ("weight", weight),
        ("bias", bias),
        ("shift", shift),
        ("out", out),
    ]:
        with pytest.raises(ValueError, match=f"{name}: got float64"):
            call(**{name: good.astype(np.float64)})
        with pytest.raises(ValueError, match=f"{name}: got .*C-contiguous"):
            call(**{name: np.repeat(good, 2, -1)[..., ::2]})
        with pytest.raises(ValueError, match=f"(?:{name}|weight|bias|out|shift): got .*expected"):
            call(**{name: np.ascontiguousarray(good[..., :-1])})
    for name in ("weight", "bias"):
        with pytest.raises(ValueError, match=rf"{name}: got float32\(5,\), expected \(6,\)"):
            call(**{name: weight[:5].copy()})
    for bad in (np.zeros((3, 6), np.float32), np.zeros(6, np.float32)):
        with pytest.raises(ValueError, match=r"shift: got .*expected \(N, C\) or \(1, C\)"):
            call(shift=bad)
    with pytest.raises(TypeError, match="shift: got .*list.*expected an array or None"):
        call(shift=[0.0] * 6)
    for groups in (0, -1, 4):
        with pytest.raises(ValueError, match=f"groups: got {groups}, expected a divisor"):
            call(groups=groups)
    for eps in (-1.0, np.nan):
        with pytest.raises(ValueError, match="eps: got"):
            call(eps=eps)
    whole = np.empty((3, 6, 4, 5), np.float32)
    with pytest.raises(ValueError, match="out overlaps x"):
        call(x=whole[:2], out=whole[1:])
    with pytest.raises(ValueError, match="out overlaps weight"):
        call(weight=out.reshape(-1)[:6])
    locked = np.empty_like(x)
    locked.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        call(out=locked)


def test_memory(extra_memory):
    """Three float64 per 4096 numbers; a temporary of the picture's size would be 10 MB."""
    setup = """
x, out = np.ones((2, 1, 32, 240, 320), np.float32)
one = np.ones(32, np.float32)
f = lambda x, out: _native.group_norm_silu(x, one, one, None, out, groups=8, eps=1e-5)
small = [np.ascontiguousarray(a[..., :8, :8]) for a in (x, out)]
f(*small)"""
    assert extra_memory(setup, "f(x, out)") < 1_000_000
