"""Dual masking: two partial views of one picture, which together hold all of it.

Mask-DiFuser learns to fuse by putting a picture x together from two views. A grid of cells is
split into halves M and Mc (equation 2):

    x_A = x on M1,  D(x) on M2,  one grey value on M3,  D(x) on M4,   M1 u M2 = M,  M3 u M4 = Mc
    x_B = the same with M and Mc exchanged, its cells drawn anew

with D(x) the degraded picture. What one view hides, the other one shows, clean or degraded.

Source: Tang et al., "Mask-DiFuser" (see :mod:`fuseengine.models.mask_difuser`); the paper has
M1:M2:M3:M4 = 4:1:4:1, the scripts have 30:2:28:4 cells of 64. Both are here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseengine.errors import TrainingError
from fuseengine.training.degradations import gaussian_blur

GRID = 8
"""Cells along each side."""

CELLS = {"paper": (26, 6, 26, 6), "code": (30, 2, 28, 4)}
"""Cells of M1 to M4. A fifth of a half of 64 cells is 6.4: the paper's ratio to the next cell."""

CLEAN, DEGRADED, HIDDEN = 0, 1, 2
"""What a view shows in a cell."""


def draw_cells(generator: torch.Generator, *, form: str = "paper") -> tuple[Tensor, Tensor]:
    """What each of two views shows in each cell: two (8, 8) integer tensors.

    Args:
        generator: source of the draw.
        form: "paper" or "code", the numbers of cells.
    """
    clean, degraded, hidden, behind = CELLS[form]
    shown = torch.tensor([CLEAN] * clean + [DEGRADED] * degraded)
    covered = torch.tensor([HIDDEN] * hidden + [DEGRADED] * behind)
    places = torch.randperm(GRID * GRID, generator=generator)
    halves = places[: len(shown)], places[len(shown) :]
    views = []
    for own, other in (halves, halves[::-1]):
        cells = torch.empty(GRID * GRID, dtype=torch.long)
        cells[own] = shown[torch.randperm(len(shown), generator=generator)]
        cells[other] = covered[torch.randperm(len(covered), generator=generator)]
        views.append(cells.reshape(GRID, GRID))
    return views[0], views[1]


def dual_mask(
    clean: Tensor, degraded: Tensor, generator: torch.Generator, *, form: str = "paper"
) -> tuple[Tensor, Tensor]:
    """Two views of each picture.

    Args:
        clean: x, (N, C, H, W) in [0, 1], sides multiples of 8.
        degraded: D(x), likewise.
        generator: source of every draw.
        form: "paper" or "code", the numbers of cells.

    Returns:
        x_A and x_B, x's shape.

    Raises:
        TrainingError: sides that the grid does not divide.
    """
    height, width = clean.shape[2:]
    if height % GRID or width % GRID:
        raise TrainingError(
            f"got patches of {height} x {width}; expected multiples of {GRID}, the masks' grid"
        )
    views: tuple[list[Tensor], list[Tensor]] = ([], [])
    for x, damaged in zip(clean, degraded, strict=True):
        grey = torch.rand((), generator=generator).to(x)  # the same in both views, as in the code
        for view, cells in zip(views, draw_cells(generator, form=form), strict=True):
            size = (height, width)
            shows = F.interpolate(cells[None, None].float(), size, mode="nearest")[0].to(x.device)
            view.append(torch.where(shows == CLEAN, x, torch.where(shows == HIDDEN, grey, damaged)))
    return torch.stack(views[0]), torch.stack(views[1])


def exposure_pair(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An under- and an overexposed version of pictures, each in 8 bits: ``clip(gain x^gamma)``.

    Args:
        x: (N, C, H, W) in [0, 1].
        generator: source of every draw: gains 0.25 to 0.6 and 1.6 to 3, gammas 0.8 to 1.2.

    Returns:
        Two of x's shape. What one has clipped, or lost to its 255 levels, the other one shows.
    """
    drawn = torch.rand((4, len(x), 1, 1, 1), generator=generator).to(x)
    under = (0.25 + 0.35 * drawn[0]) * x.pow(0.8 + 0.4 * drawn[1])
    over = ((1.6 + 1.4 * drawn[2]) * x.pow(0.8 + 0.4 * drawn[3])).clamp(max=1.0)
    return (under * 255).round() / 255, (over * 255).round() / 255


def focus_pair(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two focal planes: smooth random regions sharp in one picture and blurred in the other.

    Args:
        x: (N, C, H, W) in [0, 1].
        generator: source of every draw: regions some 16 pixels across and more, blur of sigma 1 to
            3 pixels.

    Returns:
        Two of x's shape.
    """
    n, _, height, width = x.shape
    if n == 0:
        return x, x
    coarse = torch.randn((n, 1, max(height // 32, 2), max(width // 32, 2)), generator=generator)
    field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).to(x)
    near = torch.sigmoid(20.0 * field)  # the border between the planes is a few pixels wide
    blurred = gaussian_blur(x, 1.0 + 2.0 * float(torch.rand((), generator=generator)))
    return torch.lerp(blurred, x, near), torch.lerp(x, blurred, near)
