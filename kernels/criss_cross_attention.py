"""Criss-cross attention: every pixel attends to its row and its column.

    s(p, r) = sum_c q[c, p] k[c, r]              r in the row or the column of p, H + W - 1 pixels
    out[c, p] = sum_r softmax_r(s(p, r)) v[c, r]

q, k are (N, Cq, H, W), v and out (N, C, H, W), floating point, one dtype; dot products are not
scaled. Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", ICCV 2019,
equations 1 and 2; the pixel itself counts once: the column leaves it out, as in CCNet's code.

The attention maps have N H W (H + W - 1) elements (1.4 GB in float32 at 480x640, 25 GB at
1080x1920); they are never in memory. Two passes of one kernel, each an attention along lines in the
manner of FlashAttention (Dao et al. 2022):

    columns:  running maximum and sum over the column; writes out and one float per pixel,
              lse = log2 sum_r 2^(s log2 e)
    rows:     goes on from there: maximum lse, sum 1, accumulator out; leaves the pixel itself out
              (which of the two lines has it does not matter)

Down a column of a row-major plane every element lies in another 32-byte sector, and each block of
queries would fetch them all again. So the column pass works on turned copies, (N, C, W, H), of q,
k, v and its result, unless the tuning table says otherwise; rows come second so that they read
and write ``out`` as it lies. Extra memory: those copies, 2 Cq + 2 C per pixel, and lse.
The work is arithmetic: 2 (Cq + C) (H + W) operations and H + W exponentials per pixel; k and v
are read once per BLOCK_M pixels and pass, from L2.

float32 inputs: the tensor cores take TF32; "tf32x3" adds the products of the remainders, about 22
bits, a few times float32's rounding; "ieee" in the tuning table avoids them altogether.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from fuseengine import _native
from fuseengine.errors import SettingError
from fuseengine.kernels import _tuning
from fuseengine.kernels._library import needs_reference, register
from fuseengine.kernels._planes import dense_rows
from fuseengine.kernels._triton import (
    Launch,
    blocks,
    device_capability,
    kernel,
    power_of_two,
    run,
    usable,
)

if TYPE_CHECKING:
    import triton.language as tl


def criss_cross_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition of :func:`criss_cross_attention`; holds both maps in memory."""
    height, width = q.shape[-2:]
    itself = torch.eye(height, dtype=torch.bool, device=q.device)[:, None]  # (H, 1, H)
    row = torch.einsum("nchw,nchx->nhwx", q, k)
    column = torch.einsum("nchw,ncyw->nhwy", q, k).masked_fill(itself, float("-inf"))
    weight = torch.cat([row, column], dim=-1).softmax(dim=-1)
    row, column = weight.split([width, height], dim=-1)
    return torch.einsum("nhwx,nchx->nchw", row, v) + torch.einsum("nhwy,ncyw->nchw", column, v)


