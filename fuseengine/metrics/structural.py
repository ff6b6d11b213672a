"""Structural similarity with the sources, and the quality indices built on it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fuseengine.metrics.filters import Moments, flat, gaussian
from fuseengine.metrics.images import NAMES, SOURCES, Image, Images
from fuseengine.metrics.registry import metric

_PAIRS = ("aa", "bb", "ff", "ab", "af", "bf")
_MS_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_MS_SIDE = 161
_FLAT = 1e-6
"""Variance below which a patch is flat: below what one grey level makes, far above rounding."""


class _Constants(NamedTuple):
    """What keeps SSIM's quotients from 0 / 0."""

    luminance: float
    contrast: float


def _constants(peak: float) -> _Constants:
    return _Constants((0.01 * peak) ** 2, (0.03 * peak) ** 2)


@metric(
    "SSIM",
    "structural similarity, mean over the sources",
    range=(-1, 1),
    min_side=11,
    source="Wang, Bovik, Sheikh, Simoncelli 2004, Image quality assessment: from error visibility "
    "to structural similarity",
)
def ssim(images: Images) -> float:
    """SSIM = (SSIM(A, F) + SSIM(B, F)) / 2.

    SSIM(X, F) is the mean of (2 m_X m_F + C1)(2 s_XF + C2) / ((m_X^2 + m_F^2 + C1)(s_X + s_F + C2))
    with local means m and variances s under an 11 x 11 Gaussian of sigma 1.5 where it fits,
    C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2.
    """
    means = images.once(_ssim_means, 0, "even", _constants(255))
    return sum(means[x].ssim for x in SOURCES) / 2


@metric(
    "MS_SSIM",
    "multi-scale structural similarity, mean over the sources",
    range=(0, 1),
    min_side=_MS_SIDE,
    source="Wang, Simoncelli, Bovik 2003, Multi-scale structural similarity for image quality "
    "assessment (as pytorch-msssim computes it)",
)
def ms_ssim(images: Images) -> float:
    """MS_SSIM = (MS_SSIM(A, F) + MS_SSIM(B, F)) / 2.

    The product over five scales of the mean contrast-structure term, of the last one of the mean
    SSIM, each cut at 0, to the powers 0.0448, 0.2856, 0.3001, 0.2363, 0.1333. Between scales 2 x 2
    means; an odd side is bordered by zeros first. One negative scale makes the product 0.
    """
    return sum(_ms_ssim(images, x, _constants(255)) for x in SOURCES) / 2


@metric(
    "MEF_SSIM",
    "structural similarity for exposure fusion",
    range=(-1, 1),
    min_side=11,
    source="Ma, Zeng, Wang 2015, Perceptual quality assessment for multi-exposure image fusion",
)
def mef_ssim(images: Images) -> float:
    """MEF_SSIM = mean of (2 s_RF + C) / (s_R + s_F + C), C = (0.03 * 255)^2.

    R is the patch one would like: both sources' 11 x 11 patches without their means, weighted by
    their strength to the power of how consistent they are, brought to the norm of the stronger
    one; s are variances under an 11 x 11 Gaussian of sigma 1.5. No luminance term.
    """
    return images.once(_mef_mean, 0)


@metric(
    "MEF_MS_SSIM",
    "multi-scale structural similarity for exposure fusion",
    range=(0, 1),
    min_side=41,
    source="Ma, Zeng, Wang 2015, Perceptual quality assessment for multi-exposure image fusion",
)
def mef_ms_ssim(images: Images) -> float:
    """MEF_MS_SSIM = product of MEF_SSIM at three scales, powers (0.0448, 0.2856, 0.3001) / 0.6305.

    Between scales 2 x 2 means, the last row or column of an odd side repeated. A negative scale
    counts as 0.
    """
    weights = _MS_WEIGHTS[:3]
    return math.prod(
        max(images.once(_mef_mean, level), 0.0) ** (weight / sum(weights))
        for level, weight in enumerate(weights)
    )


@metric(
    "Q_S",
    "Piella's quality index, unweighted",
    range=(-1, 1),
    min_side=11,
    source="Piella, Heijmans 2003, A new quality metric for image fusion (with SSIM, as in Liu's "
    "toolbox)",
)
def q_s(images: Images) -> float:
    """Q_S = mean of l SSIM(A, F) + (1 - l) SSIM(B, F), l = s_A / (s_A + s_B), SSIM as above.

    Variances s below 1e-6 count as 0, and l is 1/2 where both are 0.
    """
    return images.once(_piella, "levels").plain


