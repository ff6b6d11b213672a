"""The ops as standard ONNX operators, for runtimes that have no kernels of ours.

Opset 18, operators that TensorRT 10.3 imports (``tests/export/test_onnx_forms.py`` has the table);
sizes are left open unless a function asks for them. Each function appends nodes to a graph
through a writer (``fuseengine.export.onnx.OnnxWriter`` is one) and returns the name of its result.
Numbers become float32 constants. What an op never holds in memory, these forms do: attention maps,
spectra, intermediate planes.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fuseengine.errors import SettingError
from fuseengine.kernels.compose_priors import coefficients as composition_coefficients
from fuseengine.kernels.ddim_step import _coefficients as ddim_coefficients
from fuseengine.kernels.ddim_step import ddim_sigma
from fuseengine.kernels.wiener import kernel_spectrum, wiener_spectrum
from fuseengine.kernels.ycbcr import BLUE, GREEN, RED

OPSET = 18

_END = np.iinfo(np.int64).max
_SAMPLED_ROWS = 16
_FLOAT = 1  # as onnx.TensorProto numbers element types
_FRAMES = {"uint8": (255.0, 2), "uint16": (65535.0, 4), "float32": (1.0, _FLOAT)}
"""Full scale and element type of a frame's dtype."""


class Writer(Protocol):
    """What the functions need of a graph under construction."""

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output; the output's name."""

    def constant(self, value: Any, name: str = "") -> str:
        """Store a constant; its name. Those of one given name are equal and stored once."""


def _integers(w: Writer, *values: int) -> str:
    return w.constant(np.array(values, np.int64))


def _number(w: Writer, value: float) -> str:
    return w.constant(np.float32(value))


def _scaled(w: Writer, x: str, factor: float) -> str:
    return w.add("Mul", x, _number(w, factor))


def _slice(w: Writer, x: str, start: int, end: int, axis: int) -> str:
    return w.add("Slice", x, *(_integers(w, value) for value in (start, end, axis)))


# --- networks' ops --------------------------------------------------------------------------------


def criss_cross_attention(
    w: Writer, q: str, k: str, v: str, size: tuple[int, int] | None = None
) -> str:
    """The op of :mod:`fuseengine.kernels.criss_cross_attention`.

    Two batched matrix products per direction; one softmax over [row, column]; a column leaves the
    pixel itself out by a mask (H, H).

    Args:
        w: the graph.
        q: queries, (N, Cq, H, W).
        k: keys, as q.
        v: values, (N, C, H, W).
        size: (H, W) where it is known. The mask is a constant then; otherwise row numbers are
            compared at run time (Shape, Range, Equal), for any size.

    Returns:
        (N, C, H, W). The attention maps are in memory: (N, H, W, H + W) elements.
    """
    row = w.add(
        "MatMul",
        w.add("Transpose", q, perm=[0, 2, 3, 1]),
        w.add("Transpose", k, perm=[0, 2, 1, 3]),
    )  # (N, H, W, W)
    column = w.add(
        "MatMul",
        w.add("Transpose", q, perm=[0, 3, 2, 1]),
        w.add("Transpose", k, perm=[0, 3, 1, 2]),
    )  # (N, W, H, H)
    itself, width = _itself_and_width(w, q) if size is None else _known_itself(w, *size)
    column = w.add("Where", itself, _number(w, -np.inf), column)

    both = w.add("Concat", row, w.add("Transpose", column, perm=[0, 2, 1, 3]), axis=3)
    weight = w.add("Softmax", both, axis=3)  # (N, H, W, W + H)
    last = _integers(w, 3)
    row = w.add("Slice", weight, _integers(w, 0), width, last)
    column = w.add("Slice", weight, width, _integers(w, _END), last)
    along = w.add("MatMul", row, w.add("Transpose", v, perm=[0, 2, 3, 1]))  # (N, H, W, C)
    down = w.add(
        "MatMul",
        w.add("Transpose", column, perm=[0, 2, 1, 3]),
        w.add("Transpose", v, perm=[0, 3, 2, 1]),
    )  # (N, W, H, C)
    return w.add(
        "Add",
        w.add("Transpose", along, perm=[0, 3, 1, 2]),
        w.add("Transpose", down, perm=[0, 3, 2, 1]),
    )


