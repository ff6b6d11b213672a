"""Filters on the half spectrum: circular blur and its Wiener pseudo-inverse.

    wiener_filter(x, G) = irfft2(G . rfft2(x))
    blur:    G = K                                K = rfft2 of the kernel, centre tap at the origin
    inverse: G = conj(K) / (|K|^2 + lambda)       (Wiener; DRFusion's appendix C)

Memory traffic of a filter: one forward and one inverse real transform of x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fuseengine.errors import SettingError


def kernel_spectrum(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Half spectrum (H, W // 2 + 1), complex, of a kernel (h, w) whose centre tap is the origin.

    A kernel larger than the picture wraps around, as the circular convolution does.
    """
    height, width = size
    rows = (torch.arange(kernel.shape[0], device=kernel.device) - kernel.shape[0] // 2) % height
    columns = (torch.arange(kernel.shape[1], device=kernel.device) - kernel.shape[1] // 2) % width
    padded = kernel.new_zeros(height * width)
    index = (rows[:, None] * width + columns[None]).reshape(-1)
    padded = padded.index_add(0, index, kernel.reshape(-1)).reshape(height, width)
    return torch.fft.rfft2(padded)


def wiener_spectrum(kernel: Tensor, size: tuple[int, int], regularisation: float) -> Tensor:
    """``conj(K) / (|K|^2 + regularisation)`` for pictures of a size, (H, W // 2 + 1) complex."""
    spectrum = kernel_spectrum(kernel, size)
    return spectrum.conj() / (spectrum.abs().square() + regularisation)


def wiener_filter(x: Tensor, spectrum: Tensor) -> Tensor:
    """``irfft2(spectrum . rfft2(x))``.

    Args:
        x: (..., H, W) real, floating point; half precision is computed in float32.
        spectrum: (H, W // 2 + 1), real or complex.

    Returns:
        x's shape and dtype.

    Raises:
        SettingError: the spectrum does not belong to x's size.
    """
    expected = (x.shape[-2], x.shape[-1] // 2 + 1)
    if tuple(spectrum.shape) != expected:
        raise SettingError(
            f"spectrum {tuple(spectrum.shape)}; expected {expected} for x {tuple(x.shape)}"
        )
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    out = torch.fft.irfft2(torch.fft.rfft2(wide) * spectrum, s=x.shape[-2:])
    return out.to(x.dtype)


def circular_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """X (..., H, W) convolved circularly with a kernel (h, w), the centre tap at the origin."""
    if has_torch_function((x, kernel)):
        return handle_torch_function(circular_convolution, (x, kernel), x, kernel)
    return wiener_filter(x, kernel_spectrum(_wide(kernel, x), tuple(x.shape[-2:])))


def wiener_deconvolution(x: Tensor, kernel: Tensor, regularisation: float) -> Tensor:
    """The Wiener pseudo-inverse of :func:`circular_convolution`, regularisation >= 0."""
    if has_torch_function((x, kernel)):
        return handle_torch_function(wiener_deconvolution, (x, kernel), x, kernel, regularisation)
    spectrum = wiener_spectrum(_wide(kernel, x), tuple(x.shape[-2:]), regularisation)
    return wiener_filter(x, spectrum)


def _wide(kernel: Tensor, x: Tensor) -> Tensor:
    return kernel.to(torch.promote_types(x.dtype, torch.float32))
