"""The native kernels against NumPy in float64, and their refusals."""

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

FULL_SCALE = {"uint8": 255, "uint16": 65535, "float32": 1, "float64": 1}
DTYPES = sorted(FULL_SCALE)
LUMA = np.array([0.299, 0.587, 0.114])
SIZES = [(1, 1), (1, 7), (7, 1), (2, 2), (3, 5), (17, 33), (63, 111), (5, 64)]


def frame(shape, dtype, seed=0):
    values = np.random.default_rng(seed).random(shape)
    if np.dtype(dtype).kind == "f":
        return values.astype(dtype)
    return np.rint(values * FULL_SCALE[dtype]).astype(dtype)


def poisoned(shape, dtype=np.float32):
    fill = np.nan if np.dtype(dtype).kind == "f" else 42
    return np.full(shape, fill, dtype)


def frame_in_reference(src, planes, padded, low=0.0, scale=1.0):
    v = src.astype(np.float64)
    if v.ndim == 2:
        v = np.stack([v] * planes)
    elif planes == 1:
        v = (v @ LUMA)[None]
    else:
        v = np.moveaxis(v, -1, 0)
    v = np.clip((v - low) * scale, 0, 1)
    pad = [(0, 0)] + [(0, p - n) for p, n in zip(padded, src.shape[:2], strict=True)]
    return np.pad(v, pad, mode="reflect")


def frame_out_reference(fused, visible, dtype):
    """Float64, in units of full scale, before rounding."""
    top = FULL_SCALE[str(np.dtype(dtype))]
    h, w = visible.shape[:2]
    fused = fused[:, :h, :w].astype(np.float64) * top
    if visible.ndim == 2:
        out = fused[0] if len(fused) == 1 else np.tensordot(LUMA, fused, 1)
    elif len(fused) == 3:
        out = np.moveaxis(fused, 0, -1)
    else:
        v = visible.astype(np.float64)
        out = v + (fused[0] - v @ LUMA)[..., None]
    return np.clip(out, 0, top)


def assert_rounded(got, exact):
    """Nearest integer, except where float32 cannot tell which one is nearer."""
    if got.dtype.kind == "f":
        tolerance = 1e-15 if got.dtype == np.float64 else 3e-7
        np.testing.assert_allclose(got, exact, rtol=0, atol=tolerance)
    else:
        slack = 1e-4 if got.dtype == np.uint8 else 0.02
        assert np.abs(got - exact).max() <= 0.5 + slack


