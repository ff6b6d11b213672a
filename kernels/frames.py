"""Frames in and out: what a camera gives <-> the planes of a network.

    in   out[c] = clip((frame[c] - low) scale, 0, 1), reflected to a size (pad_reflect)
    out  frame  = round(full_scale clip(visible + (fused - Y(visible)), 0, 1)), cropped

A frame lies interleaved in memory, (N, H, W, 3), (N, H, W, 1) or (N, H, W), R first: uint8 and
uint16 count from 0 to full scale, floating point from 0 to 1. Planes are (N, 1 or 3, H, W) of
floating point. Y, Cb and Cr are those of :mod:`fuseengine.kernels.ycbcr`; as Cb and Cr are
multiples of B - Y and R - Y, adding one number to R, G and B exchanges Y and keeps both.

Arithmetic, clipping and rounding (nearest, ties up) are those of ``csrc/frames.h``, in float32: NaN
counts as 0, infinities are clipped.

Traffic, bytes per pixel, each read or written once, for uint8 frames and float32 planes: in 3 + 4
(luma) or 3 + 12, out 4 + 3 + 3 with the visible frame. On a GPU four uint8 colour pixels travel as
three words where rows are whole words (fewer instructions than byte by byte: 41 instead of 65 per
pixel of frame out for sm_87); other pixels value by value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fuseengine import _native
from fuseengine.errors import SettingError, UnknownNameError
from fuseengine.kernels._library import needs_reference, register
from fuseengine.kernels._planes import (
    check_planes,
    dense_rows,
    fits,
    larger,
    smaller,
    span,
    tiles,
    wide,
)
from fuseengine.kernels._triton import Launch, device_capability, kernel, run, usable
from fuseengine.kernels.pad_reflect import pad_reflect_reference, reflected
from fuseengine.kernels.ycbcr import luma, rgb_to_ycbcr_reference

if TYPE_CHECKING:
    import triton.language as tl

PLANES = {"luma": 1, "rgb": 3, "ycbcr": 3}
"""What the planes of a frame hold, and how many there are."""

_FULL_SCALE = {
    torch.uint8: 255.0,
    torch.uint16: 65535.0,
    torch.float16: 1.0,
    torch.bfloat16: 1.0,
    torch.float32: 1.0,
    torch.float64: 1.0,
}


def frame_in_reference(
    frame: Tensor,
    channels: str,
    height: int,
    width: int,
    low: float,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """The definition of :func:`frame_in`, differentiable; in float64 if dtype is."""
    x = _channels_first(frame).to(wide(dtype))
    if channels == "luma" and x.shape[1] == 3:
        x = luma(x)
    x = ((x - low) * scale).nan_to_num(nan=0.0).clamp(0.0, 1.0)
    if channels != "luma":
        x = x.expand(-1, 3, -1, -1)
    if channels == "ycbcr":
        x = rgb_to_ycbcr_reference(x)
    return pad_reflect_reference(x, height, width).to(dtype)


def frame_out_reference(
    fused: Tensor, visible: Tensor | None, height: int, width: int, dtype: torch.dtype
) -> Tensor:
    """The definition of :func:`frame_out`; in float64 if fused or the frame is."""
    full_scale = _FULL_SCALE[dtype]
    work = wide(fused.dtype, dtype)
    out = fused[..., :height, :width].to(work) * full_scale
    gray = visible is not None and (visible.ndim == 3 or visible.shape[3] == 1)
    if out.shape[1] == 3 and gray:
        out = luma(out)
    elif visible is not None and out.shape[1] == 1 and not gray:
        colour = _channels_first(visible).to(work)
        out = colour + (out - luma(colour))
    out = out.nan_to_num(nan=0.0).clamp(0.0, full_scale)
    if not dtype.is_floating_point:
        out = (out + 0.5).floor()
    shape = _frame_shape(fused, visible, height, width)
    return out.movedim(1, -1).reshape(shape).to(dtype)


def _channels_first(frame: Tensor) -> Tensor:
    return frame[:, None] if frame.ndim == 3 else frame.movedim(-1, 1)


def _frame_shape(fused: Tensor, visible: Tensor | None, height: int, width: int) -> tuple[int, ...]:
    if visible is not None:
        return tuple(visible.shape)
    return (len(fused), height, width, 3)[: 3 if fused.shape[1] == 1 else 4]


def frame_in(
    frame: Tensor,
    channels: str = "luma",
    *,
    size: Sequence[int] | None = None,
    low: float = 0.0,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A frame as the planes of a network: channels apart, floats in [0, 1], padded.

    Luma is taken before the scale and clipped after; Y, Cb and Cr are those of the clipped R, G, B.
    A gray frame fills all planes of "rgb"; of "ycbcr" it is Y. Computed in float32, rounded once to
    the planes' dtype. With gradients the differentiable reference runs.

    Args:
        frame: (N, H, W), (N, H, W, 1) or (N, H, W, 3), R first; uint8, uint16, float16, bfloat16,
            float32 or float64; any strides, adjacent pixels without a copy.
        channels: "luma" (one plane), "rgb" or "ycbcr" (three).
        size: (height, width) of the planes, no smaller than the frame's; None: the frame's.
        low: the value that becomes 0, in the frame's units.
        scale: 1 / (value that becomes 1 - low); None: 1 / full scale.
        dtype: of the planes, floating point.

    Returns:
        (N, 1 or 3, height, width), contiguous.

    Raises:
        SettingError: a frame, a size, a number or a dtype that does not fit.
        UnknownNameError: other channels.
    """
    if has_torch_function((frame,)):
        return handle_torch_function(
            frame_in, (frame,), frame, channels, size=size, low=low, scale=scale, dtype=dtype
        )
    _check_frame("frame", frame)
    if channels not in PLANES:
        raise UnknownNameError("channels", channels, PLANES)
    if not dtype.is_floating_point or dtype not in _FULL_SCALE:
        raise SettingError(f"dtype={dtype}; expected floating point, torch.float32 for example")
    scale = 1.0 / _FULL_SCALE[frame.dtype] if scale is None else scale
    for name, value in (("low", low), ("scale", scale)):
        if not math.isfinite(value):
            raise SettingError(f"{name}={value}; expected a finite number")
    height, width = larger(size or frame.shape[1:3], frame.shape[1:3])
    run_op = frame_in_reference if needs_reference(frame) else torch.ops.fuse.frame_in
    return run_op(frame, channels, height, width, low, scale, dtype)


