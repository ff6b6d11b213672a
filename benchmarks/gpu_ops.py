"""Each GPU op against eager PyTorch, torch.compile and the best public peer; tuning; an estimate.

    python -m benchmarks.gpu_ops --size 1080x1920 --dtype float16
    python -m benchmarks.gpu_ops --tune --size 480x640          # rewrites kernels/tuning.json
    python -m benchmarks.gpu_ops --orin                         # roofline estimate, needs no GPU

Before it is timed each contender is compared with float64; more than twice eager's error in the
same dtype, plus a floor, is a row that says "wrong", without a time. A contender is a CUDA graph
of calls on inputs that together are larger than the level-2 cache; a time is the graph's, between
two events, divided by the calls. Graphs are replayed in turns. "of roof" is the least time that
the op could take over the time it took, by the measured copy bandwidth, the measured matrix rate or
the special-function units' rate (16 per multiprocessor and clock), whichever bounds the op.

Targets at 1080x1920: 70 % of the roof; attention in a twentieth of eager's time.

With ``--device cpu`` the same path runs without graphs on the CPU: for a look, not for numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import (
    RESULTS,
    Result,
    Samples,
    command_line,
    format_table,
    interleave,
    paired_ratio,
    write_atomically,
)
from benchmarks.peers import reason
from fuseengine import kernels
from fuseengine.errors import FuseEngineError
from fuseengine.kernels import _tuning
from fuseengine.kernels._triton import DTYPES, device_capability, usable
from fuseengine.kernels.compose_priors import coefficients as compose_coefficients
from fuseengine.kernels.compose_priors import launch as launch_compose
from fuseengine.kernels.criss_cross_attention import _by_lines
from fuseengine.kernels.criss_cross_attention import launch as launch_attention
from fuseengine.kernels.ddim_step import launch as launch_ddim
from fuseengine.kernels.frames import launch_in, launch_out
from fuseengine.kernels.group_norm_silu import launch as launch_norm
from fuseengine.kernels.joint_ddim_step import launch as launch_joint
from fuseengine.kernels.pad_reflect import launch as launch_pad
from fuseengine.kernels.warp import launch as launch_warp
from fuseengine.kernels.wiener import launch as launch_filter
from fuseengine.kernels.ycbcr import launch as launch_colour
from fuseengine.kernels.ycbcr import luma

Inputs = tuple[Tensor, ...]
Run = Callable[..., Tensor]
Shape = tuple[int, ...]
Draw = Callable[[torch.Generator], Tensor]

LARGE = (1080, 1920)
OF_ROOF_TARGET = 0.7
EAGER_TARGETS = {"criss_cross_attention": 20.0}
"""How many times our time eager takes; both targets are meant for the large size."""
SCALES = (0.6, 0.8, 0.8, 0.6)
GROUPS = 8
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call must do at least.

    Attributes:
        nbytes: memory traffic.
        operations: multiplications and additions in matrix products.
        exponentials: for the special-function units.
        size: what the tuning table calls the size of the call.
    """

    nbytes: int
    operations: int
    exponentials: int
    size: int


@dataclasses.dataclass(frozen=True)
class Roof:
    """What a device does at most, per second.

    Attributes:
        nbytes: read and written.
        operations: multiplications and additions in matrix products.
        exponentials: by the special-function units.
    """

    nbytes: float
    operations: float
    exponentials: float

    def least(self, work: Work) -> tuple[float, str]:
        """Seconds that the work takes at least, and what bounds it."""
        parts = {
            "memory": work.nbytes / self.nbytes,
            "matrix products": work.operations / self.operations,
            "exponentials": work.exponentials / self.exponentials,
        }
        bound = max(parts, key=lambda part: parts[part])
        return parts[bound], bound


@dataclasses.dataclass(frozen=True)
class Op:
    """One op under test.

    Attributes:
        inputs: (height, width) -> the inputs in order: a shape of normal numbers in the dtype under
            test, or a function that draws the input itself.
        ours: the public function on them.
        eager: the formulation in plain PyTorch.
        exact: the same for float64 inputs, at the full size.
        work: (height, width, bytes per element) -> what must be done.
        tunable: (*inputs, capability=, settings=) -> result, by Triton with given settings.
        candidates: settings worth trying.
        peers: other contenders.
    """

    inputs: Callable[[int, int], list[Shape | Draw]]
    ours: Run
    eager: Run
    exact: Run
    work: Callable[[int, int, int], Work]
    tunable: Run
    candidates: list[dict[str, Any]]
    peers: Mapping[str, Run] = dataclasses.field(default_factory=dict)


