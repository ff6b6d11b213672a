"""Windows, local moments and the median against plain NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import convolve2d

from fuseengine.metrics.filters import Moments, Window, flat, gaussian, padded, smooth
from fuseengine.metrics.phase_congruency import median

WINDOWS = {
    "gaussian 3": gaussian(3, 0.6),
    "gaussian 17": gaussian(17, 3.4),
    "flat 7": flat(7),
    "one": flat(1),
    "uneven": Window((1.0, -2.0, 0.5, 3.0)),
}


def images(seed, *shape):
    return np.random.default_rng(seed).random(shape)


class TestSmooth:
    @pytest.mark.parametrize("name", WINDOWS)
    @pytest.mark.parametrize("size", [(17, 17), (18, 40), (70, 33), (81, 97), (130, 19)])
    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_values(self, name, size, step):
        window, stack = WINDOWS[name], images(0, 2, *size)
        kernel = np.outer(window.taps, window.taps)
        out = smooth(stack, window, step)
        for x, ours in zip(stack, out, strict=True):
            plain = convolve2d(x, kernel[::-1, ::-1], mode="valid")[::step, ::step]
            np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-12 * abs(kernel).sum())

    def test_into_an_array_with_every_place_written(self):
        stack, window = images(0, 3, 70, 45), gaussian(11, 1.5)
        out = np.full((3, 60, 35), np.nan)
        assert smooth(stack, window, out=out) is out
        np.testing.assert_array_equal(out, smooth(stack, window))

    def test_does_not_fit(self):
        assert smooth(images(0, 1, 10, 30), gaussian(11, 1.5)).shape == (1, 0, 20)

    def test_padded_keeps_the_size(self):
        stack, window = images(0, 2, 13, 9), gaussian(31, 4.0)
        kernel = np.outer(window.taps, window.taps)
        for x, ours in zip(stack, smooth(padded(stack, window), window), strict=True):
            np.testing.assert_allclose(ours, convolve2d(x, kernel, mode="same"), atol=1e-13)

    def test_gaussian(self):
        assert gaussian(11, 1.5).total == pytest.approx(1)
        assert gaussian(31, 4.0, 0.7).total == pytest.approx(0.7)
        taps = np.array(gaussian(5, 1.0).taps)
        assert taps[1] / taps[2] == pytest.approx(np.exp(-0.5))


class TestMoments:
    @pytest.mark.parametrize("window", [gaussian(11, 1.5), flat(7)], ids=["gaussian", "flat"])
    @pytest.mark.parametrize("size", [(11, 11), (30, 41), (150, 13)])
    def test_values(self, window, size):
        given = dict(zip("ab", 255 * images(1, 2, *size), strict=True))
        moments = Moments(given, window, ("aa", "bb", "ab"))
        weights = np.outer(window.taps, window.taps).ravel()
        weights /= weights.sum()
        n = window.size
        places = np.random.default_rng(0).integers(0, np.subtract(size, n) + 1, (20, 2))
        for y, x in places:
            patch = {k: v[y : y + n, x : x + n].ravel() for k, v in given.items()}
            mean = {k: (weights * v).sum() for k, v in patch.items()}
            for name in ("a", "b"):
                assert moments[name][y, x] == pytest.approx(mean[name], rel=1e-12)
            for i, j in ("aa", "bb", "ab"):
                expected = (weights * (patch[i] - mean[i]) * (patch[j] - mean[j])).sum()
                assert moments[i + j][y, x] == pytest.approx(expected, rel=1e-9, abs=1e-9)

    def test_strips_cover_the_maps(self):
        moments = Moments(dict(zip("ab", images(1, 2, 90, 200), strict=True)), flat(3), ("ab",))
        parts = list(moments.strips())
        assert len(parts) > 1
        for name in ("a", "b", "ab"):
            np.testing.assert_array_equal(
                np.concatenate([m[name] for _, m in parts]), moments[name]
            )
        assert [row for rows, _ in parts for row in range(88)[rows]] == list(range(88))

    def test_flat_patches_of_whole_numbers_are_exact(self):
        x = np.full((40, 40), 255.0)
        x[:, 20:] = 7
        moments = Moments({"a": x}, flat(11), ("aa",))
        assert (moments["aa"][:, :10] == 0).all() and (moments["aa"][:, 20:] == 0).all()
        assert (moments["aa"][:, 10:20] > 0).all()

    def test_small_variances_beside_large_means(self):
        """One grey level in a bright patch: far above the limit below which patches are flat."""
        x = np.full((11, 11), 255.0)
        x[0, 0] = 254
        w = gaussian(11, 1.5).taps[0] ** 2
        variance = Moments({"a": x}, gaussian(11, 1.5), ("aa",))["aa"][0, 0]
        assert variance == pytest.approx(w * (1 - w), rel=1e-3)
        assert variance > 1e-6


class TestMedian:
    @given(st.integers(1, 9000), st.integers(0, 100), st.sampled_from([2, 50, 10**6]))
    def test_values(self, count, seed, levels):
        """Ties too, and an order that the sample does not see."""
        x = np.random.default_rng(seed).integers(0, levels, count).astype(float)
        assert median(x) == np.median(x)
        assert median(np.sort(x)) == np.median(x)

    def test_a_sample_that_misleads(self):
        x = np.random.default_rng(0).random(40_000)
        x[:: x.size // 4096] += 10
        assert median(x) == np.median(x)
