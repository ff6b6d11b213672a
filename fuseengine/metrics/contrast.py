"""Metrics behind a model of the eye's contrast sensitivity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from fuseengine.metrics.filters import gaussian, padded, smooth
from fuseengine.metrics.gradient import sobel
from fuseengine.metrics.images import NAMES, SOURCES, Image, Images, strips
from fuseengine.metrics.registry import metric

_BLOCK = 16


@metric(
    "Q_CB",
    "Chen and Blum's quality index",
    range=(0, 1),
    source="Chen, Blum 2009, A new automated quality assessment algorithm for image fusion",
)
def q_cb(images: Images) -> float:
    """Q_CB = mean of l_A Q_A + (1 - l_A) Q_B.

    The stretched images pass the contrast sensitivity filter exp(-(r / 15.3870)^2) -
    0.7622 exp(-(r / 1.3456)^2). Their contrast |(G2 * x) / (G4 * x) - 1| is masked to
    c^3 / (c^2 + 1e-4); Q_X = min(c_X, c_F) / max(c_X, c_F), 1 where both are 0;
    l_A = c_A^2 / (c_A^2 + c_B^2), 1/2 where both are 0.
    """
    fine, coarse = images.once(_surrounds)
    total = 0.0
    for rows in strips(*images.shape):
        contrast = {
            name: _masked_contrast(fine[k, rows], coarse[k, rows]) for k, name in enumerate(NAMES)
        }
        quality = {x: _quotient(contrast[x], contrast["f"]) for x in SOURCES}
        square = {x: contrast[x] ** 2 for x in SOURCES}
        both = square["a"] + square["b"]
        share = np.divide(square["a"], both, out=np.full_like(both, 0.5), where=both > 0)
        total += float((quality["b"] + share * (quality["a"] - quality["b"])).sum())
    return total / images.levels["f"].size


@metric(
    "Q_CV",
    "Chen and Varshney's perception error",
    range=(0, math.inf),
    higher_is_better=False,
    source="Chen, Varshney 2007, A human perception inspired quality metric for image fusion "
    "based on regional information",
)
def q_cv(images: Images) -> float:
    """Q_CV = sum(L_A D_A + L_B D_B) / sum(L_A + L_B) over blocks of 16 x 16 pixels.

    Of the stretched images, completed by zeros: L is the sum of the Sobel magnitude to the fifth
    power, D the mean square of X - F behind 2.6 (0.0192 + 0.144 r) exp(-(0.144 r)^1.1). Without
    any gradient in A and B, the mean of D.
    """
    sensitivity = _sensitivity_cv(_radius(images.shape, 8))
    stretched = {name: levels.astype(np.float64) for name, levels in images.stretched.items()}
    weighted = weights = plain = 0.0
    for x in SOURCES:
        dx, dy = (part.astype(np.float64) for part in sobel(images.stretched[x], "constant"))
        saliency = _block_sums((dx * dx + dy * dy) ** 2.5)
        difference = _filtered(stretched[x] - stretched["f"], sensitivity)
        error = _block_sums(difference * difference) / _BLOCK**2
        weighted += float(np.vdot(saliency, error))
        weights += float(saliency.sum())
        plain += float(error.mean()) / 2
    return weighted / weights if weights else plain


def _surrounds(images: Images) -> tuple[Image, Image]:
    """The filtered pictures under Gaussians of sigma 2 and 4, (3, H, W) each."""
    sensitivity = _sensitivity_cb(_radius(images.shape, 30))
    stack = np.stack([_filtered(images.stretched[name], sensitivity) for name in NAMES])
    fine, coarse = (gaussian(31, sigma, _unnormalised(sigma)) for sigma in (2.0, 4.0))
    stack = padded(stack, fine)
    return smooth(stack, fine), smooth(stack, coarse)


def _unnormalised(sigma: float) -> float:
    """What a 31 x 31 Gaussian sums to whose factor is 1 / (2 pi sigma^2)."""
    taps = np.exp(-(np.arange(-15, 16) ** 2) / (2 * sigma**2))
    return float(taps.sum()) ** 2 / (2 * math.pi * sigma**2)


def _radius(shape: tuple[int, int], divisor: int) -> Image:
    """Spatial frequency of a real transform's terms in the metrics' units, (H, W // 2 + 1)."""
    height, width = shape
    v = scipy.fft.fftfreq(height) * 2 * height / divisor
    u = scipy.fft.rfftfreq(width) * 2 * width / divisor
    return np.hypot(v[:, None], u)


def _sensitivity_cb(r: Image) -> Image:
    return np.exp(-((r / 15.3870) ** 2)) - 0.7622 * np.exp(-((r / 1.3456) ** 2))


def _sensitivity_cv(r: Image) -> Image:
    r = 0.144 * r
    return 2.6 * (0.0192 + r) * np.exp(-(r**1.1))


def _filtered(x: NDArray[Any], response: Image) -> Image:
    spectrum = scipy.fft.rfft2(x)
    spectrum *= response
    return scipy.fft.irfft2(spectrum, s=x.shape, overwrite_x=True)


def _masked_contrast(fine: Image, coarse: Image) -> Image:
    """0 where there is neither."""
    c = np.divide(fine, coarse, out=np.ones_like(fine), where=coarse != 0)
    c -= 1
    np.abs(c, out=c)
    square = c * c
    c *= square
    square += 1e-4
    return np.divide(c, square, out=c)


def _quotient(x: Image, f: Image) -> Image:
    """The smaller over the larger, 1 where both are 0."""
    larger = np.maximum(x, f)
    return np.divide(np.minimum(x, f), larger, out=np.ones_like(larger), where=larger > 0)


def _block_sums(x: Image) -> Image:
    """Sums over blocks; what the image lacks counts as 0."""
    for axis in (0, 1):
        x = np.add.reduceat(x, np.arange(0, x.shape[axis], _BLOCK), axis=axis)
    return x
