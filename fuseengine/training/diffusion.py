"""Random numbers of diffusion training: timesteps, noise levels, noise; all from one generator."""

from __future__ import annotations

import torch
from torch import Tensor

from fuseengine.models.sampling import Table


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in the shape, dtype and place of a tensor."""
    return torch.randn(like.shape, generator=generator).to(like)


def antithetic_timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """(count,) timesteps in 0 .. total - 1: draws t, and T - 1 - t for the other half.

    Each is uniform by itself; together they spread more evenly than independent draws (the DDIM
    family of codes, DRMF's among them).
    """
    drawn = torch.randint(total, (count // 2 + 1,), generator=generator)
    return torch.cat([drawn, total - 1 - drawn])[:count]


def sqrt_abar(table: Table, timesteps: Tensor, like: Tensor) -> Tensor:
    """sqrt(abar_t), (N,); timestep t stands at index t + 1 of the table."""
    return torch.from_numpy(table**0.5)[timesteps + 1].to(like)


def levels_between(table: Table, steps: Tensor, generator: torch.Generator, like: Tensor) -> Tensor:
    """Continuous levels c, (N,), uniform between sqrt(abar_t) and sqrt(abar_{t-1}).

    WaveGrad's and SR3's way to a network that knows any level.

    Args:
        table: abar of a schedule.
        steps: t, (N,) in 1 .. T, an index into the table.
        generator: source of the draw.
        like: gives dtype and device.
    """
    roots = torch.from_numpy(table**0.5)
    low, high = roots[steps], roots[steps - 1]
    return (low + (high - low) * torch.rand(len(steps), generator=generator)).to(like)


def random_levels(table: Table, like: Tensor, generator: torch.Generator) -> Tensor:
    """Levels (N,) about steps that are uniform in 1 .. T; see :func:`levels_between`."""
    steps = torch.randint(1, len(table), (len(like),), generator=generator)
    return levels_between(table, steps, generator, like)
