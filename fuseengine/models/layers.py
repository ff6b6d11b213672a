"""Layers that the fusion networks share; variants are arguments, not copies.

All tensors are (N, C, H, W) unless a docstring says otherwise. A residual block does not own
its time projection: the projections of all blocks of a network live in :class:`TimeShifts`, so
that everything that depends on the timestep alone is one small stage that folds into constants
when an engine is compiled. For the same reason a cross-attention does not own the keys and values
of what it attends to (:class:`KeysAndValues` does): they are the same at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]
Layout = Literal["cos-sin", "sin-cos", "interleaved"]


def timestep_embedding(
    t: Tensor,
    dim: int,
    max_period: float = 10_000.0,
    *,
    layout: Layout = "cos-sin",
    reach_max: bool = False,
) -> Tensor:
    """Sinusoidal embedding of timesteps or noise levels (Vaswani et al. 2017, section 3.5).

    With ``k = dim // 2`` frequencies ``f_i = max_period^(-i / k)``:

    * "cos-sin": ``[cos(t f_0), ..., cos(t f_{k-1}), sin(t f_0), ..., sin(t f_{k-1})]``
    * "sin-cos": the sines first
    * "interleaved": ``[sin(t f_0), cos(t f_0), sin(t f_1), ...]``

    Args:
        t: (N,) timesteps, any real dtype.
        dim: even number of features.
        max_period: longest wavelength over 2 pi.
        layout: order of the features.
        reach_max: divide by ``k - 1`` instead of ``k``: the last frequency is 1 / max_period.

    Returns:
        (N, dim) in t's floating dtype (float32 for integers).
    """
    half = dim // 2
    t = t if t.is_floating_point() else t.float()
    # The table is made in float32 as the public code does; float64 timesteps get a float64 table.
    exponent = torch.arange(half, dtype=t.dtype, device=t.device)
    frequency = torch.exp(-math.log(max_period) * exponent / (half - 1 if reach_max else half))
    angle = t[:, None] * frequency[None]
    if layout == "interleaved":
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    waves = [angle.cos(), angle.sin()]
    return torch.cat(waves if layout == "cos-sin" else waves[::-1], dim=-1)


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
        hidden: width of the first linear layer of the embedding's MLP.
        widths: output channels of each residual block, in order of use.
        out: width of e; as hidden by default.
        layout: order of the embedding's features, see :func:`timestep_embedding`.
        reach_max: whether the last frequency is 1 / 10000, see :func:`timestep_embedding`.
        activate: whether SiLU stands before the projections (SR3 has none there).
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        widths: Sequence[int],
        *,
        out: int | None = None,
        layout: Layout = "cos-sin",
        reach_max: bool = False,
        activate: bool = True,
    ) -> None:
        super().__init__()
        self.features, self.layout, self.reach_max = features, layout, reach_max
        self.activate = activate
        out = out or hidden
        self.embed = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, out))
        self.project = nn.ModuleList(nn.Linear(out, width) for width in widths)

    def forward(self, t: Tensor | float) -> Tensor:
        """Shifts (N, sum of widths) for timesteps t (N,); a number or 0-d t stands for N = 1."""
        weight = self.embed[0].weight
        t = t.reshape(-1) if isinstance(t, Tensor) else weight.new_full((1,), float(t))
        waves = timestep_embedding(t, self.features, layout=self.layout, reach_max=self.reach_max)
        embedding = self.embed(waves.to(weight.dtype))
        if self.activate:
            embedding = F.silu(embedding)
        return torch.cat([project(embedding) for project in self.project], dim=-1)


class ResidualBlock(nn.Module):
    """GN, activation, 3x3 conv, + shift, GN, activation, dropout, 3x3 conv, + shortcut.

    DDPM's block (Ho et al. 2020, appendix B).

    Args:
        channels: input channels.
        out: output channels; a 1x1 convolution is the shortcut when they differ.
        groups: groups of both GroupNorms; must divide both widths.
        dropout: probability, training only.
        eps: epsilon of both GroupNorms.
        activation: SiLU, or LeakyReLU in DRMF's weight network.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        *,
        groups: int = 32,
        dropout: float = 0.0,
        eps: float = 1e-5,
        activation: Activation = F.silu,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.norm1 = nn.GroupNorm(groups, channels, eps=eps)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """X (N, channels, H, W), shift (1 or N, out) -> (N, out, H, W)."""
        h = self.conv1(self.activation(self.norm1(x))) + shift[:, :, None, None]
        h = self.conv2(self.dropout(self.activation(self.norm2(h))))
        return self.shortcut(x) + h


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(C)) v`` over all pixels, one head.

    Args:
        query: (N, C, H, W).
        key: (N, C, h, w).
        value: (N, D, h, w).

    Returns:
        (N, D, H, W).
    """
    # Four dimensions, so that PyTorch takes its kernels that hold no attention map.
    q, k, v = (x.flatten(2).transpose(1, 2)[:, None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
    return out.unflatten(2, (query.shape[2], query.shape[3]))


class SelfAttention(nn.Module):
    """``x + out(attend(q, k, v))`` with q, k, v from GN(x) by one 1x1 convolution.

    Args:
        channels: width C.
        groups: groups of the norm.
        eps: epsilon of the norm.
        bias: whether the convolution to q, k, v has a bias (DDPM's has, SR3's has not).
    """

    def __init__(
        self, channels: int, *, groups: int = 32, eps: float = 1e-5, bias: bool = True
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=eps)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=bias)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> the same shape."""
        q, k, v = split_channels(self.qkv(self.norm(x)), [self.out.in_channels] * 3)
        return x + self.out(attend(q, k, v))


