"""Restormer's transformer layer: attention across channels, and its feed-forward network.

Source: Zamir et al., "Restormer: efficient transformer for high-resolution image restoration",
CVPR 2022, section 3. The cost is linear in the number of pixels, because the attention map is
channels x channels. CDDFuse, DMNet and one reading of Mask-DiFuser's semantic encoder use it.
All tensors are (N, C, H, W).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """Layer normalisation of every pixel's channels: ``(x - mean) / sqrt(var + eps) * w + b``.

    Args:
        channels: C.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> the same shape."""
        centred = x - x.mean(dim=1, keepdim=True)
        variance = (centred * centred).mean(dim=1, keepdim=True)
        scale = torch.rsqrt(variance + self.eps)
        return centred * scale * self.weight[:, None, None] + self.bias[:, None, None]


class ChannelAttention(nn.Module):
    """Multi-head attention between channels (MDTA, Restormer's section 3.1).

    ``q, k, v = depthwise3x3(conv1x1(x))``; q and k are scaled to length 1 along the pixels;
    ``out = conv1x1(softmax(q k^T * temperature) v)``, a (C / heads)^2 map per head.

    Args:
        channels: C.
        heads: divides C.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.mix = nn.Conv2d(
            3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=False
        )
        self.out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> the same shape."""
        n, c, h, w = x.shape
        q, k, v = self.mix(self.qkv(x)).reshape(n, 3, self.heads, c // self.heads, h * w).unbind(1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        mixed = torch.softmax(scores * self.temperature, dim=-1) @ v
        return self.out(mixed.reshape(n, c, h, w))


class GatedFeedForward(nn.Module):
    """``conv1x1(gelu(a) * b)`` with ``a, b = depthwise3x3(conv1x1(x))`` (GDFN, section 3.2).

    Args:
        channels: C.
        expansion: width of a and of b over C, rounded down.
    """

    def __init__(self, channels: int, expansion: float) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.widen = nn.Conv2d(channels, 2 * hidden, 1, bias=False)
        self.mix = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.out = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> the same shape."""
        a, b = self.mix(self.widen(x)).chunk(2, dim=1)
        return self.out(F.gelu(a) * b)


class TransformerLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``.

    Args:
        channels: C.
        heads: divides C.
        expansion: see :class:`GatedFeedForward`.
    """

    def __init__(self, channels: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.attention = ChannelAttention(channels, heads)
        self.norm2 = ChannelNorm(channels)
        self.feed_forward = GatedFeedForward(channels, expansion)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))
