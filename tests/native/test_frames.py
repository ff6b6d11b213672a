"""Frames in and out, colour and padding against NumPy in float64, threads, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseengine import _native

FULL_SCALE = {"uint8": 255, "uint16": 65535, "float32": 1, "float64": 1}
DTYPES = sorted(FULL_SCALE)
LUMA = np.array([0.299, 0.587, 0.114])
SIZES = [(1, 1), (1, 7), (7, 1), (2, 2), (3, 5), (17, 33), (63, 111), (5, 64)]
TO_YCBCR = np.array(
    [
        [0.299, 0.587, 0.114],
        [-0.299 / 1.772, -0.587 / 1.772, 0.5],
        [0.5, -0.587 / 1.402, -0.114 / 1.402],
    ]
)
HALF = np.array([0, 0.5, 0.5]).reshape(3, 1, 1)


def frame(shape, dtype, seed=0):
    values = np.random.default_rng(seed).random(shape)
    if np.dtype(dtype).kind == "f":
        return values.astype(dtype)
    return np.rint(values * FULL_SCALE[dtype]).astype(dtype)


def poisoned(shape, dtype=np.float32):
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 42, dtype)


def to_ycbcr(planes):
    return np.tensordot(TO_YCBCR, planes.astype(np.float64), 1) + HALF


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
        with pytest.raises(TypeError, match="visible: got NoneType"):
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


class TestYcbcrIn:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 33), (2, 64)])
    def test_values(self, size, dtype):
        src = frame((*size, 3), dtype)
        out = poisoned((3, size[0] + 2, size[1] + 7))
        assert _native.frame_in(src, out, scale=1 / FULL_SCALE[dtype], ycbcr=True)
        rgb = np.moveaxis(src.astype(np.float64) / FULL_SCALE[dtype], -1, 0)
        expected = np.pad(to_ycbcr(rgb), [(0, 0), (0, 2), (0, 7)], mode="reflect")
        np.testing.assert_allclose(out, expected, rtol=0, atol=3e-7)

    def test_gray_has_no_colour(self):
        src = frame((4, 6), "uint8")
        out, luma = poisoned((3, 5, 9)), poisoned((1, 5, 9))
        assert _native.frame_in(src, out, scale=1 / 255, ycbcr=True)
        assert _native.frame_in(src, luma, scale=1 / 255)
        np.testing.assert_array_equal(out[:1], luma)
        np.testing.assert_array_equal(out[1:], 0.5)

    def test_of_the_clipped_colours(self):
        """Beyond the range, chroma is that of what R, G and B planes would hold."""
        src = frame((5, 7, 3), "uint16")
        rgb, ycbcr, later = (poisoned((3, 5, 7)) for _ in range(3))
        options = {"low": 20000, "scale": 1 / 20000}
        assert _native.frame_in(src, rgb, **options)
        assert _native.frame_in(src, ycbcr, ycbcr=True, **options)
        _native.rgb_to_ycbcr(rgb, later)
        np.testing.assert_array_equal(ycbcr, later)

    def test_refuses(self):
        with pytest.raises(ValueError, match=r"out: got .*expected shape \(3, H, W\)"):
            _native.frame_in(frame((4, 6), "uint8"), poisoned((1, 4, 6)), scale=1, ycbcr=True)


class TestThreads:
    """The same bits for any number; frames large enough that several have work."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("ycbcr", [False, True])
    def test_in(self, same_bits, dtype, ycbcr):
        options = {"scale": 1 / FULL_SCALE[dtype], "ycbcr": ycbcr}
        for src in (frame((301, 333, 3), dtype), frame((301, 333), dtype)):
            same_bits(
                lambda out, src=src: _native.frame_in(src, out, **options), poisoned((3, 320, 336))
            )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("planes", [1, 3])
    def test_out(self, same_bits, dtype, planes):
        visible = frame((301, 333, 3), dtype)
        fused = frame((planes, 320, 336), "float32", seed=1)
        same_bits(
            lambda out: _native.frame_out(fused, visible, out), poisoned(visible.shape, dtype)
        )
        same_bits(
            lambda out: _native.frame_out(fused, None, out), poisoned(visible.shape[:2], dtype)
        )

    @pytest.mark.parametrize("threads", [1, 2, 7])
    def test_not_finite_in_any_row(self, threads):
        _native.set_num_threads(threads)
        for row in (0, 150, 300):
            src = frame((301, 333), "float32")
            src[row, 5] = np.nan
            out = poisoned((1, 301, 333))
            assert not _native.frame_in(src, out, scale=1)
            assert out[0, row, 5] == 0 and np.isfinite(out).all()
            assert not _native.frame_range(src)[2]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("threads", [1, 2, 7])
    def test_range(self, threads, dtype):
        _native.set_num_threads(threads)
        src = frame((301, 333, 3), dtype)
        for row in (0, 150, 300):
            src[row, 7, 1] = -3 if np.dtype(dtype).kind == "f" else 0
            assert _native.frame_range(src) == (src.min(), src.max(), True)

    def test_planes(self, same_bits):
        x = frame((3, 301, 333), "float32")
        same_bits(lambda out: _native.rgb_to_ycbcr(x, out), poisoned(x.shape))
        same_bits(lambda out: _native.pad_reflect(x, out), poisoned((3, 640, 340)))


