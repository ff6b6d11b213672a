"""What the ops on planes (N, C, H, W) share: checks, and how their kernels are laid out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fuseengine.errors import SettingError
from fuseengine.kernels import _tuning
from fuseengine.kernels._triton import blocks


def check_planes(name: str, x: Tensor, counts: Sequence[int] = ()) -> None:
    """Refuse what is not (N, C, H, W), floating point, with a pixel, C one of ``counts`` if given.

    Raises:
        SettingError: it is not.
    """
    fits_in = x.ndim == 4 and (not counts or x.shape[1] in counts) and 0 not in x.shape[2:]
    if not fits_in or not x.dtype.is_floating_point:
        channels = " or ".join(map(str, counts)) or "C"
        raise SettingError(
            f"{name} {tuple(x.shape)}, {x.dtype}; expected (N, {channels}, H, W) with at least one "
            "pixel, floating point: add dimensions with x[None], convert with x.to(dtype)"
        )


def larger(size: Sequence[int], least: Sequence[int]) -> tuple[int, int]:
    """The size that a picture is padded to.

    Raises:
        SettingError: it is below the picture's.
    """
    height, width = size
    if height < least[0] or width < least[1]:
        raise SettingError(
            f"size {height}x{width} for a picture of {least[0]}x{least[1]}; expected no less: "
            "padding cannot crop"
        )
    return height, width


def smaller(size: Sequence[int], most: Sequence[int]) -> tuple[int, int]:
    """The size that planes are cropped to.

    Raises:
        SettingError: it is empty, or above the planes'.
    """
    height, width = size
    if not (1 <= height <= most[0] and 1 <= width <= most[1]):
        raise SettingError(
            f"size {height}x{width} from planes of {most[0]}x{most[1]}; expected 1x1 to that: "
            "cropping cannot enlarge"
        )
    return height, width


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """What values of these dtypes are computed in: float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def dense_rows(x: Tensor) -> Tensor:
    """X with adjacent pixels of a row: itself, or a contiguous copy."""
    return x if x.shape[3] == 1 or x.stride(3) == 1 else x.contiguous()


def span(x: Tensor) -> int:
    """Elements in memory from a picture's first to past its last."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True))


def fits(pictures: int, *spans: int) -> bool:
    """Whether a grid's last axis holds the pictures, and 32 bits the places within each."""
    return pictures < 65536 and max(spans) < 2**31


def tiles(
    op: str,
    dtype: torch.dtype,
    capability: int,
    settings: dict[str, Any] | None,
    pictures: int,
    size: Sequence[int],
) -> tuple[dict[str, int], tuple[int, int, int], int]:
    """Constants of a tile, the grid (columns, rows, pictures) for an output's size, warps."""
    height, width = size
    if settings is None:
        settings = _tuning.choose(op, dtype, capability, pictures * height * width)
    rows, columns = settings["rows"], settings["columns"]
    grid = (blocks(width, columns), blocks(height, rows), pictures)
    return {"ROWS": rows, "COLUMNS": columns}, grid, settings["num_warps"]
