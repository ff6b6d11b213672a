"""Bilinear warp: against PyTorch's and OpenCV's, at the border, under Triton's interpreter."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import library as torch_library

from fuseengine.errors import SettingError, UnknownNameError
from fuseengine.kernels import warp, warp_reference
from tests.kernels.tolerance import within

WARP = "fuseengine.kernels.warp:launch"
BORDERS = ["zero", "clamp"]
HALF = [torch.float16, torch.bfloat16]
TILE = {"rows": 4, "columns": 16, "num_warps": 4}
TILTED = [[0.9, 0.15, 1.3], [-0.1, 1.05, -0.7], [4e-3, -7e-3, 1.0]]
# N, C, h, w and the output's H, W: one pixel, one row, one column, larger, smaller.
SHAPES = [
    ((1, 1, 1, 1), (3, 4)),
    ((1, 2, 1, 9), (5, 7)),
    ((2, 1, 8, 1), (7, 3)),
    ((2, 3, 6, 5), (9, 21)),
    ((1, 1, 20, 33), (6, 4)),
]


def drawn(shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=g, dtype=torch.float64).to(dtype)


def coordinates_for(kind, shape, size, seed=1):
    """A homography per picture, one for all, a map per picture or one for all; far outside too."""
    count = shape[0] if kind.endswith("each") else 1
    if kind.startswith("homography"):
        return torch.tensor(TILTED) + 0.02 * (drawn((count, 3, 3), seed=seed) - 0.5)
    reach = torch.tensor([shape[3] + 4.0, shape[2] + 4.0])
    return drawn((count, *size, 2), seed=seed) * reach - 2.5


def map_of(matrix, size):
    """(1, H, W, 2) that says what a homography does, in the matrix's dtype."""
    row, column = torch.meshgrid(
        *(torch.arange(n, dtype=matrix.dtype) for n in size), indexing="ij"
    )
    points = torch.stack([column, row, torch.ones_like(row)], -1) @ matrix.T
    return (points[..., :2] / points[..., 2:])[None]


def exactly(x, coordinates, size, border):
    return warp_reference(x.double(), coordinates.double(), *size, border)