def _known_itself(w: Writer, height: int, width: int) -> tuple[str, str]:
    """The mask (H, H) and the width (1,), constants."""
    return w.constant(np.eye(height, dtype=np.bool_)), _integers(w, width)


def _itself_and_width(w: Writer, q: str) -> tuple[str, str]:
    """The same at run time."""
    shape = w.add("Shape", q)
    height, width = (w.add("Gather", shape, _integers(w, axis), axis=0) for axis in (2, 3))
    zero, one = (w.constant(np.array(value, np.int64)) for value in (0, 1))
    numbers = w.add("Range", zero, w.add("Squeeze", height, _integers(w, 0)), one)
    return w.add("Equal", numbers, w.add("Unsqueeze", numbers, _integers(w, 1))), width


def group_norm_silu(
    w: Writer,
    x: str,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    shift: str = "",
    *,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    name: str = "",
) -> str:
    """The op of :mod:`fuseengine.kernels.group_norm_silu`.

    Channel means, then a 1x1 convolution with a C x C matrix that averages within groups: the
    tensor keeps its (N, C, H, W) shape, where the usual reshape to (N, groups, -1) makes runtimes
    change layout twice.

    The mean of all pixels would be off by its rounding, 0.2 on raw thermal counts (mean 30,000,
    deviation 20) in OpenVINO. So a first mean, of every 16th row, is subtracted; the mean d of
    what is left is small, and exact. The variance is the mean of its squares less d^2, which
    cancels little: a part of 1/16 of the pixels whose mean is off by d adds at least d^2 / 15 to
    the variance.

    Args:
        w: the graph.
        x: (N, C, H, W).
        weight: (C,).
        bias: (C,).
        shift: (N, C) or (1, C); "" for none.
        groups: a divisor of C.
        eps: added to the variance.
        silu: whether to activate.
        name: what the names of weight and bias in the graph begin with; made up by default.

    Returns:
        (N, C, H, W).
    """
    channels = len(weight)
    per_group = channels // groups
    same = np.kron(np.eye(groups), np.full((per_group, per_group), 1.0 / per_group))
    same = same.astype(np.float32).reshape(channels, channels, 1, 1)
    mix = w.constant(same, name=f"mix_{channels}_{groups}")
    axes = _integers(w, 2, 3)
    some = w.add("Slice", x, *(_integers(w, n) for n in (0, _END, 2, _SAMPLED_ROWS)))
    mean = w.add("Conv", w.add("ReduceMean", some, axes, keepdims=1), mix)
    centred = w.add("Sub", x, mean)
    rest = w.add("Conv", w.add("ReduceMean", centred, axes, keepdims=1), mix)
    square = w.add("ReduceMean", w.add("Mul", centred, centred), axes, keepdims=1)
    variance = w.add("Sub", w.add("Conv", square, mix), w.add("Mul", rest, rest))
    # Of a constant picture it is what rounding leaves, of either sign.
    variance = w.add("Add", w.add("Relu", variance), _number(w, eps))
    scale = w.add("Reciprocal", w.add("Sqrt", variance))
    weight, bias = (a.astype(np.float32).reshape(1, -1, 1, 1) for a in (weight, bias))
    scale = w.add("Mul", scale, w.constant(weight, name=name and f"{name}.weight"))
    offset = w.constant(bias, name=name and f"{name}.bias")
    if shift:
        plane = w.add("Unsqueeze", shift, axes)
        offset = w.add("Add", offset, plane)
    offset = w.add("Sub", offset, w.add("Mul", rest, scale))
    z = w.add("Add", w.add("Mul", centred, scale), offset)
    return w.add("Mul", z, w.add("Sigmoid", z)) if silu else z


# --- steps of the sampler -------------------------------------------------------------------------


