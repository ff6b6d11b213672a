"""The sampler's joint step and Philox against NumPy in float64, and their refusals."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseengine import _native
from fuseengine.errors import SettingError
from fuseengine.runtime import random


def poisoned(shape, dtype=np.float32):
    fill = np.nan if np.dtype(dtype).kind == "f" else 42
    return np.full(shape, fill, dtype)


def joint_reference(x, eps, m, y1, y2, s, r, sp, rp, lam, form):
    x, eps, m, y1, y2 = (v.astype(np.float64) for v in (x, eps, m[:, 0], y1[:, 0], y2[:, 0]))
    a, b, f = np.moveaxis((x - r * eps) / s, 1, 0)
    a2, b2 = a - lam * (a - y1), b - lam * (b - y2)
    if form == 0:
        f2 = f - lam * (m * (a2 - y1) + (1 - m) * (b2 - y2) - m * y1 - (1 - m) * y2 + f)
    else:
        f2 = f - lam * (m * (a - y1) + (1 - m) * (b - y2) - (m * a + (1 - m) * b - f))
    return sp * np.stack([a2, b2, f2], 1) + rp * eps


class TestJointStep:
    COEFFICIENTS = (0.8, 0.6, 0.95, 0.31, 0.37)

    def call(self, arrays, out, form, coefficients=COEFFICIENTS):
        s, r, sp, rp, lam = coefficients
        _native.joint_ddim_step(
            *arrays,
            out,
            sqrt_abar=s,
            sqrt_one_minus_abar=r,
            sqrt_abar_prev=sp,
            sqrt_one_minus_abar_prev=rp,
            lam=lam,
            form=form,
        )

    def arrays(self, n, h, w):
        rng = np.random.default_rng(n + h + w)
        x, eps = (rng.standard_normal((n, 3, h, w)).astype(np.float32) for _ in range(2))
        return x, eps, *(rng.random((n, 1, h, w), dtype=np.float32) for _ in range(3))

    @pytest.mark.parametrize("form", [0, 1])
    @pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 9), (2, 1, 63), (3, 17, 5), (0, 4, 4)])
    def test_values(self, form, shape):
        arrays = self.arrays(*shape)
        out = poisoned(arrays[0].shape)
        self.call(arrays, out, form)
        expected = joint_reference(*arrays, *self.COEFFICIENTS, form)
        np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6)
        for target in (0, 1):  # x, then eps
            inputs = [a.copy() for a in arrays]
            self.call(inputs, inputs[target], form)
            np.testing.assert_array_equal(inputs[target], out)

    @given(*[st.floats(0.05, 1.0)] * 2, *[st.floats(0.0, 1.0)] * 3, st.sampled_from([0, 1]))
    def test_any_coefficients(self, s, sp, r, rp, lam, form):
        arrays = self.arrays(1, 3, 11)
        out = poisoned(arrays[0].shape)
        self.call(arrays, out, form, (s, r, sp, rp, lam))
        expected = joint_reference(*arrays, s, r, sp, rp, lam, form)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=2e-6 / s)

    def test_refuses(self):
        arrays = self.arrays(2, 4, 6)
        out = poisoned(arrays[0].shape)
        for i, name in enumerate(["x", "eps", "mask", "y1", "y2"]):
            for bad in (arrays[i].astype(np.float64), arrays[i][:, :, ::2], arrays[i][..., :-1]):
                given_arrays = list(arrays)
                given_arrays[i] = bad
                with pytest.raises(ValueError, match=f"(?:{name}|eps): got"):
                    self.call(given_arrays, out, 0)
        with pytest.raises(ValueError, match="out: got"):
            self.call(arrays, out[:1], 0)
        with pytest.raises(ValueError, match="form: got 2"):
            self.call(arrays, out, 2)
        with pytest.raises(ValueError, match="sqrt_abar: got"):
            self.call(arrays, out, 0, (0.0, 1, 1, 1, 1))
        three = poisoned((3, 3, 4, 6))
        with pytest.raises(ValueError, match="out overlaps x"):
            self.call((three[:2], *arrays[1:]), three[1:], 0)
        shared = poisoned((2, 3, 4, 6))
        mask = shared.reshape(-1)[: 2 * 4 * 6].reshape(2, 1, 4, 6)
        with pytest.raises(ValueError, match="out overlaps mask"):
            self.call((*arrays[:2], mask, *arrays[3:]), shared, 0)


class TestPhilox:
    # Known answers of the Random123 library, file kat_vectors, philox4x32 with 10 rounds.
    KNOWN = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]

    @pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
    def test_known_answers(self, counter, key, words):
        assert list(_native.philox4x32_10(*counter, *key)) == words
        assert random.philox4x32_10(np.array(counter, np.uint32), tuple(key)).tolist() == words

    @given(
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**40) | st.integers(2**34 - 40, 2**34 + 4),
        st.integers(0, 70),
    )
    def test_words_and_normals_match_numpy(self, seed, offset, count):
        words = np.zeros(count, np.uint32)
        _native.philox_words(words, seed, offset)
        np.testing.assert_array_equal(
            words, random.words_reference(count, seed=seed, offset=offset)
        )
        np.testing.assert_allclose(
            random.normal((count,), seed=seed, offset=offset),
            random.normal_reference(count, seed=seed, offset=offset),
            rtol=0,
            atol=1e-6,
        )

    def test_a_part_is_a_part(self):
        whole = random.normal((3, 41), seed=7)
        for start in range(9):
            part = random.normal((50,), seed=7, offset=start)
            np.testing.assert_array_equal(part, whole.reshape(-1)[start : start + 50])
        assert not np.array_equal(whole, random.normal((3, 41), seed=8))

    def test_frozen_numbers(self):
        # A saved engine's picture depends on these: they never change.
        # Box-Muller, by Python's math module, of the first known answer above.
        expected = [0.991137680, -0.924662588, -0.617608959, -0.482068587]
        np.testing.assert_allclose(random.normal((4,), seed=0), expected, rtol=0, atol=1e-7)

    def test_distribution(self):
        z = np.sort(random.normal((100_000,), seed=3).astype(np.float64))
        # Kolmogorov-Smirnov at 1e-6 level: 2.69 / sqrt(n).
        cdf = np.array([0.5 * (1 + math.erf(v / 2**0.5)) for v in z[::100]])
        rank = np.arange(0, 100_000, 100) / 100_000
        assert np.abs(cdf - rank).max() < 2.69 / 100_000**0.5 + 1e-5
        assert abs(np.corrcoef(*random.normal((100_000,), seed=3).reshape(-1, 2).T)[0, 1]) < 0.02

    def test_refuses(self):
        with pytest.raises(ValueError, match="expected aligned float32"):
            _native.philox_normal(np.zeros(4), 0)
        with pytest.raises(ValueError, match="C-contiguous"):
            _native.philox_normal(np.zeros(8, np.float32)[::2], 0)
        for bad in ({"seed": -1}, {"seed": 2**64}, {"seed": 0, "offset": -1}):
            with pytest.raises(SettingError, match="expected an integer from 0"):
                random.normal((2,), **bad)


def test_the_gil_is_released():
    """Another thread runs while a kernel works."""
    out = np.zeros(4_000_000, np.float32)  # some 60 ms of work in one call
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    _native.philox_normal(out, 1)
    end = time.perf_counter()
    stop.set()
    thread.join()
    assert sum(start < t < end for t in ticks) >= 3
