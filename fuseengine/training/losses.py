"""Fusion losses, all on (N, 1, H, W) in [0, 1], all means, all differentiable in ``fused``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SOBEL = torch.tensor([[[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]])
_SOBEL = torch.stack([_SOBEL, _SOBEL.transpose(1, 2)]) / 4.0


def sobel(x: Tensor) -> Tensor:
    """Horizontal and vertical Sobel derivative, (N, 2, H, W), grey levels per two pixels."""
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), _SOBEL.to(x))


def gradient_selection(fused: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """How far the fused gradient is from that of the source with the stronger edge, relative L1.

    Both components with their sign: matching |grad| alone (DRFusion's equation 23) leaves edge
    polarity free, and what is lost there is what Qabf (Xydeas and Petrovic 2000) measures. Relative
    to each picture's mean target gradient (never below one grey level), so that a soft low-contrast
    picture counts as much as a crisp one.
    """
    grad_a, grad_b = sobel(a), sobel(b)
    stronger_a = (grad_a**2).sum(1, keepdim=True) >= (grad_b**2).sum(1, keepdim=True)
    target = torch.where(stronger_a, grad_a, grad_b)
    scale = target.abs().mean(dim=(1, 2, 3)).clamp_min(1 / 255)
    return ((sobel(fused) - target).abs().mean(dim=(1, 2, 3)) / scale).mean()


def brightest(fused: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``|f - max(a, b)|_1``: DRFusion's intensity term (equation 22); keeps warm targets bright."""
    return (fused - torch.maximum(a, b)).abs().mean()


def difference_correlation(fused: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``2 - corr(f - b, a) - corr(f - a, b)``: what one source adds to the other must be there.

    One minus half of SCD (Aslantas and Bendes 2015) up to scale; it fixes the large-scale contrast
    that gradients leave open, where the plain maximum washes out.
    """
    return (2.0 - correlation(fused - b, a) - correlation(fused - a, b)).mean()


def correlation(x: Tensor, y: Tensor, floor: float = 1e-6) -> Tensor:
    """Pearson correlation per picture, (N,); the floor (a variance) keeps flat patches finite."""
    x = x - x.mean(dim=(1, 2, 3), keepdim=True)
    y = y - y.mean(dim=(1, 2, 3), keepdim=True)
    power = (x * x).mean(dim=(1, 2, 3)) * (y * y).mean(dim=(1, 2, 3))
    return (x * y).mean(dim=(1, 2, 3)) / (power + floor**2).sqrt()


def out_of_range(x: Tensor) -> Tensor:
    """How far values lie outside [0, 1], L1: clamping them later loses their gradient."""
    return (F.relu(x - 1.0) + F.relu(-x)).mean()
