"""The eight metrics that infrared-visible papers print, each ``metric(fused, a, b)``.

Every function takes three grey images (H, W) on the 0..255 scale (uint8, or floats holding
integers: measure the saved picture, not a network's output), a infrared, b visible, and computes in
float64. Higher is better for all of them; none is a proof of a good picture by itself: noise raises
EN, SF and AG, contrast stretching raises SD and SCD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import convolve1d

from fuseengine.errors import FrameError, UnknownNameError

Image = NDArray[np.float64]


def entropy(fused: ArrayLike, a: ArrayLike | None = None, b: ArrayLike | None = None) -> float:
    """EN: entropy of the fused image's 256-bin histogram in bits, 0..8 (Roberts et al. 2008)."""
    p = np.bincount(_levels(fused).ravel(), minlength=256) / np.size(fused)
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


def standard_deviation(
    fused: ArrayLike, a: ArrayLike | None = None, b: ArrayLike | None = None
) -> float:
    """SD: population standard deviation of the fused image, 0..127.5 (Rao 1997)."""
    return float(_image(fused).std())


def spatial_frequency(
    fused: ArrayLike, a: ArrayLike | None = None, b: ArrayLike | None = None
) -> float:
    """SF: root of mean squared vertical plus horizontal differences (Eskicioglu, Fisher 1995)."""
    f = _image(fused)
    return float(np.sqrt((np.diff(f, axis=0) ** 2).mean() + (np.diff(f, axis=1) ** 2).mean()))


def average_gradient(
    fused: ArrayLike, a: ArrayLike | None = None, b: ArrayLike | None = None
) -> float:
    """AG: sum of sqrt((gx^2 + gy^2) / 2) over (H-1)(W-1), central differences (Cui et al. 2015)."""
    f = _image(fused)
    gy, gx = np.gradient(f)
    return float(np.sqrt((gx**2 + gy**2) / 2).sum() / ((f.shape[0] - 1) * (f.shape[1] - 1)))


def scd(fused: ArrayLike, a: ArrayLike, b: ArrayLike) -> float:
    """SCD: corr(F - B, A) + corr(F - A, B), -2..2 (Aslantas, Bendes 2015)."""
    f, a, b = _image(fused), _image(a), _image(b)
    return _correlation(f - b, a) + _correlation(f - a, b)


def mutual_information(fused: ArrayLike, a: ArrayLike, b: ArrayLike) -> float:
    """MI: I(A; F) + I(B; F) in bits from 256 x 256 joint histograms, 0..16 (Qu et al. 2002)."""
    f = _levels(fused)
    return _information(_levels(a), f) + _information(_levels(b), f)


def vif(fused: ArrayLike, a: ArrayLike, b: ArrayLike) -> float:
    """VIF: vifp(A, F) + vifp(B, F), pixel domain, four scales, 0..about 2 (Sheikh, Bovik 2006)."""
    f = _image(fused)
    return _vifp(_image(a), f) + _vifp(_image(b), f)


def qabf(fused: ArrayLike, a: ArrayLike, b: ArrayLike) -> float:
    """Qabf: edge strength and orientation kept, 0..0.987 (Xydeas, Petrovic 2000)."""
    strength_f, angle_f = _sobel(_image(fused))
    kept = total = 0.0
    for source in (a, b):
        strength, angle = _sobel(_image(source))
        low, high = np.minimum(strength, strength_f), np.maximum(strength, strength_f)
        # Where both are equal the public code takes the strength itself: 0, or at least 1.
        ratio = np.divide(low, high, out=strength_f.copy(), where=strength != strength_f)
        alignment = 1 - np.abs(angle - angle_f) / (np.pi / 2)
        q = (
            0.9994
            / (1 + np.exp(-15 * (ratio - 0.5)))
            * 0.9879
            / (1 + np.exp(-22 * (alignment - 0.8)))
        )
        kept += (q * strength).sum()
        total += strength.sum()
    return float(kept / total) if total else 0.0


METRICS: dict[str, Callable[..., float]] = {
    "EN": entropy,
    "SD": standard_deviation,
    "SF": spatial_frequency,
    "AG": average_gradient,
    "SCD": scd,
    "MI": mutual_information,
    "VIF": vif,
    "Qabf": qabf,
}


