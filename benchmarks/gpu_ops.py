"""Each GPU op against eager PyTorch, torch.compile and the best public peer; tuning; an estimate.

    python -m benchmarks.gpu_ops --size 1080x1920 --dtype float16
    python -m benchmarks.gpu_ops --tune --size 480x640          # rewrites kernels/tuning.json
    python -m benchmarks.gpu_ops --orin                         # roofline estimate, needs no GPU

Before it is timed each contender is compared with float64; more than twice eager's error in the
same dtype, plus a floor, is a row that says "wrong", without a time. A contender is a CUDA graph
of calls on inputs that together are larger than the level-2 cache; a time is the graph's, between
two events, divided by the calls. Graphs are replayed in turns. "of roof" is the share of the
measured copy bandwidth or matrix rate, whichever bounds the op.

With ``--device cpu`` the same path runs without graphs on the CPU: for a look, not for numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Result, Samples, format_table, interleave, paired_ratio
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
from fuseengine.kernels.group_norm_silu import launch as launch_norm
from fuseengine.kernels.joint_ddim_step import launch as launch_joint

Inputs = tuple[Tensor, ...]
Run = Callable[..., Tensor]

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
class Op:
    """One op under test.

    Attributes:
        shapes: (height, width) -> shapes of the inputs, in order.
        ours: the public function on them.
        eager: the formulation in plain PyTorch.
        exact: the same for float64 inputs, at the full size.
        work: (height, width, bytes per element) -> what must be done.
        tunable: (*inputs, capability=, settings=) -> result, by Triton with given settings.
        candidates: settings worth trying.
        peers: other contenders.
    """

    shapes: Callable[[int, int], list[tuple[int, ...]]]
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
        if q.dtype == torch.float32:
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


# --- the others -----------------------------------------------------------------------------------


def _planes(reads: int, writes: int, per_pixel: int) -> Callable[[int, int, int], Work]:
    """Traffic of an elementwise op in planes; its size in the tuning table per pixel."""

    def work(height: int, width: int, element: int) -> Work:
        pixels = height * width
        return Work((reads + writes) * pixels * element, 0, 0, per_pixel * pixels)

    return work


def _norm_ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return kernels.group_norm_silu(x, weight, bias, groups=GROUPS, eps=EPS)


def _norm_eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def _norm_exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return kernels.group_norm_silu_reference(x, weight, bias, groups=GROUPS, eps=EPS)


def _norm_tunable(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return launch_norm(x, weight, bias, None, groups=GROUPS, eps=EPS, silu=True, **options)


def _grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


_ELEMENTWISE = _grid(block=[512, 1024, 2048, 4096], num_warps=[4, 8])


def _step(function: Callable[..., Tensor], *numbers: float) -> Run:
    return lambda *tensors: function(*tensors, *numbers)


def _ddim_tunable(x: Tensor, eps: Tensor, **options: Any) -> Tensor:
    a, b, c, d = SCALES
    return launch_ddim(x, eps, None, (c / a, d - c * b / a, 0.0), **options)


OPS: dict[str, Op] = {
    "criss_cross_attention": Op(
        shapes=lambda h, w: [(1, c, h, w) for c in (QUERIES, QUERIES, CHANNELS)],
        ours=kernels.criss_cross_attention,
        eager=kernels.criss_cross_attention_reference,
        exact=_attention_exact,
        work=_attention_work,
        tunable=launch_attention,
        candidates=_grid(
            block_m=[64, 128], block_n=[16, 32, 64], num_warps=[4, 8], num_stages=[2, 3],
            turn=[True, False],
        ),
        peers={"two SDPA merged": two_attentions},
    ),
    "group_norm_silu": Op(
        shapes=lambda h, w: [(1, CHANNELS, h, w), (CHANNELS,), (CHANNELS,)],
        ours=_norm_ours,
        eager=_norm_eager,
        exact=_norm_exact,
        work=_planes(2 * CHANNELS, CHANNELS, CHANNELS),
        tunable=_norm_tunable,
        candidates=_grid(
            block=[1024, 2048, 4096, 8192], num_warps=[4, 8], programs=[512, 1024, 2048]
        ),
    ),
    "ddim_step": Op(
        shapes=lambda h, w: [(1, 3, h, w)] * 2,
        ours=_step(kernels.ddim_step, *SCALES),
        eager=_step(kernels.ddim_step_reference, *SCALES),
        exact=_step(kernels.ddim_step_reference, *SCALES),
        work=_planes(6, 3, 3),
        tunable=_ddim_tunable,
        candidates=_ELEMENTWISE,
    ),
    "joint_ddim_step": Op(
        shapes=lambda h, w: [(1, 3, h, w)] * 2 + [(1, 1, h, w)] * 3,
        ours=_step(kernels.joint_ddim_step, *SCALES, 0.3),
        eager=_step(kernels.joint_ddim_step_reference, *SCALES, 0.3),
        exact=_step(kernels.joint_ddim_step_reference, *SCALES, 0.3),
        work=_planes(9, 3, 1),
        tunable=lambda *t, **options: launch_joint(*t, (*SCALES, 0.3), "code", **options),
        candidates=_ELEMENTWISE,
    ),
    "compose_priors": Op(
        shapes=lambda h, w: [(1, 3, h, w)] * 3 + [(1, 1, h, w)],
        ours=_step(kernels.compose_priors, *SCALES),
        eager=_step(kernels.compose_priors_reference, *SCALES),
        exact=_step(kernels.compose_priors_reference, *SCALES),
        work=_planes(10, 3, 1),
        tunable=lambda *t, **options: launch_compose(
            *t, compose_coefficients(*SCALES, "code"), **options
        ),
        candidates=_ELEMENTWISE,
    ),
}  # fmt: skip


# --- timing ---------------------------------------------------------------------------------------


def draw(op: Op, size: tuple[int, int], dtype: torch.dtype, device: str, sets: int) -> list[Inputs]:
    """Normal numbers, on the device, so many sets of them."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        tuple(
            torch.randn(shape, generator=generator, device=device).to(dtype)
            for shape in op.shapes(*size)
        )
        for _ in range(sets)
    ]


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