@metric(
    "Q_W",
    "Piella's quality index, weighted",
    range=(-1, 1),
    min_side=11,
    source="Piella, Heijmans 2003, A new quality metric for image fusion (with SSIM, as in Liu's "
    "toolbox)",
)
def q_w(images: Images) -> float:
    """Q_W = sum c q / sum c, q the map of Q_S, c = max(s_A, s_B); Q_S where both are flat."""
    return images.once(_piella, "levels").weighted


@metric(
    "Q_E",
    "Piella's edge-dependent quality index",
    range=(-1, 1),
    min_side=11,
    source="Piella, Heijmans 2003, A new quality metric for image fusion (with SSIM, as Liu's "
    "toolbox means it)",
)
def q_e(images: Images) -> float:
    """Q_E = Q_W of the images times Q_W of their Prewitt magnitudes."""
    return images.once(_piella, "levels").weighted * images.once(_piella, "edges").weighted


@metric(
    "Q_Y",
    "Yang's quality index",
    range=(-1, 1),
    min_side=7,
    source="Yang, Zhang, Wang, Liu 2008, A novel similarity based quality metric for image fusion",
)
def q_y(images: Images) -> float:
    """Q_Y = mean of l SSIM(A, F) + (1 - l) SSIM(B, F), or of the larger one.

    The larger one counts where SSIM(A, B) < 0.75. Window 7 x 7 Gaussian of sigma 1.5, constants
    2e-16, l as in Q_S; patches with a variance below 1e-6 are flat, and two flat ones are compared
    by their means alone (the public code divides rounding errors there).
    """
    return images.once(_small_window_indices).yang


@metric(
    "Q_C",
    "Cvejic's quality index",
    range=(-1, 1),
    min_side=7,
    source="Cvejic, Loza, Bull, Canagarajah 2006, A similarity metric for assessment of image "
    "fusion algorithms",
)
def q_c(images: Images) -> float:
    """Q_C = mean of t SSIM(A, F) + (1 - t) SSIM(B, F), t = s_AF / (s_AF + s_BF).

    It is 0 where t < 0 and 1 where t > 1; t is 1/2 where both covariances are 0. Window, constants
    and flat patches as in Q_Y.
    """
    return images.once(_small_window_indices).cvejic


@metric(
    "SSIM_range1",
    "structural similarity with a range of 1 for grey levels, mean over the sources",
    range=(-1, 1),
    min_side=11,
    variant_of="SSIM",
    source="MATLAB's ssim on doubles of 0..255, in Evaluation-for-Image-Fusion",
)
def ssim_range1(images: Images) -> float:
    """SSIM with constants 65025 times too small."""
    means = images.once(_ssim_means, 0, "even", _constants(1))
    return sum(means[x].ssim for x in SOURCES) / 2


@metric(
    "SSIM_uniform7_R2_sum",
    "structural similarity, uniform window, range 2, summed",
    range=(-2, 2),
    min_side=7,
    variant_of="SSIM",
    source="the Python evaluator of CDDFuse (scikit-image 0.19 on float32)",
)
def ssim_uniform7_r2_sum(images: Images) -> float:
    """SSIM(A, F) + SSIM(B, F), 7 x 7 window of ones, sample covariance, C for a range of 2."""
    moments = Moments(images.floats, flat(7), ("aa", "bb", "ff", "af", "bf"))
    means = _means_of(moments, _constants(2), unbiased=49 / 48)
    return sum(means[x].ssim for x in SOURCES)


@metric(
    "MS_SSIM_x255_sum",
    "multi-scale structural similarity of pictures scaled by 255 twice, summed",
    range=(0, 2),
    min_side=_MS_SIDE,
    variant_of="MS_SSIM",
    source="the Python port of the MATLAB code in IVIF_ZOO; printed by DMNet",
)
def ms_ssim_x255_sum(images: Images) -> float:
    """MS_SSIM(255 A, 255 F) + MS_SSIM(255 B, 255 F) with constants for 255."""
    # Scaling the pictures by 255 is dividing the constants by 255^2.
    return sum(_ms_ssim(images, x, _constants(1)) for x in SOURCES)


# --- scales -----------------------------------------------------------------------------------


def _border(images: Images, level: int, border: str) -> str:
    """The border, or "even" where no side is odd on the way to a level: all are the same there."""
    return "even" if all(side % 2**level == 0 for side in images.shape) else border


