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


def lost_contrast(fused: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """How much flatter the fused edges are than the stronger ones of the sources, 0 to about 1.

    ``max(0, 1 - <d f, d> / <d, d>)``: the slope of the fused differences between neighbours over
    d, those of the source that has the larger ones. L1 terms take the median of what an edge may
    be, which is a softer edge; and a term on the power of the edges alone can be met with noise.
    """
    of_f, of_a, of_b = map(_differences, (fused, a, b))
    wanted = torch.where(of_a.abs() >= of_b.abs(), of_a, of_b)
    slope = (of_f * wanted).mean(dim=1) / (wanted.square().mean(dim=1) + 1e-8)
    return F.relu(1.0 - slope).mean()


def invented_edges(fused: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Fused differences between neighbours beyond both sources' own, relative L1.

    ``max(0, |d f| - max(|d a|, |d b|))``: blocks, dashes along an edge, a network's own noise.
    Relative to the mean of what the sources have, never below one grey level.
    """
    of_f, of_a, of_b = (_differences(x).abs() for x in (fused, a, b))
    allowed = torch.maximum(of_a, of_b)
    excess = F.relu(of_f - allowed).mean(dim=1)
    return (excess / allowed.mean(dim=1).clamp_min(1 / 255)).mean()


def lost_information(fused: Tensor, a: Tensor, b: Tensor, bins: int = 32) -> Tensor:
    """``1 - (I(a; f) + I(b; f)) / (H(a) + H(b))``, 0 to 1: how little f tells of both sources.

    MI (Qu, Zhang, Yan 2002) over its largest value, per picture. The histograms are Parzen
    estimates (Thevenaz and Unser 2000): each value is shared between the two bins about it, so that
    they have a derivative, and H is the information of a picture's histogram with itself. A tone
    that changes from place to place costs information: halos, haze, a background not quite black.

    Args:
        fused: (N, 1, H, W); values outside [0, 1] count as its ends.
        a: source A, (N, 1, H, W) in [0, 1].
        b: source B, likewise.
        bins: of each histogram.
    """
    of_f, of_a, of_b = (_memberships(x, bins) for x in (fused, a, b))
    shared = _information(of_a, of_f) + _information(of_b, of_f)
    whole = _information(of_a, of_a) + _information(of_b, of_b)
    return (1.0 - shared / whole.clamp_min(1e-3)).mean()


def _memberships(x: Tensor, bins: int) -> Tensor:
    """How much of each value is in each bin: (N, bins, values), a column sums to 1."""
    at = x.flatten(1).clamp(0.0, 1.0)[:, None] * (bins - 1)
    centres = torch.arange(bins, dtype=x.dtype, device=x.device)[:, None]
    return F.relu(1.0 - (at - centres).abs())


def _information(x: Tensor, y: Tensor) -> Tensor:
    """Mutual information in bits of two pictures' memberships, (N,)."""
    joint = x @ y.transpose(1, 2) / x.shape[2]
    apart = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    ratio = torch.log2((joint + 1e-12) / (apart + 1e-12))
    return (joint * ratio).sum(dim=(1, 2))


def _differences(x: Tensor) -> Tensor:
    """Of neighbours, down and across: (N, all of them)."""
    return torch.cat([x.diff(dim=2).flatten(1), x.diff(dim=3).flatten(1)], dim=1)


def correlation(x: Tensor, y: Tensor, floor: float = 1e-6) -> Tensor:
    """Pearson correlation per picture, (N,); the floor (a variance) keeps flat patches finite."""
    x = x - x.mean(dim=(1, 2, 3), keepdim=True)
    y = y - y.mean(dim=(1, 2, 3), keepdim=True)
    power = (x * x).mean(dim=(1, 2, 3)) * (y * y).mean(dim=(1, 2, 3))
    return (x * y).mean(dim=(1, 2, 3)) / (power + floor**2).sqrt()


def out_of_range(x: Tensor) -> Tensor:
    """How far values lie outside [0, 1], L1: clamping them later loses their gradient."""
    return (F.relu(x - 1.0) + F.relu(-x)).mean()


# --- terms of the published systems ---------------------------------------------------------------


def edge_strength(x: Tensor) -> Tensor:
    """``|gx| + |gy|`` with the plain Sobel kernels (1, 2, 1), as in the public codes; N1HW."""
    return 4.0 * sobel(x).abs().sum(1, keepdim=True)


def strongest_edges(fused: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``| |grad f| - max(|grad a|, |grad b|) |_1``: equation 19 of DMNet, DMFuse's, DRMF's."""
    target = torch.maximum(edge_strength(a), edge_strength(b))
    return (edge_strength(fused) - target).abs().mean()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity per picture, (N,), for (N, C, H, W) in [0, 1], sides at least 11.

    An 11 x 11 Gaussian window of sigma 1.5 where it fits, C1 = 0.01^2, C2 = 0.03^2, mean over
    pixels and channels (Wang et al. 2004).
    """
    n, c, height, width = x.shape
    at = torch.arange(11, dtype=x.dtype, device=x.device) - 5
    taps = torch.exp(-0.5 * (at / 1.5) ** 2)
    taps = taps / taps.sum()

    def local(*products: Tensor) -> list[Tensor]:
        flat = torch.cat([p.reshape(n * c, 1, height, width) for p in products])
        flat = F.conv2d(F.conv2d(flat, taps[None, None, :, None]), taps[None, None, None])
        return list(flat.chunk(len(products)))

    mean_x, mean_y, xx, yy, xy = local(x, y, x * x, y * y, x * y)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    variances = (xx - mean_x**2) + (yy - mean_y**2)
    index = luminance * (2 * (xy - mean_x * mean_y) + c2) / (variances + c2)
    return index.reshape(n, -1).mean(dim=1)


def distance(x: Tensor, y: Tensor) -> Tensor:
    """``||x - y||_2`` per picture over the root of its number of values, mean over pictures."""
    square = ((x - y) ** 2).mean(dim=(1, 2, 3))
    return (square + 1e-12).sqrt().mean()  # the root of 0 has no derivative


def colour_angle(x: Tensor, y: Tensor) -> Tensor:
    """Mean angle in radians between the RGB vectors of (N, 3, H, W) in [0, 1].

    Equation 17 of Mask-DiFuser. Every channel gets a grey level more: black has no direction. The
    arctangent of sine and cosine has a finite derivative at equal colours, the arccosine has not.
    """
    x, y = x + 1 / 255, y + 1 / 255
    sine = (torch.linalg.cross(x, y, dim=1).square().sum(1) + 1e-12).sqrt()
    return torch.atan2(sine, (x * y).sum(1)).mean()


def to_ycbcr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Luma (N, 1, H, W) and chroma (N, 2, H, W) about 0 of RGB pictures (BT.601 full range)."""
    red, green, blue = x[:, :1], x[:, 1:2], x[:, 2:3]
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    return y, torch.cat([(blue - y) / 1.772, (red - y) / 1.402], dim=1)


def stronger_chroma(chroma_a: Tensor, chroma_b: Tensor) -> Tensor:
    """The chroma (N, 2, H, W) of the source that has more of it; b's where both are equal.

    PET and SPECT keep their colours so; of grey infrared and a colour picture it is the picture's.
    """
    stronger = chroma_a.abs().sum(1, keepdim=True) > chroma_b.abs().sum(1, keepdim=True)
    return torch.where(stronger, chroma_a, chroma_b)
