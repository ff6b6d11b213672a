"""Q_P: features by phase congruency, and how well the fused image correlates with them."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from fuseengine import _native
from fuseengine.metrics.filters import Moments, gaussian
from fuseengine.metrics.images import NAMES, SOURCES, Image, Images, strips
from fuseengine.metrics.registry import metric

Complex = NDArray[np.complex128]

_SCALES = 4
_ORIENTATIONS = 6
_SHORTEST = 3.0
_FACTOR = 2.1
_BANDWIDTH = 0.55
_ANGLE_SIGMA = math.pi / _ORIENTATIONS / 1.2
_NOISE_DEVIATIONS = 2.0
_CUT_OFF = 0.5
_GAIN = 10.0
_TINY = 1e-4
_LEAST = 0.1
"""Phase congruency of a feature."""
_KEPT = 1 << 20
_MAPS = ("congruency", "largest", "smallest")


@metric(
    "Q_P",
    "phase congruency metric",
    range=(-1, 1),
    source="Zhao, Laganiere, Liu 2007, Performance assessment of combinative pixel-level image "
    "fusion based on an absolute feature measurement",
)
def q_p(images: Images) -> float:
    """Q_P = P_pc P_M P_m, how phase congruency and its two moments correlate with the sources'.

    Phase congruency (Kovesi) with 4 scales and 6 orientations of log-Gabor filters; M and m are the
    largest and the smallest moment over the orientations. At every pixel each map of F is
    correlated (11 x 11 Gaussian of sigma 1.5, zeros around) with those of A, of B, and of the
    source with the larger congruency, where that map's congruency exceeds 0.1; the largest
    correlation counts, and its mean over the features is P. About 0.97 for A = B = F; 0 where there
    are no features.
    """
    features = {name: _features(images.floats[name]) for name in NAMES}
    a, b, f = (features[name] for name in ("a", "b", "f"))
    stronger = a.congruency >= b.congruency
    masks = {name: features[name].congruency > _LEAST for name in SOURCES}
    masks["m"] = np.where(stronger, masks["a"], masks["b"])
    count = int(masks["m"].sum())
    if count == 0:
        return 0.0
    value = 1.0
    for kind in _MAPS:
        maps = {"a": getattr(a, kind), "b": getattr(b, kind), "f": getattr(f, kind)}
        maps["m"] = np.where(stronger, maps["a"], maps["b"])
        value *= _correlation_sum(maps, masks) / count
    return value


def _correlation_sum(maps: dict[str, Image], masks: dict[str, NDArray[np.bool_]]) -> float:
    """Sum over the pixels of the largest correlation with a masked map."""
    window = gaussian(11, 1.5)
    given = {name: np.pad(maps[name] * masks[name], 5) for name in ("a", "b", "m")}
    given["f"] = np.pad(maps["f"], 5)
    pairs = ("aa", "bb", "mm", "ff", "af", "bf", "mf")
    moments = Moments(given, window, pairs, centre=0)
    total = 0.0
    for rows, m in moments.strips():
        correlations = []
        for x, mask in masks.items():
            scale = np.sqrt(np.abs(m[x + x] * m["ff"]))
            correlation = (m[x + "f"] + _TINY) / (scale + _TINY)
            correlations.append(np.where(mask[rows], correlation, 0))
        total += float(np.maximum.reduce(correlations).sum())
    return total


# --- phase congruency -------------------------------------------------------------------------


class _Features(NamedTuple):
    """Maps of one picture, (H, W) each."""

    congruency: Image
    largest: Image
    smallest: Image


class _Responses(NamedTuple):
    """What the filters of one orientation leave of a picture, (H, W) each.

    Attributes:
        energy: how much the scales agree in phase, noise included; see csrc/phase_energy.h.
        weight: below 1/2 where few scales answer.
        amplitude: sum over the scales.
        power: squared amplitude of the first scale.
    """

    energy: Image
    weight: Image
    amplitude: Image
    power: Image


def _features(x: Image) -> _Features:
    height, width = x.shape
    # Filters take 64 bytes a pixel: worth keeping for a set of pictures, not for huge ones.
    make = filter_bank if x.size <= _KEPT else filter_bank.__wrapped__
    bank = make(height, width)
    spectrum = scipy.fft.rfft2(x)
    turned = spectrum * -1j
    workspace = np.empty((2 * _SCALES, *spectrum.shape), np.complex128)
    responses = _Responses(*np.empty((4, height, width)))
    energies, amplitudes, xx, yy, xy = np.zeros((5, height, width))
    for orientation in range(_ORIENTATIONS):
        _respond((spectrum, turned), bank, orientation, workspace, responses)
        angle = orientation * math.pi / _ORIENTATIONS
        noise = bank.noise[orientation] * math.sqrt(median(responses.power))
        for rows in strips(height, width):
            energy, weight, amplitude, _ = (part[rows] for part in responses)
            energy -= noise
            np.maximum(energy, 0, out=energy)
            energy *= weight
            energies[rows] += energy
            amplitudes[rows] += amplitude
            np.divide(energy, amplitude, out=energy, where=amplitude > 0)
            energy *= energy
            xx[rows] += math.cos(angle) ** 2 * energy
            yy[rows] += math.sin(angle) ** 2 * energy
            xy[rows] += math.cos(angle) * math.sin(angle) * energy
    energies /= amplitudes + _TINY
    xx /= 3
    yy /= 3
    xy /= 6
    difference = np.sqrt(xy**2 + (xx - yy) ** 2) + _TINY
    return _Features(energies, (xx + yy + difference) / 2, (xx + yy - difference) / 2)


def _respond(
    spectra: tuple[Complex, Complex],
    bank: _FilterBank,
    orientation: int,
    workspace: Complex,
    out: _Responses,
) -> None:
    """Fills `out`.

    A filter's real and imaginary answers are two real transforms: of the spectrum with its even
    part, and of the spectrum over i with its odd part.
    """
    height, width = out.energy.shape
    real, imaginary = workspace[:_SCALES], workspace[_SCALES:]
    for rows in strips(height, width):
        even, odd = bank.parts(orientation, rows)
        np.multiply(spectra[0][rows], even, out=real[:, rows])
        np.multiply(spectra[1][rows], odd, out=imaginary[:, rows])
    columns = scipy.fft.ifft(workspace, axis=1, overwrite_x=True)
    for rows in strips(height, width):
        answers = scipy.fft.irfft(columns[:, rows], n=width, axis=2)
        part = _Responses(*(part[rows] for part in out))
        _native.phase_energy(answers[:_SCALES], answers[_SCALES:], *part, tiny=_TINY)
        # From the spread, 1 where one scale answers and 4 where all do, to its weight.
        spread = part.weight
        spread *= -_GAIN / _SCALES
        spread += _GAIN * _CUT_OFF
        np.exp(spread, out=spread)
        spread += 1
        np.reciprocal(spread, out=spread)


def median(x: Image) -> float:
    """The median: of a large array by a bracket from a sample, in which alone is sorted."""
    x = x.ravel()
    lower, upper = (x.size - 1) // 2, x.size // 2
    sample = np.sort(x[:: max(1, x.size // 4096)])
    at = len(sample) // 2
    margin = max(1, len(sample) // 40)
    low, high = sample[max(0, at - margin)], sample[min(len(sample) - 1, at + margin)]
    below = int(np.count_nonzero(x < low))
    inside = x[(x >= low) & (x <= high)]
    if not below <= lower <= upper < below + len(inside):
        return float(np.median(x))
    inside.partition((lower - below, upper - below))
    return float(inside[lower - below] + inside[upper - below]) / 2


# --- filters ----------------------------------------------------------------------------------


class _FilterBank(NamedTuple):
    """Log-Gabor filters g on the half plane of a real transform, (H, W // 2 + 1).

    Of a real picture, the part of g that is even in frequency yields the real answer and the odd
    part the imaginary one. A filter is a product of a radial and an angular factor, so their even
    and odd parts make up its own.

    Attributes:
        radial_even: (scales, H, W // 2 + 1).
        radial_odd: the same; None where both sides are even, as it is 0 there.
        angular_even: (orientations, H, W // 2 + 1).
        angular_odd: the same.
        noise: by orientation, see :func:`_noise`.
    """

    radial_even: Image
    radial_odd: Image | None
    angular_even: Image
    angular_odd: Image
    noise: tuple[float, ...]

    def parts(self, orientation: int, rows: slice) -> tuple[Image, Image]:
        """The even and the odd parts of all scales' filters, (scales, R, W // 2 + 1)."""
        even = self.radial_even[:, rows] * self.angular_even[orientation, rows]
        odd = self.radial_even[:, rows] * self.angular_odd[orientation, rows]
        if self.radial_odd is not None:
            even += self.radial_odd[:, rows] * self.angular_odd[orientation, rows]
            odd += self.radial_odd[:, rows] * self.angular_even[orientation, rows]
        return even, odd


@functools.lru_cache(maxsize=1)
def filter_bank(height: int, width: int) -> _FilterBank:
    """The filters for pictures of a size; those of the last one are kept."""
    # Where a side is odd, the original stretches the filters' frequencies to -0.5..0.5, but not the
    # low-pass's, which it shifts the wrong way.
    sides = height, width
    y, x = np.ix_(*(scipy.fft.ifftshift((np.arange(n) - n // 2) / (n - n % 2)) for n in sides))
    radius = np.hypot(y, x)
    radius[0, 0] = 1
    low = np.hypot(*np.ix_(*(scipy.fft.fftshift((np.arange(n) - n // 2) / n) for n in sides)))
    low_pass = 1 / (1 + (low / 0.45) ** 30)
    theta = np.arctan2(-y, x)

    def radial(scale: int) -> Image:
        factor = np.log(radius * (_SHORTEST * _FACTOR**scale))
        factor = np.exp(-(factor**2) / (2 * math.log(_BANDWIDTH) ** 2)) * low_pass
        factor[0, 0] = 0
        return factor

    def angular(orientation: int) -> Image:
        turned = theta - orientation * math.pi / _ORIENTATIONS
        distance = np.abs(np.arctan2(np.sin(turned), np.cos(turned)))
        return np.exp(-(distance**2) / (2 * _ANGLE_SIGMA**2))

    radial_parts = [_even_and_odd(radial(scale)) for scale in range(_SCALES)]
    angular_parts = [_even_and_odd(angular(orientation)) for orientation in range(_ORIENTATIONS)]
    odd = np.stack([part for _, part in radial_parts])
    bank = _FilterBank(
        np.stack([part for part, _ in radial_parts]),
        odd if odd.any() else None,
        np.stack([part for part, _ in angular_parts]),
        np.stack([part for _, part in angular_parts]),
        (),
    )
    return bank._replace(
        noise=tuple(_noise(bank, orientation, width) for orientation in range(_ORIENTATIONS))
    )


def _even_and_odd(x: Image) -> tuple[Image, Image]:
    """Halves of a (H, W) filter in FFT order under the change of frequency's sign."""
    opposite = np.roll(x[::-1, ::-1], 1, axis=(0, 1))
    half = x.shape[1] // 2 + 1
    return (x + opposite)[:, :half] / 2, (x - opposite)[:, :half] / 2


def _noise(bank: _FilterBank, orientation: int, width: int) -> float:
    """Threshold of the energy over the root of the first scale's median power.

    Noise of a power that the median tells gives Rayleigh-distributed energies; the threshold is
    their mean and twice their deviation.
    """
    even, odd = bank.parts(orientation, slice(None))
    # All columns of the half plane but the first and Nyquist's stand for two.
    twins = np.full(even.shape[2], 2.0)
    twins[0] = 1
    if width % 2 == 0:
        twins[-1] = 1
    power = 1 / (math.log(2) * float(((even[0] ** 2 + odd[0] ** 2) * twins).sum()))
    tau = math.sqrt(power * float((even.sum(axis=0) ** 2 * twins).sum()))
    spread = math.sqrt(2 - math.pi / 2)
    return tau * (math.sqrt(math.pi / 2) + _NOISE_DEVIATIONS * spread) / 1.7