def _level(images: Images, level: int, border: str) -> dict[str, Image]:
    """The pictures after so many halvings, a border "zeros" or "repeat" completing odd sides."""
    if level == 0:
        return images.floats
    finer = images.once(_level, level - 1, _border(images, level - 1, border))
    return {name: _half(picture, border) for name, picture in finer.items()}


def _half(x: Image, border: str) -> Image:
    """2 x 2 means."""
    odd = [side % 2 for side in x.shape]
    if border == "zeros":
        x = np.pad(x, [(n, n) for n in odd])[: x.shape[0] + odd[0], : x.shape[1] + odd[1]]
    elif any(odd):
        x = np.pad(x, [(0, n) for n in odd], mode="edge")
    rows = x[::2] + x[1::2]
    return (rows[:, ::2] + rows[:, 1::2]) / 4


def _moments(images: Images, level: int, border: str) -> Moments:
    """Under SSIM's window. Even sides make the levels of all pyramids the same: shared."""
    return Moments(images.once(_level, level, border), gaussian(11, 1.5), _PAIRS)


# --- SSIM -------------------------------------------------------------------------------------


class _Means(NamedTuple):
    """Means over a map.

    Attributes:
        ssim: of SSIM.
        contrast: of its contrast-structure factor.
    """

    ssim: float
    contrast: float


def _ssim_means(
    images: Images, level: int, border: str, constants: _Constants
) -> dict[str, _Means]:
    return _means_of(images.once(_moments, level, border), constants)


def _means_of(moments: Moments, constants: _Constants, unbiased: float = 1.0) -> dict[str, _Means]:
    """By source. `unbiased` multiplies all covariances."""
    sums = {x: np.zeros(2) for x in SOURCES}
    for _, m in moments.strips():
        for x in SOURCES:
            luminance, contrast = _ssim_factors(m, x, "f", constants, unbiased)
            sums[x] += (luminance * contrast).sum(), contrast.sum()
    count = moments.shape[0] * moments.shape[1]
    return {x: _Means(*(sums[x] / count).tolist()) for x in SOURCES}


def _ssim_factors(
    m: dict[str, Image], x: str, y: str, constants: _Constants, unbiased: float = 1.0
) -> tuple[Image, Image]:
    """Luminance and contrast-structure of two pictures."""
    return (
        _similarity(m[x] * m[y], m[x] ** 2 + m[y] ** 2, constants.luminance),
        _similarity(m[x + y], m[x + x] + m[y + y], constants.contrast / unbiased),
    )


def _similarity(product: Image, squares: Image, constant: float) -> Image:
    """(2 product + constant) / (squares + constant)."""
    return (2 * product + constant) / (squares + constant)


def _ms_ssim(images: Images, source: str, constants: _Constants) -> float:
    value = 1.0
    for level, weight in enumerate(_MS_WEIGHTS):
        border = _border(images, level, "zeros")
        means = images.once(_ssim_means, level, border, constants)[source]
        last = level == len(_MS_WEIGHTS) - 1
        value *= max(means.ssim if last else means.contrast, 0.0) ** weight
    return value


# --- exposure fusion --------------------------------------------------------------------------


def _mef_mean(images: Images, level: int) -> float:
    border = _border(images, level, "repeat")
    weighted = images.once(_moments, level, border)
    # Sums under ones of the same patches, for norms.
    sources = {x: images.once(_level, level, border)[x] for x in SOURCES}
    plain = Moments(sources, flat(11), ("aa", "bb", "ab"))
    total = 0.0
    for (_, m), (_, p) in zip(weighted.strips(), plain.strips(), strict=True):
        total += float(_mef_map(m, p).sum())
    return total / (plain.shape[0] * plain.shape[1])


