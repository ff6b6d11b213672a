"""Reflection to the right and below, up to any size, and back.

    out[y, x] = in[r(y, H), r(x, W)],   r(i, n) = min(i mod p, p - i mod p),   p = 2 (n - 1)

The edge pixel is not repeated: "reflect" of NumPy, which goes on beyond one mirror image, where
PyTorch's refuses. A picture of one pixel can be padded to any size. Values are copied as they are.

Traffic per pixel and plane in float32: one read and one write, 8 bytes; cropping is a view.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fuseengine import _native
from fuseengine.kernels._library import needs_reference, register
from fuseengine.kernels._planes import (
    check_planes,
    dense_rows,
    fits,
    larger,
    smaller,
    span,
    tiles,
)
from fuseengine.kernels._triton import Launch, device_capability, kernel, run, usable

if TYPE_CHECKING:
    import triton.language as tl


def pad_reflect_reference(x: Tensor, height: int, width: int) -> Tensor:
    """The definition of :func:`pad_reflect`, differentiable."""
    rows, columns = (
        _reflected(torch.arange(size, device=x.device), n)
        for size, n in ((height, x.shape[-2]), (width, x.shape[-1]))
    )
    return x[..., rows[:, None], columns]


def _reflected(i: Tensor, n: int) -> Tensor:
    period = max(2 * (n - 1), 1)
    i = i % period
    return torch.minimum(i, period - i)


def pad_reflect(x: Tensor, height: int, width: int) -> Tensor:
    """Planes, reflected to the right and below up to a size; see the module's docstring.

    With gradients the differentiable reference runs.

    Args:
        x: (N, C, H, W), floating point, at least one pixel.
        height: of the result, H or more.
        width: of the result, W or more.

    Returns:
        (N, C, height, width), contiguous, x's dtype.

    Raises:
        SettingError: another shape or dtype, or a size below x's.
    """
    if has_torch_function((x,)):
        return handle_torch_function(pad_reflect, (x,), x, height, width)
    check_planes("x", x)
    size = larger((height, width), x.shape[2:])
    run_op = pad_reflect_reference if needs_reference(x) else torch.ops.fuse.pad_reflect
    return run_op(x, *size)


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The upper left part of planes, which :func:`pad_reflect` was given.

    Args:
        x: (N, C, H, W), floating point.
        height: of the result, 1 to H.
        width: of the result, 1 to W.

    Returns:
        (N, C, height, width), a view of x.

    Raises:
        SettingError: another shape or dtype, or a size above x's.
    """
    if has_torch_function((x,)):
        return handle_torch_function(crop, (x,), x, height, width)
    check_planes("x", x)
    height, width = smaller((height, width), x.shape[2:])
    return x[..., :height, :width]


# --- Triton --------------------------------------------------------------------------------------


@kernel
def reflected(i, n, size) -> Any:
    """Index into [0, n) of position i below ``size``; else some index: loads need no mask."""
    period = tl.maximum(2 * (n - 1), 1)
    if size > period:
        i = i % period
    return tl.maximum(tl.minimum(i, period - i), 0)


@kernel
def pad_reflect_kernel(
    x,
    out,
    channels,
    height,
    width,
    out_height,
    out_width,
    x_batch,
    x_plane,
    x_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS by COLUMNS pixels of one plane; rows of x are dense, ``out`` is contiguous."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    plane = tl.program_id(2).to(tl.int64)
    inside = (row < out_height) & (column < out_width)
    x += (plane // channels) * x_batch + (plane % channels) * x_plane
    at = reflected(row, height, out_height) * x_row + reflected(column, width, out_width)
    out += plane * out_height * out_width
    tl.store(out + (row * out_width + column), tl.load(x + at), mask=inside)


def plan(
    x: Tensor,
    out: Tensor,
    *,
    capability: int,
    settings: dict[str, Any] | None = None,
) -> list[Launch]:
    """The launch of the op: rows of x dense, out contiguous."""
    batch, channels, height, width = x.shape
    size = out.shape[2:]
    tile, grid, warps = tiles("pad_reflect", x.dtype, capability, settings, batch * channels, size)
    return [
        Launch(
            kernel=pad_reflect_kernel,
            label="plain",
            grid=grid,
            grid_rule="(ceil(out_width / COLUMNS), ceil(out_height / ROWS), batch * channels)",
            arguments={
                "x": x,
                "out": out,
                "channels": channels,
                "height": height,
                "width": width,
                "out_height": size[0],
                "out_width": size[1],
                "x_batch": x.stride(0),
                "x_plane": x.stride(1),
                "x_row": x.stride(2),
            },
            constants=tile,
            num_warps=warps,
            multiples=("out_width",),
        )
    ]


def launch(x: Tensor, height: int, width: int, **options: Any) -> Tensor:
    """Run the Triton kernel; ``options`` as in :func:`plan`."""
    out = _empty(x, height, width)
    if out.numel():
        run(plan(dense_rows(x), out, **options), x.device)
    return out


# --- the op --------------------------------------------------------------------------------------


def _empty(x, height, width):
    return x.new_empty((*x.shape[:2], height, width))


def _cpu(x, height, width):
    if x.dtype != torch.float32:
        return pad_reflect_reference(x, height, width).contiguous()
    out = _empty(x, height, width)
    _native.pad_reflect(x.contiguous().numpy(), out.numpy())
    return out


def _cuda(x, height, width):
    if not usable(x) or not fits(len(x) * x.shape[1], span(x), height * width):
        return pad_reflect_reference(x, height, width).contiguous()
    return launch(x, height, width, capability=device_capability(x.device))


register(
    "pad_reflect(Tensor x, SymInt height, SymInt width) -> Tensor",
    general=_cuda,
    cpu=_cpu,
    fake=_empty,
)