def evaluate(
    fused: ArrayLike, a: ArrayLike, b: ArrayLike, metrics: Iterable[str] | None = None
) -> dict[str, float]:
    """Several metrics of one fused image.

    Args:
        fused: (H, W), 0..255.
        a: infrared source, the same size.
        b: visible source's luma, the same size.
        metrics: keys of :data:`METRICS`; all by default.

    Returns:
        Value per key, in the order asked for.

    Raises:
        FrameError: the three sizes differ.
        UnknownNameError: unknown metric.
    """
    shapes = [np.shape(x) for x in (fused, a, b)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2 or min(shapes[0]) < 2:
        raise FrameError(
            f"fused {shapes[0]}, a {shapes[1]}, b {shapes[2]}; expected three (H, W) of one size, "
            "at least 2x2"
        )
    keys = list(METRICS if metrics is None else metrics)
    for key in keys:
        if key not in METRICS:
            raise UnknownNameError("metric", key, METRICS)
    return {key: METRICS[key](fused, a, b) for key in keys}


def _image(x: ArrayLike) -> Image:
    return np.asarray(x, dtype=np.float64)


def _levels(x: ArrayLike) -> NDArray[np.intp]:
    return np.clip(np.rint(np.asarray(x)), 0, 255).astype(np.intp)


def _correlation(x: Image, y: Image) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale > 0 else 0.0


def _information(x: NDArray[np.intp], f: NDArray[np.intp]) -> float:
    joint = np.bincount((x * 256 + f).ravel(), minlength=65536).reshape(256, 256) / x.size
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def _vifp(reference: Image, f: Image) -> float:
    tiny = 1e-10
    numerator = denominator = 0.0
    for scale in range(4):
        n = 2 ** (4 - scale) + 1
        taps = np.exp(-((np.arange(n) - n // 2) ** 2) / (2 * (n / 5) ** 2))
        taps /= taps.sum()

        def smooth(x: Image, taps: Image = taps) -> Image:
            r = len(taps) // 2
            x = convolve1d(x, taps, axis=0, mode="constant")[r : x.shape[0] - r]
            return convolve1d(x, taps, axis=1, mode="constant")[:, r : x.shape[1] - r]

        if scale:
            if min(reference.shape) < n:
                break
            reference, f = smooth(reference)[::2, ::2], smooth(f)[::2, ::2]
        if min(reference.shape) < n:
            break
        mean_r, mean_f = smooth(reference), smooth(f)
        var_r = np.maximum(smooth(reference**2) - mean_r**2, 0)
        var_f = np.maximum(smooth(f**2) - mean_f**2, 0)
        covariance = smooth(reference * f) - mean_r * mean_f
        gain = covariance / (var_r + tiny)
        noise = var_f - gain * covariance
        flat = var_r < tiny
        gain[flat], noise[flat], var_r[flat] = 0, var_f[flat], 0
        flat = var_f < tiny
        gain[flat], noise[flat] = 0, 0
        opposed = gain < 0
        noise[opposed], gain[opposed] = var_f[opposed], 0
        noise = np.maximum(noise, tiny)
        numerator += np.log10(1 + gain**2 * var_r / (noise + 2)).sum()
        denominator += np.log10(1 + var_r / 2).sum()
    return float(numerator / denominator) if denominator > 0 else 1.0


def _sobel(x: Image) -> tuple[Image, Image]:
    smooth, difference = np.array([1.0, 2.0, 1.0]), np.array([1.0, 0.0, -1.0])
    sx = convolve1d(
        convolve1d(x, smooth, axis=0, mode="constant"), difference, axis=1, mode="constant"
    )
    sy = convolve1d(
        convolve1d(x, difference, axis=0, mode="constant"), smooth, axis=1, mode="constant"
    )
    # Sy has the sign of [1 2 1; 0 0 0; -1 -2 -1]. On integers Sx is exactly 0 on horizontal edges.
    vertical = sx == 0
    angle = np.arctan(np.divide(-sy, sx, out=np.zeros_like(sx), where=~vertical))
    angle[vertical] = np.pi / 2
    return np.hypot(sx, sy), angle
