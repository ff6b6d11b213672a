"""The sampler's steps against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseengine import _native

K = {"sqrt_abar": 0.8, "sqrt_one_minus_abar": 0.6, "sqrt_abar_prev": 0.95}
UNIT = st.floats(0.0, 1.0)


def normal(shape, count, seed=0):
    return list(np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32))


def poisoned(shape):
    return np.full(shape, np.nan, np.float32)


def x0_of(x, eps, sqrt_abar, sqrt_one_minus_abar):
    return (x.astype(np.float64) - sqrt_one_minus_abar * eps.astype(np.float64)) / sqrt_abar


class TestDdimStep:
    def reference(self, x, eps, noise, *, sqrt_abar_prev, direction, sigma=0.0, **k):
        out = sqrt_abar_prev * x0_of(x, eps, **k) + direction * eps.astype(np.float64)
        return out if noise is None else out + sigma * noise.astype(np.float64)

    @pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 17, 33), (1, 3, 150, 151)])
    @pytest.mark.parametrize("with_noise", [False, True])
    def test_values(self, shape, with_noise):
        x, eps, noise = (np.asarray(a) for a in normal(shape, 3))
        if not with_noise:
            noise = None
        k = {**K, "direction": 0.3, "sigma": 0.1 if with_noise else 0.0}
        out = poisoned(shape)
        _native.ddim_step(x, eps, noise, out, **k)
        # Terms below 10, some five roundings.
        np.testing.assert_allclose(out, self.reference(x, eps, noise, **k), rtol=0, atol=3e-6)
        for i in range(2 + with_noise):
            inputs = [None if a is None else a.copy() for a in (x, eps, noise)]
            _native.ddim_step(*inputs, inputs[i], **k)
            np.testing.assert_array_equal(inputs[i], out)

    @given(st.floats(0.03, 1.0), UNIT, UNIT, UNIT, UNIT)
    def test_any_coefficients(self, s, r, p, direction, sigma):
        x, eps, noise = normal((3, 11), 3)
        k = {"sqrt_abar": s, "sqrt_one_minus_abar": r, "sqrt_abar_prev": p}
        k.update(direction=direction, sigma=sigma)
        out = poisoned(x.shape)
        _native.ddim_step(x, eps, noise, out, **k)
        expected = self.reference(x, eps, noise, **k)
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=2e-6 / s)

    def test_threads_give_the_same_bits_and_nan_stays(self, same_bits):
        x, eps, noise = normal((3, 131, 211), 3)
        x[1, 2, 3] = np.nan

        def run(out):
            _native.ddim_step(x, eps, noise, out, **K, direction=0.3, sigma=0.2)
            assert np.isnan(out).sum() == 1

        same_bits(run, poisoned(x.shape))

    def test_refuses(self):
        x, eps, noise, out = normal((2, 3, 4), 4)
        k = {**K, "direction": 0.3, "sigma": 0.1}
        for i, name in enumerate(["x", "eps", "noise", "out"]):
            good = [x, eps, noise, out]
            for bad in (good[i].astype(np.float64), np.repeat(good[i], 2, 2)[..., ::2]):
                with pytest.raises(ValueError, match=f"{name}: got"):
                    _native.ddim_step(*[bad if j == i else a for j, a in enumerate(good)], **k)
            if i:
                given_arrays = [good[j][:1] if j == i else a for j, a in enumerate(good)]
                with pytest.raises(ValueError, match=rf"{name}: got float32\(1, 3, 4\), .* of x"):
                    _native.ddim_step(*given_arrays, **k)
        with pytest.raises(ValueError, match=r"noise: got None, expected an array for sigma 0\.1"):
            _native.ddim_step(x, eps, None, out, **k)
        with pytest.raises(TypeError, match="noise: got .*expected an array or None"):
            _native.ddim_step(x, eps, 1.0, out, **k)
        with pytest.raises(ValueError, match="sqrt_abar: got 0"):
            _native.ddim_step(x, eps, noise, out, **{**k, "sqrt_abar": 0.0})
        whole = poisoned((3, 3, 4))
        with pytest.raises(ValueError, match="out overlaps x"):
            _native.ddim_step(whole[:2], eps, noise, whole[1:], **k)
        out.flags.writeable = False
        with pytest.raises(ValueError, match="writeable"):
            _native.ddim_step(x, eps, noise, out, **k)


class TestComposePriors:
    def arrays(self, n, c, h, w):
        x, a, b = normal((n, c, h, w), 3)
        return x, a, b, np.random.default_rng(1).random((n, 1, h, w), dtype=np.float32)

    def reference(self, x, a, b, weight, *, sqrt_abar_prev, direction=0.0, **k):
        """Equation 9 of DRMF as printed: the priors' own x0, weighted."""
        weight = weight.astype(np.float64)
        shares = (weight, 1 - weight)
        x0 = sum(g * x0_of(x, e, **k) for g, e in zip(shares, (a, b), strict=True))
        eps = sum(g * e.astype(np.float64) for g, e in zip(shares, (a, b), strict=True))
        return sqrt_abar_prev * x0 + direction * eps

    @pytest.mark.parametrize(
        "shape",
        [(1, 1, 1, 1), (2, 3, 7, 9), (1, 3, 1, 63), (3, 1, 17, 5), (2, 3, 75, 123), (0, 3, 2, 2)],
    )
    @pytest.mark.parametrize("direction", [0.0, 0.4])
    def test_values(self, shape, direction):
        inputs = self.arrays(*shape)
        k = {**K, "direction": direction}
        out, x0_a = poisoned(shape), poisoned(shape)
        _native.compose_priors(*inputs, out, **k)
        np.testing.assert_allclose(out, self.reference(*inputs, **k), rtol=0, atol=3e-6)
        again = poisoned(shape)
        _native.compose_priors(*inputs, again, x0_a, **k)
        np.testing.assert_array_equal(again, out)
        np.testing.assert_allclose(x0_a, x0_of(*inputs[:2], 0.8, 0.6), rtol=0, atol=2e-6)
        for i in range(3):
            copies = [a.copy() for a in inputs]
            _native.compose_priors(*copies, copies[i], copies[(i + 1) % 3], **k)
            np.testing.assert_array_equal(copies[i], out)
            np.testing.assert_array_equal(copies[(i + 1) % 3], x0_a)

    @given(st.floats(0.03, 1.0), UNIT, UNIT, UNIT)
    def test_any_coefficients(self, s, r, p, direction):
        inputs = self.arrays(1, 2, 3, 11)
        k = {"sqrt_abar": s, "sqrt_one_minus_abar": r, "sqrt_abar_prev": p, "direction": direction}
        out = poisoned(inputs[0].shape)
        _native.compose_priors(*inputs, out, **k)
        expected = self.reference(*inputs, **k)
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=2e-6 / s)

    def test_threads_give_the_same_bits_and_nan_spreads(self, same_bits):
        x, a, b, weight = self.arrays(2, 3, 101, 131)
        weight[1, 0, 2, 3] = np.nan

        def run(out):
            _native.compose_priors(x, a, b, weight, out, **K)
            bad = np.zeros(x.shape, bool)
            bad[1, :, 2, 3] = True
            np.testing.assert_array_equal(np.isnan(out), bad)

        same_bits(run, poisoned(x.shape))

    def test_refuses(self):
        x, a, b, weight = self.arrays(2, 3, 4, 5)
        good = {"x": x, "eps_a": a, "eps_b": b, "weight": weight}
        good.update(out=poisoned(x.shape), x0_a=poisoned(x.shape))
        _native.compose_priors(**good, **K)
        for name, array in good.items():
            for bad in (array.astype(np.float64), np.repeat(array, 2, 3)[..., ::2], array[0]):
                with pytest.raises(ValueError, match=f"{name}: got"):
                    _native.compose_priors(**{**good, name: bad}, **K)
        with pytest.raises(ValueError, match=r"weight: got .*\(N, 1, H, W\)"):
            _native.compose_priors(**{**good, "weight": x}, **K)
        with pytest.raises(TypeError, match="x0_a: got .*expected an array or None"):
            _native.compose_priors(**{**good, "x0_a": 0}, **K)
        with pytest.raises(ValueError, match="x0_a overlaps out"):
            _native.compose_priors(**{**good, "x0_a": good["out"]}, **K)
        with pytest.raises(ValueError, match="sqrt_abar: got -"):
            _native.compose_priors(**good, **{**K, "sqrt_abar": -0.8})


def test_joint_step_on_threads_gives_the_same_bits(same_bits):
    """Three pictures of a size that the ranges of pixels do not divide."""
    x, eps = normal((3, 3, 83, 157), 2)
    mask, y1, y2 = np.random.default_rng(1).random((3, 3, 1, 83, 157), dtype=np.float32)
    k = {**K, "sqrt_one_minus_abar_prev": 0.31, "lam": 0.37}
    for form in (0, 1):
        whole = poisoned(x.shape)
        for n in range(3):  # one picture at a time, below the size that is worth a thread
            for y in range(83):
                rows = [
                    np.ascontiguousarray(a[n : n + 1, :, y : y + 1]) for a in (x, eps, mask, y1, y2)
                ]
                line = poisoned((1, 3, 1, 157))
                _native.joint_ddim_step(*rows, line, **k, form=form)
                whole[n, :, y] = line[0, :, 0]

        def run(out, form=form, whole=whole):
            _native.joint_ddim_step(x, eps, mask, y1, y2, out, **k, form=form)
            np.testing.assert_array_equal(out, whole)

        same_bits(run, poisoned(x.shape))