def criss_cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every pixel to its row and column; see the module's docstring.

    Differentiable once: the backward pass recomputes the maps some lines at a time, so that
    training holds no map either.

    Args:
        q: queries, (N, Cq, H, W), float32, float64, float16 or bfloat16, any strides.
        k: keys, as q.
        v: values, (N, C, H, W), q's dtype and device.

    Returns:
        (N, C, H, W), contiguous, v's dtype. Half precision accumulates in float32. A NaN spreads
        to the row and the column of its pixel.

    Raises:
        SettingError: ranks, shapes, dtypes or devices that do not go together.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(criss_cross_attention, (q, k, v), q, k, v)
    _check(q, k, v)
    if needs_reference(q, k, v):
        return _Differentiable.apply(q, k, v)
    return torch.ops.fuse.criss_cross_attention(q, k, v)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4 or q.shape != k.shape or q.shape[1] < 1:
        raise SettingError(
            f"{shapes}; expected q and k (N, Cq, H, W) with Cq >= 1 and v (N, C, H, W); "
            "add a batch dimension with x[None]"
        )
    if (v.shape[0], *v.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise SettingError(f"{shapes}; expected v with q's N, H and W: resize it first")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise SettingError(
            f"q {q.dtype}, k {k.dtype}, v {v.dtype}; expected one floating-point dtype: "
            "convert with x.to(dtype)"
        )
    if not q.device == k.device == v.device:
        raise SettingError(
            f"q on {q.device}, k on {k.device}, v on {v.device}; expected one device: "
            "move them with x.to(device)"
        )


# --- PyTorch, some lines at a time ---------------------------------------------------------------

_MAP_ELEMENTS = 1 << 21
"""Elements of an attention map held at once: 8 MB in float32, about a level-2 cache."""


def _lines(x: Tensor, block: slice) -> Tensor:
    """Lines of (N, C, lines, length) as a batch of matrices (N, lines, length, C)."""
    return x[:, :, block].permute(0, 2, 3, 1)


def _line_blocks(q: Tensor) -> Iterator[slice]:
    batch, _, lines, length = q.shape
    step = max(1, _MAP_ELEMENTS // max(1, batch * length * length))
    return (slice(start, start + step) for start in range(0, lines, step))


def _scores(q: Tensor, k: Tensor, block: slice, *, columns: bool) -> Tensor:
    """(N, lines, length, length); on columns a pixel does not see itself."""
    scores = _lines(q, block) @ _lines(k, block).transpose(-1, -2)
    if columns:
        scores.diagonal(dim1=-2, dim2=-1).fill_(float("-inf"))
    return scores


def _turned(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(-1, -2) for t in tensors)


def _by_lines(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Out and the natural logarithm of the softmax's sum, (N, H, W); no whole map in memory."""
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    lse = torch.empty((q.shape[0], *q.shape[2:]), dtype=q.dtype, device=q.device)
    for block in _line_blocks(q):
        scores = _scores(q, k, block, columns=False)
        lse[:, block] = scores.logsumexp(-1)
        _lines(out, block).copy_(scores.softmax(-1) @ _lines(v, block))
    (q, k, v, across), total = _turned(q, k, v, out), lse.transpose(-1, -2)
    for block in _line_blocks(q):
        scores = _scores(q, k, block, columns=True)
        row = total[:, block]
        both = torch.logaddexp(row, scores.logsumexp(-1))
        weight = torch.exp(scores - both[..., None])
        target = _lines(across, block)
        target.mul_(torch.exp(row - both)[..., None]).add_(weight @ _lines(v, block))
        row.copy_(both)
    return out, lse


class _Differentiable(torch.autograd.Function):
    """Forward by the op; backward by recomputation, lines at a time, in float32 or wider."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.ops.fuse.criss_cross_attention(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = ctx.saved_tensors[0].dtype
        q, k, v, grad = (_wide(t) for t in (*ctx.saved_tensors, grad))
        out, lse = _by_lines(q, k, v)
        # With P the weights: dV = P' dO, dP = dO V', dS = P (dP - sum(dO O)).
        mean = (grad * out).sum(1)
        sums = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
        for columns in (False, True):
            given = (q, k, v, grad, lse, mean, *sums)
            a, b, c, g, total, level, dq, dk, dv = _turned(*given) if columns else given
            for block in _line_blocks(a):
                weight = torch.exp(_scores(a, b, block, columns=columns) - total[:, block, :, None])
                upstream = _lines(g, block)
                _lines(dv, block).add_(weight.transpose(-1, -2) @ upstream)
                slope = upstream @ _lines(c, block).transpose(-1, -2)
                slope.sub_(level[:, block, :, None]).mul_(weight)
                _lines(dq, block).add_(slope @ _lines(b, block))
                _lines(dk, block).add_(slope.transpose(-1, -2) @ _lines(a, block))
        return tuple(s.to(dtype) for s in sums)  # type: ignore[return-value]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# --- Triton --------------------------------------------------------------------------------------


@kernel
def criss_cross_line(
    q,
    k,
    v,
    out,
    lse,
    length,
    lines,
    queries,
    channels,
    q_batch,
    q_channel,
    q_line,
    q_step,
    k_batch,
    k_channel,
    k_line,
    k_step,
    v_batch,
    v_channel,
    v_line,
    v_step,
    out_batch,
    out_channel,
    out_line,
    out_step,
    lse_batch,
    lse_line,
    lse_step,
    SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """BLOCK_M pixels of one line against that whole line, BLOCK_C channels of the result.

    The second pass starts from what the first one left in ``out`` and ``lse`` and leaves the pixel
    itself out. Each element of ``out`` is read and written by one program only.
    """
    log2_e: tl.constexpr = 1.4426950408889634
    in_line = tl.cdiv(length, BLOCK_M)
    program = tl.program_id(0)
    rest = program // in_line
    line = (rest % lines).to(tl.int64)
    batch = (rest // lines).to(tl.int64)
    rows = (program % in_line) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_Q).to(tl.int64)
    outer = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    rows_in = rows < length
    wide_rows = rows.to(tl.int64)

    query = tl.load(
        q + batch * q_batch + line * q_line + wide_rows[:, None] * q_step + inner * q_channel,
        mask=rows_in[:, None] & (inner < queries),
        other=0.0,
    )  # [M, Q]
    level = lse + batch * lse_batch + line * lse_line + wide_rows * lse_step  # [M]
    if SECOND:
        first = tl.load(level, mask=rows_in, other=0.0)
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        first = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    peak = first
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)

    keys = k + batch * k_batch + line * k_line + inner[:, None] * k_channel
    values = v + batch * v_batch + line * v_line + outer[None, :] * v_channel
    for start in range(0, length, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        columns_in = columns < length
        step = columns.to(tl.int64)
        key = tl.load(
            keys + step[None, :] * k_step,
            mask=(inner[:, None] < queries) & columns_in[None, :],
            other=0.0,
        )  # [Q, N]
        score = tl.dot(query, key, input_precision=PRECISION)  # [M, N]
        seen = columns_in[None, :]
        if SECOND:
            seen = seen & (columns[None, :] != rows[:, None])
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1) * log2_e)
        weight = tl.exp2(score * log2_e - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weight, 1)
        value = tl.load(
            values + step[:, None] * v_step,
            mask=columns_in[:, None] & (outer[None, :] < channels),
            other=0.0,
        )  # [N, C]
        acc = tl.dot(
            weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION
        )
        peak = higher

    result = out + batch * out_batch + line * out_line
    result += wide_rows[:, None] * out_step + outer * out_channel  # [M, C]
    result_in = rows_in[:, None] & (outer < channels)
    if SECOND:
        # Not before the loop: its addresses alone would hold a fourth of the registers there.
        before = tl.load(result, mask=result_in, other=0.0).to(tl.float32)
        acc += before * tl.exp2(first - peak)[:, None]
    tl.store(result, (acc / total[:, None]).to(out.dtype.element_ty), mask=result_in)
    if not SECOND:
        # Programs of all channel blocks store the same numbers.
        tl.store(level, peak + tl.log2(total), mask=rows_in)


@kernel
def turn_planes(
    x,
    out,
    rows,
    columns,
    channels,
    x_batch,
    x_channel,
    x_row,
    BLOCK: tl.constexpr,
) -> None:
    """A BLOCK x BLOCK tile of ``out[n, c, j, i] = x[n, c, i, j]``.

    Rows of x are dense, ``out`` is contiguous.
    """
    down, across = tl.cdiv(rows, BLOCK), tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    plane = (program // (down * across)).to(tl.int64)
    program = program % (down * across)
    i = ((program // across) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    j = ((program % across) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    inside = (i < rows) & (j < columns)
    source = x + (plane // channels) * x_batch + (plane % channels) * x_channel
    tile = tl.load(source + i * x_row + j, mask=inside)
    tl.store(out + (plane * columns + j) * rows + i, tile, mask=inside)


_TURNED = 64
"""Side of a tile that is turned: a row of it is 128 bytes, a cache line, in half precision."""


def _turn(x: Tensor, out: Tensor, label: str) -> Launch:
    batch, channels, rows, columns = x.shape
    strides = dict(zip(("x_batch", "x_channel", "x_row"), x.stride(), strict=False))
    sizes = {"rows": rows, "columns": columns}
    return Launch(
        kernel=turn_planes,
        label=label,
        grid=(batch * channels * blocks(rows, _TURNED) * blocks(columns, _TURNED),),
        grid_rule="(batch * channels * ceil(rows / BLOCK) * ceil(columns / BLOCK),)",
        arguments={"x": x, "out": out, **sizes, "channels": channels, **strides},
        constants={"BLOCK": _TURNED},
        multiples=(*sizes, *strides),
    )


def _channel_blocks(queries: int, channels: int, settings: dict[str, Any]) -> tuple[int, int]:
    return (
        power_of_two(queries, least=16),
        power_of_two(channels, least=16, most=settings["block_c"]),
    )


def _settings(q: Tensor, v: Tensor, capability: int) -> dict[str, Any]:
    """The tuning table's, made to fit the registers for channels that it does not look at."""
    settings = _tuning.choose("criss_cross_attention", q.dtype, capability, q.shape[2] * q.shape[3])
    block_q, block_c = _channel_blocks(q.shape[1], v.shape[1], settings)
    if q.dtype != torch.float32 or (block_q == 16 and block_c <= 32):
        return settings
    # Three TF32 products keep each tile in two parts; these sizes spill neither on 8.x nor on 9.0.
    # A warp has 16 rows of the products: with fewer rows than that, warps would do the same work.
    if block_q == 16:
        return settings | {"block_m": 128, "block_n": 16, "num_warps": 8}
    return settings | {"block_n": 16, "num_stages": 3 if block_c >= block_q else 2}


def _pass(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, settings: dict[str, Any], label: str
) -> Launch:
    batch, queries, lines, length = q.shape
    channels = v.shape[1]
    block_m, block_n = settings["block_m"], settings["block_n"]
    block_q, block_c = _channel_blocks(queries, channels, settings)
    strides = {
        f"{name}_{axis}": stride
        for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out))
        for axis, stride in zip(("batch", "channel", "line", "step"), tensor.stride(), strict=True)
    }
    dense, multiples = {}, ()
    if length == 1 or all(tensor.stride(3) == 1 for tensor in (q, k, v, out)):
        dense = dict.fromkeys(("q_step", "k_step", "v_step", "out_step"), 1)
        strides = {name: stride for name, stride in strides.items() if name not in dense}
        multiples = ("length", *strides)
    strides |= zip(("lse_batch", "lse_line", "lse_step"), lse.stride(), strict=True)
    sizes = {"length": length, "lines": lines, "queries": queries, "channels": channels}
    return Launch(
        kernel=criss_cross_line,
        label=label if dense else f"{label}, strided",
        grid=(batch * lines * blocks(length, block_m), blocks(channels, block_c)),
        grid_rule="(batch * lines * ceil(length / BLOCK_M), ceil(channels / BLOCK_C))",
        arguments={"q": q, "k": k, "v": v, "out": out, "lse": lse, **sizes, **strides},
        constants={
            "SECOND": label == "rows",
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_Q": block_q,
            "BLOCK_C": block_c,
            "PRECISION": settings["precision"],
            **dense,
        },
        num_warps=settings["num_warps"],
        num_stages=settings["num_stages"],
        multiples=multiples,
    )


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    capability: int,
    settings: dict[str, Any] | None = None,
) -> list[Launch]:
    """The launches of the op.

    Args:
        q: queries, (N, Cq, H, W), rows dense.
        k: keys, as q.
        v: values, (N, C, H, W), rows dense.
        out: result, v's shape, contiguous; overlaps no input.
        lse: scratch, (N, H, W) float32.
        capability: compute capability as two digits.
        settings: instead of the tuning table's, for tuning itself.

    Returns:
        Column pass, row pass, with turned copies before and between them.
    """
    if settings is None:
        settings = _settings(q, v, capability)
    if not settings["turn"]:
        turned = (t.transpose(2, 3) for t in (q, k, v, out))
        return [
            _pass(*turned, lse.transpose(1, 2), settings, "columns"),
            _pass(q, k, v, out, lse, settings, "rows"),
        ]
    launches, turned = [], []
    for name, given in (("q, k", q), ("q, k", k), ("v", v)):
        copy = torch.empty_like(given.transpose(2, 3), memory_format=torch.contiguous_format)
        launches.append(_turn(given, copy, f"turn {name}"))
        turned.append(copy)
    result = torch.empty_like(turned[2])
    return [
        *launches,
        _pass(*turned, result, lse.transpose(1, 2), settings, "columns"),
        _turn(result, out, "turn back"),
        _pass(q, k, v, out, lse, settings, "rows"),
    ]