class CrossAttention(nn.Module):
    """Attention of a picture's features to one or more sources, results concatenated.

    ``x + out([attend(q, k_1, v_1), attend(q, k_2, v_2), ...])`` with q from GN(x); keys and values
    come from :class:`KeysAndValues`.

    Args:
        channels: width C.
        sources: how many sources there are.
        groups: groups of the norm.
        eps: epsilon of the norm.
    """

    def __init__(
        self, channels: int, *, sources: int = 2, groups: int = 32, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=eps)
        self.query = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(sources * channels, channels, 1)

    def forward(self, x: Tensor, *sources: Tensor) -> Tensor:
        """X (N, C, H, W), per source [keys, values] (N, 2C, h, w) -> x's shape."""
        channels = self.query.out_channels
        q = self.query(self.norm(x))
        found = []
        for source in sources:
            k, v = split_channels(source, [channels] * 2)
            found.append(attend(q, k, v))
        return x + self.out(torch.cat(found, dim=1))


class KeysAndValues(nn.Module):
    """Keys and values of every cross-attention of a network, from one source's features.

    They do not depend on the sample x_t: one stage makes them once per picture.

    Args:
        channels: width of the source's features.
        widths: width of each attention, in order of use; the result holds 2 of each.
    """

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, 2 * sum(widths), 1)

    def forward(self, source: Tensor) -> Tensor:
        """(N, channels, h, w) -> (N, 2 * sum(widths), h, w): [k_1, v_1, k_2, v_2, ...]."""
        return self.project(source)


class ChannelSpatialGate(nn.Module):
    """A gate per channel and a gate per pixel on the features x.

    ``c = sigmoid(sum over pools of mlp(pool(x)))`` with one shared MLP, ``s = sigmoid(conv1x1 x)``;

    * combine "product": ``x c s`` (after CBAM, Woo et al. 2018), with the pools mean and max;
    * combine "sum": ``x c + x s`` (scSE, Roy et al. 2018), with the pool mean.

    Args:
        channels: width of x.
        reduction: the MLP's hidden width is channels / reduction.
        combine: "product" or "sum".
    """

    def __init__(
        self, channels: int, reduction: int = 8, *, combine: Literal["product", "sum"] = "product"
    ) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.combine = combine
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)
        self.spatial = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> the same shape."""
        channel = self._mlp(x.mean(dim=(2, 3), keepdim=True))
        if self.combine == "product":
            channel = channel + self._mlp(x.amax(dim=(2, 3), keepdim=True))
            return x * torch.sigmoid(channel) * torch.sigmoid(self.spatial(x))
        return x * torch.sigmoid(channel) + x * torch.sigmoid(self.spatial(x))

    def _mlp(self, pooled: Tensor) -> Tensor:
        return self.excite(F.relu(self.squeeze(pooled)))


class BlockConv(nn.Module):
    """A 3x3 convolution over p x p blocks as channels (space to depth first); p = 1 is plain.

    Args:
        channels: channels of the picture.
        out: output channels.
        patch: p.
        bias: whether the convolution has a bias.
    """

    def __init__(self, channels: int, out: int, *, patch: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.patch = patch
        self.conv = nn.Conv2d(channels * patch * patch, out, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, out, H / p, W / p)."""
        return self.conv(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