def ddim_step(
    w: Writer,
    x: str,
    eps: str,
    sqrt_abar: float,
    sqrt_one_minus_abar: float,
    sqrt_abar_prev: float,
    sqrt_one_minus_abar_prev: float,
    noise: str = "",
    eta: float = 1.0,
) -> str:
    """The op of :mod:`fuseengine.kernels.ddim_step`: a sum of two products, three with noise.

    Args:
        w: the graph.
        x: x_t, any shape.
        eps: predicted noise, x's shape.
        sqrt_abar: sqrt(abar_t) > 0.
        sqrt_one_minus_abar: sqrt(1 - abar_t).
        sqrt_abar_prev: sqrt(abar_{t-1}).
        sqrt_one_minus_abar_prev: sqrt(1 - abar_{t-1}).
        noise: standard normal numbers of x's shape; "" for none.
        eta: how much of them, from 0 to 1; not used without noise.

    Returns:
        x_{t-1}, x's shape.
    """
    numbers = (sqrt_abar, sqrt_one_minus_abar, sqrt_abar_prev, sqrt_one_minus_abar_prev)
    sigma = ddim_sigma(*numbers, eta) if noise else 0.0
    scale_x, scale_eps = ddim_coefficients(*numbers, sigma)
    out = w.add("Add", _scaled(w, x, scale_x), _scaled(w, eps, scale_eps))
    return w.add("Add", out, _scaled(w, noise, sigma)) if noise else out


def joint_ddim_step(
    w: Writer,
    x: str,
    eps: str,
    mask: str,
    y1: str,
    y2: str,
    sqrt_abar: float,
    sqrt_one_minus_abar: float,
    sqrt_abar_prev: float,
    sqrt_one_minus_abar_prev: float,
    lam: float,
    *,
    form: str = "code",
) -> str:
    """The op of :mod:`fuseengine.kernels.joint_ddim_step`.

    Args:
        w: the graph.
        x: x_t = [source 1, source 2, fused], (N, 3, H, W).
        eps: predicted noise, x's shape.
        mask: weights of source 1, (N, 1, H, W).
        y1: observed source 1, (N, 1, H, W).
        y2: observed source 2, (N, 1, H, W).
        sqrt_abar: sqrt(abar_t) > 0.
        sqrt_one_minus_abar: sqrt(1 - abar_t).
        sqrt_abar_prev: sqrt(abar_{t-1}).
        sqrt_one_minus_abar_prev: sqrt(1 - abar_{t-1}).
        lam: scale of the correction.
        form: "code" or "paper".

    Returns:
        x_{t-1}, x's shape.
    """
    x0 = predicted_x0(w, x, eps, sqrt_abar, sqrt_one_minus_abar)
    a, b, f = (_slice(w, x0, channel, channel + 1, 1) for channel in range(3))
    new_a = w.add("Sub", a, _scaled(w, w.add("Sub", a, y1), lam))
    new_b = w.add("Sub", b, _scaled(w, w.add("Sub", b, y2), lam))
    if form == "code":
        first = w.add("Sub", new_a, _scaled(w, y1, 2.0))
        second = w.add("Sub", new_b, _scaled(w, y2, 2.0))
        residual = w.add("Add", _weighted(w, mask, first, second), f)
    else:
        residual = w.add("Sub", f, _weighted(w, mask, y1, y2))
    new_f = w.add("Sub", f, _scaled(w, residual, lam))
    corrected = w.add("Concat", new_a, new_b, new_f, axis=1)
    signal = _scaled(w, corrected, sqrt_abar_prev)
    return w.add("Add", signal, _scaled(w, eps, sqrt_one_minus_abar_prev))


def compose_priors(
    w: Writer,
    x: str,
    eps_a: str,
    eps_b: str,
    weight: str,
    sqrt_abar: float,
    sqrt_one_minus_abar: float,
    sqrt_abar_prev: float,
    sqrt_one_minus_abar_prev: float,
    *,
    form: str = "code",
) -> str:
    """The op of :mod:`fuseengine.kernels.compose_priors`.

    Args:
        w: the graph.
        x: x_t, (N, C, H, W).
        eps_a: noise predicted from modality A, x's shape.
        eps_b: noise predicted from modality B, x's shape.
        weight: weight of A, (N, 1, H, W).
        sqrt_abar: sqrt(abar_t) > 0.
        sqrt_one_minus_abar: sqrt(1 - abar_t).
        sqrt_abar_prev: sqrt(abar_{t-1}).
        sqrt_one_minus_abar_prev: sqrt(1 - abar_{t-1}); not used by "code".
        form: "code", or "paper" with the noise's direction.

    Returns:
        x_{t-1}, x's shape. :func:`predicted_x0` of ``eps_a`` gives what the native kernel
        writes beside it.
    """
    numbers = (sqrt_abar, sqrt_one_minus_abar, sqrt_abar_prev, sqrt_one_minus_abar_prev)
    scale_x, scale_eps = composition_coefficients(*numbers, form)
    eps = _weighted(w, weight, eps_a, eps_b)
    return w.add("Add", _scaled(w, x, scale_x), _scaled(w, eps, scale_eps))


