"""Frames of every kind, in and out."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fuseengine.errors import (
    FrameError,
    SettingError,
    SizeMismatchError,
    UnknownNameError,
)
from fuseengine.runtime.frames import FrameAdapter, prepare_pair

LUMA = np.array([0.299, 0.587, 0.114])
TOP = {"uint8": 255, "uint16": 65535, "float32": 1, "float64": 1}


def frame(shape, dtype="uint8", seed=0):
    values = np.random.default_rng(seed).random(shape)
    if np.dtype(dtype).kind == "f":
        return values.astype(dtype)
    return np.rint(values * TOP[str(dtype)]).astype(dtype)


def buffers(adapter):
    shape = (1, adapter.planes, *adapter.padded)
    return np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)


def through(infrared, visible, channels="luma", multiple=8, **options):
    """What an engine whose model returns the visible image would do."""
    pair = prepare_pair(infrared, visible, **options)
    adapter = FrameAdapter(pair.size, channels, multiple)
    a, b = buffers(adapter)
    outputs = []
    for ir, vis in pair:
        adapter.load(ir, vis, a, b)
        assert np.isfinite(a).all() and np.isfinite(b).all()
        outputs.append(adapter.store(b, vis))
    return pair.restore(outputs)


class TestAdapter:
    @pytest.mark.parametrize(
        ("size", "multiple", "padded"),
        [((2, 2), 1, (2, 2)), ((480, 640), 16, (480, 640)), ((3, 65), 64, (64, 128))],
    )
    def test_padded(self, size, multiple, padded):
        assert FrameAdapter(size, "rgb", multiple).padded == padded

    @pytest.mark.parametrize("dtype", sorted(TOP))
    @pytest.mark.parametrize("channels", ["luma", "rgb"])
    @pytest.mark.parametrize("size", [(2, 2), (2, 17), (9, 2), (7, 31)])
    def test_load(self, dtype, channels, size):
        adapter = FrameAdapter(size, channels, 16)
        ir, vis = frame(size, dtype), frame((*size, 3), dtype, 1)
        a, b = buffers(adapter)
        adapter.load(ir, vis, a, b)
        pad = [(0, 0)] + [(0, p - n) for p, n in zip(adapter.padded, size, strict=True)]
        v = vis.astype(float) / TOP[dtype]
        v = (v @ LUMA)[None] if channels == "luma" else np.moveaxis(v, -1, 0)
        i = np.stack([ir.astype(float) / TOP[dtype]] * adapter.planes)
        np.testing.assert_allclose(a[0], np.pad(i, pad, mode="reflect"), rtol=0, atol=3e-7)
        np.testing.assert_allclose(b[0], np.pad(v, pad, mode="reflect"), rtol=0, atol=3e-7)

    @pytest.mark.parametrize("channels", ["luma", "rgb"])
    def test_any_memory_layout(self, channels):
        """Transposed, flipped, sliced, unaligned: as their contiguous copies."""
        base = frame((12, 10, 3), "float32")
        raw = np.zeros(base.nbytes + 1, np.uint8)
        unaligned = raw[1:].view(np.float32).reshape(base.shape)
        unaligned[:] = base
        views = [
            base.transpose(1, 0, 2),
            base[::-1],
            base[:, ::-1],
            base[::2, 1:],
            base[:, ::3],
            base[..., ::-1],
            np.asfortranarray(base),
            unaligned,
            np.broadcast_to(base[:1], (4, 10, 3)),
        ]
        for view in views:
            plain = np.array(view, order="C")
            adapter = FrameAdapter(view.shape[:2], channels, 8)
            got, expected = buffers(adapter), buffers(adapter)
            adapter.load(view[..., 0], view, *got)
            adapter.load(plain[..., 0], plain, *expected)
            np.testing.assert_array_equal(got, expected)
            fused = frame((1, adapter.planes, *adapter.padded), "float32", 5)
            result = adapter.store(fused, plain)
            np.testing.assert_array_equal(adapter.store(fused, view), result)
            whole = np.full((view.shape[1], view.shape[0], 6), np.nan, np.float32)
            out = whole.transpose(1, 0, 2)[..., ::2]
            assert adapter.store(fused, view, out=out) is out
            np.testing.assert_array_equal(out, result)
            assert np.isnan(whole[..., 1::2]).all()

    @pytest.mark.parametrize("channels", ["luma", "rgb"])
    def test_white_padding(self, channels):
        """The frame as with reflection, white beside it."""
        ir, vis = frame((5, 6)), frame((5, 6, 3), seed=1)
        adapter = FrameAdapter((5, 6), channels, 4, "white")
        plain = FrameAdapter((5, 6), channels, 4)
        assert adapter.padding == "white" and plain.padding == "reflect"
        loaded, expected = buffers(adapter), buffers(plain)
        adapter.load(ir, vis, *loaded)
        plain.load(ir, vis, *expected)
        for white, reflected in zip(loaded, expected, strict=True):
            np.testing.assert_array_equal(white[..., :5, :6], reflected[..., :5, :6])
            assert (white[..., 5:, :] == 1).all() and (white[..., 6:] == 1).all()
            assert not np.array_equal(white, reflected)

    def test_store_in_place(self):
        adapter = FrameAdapter((5, 7))
        vis = frame((5, 7, 3))
        fused = frame((1, 1, 5, 7), "float32")
        expected = adapter.store(fused, vis)
        assert adapter.store(fused, vis, out=vis) is vis
        np.testing.assert_array_equal(vis, expected)

    def test_gray_visible_and_rgb_model(self):
        adapter = FrameAdapter((5, 7), "rgb")
        fused = frame((3, 5, 7), "float32")
        got = adapter.store(fused, frame((5, 7)))
        exact = np.tensordot(LUMA, fused.astype(float), 1) * 255
        assert got.shape == (5, 7) and np.abs(got - exact).max() <= 0.501

    def test_unknown_padding(self):
        with pytest.raises(UnknownNameError, match="unknown padding 'black'"):
            FrameAdapter((4, 4), "luma", 4, "black")

    def test_refuses(self):
        with pytest.raises(SettingError, match="size: got 1x9, expected at least 2x2"):
            FrameAdapter((1, 9))
        with pytest.raises(SettingError, match="multiple: got 0"):
            FrameAdapter((4, 4), "luma", 0)
        with pytest.raises(UnknownNameError, match="Did you mean 'luma'"):
            FrameAdapter((4, 4), "lumma")
        adapter = FrameAdapter((4, 6), "luma", 8)
        a, b = buffers(adapter)
        ok = frame((4, 6))
        with pytest.raises(SizeMismatchError, match="visible frame: got 6x4, expected 4x6"):
            adapter.load(ok, frame((6, 4)), a, b)
        for bad in (ok.astype(np.int32), ok[..., None], ok[None], ok.astype(">u2")):
            with pytest.raises(FrameError, match=r"infrared frame: got .*expected \(H, W\)"):
                adapter.load(bad, ok, a, b)
        with pytest.raises(FrameError, match="visible buffer: got shape"):
            adapter.load(ok, ok, a, b[..., 1:])
        nan = ok.astype(np.float32) / 255
        nan[2, 3] = np.nan
        with pytest.raises(FrameError, match="NaN or infinity in 1 of 24 values"):
            adapter.load(nan, ok, a, b)
        with pytest.raises(FrameError, match="fused: got shape"):
            adapter.store(a[..., 1:], ok)
        with pytest.raises(FrameError, match="out: got uint16"):
            adapter.store(a, ok, out=ok.astype(np.uint16))
        with pytest.raises(SizeMismatchError):
            adapter.store(a, frame((5, 6)))


class TestRoundTrip:
    @given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=40)))
    def test_gray_is_exact(self, vis):
        np.testing.assert_array_equal(through(vis, vis), vis)

    @given(
        hnp.arrays(
            st.sampled_from([np.uint8, np.uint16]),
            st.tuples(st.integers(2, 20), st.integers(2, 20), st.just(3)),
        ),
        st.sampled_from(["luma", "rgb"]),
    )
    def test_colour_is_exact(self, vis, channels):
        np.testing.assert_array_equal(through(vis[..., 0], vis, channels), vis)

    @given(
        hnp.arrays(np.uint8, (6, 9, 3), elements=st.integers(80, 175)),
        hnp.arrays(np.float32, (6, 9), elements=st.floats(0.3125, 0.6875, width=32)),
    )
    def test_chroma_is_kept(self, vis, fused):
        """Away from the gamut's border Cb and Cr stay, and luma is the fused one."""
        adapter = FrameAdapter((6, 9))
        out = adapter.store(fused[None, None], vis).astype(float)
        shift = out - vis
        # One number is added to all three channels; they differ by rounding alone.
        assert np.ptp(shift, axis=-1).max() <= 1
        luma, before = out @ LUMA, vis @ LUMA
        assert np.abs(luma - fused * 255).max() <= 0.51
        for channel, divisor in ((2, 1.772), (0, 1.402)):  # Cb, Cr
            new, old = (out[..., channel] - luma), (vis[..., channel] - before)
            assert np.abs(new - old).max() / divisor <= 1.0

    def test_equals_an_exchange_of_y_in_ycbcr(self):
        rng = np.random.default_rng(0)
        vis, fused = rng.uniform(0.4, 0.6, (8, 9, 3)), rng.uniform(0.45, 0.55, (8, 9))
        fused = fused.astype(np.float32).astype(float)
        y = vis @ LUMA
        cb, cr = (vis[..., 2] - y) / 1.772, (vis[..., 0] - y) / 1.402
        red, blue = fused + 1.402 * cr, fused + 1.772 * cb
        green = (fused - LUMA[0] * red - LUMA[2] * blue) / LUMA[1]
        got = FrameAdapter((8, 9)).store(fused.astype(np.float32)[None, None], vis)
        np.testing.assert_allclose(got, np.stack([red, green, blue], -1), rtol=0, atol=1e-15)

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_floats(self, dtype):
        vis = frame((5, 9, 3), dtype)
        got = through(vis[..., 1], vis)
        assert got.dtype == vis.dtype
        np.testing.assert_allclose(got, vis, rtol=0, atol=1e-3 if dtype == "float16" else 5e-7)


