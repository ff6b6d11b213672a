"""Frame ops: references by hand and against NumPy; CPU op and Triton's interpreter against them."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from torch import library as torch_library

from fuseengine.errors import SettingError, UnknownNameError
from fuseengine.kernels import (
    crop,
    frame_in,
    frame_in_reference,
    frame_out,
    frame_out_reference,
    pad_reflect,
    pad_reflect_reference,
    rgb_to_ycbcr,
    rgb_to_ycbcr_reference,
    ycbcr_to_rgb,
    ycbcr_to_rgb_reference,
)
from tests.kernels.tolerance import within

IN = "fuseengine.kernels.frames:launch_in"
OUT = "fuseengine.kernels.frames:launch_out"
PAD = "fuseengine.kernels.pad_reflect:launch"
YCBCR = "fuseengine.kernels.ycbcr:launch"
FULL = {torch.uint8: 255, torch.uint16: 65535}
FRAMES = [torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.float32, torch.float64]
HALF = [torch.float16, torch.bfloat16]
CHANNELS = ["luma", "rgb", "ycbcr"]
TILE = {"rows": 4, "columns": 16, "num_warps": 4}
# Frame and size of the planes: one pixel, odd sizes, several mirror images, whole words of pixels
# with and without padding to the right.
SIZES = [
    ((1, 1, 1), (1, 1)),
    ((1, 1, 1), (3, 5)),
    ((2, 5, 7), (6, 8)),
    ((1, 3, 2), (11, 13)),
    ((2, 6, 16), (6, 16)),
    ((1, 9, 32), (16, 40)),
    ((1, 2, 20), (4, 20)),
]


def drawn(shape, dtype, seed=0):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * FULL[dtype]).round().to(dtype) if dtype in FULL else values.to(dtype)


def scale_of(dtype):
    return 1 / FULL.get(dtype, 1)


def assert_frames_agree(found, exact):
    """An integer is the nearest one, except where float32 cannot tell; a float rounds once."""
    assert found.shape == exact.shape
    if found.dtype in FULL:
        slack = 1e-4 if found.dtype == torch.uint8 else 0.02
        assert (found.double() - exact).abs().max() <= 0.5 + slack
    else:
        eps = torch.finfo(found.dtype).eps
        assert (found.double() - exact).abs().max() <= max(eps, 4e-7 * (eps > 1e-10))


class TestFrameIn:
    def test_by_hand(self):
        frame = torch.tensor([[[[255, 0, 0], [10, 20, 30]]]], dtype=torch.uint8)
        rgb = frame_in(frame, "rgb", size=(1, 3))
        assert rgb.shape == (1, 3, 1, 3)
        np.testing.assert_allclose(rgb[0, :, 0, 1], np.array([10, 20, 30]) / 255, rtol=1e-6)
        assert torch.equal(rgb[..., 2], rgb[..., 0])  # the edge pixel is not repeated
        luma = frame_in(frame)
        np.testing.assert_allclose(luma.flatten(), [0.299, 18.15 / 255], rtol=1e-6)
        ycbcr = frame_in(frame, "ycbcr")[0, :, 0, 0]
        np.testing.assert_allclose(ycbcr, [0.299, 0.5 - 0.299 / 1.772, 1.0], rtol=1e-6)
        gray = torch.tensor([[[1000, 3000]]], dtype=torch.uint16)
        thermal = frame_in(gray, low=2000, scale=1 / 4000)
        assert thermal.flatten().tolist() == [0.0, 0.25]
        assert frame_in(gray, "ycbcr").flatten(1).shape == (1, 6)

    @pytest.mark.parametrize("channels", CHANNELS)
    @pytest.mark.parametrize("dtype", FRAMES)
    @pytest.mark.parametrize(("shape", "size"), SIZES)
    def test_values(self, shape, size, dtype, channels):
        for tail in ((3,), (), (1,)):
            frame = drawn((*shape, *tail), dtype)
            found = frame_in(frame, channels, size=size)
            given = (frame, channels, *size, 0.0, scale_of(dtype))
            exact = frame_in_reference(*given, torch.float64)
            assert found.dtype == torch.float32 and found.is_contiguous()
            assert found.shape == (shape[0], 1 if channels == "luma" else 3, *size)
            within(found, exact, frame_in_reference(*given, torch.float32))

    @pytest.mark.parametrize("channels", CHANNELS)
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float16])
    @pytest.mark.parametrize(("shape", "size"), SIZES)
    def test_interpreted(self, interpreted, shape, size, dtype, channels):
        for tail in ((3,), ()):
            frame = drawn((*shape, *tail), dtype)
            given = (frame, channels, *size, 0.0, scale_of(dtype))
            options = {"capability": 87, "settings": TILE}
            found = interpreted(IN, *given, torch.float32, **options)
            exact = frame_in_reference(*given, torch.float64)
            within(found, exact, frame_in_reference(*given, torch.float32))

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 4, 32, 3), (1, 4, 5)])
    def test_half_planes(self, interpreted, shape, dtype):
        frame = drawn(shape, torch.uint8)
        given = (frame, "luma", 6, 40, 0.0, 1 / 255)
        exact = frame_in_reference(*given, torch.float64)
        plain = frame_in_reference(*given, dtype)
        found = frame_in(frame, size=(6, 40), dtype=dtype)
        assert found.dtype == dtype
        within(found, exact, plain)
        # The interpreter cuts bfloat16 off instead of rounding it.
        within(interpreted(IN, *given, dtype, capability=90), exact, plain, floor=8)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
    def test_strided(self, interpreted, dtype):
        """Slices with whole words, with odd offsets, and what has to be copied."""
        frame = drawn((2, 12, 40, 3), dtype)
        views = {
            "words": frame[:, 2:, 4:36],
            "odd": frame[1:, :, 3:],
            "rows": frame[:, ::3],
            "columns": frame[:, :, ::2],
            "turned": frame.transpose(1, 2),
            "channels": frame[..., [2, 1, 0]].transpose(2, 3).contiguous().transpose(2, 3),
            "one row": frame[:, 4:5, 8:24],
            "repeated": frame[:, :1].expand(-1, 5, -1, -1),
            "gray": frame[..., 1],
        }
        for name, view in views.items():
            for channels in ("luma", "rgb"):
                options = {"low": 3.0, "scale": 0.004}
                found = frame_in(view, channels, **options)
                expected = frame_in(
                    view.clone(memory_format=torch.contiguous_format), channels, **options
                )
                assert torch.equal(found, expected), name
                given = (view, channels, *view.shape[1:3], 3.0, 0.004, torch.float32)
                triton = interpreted(IN, *given, capability=87, settings=TILE)
                torch.testing.assert_close(triton, expected, rtol=0, atol=2e-7, msg=name)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_not_finite(self, interpreted, dtype):
        values = [np.nan, np.inf, -np.inf, 2.0, -1.0, 0.5]
        gray = torch.tensor([[values]], dtype=dtype)
        expected = [0, 1, 0, 1, 0, 0.5]
        given = (gray, "luma", 1, 6, 0.0, 1.0, torch.float32)
        assert frame_in(gray).flatten().tolist() == expected
        assert frame_in_reference(*given).flatten().tolist() == expected
        if dtype != torch.float64:
            assert interpreted(IN, *given, capability=87).flatten().tolist() == expected
        colour = gray[..., None].expand(-1, -1, -1, 3)
        planes = frame_in(colour, "rgb")
        assert all(plane.flatten().tolist() == expected for plane in planes[0])
        assert torch.isfinite(frame_in(colour, "ycbcr")).all()

    def test_batches_and_inputs(self):
        frame = drawn((3, 4, 5, 3), torch.uint8)
        kept = frame.clone()
        whole = frame_in(frame, "rgb", size=(5, 6))
        for i in range(3):
            assert torch.equal(whole[i : i + 1], frame_in(frame[i : i + 1], "rgb", size=(5, 6)))
        assert torch.equal(frame, kept)
        assert frame_in(frame[:0]).shape == (0, 1, 4, 5)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
    @pytest.mark.parametrize("shape", [(1, 3, 4, 3), (2, 3, 4), (0, 2, 2, 1)])
    def test_opcheck(self, shape, dtype):
        frame = drawn(shape, dtype)
        for channels, out in zip(
            CHANNELS, (torch.float32, torch.float16, torch.float64), strict=True
        ):
            given = (frame, channels, 5, 6, 0.1, 0.01, out)
            torch_library.opcheck(torch.ops.fuse.frame_in, given)

    @pytest.mark.parametrize("channels", CHANNELS)
    def test_gradients(self, channels):
        frame = 0.1 + 0.8 * drawn((1, 2, 3, 3), torch.float64)
        options = {"size": (3, 7), "dtype": torch.float64}
        assert torch.autograd.gradcheck(
            lambda f: frame_in(f, channels, **options), frame.requires_grad_()
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"frame": torch.zeros(4, 5)}, r"frame \(4, 5\); expected \(N, H, W\)"),
            ({"frame": torch.zeros(1, 3, 4, 5)}, r"frame \(1, 3, 4, 5\); .*movedim\(1, -1\)"),
            ({"frame": torch.zeros(1, 0, 5)}, "at least one pixel"),
            ({"frame": torch.zeros(1, 2, 2, dtype=torch.int32)}, "int32; expected one of uint8"),
            ({"size": (3, 9)}, "size 3x9 for a picture of 4x5; expected no less"),
            ({"low": float("nan")}, "low=nan; expected a finite number"),
            ({"scale": float("inf")}, "scale=inf; expected a finite number"),
            ({"dtype": torch.uint8}, "dtype=torch.uint8; expected floating point"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(SettingError, match=message):
            frame_in(**{"frame": torch.zeros(1, 4, 5), **arguments})

    def test_unknown_channels(self):
        with pytest.raises(UnknownNameError, match="Did you mean 'luma'"):
            frame_in(torch.zeros(1, 4, 5), "lumma")


class TestFrameOut:
    def test_by_hand(self):
        fused = torch.tensor([0.5, 1.2, -1.0, float("nan"), 0.4999]).reshape(1, 1, 1, 5)
        assert frame_out(fused).flatten().tolist() == [128, 255, 0, 0, 127]  # ties up
        assert frame_out(fused, dtype=torch.uint16).flatten().tolist()[:2] == [32768, 65535]
        visible = torch.tensor([[[[10, 20, 30], [250, 100, 0]]]], dtype=torch.uint8)
        luma = torch.tensor([[18.15, 133.45]])
        shift = torch.tensor([[7.0, 6.0]])
        found = frame_out(((luma + shift) / 255)[None, None], visible)
        assert found.flatten().tolist() == [17, 27, 37, 255, 106, 6]

    @pytest.mark.parametrize("dtype", FRAMES)
    @pytest.mark.parametrize("planes", [1, 3])
    @pytest.mark.parametrize(("shape", "padded"), SIZES)
    def test_values(self, interpreted, shape, padded, planes, dtype):
        fused = drawn((shape[0], planes, *padded), torch.float32, seed=1) * 1.4 - 0.2
        for tail in ((3,), (), (1,), None):
            visible = None if tail is None else drawn((*shape, *tail), dtype)
            if visible is None:
                found = frame_out(fused, size=shape[1:], dtype=dtype)
            else:
                found = frame_out(fused, visible)
            given = (fused, visible, *shape[1:], dtype)
            # Before rounding: the reference of a floating point frame, in units of full scale.
            top = FULL.get(dtype, 1)
            wide = None if visible is None else visible.double() / top
            exact = frame_out_reference(fused.double(), wide, *shape[1:], torch.float64) * top
            assert found.dtype == dtype and found.is_contiguous()
            assert_frames_agree(found, exact)
            assert_frames_agree(frame_out_reference(*given), exact)
            if dtype in (torch.uint8, torch.uint16, torch.float32) and tail != (1,):
                triton = interpreted(OUT, *given, capability=87, settings=TILE)
                assert_frames_agree(triton, exact)

    @pytest.mark.parametrize("dtype", HALF)
    def test_half_planes(self, interpreted, dtype):
        visible = drawn((1, 5, 32, 3), torch.uint8)
        fused = drawn((1, 1, 8, 32), dtype, seed=1)
        exact = frame_out_reference(fused.double(), visible, 5, 32, torch.uint8)
        assert torch.equal(frame_out(fused, visible), exact)
        found = interpreted(OUT, fused, visible, 5, 32, torch.uint8, capability=87)
        assert torch.equal(found, exact)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
    @pytest.mark.parametrize("width", [20, 21])
    def test_a_frame_survives(self, interpreted, width, dtype):
        """In and out again, nothing between: every implementation gives the frame back."""
        frame = drawn((2, 7, width, 3), dtype)
        for channels in ("luma", "rgb"):
            planes = frame_in(frame, channels, size=(8, 24))
            assert torch.equal(frame_out(planes, frame), frame)
            given = (frame, channels, 8, 24, 0.0, scale_of(dtype), torch.float32)
            planes = interpreted(IN, *given, capability=87)
            found = interpreted(OUT, planes, frame, 7, width, dtype, capability=87)
            assert torch.equal(found, frame)

    def test_strided(self, interpreted):
        visible = drawn((2, 12, 40, 3), torch.uint8)
        fused = drawn((2, 2, 14, 44), torch.float32)[:, 1:]
        views = {
            "words": (fused[..., 4:], visible[:, 2:, 4:36]),
            "odd": (fused[:, :, 1:, 1:], visible[:, :, 3:]),
            "turned": (fused.transpose(2, 3), visible.transpose(1, 2)),
            "columns": (fused[..., ::2], visible[:, :, ::2]),
            "repeated": (fused, visible[:, :1].expand(-1, 5, -1, -1)),
        }
        for name, (planes, view) in views.items():
            expected = frame_out(planes.contiguous(), view.contiguous())
            assert torch.equal(frame_out(planes, view), expected), name
            given = (planes, view, *view.shape[1:3], torch.uint8)
            triton = interpreted(OUT, *given, capability=87, settings=TILE)
            assert (triton.int() - expected.int()).abs().max() <= 1, name
            assert (triton != expected).float().mean() < 0.01, name

    def test_extremes(self, interpreted):
        fused = torch.tensor([np.nan, np.inf, -np.inf, 0.5]).reshape(1, 1, 1, 4)
        visible = torch.full((1, 1, 4, 3), 100, dtype=torch.uint8)
        for found in (
            frame_out(fused, visible),
            frame_out_reference(fused, visible, 1, 4, torch.uint8),
            interpreted(OUT, fused, visible, 1, 4, torch.uint8, capability=87),
        ):
            assert found[0, 0, :, 1].tolist() == [0, 255, 0, 128]

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
    def test_opcheck(self, dtype):
        for planes in (1, 3):
            fused = drawn((2, planes, 5, 6), torch.float32)
            for tail in ((3,), (1,), (), None):
                visible = None if tail is None else drawn((2, 3, 4, *tail), dtype)
                given = (fused, visible, 3, 4, dtype)
                torch_library.opcheck(torch.ops.fuse.frame_out, given)

    def test_gradients(self):
        fused = (0.4 + 0.2 * drawn((1, 1, 3, 4), torch.float64)).requires_grad_()
        visible = (0.4 + 0.2 * drawn((1, 2, 3, 3), torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(frame_out, (fused, visible))
        assert frame_out(fused.float(), size=(2, 2), dtype=torch.float32).requires_grad

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"fused": torch.zeros(1, 2, 4, 5)}, r"fused \(1, 2, 4, 5\).*expected \(N, 1 or 3"),
            ({"fused": torch.zeros(1, 1, 4, 5).byte()}, "uint8; expected .* floating point"),
            ({"fused": torch.zeros(1, 1, 0, 5)}, "at least one pixel"),
            ({"visible": torch.zeros(2, 4, 5)}, "expected as many pictures on one device"),
            ({"visible": torch.zeros(1, 4, 6)}, "size 4x6 from planes of 4x5"),
            ({"visible": torch.zeros(4, 5)}, r"visible \(4, 5\); expected"),
            ({"visible": torch.zeros(1, 4, 5), "size": (2, 2)}, "with a visible frame; expected"),
            ({"size": (0, 3)}, "size 0x3 from planes of 4x5"),
            ({"dtype": torch.int64}, "dtype=torch.int64; expected one of uint8"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(SettingError, match=message):
            frame_out(**{"fused": torch.zeros(1, 1, 4, 5), **arguments})


class TestYcbcr:
    def test_by_hand(self):
        """BT.601's corners: white, black, the primaries."""
        colours = [[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
        x = torch.tensor(colours, dtype=torch.float64).T.reshape(1, 3, 1, 5)
        y, cb, cr = rgb_to_ycbcr(x)[0, :, 0]
        np.testing.assert_allclose(y, [1, 0, 0.299, 0.587, 0.114])
        np.testing.assert_allclose(cb, [0.5, 0.5, 0.5 - 0.299 / 1.772, 0.5 - 0.587 / 1.772, 1.0])
        np.testing.assert_allclose(cr, [0.5, 0.5, 1.0, 0.5 - 0.587 / 1.402, 0.5 - 0.114 / 1.402])
        torch.testing.assert_close(ycbcr_to_rgb(rgb_to_ycbcr(x)), x, rtol=0, atol=1e-15)

    def test_opencv_agrees(self):
        cv2 = pytest.importorskip("cv2")
        x = drawn((1, 3, 5, 7), torch.float32)
        theirs = cv2.cvtColor(x[0].permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2YCrCb)
        y, cb, cr = rgb_to_ycbcr(x)[0]
        for ours, plane in ((y, 0), (cr, 1), (cb, 2)):
            # OpenCV has 0.713 and 0.564 for 1 / 1.402 and 1 / 1.772.
            np.testing.assert_allclose(ours, theirs[..., plane], rtol=0, atol=4e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
    @pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 5, 7), (1, 3, 33, 40), (0, 3, 2, 2)])
    def test_values(self, interpreted, shape, dtype):
        x = drawn(shape, dtype) * 2 - 0.5
        for ours, reference, inverse in (
            (rgb_to_ycbcr, rgb_to_ycbcr_reference, False),
            (ycbcr_to_rgb, ycbcr_to_rgb_reference, True),
        ):
            found = ours(x)
            exact, plain = reference(x.double()), reference(x)
            assert found.dtype == dtype and found.is_contiguous()
            within(found, exact, plain)
            if dtype != torch.float64:
                triton = interpreted(YCBCR, x, inverse=inverse, capability=87)
                within(triton, exact, plain, floor=8 if dtype == torch.bfloat16 else 4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_inverse(self, dtype):
        x = drawn((1, 3, 30, 40), dtype) * 3 - 1
        back = ycbcr_to_rgb(rgb_to_ycbcr(x))
        torch.testing.assert_close(back, x, rtol=0, atol=8 * torch.finfo(dtype).eps)

    def test_strided(self, interpreted):
        x = drawn((2, 5, 10, 12), torch.float32)
        for view in (x[:, 1:4], x[:, :3, ::2, 1:], x[:, 2:].transpose(2, 3), x[1:, :3, :1]):
            expected = rgb_to_ycbcr_reference(view)
            torch.testing.assert_close(rgb_to_ycbcr(view), expected, rtol=0, atol=2e-7)
            triton = interpreted(YCBCR, view, inverse=False, capability=87)
            torch.testing.assert_close(triton, expected, rtol=0, atol=2e-7)

    def test_what_is_not_finite_stays_in_its_pixel(self, interpreted):
        x = drawn((1, 3, 1, 4), torch.float32)
        x[0, 1, 0, 2] = float("nan")
        for y in (rgb_to_ycbcr(x), interpreted(YCBCR, x, inverse=False, capability=87)):
            assert torch.isfinite(y).all(1).flatten().tolist() == [True, True, False, True]

    @pytest.mark.parametrize("op", [torch.ops.fuse.rgb_to_ycbcr, torch.ops.fuse.ycbcr_to_rgb])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_opcheck(self, op, dtype):
        for x in (drawn((1, 3, 2, 5), dtype), drawn((2, 3, 4, 3), dtype).transpose(2, 3)):
            torch_library.opcheck(op, (x,))

    def test_gradients(self):
        x = drawn((1, 3, 2, 2), torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(rgb_to_ycbcr, x)
        assert torch.autograd.gradcheck(ycbcr_to_rgb, x)

    @pytest.mark.parametrize("ours", [rgb_to_ycbcr, ycbcr_to_rgb])
    def test_bad_input(self, ours):
        for bad in (torch.zeros(3, 4, 5), torch.zeros(1, 1, 4, 5), torch.zeros(1, 3, 4, 5).int()):
            with pytest.raises(SettingError, match=r"x \(.*expected \(N, 3, H, W\)"):
                ours(bad)


class TestPadReflect:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
    @pytest.mark.parametrize(("shape", "size"), SIZES)
    def test_is_that_of_numpy(self, interpreted, shape, size, dtype):
        x = drawn((shape[0], 2, *shape[1:]), dtype)
        pad = [(0, 0), (0, 0), *((0, b - a) for a, b in zip(shape[1:], size, strict=True))]
        expected = torch.from_numpy(np.pad(x.double().numpy(), pad, mode="reflect")).to(dtype)
        found = pad_reflect(x, *size)
        assert found.is_contiguous() and torch.equal(found, expected)
        assert torch.equal(pad_reflect_reference(x, *size), expected)
        assert torch.equal(crop(found, *shape[1:]), x)
        if dtype != torch.float64:
            triton = interpreted(PAD, x, *size, capability=87, settings=TILE)
            assert torch.equal(triton, expected)

    def test_strided(self, interpreted):
        x = drawn((2, 3, 10, 12), torch.float32)
        for view in (x[:, 1:2], x[..., ::2, 1:], x.transpose(2, 3), x[:, :, :, 3:4]):
            expected = pad_reflect_reference(view, 14, 15)
            assert torch.equal(pad_reflect(view, 14, 15), expected)
            assert torch.equal(interpreted(PAD, view, 14, 15, capability=87), expected)

    def test_opcheck_and_gradients(self):
        for dtype in (torch.float32, torch.float64):
            x = drawn((1, 2, 3, 4), dtype)
            torch_library.opcheck(torch.ops.fuse.pad_reflect, (x, 3, 9))
        assert torch.autograd.gradcheck(lambda t: pad_reflect(t, 7, 11), x.requires_grad_())

    def test_crop_is_a_view(self):
        x = drawn((1, 2, 5, 6), torch.float32)
        assert crop(x, 3, 4).data_ptr() == x.data_ptr()
        for size in ((6, 6), (0, 3)):
            with pytest.raises(SettingError, match="from planes of 5x6; expected"):
                crop(x, *size)

    def test_bad_input(self):
        with pytest.raises(SettingError, match="size 2x9 for a picture of 3x4"):
            pad_reflect(torch.zeros(1, 1, 3, 4), 2, 9)
        for bad in (torch.zeros(3, 4), torch.zeros(1, 1, 3, 4).int(), torch.zeros(1, 1, 0, 4)):
            with pytest.raises(SettingError, match="expected .*with at least one pixel, floating"):
                pad_reflect(bad, 9, 9)


def test_ops_are_seen_through_by_a_tracer():
    """torch.fx keeps each function as one call."""

    def model(frame):
        planes = pad_reflect(ycbcr_to_rgb(rgb_to_ycbcr(frame_in(frame, "rgb"))), 8, 8)
        return frame_out(crop(planes, 4, 4), frame)

    calls = [
        n.target for n in torch.fx.symbolic_trace(model).graph.nodes if n.op == "call_function"
    ]
    expected = [frame_in, rgb_to_ycbcr, ycbcr_to_rgb, pad_reflect, crop, frame_out]
    assert calls == expected


@pytest.mark.parametrize("capability", [87, 90])
def test_compiled_for_a_gpu(capability, monkeypatch, tmp_path):
    """Nothing is spilled or goes through shared memory; planes move in 128 bits."""
    pytest.importorskip("triton")
    from fuseengine.kernels import aot

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    frames = importlib.import_module("fuseengine.kernels.frames")
    colour = torch.empty((1, 480, 640, 3), dtype=torch.uint8, device="meta")
    planes = torch.empty((1, 1, 480, 640), device="meta")
    launches = {
        "frame_in": frames.plan_in(colour, planes, "luma", 0.0, 0.5, capability=capability),
        "frame_out": frames.plan_out(planes, colour, colour.clone(), capability=capability),
    }
    found = {}
    for op, plan in launches.items():
        assert plan[0].constants["WORDS"]
        monkeypatch.setitem(aot.OPS, op, lambda *_, plan=plan: plan)  # one of the op's forms
        found[op] = aot.compile(op, torch.float32, capability)[0].resources()
    assert all(r.spill_bytes == 0 and r.shared_bytes == 0 for r in found.values())
    assert found["frame_in"].stores_128 == found["frame_in"].stores > 0
    assert found["frame_out"].loads_128 > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
class TestOnGpu:
    """The compiled kernels against the native ones; a fused multiply-add may round a tie over."""

    SIZES = [*SIZES, ((2, 241, 322), (256, 336)), ((1, 480, 640), (480, 640))]

    @pytest.mark.parametrize("dtype", FRAMES)
    @pytest.mark.parametrize(("shape", "size"), SIZES)
    def test_in_and_out(self, shape, size, dtype):
        for tail in ((3,), ()):
            frame = drawn((*shape, *tail), dtype)
            for channels in CHANNELS:
                planes = frame_in(frame, channels, size=size)
                found = frame_in(frame.cuda(), channels, size=size)
                torch.testing.assert_close(found.cpu(), planes, rtol=0, atol=3e-7)
            for count in (1, 3):
                fused = drawn((shape[0], count, *size), torch.float32, seed=1) * 1.4 - 0.2
                expected, found = frame_out(fused, frame), frame_out(fused.cuda(), frame.cuda())
                step = 1.0 if dtype in FULL else 8 * torch.finfo(dtype).eps
                assert (found.cpu().double() - expected.double()).abs().max() <= step
                assert (
                    found.cpu().double() != expected.double()
                ).double().mean() < 0.02 or step < 1

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    @pytest.mark.parametrize(("shape", "size"), SIZES)
    def test_planes(self, shape, size, dtype):
        x = drawn((shape[0], 3, *shape[1:]), dtype)
        assert torch.equal(pad_reflect(x.cuda(), *size).cpu(), pad_reflect(x, *size))
        for ours in (rgb_to_ycbcr, ycbcr_to_rgb):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(ours(x.cuda()).cpu(), ours(x), rtol=0, atol=4 * eps)