def predicted_x0(w: Writer, x: str, eps: str, sqrt_abar: float, sqrt_one_minus_abar: float) -> str:
    """x0 = (x - sqrt(1 - abar_t) eps) / sqrt(abar_t) of one prior, x's shape."""
    return _scaled(w, w.add("Sub", x, _scaled(w, eps, sqrt_one_minus_abar)), 1.0 / sqrt_abar)


def _weighted(w: Writer, weight: str, a: str, b: str) -> str:
    """``weight a + (1 - weight) b`` with one product; exact where a = b."""
    return w.add("Add", b, w.add("Mul", weight, w.add("Sub", a, b)))


# --- filters and blocks ---------------------------------------------------------------------------


def wiener_filter(w: Writer, x: str, spectrum: NDArray[Any], size: tuple[int, int]) -> str:
    """The op of :mod:`fuseengine.kernels.wiener` for pictures of one size.

    TensorRT has no DFT, so the transforms are products with matrices of cosines and sines: rows,
    columns, the filter, and back. That is 2 H W (W + 2 H) multiplications a picture, 1e9 at 480x640
    and 1.7e10 at 1080x1920, where a fast transform takes some 2e7 and 2e8. Constants: 2 H^2 + W^2
    numbers for the matrices and up to H W for the spectrum, 5 MB at 480x640.

    In float32 no pixel of 480x640 is off by more than 3e-6 of the pixels' deviation times the
    filter's largest gain, twice the error of a fast transform. The mean goes past the transforms:
    it is the largest number by far, 2e10 in a white 16-bit frame. Keep the products in float32;
    TF32 leaves three digits.

    Args:
        w: the graph.
        x: (..., H, W), real.
        spectrum: (H, W // 2 + 1), real or complex; a constant of the graph.
        size: (H, W).

    Returns:
        x's shape.

    Raises:
        SettingError: the spectrum does not belong to the size.
    """
    height, width = size
    half = width // 2 + 1
    if spectrum.shape != (height, half):
        raise SettingError(
            f"spectrum {spectrum.shape}; expected {(height, half)} for pictures of {height}x{width}"
        )
    row_re, row_im = _fourier(w, width, half)
    column_re, column_im = _fourier(w, height, height)

    def turn(re: str, im: str, join: str, part: str) -> tuple[str, str]:
        """Columns times the matrix with ("Sub", "Add"), times its conjugate with ("Add", "Sub")."""
        re_re, re_im = w.add("MatMul", column_re, re), w.add("MatMul", column_re, im)
        im_re, im_im = w.add("MatMul", column_im, re), w.add("MatMul", column_im, im)
        return w.add(join, re_re, im_im), w.add(part, re_im, im_re)

    mean = w.add("ReduceMean", x, _integers(w, -2, -1), keepdims=1)
    x = w.add("Sub", x, mean)
    re = w.add("MatMul", x, row_re)
    im = w.add("MatMul", x, row_im)
    re, im = turn(re, im, "Sub", "Add")

    # The half that is not there is the conjugate of the one that is: columns count twice, but for
    # the mean and, in even widths, the highest frequency.
    twice = np.full(half, 2.0)
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    gain = np.asarray(spectrum, np.complex128) * twice / (height * width)
    gain_re = w.constant(gain.real.astype(np.float32))
    if np.iscomplexobj(spectrum):
        gain_im = w.constant(gain.imag.astype(np.float32))
        re, im = (
            w.add("Sub", w.add("Mul", re, gain_re), w.add("Mul", im, gain_im)),
            w.add("Add", w.add("Mul", re, gain_im), w.add("Mul", im, gain_re)),
        )
    else:
        re, im = w.add("Mul", re, gain_re), w.add("Mul", im, gain_re)
    re, im = turn(re, im, "Add", "Sub")
    out = w.add(
        "Add",
        w.add("MatMul", re, w.add("Transpose", row_re, perm=[1, 0])),
        w.add("MatMul", im, w.add("Transpose", row_im, perm=[1, 0])),
    )
    return w.add("Add", out, _scaled(w, mean, float(spectrum[0, 0].real)))