# --- criss-cross attention ------------------------------------------------------------------------

QUERIES, CHANNELS = 4, 32


def two_attentions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two fused attentions of PyTorch, merged by their log-sum-exp; the pixel is taken out once."""
    width = max(16, -(-max(q.shape[1], v.shape[1]) // 8) * 8)

    def lines(x: Tensor) -> Tensor:  # (N, C, lines, length) -> (N lines, 1, length, width)
        x = x.permute(0, 2, 3, 1).flatten(0, 1)[:, None]
        return F.pad(x, (0, width - x.shape[-1])).contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        batch, _, count, length = q.shape
        given = (lines(q), lines(k), lines(v))
        if q.device.type == "cpu":  # for the formula's test
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out, lse = flash(*given, scale=1.0)
        elif q.dtype == torch.float32:
            efficient = torch.ops.aten._scaled_dot_product_efficient_attention
            out, lse, *_ = efficient(*given, None, True, 0.0, False, scale=1.0)
        else:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            out, lse, *_ = flash(*given, 0.0, False, False, scale=1.0)
        out = out[:, 0, :, : v.shape[1]].unflatten(0, (batch, count)).permute(0, 3, 1, 2)
        return out, lse[:, 0, :length].unflatten(0, (batch, count))[:, None]

    row, row_lse = attend(q, k, v)
    column, column_lse = (
        t.transpose(2, 3) for t in attend(*(t.transpose(2, 3) for t in (q, k, v)))
    )
    itself = (q.float() * k.float()).sum(1, keepdim=True)
    top = torch.maximum(row_lse, column_lse)
    parts = [torch.exp(level - top) for level in (row_lse, column_lse, itself)]
    total = parts[0] + parts[1] - parts[2]
    return ((parts[0] * row + parts[1] * column - parts[2] * v) / total).to(v.dtype)


def _attention_work(height: int, width: int, element: int) -> Work:
    pixels, seen = height * width, height + width - 1
    return Work(
        nbytes=pixels * (2 * QUERIES + 2 * CHANNELS) * element,
        operations=2 * pixels * seen * (QUERIES + CHANNELS),
        exponentials=pixels * seen,
        size=pixels,
    )


def _attention_exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _by_lines(q, k, v)[0]


# --- norm and steps -------------------------------------------------------------------------------


def _planes(
    reads: int, writes: int, per_pixel: int, exponentials: int = 0
) -> Callable[[int, int, int], Work]:
    """Traffic of an elementwise op in planes; size in the tuning table, exponentials per pixel."""

    def work(height: int, width: int, element: int) -> Work:
        pixels = height * width
        nbytes = (reads + writes) * pixels * element
        return Work(nbytes, 0, exponentials * pixels, per_pixel * pixels)

    return work


def _norm_ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return kernels.group_norm_silu(x, weight, bias, groups=GROUPS, eps=EPS)


def _norm_eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def _norm_exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return kernels.group_norm_silu_reference(x, weight, bias, groups=GROUPS, eps=EPS)


def _norm_tunable(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return launch_norm(x, weight, bias, None, groups=GROUPS, eps=EPS, silu=True, **options)


def _grid_of(**values: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


_ELEMENTWISE = _grid_of(block=[512, 1024, 2048, 4096], num_warps=[4, 8])


def _step(function: Callable[..., Tensor], *numbers: float) -> Run:
    return lambda *tensors: function(*tensors, *numbers)


def _ddim_tunable(x: Tensor, eps: Tensor, **options: Any) -> Tensor:
    a, b, c, d = SCALES
    return launch_ddim(x, eps, None, (c / a, d - c * b / a, 0.0), **options)


# --- the filter -----------------------------------------------------------------------------------

PICTURES = 2


def spectrum_of(height: int, width: int) -> Draw:
    """A half spectrum of a white kernel, complex64."""

    def draw(generator: torch.Generator) -> Tensor:
        kernel = torch.randn(height, width, generator=generator, device=generator.device)
        return torch.fft.rfft2(kernel / (height * width) ** 0.5)

    return draw


def _filter_eager(x: Tensor, spectrum: Tensor) -> Tensor:
    """cuFFT, whose plans PyTorch keeps; it has half precision for powers of two only."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.fft.irfft2(torch.fft.rfft2(wide) * spectrum, s=x.shape[-2:]).to(x.dtype)


