"""Random degradations of training patches: what cameras do to a picture before it is fused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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


# --- Mask-DiFuser's set ---------------------------------------------------------------------------


def blur(x: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur, sigma 0.8 to 1.4 pixels: what OpenCV takes for windows of 3 to 7."""
    return gaussian_blur(x, _between(0.8, 1.4, generator))


def add_strong_noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """White Gaussian noise, standard deviation 5 to 35 grey levels."""
    sigma = _between(5.0, 35.0, generator) / 255
    return x + sigma * torch.randn(x.shape, generator=generator).to(x)


def add_snow(x: Tensor, generator: torch.Generator) -> Tensor:
    """Soft white flakes on 0.2 to 1.5 % of the pixels, some of them drawn out by the wind."""
    n, _, height, width = x.shape
    seeds = torch.rand((n, 1, height, width), generator=generator)
    seeds = (seeds < _between(0.002, 0.015, generator)).float()
    drift = int(torch.randint(-1, 2, (), generator=generator))
    for _ in range(int(torch.randint(0, 4, (), generator=generator))):
        seeds = torch.maximum(seeds, seeds.roll((1, drift), (2, 3)))
    flakes = gaussian_blur(seeds, _between(0.4, 1.0, generator))
    flakes = (flakes / flakes.amax().clamp_min(1e-6)) * _between(0.6, 1.0, generator)
    return x + (1.0 - x) * flakes.to(x)


def disturb_spectrum(x: Tensor, generator: torch.Generator) -> Tensor:
    """Smoothed amplitudes and exchanged phases.

    The scripts name it "amplitude blur with phase swaps"; read here as: the logarithm of the
    amplitude is blurred (sigma 0.5 to 1.5 frequencies) in part, and 2 to 10 % of the frequencies
    take the phase of the mirrored picture. The lowest frequencies stay: they are the exposure.
    """
    height, width = x.shape[2:]
    spectrum = torch.fft.rfft2(x)
    amplitude = (spectrum.abs() + 1e-6).log()
    smooth = gaussian_blur(amplitude, _between(0.5, 1.5, generator))
    share = _between(0.2, 0.6, generator)
    phase, other = spectrum.angle(), torch.fft.rfft2(x.flip(3)).angle()
    # The same frequencies in all planes: colours shift together and make no coloured speckle.
    places = torch.rand((x.shape[0], 1, *spectrum.shape[2:]), generator=generator)
    swapped = places < _between(0.02, 0.1, generator)
    made = torch.polar(
        torch.lerp(amplitude, smooth, share).exp(), torch.where(swapped.to(x.device), other, phase)
    )
    rows = torch.fft.fftfreq(height, 1 / height, device=x.device).abs()
    columns = torch.fft.rfftfreq(width, 1 / width, device=x.device)
    low = (rows[:, None] <= 1) & (columns[None] <= 1)
    return torch.fft.irfft2(torch.where(low, spectrum, made), s=(height, width))


def change_gamma(x: Tensor, generator: torch.Generator) -> Tensor:
    """``x^gamma``, gamma 0.3 to 3, darker as often as brighter."""
    low, high = math.log(0.3), math.log(3.0)
    return x.clamp(0.0, 1.0).pow(math.exp(_between(low, high, generator)))


MASKED: tuple[Degradation, ...] = (
    blur,
    add_strong_noise,
    add_snow,
    disturb_spectrum,
    change_gamma,
)
"""Mask-DiFuser's degradations; a picture gets one of them."""


# --- DRMF's sets ----------------------------------------------------------------------------------


def add_thermal_noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """White Gaussian noise, the same in all planes, standard deviation up to 25 grey levels."""
    noise = torch.randn((x.shape[0], 1, *x.shape[2:]), generator=generator).to(x)
    return x + _between(0.0, 25.0, generator) / 255 * noise


def quarter_resolution(x: Tensor, generator: torch.Generator) -> Tensor:
    """To a quarter by bilinear, back by bicubic interpolation, as the public code does."""
    small = F.interpolate(x, scale_factor=0.25, mode="bilinear", align_corners=False)
    return F.interpolate(small, x.shape[2:], mode="bicubic", align_corners=False)


def flatten_contrast(x: Tensor, generator: torch.Generator) -> Tensor:
    """``gain x + offset`` inside [0, 1], gain 0.3 to 0.9: a thermal camera without its AGC."""
    gain = _between(0.3, 0.9, generator)
    return gain * x + _between(0.0, 1.0 - gain, generator)


def dim(x: Tensor, generator: torch.Generator) -> Tensor:
    """Low light: ``gain x^gamma`` (gain 0.3 to 0.9, gamma 1 to 2.5) and noise up to 0.03."""
    dark = _between(0.3, 0.9, generator) * x.clamp(0.0, 1.0).pow(_between(1.0, 2.5, generator))
    return dark + 0.03 * _uniform(generator) * torch.randn(x.shape, generator=generator).to(x)


OF_MODALITY: dict[str, tuple[Degradation, ...]] = {
    "infrared": (flatten_contrast, add_thermal_noise, add_stripes, quarter_resolution),
    "visible": (defocus, dim),
    "ct": (blur, add_thermal_noise),
    "mri": (add_thermal_noise,),
}
"""What DRMF's restoration networks learn to undo, in this order.

The public code: low light for visible pictures (LOL's), noise of 25 grey levels and a quarter of
the resolution for infrared; its infrared noise wraps around at 0 and 255, which is a slip: ours is
clamped. Stripes and flat contrast are what the data that the authors give away shows besides, and
blurred CT and noisy MRI likewise.
"""


def degrade_one_of(x: Tensor, options: Sequence[Degradation], generator: torch.Generator) -> Tensor:
    """Each picture of (N, C, H, W) in [0, 1] with one degradation of its own, clamped."""
    made = []
    for picture in x.split(1):
        option = options[int(torch.randint(len(options), (), generator=generator))]
        made.append(option(picture, generator))
    return torch.cat(made).clamp(0.0, 1.0)


def degrade_some_of(
    x: Tensor, options: Sequence[Degradation], generator: torch.Generator, *, chance: float
) -> Tensor:
    """Each picture with each degradation in turn with a chance, clamped to [0, 1].

    Args:
        x: (N, C, H, W) in [0, 1].
        options: degradations in order.
        generator: source of every draw.
        chance: of each degradation of each picture.
    """
    made = []
    for picture in x.split(1):
        for option in options:
            if _uniform(generator) < chance:
                picture = option(picture, generator)
        made.append(picture)
    return torch.cat(made).clamp(0.0, 1.0)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * _uniform(generator)