class TestColour:
    @pytest.mark.parametrize("shape", [(3, 1, 1), (3, 5, 7), (2, 3, 4, 9), (0, 3, 2, 2), (3, 0, 4)])
    def test_values_and_inverse(self, shape):
        x = frame(shape, "float32") * 3 - 1
        y, back = poisoned(shape), poisoned(shape)
        _native.rgb_to_ycbcr(x, y)
        for picture, found in [(x, y)] if x.ndim == 3 else zip(x, y, strict=True):
            np.testing.assert_allclose(found, to_ycbcr(picture), rtol=0, atol=6e-7)
        _native.ycbcr_to_rgb(y, back)
        np.testing.assert_allclose(back, x, rtol=0, atol=1e-6)
        _native.ycbcr_to_rgb(y, y)  # in place
        np.testing.assert_array_equal(y, back)

    @pytest.mark.parametrize("convert", [_native.rgb_to_ycbcr, _native.ycbcr_to_rgb])
    def test_refuses(self, convert):
        ok = poisoned((3, 4, 5))
        for bad in (poisoned((4, 5)), poisoned((4, 4, 5)), ok.astype(np.float64), ok[:, ::2]):
            with pytest.raises(ValueError, match="x: got"):
                convert(bad, poisoned(bad.shape))
        with pytest.raises(ValueError, match="out: got .*expected the shape of x"):
            convert(ok, poisoned((3, 5, 4)))
        two = poisoned((6, 4, 5))
        with pytest.raises(ValueError, match="out overlaps x"):
            convert(two[:3], two[1:4])
        ok.flags.writeable = False
        with pytest.raises(ValueError, match="writeable"):
            convert(two[:3], ok)


class TestPadReflect:
    @given(
        st.integers(1, 9), st.integers(1, 9), st.integers(0, 40), st.integers(0, 40),
        st.integers(0, 3),
    )  # fmt: skip
    def test_is_that_of_numpy(self, h, w, down, right, planes):
        x = frame((2, planes, h, w), "float32", seed=h * w)
        out = poisoned((2, planes, h + down, w + right))
        _native.pad_reflect(x, out)
        pad = [(0, 0), (0, 0), (0, down), (0, right)]
        np.testing.assert_array_equal(out, np.pad(x, pad, mode="reflect"))

    def test_refuses(self):
        x = frame((3, 4, 6), "float32")
        for shape in ((2, 4, 6), (3, 3, 6), (3, 4, 5), (4, 6)):
            with pytest.raises(ValueError, match="out: got .*with H and W no smaller"):
                _native.pad_reflect(x, poisoned(shape))
        for bad in (x[0, 0], x[:, :0], x.astype(np.float64), x[:, :, ::2]):
            with pytest.raises(ValueError, match="x: got"):
                _native.pad_reflect(bad, poisoned((3, 9, 9)))
        whole = poisoned((4, 4, 6))
        with pytest.raises(ValueError, match="out overlaps x"):
            _native.pad_reflect(whole[:3], whole[1:])


def test_no_copy_of_a_frame(extra_memory):
    """A 1080p frame needs no memory but its own: no plane of 8 MB on the way."""
    setup = (
        "src = np.zeros((1080, 1920, 3), np.uint8); out = np.ones((3, 1088, 1920), np.float32)\n"
        "_native.frame_in(src[:8], out[:, :16].copy(), scale=1)"
    )
    assert extra_memory(setup, "_native.frame_in(src, out, scale=1, ycbcr=True)") < 1 << 20