def launch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Run the Triton kernels; ``options`` as in :func:`plan`."""
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if out.numel() == 0:
        return out
    lse = torch.empty((q.shape[0], *q.shape[2:]), dtype=torch.float32, device=q.device)
    q, k, v = (dense_rows(t) for t in (q, k, v))
    run(plan(q, k, v, out, lse, **options), q.device)
    return out


# --- the op --------------------------------------------------------------------------------------


def _general(q, k, v):
    return _by_lines(_wide(q), _wide(k), _wide(v))[0].to(v.dtype)


def _cuda(q, k, v):
    if usable(q, k, v):
        return launch(q, k, v, capability=device_capability(q.device))
    return _general(q, k, v)


def _cpu(q, k, v):
    if v.dtype == torch.float64 or v.numel() == 0 or not hasattr(_native, "criss_cross_attention"):
        return _general(q, k, v)
    out = torch.empty(v.shape, dtype=torch.float32)
    arrays = (t.float().contiguous().numpy() for t in (q, k, v))
    _native.criss_cross_attention(*arrays, out.numpy())
    return out.to(v.dtype)


register(
    "criss_cross_attention(Tensor q, Tensor k, Tensor v) -> Tensor",
    general=_cuda,
    cpu=_cpu,
    fake=lambda q, k, v: v.new_empty(v.shape),
)