def prepare(run: Run, sets: Sequence[Inputs], device: str) -> Ready:
    """Warm up, then capture all calls into one CUDA graph."""

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
    with torch.cuda.graph(graph):
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


def roofs(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Measured copy bandwidth, bytes per second (read and written), and matrix rate, operations."""
    if device != "cuda":
        return math.nan, math.nan
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    a = torch.randn(8192, 8192, device=device).to(dtype)
    target, product = torch.empty_like(source), torch.empty_like(a)
    ready = {
        "copy": prepare(lambda x: target.copy_(x), [(source,)], device),
        "matrix": prepare(lambda x: torch.mm(x, x, out=product), [(a,)], device),
    }
    times = measure(ready, rounds=20, device=device)
    return 2e3 * source.numel() / times["copy"].p50, 2e3 * 8192**3 / times["matrix"].p50


# --- the benchmark --------------------------------------------------------------------------------


def contenders(op: Op, *, compiled: bool) -> dict[str, Run]:
    """Name -> function; "eager" first, as it sets the tolerance."""
    found: dict[str, Run] = {"eager": op.eager, "fuseengine": op.ours}
    if compiled:
        found["torch.compile"] = torch.compile(op.eager, dynamic=False)
    return {**found, **op.peers}


def bench(
    result: Result,
    name: str,
    size: tuple[int, int],
    dtype: torch.dtype,
    args: argparse.Namespace,
    limits: tuple[float, float],
) -> None:
    """Rows of one op in one dtype and size."""
    op = OPS[name]
    work = op.work(*size, dtype.itemsize)
    sets = draw(op, size, dtype, args.device, input_sets(work.nbytes, args.device))
    exact = op.exact(*(t.double() for t in sets[0]))
    scale = max(1.0, float(exact.abs().max()))
    label = f"{name} {size[0]}x{size[1]} {str(dtype).removeprefix('torch.')}"
    fields: dict[str, dict[str, Any]] = {}
    ready: dict[str, Ready] = {}
    allowed = math.inf
    for contender, run in contenders(op, compiled=not args.no_compile).items():
        try:
            with torch.inference_mode():
                error = float((run(*sets[0]).double() - exact).abs().max())
                if contender == "eager":
                    allowed = 2 * error + 8 * torch.finfo(dtype).eps * scale
                if not error <= allowed:
                    raise ValueError(f"wrong: error {error:.2g}, allowed {allowed:.2g}")
                ready[contender] = prepare(run, sets, args.device)
            fields[contender] = {"max_abs_error": error}
        except Exception as error:
            # Out of memory, or a peer that does not know the dtype: the others still count.
            result.add(f"{label}, {contender}", error=reason(error))
    del exact
    if not ready:
        return
    times = measure(ready, rounds=args.rounds, device=args.device)
    bandwidth, rate = limits
    least_s = max(work.nbytes / bandwidth, work.operations / rate)
    for contender, samples in times.items():
        row = fields[contender]
        row["gb_per_s"] = samples.gb_per_s(work.nbytes)
        if work.operations:
            row["tflops"] = work.operations / samples.p50 / 1e9
        if math.isfinite(least_s):
            row["of_roof"] = 1e3 * least_s / samples.p50
        if "fuseengine" in times and contender != "fuseengine":
            row["times_slower"] = paired_ratio(samples, times["fuseengine"]).median
        result.add(f"{label}, {contender}", samples, **row)
    if "fuseengine" in times:
        lost = [c for c, s in times.items() if s.p50 < times["fuseengine"].p50]
        result.notes += [f"{label}: {c} is faster than fuseengine" for c in lost]


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
        expected = op.exact(*(t.double() for t in sets[0]))
        default = data["ops"][name]["defaults"][kind]
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        best: tuple[float, dict[str, Any]] = (math.inf, default)
        base = math.inf
        for settings in [default, *op.candidates]:
            whole = {**default, **settings}

            def run(*inputs: Tensor, op: Op = op, whole: dict[str, Any] = whole) -> Tensor:
                return op.tunable(*inputs, capability=capability, settings=whole)

            try:
                if (run(*sets[0]).double() - expected).abs().max() > tolerance:
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

ORIN = {"bytes": 204.8e9, "float16": 42.6e12, "exponentials": 16 * 16 * 1.30e9}
"""AGX Orin 64 GB, MAXN: DRAM, dense FP16 tensor rate, 16 special functions per SM and clock."""


def orin_estimate(size: tuple[int, int]) -> str:
    """Roofline of AGX Orin in float16: the least time of each op. Nothing here was run."""
    rows = []
    for name, op in OPS.items():
        work = op.work(*size, 2)
        # The tensor cores multiply Cq padded to 16.
        padded = work.operations * (16 + CHANNELS) / (QUERIES + CHANNELS)
        parts = {
            "memory": work.nbytes / ORIN["bytes"],
            "tensor cores": padded / ORIN["float16"],
            "exponentials": work.exponentials / ORIN["exponentials"],
        }
        bound = max(parts, key=lambda part: parts[part])
        rows.append({"op": name, "least_ms": 1e3 * parts[bound], "bound_by": bound})
    head = f"ESTIMATE for AGX Orin 64 GB (MAXN), float16, {size[0]}x{size[1]}; nothing was run"
    return f"{head}\n{format_table(rows)}"


# --- command line ---------------------------------------------------------------------------------


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def _command(words: Sequence[str]) -> str:
    """What repeats the run; where its results went is left out."""
    pairs = zip(["", *words], words, strict=False)
    kept = [w for before, w in pairs if before != "--out" and not w.startswith("--out")]
    return " ".join(["python -m benchmarks.gpu_ops", *kept])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 2 when it cannot be run."""
    names = {str(t).removeprefix("torch."): t for t in DTYPES}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_ops", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--dtype", nargs="+", default=["float16", "float32"], choices=list(names))
    parser.add_argument("--size", nargs="+", type=_size, default=[(480, 640), (1080, 1920)])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--tune", action="store_true", help="write the tuning table instead")
    parser.add_argument("--table", type=Path, default=_tuning.PATH, help="the table to write")
    parser.add_argument("--orin", action="store_true", help="print the estimate and stop")
    parser.add_argument("--out", type=Path, help="folder of results instead of benchmarks/results")
    args = parser.parse_args(argv)
    if args.orin:
        print("\n\n".join(orin_estimate(size) for size in args.size))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: no CUDA device; --device cpu for a look, --orin\n")
    dtypes = [names[name] for name in args.dtype]
    if args.device == "cuda" and not usable(torch.empty(1, device="cuda")):
        parser.exit(2, f"{parser.prog}: the kernels need Triton and capability 8.0 or newer\n")
    # Float32 is float32: no TF32 in the peers.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    try:
        if args.tune:
            for size in args.size:
                print(tune(args.op, size, dtypes, args.table))
            return 0
        words = sys.argv[1:] if argv is None else list(argv)
        settings = {"rounds": args.rounds, "queries": QUERIES, "channels": CHANNELS}
        result = Result("gpu-ops", args.device, "GPU ops against their peers", settings)
        result.command = _command(words)
        for dtype in dtypes:
            limits = roofs(dtype, args.device)
            if math.isfinite(limits[0]):
                kind = str(dtype).removeprefix("torch.")
                result.settings[f"copy_gb_per_s_{kind}"] = round(limits[0] / 1e9)
                result.settings[f"matrix_tflops_{kind}"] = round(limits[1] / 1e12, 1)
            for name, size in itertools.product(args.op, args.size):
                bench(result, name, size, dtype, args, limits)
    except FuseEngineError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(result.table())
    for note in result.notes:
        print(f"* {note}")
    result.write(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