def _filter_work(height: int, width: int, element: int) -> Work:
    """A picture does not fit on the chip: the half spectrum goes out and in twice, G in once."""
    pixels = height * width
    return Work(pixels * (PICTURES * (2 * element + 16) + 4), 0, 0, pixels)


# --- frames ---------------------------------------------------------------------------------------


def frame_of(*shape: int) -> Draw:
    """A uint8 frame."""

    def draw(generator: torch.Generator) -> Tensor:
        options = {"generator": generator, "device": generator.device, "dtype": torch.uint8}
        return torch.randint(0, 256, shape, **options)

    return draw


def padded(height: int, width: int) -> tuple[int, int]:
    """Up to the next multiples of 16."""
    return -(-height // 16) * 16, -(-width // 16) * 16


def _reflect_eager(x: Tensor, size: tuple[int, int]) -> Tensor:
    down, right = size[0] - x.shape[2], size[1] - x.shape[3]
    return F.pad(x, (0, right, 0, down), mode="reflect")


def _in_eager(frame: Tensor, like: Tensor) -> Tensor:
    y = luma(frame.movedim(-1, 1).to(like.dtype)) / 255
    return _reflect_eager(y, padded(*frame.shape[1:3]))


def _in_arguments(frame: Tensor) -> tuple[Any, ...]:
    return frame, "luma", *padded(*frame.shape[1:3]), 0.0, 1.0 / 255.0


def _in_work(height: int, width: int, element: int) -> Work:
    pixels = math.prod(padded(height, width))
    return Work(3 * height * width + element * pixels, 0, 0, pixels)


def _out_unrounded(fused: Tensor, visible: Tensor) -> Tensor:
    height, width = visible.shape[1:3]
    colour = visible.movedim(-1, 1).to(torch.promote_types(fused.dtype, torch.float32))
    shift = 255 * fused[..., :height, :width].to(colour.dtype) - luma(colour)
    return (colour + shift).clamp(0, 255).movedim(1, -1)


def _out_eager(fused: Tensor, visible: Tensor) -> Tensor:
    return _out_unrounded(fused, visible).round().to(torch.uint8).contiguous()


def _out_work(height: int, width: int, element: int) -> Work:
    pixels = height * width
    return Work((6 + element) * pixels, 0, 0, pixels)


def _pad_work(height: int, width: int, element: int) -> Work:
    pixels = math.prod(padded(height, width))
    return Work(3 * element * (height * width + pixels), 0, 0, 3 * pixels)


def homography(generator: torch.Generator) -> Tensor:
    """A camera turned a little: float32, (1, 3, 3)."""
    matrix = [[1.01, 0.02, -7.5], [-0.015, 0.99, 4.25], [1e-6, -2e-6, 1.0]]
    return torch.tensor([matrix], dtype=torch.float32, device=generator.device)


def _grid(x: Tensor, matrix: Tensor) -> Tensor:
    """What ``grid_sample`` wants of a homography."""
    height, width = x.shape[2:]
    options = {"dtype": matrix.dtype, "device": x.device}
    rows, columns = torch.arange(height, **options), torch.arange(width, **options)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    u, v, w = (torch.stack([column, row, torch.ones_like(row)], -1) @ matrix[0].T).unbind(-1)
    return torch.stack([(2 * u / w + 1) / width - 1, (2 * v / w + 1) / height - 1], -1)[None]


def _sample(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x.to(grid.dtype), grid, align_corners=False).to(x.dtype)


def _warp_eager(x: Tensor, matrix: Tensor) -> Tensor:
    return _sample(x, _grid(x, matrix))


def _warp_by_ready_grid() -> Run:
    """The peer that has worked the grid out beforehand: all calls have the same matrix."""
    grids: dict[Any, Tensor] = {}

    def run(x: Tensor, matrix: Tensor) -> Tensor:
        key = (x.shape, x.device)
        if key not in grids:
            grids[key] = _grid(x, matrix)
        return _sample(x, grids[key])

    return run


_TILES = _grid_of(rows=[4, 8, 16, 32], columns=[64, 128, 256], num_warps=[4, 8])

OPS: dict[str, Op] = {
    "criss_cross_attention": Op(
        inputs=lambda h, w: [(1, c, h, w) for c in (QUERIES, QUERIES, CHANNELS)],
        ours=kernels.criss_cross_attention,
        eager=kernels.criss_cross_attention_reference,
        exact=_attention_exact,
        work=_attention_work,
        tunable=launch_attention,
        candidates=_grid_of(
            block_m=[64, 128], block_n=[16, 32, 64], num_warps=[4, 8], num_stages=[2, 3],
            turn=[True, False],
        ),
        peers={"two SDPA merged": two_attentions},
    ),
    "group_norm_silu": Op(
        inputs=lambda h, w: [(1, CHANNELS, h, w), (CHANNELS,), (CHANNELS,)],
        ours=_norm_ours,
        eager=_norm_eager,
        exact=_norm_exact,
        work=_planes(2 * CHANNELS, CHANNELS, CHANNELS, CHANNELS),
        tunable=_norm_tunable,
        candidates=_grid_of(
            block=[1024, 2048, 4096, 8192], num_warps=[4, 8], programs=[512, 1024, 2048]
        ),
    ),
    "ddim_step": Op(
        inputs=lambda h, w: [(1, 3, h, w)] * 2,
        ours=_step(kernels.ddim_step, *SCALES),
        eager=_step(kernels.ddim_step_reference, *SCALES),
        exact=_step(kernels.ddim_step_reference, *SCALES),
        work=_planes(6, 3, 3),
        tunable=_ddim_tunable,
        candidates=_ELEMENTWISE,
    ),
    "joint_ddim_step": Op(
        inputs=lambda h, w: [(1, 3, h, w)] * 2 + [(1, 1, h, w)] * 3,
        ours=_step(kernels.joint_ddim_step, *SCALES, 0.3),
        eager=_step(kernels.joint_ddim_step_reference, *SCALES, 0.3),
        exact=_step(kernels.joint_ddim_step_reference, *SCALES, 0.3),
        work=_planes(9, 3, 1),
        tunable=lambda *t, **options: launch_joint(*t, (*SCALES, 0.3), "code", **options),
        candidates=_ELEMENTWISE,
    ),
    "compose_priors": Op(
        inputs=lambda h, w: [(1, 3, h, w)] * 3 + [(1, 1, h, w)],
        ours=_step(kernels.compose_priors, *SCALES),
        eager=_step(kernels.compose_priors_reference, *SCALES),
        exact=_step(kernels.compose_priors_reference, *SCALES),
        work=_planes(10, 3, 1),
        tunable=lambda *t, **options: launch_compose(
            *t, compose_coefficients(*SCALES, "code"), **options
        ),
        candidates=_ELEMENTWISE,
    ),
    "wiener_filter": Op(
        inputs=lambda h, w: [(PICTURES, h, w), spectrum_of(h, w)],
        ours=kernels.wiener_filter,
        eager=_filter_eager,
        exact=_filter_eager,
        work=_filter_work,
        tunable=launch_filter,
        candidates=[
            {"method": "cufft"},
            *_grid_of(rows=[1024, 2048], columns=[2048, 4096], lines=[4, 8], num_warps=[8, 16]),
        ],
    ),
    "frame_in": Op(
        inputs=lambda h, w: [frame_of(1, h, w, 3), (0,)],  # the latter for its dtype
        ours=lambda frame, like: kernels.frame_in(
            frame, size=padded(*frame.shape[1:3]), dtype=like.dtype
        ),
        eager=_in_eager,
        exact=lambda frame, like: kernels.frame_in_reference(*_in_arguments(frame), like.dtype),
        work=_in_work,
        tunable=lambda frame, like, **options: launch_in(
            *_in_arguments(frame), like.dtype, **options
        ),
        candidates=_TILES,
    ),
    "frame_out": Op(
        inputs=lambda h, w: [(1, 1, *padded(h, w)), frame_of(1, h, w, 3)],
        ours=kernels.frame_out,
        eager=_out_eager,
        exact=_out_unrounded,
        work=_out_work,
        tunable=lambda fused, visible, **options: launch_out(
            fused, visible, *visible.shape[1:3], visible.dtype, **options
        ),
        candidates=_TILES,
    ),
    "rgb_to_ycbcr": Op(
        inputs=lambda h, w: [(1, 3, h, w)],
        ours=kernels.rgb_to_ycbcr,
        eager=kernels.rgb_to_ycbcr_reference,
        exact=kernels.rgb_to_ycbcr_reference,
        work=_planes(3, 3, 1),
        tunable=partial(launch_colour, inverse=False),
        candidates=_ELEMENTWISE,
    ),
    "ycbcr_to_rgb": Op(
        inputs=lambda h, w: [(1, 3, h, w)],
        ours=kernels.ycbcr_to_rgb,
        eager=kernels.ycbcr_to_rgb_reference,
        exact=kernels.ycbcr_to_rgb_reference,
        work=_planes(3, 3, 1),
        tunable=partial(launch_colour, inverse=True),
        candidates=_ELEMENTWISE,
    ),
    "pad_reflect": Op(
        inputs=lambda h, w: [(1, 3, h, w)],
        ours=lambda x: kernels.pad_reflect(x, *padded(*x.shape[2:])),
        eager=lambda x: _reflect_eager(x, padded(*x.shape[2:])),
        exact=lambda x: _reflect_eager(x, padded(*x.shape[2:])),
        work=_pad_work,
        tunable=lambda x, **options: launch_pad(x, *padded(*x.shape[2:]), **options),
        candidates=_TILES,
    ),
    "warp": Op(
        inputs=lambda h, w: [(1, 3, h, w), homography],
        ours=kernels.warp,
        eager=_warp_eager,
        exact=lambda x, matrix: kernels.warp_reference(x, matrix, *x.shape[2:], "zero"),
        work=_planes(3, 3, 1),
        tunable=lambda x, matrix, **options: launch_warp(
            x, matrix, *x.shape[2:], "zero", **options
        ),
        candidates=_TILES,
        peers={"grid_sample, grid ready": _warp_by_ready_grid()},
    ),
}  # fmt: skip


# --- timing ---------------------------------------------------------------------------------------


def draw(op: Op, size: tuple[int, int], dtype: torch.dtype, device: str, sets: int) -> list[Inputs]:
    """Inputs on the device, so many sets of them."""
    generator = torch.Generator(device).manual_seed(0)

    def one(given: Shape | Draw) -> Tensor:
        if callable(given):
            return given(generator)
        return torch.randn(given, generator=generator, device=device).to(dtype)

    return [tuple(one(given) for given in op.inputs(*size)) for _ in range(sets)]


def widened(inputs: Inputs) -> Inputs:
    """In double precision; integers as they are."""
    double = {True: torch.complex128, False: torch.float64}
    return tuple(
        t.to(double[t.is_complex()]) if t.is_complex() or t.is_floating_point() else t
        for t in inputs
    )


def input_sets(nbytes: int, device: str) -> int:
    """How many sets of inputs are together twice the level-2 cache, at most 64."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(64, max(2, math.ceil(2 * cache / max(nbytes, 1))))


@dataclasses.dataclass
class Ready:
    """A contender that can be timed.

    Attributes:
        call: does the op once per set of inputs.
        calls: how many that are.
    """

    call: Callable[[], object]
    calls: int


def prepare(run: Run, sets: Sequence[Inputs], device: str, pool: Any = None) -> Ready:
    """Warm up, then capture all calls into one CUDA graph.

    Args:
        run: a contender.
        sets: its inputs, one tuple per call.
        device: "cuda" or "cpu".
        pool: memory that graphs share; nobody reads what a replay leaves in it.
    """

    def every() -> None:
        for inputs in sets:
            run(*inputs)

    if device != "cuda":
        return Ready(every, len(sets))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        every()
    return Ready(graph.replay, len(sets))


def measure(ready: Mapping[str, Ready], *, rounds: int, device: str) -> dict[str, Samples]:
    """Times of one call of each contender, in turns; on a GPU between two events."""
    if device != "cuda":
        found = interleave({n: r.call for n, r in ready.items()}, rounds=rounds, warmup=1)
    else:
        names = list(ready)
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
        for k in range(rounds + 3):
            shift = k % len(names)
            for name in names[shift:] + names[:shift]:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                ready[name].call()
                end.record()
                if k >= 3:
                    events[name].append((begin, end))
            torch.cuda.synchronize()
        found = {
            name: Samples(name, np.array([1e6 * a.elapsed_time(b) for a, b in pairs], np.int64))
            for name, pairs in events.items()
        }
    return {n: Samples(n, s.ns // ready[n].calls) for n, s in found.items()}


def highest_mhz(gpus: Sequence[Mapping[str, Any]]) -> float:
    """Highest clock of the first GPU as its driver says it; infinity, no bound, if it does not."""
    text = str(gpus[0].get("max_sm_mhz", "")) if gpus else ""
    return float(text) if text.isdigit() else math.inf


def measured_roof(dtype: torch.dtype, device: str, mhz: float) -> Roof | None:
    """Copy bandwidth and matrix rate as measured, special functions at a clock; None on a CPU."""
    if device != "cuda":
        return None
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    a = torch.randn(8192, 8192, device=device).to(dtype)
    target, product = torch.empty_like(source), torch.empty_like(a)
    ready = {
        "copy": prepare(lambda x: target.copy_(x), [(source,)], device),
        "matrix": prepare(lambda x: torch.mm(x, x, out=product), [(a,)], device),
    }
    times = measure(ready, rounds=20, device=device)
    return Roof(
        nbytes=2e3 * source.numel() / times["copy"].p50,
        operations=2e3 * 8192**3 / times["matrix"].p50,
        exponentials=SPECIAL
        * 1e6
        * mhz
        * torch.cuda.get_device_properties(0).multi_processor_count,
    )


# --- the benchmark --------------------------------------------------------------------------------


def contenders(op: Op, *, compiled: bool) -> dict[str, Run]:
    """Name -> function; "eager" first, as it sets the tolerance."""
    found: dict[str, Run] = {"eager": op.eager, "fuseengine": op.ours}
    if compiled:
        found["torch.compile"] = torch.compile(op.eager, dynamic=False)
    return {**found, **op.peers}


def tolerance(exact: Tensor, dtype: torch.dtype) -> float:
    """What is forgiven besides twice eager's error: TF32 in three products has about 22 bits."""
    floor = 32 if dtype == torch.float32 else 8
    return floor * torch.finfo(dtype).eps * max(1.0, float(exact.abs().max()))


def bench(
    result: Result,
    name: str,
    size: tuple[int, int],
    dtype: torch.dtype,
    args: argparse.Namespace,
    roof: Roof | None,
) -> None:
    """Rows of one op in one dtype and size."""
    op = OPS[name]
    work = op.work(*size, dtype.itemsize)
    sets = draw(op, size, dtype, args.device, input_sets(work.nbytes, args.device))
    exact = op.exact(*widened(sets[0]))
    label = f"{name} {size[0]}x{size[1]} {str(dtype).removeprefix('torch.')}"
    fields: dict[str, dict[str, Any]] = {}
    ready: dict[str, Ready] = {}
    allowed = tolerance(exact, dtype)
    pool = torch.cuda.graph_pool_handle() if args.device == "cuda" else None
    for contender, run in contenders(op, compiled=not args.no_compile).items():
        try:
            with torch.inference_mode():
                error = float((run(*sets[0]).double() - exact).abs().max())
                if contender == "eager":
                    allowed += 2 * error
                if not error <= allowed:
                    raise ValueError(f"wrong: error {error:.2g}, allowed {allowed:.2g}")
                ready[contender] = prepare(run, sets, args.device, pool)
            fields[contender] = {"max_abs_error": error}
        except Exception as error:
            # Out of memory, or a peer that does not know the dtype: the others still count.
            result.add(f"{label}, {contender}", error=reason(error))
    del exact
    if not ready:
        return
    times = measure(ready, rounds=args.rounds, device=args.device)
    for contender, samples in times.items():
        row = fields[contender]
        row["gb_per_s"] = samples.gb_per_s(work.nbytes)
        if work.operations:
            row["tflops"] = work.operations / samples.p50 / 1e9
        if roof is not None:
            least_s, row["bound_by"] = roof.least(work)
            row["of_roof"] = 1e3 * least_s / samples.p50
        if "fuseengine" in times and contender != "fuseengine":
            row["times_slower"] = paired_ratio(samples, times["fuseengine"]).median
        row.update(judged(name, size, contender, row))
        result.add(f"{label}, {contender}", samples, **row)
    if "fuseengine" in times:
        lost = [c for c, s in times.items() if s.p50 < times["fuseengine"].p50]
        result.notes += [f"{label}: {c} is faster than fuseengine" for c in lost]


def run_all(args: argparse.Namespace, dtypes: Sequence[torch.dtype]) -> Result:
    """Every op, dtype and size of the command line, as far as the budget goes."""
    begin = time.monotonic()
    settings = {"rounds": args.rounds, "queries": QUERIES, "channels": CHANNELS}
    result = Result("gpu-ops", args.device, "GPU ops against their peers", settings)
    mhz = highest_mhz(result.machine["gpu"])
    left_out = []
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        roof = measured_roof(dtype, args.device, mhz)
        if roof is not None:
            result.settings[f"copy_gb_per_s_{kind}"] = round(roof.nbytes / 1e9)
            result.settings[f"matrix_tflops_{kind}"] = round(roof.operations / 1e12, 1)
            result.settings["max_sm_mhz"] = mhz if math.isfinite(mhz) else "unknown"
        for name, size in itertools.product(args.op, args.size):
            if args.budget_s is not None and time.monotonic() - begin > args.budget_s:
                left_out.append(f"{name} {size[0]}x{size[1]} {kind}")
            else:
                bench(result, name, size, dtype, args, roof)
    result.notes += [f"MISS: {row['name']}" for row in result.rows if row.get("outcome") == "MISS"]
    if left_out:
        result.notes.append(f"not run, {args.budget_s:g} s were spent: {', '.join(left_out)}")
    return result


def judged(
    op: str, size: tuple[int, int], contender: str, row: Mapping[str, Any]
) -> dict[str, str]:
    """Target and outcome of a row, where the project has set itself one."""
    if size != LARGE:
        return {}
    if contender == "fuseengine" and "of_roof" in row:
        found, least, unit = row["of_roof"], OF_ROOF_TARGET, "of roof"
    elif contender == "eager" and op in EAGER_TARGETS and "times_slower" in row:
        found, least, unit = row["times_slower"], EAGER_TARGETS[op], "times slower"
    else:
        return {}
    return {"target": f"{unit} >= {least:g}", "outcome": "PASS" if found >= least else "MISS"}


# --- tuning ---------------------------------------------------------------------------------------


def tune(
    names: Sequence[str], size: tuple[int, int], dtypes: Sequence[torch.dtype], path: Path
) -> str:
    """Time every candidate on this GPU and write the fastest right ones into a tuning table.

    Args:
        names: ops.
        size: height and width.
        dtypes: of the tensors.
        path: the table, read and replaced.

    Returns:
        A table of what was found.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    capability = device_capability(torch.device("cuda", torch.cuda.current_device()))
    rows = []
    for name, dtype in itertools.product(names, dtypes):
        op, kind = OPS[name], str(dtype).removeprefix("torch.")
        work = op.work(*size, dtype.itemsize)
        sets = draw(op, size, dtype, "cuda", input_sets(work.nbytes, "cuda"))
        expected = op.exact(*widened(sets[0]))
        default = data["ops"][name]["defaults"][kind]
        eager_error = float((op.eager(*sets[0]).double() - expected).abs().max())
        allowed = 2 * eager_error + tolerance(expected, dtype)
        best: tuple[float, dict[str, Any]] = (math.inf, default)
        base = math.inf
        for settings in [default, *op.candidates]:
            whole = {**default, **settings}

            def run(*inputs: Tensor, op: Op = op, whole: dict[str, Any] = whole) -> Tensor:
                return op.tunable(*inputs, capability=capability, settings=whole)

            try:
                if not (run(*sets[0]).double() - expected).abs().max() <= allowed:
                    continue
                ready = {"candidate": prepare(run, sets, "cuda")}
            except Exception:
                continue  # more shared memory or registers than this GPU has
            ms = measure(ready, rounds=20, device="cuda")["candidate"].p50
            base = ms if settings is default else base
            best = min(best, (ms, whole), key=lambda pair: pair[0])
        ms, settings = best
        changed = {k: v for k, v in settings.items() if default[k] != v}
        data = _tuning.with_entry(data, name, capability, kind, work.size, changed)
        text = ", ".join(f"{k}={v}" for k, v in changed.items()) or "default"
        rows.append({"name": f"{name} {kind}", "default_ms": base, "p50_ms": ms, "settings": text})
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return format_table(rows)


# --- an estimate for Orin -------------------------------------------------------------------------

ORIN = {
    "AGX Orin 64 GB, MAXN": (16, 1.300, 204.8),
    "AGX Orin 64 GB, 30 W": (8, 0.612, 204.8),
    "Orin NX 16 GB, Super": (8, 1.173, 102.4),
    "Orin Nano 8 GB, Super": (8, 1.020, 102.4),
}
"""Multiprocessors, GHz, GB/s of DRAM. NVIDIA's Jetson Orin module data sheets and nvpmodel files
(mirrored in LineageOS/android_device_nvidia_concord)."""

TENSOR_FMA = 1024
"""Dense FP16 multiply-adds of an Orin multiprocessor (8.7) per clock."""
SPECIAL = 16
"""Special functions of a multiprocessor (8.x, 9.0) per clock: CUDA C++ Programming Guide."""


def orin_roof(module: str) -> Roof:
    """What a module does at most by its data sheet, in float16."""
    count, ghz, gb = ORIN[module]
    clock = 1e9 * ghz * count
    return Roof(1e9 * gb, 2 * TENSOR_FMA * clock, SPECIAL * clock)


def orin_estimate(size: tuple[int, int]) -> list[dict[str, Any]]:
    """Least milliseconds of each op on each module in float16. Nothing here was run."""
    rows = []
    for name, op in OPS.items():
        work = op.work(*size, 2)
        if name == "criss_cross_attention":
            # The tensor cores multiply Cq padded to 16.
            padded = work.operations * (16 + CHANNELS) // (QUERIES + CHANNELS)
            work = dataclasses.replace(work, operations=padded)
        row: dict[str, Any] = {"op": f"{name} {size[0]}x{size[1]}"}
        bounds = {}
        for module in ORIN:
            least_s, bound = orin_roof(module).least(work)
            row[f"{module}, ms"], bounds[bound] = 1e3 * least_s, None
        rows.append({**row, "bound by": ", ".join(bounds)})
    return rows


def orin_page(sizes: Sequence[tuple[int, int]], command: str) -> str:
    """The estimate as a page for a reader."""
    table = format_table([row for size in sizes for row in orin_estimate(size)], markdown=True)
    return "\n".join([
        "# ESTIMATE: the ops on Jetson Orin, float16",
        "",
        f"    {command}",
        "",
        "Nothing here was run. It is a roofline: the largest of memory traffic over DRAM "
        "bandwidth, matrix operations over the dense FP16 tensor rate and exponentials over the "
        "special-function units' rate, all by the data sheet. A kernel takes longer; 70 % of such "
        "a bound is good.",
        "",
        table,
        "",
        "* Multiprocessors, clocks and bandwidths: NVIDIA's Jetson Orin module data sheets and "
        "nvpmodel files (mirrored in LineageOS/android_device_nvidia_concord). 30 W is AGX Orin's "
        "default mode: 8 multiprocessors at 612 MHz.",
        f"* Per multiprocessor and clock: {TENSOR_FMA} dense FP16 multiply-adds (42.6 TFLOPS at "
        f"MAXN), {SPECIAL} special functions (CUDA C++ Programming Guide, arithmetic throughput).",
        f"* Attention with {QUERIES} query and {CHANNELS} value channels; the tensor cores "
        f"multiply the queries padded to 16. Norm with {CHANNELS} channels, read twice. Filter of "
        f"{PICTURES} pictures, whose half spectra go out and in twice. Steps, colours, padding and "
        "warp with three planes; frames are uint8 RGB, planes for them luma.",
        "",
    ])  # fmt: skip


# --- command line ---------------------------------------------------------------------------------


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu_ops", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--op", nargs="+", default=list(OPS), choices=list(OPS))
    made.add_argument("--dtype", nargs="+", default=["float16", "float32"], choices=list(_DTYPES))
    made.add_argument("--size", nargs="+", type=_size, default=[(480, 640), LARGE])
    made.add_argument("--rounds", type=int, default=50)
    made.add_argument("--budget-s", type=float, help="begin no op after this many seconds")
    made.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    made.add_argument("--tune", action="store_true", help="write the tuning table instead")
    made.add_argument("--table", type=Path, default=_tuning.PATH, help="the table to write")
    made.add_argument("--orin", action="store_true", help="write the estimate and stop")
    made.add_argument("--out", type=Path, help="folder of results instead of benchmarks/results")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 2 when it cannot be run."""
    made = parser()
    words = list(sys.argv[1:] if argv is None else argv)
    args = made.parse_args(words)
    command = command_line("benchmarks.gpu_ops", words)
    if args.orin:
        page = orin_page(args.size, command)
        folder = (args.out or RESULTS) / importlib.metadata.version("fuseengine")
        write_atomically(folder / "orin-ops-estimate.md", page)
        print(page)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        made.exit(2, f"{made.prog}: no CUDA device; --device cpu for a look, --orin\n")
    dtypes = [_DTYPES[name] for name in args.dtype]
    if args.device == "cuda" and not usable(torch.empty(1, device="cuda")):
        made.exit(2, f"{made.prog}: the kernels need Triton and capability 8.0 or newer\n")
    # Float32 is float32: no TF32 in the peers.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    try:
        if args.tune:
            for size in args.size:
                print(tune(args.op, size, dtypes, args.table))
            return 0
        result = run_all(args, dtypes)
    except FuseEngineError as error:
        made.exit(2, f"{made.prog}: {error}\n")
    result.command = command
    print(result.table())
    for note in result.notes:
        print(f"* {note}")
    if result.rows:
        result.write(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