class TestFrameIn:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("colour", [False, True])
    @pytest.mark.parametrize("planes", [1, 3])
    def test_values_and_padding(self, size, dtype, colour, planes):
        src = frame((*size, 3) if colour else size, dtype)
        for extra in [(0, 0), (1, 0), (0, 1), (9, 13)]:
            padded = (size[0] + extra[0], size[1] + extra[1])
            out = poisoned((planes, *padded))
            scale = 1 / FULL_SCALE[dtype]
            assert _native.frame_in(src, out, scale=scale)
            expected = frame_in_reference(src, planes, padded, scale=scale)
            np.testing.assert_allclose(out, expected, rtol=0, atol=3e-7)

    @given(
        st.integers(1, 9), st.integers(1, 9), st.integers(0, 40), st.integers(0, 40), st.booleans()
    )
    def test_padding_is_numpy_reflect(self, h, w, down, right, colour):
        src = frame((h, w, 3) if colour else (h, w), "uint8", seed=h * w)
        out = poisoned((3, h + down, w + right))
        assert _native.frame_in(src, out, scale=1 / 255)
        inner = out[:, :h, :w]
        np.testing.assert_array_equal(
            out, np.pad(inner, [(0, 0), (0, down), (0, right)], mode="reflect")
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_row_stride(self, dtype):
        whole = frame((14, 20, 3), dtype)
        for src in (whole[:, 3:9], whole[::3], whole[2:3]):
            out = poisoned((3, *src.shape[:2]))
            assert _native.frame_in(src, out, scale=1 / FULL_SCALE[dtype])
            expected = frame_in_reference(src, 3, src.shape[:2], scale=1 / FULL_SCALE[dtype])
            np.testing.assert_allclose(out, expected, rtol=0, atol=3e-7)

    def test_affine_is_clipped_and_exact_on_thermal_counts(self):
        src = np.arange(29990, 30020, dtype=np.uint16).reshape(5, 6)
        out = poisoned((1, 5, 6))
        assert _native.frame_in(src, out, low=30000, scale=1 / 16)
        np.testing.assert_array_equal(out[0], np.clip((src.astype(float) - 30000) / 16, 0, 1))

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("shape", [(3, 19), (3, 19, 3)])
    def test_not_finite(self, dtype, value, shape):
        for planes in (1, 3):
            for at in (0, -1, 31):
                src = frame(shape, dtype)
                src.reshape(-1)[at] = value
                assert not _native.frame_in(src, poisoned((planes, 3, 19)), scale=1)
        assert _native.frame_in(frame(shape, dtype), poisoned((1, 3, 19)), scale=1)

    def test_beyond_float32_is_not_finite(self):
        src = np.full((2, 2), 1e300)
        assert not _native.frame_in(src, poisoned((1, 2, 2)), scale=1)

    def test_refuses(self):
        out = poisoned((1, 4, 6))
        ok = frame((4, 6), "uint8")
        with pytest.raises(ValueError, match=r"src: got int32\(4, 6\), expected uint8"):
            _native.frame_in(ok.astype(np.int32), out, scale=1)
        with pytest.raises(ValueError, match="native byte order"):
            _native.frame_in(ok.astype(">u2"), out, scale=1)
        for bad in (ok.T, ok[:, ::2], ok[::-1], np.broadcast_to(ok[0], (4, 6))):
            with pytest.raises(ValueError, match="src: got .*expected"):
                _native.frame_in(bad, poisoned((1, 8, 8)), scale=1)
        for shape in [(4,), (4, 6, 1), (4, 6, 4), (1, 4, 6, 3), (0, 6), (4, 0)]:
            with pytest.raises(ValueError, match=r"expected shape \(H, W\)"):
                _native.frame_in(np.zeros(shape, np.uint8), out, scale=1)
        with pytest.raises(ValueError, match="at least the height and width of src"):
            _native.frame_in(ok, poisoned((1, 4, 5)), scale=1)
        for bad_out in (poisoned((4, 6)), poisoned((2, 4, 6)), out.astype(np.float64)):
            with pytest.raises(ValueError, match="out: got"):
                _native.frame_in(ok, bad_out, scale=1)
        with pytest.raises(ValueError, match="C-contiguous"):
            _native.frame_in(ok, poisoned((1, 4, 12))[:, :, ::2], scale=1)
        out.flags.writeable = False
        with pytest.raises(ValueError, match="writeable"):
            _native.frame_in(ok, out, scale=1)
        shared = poisoned((1, 4, 6))
        with pytest.raises(ValueError, match="overlaps src"):
            _native.frame_in(shared[0], shared, scale=1)
        with pytest.raises(TypeError):
            _native.frame_in([[1, 2], [3, 4]], poisoned((1, 2, 2)), scale=1)

    def test_unaligned_is_refused(self):
        raw = np.zeros(4 * 6 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(4, 6)
        assert not raw.flags.aligned
        with pytest.raises(ValueError, match="aligned"):
            _native.frame_in(raw, poisoned((1, 4, 6)), scale=1)


class TestFrameOut:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("colour", [False, True])
    @pytest.mark.parametrize("planes", [1, 3])
    def test_values_and_crop(self, size, dtype, colour, planes):
        visible = frame((*size, 3) if colour else size, dtype, seed=1)
        fused = np.random.default_rng(2).uniform(-0.2, 1.2, (planes, size[0] + 3, size[1] + 2))
        fused = fused.astype(np.float32)
        out = poisoned(visible.shape, dtype)
        _native.frame_out(fused, visible, out)
        assert_rounded(out, frame_out_reference(fused, visible, dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_writes_nothing_else_and_works_in_place(self, dtype):
        visible = frame((9, 33, 3), dtype)
        fused = frame((1, 9, 33), "float32", seed=3)
        expected = poisoned(visible.shape, dtype)
        _native.frame_out(fused, visible, expected)
        whole = np.full((11, 41, 3), 42, dtype)
        view = whole[1:10, 3:36]
        view[:] = visible
        _native.frame_out(fused, view, view)
        np.testing.assert_array_equal(view, expected)
        whole[1:10, 3:36] = 42
        assert (whole == 42).all()

    @pytest.mark.parametrize("dtype", ["uint8", "uint16"])
    def test_every_value_survives(self, dtype):
        top = FULL_SCALE[dtype]
        values = np.arange(top + 1, dtype=dtype).reshape(16, -1)
        planes = poisoned((1, *values.shape))
        assert _native.frame_in(values, planes, scale=1 / top)
        out = np.zeros_like(values)
        _native.frame_out(planes, None, out)
        np.testing.assert_array_equal(out, values)

    def test_nan_and_infinity_have_an_answer(self):
        fused = np.array([[[np.nan, np.inf, -np.inf, 0.5]]], np.float32)
        for dtype, expected in [("uint8", [0, 255, 0, 128]), ("float32", [0, 1, 0, 0.5])]:
            out = poisoned((1, 4), dtype)
            _native.frame_out(fused, None, out)
            np.testing.assert_array_equal(out[0], np.array(expected, dtype))

    def test_refuses(self):
        fused = poisoned((1, 4, 6))
        colour = frame((4, 6, 3), "uint8")
        with pytest.raises(TypeError, match="visible: got None"):
            _native.frame_out(fused, None, colour.copy())
        for visible in (colour[:3], colour[..., 0], colour.astype(np.uint16)):
            with pytest.raises(ValueError, match="visible: got"):
                _native.frame_out(fused, np.ascontiguousarray(visible), colour.copy())
        with pytest.raises(ValueError, match="fused: got .*at least the height and width of out"):
            _native.frame_out(fused, None, np.zeros((4, 7), np.uint8))
        with pytest.raises(ValueError, match="fused: got float64"):
            _native.frame_out(fused.astype(np.float64), colour, colour.copy())
        whole = frame((5, 6, 3), "uint8")
        with pytest.raises(ValueError, match="out overlaps visible"):
            _native.frame_out(fused, whole[:4], whole[1:])
        with pytest.raises(ValueError, match="out overlaps fused"):
            _native.frame_out(fused, None, fused[0])


class TestFrameRange:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 17), (13, 31, 3)])
    def test_values(self, dtype, shape):
        src = frame(shape, dtype)
        if np.dtype(dtype).kind == "f":
            src = src - np.asarray(0.5, dtype)
        assert _native.frame_range(src) == (src.min(), src.max(), True)
        view = np.concatenate([src, src - 1 if src.dtype.kind == "f" else src], 1)[
            :, : shape[1]
        ]  # values beside the view must not count
        assert _native.frame_range(view) == (src.min(), src.max(), True)

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
    def test_not_finite(self, dtype, value):
        for at in range(19):
            src = frame((1, 19), dtype)
            src[0, at] = value
            assert not _native.frame_range(src)[2]

    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
    def test_any_floats(self, values):
        src = np.array([values], np.float32)
        assert _native.frame_range(src) == (src.min(), src.max(), True)
        assert _native.frame_range(src.astype(np.float64)) == (src.min(), src.max(), True)


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
