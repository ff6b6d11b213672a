"""The ops of a program on NumPy arrays: shape rule and bound call of each. No torch.

``bind`` gets the arrays once, when an engine is built, and returns a call without arguments that
reads its inputs and writes its output in place; a frame is a list of such calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuseengine import _native
from fuseengine.errors import CaptureError
from fuseengine.runtime import random

Array = NDArray[np.float32]
Shape = tuple[int, ...]
Call = Callable[[], object]


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        bind: (inputs, output, attrs) -> call.
        in_place: indices of inputs whose memory the output may share.
        framed: whether it sees, and makes, only the part that the frame covers, because it looks
            at the whole picture: a padded border must not change what it gives.
    """

    bind: Callable[[Sequence[Array], Array, Mapping[str, Any]], Call]
    in_place: tuple[int, ...] = ()
    framed: bool = False


def bind(
    name: str, inputs: Sequence[Any], output: Any, attrs: Mapping[str, Any], xp: Any = np
) -> Call:
    """The call that computes an op.

    Args:
        name: which.
        inputs: arrays.
        output: array to write.
        attrs: of the node.
        xp: the arrays' module where it is not NumPy but has its names, such as CuPy; for ops of
            :data:`PORTABLE` only.

    Raises:
        CaptureError: the program names an op that does not exist.
    """
    if name not in OPS:
        raise CaptureError(f"op {name!r} is unknown; a newer version may have written the program")
    if xp is not np:
        return PORTABLE[name](inputs, output, attrs, xp)
    return OPS[name].bind(inputs, output, attrs)


def _elementwise(name: str) -> Callable[..., Call]:
    def make(
        inputs: Sequence[Array], output: Array, attrs: Mapping[str, Any], xp: Any = np
    ) -> Call:
        function = getattr(xp, name)
        # A number takes the place that attrs["scalar_first"] says: 1 - x against x - 1.
        operands: list[Any] = list(inputs)
        if "scalar" in attrs:
            scalar = np.float32(attrs["scalar"])
            operands.insert(0 if attrs.get("scalar_first") else 1, scalar)
        return lambda: function(*operands, out=output)

    return make


def _concat(inputs: Sequence[Array], output: Array, attrs: Mapping[str, Any], xp: Any = np) -> Call:
    parts, axis = list(inputs), attrs["axis"]
    return lambda: xp.concatenate(parts, axis=axis, out=output)


def _slice(inputs: Sequence[Array], output: Array, attrs: Mapping[str, Any], xp: Any = np) -> Call:
    view = inputs[0][tuple(slice(*bounds) for bounds in attrs["bounds"])]
    return lambda: xp.copyto(output, view)


def _clamp(inputs: Sequence[Array], output: Array, attrs: Mapping[str, Any], xp: Any = np) -> Call:
    x, low, high = inputs[0], attrs["min"], attrs["max"]
    return lambda: xp.clip(x, low, high, out=output)


def _stretch(
    inputs: Sequence[Array], output: Array, attrs: Mapping[str, Any], xp: Any = np
) -> Call:
    x, axes = inputs[0], (2, 3) if attrs["per"] == "channel" else (1, 2, 3)

    def call() -> None:
        low = x.min(axis=axes, keepdims=True)
        span = x.max(axis=axes, keepdims=True) - low
        xp.subtract(x, low, out=output)
        xp.divide(output, xp.where(span > 0, span, np.float32(1)), out=output)

    return call


_SCALES = ("sqrt_abar", "sqrt_one_minus_abar", "sqrt_abar_prev", "sqrt_one_minus_abar_prev")
JOINT_FORMS = ("code", "paper")


def _joint_ddim_step(inputs: Sequence[Array], output: Array, attrs: Mapping[str, Any]) -> Call:
    scales: dict[str, Any] = {name: float(attrs[name]) for name in (*_SCALES, "lam")}
    form = JOINT_FORMS.index(attrs["form"])
    arrays = (*inputs, output)
    return lambda: _native.joint_ddim_step(*arrays, **scales, form=form)


def _ddim_step(inputs: Sequence[Array], output: Array, attrs: Mapping[str, Any]) -> Call:
    now, rest, before, rest_before = (float(attrs[name]) for name in _SCALES)
    x, eps, *rest_inputs = inputs
    noise, sigma = (rest_inputs[0] if rest_inputs else None), 0.0
    if noise is not None:  # Song et al. 2021 (DDIM), equation 16
        now2, before2 = now * now, before * before
        ancestral = max((1.0 - now2 / before2) * (1.0 - before2) / (1.0 - now2), 0.0)
        sigma = float(attrs["eta"]) * ancestral**0.5
    return lambda: _native.ddim_step(
        x,
        eps,
        noise,
        output,
        sqrt_abar=now,
        sqrt_one_minus_abar=rest,
        sqrt_abar_prev=before,
        direction=max(rest_before * rest_before - sigma * sigma, 0.0) ** 0.5,
        sigma=sigma,
    )


def _compose_priors(inputs: Sequence[Array], output: Array, attrs: Mapping[str, Any]) -> Call:
    now, rest, before, rest_before = (float(attrs[name]) for name in _SCALES)
    x, eps_a, eps_b, weight = inputs
    return lambda: _native.compose_priors(
        x,
        eps_a,
        eps_b,
        weight,
        output,
        sqrt_abar=now,
        sqrt_one_minus_abar=rest,
        sqrt_abar_prev=before,
        direction=rest_before if attrs["form"] == "paper" else 0.0,
    )


