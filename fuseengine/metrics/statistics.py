"""Statistics of the fused image, correlation with the sources, error against them."""

from __future__ import annotations

import math

import numpy as np

from fuseengine.metrics.images import SOURCES, Images
from fuseengine.metrics.registry import metric


@metric(
    "SD",
    "standard deviation",
    range=(0, 127.5),
    unit="grey levels",
    needs_sources=False,
    source="Rao 1997, In-fibre Bragg grating sensors",
)
def standard_deviation(images: Images) -> float:
    """SD = sqrt(mean((F - mean F)^2)), divisor N."""
    return math.sqrt(_covariance(images, "f", "f")) / images.levels["f"].size


@metric(
    "SF",
    "spatial frequency",
    range=(0, 360.7),
    unit="grey levels",
    needs_sources=False,
    source="Eskicioglu, Fisher 1995, Image quality measures and their performance",
)
def spatial_frequency(images: Images) -> float:
    """SF = sqrt(mean of squared vertical differences + mean of squared horizontal differences)."""
    return _spatial_frequency(images)


@metric(
    "AG",
    "average gradient",
    range=(0, 255),
    unit="grey levels",
    needs_sources=False,
    source="Cui et al. 2015, Detail preserved fusion of visible and infrared images",
)
def average_gradient(images: Images) -> float:
    """AG = sum sqrt((gx^2 + gy^2) / 2) / ((H-1)(W-1)), central differences as numpy.gradient.

    The range holds from a dozen pixels a side on; smaller pictures are all border.
    """
    height, width = images.shape
    return _gradient_sum(images) / ((height - 1) * (width - 1))


@metric(
    "CC",
    "correlation coefficient",
    range=(-1, 1),
    source="Deshmukh, Bhosale 2010, Image fusion and image quality assessment of fused images",
)
def correlation_coefficient(images: Images) -> float:
    """CC = (corr(A, F) + corr(B, F)) / 2; a correlation with a constant is 0."""
    spread = _covariance(images, "f", "f")
    return 0.5 * sum(
        _correlation(_covariance(images, x, "f"), _covariance(images, x, x), spread)
        for x in SOURCES
    )


@metric(
    "SCD",
    "sum of the correlations of differences",
    range=(-2, 2),
    source="Aslantas, Bendes 2015, A new image quality metric for image fusion",
)
def scd(images: Images) -> float:
    """SCD = corr(F - B, A) + corr(F - A, B), signed; a correlation with a constant is 0."""
    total = 0.0
    for x, other in (("a", "b"), ("b", "a")):
        spread = sum(
            sign * _covariance(images, *pair)
            for sign, pair in ((1, "ff"), (-2, f"f{other}"), (1, other * 2))
        )
        covariance = _covariance(images, "f", x) - _covariance(images, other, x)
        total += _correlation(covariance, spread, _covariance(images, x, x))
    return total


@metric(
    "MSE",
    "mean squared error",
    range=(0, 1),
    higher_is_better=False,
    source="Jagalingam, Hegde 2015, A review of quality metrics for fused image",
)
def mse(images: Images) -> float:
    """MSE = (mean((A - F)^2) + mean((B - F)^2)) / 2 on 0..1."""
    return _mean_square(images)


@metric(
    "PSNR",
    "peak signal-to-noise ratio",
    range=(0, math.inf),
    unit="dB",
    source="Jagalingam, Hegde 2015, A review of quality metrics for fused image",
)
def psnr(images: Images) -> float:
    """PSNR = 10 log10(1 / MSE) with the mean of both errors; infinite where A = B = F."""
    return _decibel(images, 1.0)


@metric(
    "PSNR_plus48",
    "peak signal-to-noise ratio, 48.13 dB too high",
    range=(20 * math.log10(255), math.inf),
    unit="dB",
    variant_of="PSNR",
    source="the MATLAB code of Evaluation-for-Image-Fusion",
)
def psnr_plus48(images: Images) -> float:
    """PSNR + 20 log10 255: errors on 0..1, but a peak of 255."""
    return _decibel(images, 255.0)


@metric(
    "PSNR_peak_max",
    "peak signal-to-noise ratio for the peak max(F)",
    range=(-math.inf, math.inf),
    unit="dB",
    variant_of="PSNR",
    source="the Python evaluator of CDDFuse",
)
def psnr_peak_max(images: Images) -> float:
    """PSNR with the brightest pixel of F as peak; minus infinity where F is black."""
    return _decibel(images, float(images.levels["f"].max()) / 255)


@metric(
    "SF_unit_range",
    "spatial frequency on 0..1",
    range=(0, 360.7 / 255),
    needs_sources=False,
    variant_of="SF",
    source="the spreadsheet of Evaluation-for-Image-Fusion",
)
def sf_unit_range(images: Images) -> float:
    """SF / 255."""
    return _spatial_frequency(images) / 255


@metric(
    "AG_hw",
    "average gradient over H times W",
    range=(0, 255),
    unit="grey levels",
    needs_sources=False,
    variant_of="AG",
    source="the Python evaluator of CDDFuse",
)
def ag_hw(images: Images) -> float:
    """AG with the divisor H W."""
    return _gradient_sum(images) / (images.shape[0] * images.shape[1])


@metric(
    "SD_u8",
    "standard deviation in saturating 8-bit arithmetic",
    range=(0, 255**0.5),
    unit="grey levels",
    needs_sources=False,
    variant_of="SD",
    source="the MATLAB code of Evaluation-for-Image-Fusion before March 2023",
)
def sd_u8(images: Images) -> float:
    """SD where F - mean F is cut to whole numbers of 0..255, and its square to 255."""
    f = images.floats["f"]
    difference = np.clip(np.rint(f - f.mean()), 0, 255)
    return math.sqrt(np.minimum(difference**2, 255).mean())


def _spatial_frequency(images: Images) -> float:
    f = images.floats["f"]
    differences = f[1:] - f[:-1], f[:, 1:] - f[:, :-1]
    return math.sqrt(sum(float(np.vdot(d, d)) / d.size for d in differences))


def _gradient_sum(images: Images) -> float:
    gy, gx = np.gradient(images.floats["f"])
    return float(np.sqrt((gx * gx + gy * gy) / 2).sum())


def _sums(images: Images) -> dict[str, int]:
    """Sums of the pictures and of their products. They stay below 2^53, so they are exact."""
    pictures = images.floats
    sums = {name: int(x.sum()) for name, x in pictures.items()}
    for x in pictures:
        for y in pictures:
            sums[x + y] = sums[y + x] if y + x in sums else int(np.vdot(pictures[x], pictures[y]))
    return sums


def _covariance(images: Images, x: str, y: str) -> int:
    """The covariance of two pictures times N^2, exactly: 0 for a constant one."""
    sums = images.once(_sums)
    return images.levels["f"].size * sums[x + y] - sums[x] * sums[y]


def _correlation(covariance: int, first: int, second: int) -> float:
    return covariance / math.sqrt(first * second) if first and second else 0.0


def _mean_square(images: Images) -> float:
    sums = images.once(_sums)
    error = sum(sums[x + x] - 2 * sums[x + "f"] + sums["ff"] for x in SOURCES)
    return error / (2 * 255**2 * images.levels["f"].size)


def _decibel(images: Images, peak: float) -> float:
    error = _mean_square(images)
    if not error:
        return math.inf
    return 10 * math.log10(peak**2 / error) if peak else -math.inf