class TestPreparePair:
    @pytest.mark.parametrize(
        ("ir", "vis", "count"),
        [
            ((4, 6), (4, 6), 1),
            ((4, 6, 1), (4, 6, 1), 1),
            ((4, 6, 3), (4, 6), 1),
            ((4, 6), (4, 6, 3), 1),
            ((5, 4, 6), (5, 4, 6, 3), 5),
            ((5, 4, 6, 3), (5, 4, 6), 5),
            ((2, 4, 6, 1), (2, 4, 6, 1), 2),
            ((1, 4, 6), (1, 4, 6), 1),
            ((1, 4, 6), (4, 6, 3), 1),
        ],
    )
    def test_shapes(self, ir, vis, count):
        infrared, visible = frame(ir), frame(vis, seed=1)
        pair = prepare_pair(infrared, visible)
        assert (len(pair), pair.size) == (count, (4, 6))
        for a, b in pair:
            assert a.shape[:2] == b.shape[:2] == (4, 6)
        result = through(infrared, visible)
        assert result.shape == vis
        np.testing.assert_array_equal(result, visible)

    def test_batches_keep_their_order(self):
        ir, vis = frame((3, 4, 6)), frame((3, 4, 6, 3), seed=1)
        for i, (a, b) in enumerate(prepare_pair(ir, vis)):
            np.testing.assert_array_equal(a, ir[i])
            np.testing.assert_array_equal(b, vis[i])

    def test_no_copy_of_plain_frames(self):
        ir, vis = frame((4, 6)), frame((8, 12, 3))[2:6, 3:9]
        ((a, b),) = prepare_pair(ir, vis)
        assert np.shares_memory(a, ir) and np.shares_memory(b, vis)

    def test_three_equal_infrared_channels_are_one(self):
        ir, vis = frame((4, 6)), frame((4, 6))
        adapter = FrameAdapter((4, 6))
        one, three = buffers(adapter), buffers(adapter)
        adapter.load(ir, vis, *one)
        adapter.load(np.stack([ir] * 3, -1), vis, *three)
        np.testing.assert_allclose(three[0], one[0], rtol=0, atol=2e-7)

    @pytest.mark.parametrize("dtype", [">u2", ">f4", ">f8", "<u2"])
    def test_byte_order(self, dtype):
        values = np.rint(frame((4, 6, 3), "float64") * 1000)
        if dtype[1] == "f":
            values = np.rint(values / 1000 * 64) / 64
        vis = values.astype(dtype)
        got = through(vis[..., 0], vis)
        assert got.dtype == vis.dtype
        np.testing.assert_allclose(got, vis, rtol=0, atol=1e-6)

    def test_infrared_range(self):
        counts = np.array([[29000, 30000], [30100, 30400]], np.uint16)
        vis = frame((2, 2))
        ((ir, _),) = prepare_pair(counts, vis, infrared_range=(30000, 30400))
        np.testing.assert_allclose(ir, [[0, 0], [0.25, 1]], rtol=0, atol=1e-7)
        ((ir, _),) = prepare_pair(counts, vis, infrared_range="minmax")
        np.testing.assert_allclose(ir, (counts - 29000.0) / 1400, rtol=0, atol=1e-6)
        celsius = np.array([[-20.0, 0.0], [20.0, 60.0]])
        ((ir, _),) = prepare_pair(celsius, vis, infrared_range="minmax")
        np.testing.assert_allclose(ir, [[0, 0.25], [0.5, 1]], rtol=0, atol=1e-7)
        ((ir, _),) = prepare_pair(np.full((2, 2), 7, np.uint8), vis, infrared_range="minmax")
        np.testing.assert_array_equal(ir, 0)
        both = np.stack([counts, counts // 2])[..., None]
        for ir, _ in prepare_pair(both, both * 0, infrared_range="minmax"):
            assert (ir.min(), ir.max()) == (0, 1)  # each frame by itself
        gray3 = np.stack([counts] * 3, -1)
        ((ir, _),) = prepare_pair(gray3, vis, infrared_range=(30000, 30400))
        np.testing.assert_allclose(ir, [[0, 0], [0.25, 1]], rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        "bad", ["max", (1, 1), (2, 1), (0, np.nan), (0, np.inf), (1,), 5, (0, "b")]
    )
    def test_infrared_range_refused(self, bad):
        with pytest.raises(SettingError, match="infrared_range: got"):
            prepare_pair(frame((4, 6)), frame((4, 6)), infrared_range=bad)

    @pytest.mark.parametrize("dtype", sorted(TOP))
    @pytest.mark.parametrize("colour", [False, True])
    def test_resize(self, dtype, colour):
        """Halving a plane that rises evenly, and 16 bits survive."""
        rows, columns = np.mgrid[0:8, 0:12].astype(float)
        plane = (0.2 + 0.04 * rows + 0.02 * columns) * TOP[dtype]
        ir = np.stack([plane] * 3, -1) if colour else plane
        ir = (np.rint(ir) if TOP[dtype] > 1 else ir).astype(dtype)
        pair = prepare_pair(ir, frame((4, 6, 3)), resize="infrared")
        ((got, vis),) = pair
        assert pair.size == got.shape[:2] == vis.shape[:2] == (4, 6)
        assert got.dtype == ir.dtype and got.ndim == ir.ndim
        expected = ir.astype(float).reshape(4, 2, 6, 2, -1).mean((1, 3)).reshape(got.shape)
        inner = np.s_[1:-1, 1:-1]  # Pillow's triangle is cut off at the border
        tolerance = 1.01 if TOP[dtype] > 1 else 1e-6
        np.testing.assert_allclose(got[inner], expected[inner], rtol=0, atol=tolerance)

    def test_resize_up_equals_pillow(self):
        ir = frame((5, 7))
        ((got, _),) = prepare_pair(ir, frame((9, 15)), resize="infrared")
        expected = Image.fromarray(ir).resize((15, 9), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(got, np.asarray(expected))

    def test_sizes_differ(self):
        with pytest.raises(
            SizeMismatchError, match=r"infrared 4x6 and visible 8x12.*resize='infrared'"
        ):
            prepare_pair(frame((4, 6)), frame((8, 12, 3)))
        with pytest.raises(SettingError, match="resize: got 'visible'"):
            prepare_pair(frame((4, 6)), frame((8, 12, 3)), resize="visible")

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((6,), "got 1 dimensions"),
            ((), "got 0 dimensions"),
            ((2, 2, 4, 6, 3), "got 5 dimensions"),
            ((4, 6, 2), r"got 2 channels .*drop it with frame\[\.\.\., :1\]"),
            ((4, 6, 4), r"got 4 channels .*drop it with frame\[\.\.\., :3\]"),
            ((5, 4, 6, 4), "got 4 channels"),
            ((5, 3, 4, 6), "got 6 channels .*move the channels"),
            ((0, 6), "got 0x6 pixels"),
            ((4, 0), "got 4x0 pixels"),
            ((1, 6), "got 1x6 pixels .*at least 2x2"),
            ((4, 1), "got 4x1 pixels"),
            ((1, 6, 3), "got 1x6 pixels"),
            ((0, 4, 6), "got an empty batch"),
        ],
    )
    def test_shapes_refused(self, shape, message):
        for infrared, visible in [
            (np.zeros(shape, np.uint8), frame((4, 6))),
            (frame((4, 6)), np.zeros(shape, np.uint8)),
        ]:
            with pytest.raises(FrameError, match=message):
                prepare_pair(infrared, visible)

    def test_counts_differ(self):
        with pytest.raises(FrameError, match="got 1 infrared and 5 visible frames"):
            prepare_pair(frame((4, 6)), frame((5, 4, 6)))
        with pytest.raises(FrameError, match="move the channels of a .* array to the end"):
            prepare_pair(frame((1, 4, 6)), frame((3, 4, 6)))  # channels first

    @pytest.mark.parametrize(
        ("dtype", "remedy"),
        [
            ("int32", "uint16"),
            ("int8", "uint16"),
            ("bool", "255"),
            ("complex64", "magnitude"),
            ("object", "float32"),
        ],
    )
    def test_dtypes_refused(self, dtype, remedy):
        with pytest.raises(FrameError, match=f"visible: got dtype {dtype}, expected .*{remedy}"):
            prepare_pair(frame((4, 6)), np.zeros((4, 6), dtype))

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, dtype, value):
        ok, bad = frame((2, 4, 6), dtype), frame((2, 4, 6), dtype)
        bad[1, 3, 5] = value
        with pytest.raises(FrameError, match="infrared frame: got NaN or infinity in 1 of 24"):
            prepare_pair(bad, ok)
        with pytest.raises(FrameError, match="visible frame: got NaN or infinity in 1 of 24"):
            prepare_pair(ok, bad)
        for choice in ("minmax", (0, 1)):
            with pytest.raises(FrameError, match="infrared frame: got NaN"):
                prepare_pair(bad, ok, infrared_range=choice)

    def test_float_range(self):
        ok = frame((4, 6), "float32")
        for bad in (ok * 255, ok - 0.5):
            with pytest.raises(FrameError, match="visible: got floats from .* expected 0 to 1"):
                prepare_pair(ok, bad)
            with pytest.raises(FrameError, match=r"pass infrared_range=\(lo, hi\)"):
                prepare_pair(bad, ok)
        nearly = np.linspace(-9e-4, 1 + 9e-4, 24, dtype=np.float32).reshape(4, 6)
        np.testing.assert_array_equal(through(nearly, nearly), np.clip(nearly, 0, 1))

    def test_other_things_are_refused(self):
        for bad in (None, "frame.png", [[1, 2], [3, 4]], 5):
            with pytest.raises(FrameError, match="expected a NumPy array, a torch tensor"):
                prepare_pair(bad, frame((4, 6)))

    def test_restore_counts(self):
        pair = prepare_pair(frame((2, 4, 6)), frame((2, 4, 6)))
        with pytest.raises(FrameError, match="got 1 frames, expected 2"):
            pair.restore([frame((4, 6))])