def frame_out(
    fused: Tensor,
    visible: Tensor | None = None,
    *,
    size: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A network's planes as a frame: cropped, in the visible frame's colours, rounded.

    One plane and a colour frame: Y of the frame is exchanged. Three planes and a gray frame: their
    luma. Else the planes as they are. With gradients, which only floating point frames can pass on,
    the differentiable reference runs.

    Args:
        fused: (N, 1 or 3, H, W), floating point, 1.0 is full scale.
        visible: frame whose shape, dtype and chroma the result takes, as :func:`frame_in` takes
            frames, no larger than the planes; None for none.
        size: (height, width) of the result without a visible frame; None: all of the planes.
        dtype: of the result without a visible frame; None: uint8.

    Returns:
        The visible frame's shape and dtype; without one (N, height, width) or, of three planes,
        (N, height, width, 3). Contiguous.

    Raises:
        SettingError: planes, a frame, a size or a dtype that do not go together.
    """
    tensors = (fused,) if visible is None else (fused, visible)
    if has_torch_function(tensors):
        return handle_torch_function(frame_out, tensors, fused, visible, size=size, dtype=dtype)
    check_planes("fused", fused, (1, 3))
    if visible is not None:
        _check_frame("visible", visible)
        if size is not None or dtype is not None:
            raise SettingError(
                f"size={size}, dtype={dtype} with a visible frame; expected None: the result takes "
                "the visible frame's"
            )
        if visible.shape[0] != fused.shape[0] or visible.device != fused.device:
            raise SettingError(
                f"fused {tuple(fused.shape)} on {fused.device}, visible {tuple(visible.shape)} on "
                f"{visible.device}; expected as many pictures on one device"
            )
        size, dtype = visible.shape[1:3], visible.dtype
    dtype = torch.uint8 if dtype is None else dtype
    if dtype not in _FULL_SCALE:
        raise SettingError(f"dtype={dtype}; expected one of {_names(_FULL_SCALE)}")
    height, width = smaller(size or fused.shape[2:], fused.shape[2:])
    run_op = frame_out_reference if needs_reference(*tensors) else torch.ops.fuse.frame_out
    return run_op(fused, visible, height, width, dtype)


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(t).removeprefix("torch.") for t in dtypes)


def _check_frame(name: str, frame: Tensor) -> None:
    shape = tuple(frame.shape)
    if not (frame.ndim == 3 or (frame.ndim == 4 and shape[3] in (1, 3))) or 0 in shape[1:]:
        raise SettingError(
            f"{name} {shape}; expected (N, H, W), (N, H, W, 1) or (N, H, W, 3) with at least one "
            "pixel: add a batch with frame[None], move channels to the end with .movedim(1, -1)"
        )
    if frame.dtype not in _FULL_SCALE:
        raise SettingError(
            f"{name} {frame.dtype}; expected one of {_names(_FULL_SCALE)}: convert with .to(dtype)"
        )


# --- Triton --------------------------------------------------------------------------------------


@kernel
def _four(a, b, c, d):
    """Four tensors [R, G] as [R, 4 G], every fourth number from each, all within their threads."""
    both = tl.join(tl.join(a, c), tl.join(b, d))  # [R, G, 2, 2]
    return tl.reshape(both, [a.shape[0], 4 * a.shape[1]])


@kernel
def _every_fourth(value):
    """The inverse of :func:`_four`."""
    even, odd = tl.split(tl.reshape(value, [value.shape[0], value.shape[1] // 4, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@kernel
def _byte(word, shift: tl.constexpr):
    """Eight bits of uint32 words as float32."""
    return (word >> shift).to(tl.uint8).to(tl.float32)


@kernel
def _load_words(at, inside):
    """R, G, B of four pixels of a byte each from the three words at each address."""
    first = tl.load(at, mask=inside, other=0)
    second = tl.load(at + 1, mask=inside, other=0)
    third = tl.load(at + 2, mask=inside, other=0)
    red = _four(_byte(first, 0), _byte(first, 24), _byte(second, 16), _byte(third, 8))
    green = _four(_byte(first, 8), _byte(second, 0), _byte(second, 24), _byte(third, 16))
    blue = _four(_byte(first, 16), _byte(second, 8), _byte(third, 0), _byte(third, 24))
    return red, green, blue


@kernel
def _store_words(at, red, green, blue, inside):
    """The inverse of :func:`_load_words`; red, green and blue are uint32 of 0 to 255."""
    red_0, red_1, red_2, red_3 = _every_fourth(red)
    green_0, green_1, green_2, green_3 = _every_fourth(green)
    blue_0, blue_1, blue_2, blue_3 = _every_fourth(blue)
    tl.store(at, red_0 | green_0 << 8 | blue_0 << 16 | red_1 << 24, mask=inside)
    tl.store(at + 1, green_1 | blue_1 << 8 | red_2 << 16 | green_2 << 24, mask=inside)
    tl.store(at + 2, blue_2 | red_3 << 8 | green_3 << 16 | blue_3 << 24, mask=inside)


@kernel
def _load_pixels(at):
    """R, G, B, one by one."""
    red, green, blue = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    return red.to(tl.float32), green.to(tl.float32), blue.to(tl.float32)


@kernel
def _to_unit(value, low, scale):
    """(value - low) * scale in [0, 1]; NaN is 0."""
    value = (value - low) * scale
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@kernel
def _store_colour(target, plane, red, green, blue, low, scale, inside, KIND: tl.constexpr):
    """A colour frame's pixels, in its units, to its planes."""
    kind = target.dtype.element_ty
    if KIND == "luma":
        y = _to_unit(0.299 * red + 0.587 * green + 0.114 * blue, low, scale)
        tl.store(target, y.to(kind), mask=inside)
    else:
        first = _to_unit(red, low, scale)
        second = _to_unit(green, low, scale)
        third = _to_unit(blue, low, scale)
        if KIND == "ycbcr":
            y = 0.299 * first + 0.587 * second + 0.114 * third
            second = 0.5 + (third - y) * (1.0 / 1.772)
            third = 0.5 + (first - y) * (1.0 / 1.402)
            first = y
        tl.store(target, first.to(kind), mask=inside)
        tl.store(target + plane, second.to(kind), mask=inside)
        tl.store(target + 2 * plane, third.to(kind), mask=inside)


@kernel
def frame_in_kernel(
    frame,
    out,
    height,
    width,
    out_height,
    out_width,
    frame_batch,
    frame_row,
    low,
    scale,
    CHANNELS: tl.constexpr,
    KIND: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS by COLUMNS pixels of all planes of one picture; ``out`` is contiguous.

    A gray frame is copied to all planes of "rgb". WORDS: a width and strides of multiples of 4
    bytes; four pixels are loaded at a time where they lie side by side.
    """
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    batch = tl.program_id(2).to(tl.int64)
    inside = (y < out_height) & (x < out_width)
    low, scale = tl.cast(low, tl.float32), tl.cast(scale, tl.float32)

    row, column = reflected(y, height, out_height), reflected(x, width, out_width)
    frame += batch * frame_batch
    at = frame + (row * frame_row + CHANNELS * column)
    kind = out.dtype.element_ty
    plane = tl.cast(out_height, tl.int64) * out_width
    target = out + batch * plane * (1 if KIND == "luma" else 3) + (y * out_width + x)
    if CHANNELS == 1:
        gray = _to_unit(tl.load(at).to(tl.float32), low, scale).to(kind)
        tl.store(target, gray, mask=inside)
        if KIND == "rgb":
            tl.store(target + plane, gray, mask=inside)
            tl.store(target + 2 * plane, gray, mask=inside)
        if KIND == "ycbcr":
            half = tl.full([ROWS, COLUMNS], 0.5, kind)
            tl.store(target + plane, half, mask=inside)
            tl.store(target + 2 * plane, half, mask=inside)
    else:
        # Pixels of the padding lie in the other order, not in whole words.
        whole = WORDS
        if WORDS:
            whole = ((tl.program_id(0) + 1) * COLUMNS <= width) | (out_width == width)
        if whole:
            group = tl.program_id(0) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)[None, :]
            word = frame.to(tl.pointer_type(tl.uint32)) + (row * (frame_row // 4) + 3 * group)
            red, green, blue = _load_words(word, (y < out_height) & (4 * group < width))
            _store_colour(target, plane, red, green, blue, low, scale, inside, KIND)
        else:
            red, green, blue = _load_pixels(at)
            _store_colour(target, plane, red, green, blue, low, scale, inside, KIND)


@kernel
def _quantised(value, FULL_SCALE: tl.constexpr):
    """Clipped to [0, FULL_SCALE]; uint32, rounded to nearest, ties up, unless that is 1."""
    value = tl.minimum(tl.maximum(value, 0.0), FULL_SCALE)
    if FULL_SCALE > 1.0:
        value = (value + 0.5).to(tl.uint32)
    return value


@kernel
def frame_out_kernel(
    fused,
    visible,
    out,
    height,
    width,
    fused_batch,
    fused_plane,
    fused_row,
    visible_batch,
    visible_row,
    PLANES: tl.constexpr,
    CHANNELS: tl.constexpr,
    FULL_SCALE: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS by COLUMNS pixels of one picture; ``out`` is contiguous and may be ``visible``.

    WORDS: a width and strides of multiples of 4 bytes; four pixels are moved at a time.
    """
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    batch = tl.program_id(2).to(tl.int64)
    inside = (y < height) & (x < width)

    group = tl.program_id(0) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)[None, :]
    whole = (y < height) & (4 * group < width)
    fused += batch * fused_batch
    visible_at = batch * visible_batch
    out += batch * height * width * CHANNELS

    at = fused + (y * fused_row + x)
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32) * FULL_SCALE
    if PLANES == 3:
        plane = tl.cast(fused_plane, tl.int64)
        second = tl.load(at + plane, mask=inside, other=0.0).to(tl.float32) * FULL_SCALE
        third = tl.load(at + 2 * plane, mask=inside, other=0.0).to(tl.float32) * FULL_SCALE
        if CHANNELS == 1:
            first = 0.299 * first + 0.587 * second + 0.114 * third
    else:
        if CHANNELS == 3:
            if WORDS:
                words = (visible + visible_at).to(tl.pointer_type(tl.uint32))
                words += y * (visible_row // 4) + 3 * group
                red, green, blue = _load_words(words, whole)
            else:
                row, column = tl.minimum(y, height - 1), tl.minimum(x, width - 1)
                pixel = visible + visible_at + (row * visible_row + 3 * column)
                red, green, blue = _load_pixels(pixel)
            shift = first - (0.299 * red + 0.587 * green + 0.114 * blue)
            first = red + shift
            second = green + shift
            third = blue + shift
    kind = out.dtype.element_ty
    target = out + (y * width + x) * CHANNELS
    first = _quantised(first, FULL_SCALE)
    if CHANNELS == 1:
        tl.store(target, first.to(kind), mask=inside)
    else:
        second = _quantised(second, FULL_SCALE)
        third = _quantised(third, FULL_SCALE)
        if WORDS:
            words = out.to(tl.pointer_type(tl.uint32)) + (y * (width // 4) + group) * 3
            _store_words(words, first, second, third, whole)
        else:
            tl.store(target, first.to(kind), mask=inside)
            tl.store(target + 1, second.to(kind), mask=inside)
            tl.store(target + 2, third.to(kind), mask=inside)


def _words(width: int, *tensors: Tensor) -> bool:
    """Whether rows of colour frames are whole words of four pixels."""
    return width % 4 == 0 and all(
        t.dtype == torch.uint8
        and t.stride(0) % 4 == 0
        and t.stride(1) % 4 == 0
        and t.data_ptr() % 4 == 0
        for t in tensors
    )


def plan_in(
    frame: Tensor,
    out: Tensor,
    channels: str,
    low: float,
    scale: float,
    *,
    capability: int,
    settings: dict[str, Any] | None = None,
) -> list[Launch]:
    """The launch of :func:`frame_in`: frame as :func:`_dense` leaves it, out contiguous."""
    count, height, width = frame.shape[:3]
    size = out.shape[2:]
    gray = frame.ndim == 3
    tile, grid, warps = tiles("frame_in", out.dtype, capability, settings, count, size)
    strides = {"frame_batch": frame.stride(0), "frame_row": frame.stride(1)}
    sizes = {"height": height, "width": width, "out_height": size[0], "out_width": size[1]}
    source = f"{'gray' if gray else 'colour'} {_names([frame.dtype])}"
    return [
        Launch(
            kernel=frame_in_kernel,
            label=f"{source} to {channels}",
            grid=grid,
            grid_rule="(ceil(out_width / COLUMNS), ceil(out_height / ROWS), batch)",
            arguments={
                "frame": frame,
                "out": out,
                **sizes,
                **strides,
                "low": float(low),
                "scale": float(scale),
            },
            constants={
                "CHANNELS": 1 if gray else 3,
                "KIND": channels,
                "WORDS": not gray and _words(width, frame),
                **tile,
            },
            num_warps=warps,
            multiples=("out_width",),
        )
    ]


def plan_out(
    fused: Tensor,
    visible: Tensor | None,
    out: Tensor,
    *,
    capability: int,
    settings: dict[str, Any] | None = None,
) -> list[Launch]:
    """The launch of :func:`frame_out`: rows of fused and visible dense, out contiguous."""
    height, width = size = out.shape[1:3]
    tile, grid, warps = tiles("frame_out", fused.dtype, capability, settings, out.shape[0], size)
    count, gray = fused.shape[1], out.ndim == 3
    if gray or count == 3:
        visible = None  # nothing of it is needed but its shape
    strides = {
        "fused_batch": fused.stride(0),
        "fused_plane": fused.stride(1),
        "fused_row": fused.stride(2),
    }
    kind = "gray" if gray else "colour"
    chroma = "" if visible is None else " with chroma"
    return [
        Launch(
            kernel=frame_out_kernel,
            label=f"{count} planes to {kind} {_names([out.dtype])}{chroma}",
            grid=grid,
            grid_rule="(ceil(width / COLUMNS), ceil(height / ROWS), batch)",
            arguments={
                "fused": fused,
                "visible": visible,
                "out": out,
                "height": height,
                "width": width,
                **strides,
                "visible_batch": 0 if visible is None else visible.stride(0),
                "visible_row": 0 if visible is None else visible.stride(1),
            },
            constants={
                "PLANES": count,
                "CHANNELS": 1 if gray else 3,
                "FULL_SCALE": _FULL_SCALE[out.dtype],
                "WORDS": not gray and _words(width, out if visible is None else visible, out),
                **tile,
            },
            num_warps=warps,
            multiples=("width", *strides),
        )
    ]


def launch_in(
    frame: Tensor,
    channels: str,
    height: int,
    width: int,
    low: float,
    scale: float,
    dtype: torch.dtype,
    **options: Any,
) -> Tensor:
    """Run the Triton kernel of :func:`frame_in`; ``options`` as in :func:`plan_in`."""
    out = _empty_planes(frame, channels, height, width, dtype)
    if out.numel():
        run(plan_in(_dense(frame), out, channels, low, scale, **options), out.device)
    return out


def launch_out(
    fused: Tensor,
    visible: Tensor | None,
    height: int,
    width: int,
    dtype: torch.dtype,
    **options: Any,
) -> Tensor:
    """Run the Triton kernel of :func:`frame_out`; ``options`` as in :func:`plan_out`."""
    out = _empty_frame(fused, visible, height, width, dtype)
    if out.numel():
        given = (dense_rows(fused), None if visible is None else _dense(visible))
        run(plan_out(*given, _without_one(out), **options), out.device)
    return out


# --- the ops -------------------------------------------------------------------------------------


def _empty_planes(frame, channels, height, width, dtype):
    return frame.new_empty((len(frame), PLANES[channels], height, width), dtype=dtype)


def _empty_frame(fused, visible, height, width, dtype):
    return fused.new_empty(_frame_shape(fused, visible, height, width), dtype=dtype)


def _without_one(frame: Tensor) -> Tensor:
    return frame[..., 0] if frame.ndim == 4 and frame.shape[3] == 1 else frame


def _dense(frame: Tensor) -> Tensor:
    """(N, H, W) or (N, H, W, 3), pixels of a row adjacent, rows ascending; a copy if need be."""
    frame = _without_one(frame)
    pixel = 1 if frame.ndim == 3 else 3
    adjacent = frame.shape[2] == 1 or frame.stride(2) == pixel
    together = pixel == 1 or frame.stride(3) == 1
    ascending = frame.shape[1] == 1 or frame.stride(1) >= pixel * frame.shape[2]
    return frame if adjacent and together and ascending else frame.contiguous()


def _native_frame(frame: Tensor) -> Tensor:
    """Half precision is exact in float32."""
    half = frame.dtype in (torch.float16, torch.bfloat16)
    return _dense(frame.float() if half else frame)


def _arrays(*tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Picture by picture as NumPy arrays."""
    return zip(*(t.numpy() for t in tensors), strict=True)


def _in_cpu(frame, channels, height, width, low, scale, dtype):
    if dtype == torch.float64:
        return frame_in_reference(frame, channels, height, width, low, scale, dtype)
    out = _empty_planes(frame, channels, height, width, torch.float32)
    options = {"low": low, "scale": scale, "ycbcr": channels == "ycbcr"}
    for source, target in _arrays(_native_frame(frame), out):
        _native.frame_in(source, target, **options)
    return out.to(dtype)


def _in_cuda(frame, channels, height, width, low, scale, dtype):
    given = (frame, channels, height, width, low, scale, dtype)
    ours = usable(frame.new_empty(0, dtype=dtype)) and frame.dtype != torch.float64
    if not ours or not fits(len(frame), span(frame), 3 * height * width):
        return frame_in_reference(*given)
    return launch_in(*given, capability=device_capability(frame.device))


def _out_cpu(fused, visible, height, width, dtype):
    if fused.dtype == torch.float64:
        return frame_out_reference(fused, visible, height, width, dtype)
    half = dtype in (torch.float16, torch.bfloat16)
    out = _empty_frame(fused, visible, height, width, torch.float32 if half else dtype)
    given = (fused.float().contiguous(), _without_one(out))
    if visible is None:
        for source, target in _arrays(*given):
            _native.frame_out(source, None, target)
    else:
        for source, target, colours in _arrays(*given, _native_frame(visible)):
            _native.frame_out(source, colours, target)
    return out.to(dtype)


def _out_cuda(fused, visible, height, width, dtype):
    given = (fused, visible, height, width, dtype)
    spans = [span(fused), 3 * height * width, *([] if visible is None else [span(visible)])]
    if dtype == torch.float64 or not usable(fused) or not fits(len(fused), *spans):
        return frame_out_reference(*given)
    return launch_out(*given, capability=device_capability(fused.device))


register(
    "frame_in(Tensor frame, str channels, SymInt height, SymInt width, float low, float scale, "
    "ScalarType dtype) -> Tensor",
    general=_in_cuda,
    cpu=_in_cpu,
    fake=lambda frame, channels, height, width, low, scale, dtype: _empty_planes(
        frame, channels, height, width, dtype
    ),
)
register(
    "frame_out(Tensor fused, Tensor? visible, SymInt height, SymInt width, ScalarType dtype) "
    "-> Tensor",
    general=_out_cuda,
    cpu=_out_cpu,
    fake=_empty_frame,
)
