"""Filters on the half spectrum against NumPy's transforms in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseengine import _native

# One pixel, row, column; powers of two; every radix (2, 3, 4, 5, odd ones up to 61); primes above
# 61 and their multiples (Bluestein); odd and even; parts of a vector and of a pair of vectors.
SIZES = [
    (1, 1), (1, 2), (2, 1), (1, 7), (7, 1), (3, 5), (16, 16), (32, 30), (33, 64), (61, 67),
    (67, 61), (127, 134), (1, 257), (257, 1), (48, 80), (63, 111), (96, 101), (35, 77),
    (59, 53), (40, 36),
]  # fmt: skip


def arrays(b, h, w, kind="complex64", seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((b, h, w)).astype(np.float32)
    spectrum = rng.standard_normal((2, h, w // 2 + 1)).astype(np.float32)
    if kind == "float32":
        return x, spectrum[0]
    return x, spectrum[0] + np.complex64(1j) * spectrum[1]


def reference(x, spectrum):
    return np.fft.irfft2(np.fft.rfft2(x.astype(np.float64)) * spectrum, s=x.shape[-2:])


def run(x, spectrum):
    out = np.full_like(x, np.nan)
    _native.wiener_filter(x, spectrum, out)
    return out


def assert_filters(x, spectrum):
    # Both transforms are unitary up to scale: errors of some roundings per stage, a dozen stages
    # (Bluestein: three times as many), spread over all pixels, so relative to the mean square.
    expected = reference(x, spectrum)
    error = run(x, spectrum) - expected
    gain = np.abs(spectrum).max() * np.sqrt(np.mean(x.astype(np.float64) ** 2))
    assert np.sqrt(np.mean(error**2)) <= 3e-7 * gain
    assert np.abs(error).max() <= 2e-6 * gain


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["complex64", "float32"])
def test_values(level, size, kind):
    """Random half spectra: not the transform of any kernel in the first and last column."""
    for pictures in (1, 2, 3):
        assert_filters(*arrays(pictures, *size, kind))


@given(st.integers(1, 90), st.integers(1, 90), st.booleans())
def test_any_size(h, w, real):
    assert_filters(*arrays(1, h, w, "float32" if real else "complex64", seed=h * w))


@pytest.mark.parametrize("n", [480, 640, 1021, 1024, 1080, 2 * 997])
def test_long_lines(n):
    assert_filters(*arrays(1, n, 3))
    assert_filters(*arrays(1, 3, n))


def test_identity_and_shift():
    """G = 1 gives x back; a phase turns the picture by whole pixels."""
    x, _ = arrays(2, 60, 85)
    np.testing.assert_allclose(run(x, np.ones((60, 43), np.float32)), x, rtol=0, atol=2e-6)
    phase = np.exp(
        -2j * np.pi * (np.arange(60)[:, None] * 7 / 60 + np.arange(43)[None] * 3 / 85)
    ).astype(np.complex64)
    np.testing.assert_allclose(run(x, phase), np.roll(x, (7, 3), (1, 2)), rtol=0, atol=3e-6)


def test_white_16_bit_frame(level):
    """The sum of all pixels, 2e10, is in the spectrum; nothing overflows."""
    x = np.full((1, 480, 640), 65535, np.float32)
    x[0, 100, 200] = 0
    out = run(x, np.ones((480, 321), np.float32))
    np.testing.assert_allclose(out, x, rtol=0, atol=65535 * 2e-6)


def test_pictures_do_not_mix(level):
    x, spectrum = arrays(3, 37, 50)
    expected = run(x, spectrum)
    x[1] = np.nan
    out = run(x, spectrum)
    np.testing.assert_array_equal(out[[0, 2]], expected[[0, 2]])
    assert np.isnan(out[1]).all()
    x, spectrum = arrays(1, 37, 50)
    spectrum[3, 4] = np.nan
    assert np.isnan(run(x, spectrum)).all()


def test_threads_give_the_same_bits(level, same_bits):
    for size in [(101, 90), (67, 71)]:
        x, spectrum = arrays(2, *size)

        def run_into(out, x=x, spectrum=spectrum):
            _native.wiener_filter(x, spectrum, out)

        same_bits(run_into, np.full_like(x, np.nan))


def test_in_place_and_nothing_beside():
    x, spectrum = arrays(3, 45, 37)
    expected = run(x, spectrum)
    whole = np.full(x.size + 64, 42, np.float32)
    view = whole[32:-32].reshape(x.shape)
    view[:] = x
    _native.wiener_filter(view, spectrum, view)
    np.testing.assert_array_equal(view, expected)
    assert (whole[:32] == 42).all() and (whole[-32:] == 42).all()


def test_more_sizes_than_plans_are_kept():
    x, spectrum = arrays(1, 4, 6)
    expected = run(x, spectrum)
    for n in range(1, 70):
        assert_filters(*arrays(1, 1, n))
    np.testing.assert_array_equal(run(x, spectrum), expected)


def test_memory(extra_memory):
    """The half spectra of two pictures, whatever their number, and some rows."""
    setup = """
x, out = np.ones((2, 8, 480, 640), np.float32)
g = np.ones((480, 321), np.float32)
small = np.ones((2, 1, 8, 8), np.float32)
_native.wiener_filter(small[0], g[:8, :5].copy(), small[1])"""
    extra = extra_memory(setup, "_native.wiener_filter(x, g, out)")
    assert 0 < extra < 2 * 480 * 656 * 4 + 1_000_000


def test_nothing_to_do():
    assert run(np.ones((0, 4, 6), np.float32), np.ones((4, 4), np.float32)).size == 0
    assert run(np.ones((2, 0, 6), np.float32), np.ones((0, 4), np.float32)).size == 0


def test_refuses():
    x, spectrum = arrays(2, 6, 10)
    out = np.empty_like(x)
    for bad in (x.astype(np.float64), np.repeat(x, 2, 2)[..., ::2], x[0]):
        with pytest.raises(ValueError, match="x: got .*expected"):
            _native.wiener_filter(bad, spectrum, out)
        with pytest.raises(ValueError, match="out: got .*expected"):
            _native.wiener_filter(x, spectrum, bad)
    for bad in (spectrum.astype(np.complex128), spectrum.real.astype(np.float64)):
        with pytest.raises(ValueError, match="spectrum: got .*complex64 or float32"):
            _native.wiener_filter(x, bad, out)
    for bad in (spectrum[:-1], np.ascontiguousarray(spectrum[:, :-1]), spectrum[None]):
        with pytest.raises(ValueError, match=r"spectrum: got .*\(H, W // 2 \+ 1\) for x float32"):
            _native.wiener_filter(x, bad, out)
    with pytest.raises(ValueError, match="C-contiguous"):
        _native.wiener_filter(x, np.repeat(spectrum, 2, 1)[:, ::2], out)
    whole = np.empty((3, 6, 10), np.float32)
    with pytest.raises(ValueError, match="out overlaps x"):
        _native.wiener_filter(whole[:2], spectrum, whole[1:])
    with pytest.raises(ValueError, match="out overlaps spectrum"):
        _native.wiener_filter(x, out.reshape(-1)[:36].reshape(6, 6), out)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        _native.wiener_filter(x, spectrum, out)