class TestOtherLibraries:
    def test_dlpack(self):
        class Foreign:
            def __init__(self, array):
                self.array = array

            def __dlpack__(self, **options):
                return self.array.__dlpack__(**options)

            def __dlpack_device__(self):
                return self.array.__dlpack_device__()

        ir, vis = frame((4, 6)), frame((4, 6, 3))
        got = through(Foreign(ir), Foreign(vis))
        assert type(got) is np.ndarray
        np.testing.assert_array_equal(got, vis)

    def test_dlpack_refused(self):
        class OnDevice:
            def __dlpack__(self, **options):
                raise BufferError("lives elsewhere")

            def __dlpack_device__(self):
                return (2, 0)

        with pytest.raises(FrameError, match="got a OnDevice that NumPy cannot read"):
            prepare_pair(frame((4, 6)), OnDevice())

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
    @pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (2, 4, 6, 3), (4, 6, 1)])
    def test_torch_in_torch_out(self, dtype, shape):
        torch = pytest.importorskip("torch")
        vis = frame(shape, "float64" if dtype[0] == "f" else dtype).astype(dtype)
        tensor = torch.from_numpy(vis.copy())
        got = through(vis if shape[-1] != 3 else vis[..., 0], tensor)
        assert isinstance(got, torch.Tensor)
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        np.testing.assert_allclose(got.numpy().astype(float), vis.astype(float), rtol=0, atol=1e-3)
        assert isinstance(through(tensor, vis), np.ndarray)  # the visible input decides

    def test_torch_strided_and_tracked(self):
        torch = pytest.importorskip("torch")
        chw = torch.rand(3, 4, 6, requires_grad=True)
        got = through(frame((4, 6)), chw.permute(1, 2, 0))
        np.testing.assert_allclose(got, chw.detach().permute(1, 2, 0), rtol=0, atol=5e-7)

    def test_torch_refused(self):
        torch = pytest.importorskip("torch")
        with pytest.raises(FrameError, match="bfloat16 tensor that NumPy cannot see"):
            prepare_pair(frame((4, 6)), torch.zeros(4, 6, dtype=torch.bfloat16))
        with pytest.raises(FrameError, match=r"tensor on meta, expected the CPU; call \.cpu\(\)"):
            prepare_pair(frame((4, 6)), torch.zeros(4, 6, device="meta"))

    def test_no_torch_is_imported(self):
        code = (
            "import sys, numpy as np\n"
            "from fuseengine.runtime import frames, images, random\n"
            "frames.prepare_pair(np.zeros((4, 6)), np.zeros((4, 6)))\n"
            "assert 'torch' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
