"""Visual information fidelity: what an eye behind a noisy channel could still tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from fuseengine.metrics.filters import Moments, gaussian, outputs, smooth
from fuseengine.metrics.images import NAMES, SOURCES, Image, Images
from fuseengine.metrics.registry import metric

_TINY = 1e-10
_SIDES = (17, 9, 5, 3)
_SCALE_WEIGHTS = np.array([1, 0, 0.15, 1]) / 2.15
_VIF_NOISE = 2.0
_VIFF_NOISE = 0.005 * 255**2
_PAIRS = ("aa", "bb", "ff", "af", "bf")


@metric(
    "VIF",
    "visual information fidelity, sum over the sources",
    range=(0, math.inf),
    min_side=17,
    source="Sheikh, Bovik 2006, Image information and visual quality (pixel domain, vifp)",
)
def vif(images: Images) -> float:
    """VIF = vifp(A, F) + vifp(B, F), four scales; about 0.5..1 for fusions, 2 for A = B = F.

    vifp = sum log(1 + g^2 s_X / (v + 2)) / sum log(1 + s_X / 2) over pixels and scales, with local
    variances s, g = s_XF / s_X and v = s_F - g s_XF under Gaussian windows of 17, 9, 5 and 3
    pixels. A constant reference gives 1. Scales that do not fit into the pictures are left out.
    """
    return sum(_vifp(images, x) for x in SOURCES)


@metric(
    "VIFF",
    "visual information fidelity for fusion",
    range=(0, math.inf),
    min_side=17,
    source="Han, Cai, Cao, Xu 2013, A new image fusion performance metric based on visual "
    "information fidelity",
)
def viff(images: Images) -> float:
    """VIFF = sum p_s V_s, p = (1, 0, 0.15, 1) / 2.15 over four scales.

    Noise variance 325.125; at each pixel the source with the smaller gain g counts:
    V_s = (sum N + 1e-7) / (sum D + 1e-7) of its numerator and denominator in VIF. It can exceed 1
    by much on noisy, contrast-stretched results. Scales that do not fit are left out.
    """
    sums = images.once(_sums)
    weights = _SCALE_WEIGHTS[: len(sums)]
    total = weights.sum()
    values = [scale.chosen_kept / scale.chosen for scale in sums]
    return float(weights @ values / total)


@metric(
    "VIF_mean",
    "visual information fidelity, mean over the sources",
    range=(0, math.inf),
    min_side=17,
    variant_of="VIF",
    source="Sheikh, Bovik 2006; printed by DMFuse",
)
def vif_mean(images: Images) -> float:
    """VIF / 2."""
    return sum(_vifp(images, x) for x in SOURCES) / 2


@metric(
    "VIF_u8",
    "visual information fidelity, first scale in saturating 8-bit arithmetic",
    range=(0, math.inf),
    min_side=17,
    variant_of="VIF",
    source="the MATLAB code of Evaluation-for-Image-Fusion before March 2023",
)
def vif_u8(images: Images) -> float:
    """VIF where the products of the first scale are cut to 255, which loses that scale."""
    first = images.once(_saturated_sums)
    rest = images.once(_sums)[1:]
    return sum(
        _quotient(
            first.kept[x] + sum(scale.kept[x] for scale in rest),
            first.whole[x] + sum(scale.whole[x] for scale in rest),
        )
        for x in SOURCES
    )


class _Scale(NamedTuple):
    """Sums over one scale.

    Attributes:
        kept: numerator of VIF by source.
        whole: its denominator by source.
        chosen_kept: numerator of VIFF.
        chosen: its denominator.
    """

    kept: dict[str, float]
    whole: dict[str, float]
    chosen_kept: float
    chosen: float


def _vifp(images: Images, source: str) -> float:
    sums = images.once(_sums)
    return _quotient(
        sum(scale.kept[source] for scale in sums), sum(scale.whole[source] for scale in sums)
    )


def _quotient(kept: float, whole: float) -> float:
    return kept / whole if whole > 0 else 1.0


def _sums(images: Images) -> list[_Scale]:
    """Every scale that fits."""
    return [_scale_sums(m for _, m in moments.strips()) for moments in _scales(images)]


def _scales(images: Images) -> Iterator[Moments]:
    stack = np.stack([images.floats[name] for name in NAMES])
    for side in _SIDES:
        window = gaussian(side, side / 5)
        if side != _SIDES[0]:
            if outputs(min(stack.shape[1:]), window, 2) < side:
                return
            stack = smooth(stack, window, 2)
        yield Moments(dict(zip(NAMES, stack, strict=True)), window, _PAIRS)


def _saturated_sums(images: Images) -> _Scale:
    window = gaussian(_SIDES[0], _SIDES[0] / 5)
    stack = np.empty((len(NAMES) + len(_PAIRS), *images.shape))
    names = [*NAMES, *_PAIRS]
    for name, product in zip(names, stack, strict=True):
        product[...] = images.floats[name[0]]
        if len(name) == 2:
            product *= images.floats[name[1]]
            np.minimum(product, 255, out=product)
    maps = dict(zip(names, smooth(stack, window), strict=True))
    for pair in _PAIRS:
        maps[pair] -= maps[pair[0]] * maps[pair[1]]
    return _scale_sums([maps])


def _scale_sums(strips: Iterable[dict[str, Image]]) -> _Scale:
    kept, whole = dict.fromkeys(SOURCES, 0.0), dict.fromkeys(SOURCES, 0.0)
    chosen_kept = chosen = 0.0
    for m in strips:
        variance_f = np.maximum(m["ff"], 0)
        gains, noises, variances = [], [], []
        for x in SOURCES:
            variance = np.maximum(m[x + x], 0)
            # A gain below 0 and one where either image is flat count as none.
            covariance = np.maximum(m[x + "f"], 0)
            flat = variance < _TINY
            covariance[flat | (variance_f < _TINY)] = 0
            gain = covariance / (variance + _TINY)
            noise = variance_f - gain * covariance
            np.maximum(noise, _TINY, out=noise)
            variance[flat] = 0
            kept[x] += _log_sum(gain, variance, noise, _VIF_NOISE)
            whole[x] += float(np.log10(1 + variance / _VIF_NOISE).sum())
            gains.append(gain)
            noises.append(noise)
            variances.append(variance)
        first = gains[0] < gains[1]
        smaller, noise_there, variance_there = (
            np.where(first, a, b) for a, b in (gains, noises, variances)
        )
        chosen_kept += _log_sum(smaller, variance_there, noise_there, _VIFF_NOISE)
        chosen += float(np.log10(1 + variance_there / _VIFF_NOISE).sum())
        pixels = 1e-7 * first.size
        chosen_kept += pixels
        chosen += pixels
    return _Scale(kept, whole, chosen_kept, chosen)


def _log_sum(gain: Image, variance: Image, noise: Image, channel: float) -> float:
    """Sum of log10(1 + gain^2 variance / (noise + channel))."""
    x = gain * gain
    x *= variance
    x /= noise + channel
    x += 1
    return float(np.log10(x, out=x).sum())