class TestReference:
    @pytest.mark.parametrize(("border", "theirs"), [("zero", "zeros"), ("clamp", "border")])
    def test_is_grid_sample(self, border, theirs):
        x = drawn((2, 3, 6, 5), torch.float64)
        places = coordinates_for("map each", x.shape, (9, 21)).double()
        grid = 2 * places / torch.tensor([4.0, 5.0]) - 1
        expected = F.grid_sample(x, grid, padding_mode=theirs, align_corners=True)
        found = warp_reference(x, places, 9, 21, border)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)

    def test_identity_and_shift(self):
        x = drawn((1, 2, 5, 6), torch.float64)
        for border in BORDERS:
            torch.testing.assert_close(warp(x, torch.eye(3), border=border), x, rtol=0, atol=0)
        shift = torch.tensor([[1.0, 0, 2], [0, 1, -1], [0, 0, 1]])  # looks 2 right and 1 up
        found = warp(x, shift)
        assert torch.equal(found[..., 1:, :4], x[..., :4, 2:])
        assert not found[..., 0, :].any() and not found[..., 4:].any()
        clamped = warp(x, shift, border="clamp")
        assert torch.equal(clamped[..., 0, :4], x[..., 0, 2:])
        assert torch.equal(clamped[..., 1:, 5], x[..., :4, 5])

    def test_the_border_fades(self):
        """Zero border: half a pixel outside there is half of the border pixel, then nothing."""
        x = torch.ones(1, 1, 3, 4)
        places = torch.tensor([[-1.5, 1], [-1, 1], [-0.5, 1], [0, 1], [3, 1], [3.25, 1], [4, 1]])
        assert warp(x, places[None, None])[0, 0, 0].tolist() == [0, 0, 0.5, 1, 1, 0.75, 0]
        corner = torch.tensor([[-0.5, -0.5]])[None, None]
        assert warp(x, corner).item() == 0.25
        assert warp(x, corner, border="clamp").item() == 1.0

    def test_a_scaled_matrix_is_the_same_homography(self):
        x = drawn((1, 1, 9, 11))
        matrix = torch.tensor(TILTED)
        torch.testing.assert_close(warp(x, -3 * matrix), warp(x, matrix), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("border", BORDERS)
    def test_a_homography_is_its_map(self, border):
        x, matrix = drawn((1, 2, 9, 11), torch.float64), torch.tensor(TILTED).double()
        found = warp(x, matrix, (7, 13), border=border)
        torch.testing.assert_close(
            found, warp(x, map_of(matrix, (7, 13)), border=border), rtol=0, atol=1e-12
        )


class TestOp:
    @pytest.mark.parametrize("border", BORDERS)
    @pytest.mark.parametrize("kind", ["homography", "homography each", "map", "map each"])
    @pytest.mark.parametrize(("shape", "size"), SHAPES)
    def test_values(self, interpreted, shape, size, kind, border):
        x, places = drawn(shape), coordinates_for(kind, shape, size)
        found = warp(x, places, size, border=border)
        assert found.shape == (*shape[:2], *size) and found.is_contiguous()
        exact = exactly(x, places, size, border)
        plain = warp_reference(x, places, *size, border)
        floor = 4.0 * max(shape[2:])  # a place has the error of its size
        within(found, exact, plain, floor=floor)
        triton = interpreted(WARP, x, places, *size, border, capability=87, settings=TILE)
        within(triton, exact, plain, floor=floor)

    @pytest.mark.parametrize("kind", ["homography", "map each"])
    @pytest.mark.parametrize("dtype", [torch.float64, *HALF])
    def test_dtypes(self, interpreted, dtype, kind):
        x, places = drawn((2, 3, 9, 12), dtype), coordinates_for(kind, (2, 3, 9, 12), (8, 10))
        exact = exactly(x, places, (8, 10), "zero")
        found = warp(x, places, (8, 10))
        assert found.dtype == dtype
        assert (found - exact).abs().max() <= max(torch.finfo(dtype).eps, 1e-14)
        if dtype != torch.float64:
            triton = interpreted(WARP, x, places, 8, 10, "zero", capability=90)
            # The interpreter cuts bfloat16 off instead of rounding it.
            assert (triton - exact).abs().max() <= 2 * torch.finfo(dtype).eps
        assert torch.equal(warp(x, places.double(), (8, 10)), found)

    def test_opencv_agrees(self):
        cv2 = pytest.importorskip("cv2")
        x, matrix = drawn((1, 1, 60, 80)), torch.tensor(TILTED).double()
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        theirs = cv2.warpPerspective(x[0, 0].numpy(), matrix.numpy(), (70, 50), flags=flags)
        # OpenCV before 5 has weights in steps of 1/32.
        np.testing.assert_allclose(warp(x, matrix, (50, 70))[0, 0], theirs, rtol=0, atol=0.07)

    @pytest.mark.parametrize("border", BORDERS)
    def test_places_that_are_no_places(self, interpreted, border):
        x = 1 + drawn((1, 1, 4, 5))
        numbers = [np.nan, np.inf, -np.inf, 3e38, -3e38]
        places = torch.tensor([[a, b] for a in numbers for b in (1.0, np.nan)])[None, None]
        found = warp(x, places, border=border)
        assert torch.equal(found, warp_reference(x, places, 1, 10, border))
        assert torch.equal(found, interpreted(WARP, x, places, 1, 10, border, capability=87))
        if border == "zero":
            assert not found.any()
        else:
            columns, rows = [0, 4, 0, 4, 0], [1, 0]
            expected = [x[0, 0, r, c].item() for c in columns for r in rows]
            assert found.flatten().tolist() == expected

    def test_the_horizon(self, interpreted):
        """Where w is 0 and beyond it nothing breaks, and all agree."""
        x = drawn((1, 1, 8, 8))
        matrix = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0.25, 0, -1]]])
        for border in BORDERS:
            found = warp(x, matrix, border=border)
            assert torch.isfinite(found).all()
            expected = warp_reference(x, matrix, 8, 8, border)
            triton = interpreted(WARP, x, matrix, 8, 8, border, capability=87)
            for result in (found, triton):
                torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)

    def test_strided(self, interpreted):
        x = drawn((2, 4, 12, 14))
        places = coordinates_for("map each", (2, 2, 10, 12), (5, 6))
        views = {
            "planes": x[:, 1:3],
            "rows": x[:, :2, ::2, 1:],
            "turned": x[:, :2].transpose(2, 3),
            "channels_last": x.to(memory_format=torch.channels_last),
            "repeated": x[:1].expand(2, -1, -1, -1),
        }
        turned = places.transpose(1, 2).contiguous().transpose(1, 2)
        for name, view in views.items():
            expected = warp_reference(view, places, 5, 6, "zero")
            torch.testing.assert_close(warp(view, turned), expected, rtol=0, atol=1e-6, msg=name)
            triton = interpreted(WARP, view, turned, 5, 6, "zero", capability=87)
            torch.testing.assert_close(triton, expected, rtol=0, atol=1e-6, msg=name)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
    @pytest.mark.parametrize("kind", ["homography", "map each"])
    def test_opcheck(self, kind, dtype):
        x, places = drawn((2, 1, 4, 5), dtype), coordinates_for(kind, (2, 1, 4, 5), (3, 6))
        torch_library.opcheck(torch.ops.fuse.warp, (x, places, 3, 6, "clamp"))
        torch_library.opcheck(torch.ops.fuse.warp, (x[:0], places[:1], 3, 6, "zero"))

    @pytest.mark.parametrize("border", BORDERS)
    def test_gradients(self, border):
        x = drawn((1, 2, 4, 5), torch.float64).requires_grad_()
        places = coordinates_for("map", (1, 2, 4, 5), (3, 4)).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda t, p: warp(t, p, border=border), (x, places))
        matrix = torch.tensor(TILTED, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda t, m: warp(t, m, border=border), (x, matrix))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"x": torch.zeros(4, 5)}, r"x \(4, 5\).*expected \(N, C, H, W\)"),
            ({"x": torch.zeros(1, 1, 4, 5).byte()}, "uint8; expected"),
            ({"x": torch.zeros(1, 1, 0, 5)}, "at least one pixel"),
            ({"coordinates": torch.zeros(2, 3)}, r"coordinates \(2, 3\); expected \(3, 3\)"),
            ({"coordinates": torch.zeros(2, 3, 3)}, r"coordinates \(2, 3, 3\).*N being 1"),
            ({"coordinates": torch.zeros(1, 4, 5, 3)}, r"\(1, 4, 5, 3\); expected"),
            ({"coordinates": torch.zeros(1, 0, 5, 2)}, r"\(1, 0, 5, 2\); expected"),
            ({"coordinates": torch.eye(3).half()}, "float16; expected float32 or float64"),
            ({"coordinates": torch.zeros(1, 4, 5, 2), "size": (4, 6)}, "size 4x6.*its own size"),
            ({"size": (0, 3)}, "size 0x3.*at least 1x1"),
            ({"x": torch.zeros(1, 1, 4, 5, device="meta")}, "x on meta, coordinates on cpu"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(SettingError, match=message):
            warp(**{"x": torch.zeros(1, 1, 4, 5), "coordinates": torch.eye(3), **arguments})

    def test_unknown_border(self):
        with pytest.raises(UnknownNameError, match="unknown border 'zeros'.*Did you mean 'zero'"):
            warp(torch.zeros(1, 1, 4, 5), torch.eye(3), border="zeros")


@pytest.mark.parametrize("capability", [87, 90])
def test_compiled_for_a_gpu(capability, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from fuseengine.kernels import aot

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plan = importlib.import_module("fuseengine.kernels.warp").plan
    x = torch.empty((1, 1, 480, 640), device="meta")
    for shape in ((1, 3, 3), (1, 480, 640, 2)):
        places = torch.empty(shape, device="meta")
        launches = plan(x, places, torch.empty_like(x), "clamp", capability=capability)
        monkeypatch.setitem(aot.OPS, "warp", lambda *_, given=launches: given)
        found = aot.compile("warp", torch.float32, capability)[0].resources()
        assert found.spill_bytes == found.shared_bytes == 0
        assert found.stores_128 == found.stores > 0
        assert found.occupancy >= 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("kind", ["homography each", "map each"])
@pytest.mark.parametrize(("shape", "size"), [*SHAPES, ((2, 3, 240, 321), (250, 300))])
def test_on_a_gpu(shape, size, kind, border):
    x, places = drawn(shape), coordinates_for(kind, shape, size)
    found = warp(x.cuda(), places.cuda(), size, border=border).cpu()
    exact = exactly(x, places, size, border)
    within(found, exact, warp_reference(x, places, *size, border), floor=16.0 * max(shape[2:]))
