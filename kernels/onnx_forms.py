"""The ops as standard ONNX operators, for runtimes that have no kernels of ours.

Opset 18, operators that TensorRT 10.3 imports, sizes left open. Each function appends nodes to a
graph through a writer (``fuseengine.export.onnx.OnnxWriter`` is one) and returns the name of its
result. The attention maps are in memory there: (N, H, W, H + W) elements.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

OPSET = 18


class Writer(Protocol):
    """What the functions need of a graph under construction."""

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output; the output's name."""

    def constant(self, value: Any) -> str:
        """Store a constant; its name."""


def criss_cross_attention(w: Writer, q: str, k: str, v: str) -> str:
    """The op of :mod:`fuseengine.kernels.criss_cross_attention`.

    Two batched matrix products per direction; one softmax over [row, column]; the column's
    diagonal is set to -infinity by comparing row numbers, which works for any height.

    Args:
        w: the graph.
        q: queries, (N, Cq, H, W).
        k: keys, as q.
        v: values, (N, C, H, W).

    Returns:
        (N, C, H, W).
    """
    shape = w.add("Shape", q)

    def size(axis: int) -> str:
        return w.add("Gather", shape, w.constant(np.array([axis], np.int64)), axis=0)

    height, width = size(2), size(3)
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
    scalar = w.add("Squeeze", height, w.constant(np.array([0], np.int64)))
    zero, one = w.constant(np.array(0, np.int64)), w.constant(np.array(1, np.int64))
    numbers = w.add("Range", zero, scalar, one)
    below = w.add("Unsqueeze", numbers, w.constant(np.array([1], np.int64)))
    itself = w.add("Equal", numbers, below)  # (H, H)
    never = w.add("CastLike", w.constant(np.array(-np.inf, np.float32)), column)
    column = w.add("Where", itself, never, column)

    both = w.add("Concat", row, w.add("Transpose", column, perm=[0, 2, 1, 3]), axis=3)
    weight = w.add("Softmax", both, axis=3)  # (N, H, W, W + H)
    last = w.constant(np.array([3], np.int64))
    row = w.add("Slice", weight, w.constant(np.array([0], np.int64)), width, last)
    column = w.add("Slice", weight, width, w.add("Add", width, height), last)
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
) -> str:
    """The op of :mod:`fuseengine.kernels.group_norm_silu`.

    Channel means, then a 1x1 convolution with a C x C matrix that averages within groups: the
    tensor keeps its (N, C, H, W) shape, where the usual reshape to (N, groups, -1) makes runtimes
    change layout twice.

    Args:
        w: the graph.
        x: (N, C, H, W).
        weight: (C,).
        bias: (C,).
        shift: (N, C) or (1, C); "" for none.
        groups: a divisor of C.
        eps: added to the variance.
        silu: whether to activate.

    Returns:
        (N, C, H, W).
    """
    channels = len(weight)
    per_group = channels // groups
    same = np.kron(np.eye(groups), np.full((per_group, per_group), 1.0 / per_group))
    mix = w.constant(same.astype(np.float32).reshape(channels, channels, 1, 1))
    axes = w.constant(np.array([2, 3], np.int64))
    mean = w.add("Conv", w.add("ReduceMean", x, axes, keepdims=1), mix)
    centred = w.add("Sub", x, mean)
    square = w.add("ReduceMean", w.add("Mul", centred, centred), axes, keepdims=1)
    variance = w.add("Add", w.add("Conv", square, mix), w.constant(np.float32(eps)))
    scale = w.add("Reciprocal", w.add("Sqrt", variance))
    scale = w.add("Mul", scale, w.constant(weight.astype(np.float32).reshape(1, -1, 1, 1)))
    offset = w.constant(bias.astype(np.float32).reshape(1, -1, 1, 1))
    if shift:
        plane = w.add("Unsqueeze", shift, axes)
        offset = w.add("Add", offset, plane)
    z = w.add("Add", w.add("Mul", centred, scale), offset)
    return w.add("Mul", z, w.add("Sigmoid", z)) if silu else z
