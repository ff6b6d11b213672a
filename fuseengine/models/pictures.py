"""Pictures in and out of a network: planes, padding to a multiple, cropping, stretching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function

from fuseengine.errors import FrameError, SizeMismatchError

Padding = Literal["reflect", "white"]


def check_pictures(pictures: Sequence[Tensor], planes: int) -> None:
    """Raise unless a network of so many planes can fuse the pictures.

    Raises:
        FrameError: one is not (N, 1, H, W) or (N, planes, H, W) in floating point.
        SizeMismatchError: they differ in N, H or W.
    """
    for x in pictures:
        if x.ndim != 4 or x.shape[1] not in (1, planes) or 0 in x.shape:
            kinds = " or ".join(f"(N, {c}, H, W)" for c in sorted({1, planes}))
            raise FrameError(
                f"got a picture {tuple(x.shape)}; expected {kinds}, nothing empty: add dimensions "
                "with x[None]"
            )
        if not x.is_floating_point():
            raise FrameError(
                f"got a picture in {x.dtype}; expected floats in [0, 1]: divide 8 bits by 255"
            )
    if len({(x.shape[0], *x.shape[2:]) for x in pictures}) > 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in pictures)
        raise SizeMismatchError(
            f"got pictures {shapes}; expected equal batch, height and width: resize one of them"
        )


def pad_picture(x: Tensor, planes: int, multiple: int, padding: Padding) -> Tensor:
    """A picture as a network takes it: its planes, sides a multiple, padded right and below.

    While a graph is being traced, pictures are as they should be: capture promises it.

    Args:
        x: (N, 1, H, W), repeated if need be, or (N, planes, H, W).
        planes: of the result.
        multiple: of the result's height and width.
        padding: "reflect" (the edge pixel is not repeated; goes back and forth where the picture
            is smaller than the padding) or "white" (1.0).
    """
    if isinstance(x, fx.Proxy):
        return x
    if x.shape[1] != planes:
        x = x.expand(-1, planes, -1, -1)
    height, width = x.shape[2:]
    below, right = -height % multiple, -width % multiple
    if not below and not right:
        return x
    if padding == "white":
        return F.pad(x, (0, right, 0, below), value=1.0)
    rows = _reflected(height, height + below, x.device)
    columns = _reflected(width, width + right, x.device)
    return x[:, :, rows][:, :, :, columns]


def crop_like(x: Tensor, picture: Tensor) -> Tensor:
    """The part of x that a picture covered before it was padded."""
    if isinstance(x, fx.Proxy):
        return x
    return x[:, :, : picture.shape[2], : picture.shape[3]]


def stretch(x: Tensor, *, per: Literal["channel", "picture"] = "channel") -> Tensor:
    """``(x - min) / (max - min)`` per picture and channel, or per picture; flat becomes 0.

    One call for a tracer.
    """
    if has_torch_function((x,)):
        return handle_torch_function(stretch, (x,), x, per=per)
    over = (2, 3) if per == "channel" else (1, 2, 3)
    low = x.amin(dim=over, keepdim=True)
    span = x.amax(dim=over, keepdim=True) - low
    return (x - low) / torch.where(span > 0, span, torch.ones_like(span))


def _reflected(size: int, target: int, device: torch.device) -> Tensor:
    """Indices 0 .. size - 1, size - 2, ... of a line that is reflected up to a length."""
    period = max(2 * (size - 1), 1)
    at = torch.arange(target, device=device) % period
    return torch.minimum(at, period - at).clamp_max(size - 1)
