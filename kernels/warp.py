"""Bilinear sampling of planes where a homography or a map says: registration, undistortion.

    out[n, c, y, x] = sum over i, j of hat(v - i) hat(u - j) in[n, c, i, j]
    hat(d) = max(0, 1 - |d|)
    homography:  (u, v) = ((m00 x + m01 y + m02) / w, (m10 x + m11 y + m12) / w),
                 w = m20 x + m21 y + m22
    map:         (u, v) = map[n, y, x]

(u, v) is the column and row of the input that pixel (x, y) of the output shows; pixel centres are
integers. The matrix goes from the output to the input, OpenCV's WARP_INVERSE_MAP (Hartley and
Zisserman, "Multiple View Geometry", 2003, section 2.3). At most four pixels have a weight. border:

    "zero"   pixels outside the input do not exist: out fades to 0 within one pixel of its border
             and is 0 beyond. A plane of ones, warped, says how much of each pixel is known.
    "clamp"  (u, v) is first moved to the nearest place inside: the border goes on for ever

A coordinate that is not a number is outside ("zero"), or 0 ("clamp"); w = 0 gives such ones, or
infinite ones. Input values have to be finite: a weight of 0 does not hide infinity.

Places and weights are float32: at column 2000 a place is right to some 1e-4 pixels. Half precision
values are rounded once. Traffic per output pixel and channel in float32: one read, if the map is no
enlargement, and one write, 8 bytes; a map costs 8 more per pixel, a homography nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fuseengine import _native
from fuseengine.errors import SettingError, UnknownNameError
from fuseengine.kernels._library import needs_reference, register
from fuseengine.kernels._planes import dense_rows, fits, span, tiles
from fuseengine.kernels._triton import Launch, device_capability, kernel, run, usable

if TYPE_CHECKING:
    import triton.language as tl

BORDERS = ("zero", "clamp")


def warp_reference(x: Tensor, coordinates: Tensor, height: int, width: int, border: str) -> Tensor:
    """The definition of :func:`warp`, differentiable in x and coordinates."""
    if coordinates.ndim == 4:
        u, v = coordinates.unbind(-1)
    else:
        options = {"dtype": coordinates.dtype, "device": coordinates.device}
        rows, columns = torch.arange(height, **options), torch.arange(width, **options)
        row, column = torch.meshgrid(rows, columns, indexing="ij")
        points = torch.stack([column, row, torch.ones_like(row)], -1)  # (H, W, 3)
        u, v, w = torch.einsum("nij,hwj->nhwi", coordinates, points).unbind(-1)
        u, v = u / w, v / w
    batch, channels, source_height, source_width = x.shape
    flat = x.flatten(2)
    out = torch.zeros((), dtype=x.dtype, device=x.device)
    for i, above in _pair(v, source_height, border):
        for j, beside in _pair(u, source_width, border):
            index = (i * source_width + j).expand(batch, -1, -1).flatten(1)[:, None]
            value = flat.gather(2, index.expand(-1, channels, -1))
            out = out + (above * beside)[:, None] * value.unflatten(2, (height, width))
    return out.to(x.dtype)


def _pair(place: Tensor, size: int, border: str) -> list[tuple[Tensor, Tensor]]:
    """Two neighbouring pixels of one axis and their weights, for each place."""
    low, high = (0, size - 1) if border == "clamp" else (-1, size)
    place = place.nan_to_num(nan=low, posinf=high, neginf=low).clamp(low, high)
    first = place.detach().floor().clamp(0, max(size - 2, 0))
    weights = ((1 - (place - i).abs()).clamp_min(0) for i in (first, first + 1))
    pixels = (first.long(), first.long() + 1)
    return [*zip(pixels, weights, strict=True)][: min(size, 2)]


def warp(
    x: Tensor,
    coordinates: Tensor,
    size: Sequence[int] | None = None,
    *,
    border: str = "zero",
) -> Tensor:
    """Planes as they look from elsewhere; see the module's docstring.

    With gradients, or in float64, the differentiable reference runs.

    Args:
        x: (N, C, h, w), floating point, at least one pixel and fewer than 2^31.
        coordinates: a homography, (3, 3), (1, 3, 3) or (N, 3, 3), from the output's pixels to x's;
            or a map, (1, H, W, 2) or (N, H, W, 2), column and row of x for each pixel of the
            output. float32 or float64, whatever x is: half precision cannot count pixels.
        size: (H, W) of the output; None: x's for a homography, the map's own for a map.
        border: "zero" or "clamp".

    Returns:
        (N, C, H, W), contiguous, x's dtype.

    Raises:
        SettingError: shapes, dtypes, devices or a size that do not go together.
        UnknownNameError: another border.
    """
    if has_torch_function((x, coordinates)):
        return handle_torch_function(warp, (x, coordinates), x, coordinates, size, border=border)
    if border not in BORDERS:
        raise UnknownNameError("border", border, BORDERS)
    _check(x, coordinates)
    coordinates = coordinates[None] if coordinates.ndim == 2 else coordinates
    given = coordinates.shape[1:3] if coordinates.ndim == 4 else x.shape[2:]
    height, width = given if size is None else size
    if height < 1 or width < 1 or (coordinates.ndim == 4 and (height, width) != tuple(given)):
        raise SettingError(
            f"size {height}x{width}, coordinates {tuple(coordinates.shape)}; expected at least "
            "1x1, for a map its own size or None"
        )
    if needs_reference(x, coordinates):
        return _widely(x, coordinates, height, width, border)
    return torch.ops.fuse.warp(x, coordinates, height, width, border)


def _check(x: Tensor, coordinates: Tensor) -> None:
    if x.ndim != 4 or not x.dtype.is_floating_point or not 1 <= x.shape[2] * x.shape[3] < 2**31:
        raise SettingError(
            f"x {tuple(x.shape)}, {x.dtype}; expected (N, C, H, W), floating point, at least one "
            "pixel and fewer than 2^31: make planes of a frame with frame_in"
        )
    shape = tuple(coordinates.shape)
    matrix = shape == (3, 3) or (len(shape) == 3 and shape[1:] == (3, 3))
    image_map = len(shape) == 4 and shape[3] == 2 and 0 not in shape[1:3]
    if not (matrix or image_map) or (len(shape) > 2 and shape[0] not in (1, x.shape[0])):
        raise SettingError(
            f"coordinates {shape}; expected (3, 3), (N, 3, 3) or (N, H, W, 2), N being 1 or that "
            f"of x {tuple(x.shape)}"
        )
    if coordinates.dtype not in (torch.float32, torch.float64):
        raise SettingError(
            f"coordinates {coordinates.dtype}; expected float32 or float64: convert with .float()"
        )
    if coordinates.device != x.device:
        raise SettingError(
            f"x on {x.device}, coordinates on {coordinates.device}; expected one device: move them "
            "with .to(device)"
        )


# --- Triton --------------------------------------------------------------------------------------


@kernel
def _pair_of(place, size, CLAMP: tl.constexpr):
    """First and second pixel of an axis and their weights; ``place`` may be anything."""
    if CLAMP:
        low = tl.cast(0.0, tl.float32)
        high = tl.cast(size - 1, tl.float32)
    else:
        low = tl.cast(-1.0, tl.float32)
        high = tl.cast(size, tl.float32)
    place = tl.minimum(tl.maximum(place, low), high)
    last = tl.maximum(size - 2, 0)
    first = tl.minimum(tl.maximum(tl.floor(place).to(tl.int32), 0), last)
    beyond = place - first.to(tl.float32)
    weight = tl.maximum(1.0 - tl.abs(beyond), 0.0)
    next_weight = tl.where(size > 1, tl.maximum(1.0 - tl.abs(beyond - 1.0), 0.0), 0.0)
    return first, tl.minimum(first + 1, size - 1), weight, next_weight


@kernel
def warp_kernel(
    x,
    coordinates,
    out,
    channels,
    height,
    width,
    out_height,
    out_width,
    x_batch,
    x_plane,
    x_row,
    coordinates_batch,
    MAP: tl.constexpr,
    CLAMP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS by COLUMNS pixels of all planes of one picture; all but x are contiguous."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    batch = tl.program_id(2).to(tl.int64)
    inside = (row < out_height) & (column < out_width)
    pixel = row * out_width + column

    coordinates += batch * coordinates_batch
    if MAP:
        at = coordinates + 2 * pixel.to(tl.int64)
        u = tl.load(at, mask=inside, other=0.0)
        v = tl.load(at + 1, mask=inside, other=0.0)
    else:
        far = column.to(tl.float32)
        down = row.to(tl.float32)
        w = tl.load(coordinates + 6) * far + (
            tl.load(coordinates + 7) * down + tl.load(coordinates + 8)
        )
        u = tl.load(coordinates) * far + (
            tl.load(coordinates + 1) * down + tl.load(coordinates + 2)
        )
        v = tl.load(coordinates + 3) * far + (
            tl.load(coordinates + 4) * down + tl.load(coordinates + 5)
        )
        u = u / w
        v = v / w
    left, right, beside, beside_next = _pair_of(u, width, CLAMP)
    upper, lower, above, above_next = _pair_of(v, height, CLAMP)

    first = upper * x_row + left
    second = lower * x_row + left
    step = right - left
    x += batch * x_batch
    plane = tl.cast(out_height, tl.int64) * out_width
    out += batch * channels * plane
    for _ in range(channels):
        value = beside * tl.load(x + first).to(tl.float32)
        value += beside_next * tl.load(x + (first + step)).to(tl.float32)
        below = beside * tl.load(x + second).to(tl.float32)
        below += beside_next * tl.load(x + (second + step)).to(tl.float32)
        value = above * value + above_next * below
        tl.store(out + pixel, value.to(out.dtype.element_ty), mask=inside)
        x += x_plane
        out += plane


def plan(
    x: Tensor,
    coordinates: Tensor,
    out: Tensor,
    border: str,
    *,
    capability: int,
    settings: dict[str, Any] | None = None,
) -> list[Launch]:
    """The launch of the op: rows of x dense, coordinates float32, they and out contiguous."""
    batch, channels, height, width = x.shape
    out_height, out_width = out.shape[2:]
    tile, grid, warps = tiles("warp", x.dtype, capability, settings, batch, out.shape[2:])
    is_map = coordinates.ndim == 4
    strides = {"x_batch": x.stride(0), "x_plane": x.stride(1), "x_row": x.stride(2)}
    return [
        Launch(
            kernel=warp_kernel,
            label=f"{'map' if is_map else 'homography'}, {border}",
            grid=grid,
            grid_rule="(ceil(out_width / COLUMNS), ceil(out_height / ROWS), batch)",
            arguments={
                "x": x,
                "coordinates": coordinates,
                "out": out,
                "channels": channels,
                "height": height,
                "width": width,
                "out_height": out_height,
                "out_width": out_width,
                **strides,
                "coordinates_batch": 0 if len(coordinates) == 1 else coordinates[0].numel(),
            },
            constants={
                "MAP": is_map,
                "CLAMP": border == "clamp",
                **tile,
            },
            num_warps=warps,
            multiples=("out_width",),
        )
    ]


def launch(
    x: Tensor, coordinates: Tensor, height: int, width: int, border: str, **options: Any
) -> Tensor:
    """Run the Triton kernel; ``options`` as in :func:`plan`."""
    out = _empty(x, coordinates, height, width, border)
    if out.numel():
        run(plan(dense_rows(x), coordinates.float().contiguous(), out, border, **options), x.device)
    return out


# --- the op --------------------------------------------------------------------------------------


def _empty(x, coordinates, height, width, border):
    return x.new_empty((*x.shape[:2], height, width))


def _widely(x, coordinates, height, width, border):
    """The reference in the wider of the two dtypes, at least float32."""
    work = torch.promote_types(torch.promote_types(x.dtype, coordinates.dtype), torch.float32)
    out = warp_reference(x.to(work), coordinates.to(work), height, width, border)
    return out.to(x.dtype).contiguous()


def _cpu(x, coordinates, height, width, border):
    if x.dtype == torch.float64:
        return _widely(x, coordinates, height, width, border)
    out = torch.empty((*x.shape[:2], height, width))
    given = (x.float().contiguous().numpy(), coordinates.float().contiguous().numpy())
    _native.warp(*given, out.numpy(), clamp=border == "clamp")
    return out.to(x.dtype)


def _cuda(x, coordinates, height, width, border):
    given = (x, coordinates, height, width, border)
    if not usable(x) or not fits(len(x), span(x), height * width):
        return _widely(*given)
    return launch(*given, capability=device_capability(x.device))


register(
    "warp(Tensor x, Tensor coordinates, SymInt height, SymInt width, str border) -> Tensor",
    general=_cuda,
    cpu=_cpu,
    fake=_empty,
)
