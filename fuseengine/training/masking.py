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
