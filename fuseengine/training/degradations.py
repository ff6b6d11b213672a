"""Random degradations of training patches: what cameras do to a picture before it is fused."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Degradation = Callable[[Tensor, torch.Generator], Tensor]


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur of (N, C, H, W), sigma in pixels, replicated border."""
    radius = max(1, math.ceil(3 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma) ** 2)
    taps = (taps / taps.sum()).to(x.dtype)
    n, c = x.shape[:2]
    flat = F.pad(x.reshape(n * c, 1, *x.shape[2:]), (radius,) * 4, mode="replicate")
    flat = F.conv2d(F.conv2d(flat, taps[None, None, :, None]), taps[None, None, None])
    return flat.reshape(x.shape)


def add_noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """White Gaussian noise, standard deviation 0.03 to 0.08 of full scale: above sensor grain."""
    sigma = 0.03 + 0.05 * _uniform(generator)
    return x + sigma * torch.randn(x.shape, generator=generator).to(x)


def add_stripes(x: Tensor, generator: torch.Generator) -> Tensor:
    """Fixed column offsets as uncooled thermal sensors have, standard deviation up to 0.03."""
    sigma = 0.03 * _uniform(generator)
    return x + sigma * torch.randn((x.shape[0], 1, 1, x.shape[3]), generator=generator).to(x)


def defocus(x: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur, sigma 0.3 to 1.2 pixels."""
    return gaussian_blur(x, 0.3 + 0.9 * _uniform(generator))


def lower_resolution(x: Tensor, generator: torch.Generator) -> Tensor:
    """Average pooling by 2 and bilinear enlargement."""
    small = F.avg_pool2d(x, 2)
    return F.interpolate(small, x.shape[2:], mode="bilinear", align_corners=False)


def degrade(x: Tensor, generator: torch.Generator, *, infrared: bool, chance: float) -> Tensor:
    """Each degradation in turn with a small chance, order as light passes: optics, sensor, noise.

    Args:
        x: (N, 1, H, W) in [0, 1].
        generator: source of every draw.
        infrared: whether stripes can occur.
        chance: probability that anything is degraded at all.

    Returns:
        The same shape, clamped to [0, 1].
    """
    if _uniform(generator) >= chance:
        return x
    options: list[Degradation] = [defocus, lower_resolution, add_noise]
    if infrared:
        options.append(add_stripes)
    for option in options:
        if _uniform(generator) < 0.4:
            x = option(x, generator)
    return x.clamp(0.0, 1.0)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))
