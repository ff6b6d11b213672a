"""GroupNorm, affine map, shift and SiLU in one op.

    z[n, c, p]   = (x[n, c, p] - mean[n, g]) / sqrt(variance[n, g] + eps) weight[c] + bias[c]
                   + shift[n, c]
    out[n, c, p] = z / (1 + exp(-z))

mean and variance (divided by the count) over the pixels and channels of group g = c // (C / groups)
of a picture. x and out are (N, C, H, W), contiguous or channels_last, float32, float64, float16 or
bfloat16; half precision is computed in float32 and rounded once. Wu and He, "Group Normalization",
ECCV 2018; Elfwing et al., "Sigmoid-weighted linear units", 2017.

The variance comes from squared deviations. The mean is kept as a sum of two float32 numbers,
because raw thermal counts (mean 30,000, deviation 20) leave one of them an error of 1e-4
deviations: a number near 30,000 is rounded to 0.002.

Traffic: two reads and one write per element, when a picture's group does not fit on the chip; plus
three numbers per channel and piece. Kernels: moments of pieces; their merge per group (Chan et al.
1983); normalise. Each sum has one fixed order: results repeat.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fuseengine import _native
from fuseengine.errors import SettingError
from fuseengine.kernels import _tuning
from fuseengine.kernels._library import native_array, needs_reference, register
from fuseengine.kernels._triton import (
    Launch,
    blocks,
    device_capability,
    kernel,
    power_of_two,
    run,
    usable,
)

if TYPE_CHECKING:
    import triton.language as tl


def group_norm_silu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """The definition of :func:`group_norm_silu`, differentiable in every tensor."""
    flat = x.unflatten(1, (groups, -1)).flatten(2)
    centred = flat - flat.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    z = (centred * scale).reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    if shift is not None:
        z = z + shift[:, :, None, None]
    return F.silu(z) if silu else z


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """Normalise over groups of channels and activate; see the module's docstring.

    With gradients the differentiable reference runs.

    Args:
        x: (N, C, H, W), floating point.
        weight: (C,), x's dtype or float32.
        bias: (C,), weight's dtype.
        shift: added before the activation, (N, C) or (1, C), weight's dtype; None for none.
        groups: a divisor of C.
        eps: added to the variance, at least 0.
        silu: whether to activate.

    Returns:
        x's shape and dtype; channels_last when x is, else contiguous.

    Raises:
        SettingError: shapes, dtypes, devices or numbers that do not go together.
    """
    tensors = (x, weight, bias) if shift is None else (x, weight, bias, shift)
    if has_torch_function(tensors):
        return handle_torch_function(
            group_norm_silu, tensors, x, weight, bias, shift, groups=groups, eps=eps, silu=silu
        )
    _check(x, weight, bias, shift, groups, eps)
    if needs_reference(*tensors):
        out = group_norm_silu_reference(x, weight, bias, shift, groups=groups, eps=eps, silu=silu)
        return out.to(x.dtype)
    return torch.ops.fuse.group_norm_silu(x, weight, bias, shift, groups, eps, silu)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float
) -> None:
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise SettingError(
            f"x {tuple(x.shape)}, {x.dtype}; expected (N, C, H, W), floating point: add "
            "dimensions with x[..., None], convert with x.to(dtype)"
        )
    batch, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise SettingError(
            f"groups={groups}, C={channels}; expected a divisor of C: choose another number of "
            "groups"
        )
    if not eps >= 0:
        raise SettingError(f"eps={eps}; expected 0 or more")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tuple(tensor.shape) != (channels,):
            raise SettingError(
                f"{name} {tuple(tensor.shape)}; expected ({channels},), one number per channel "
                f"of x {tuple(x.shape)}"
            )
    if shift is not None and tuple(shift.shape) not in ((batch, channels), (1, channels)):
        raise SettingError(
            f"shift {tuple(shift.shape)}; expected ({batch}, {channels}) or (1, {channels}) for "
            f"x {tuple(x.shape)}"
        )
    others = {t.dtype for t in (weight, bias, shift) if t is not None}
    if len(others) > 1 or others - {x.dtype, torch.float32}:
        raise SettingError(
            f"x {x.dtype}, weight, bias and shift {', '.join(sorted(map(str, others)))}; expected "
            "one dtype for these, x's or float32: convert with .to(dtype)"
        )
    devices = {t.device for t in (x, weight, bias, shift) if t is not None}
    if len(devices) > 1:
        raise SettingError(
            f"tensors on {', '.join(sorted(map(str, devices)))}; expected one device: move them "
            "with .to(device)"
        )


# --- Triton --------------------------------------------------------------------------------------


@kernel
def group_norm_moments(
    x,
    partial,
    channels,
    pixels,
    pieces,
    piece,
    x_batch,
    x_channel,
    x_pixel,
    partial_size,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """Pivot, mean above the pivot and squared deviations of one piece of BLOCK_C channels."""
    program = tl.program_id(0)
    index = program % pieces
    rest = program // pieces
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    batch = (rest // channel_blocks).to(tl.int64)
    channel = (rest % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_in = channel < channels
    wide = channel.to(tl.int64)
    begin = index * piece
    end = tl.minimum(begin + piece, pixels)
    rows = x + batch * x_batch + wide[:, None] * x_channel  # [C, 1]

    # The mean of the first block: close to all of the piece, and no single pixel decides it.
    at = begin + tl.arange(0, BLOCK_P)
    inside = channel_in[:, None] & (at[None, :] < end)
    block = tl.load(rows + at.to(tl.int64)[None, :] * x_pixel, mask=inside, other=0.0)
    number = tl.cast(tl.minimum(end - begin, BLOCK_P), tl.float32)
    pivot = tl.sum(block.to(tl.float32), 1) / number  # [C]

    seen = tl.cast(0.0, tl.float32)
    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_P):
        at = start + tl.arange(0, BLOCK_P)
        inside = channel_in[:, None] & (at[None, :] < end)
        block = tl.load(rows + at.to(tl.int64)[None, :] * x_pixel, mask=inside, other=0.0)
        number = tl.cast(tl.minimum(end - start, BLOCK_P), tl.float32)
        above = tl.where(inside, block.to(tl.float32) - pivot[:, None], 0.0)
        block_mean = tl.sum(above, 1) / number
        deviation = tl.where(inside, above - block_mean[:, None], 0.0)
        gap = block_mean - mean
        share = number / (seen + number)
        mean += gap * share
        squares += tl.sum(deviation * deviation, 1) + gap * gap * (seen * share)
        seen += number

    target = partial + (batch * channels + wide) * pieces + index
    tl.store(target, pivot, mask=channel_in)
    tl.store(target + tl.cast(partial_size, tl.int64), mean, mask=channel_in)
    tl.store(target + 2 * tl.cast(partial_size, tl.int64), squares, mask=channel_in)


@kernel
def group_norm_merge(
    partial,
    moments,
    pixels,
    pieces,
    piece,
    per_group,
    partial_size,
    eps,
    BLOCK: tl.constexpr,
) -> None:
    """Mean (coarse and fine part) and 1 / sqrt(variance + eps) of one group of one picture."""
    group = tl.program_id(0).to(tl.int64)
    entries = per_group * pieces
    wide = tl.cast(partial_size, tl.int64)
    pivots = partial + group * entries
    total = tl.cast(per_group, tl.float32) * tl.cast(pixels, tl.float32)

    coarse = tl.cast(0.0, tl.float32)
    for start in range(0, entries, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < entries
        number = tl.minimum(pixels - (at % pieces) * piece, piece).to(tl.float32)
        pivot = tl.load(pivots + at, mask=inside, other=0.0)
        coarse += tl.sum(tl.where(inside, pivot * (number / total), 0.0), 0)
    fine = tl.cast(0.0, tl.float32)
    for start in range(0, entries, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < entries
        number = tl.minimum(pixels - (at % pieces) * piece, piece).to(tl.float32)
        mean = tl.load(pivots + at, mask=inside, other=0.0) - coarse
        mean += tl.load(pivots + wide + at, mask=inside, other=0.0)
        fine += tl.sum(tl.where(inside, mean * (number / total), 0.0), 0)
    variance = tl.cast(0.0, tl.float32)
    for start in range(0, entries, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < entries
        number = tl.minimum(pixels - (at % pieces) * piece, piece).to(tl.float32)
        mean = tl.load(pivots + at, mask=inside, other=0.0) - coarse
        mean += tl.load(pivots + wide + at, mask=inside, other=0.0) - fine
        squares = tl.load(pivots + 2 * wide + at, mask=inside, other=0.0)
        parts = squares / total + mean * mean * (number / total)
        variance += tl.sum(tl.where(inside, parts, 0.0), 0)

    # (3, N groups)
    size = tl.num_programs(0)
    tl.store(moments + group, coarse)
    tl.store(moments + size + group, fine)
    tl.store(moments + 2 * size + group, 1.0 / tl.sqrt(variance + tl.cast(eps, tl.float32)))


@kernel
def group_norm_apply(
    x,
    moments,
    weight,
    bias,
    shift,
    out,
    channels,
    pixels,
    per_group,
    groups,
    moments_size,
    shift_batch,
    x_batch,
    x_channel,
    x_pixel,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """BLOCK_C channels by BLOCK_P pixels; ``out`` has x's strides and may be x."""
    program = tl.program_id(0)
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    at = (program % pixel_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    rest = program // pixel_blocks
    batch = (rest // channel_blocks).to(tl.int64)
    channel = (rest % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_in = channel < channels

    group = moments + batch * groups + channel // per_group
    coarse = tl.load(group, mask=channel_in, other=0.0)
    fine = tl.load(group + moments_size, mask=channel_in, other=0.0)
    scale = tl.load(group + 2 * moments_size, mask=channel_in, other=0.0)
    scale *= tl.load(weight + channel, mask=channel_in, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=channel_in, other=0.0).to(tl.float32)
    if shift is not None:
        row = shift + batch * shift_batch
        offset += tl.load(row + channel, mask=channel_in, other=0.0).to(tl.float32)

    inside = channel_in[:, None] & (at[None, :] < pixels)
    where = batch * x_batch + channel.to(tl.int64)[:, None] * x_channel
    where += at.to(tl.int64)[None, :] * x_pixel
    value = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
    value = ((value - coarse[:, None]) - fine[:, None]) * scale[:, None] + offset[:, None]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(out + where, value.to(out.dtype.element_ty), mask=inside)


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    out: Tensor,
    *,
    groups: int,
    eps: float,
    silu: bool,
    capability: int,
    settings: dict[str, Any] | None = None,
) -> list[Launch]:
    """The launches of the op: x and out contiguous or channels_last, alike; the rest contiguous."""
    batch, channels, height, width = x.shape
    pixels = height * width
    if settings is None:
        settings = _tuning.choose("group_norm_silu", x.dtype, capability, x.numel())
    x_batch, x_channel, x_pixel = x.stride(0), x.stride(1), x.stride(3)
    if x.is_contiguous():  # a size of 1 leaves strides open
        x_batch, x_channel, x_pixel = channels * pixels, pixels, 1
    # Few shapes of blocks, so that few kernels serve every size and number of channels.
    block = settings["block"]
    if x_pixel == 1:
        block_c = 1 if pixels > block // 2 else min(8, block)
    else:
        block_c = power_of_two(channels, least=min(16, block), most=min(64, block))
    block_p = block // block_c
    channel_blocks = batch * blocks(channels, block_c)
    pieces = max(1, min(blocks(settings["programs"], channel_blocks), blocks(pixels, block_p)))
    piece = blocks(blocks(pixels, pieces), block_p) * block_p
    pieces = blocks(pixels, piece)
    per_group = channels // groups
    partial = torch.empty((3, batch, channels, pieces), dtype=torch.float32, device=x.device)
    moments = torch.empty((3, batch, groups), dtype=torch.float32, device=x.device)
    sizes = {"pieces": pieces, "piece": piece}
    tile = {"BLOCK_C": block_c, "BLOCK_P": block_p}
    if x_pixel == 1:
        layout, next_to = "planes", "x_pixel"
        strides = {"x_batch": x_batch, "x_channel": x_channel}
        rows = ("pixels", *strides)
    else:
        layout, next_to = "channels_last", "x_channel"
        strides = {"x_batch": x_batch, "x_pixel": x_pixel}
        rows = ("channels", *strides)
    in_batch = "batch * ceil(channels / BLOCK_C)"
    return [
        Launch(
            kernel=group_norm_moments,
            label=f"moments, {layout}",
            grid=(channel_blocks * pieces,),
            grid_rule=f"({in_batch} * pieces,)",
            arguments={
                "x": x,
                "partial": partial,
                "channels": channels,
                "pixels": pixels,
                **sizes,
                **strides,
                "partial_size": partial[0].numel(),
            },
            constants={next_to: 1, **tile},
            num_warps=settings["num_warps"],
            multiples=(*rows, "piece"),
        ),
        Launch(
            kernel=group_norm_merge,
            label="merge",
            grid=(batch * groups,),
            grid_rule="(batch * groups,)",
            arguments={
                "partial": partial,
                "moments": moments,
                "pixels": pixels,
                **sizes,
                "per_group": per_group,
                "partial_size": partial[0].numel(),
                "eps": eps,
            },
            constants={"BLOCK": 256},
            multiples=(),
        ),
        Launch(
            kernel=group_norm_apply,
            label=f"apply, {layout}",
            grid=(channel_blocks * blocks(pixels, block_p),),
            grid_rule=f"({in_batch} * ceil(pixels / BLOCK_P),)",
            arguments={
                "x": x,
                "moments": moments,
                "weight": weight,
                "bias": bias,
                "shift": shift,
                "out": out,
                "channels": channels,
                "pixels": pixels,
                "per_group": per_group,
                "groups": groups,
                "moments_size": batch * groups,
                # One row for all pictures is read again for each.
                "shift_batch": 0 if shift is None or shift.shape[0] == 1 else channels,
                **strides,
            },
            constants={"SILU": silu, next_to: 1, **tile},
            num_warps=settings["num_warps"],
            multiples=rows,
        ),
    ]


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    *,
    groups: int,
    eps: float,
    silu: bool,
    **options: Any,
) -> Tensor:
    """Run the Triton kernels; ``options`` as in :func:`plan`."""
    out = _result(x)
    if out.numel():
        given = [t if t is None else t.contiguous() for t in (weight, bias, shift)]
        x = x if x.stride() == out.stride() else torch.empty_like(out).copy_(x)
        launches = plan(x, *given, out, groups=groups, eps=eps, silu=silu, **options)
        run(launches, x.device)
    return out


# --- the op --------------------------------------------------------------------------------------


def _result(x: Tensor) -> Tensor:
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty_like(x, memory_format=memory_format)


def _wide(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.float64 else x.float()


def _general(x, weight, bias, shift, groups, eps, silu):
    given = (_wide(t) for t in (x, weight, bias, shift))
    out = group_norm_silu_reference(*given, groups=groups, eps=eps, silu=silu)
    return _result(x).copy_(out)


def _cuda(x, weight, bias, shift, groups, eps, silu):
    if not usable(x, weight, bias, shift):
        return _general(x, weight, bias, shift, groups, eps, silu)
    where = device_capability(x.device)
    return launch(x, weight, bias, shift, groups=groups, eps=eps, silu=silu, capability=where)


def _cpu(x, weight, bias, shift, groups, eps, silu):
    if x.dtype == torch.float64 or x.numel() == 0 or not hasattr(_native, "group_norm_silu"):
        return _general(x, weight, bias, shift, groups, eps, silu)
    out = torch.empty(x.shape, dtype=x.dtype)
    given = (None if t is None else t.float().contiguous().numpy() for t in (weight, bias, shift))
    _native.group_norm_silu(
        native_array(x.contiguous()),
        *given,
        native_array(out),
        groups=groups,
        eps=eps,
        silu=silu,
    )
    result = _result(x)
    same = out.dtype == result.dtype and out.stride() == result.stride()
    return out if same else result.copy_(out)


register(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, Tensor? shift, int groups, float eps, "
    "bool silu) -> Tensor",
    general=_cuda,
    cpu=_cpu,
    fake=lambda x, *rest: _result(x),
)
