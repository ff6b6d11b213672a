"""Every op of a program in NumPy and float64: what ``fuseengine verify`` judges a device by.

The definitions of right are the references beside the kernels, which need PyTorch; these are the
same equations for machines without it, and the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuseengine.errors import CaptureError

Array = NDArray[np.float64]
Attrs = Mapping[str, Any]


def compute(op: str, inputs: Sequence[NDArray[Any]], attrs: Attrs) -> Array:
    """An op's result.

    Args:
        op: its name.
        inputs: arrays of any float type.
        attrs: of the node.

    Raises:
        CaptureError: unknown op.
    """
    if op not in _OPS:
        raise CaptureError(f"op {op!r} is unknown; a newer version may have written the program")
    return _OPS[op]([np.asarray(x, np.float64) for x in inputs], attrs)


def _elementwise(function: np.ufunc) -> Callable[[list[Array], Attrs], Array]:
    def op(inputs: list[Array], attrs: Attrs) -> Array:
        operands: list[Any] = list(inputs)
        if "scalar" in attrs:
            operands.insert(0 if attrs.get("scalar_first") else 1, float(attrs["scalar"]))
        return function(*operands)

    return op


def _slice(inputs: list[Array], attrs: Attrs) -> Array:
    return inputs[0][tuple(slice(*bounds) for bounds in attrs["bounds"])]


def _stretch(inputs: list[Array], attrs: Attrs) -> Array:
    axes = (2, 3) if attrs["per"] == "channel" else (1, 2, 3)
    low, high = (f(inputs[0], axis=axes, keepdims=True) for f in (np.min, np.max))
    return (inputs[0] - low) / np.where(high > low, high - low, 1.0)


def _scales(attrs: Attrs) -> tuple[float, float, float, float]:
    """Square roots of abar and 1 - abar, now and after the step."""
    names = ("sqrt_abar", "sqrt_one_minus_abar", "sqrt_abar_prev", "sqrt_one_minus_abar_prev")
    now, rest, before, rest_before = (float(attrs[name]) for name in names)
    return now, rest, before, rest_before


def _ddim_step(inputs: list[Array], attrs: Attrs) -> Array:
    now, rest, before, rest_before = _scales(attrs)
    x, eps, *noise = inputs
    x0 = (x - rest * eps) / now
    if not noise:
        return before * x0 + rest_before * eps
    sigma = 0.0
    if rest:  # Song et al. 2021 (DDIM), equation 16
        sigma = attrs["eta"] * rest_before / rest * max(1.0 - (now / before) ** 2, 0.0) ** 0.5
    direction = max(rest_before**2 - sigma**2, 0.0) ** 0.5
    return before * x0 + direction * eps + sigma * noise[0]


def _joint_ddim_step(inputs: list[Array], attrs: Attrs) -> Array:
    now, rest, before, rest_before = _scales(attrs)
    x, eps, mask, y1, y2 = inputs
    lam = float(attrs["lam"])
    x0 = (x - rest * eps) / now
    a, b, fused = x0[:, 0:1], x0[:, 1:2], x0[:, 2:3]
    new_a, new_b = a - lam * (a - y1), b - lam * (b - y2)
    if attrs["form"] == "code":
        residual = mask * (new_a - 2 * y1) + (1 - mask) * (new_b - 2 * y2) + fused
    else:
        residual = fused - mask * y1 - (1 - mask) * y2
    corrected = np.concatenate([new_a, new_b, fused - lam * residual], axis=1)
    return before * corrected + rest_before * eps


def _compose_priors(inputs: list[Array], attrs: Attrs) -> Array:
    now, rest, before, rest_before = _scales(attrs)
    x, eps_a, eps_b, weight = inputs
    eps = weight * eps_a + (1 - weight) * eps_b
    mean = before * (x - rest * eps) / now
    return mean + rest_before * eps if attrs["form"] == "paper" else mean


def _criss_cross_attention(inputs: list[Array], attrs: Attrs) -> Array:
    q, k, v = inputs
    out = np.empty_like(v)
    for y in range(q.shape[2]):  # a row at a time: both maps at once would be gigabytes
        row = np.einsum("ncw,ncx->nwx", q[:, :, y], k[:, :, y])
        column = np.einsum("ncw,nchw->nwh", q[:, :, y], k)
        column[:, :, y] = -np.inf
        scores = np.concatenate([row, column], axis=2)
        weight = np.exp(scores - scores.max(axis=2, keepdims=True))
        weight /= weight.sum(axis=2, keepdims=True)
        width = row.shape[2]
        out[:, :, y] = np.einsum("nwx,ncx->ncw", weight[..., :width], v[:, :, y])
        out[:, :, y] += np.einsum("nwh,nchw->ncw", weight[..., width:], v)
    return out


def _block_mean(inputs: list[Array], attrs: Attrs) -> Array:
    (x,), s = inputs, attrs["scale"]
    n, c, h, w = x.shape
    return x.reshape(n, c, h // s, s, w // s, s).mean(axis=(3, 5))


def _block_repeat(inputs: list[Array], attrs: Attrs) -> Array:
    return inputs[0].repeat(attrs["scale"], axis=2).repeat(attrs["scale"], axis=3)


def _spectrum(kernel: Array, size: tuple[int, int]) -> NDArray[np.complex128]:
    """Half spectrum of a kernel whose centre tap is the origin."""
    padded = np.zeros(size)
    for (i, j), tap in np.ndenumerate(kernel):
        y, x = i - kernel.shape[0] // 2, j - kernel.shape[1] // 2
        padded[y % size[0], x % size[1]] += tap
    return np.fft.rfft2(padded)


def _filtered(x: Array, spectrum: NDArray[np.complex128]) -> Array:
    return np.fft.irfft2(np.fft.rfft2(x) * spectrum, s=x.shape[-2:])


def _circular_convolution(inputs: list[Array], attrs: Attrs) -> Array:
    x, kernel = inputs
    return _filtered(x, _spectrum(kernel, (x.shape[-2], x.shape[-1])))


def _wiener_deconvolution(inputs: list[Array], attrs: Attrs) -> Array:
    x, kernel = inputs
    spectrum = _spectrum(kernel, (x.shape[-2], x.shape[-1]))
    inverse = spectrum.conj() / (np.abs(spectrum) ** 2 + attrs["regularisation"])
    return _filtered(x, inverse)


_OPS: dict[str, Callable[[list[Array], Attrs], Array]] = {
    "add": _elementwise(np.add),
    "sub": _elementwise(np.subtract),
    "mul": _elementwise(np.multiply),
    "div": _elementwise(np.divide),
    "concat": lambda inputs, attrs: np.concatenate(inputs, axis=attrs["axis"]),
    "slice": _slice,
    "clamp": lambda inputs, attrs: np.clip(inputs[0], attrs["min"], attrs["max"]),
    "stretch": _stretch,
    "compose_priors": _compose_priors,
    "criss_cross_attention": _criss_cross_attention,
    "ddim_step": _ddim_step,
    "joint_ddim_step": _joint_ddim_step,
    "block_mean": _block_mean,
    "block_repeat": _block_repeat,
    "circular_convolution": _circular_convolution,
    "wiener_deconvolution": _wiener_deconvolution,
}