def _fourier(w: Writer, length: int, frequencies: int) -> tuple[str, str]:
    """Real and imaginary part of exp(-2 pi i n k / length), (length, frequencies)."""
    # Whole turns are taken out in integers: the angle is as exact as a small one.
    turns = np.outer(np.arange(length), np.arange(frequencies)) % length
    angle = 2.0 * np.pi / length * turns
    parts = np.cos(angle), -np.sin(angle)
    re, im = (w.constant(part.astype(np.float32)) for part in parts)
    return re, im


def circular_convolution(w: Writer, x: str, kernel: NDArray[Any], size: tuple[int, int]) -> str:
    """The op of that name for a constant kernel (h, w) and one size; see :func:`wiener_filter`."""
    spectrum = kernel_spectrum(torch.from_numpy(np.asarray(kernel, np.float64)), size)
    return wiener_filter(w, x, spectrum.numpy(), size)


def wiener_deconvolution(
    w: Writer, x: str, kernel: NDArray[Any], regularisation: float, size: tuple[int, int]
) -> str:
    """The op of that name for a constant kernel (h, w) and one size; see :func:`wiener_filter`."""
    wide = torch.from_numpy(np.asarray(kernel, np.float64))
    return wiener_filter(w, x, wiener_spectrum(wide, size, regularisation).numpy(), size)


def block_mean(w: Writer, x: str, scale: int) -> str:
    """The op of :mod:`fuseengine.kernels.resample`: (N, C, H, W) -> (N, C, H / s, W / s)."""
    return w.add("AveragePool", x, kernel_shape=[scale, scale], strides=[scale, scale])