def _criss_cross_attention(
    inputs: Sequence[Array], output: Array, attrs: Mapping[str, Any]
) -> Call:
    q, k, v = inputs
    return lambda: _native.criss_cross_attention(q, k, v, output)


def _block_mean(
    inputs: Sequence[Array], output: Array, attrs: Mapping[str, Any], xp: Any = np
) -> Call:
    s = attrs["scale"]
    n, c, h, w = output.shape
    blocks = inputs[0].reshape(n, c, h, s, w, s)
    return lambda: blocks.mean(axis=(3, 5), out=output)


def _block_repeat(
    inputs: Sequence[Array], output: Array, attrs: Mapping[str, Any], xp: Any = np
) -> Call:
    s = attrs["scale"]
    n, c, h, w = inputs[0].shape
    source = inputs[0].reshape(n, c, h, 1, w, 1)
    target = output.reshape(n, c, h, s, w, s)
    return lambda: xp.copyto(target, source)


def _spectrum(kernel: Array, size: tuple[int, int]) -> NDArray[np.complex128]:
    """Half spectrum (H, W // 2 + 1) of a kernel (h, w) whose centre tap is the origin.

    By NumPy and not in the native module: a kernel is a constant of the program, so this runs once
    when an engine is built, and the inverse of a small number wants float64.
    """
    padded = np.zeros(size)
    rows = (np.arange(kernel.shape[0]) - kernel.shape[0] // 2) % size[0]
    columns = (np.arange(kernel.shape[1]) - kernel.shape[1] // 2) % size[1]
    np.add.at(padded, (rows[:, None], columns[None]), kernel)
    return np.fft.rfft2(padded)


def filter_spectrum(
    op: str, kernel: Array, size: tuple[int, int], attrs: Mapping[str, Any]
) -> NDArray[np.complex128]:
    """What "circular_convolution" or "wiener_deconvolution" multiplies a half spectrum by.

    Args:
        op: which of the two.
        kernel: (h, w), its centre tap is the origin.
        size: (H, W) of the pictures.
        attrs: of the node.

    Returns:
        (H, W // 2 + 1).
    """
    spectrum = _spectrum(kernel, size)
    if op == "circular_convolution":
        return spectrum
    return spectrum.conj() / (np.abs(spectrum) ** 2 + attrs["regularisation"])


def _filter(x: Array, output: Array, spectrum: NDArray[np.complex128]) -> Call:
    half = np.ascontiguousarray(spectrum.astype(np.complex64))
    planes, target = (a.reshape(-1, *a.shape[-2:]) for a in (x, output))
    return lambda: _native.wiener_filter(planes, half, target)


def _filter_op(op: str) -> Callable[..., Call]:
    def make(inputs: Sequence[Array], output: Array, attrs: Mapping[str, Any]) -> Call:
        x, kernel = inputs
        return _filter(x, output, filter_spectrum(op, kernel, x.shape[-2:], attrs))

    return make


PORTABLE: dict[str, Callable[..., Call]] = {
    "add": _elementwise("add"),
    "sub": _elementwise("subtract"),
    "mul": _elementwise("multiply"),
    "div": _elementwise("divide"),
    "concat": _concat,
    "slice": _slice,
    "clamp": _clamp,
    "stretch": _stretch,
    "block_mean": _block_mean,
    "block_repeat": _block_repeat,
}
"""Ops of NumPy alone: they take the arrays' module as a further argument."""

OPS: dict[str, Op] = {
    "add": Op(PORTABLE["add"], in_place=(0, 1)),
    "sub": Op(PORTABLE["sub"], in_place=(0, 1)),
    "mul": Op(PORTABLE["mul"], in_place=(0, 1)),
    "div": Op(PORTABLE["div"], in_place=(0, 1)),
    "concat": Op(_concat),
    "slice": Op(_slice),
    "clamp": Op(_clamp, in_place=(0,)),
    "stretch": Op(_stretch, in_place=(0,), framed=True),
    "compose_priors": Op(_compose_priors, in_place=(0, 1, 2)),
    "criss_cross_attention": Op(_criss_cross_attention),
    "ddim_step": Op(_ddim_step, in_place=(0,)),
    "joint_ddim_step": Op(_joint_ddim_step, in_place=(0,)),
    "block_mean": Op(_block_mean),
    "block_repeat": Op(_block_repeat),
    **{name: Op(_filter_op(name)) for name in ("circular_convolution", "wiener_deconvolution")},
}

FRAMED = frozenset(name for name, op in OPS.items() if op.framed)

PIXELWISE = frozenset(
    ("add", "sub", "mul", "div", "clamp", "ddim_step", "compose_priors", "joint_ddim_step")
)
"""Ops of which every pixel of the result depends on the same pixel of the inputs alone."""


def _standard_normal(shape: Shape, attrs: Mapping[str, Any]) -> Array:
    # One picture's numbers, whatever the batch: a picture does not depend on its neighbours.
    numbers = random.normal((1, *shape[1:]), seed=int(attrs["seed"]))
    return np.broadcast_to(numbers, shape)


def _full(shape: Shape, attrs: Mapping[str, Any]) -> Array:
    return np.full(shape, attrs["value"], np.float32)


MAKERS: dict[str, Callable[[Shape, Mapping[str, Any]], Array]] = {
    "standard_normal": _standard_normal,
    "full": _full,
}
"""Ops without inputs: what they give depends on the picture's size alone, so it is made once, when
an engine is bound to a size."""
