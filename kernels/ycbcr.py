"""RGB to YCbCr and back, on planes.

    Y  = 0.299 R + 0.587 G + 0.114 B
    Cb = 1/2 + (B - Y) / 1.772         1.772 = 2 (1 - 0.114)
    Cr = 1/2 + (R - Y) / 1.402         1.402 = 2 (1 - 0.299)

ITU-R Recommendation BT.601 in full range (JPEG's colours, JFIF 1.02, with Cb and Cr around 1/2
instead of 128): R, G, B in [0, 1] give Y, Cb, Cr in [0, 1], and gray has Cb = Cr = 1/2. Nothing is
clipped; NaN and infinity stay in their pixel. Half precision is computed in float32.

Traffic per pixel in float32: three reads and three writes, 24 bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fuseengine import _native
from fuseengine.kernels import _tuning
from fuseengine.kernels._library import needs_reference, register
from fuseengine.kernels._planes import check_planes, fits, span, wide
from fuseengine.kernels._triton import (
    Launch,
    blocks,
    device_capability,
    kernel,
    planes,
    run,
    usable,
)

if TYPE_CHECKING:
    import triton.language as tl

RED, GREEN, BLUE = 0.299, 0.587, 0.114


def luma(x: Tensor) -> Tensor:
    """Y of planes R, G, B: (..., 3, H, W) -> (..., 1, H, W)."""
    red, green, blue = x.split(1, -3)
    return RED * red + GREEN * green + BLUE * blue


def rgb_to_ycbcr_reference(x: Tensor) -> Tensor:
    """The definition of :func:`rgb_to_ycbcr`, differentiable."""
    red, _, blue = x.split(1, -3)
    y = luma(x)
    return torch.cat(
        [y, 0.5 + (blue - y) / (2 * (1 - BLUE)), 0.5 + (red - y) / (2 * (1 - RED))], -3
    )


def ycbcr_to_rgb_reference(x: Tensor) -> Tensor:
    """The definition of :func:`ycbcr_to_rgb`, differentiable."""
    y, cb, cr = x.split(1, -3)
    red, blue = y + 2 * (1 - RED) * (cr - 0.5), y + 2 * (1 - BLUE) * (cb - 0.5)
    return torch.cat([red, (y - RED * red - BLUE * blue) / GREEN, blue], -3)


def rgb_to_ycbcr(x: Tensor) -> Tensor:
    """Planes R, G, B to Y, Cb, Cr; see the module's docstring.

    With gradients the differentiable reference runs.

    Args:
        x: (N, 3, H, W), floating point.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        SettingError: another shape or dtype.
    """
    if has_torch_function((x,)):
        return handle_torch_function(rgb_to_ycbcr, (x,), x)
    check_planes("x", x, (3,))
    return rgb_to_ycbcr_reference(x) if needs_reference(x) else torch.ops.fuse.rgb_to_ycbcr(x)


def ycbcr_to_rgb(x: Tensor) -> Tensor:
    """The inverse of :func:`rgb_to_ycbcr`; colours outside [0, 1] are left so.

    Args:
        x: (N, 3, H, W), floating point.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        SettingError: another shape or dtype.
    """
    if has_torch_function((x,)):
        return handle_torch_function(ycbcr_to_rgb, (x,), x)
    check_planes("x", x, (3,))
    return ycbcr_to_rgb_reference(x) if needs_reference(x) else torch.ops.fuse.ycbcr_to_rgb(x)


# --- Triton --------------------------------------------------------------------------------------


@kernel
def ycbcr_kernel(
    x,
    out,
    pixels,
    x_batch,
    x_plane,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK pixels of one picture. Planes of x are dense; ``out`` is contiguous and may be x."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    inside = at < pixels
    x += batch * x_batch
    step = tl.cast(x_plane, tl.int64)
    first = tl.load(x + at, mask=inside).to(tl.float32)
    second = tl.load(x + step + at, mask=inside).to(tl.float32)
    third = tl.load(x + 2 * step + at, mask=inside).to(tl.float32)
    if INVERSE:
        cb = second - 0.5
        cr = third - 0.5
        second = first - ((1.402 * 0.299 / 0.587) * cr + (1.772 * 0.114 / 0.587) * cb)
        third = first + 1.772 * cb
        first = first + 1.402 * cr
    else:
        y = 0.299 * first + 0.587 * second + 0.114 * third
        second = 0.5 + (third - y) * (1.0 / 1.772)
        third = 0.5 + (first - y) * (1.0 / 1.402)
        first = y
    plane = tl.cast(pixels, tl.int64)
    out += batch * 3 * plane
    kind = out.dtype.element_ty
    tl.store(out + at, first.to(kind), mask=inside)
    tl.store(out + plane + at, second.to(kind), mask=inside)
    tl.store(out + 2 * plane + at, third.to(kind), mask=inside)


def plan(
    x: Tensor,
    out: Tensor,
    *,
    inverse: bool,
    capability: int,
    settings: dict[str, Any] | None = None,
) -> list[Launch]:
    """The launch of either op: planes of x dense, out contiguous."""
    count, pixels = x.shape[0], x.shape[2] * x.shape[3]
    if settings is None:
        op = "ycbcr_to_rgb" if inverse else "rgb_to_ycbcr"
        settings = _tuning.choose(op, x.dtype, capability, count * pixels)
    strides = {"x_batch": x.stride(0), "x_plane": x.stride(1)}
    return [
        Launch(
            kernel=ycbcr_kernel,
            label="inverse" if inverse else "plain",
            grid=(blocks(pixels, settings["block"]), count),
            grid_rule="(ceil(pixels / BLOCK), batch)",
            arguments={"x": x, "out": out, "pixels": pixels, **strides},
            constants={"INVERSE": inverse, "BLOCK": settings["block"]},
            num_warps=settings["num_warps"],
            multiples=("pixels", *strides),
        )
    ]


def launch(x: Tensor, *, inverse: bool, **options: Any) -> Tensor:
    """Run the Triton kernel; ``options`` as in :func:`plan`."""
    out = _like(x)
    if out.numel():
        run(plan(planes(x), out, inverse=inverse, **options), x.device)
    return out


# --- the ops -------------------------------------------------------------------------------------


def _like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _register(name, native, reference, inverse):
    def general(x: Tensor) -> Tensor:
        return reference(x.to(wide(x.dtype))).to(x.dtype).contiguous()

    def cpu(x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return general(x)
        values = x.float().contiguous()
        out = _like(values)
        native(values.numpy(), out.numpy())
        return out.to(x.dtype)

    def cuda(x: Tensor) -> Tensor:
        if not usable(x) or not fits(len(x), span(x)):
            return general(x)
        return launch(x, inverse=inverse, capability=device_capability(x.device))

    register(f"{name}(Tensor x) -> Tensor", general=cuda, cpu=cpu, fake=_like)


_register("rgb_to_ycbcr", _native.rgb_to_ycbcr, rgb_to_ycbcr_reference, False)
_register("ycbcr_to_rgb", _native.ycbcr_to_rgb, ycbcr_to_rgb_reference, True)