def block_repeat(w: Writer, x: str, scale: int) -> str:
    """The op of :mod:`fuseengine.kernels.resample`: (N, C, H, W) -> (N, C, H s, W s)."""
    return w.add(
        "Resize",
        x,
        "",
        w.constant(np.array([1, 1, scale, scale], np.float32)),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


# --- frames ---------------------------------------------------------------------------------------

_LUMA = np.array([[RED, GREEN, BLUE]])
_TO_YCBCR = np.concatenate(
    [
        _LUMA,
        (np.array([[0, 0, 1]]) - _LUMA) / (2 * (1 - BLUE)),
        (np.array([[1, 0, 0]]) - _LUMA) / (2 * (1 - RED)),
    ]
)
_CHROMA_OFFSET = np.array([0.0, 0.5, 0.5])


def rgb_to_ycbcr(w: Writer, x: str) -> str:
    """The op of :mod:`fuseengine.kernels.ycbcr`: (N, 3, H, W) -> the same.

    A 1x1 convolution, here and in :func:`ycbcr_to_rgb`: a NaN spreads to all channels of its pixel.
    """
    return _mixed(w, x, _TO_YCBCR, _CHROMA_OFFSET)


def ycbcr_to_rgb(w: Writer, x: str) -> str:
    """The op of :mod:`fuseengine.kernels.ycbcr`: (N, 3, H, W) -> the same."""
    inverse = np.linalg.inv(_TO_YCBCR)
    return _mixed(w, x, inverse, -inverse @ _CHROMA_OFFSET)


def _mixed(
    w: Writer, x: str, matrix: NDArray[np.float64], offset: NDArray[np.float64] | None = None
) -> str:
    """Channels times a matrix (out, in), plus a number per channel."""
    given = [matrix[:, :, None, None]] if offset is None else [matrix[:, :, None, None], offset]
    return w.add("Conv", x, *(w.constant(a.astype(np.float32)) for a in given))


def pad_reflect(w: Writer, x: str, size: tuple[int, int], padded: tuple[int, int]) -> str:
    """The op of :mod:`fuseengine.kernels.pad_reflect` for one size.

    One Pad mirrors a picture once. Larger pads are several: each but the last one doubles the
    picture up to an edge pixel, so that the next one goes on as NumPy's "reflect" does.

    Args:
        w: the graph.
        x: (N, C, H, W), floating point (TensorRT pads no uint8).
        size: (H, W).
        padded: height and width of the result, no smaller.

    Returns:
        (N, C, *padded).

    Raises:
        SettingError: the result would be smaller than x.
    """
    if padded[0] < size[0] or padded[1] < size[1]:
        raise SettingError(
            f"padded {padded[0]}x{padded[1]} for {size[0]}x{size[1]}; expected no less: padding "
            "cannot crop"
        )
    height, width = size
    # A single row or column has nothing to mirror: it is repeated.
    down = padded[0] - 1 if height == 1 else 0
    right = padded[1] - 1 if width == 1 else 0
    if down or right:
        x = w.add("Pad", x, _integers(w, 0, 0, 0, 0, 0, 0, down, right), mode="edge")
    height, width = height + down, width + right
    while (height, width) != padded:
        down, right = min(height - 1, padded[0] - height), min(width - 1, padded[1] - width)
        x = w.add("Pad", x, _integers(w, 0, 0, 0, 0, 0, 0, down, right), mode="reflect")
        height, width = height + down, width + right
    return x


def crop(w: Writer, x: str, height: int, width: int) -> str:
    """The op of :mod:`fuseengine.kernels.pad_reflect`: the upper left part of (N, C, H, W)."""
    ends, axes = _integers(w, height, width), _integers(w, 2, 3)
    return w.add("Slice", x, _integers(w, 0, 0), ends, axes)


def frame_in(
    w: Writer,
    frame: str,
    channels: str = "luma",
    *,
    colour: bool,
    low: float = 0.0,
    scale: float = 1.0 / 255.0,
) -> str:
    """The op of :mod:`fuseengine.kernels.frames`, without padding (:func:`pad_reflect` does it).

    TensorRT takes uint8 at a network's inputs, from which it has to be cast at once, as it is here;
    it has no uint16.

    Args:
        w: the graph.
        frame: (N, H, W), or (N, H, W, 3) with ``colour``; any type that casts to float32.
        channels: "luma", "rgb" or "ycbcr".
        colour: whether the frame has three channels.
        low: the value that becomes 0, in the frame's units.
        scale: 1 / full scale of the frame.

    Returns:
        (N, 1 or 3, H, W), float32 in [0, 1].
    """
    x = w.add("Cast", frame, to=_FLOAT)
    if colour:
        x = w.add("Transpose", x, perm=[0, 3, 1, 2])
    else:
        x = w.add("Unsqueeze", x, _integers(w, 1))
    if colour and channels == "luma":
        x = _mixed(w, x, _LUMA)
    if low:
        x = w.add("Sub", x, _number(w, low))
    x = _clipped(w, _scaled(w, x, scale), 1.0)
    if not colour and channels != "luma":
        x = _mixed(w, x, np.ones((3, 1)))
    return rgb_to_ycbcr(w, x) if channels == "ycbcr" else x


def frame_out(
    w: Writer,
    fused: str,
    visible: str = "",
    *,
    planes: int,
    colour: bool,
    dtype: str = "uint8",
) -> str:
    """The op of :mod:`fuseengine.kernels.frames`, without cropping (:func:`crop` does it).

    Integers are rounded to nearest, ties up, by Floor, and cast last: for TensorRT that Cast has to
    be an output of the network itself, without so much as an Identity after it. It has no uint16.

    Args:
        w: the graph.
        fused: (N, planes, H, W), 1.0 is full scale.
        visible: colour frame (N, H, W, 3) whose chroma the result takes; read for one plane and a
            colour result only.
        planes: 1 or 3.
        colour: whether the result has three channels.
        dtype: "uint8", "uint16" or "float32", of the result and the visible frame.

    Returns:
        (N, H, W, 3) with ``colour``, else (N, H, W).
    """
    full_scale, kind = _FRAMES[dtype]
    x = fused if full_scale == 1.0 else _scaled(w, fused, full_scale)
    if planes == 3 and not colour:
        x = _mixed(w, x, _LUMA)
    elif planes == 1 and colour:
        given = w.add("Transpose", w.add("Cast", visible, to=_FLOAT), perm=[0, 3, 1, 2])
        x = w.add("Add", given, w.add("Sub", x, _mixed(w, given, _LUMA)))
    x = _clipped(w, x, full_scale)
    if dtype != "float32":
        x = w.add("Floor", w.add("Add", x, _number(w, 0.5)))
    last = w.add("Transpose", x, perm=[0, 2, 3, 1]) if colour else _without_channel(w, x)
    return w.add("Cast", last, to=kind)


def _without_channel(w: Writer, x: str) -> str:
    return w.add("Squeeze", x, _integers(w, 1))


def _clipped(w: Writer, x: str, top: float) -> str:
    """Values in [0, top]; NaN becomes 0, as in the kernels: no comparison with it holds."""
    zero = _number(w, 0.0)
    x = w.add("Where", w.add("Greater", x, zero), x, zero)
    return w.add("Min", x, _number(w, top))


def warp(
    w: Writer,
    x: str,
    coordinates: str | NDArray[Any],
    source: tuple[int, int],
    size: tuple[int, int],
    *,
    homography: bool,
    border: str = "zero",
    batch: int = 1,
) -> str:
    """The op of :mod:`fuseengine.kernels.warp` for one size: GridSample, bilinear.

    Coordinates that are known, as those of fixed cameras are, become a constant grid of 2 H W
    numbers, worked out in float64.

    Args:
        w: the graph.
        x: (N, C, h, w), finite.
        coordinates: a homography (N or 1, 3, 3) or a map (N or 1, H, W, 2), an array or the name of
            a float32 tensor in the graph.
        source: (h, w).
        size: (H, W).
        homography: which of the two they are.
        border: "zero" or "clamp".
        batch: N, where there is one set of coordinates for several pictures.

    Returns:
        (N, C, H, W).
    """
    if isinstance(coordinates, str):
        place = _places(w, coordinates, size) if homography else coordinates
        grid = _grid(w, place, source, border)
        if batch > 1:
            grid = w.add("Expand", grid, _integers(w, batch, *size, 2))
    else:
        grid = w.constant(_known_grid(coordinates, source, size, homography, border, batch))
    padding = {"zero": "zeros", "clamp": "border"}[border]
    return w.add("GridSample", x, grid, mode="bilinear", padding_mode=padding, align_corners=0)


def _pixels(size: tuple[int, int]) -> NDArray[np.float64]:
    """(column, row, 1) of each pixel, (H W, 3)."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.stack([columns, rows, np.ones(size)], -1).reshape(-1, 3).astype(np.float64)


def _limits(source: tuple[int, int], border: str) -> tuple[NDArray[np.float64], ...]:
    """Lowest and highest place that differs from those beyond: (column, row) each."""
    count = np.array([source[1], source[0]], np.float64)
    return (0.0 * count, count - 1) if border == "clamp" else (0.0 * count - 1, count)


def _to_unit(source: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Factor and summand from places to GridSample's [-1, 1], which ends at pixels' edges."""
    count = np.array([source[1], source[0]], np.float64)
    return 2.0 / count, 1.0 / count - 1.0


def _known_grid(
    coordinates: NDArray[Any],
    source: tuple[int, int],
    size: tuple[int, int],
    homography: bool,
    border: str,
    batch: int,
) -> NDArray[np.float32]:
    place = np.asarray(coordinates, np.float64)
    low, high = _limits(source, border)
    with np.errstate(divide="ignore", invalid="ignore"):  # points at infinity
        if homography:
            points = _pixels(size) @ place.reshape(-1, 3, 3).transpose(0, 2, 1)
            place = (points[..., :2] / points[..., 2:]).reshape(-1, *size, 2)
        place = np.minimum(np.where(place > low, place, low), high)
    factor, summand = _to_unit(source)
    grid = (place * factor + summand).astype(np.float32)
    return np.repeat(grid, batch, 0) if len(grid) == 1 else grid


def _places(w: Writer, matrix: str, size: tuple[int, int]) -> str:
    """The places of a homography, (N, H, W, 2)."""
    points = w.constant(_pixels(size).astype(np.float32))
    moved = w.add("MatMul", points, w.add("Transpose", matrix, perm=[0, 2, 1]))  # (N, H W, 3)
    place = w.add("Div", _slice(w, moved, 0, 2, 2), _slice(w, moved, 2, 3, 2))
    return w.add("Reshape", place, _integers(w, -1, *size, 2))


def _grid(w: Writer, place: str, source: tuple[int, int], border: str) -> str:
    low, high = (w.constant(a.astype(np.float32)) for a in _limits(source, border))
    inside = w.add("Where", w.add("Greater", place, low), place, low)
    factor, summand = (w.constant(a.astype(np.float32)) for a in _to_unit(source))
    return w.add("Add", w.add("Mul", w.add("Min", inside, high), factor), summand)
