"""Layers that the fusion networks share; variants are arguments, not copies.

All tensors are (N, C, H, W) unless a docstring says otherwise. A residual block does not own
its time projection: the projections of all blocks of a network live in :class:`TimeShifts`, so
that everything that depends on the timestep alone is one small stage that folds into constants
when an engine is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of timesteps, cosine half first (Ho et al. 2020, section 3.3).

    ``e = [cos(t f_0), ..., cos(t f_{k-1}), sin(t f_0), ..., sin(t f_{k-1})]`` with
    ``f_i = max_period^(-i / k)``, ``k = dim // 2``.

    Args:
        t: (N,) timesteps, any real dtype.
        dim: even number of features.
        max_period: longest wavelength over 2 pi.

    Returns:
        (N, dim) in t's floating dtype (float32 for integers).
    """
    half = dim // 2
    t = t if t.is_floating_point() else t.float()
    # The table is made in float32 as the public code does; float64 timesteps get a float64 table.
    exponent = torch.arange(half, dtype=t.dtype, device=t.device)
    frequency = torch.exp(-math.log(max_period) * exponent / half)
    angle = t[:, None] * frequency[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def split_channels(x: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """``x.split(widths, dim=1)`` as a Python list, also while a graph is being traced."""
    ends = list(accumulate(widths))
    return [x[:, end - width : end] for end, width in zip(ends, widths, strict=True)]


class TimeShifts(nn.Module):
    """From a timestep to the per-channel shift of every residual block, as one vector.

    ``e = Linear(SiLU(Linear(embedding(t))))`` then, per block, ``Linear(SiLU(e))``; the shifts of
    all blocks stand side by side.

    Args:
        features: width of the sinusoidal embedding.
        hidden: width of both linear layers of the embedding's MLP.
        widths: output channels of each residual block, in order of use.
    """

    def __init__(self, features: int, hidden: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.features = features
        self.embed = nn.Sequential(
            nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )
        self.project = nn.ModuleList(nn.Linear(hidden, width) for width in widths)

    def forward(self, t: Tensor | float) -> Tensor:
        """Shifts (N, sum of widths) for timesteps t (N,); a number or 0-d t stands for N = 1."""
        weight = self.embed[0].weight
        t = t.reshape(-1) if isinstance(t, Tensor) else weight.new_full((1,), float(t))
        embedding = self.embed(timestep_embedding(t, self.features).to(weight.dtype))
        active = F.silu(embedding)
        return torch.cat([project(active) for project in self.project], dim=-1)


class ResidualBlock(nn.Module):
    """GN, SiLU, 3x3 conv, + shift, GN, SiLU, dropout, 3x3 conv, + shortcut (DDPM's block).

    Args:
        channels: input channels.
        out: output channels; a 1x1 convolution is the shortcut when they differ.
        groups: groups of both GroupNorms; must divide both widths.
        dropout: probability, training only.
    """

    def __init__(self, channels: int, out: int, *, groups: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """X (N, channels, H, W), shift (1 or N, out) -> (N, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x))) + shift[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class SkipGate(nn.Module):
    """Channel gate times spatial gate on a skip connection (as CBAM, Woo et al. 2018).

    ``x * sigmoid(mlp(avg x) + mlp(max x)) * sigmoid(conv1x1 x)``; the MLP is shared.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)
        self.spatial = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> the same shape."""
        average = x.mean(dim=(2, 3), keepdim=True)
        largest = x.amax(dim=(2, 3), keepdim=True)
        channel = torch.sigmoid(
            self.excite(F.relu(self.squeeze(average))) + self.excite(F.relu(self.squeeze(largest)))
        )
        return x * channel * torch.sigmoid(self.spatial(x))