def _mef_map(m: dict[str, Image], p: dict[str, Image]) -> Image:
    """The index of every patch, from Gaussian moments and from plain ones of the sources."""
    pixels, tiny = 121, float(np.finfo(np.float64).eps)
    square = {x: np.maximum(pixels * p[x + x], 0) for x in SOURCES}
    product = pixels * p["ab"]
    norm = {x: np.sqrt(square[x]) for x in SOURCES}

    together = np.sqrt(np.maximum(square["a"] + square["b"] + 2 * product, 0))
    consistency = np.clip((together + tiny) / (norm["a"] + norm["b"] + tiny), tiny, 1 - tiny)
    power = np.minimum(np.tan(np.pi / 2 * consistency), 10)

    strength = {x: norm[x] + 0.001 for x in SOURCES}
    weight = {x: np.exp(power * np.log(strength[x] / 11)) + tiny for x in SOURCES}
    # The reference patch is alpha (A - mean A) + beta (B - mean B).
    every = weight["a"] + weight["b"]
    alpha, beta = (np.where(norm[x] > 0, weight[x] / (every * strength[x]), 0) for x in SOURCES)
    length = np.sqrt(
        np.maximum(alpha**2 * square["a"] + beta**2 * square["b"] + 2 * alpha * beta * product, 0)
    )
    wanted = np.maximum(strength["a"], strength["b"])
    # Patches that cancel leave nothing but rounding errors, which no stretching makes a reference.
    seen = length > 1e-6 * wanted
    stretch = np.divide(wanted, length, out=np.zeros_like(wanted), where=seen)
    alpha *= stretch
    beta *= stretch

    variance = alpha**2 * m["aa"] + beta**2 * m["bb"] + 2 * alpha * beta * m["ab"]
    covariance = alpha * m["af"] + beta * m["bf"]
    return _similarity(covariance, variance + m["ff"], _constants(255).contrast)


# --- indices ----------------------------------------------------------------------------------


class _Piella(NamedTuple):
    plain: float
    weighted: float


def _piella(images: Images, what: str) -> _Piella:
    """Q_S and Q_W of the levels, or of the edges."""
    if what == "levels":
        moments = images.once(_moments, 0, "even")
    else:
        edges = {name: _prewitt(images.floats[name]) for name in NAMES}
        moments = Moments(edges, gaussian(11, 1.5), ("aa", "bb", "ff", "af", "bf"), centre=0)
    plain = weighted = total = 0.0
    for _, m in moments.strips():
        variances = {x: _without_noise(m[x + x]) for x in SOURCES}
        similar = {x: np.multiply(*_ssim_factors(m, x, "f", _constants(255))) for x in SOURCES}
        quality = _mixed(_share(variances["a"], variances["b"]), similar)
        plain += float(quality.sum())
        weight = np.maximum(variances["a"], variances["b"])
        weighted += float(np.vdot(weight, quality))
        total += float(weight.sum())
    plain /= moments.shape[0] * moments.shape[1]
    return _Piella(plain, weighted / total if total else plain)


class _SmallWindow(NamedTuple):
    yang: float
    cvejic: float


def _small_window_indices(images: Images) -> _SmallWindow:
    constants = _Constants(2e-16, 2e-16)
    moments = Moments(images.floats, gaussian(7, 1.5), _PAIRS)
    yang = cvejic = 0.0
    for _, strip in moments.strips():
        m = {name: strip[name] for name in NAMES}
        m |= {name + name: _without_noise(strip[name + name]) for name in NAMES}
        for x, y in ("ab", "af", "bf"):
            m[x + y] = np.where((m[x + x] > 0) & (m[y + y] > 0), strip[x + y], 0)
        similar = {x: np.multiply(*_ssim_factors(m, x, "f", constants)) for x in SOURCES}
        sources = np.multiply(*_ssim_factors(m, "a", "b", constants))
        mixed = _mixed(_share(m["aa"], m["bb"]), similar)
        larger = np.maximum(similar["a"], similar["b"])
        yang += float(np.where(sources >= 0.75, mixed, larger).sum())
        share = _share(m["af"], m["bf"])
        mixed = _mixed(np.clip(share, 0, 1), similar)
        quality = np.where(share < 0, 0, np.where(share > 1, 1, mixed))
        cvejic += float(quality.sum())
    count = moments.shape[0] * moments.shape[1]
    return _SmallWindow(yang / count, cvejic / count)


def _without_noise(variance: Image) -> Image:
    return np.where(variance < _FLAT, 0, variance)


def _share(a: Image, b: Image) -> Image:
    """The share a / (a + b); 1/2 where both are 0, infinite where they cancel."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = a / (a + b)
    share[(a == 0) & (b == 0)] = 0.5
    return share


def _mixed(share: Image, similar: dict[str, Image]) -> Image:
    return similar["b"] + share * (similar["a"] - similar["b"])


def _prewitt(x: Image) -> Image:
    """Magnitude under kernels of +-1, bordered by zeros."""
    x = np.pad(x, 1)
    across, down = x[:, 2:] - x[:, :-2], x[2:] - x[:-2]
    gx = across[:-2] + across[1:-1] + across[2:]
    gy = down[:, :-2] + down[:, 1:-1] + down[:, 2:]
    gx *= gx
    gy *= gy
    gx += gy
    return np.sqrt(gx, out=gx)
