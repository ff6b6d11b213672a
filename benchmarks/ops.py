"""Native CPU kernels against the PyTorch formulation of the same equation, in turns.

    python -m benchmarks.ops --threads 2        # every op, its peers, its targets, extra memory
    python -m benchmarks.ops --only ddim_step --rounds 500
    python -m benchmarks.ops --overhead         # what a call costs by way of registration

Each row is one peer: the native kernel on NumPy arrays, writing into an array that is there, as an
engine calls it; the same op as a PyTorch function, which allocates its result as the peer does; the
peer; their times' ratio; and, where the project has set itself one, the target with PASS or MISS.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import harness
from fuseengine import _native

if TYPE_CHECKING:
    from torch import Tensor

SIZES = ((240, 320), (480, 640))
"""Height and width: the attention is measured at both, the other ops at the second."""
QUERIES, CHANNELS, GROUPS, EPS = 4, 32, 8, 1e-5
SCALES = (0.8, 0.6, 0.95, 0.31)
LAM = 0.4
TARGETS = {
    ("criss_cross_attention", "CCNet"): 10.0,
    ("wiener_filter", "torch.fft"): 1.5,
    ("group_norm_silu", "eager"): 2.0,
    ("group_norm_silu", "torch.compile"): 1.0,
    ("ddim_step", "eager"): 2.0,
    ("joint_ddim_step", "eager"): 3.0,
}
"""How many times a peer's time the kernel's must be, on two cores in float32."""
_SETTLE_S = 0.03
"""Contenders quicker than this are timed in their stride, see :func:`harness.interleave`."""
MEMORY_TARGET = 2.0
"""Extra memory of the attention, in sizes of its output, stays below this."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: the op's name.
        size: as the row says it.
        rounds: samples of each contender.
        tolerance: largest difference from a peer.
        native: calls the kernel and gives the array it wrote.
        function: the op as a PyTorch function.
        peers: name -> formulation in PyTorch, without arguments.
    """

    op: str
    size: str
    rounds: int
    tolerance: float
    native: Callable[[], np.ndarray]
    function: Callable[[], Tensor]
    peers: Mapping[str, Callable[[], Tensor]]

    @property
    def name(self) -> str:
        """Op and size."""
        return f"{self.op} {self.size}"


# --- the peers' formulations ----------------------------------------------------------------------


def ccnet(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Both attention maps in memory, as CCNet's code does it."""
    import torch

    n, _, h, w = q.shape
    by_column = [t.permute(0, 3, 1, 2).reshape(n * w, -1, h) for t in (q, k, v)]
    by_row = [t.permute(0, 2, 1, 3).reshape(n * h, -1, w) for t in (q, k, v)]
    itself = torch.diag(torch.full((h,), -torch.inf))
    column = torch.bmm(by_column[0].transpose(1, 2), by_column[1]) + itself
    row = torch.bmm(by_row[0].transpose(1, 2), by_row[1])
    scores = torch.cat([column.view(n, w, h, h).transpose(1, 2), row.view(n, h, w, w)], 3)
    p = torch.softmax(scores, 3)
    p_column = p[..., :h].transpose(1, 2).reshape(n * w, h, h)
    p_row = p[..., h:].reshape(n * h, w, w)
    down = torch.bmm(by_column[2], p_column.transpose(1, 2)).view(n, w, -1, h)
    across = torch.bmm(by_row[2], p_row.transpose(1, 2)).view(n, h, -1, w)
    return down.permute(0, 2, 3, 1) + across.permute(0, 2, 1, 3)


def torch_filter(x: Tensor, spectrum: Tensor) -> Tensor:
    """The spectrum is ready; two real transforms and a product."""
    import torch

    return torch.fft.irfft2(torch.fft.rfft2(x) * spectrum, s=x.shape[-2:])


def torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Two calls, as a U-Net block has them."""
    import torch.nn.functional as F

    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


# --- cases ----------------------------------------------------------------------------------------


def attention_arrays(height: int, width: int) -> list[np.ndarray]:
    """q, k, v and an output whose pages are there."""
    rng = np.random.default_rng(0)
    shapes = [(1, channels, height, width) for channels in (QUERIES, QUERIES, CHANNELS)]
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    return [*arrays, np.full(shapes[2], np.nan, np.float32)]


def cases(sizes: Sequence[tuple[int, int]], *, compiled: bool) -> Iterator[Case]:
    """Every op; the attention at all sizes, the others at the last.

    Args:
        sizes: height and width.
        compiled: whether ``torch.compile`` is among the peers.
    """
    for height, width in sizes:
        yield _attention(height, width)
    size = sizes[-1]
    yield _filter(*size)
    yield _norm(*size, compiled=compiled)
    yield from _steps(*size, compiled=compiled)


def _attention(height: int, width: int) -> Case:
    import torch

    from fuseengine import kernels

    *arrays, out = attention_arrays(height, width)
    tensors = [torch.from_numpy(a) for a in arrays]
    return Case(
        op="criss_cross_attention",
        size=f"{height}x{width}",
        rounds=25,
        tolerance=1e-4,
        native=_into(out, partial(_native.criss_cross_attention, *arrays, out)),
        function=partial(kernels.criss_cross_attention, *tensors),
        peers={"CCNet": partial(ccnet, *tensors)},
    )


def _filter(height: int, width: int) -> Case:
    import torch

    from fuseengine import kernels

    x = torch.randn(2, height, width)
    spectrum = torch.fft.rfft2(torch.randn(height, width) / (height * width) ** 0.5)
    out = np.empty(x.shape, np.float32)
    return Case(
        op="wiener_filter",
        size=f"2x{height}x{width}",
        rounds=100,
        tolerance=1e-4,
        native=_into(out, partial(_native.wiener_filter, x.numpy(), spectrum.numpy(), out)),
        function=partial(kernels.wiener_filter, x, spectrum),
        peers={"torch.fft": partial(torch_filter, x, spectrum)},
    )


def _norm(height: int, width: int, *, compiled: bool) -> Case:
    import torch

    from fuseengine import kernels

    tensors = (torch.randn(1, CHANNELS, height, width), *torch.randn(2, CHANNELS))
    arrays, out = [t.numpy() for t in tensors], np.empty(tensors[0].shape, np.float32)
    options = {"groups": GROUPS, "eps": EPS}
    return Case(
        op="group_norm_silu",
        size=f"{CHANNELS}x{height}x{width}",
        rounds=60,
        tolerance=1e-5,
        native=_into(out, partial(_native.group_norm_silu, *arrays, None, out, **options)),
        function=partial(kernels.group_norm_silu, *tensors, **options),
        peers=_peers(torch_norm, tensors, compiled=compiled),
    )


def _steps(height: int, width: int, *, compiled: bool) -> Iterator[Case]:
    import torch

    x, eps, other = torch.randn(3, 1, 3, height, width)
    mask, y1, y2 = torch.rand(3, 1, 1, height, width)
    a, b, c, d = SCALES
    base = {"sqrt_abar": a, "sqrt_one_minus_abar": b, "sqrt_abar_prev": c}
    make = partial(_step, f"3x{height}x{width}", compiled=compiled)
    yield make("ddim_step", (x, eps), SCALES, {"noise": None, **base, "direction": d})
    yield make("compose_priors", (x, eps, other, mask), SCALES, base)
    joint = {**base, "sqrt_one_minus_abar_prev": d, "lam": LAM, "form": 0}
    yield make("joint_ddim_step", (x, eps, mask, y1, y2), (*SCALES, LAM), joint)


def _step(
    size: str,
    op: str,
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    options: Mapping[str, Any],
    *,
    compiled: bool,
) -> Case:
    """A step of the sampler; ``options`` are the native kernel's, the peer is the reference."""
    from fuseengine import kernels

    reference = getattr(kernels, f"{op}_reference")
    out = np.empty(tensors[0].shape, np.float32)
    arrays = [t.numpy() for t in tensors]
    return Case(
        op=op,
        size=size,
        rounds=200,
        tolerance=1e-5,
        native=_into(out, partial(getattr(_native, op), *arrays, out=out, **options)),
        function=partial(getattr(kernels, op), *tensors, *numbers),
        peers=_peers(lambda *given: reference(*given, *numbers), tensors, compiled=compiled),
    )


def _into(out: np.ndarray, call: Callable[[], None]) -> Callable[[], np.ndarray]:
    def run() -> np.ndarray:
        call()
        return out

    return run


def _peers(
    formula: Callable[..., Tensor], tensors: Sequence[Tensor], *, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    import torch

    found = {"eager": partial(formula, *tensors)}
    if compiled:
        found["torch.compile"] = partial(torch.compile(formula, dynamic=False), *tensors)
    return found


def measure(
    result: harness.Result, case: Case, rounds: int | None = None, budget_s: float | None = None
) -> None:
    """Rows of one case: first right, then in turns.

    Args:
        result: gets a row per peer.
        case: what.
        rounds: instead of the case's own number.
        budget_s: no further round after this many seconds.

    Raises:
        SystemExit: a contender is wrong.
    """
    expected = case.native()
    errors = {}
    for name, peer in {"as a PyTorch function": case.function, **case.peers}.items():
        errors[name] = harness.max_abs_error(expected, peer().numpy())
        if not errors[name] <= case.tolerance:
            raise SystemExit(
                f"{case.name}: differs from {name} by {errors[name]:.2g}, "
                f"expected at most {case.tolerance:.2g}"
            )
    times = harness.interleave(
        {"ours": case.native, "op": case.function, **case.peers},
        rounds=rounds or case.rounds,
        warmup=2,
        budget_s=budget_s,
        synchronize=harness.PauseBefore(),
        settle_s=_SETTLE_S,
    )
    for peer in case.peers:
        ratio = harness.paired_ratio(times[peer], times["ours"])
        target = TARGETS.get((case.op, peer))
        result.add(
            f"{case.name} vs {peer}",
            times["ours"],
            max_abs_error=errors[peer],
            ratio=str(ratio),
            target=f">= {target:g}" if target else None,
            outcome=outcome(ratio.median, target),
            verdict=_verdicts(ours=times["ours"], peer=times[peer]),
            **{"peer p50 ms": times[peer].p50, "as PyTorch op p50 ms": times["op"].p50},
        )


def outcome(ratio: float, target: float | None) -> str | None:
    """PASS or MISS; None without a target."""
    return None if target is None else "PASS" if ratio >= target else "MISS"


def _verdicts(**contenders: harness.Samples) -> str:
    bad = {name: s.verdict for name, s in contenders.items() if s.verdict != "ok"}
    return "; ".join(f"{name} {verdict}" for name, verdict in bad.items()) or "ok"


# --- extra memory ---------------------------------------------------------------------------------


def extra_memory(contender: str, height: int, width: int, threads: int) -> int:
    """By how much one attention raises this process's peak of resident memory.

    Meant for a fresh process (see :func:`measure_memory`). Inputs, the output and, after a call at
    a small size, code and threads are there before; the peak is reset by the kernel (Linux).

    Args:
        contender: "ours", the native kernel, or "peer", CCNet's formulation.
        height: of the pictures.
        width: of the pictures.
        threads: of the contender.

    Returns:
        bytes; for the peer without its output, which it allocates.
    """

    def make(height: int, width: int) -> Callable[[], Any]:
        *given, out = attention_arrays(height, width)
        if contender == "ours":
            return partial(_native.criss_cross_attention, *given, out)
        import torch

        torch.set_num_threads(threads)
        return partial(ccnet, *(torch.from_numpy(a) for a in given))

    _native.set_num_threads(threads)
    make(16, 16)()
    call = make(height, width)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def resident(field: str) -> int:
        return 1024 * int(re.findall(rf"{field}:\s+(\d+)", status.read_text())[0])

    reset.write_text("5")
    before = resident("VmRSS")
    result = call()
    extra = resident("VmHWM") - before
    return extra if result is None else extra - result.numpy().nbytes


def measure_memory(result: harness.Result, size: tuple[int, int], threads: int) -> None:
    """Rows of extra memory, each contender in a process of its own."""
    out_bytes = 4 * CHANNELS * math.prod(size)
    for contender, name in (("ours", "native"), ("peer", "CCNet")):
        label = f"criss_cross_attention {size[0]}x{size[1]} extra memory, {name}"
        call = f"extra_memory({contender!r}, {size[0]}, {size[1]}, {threads})"
        done = subprocess.run(
            [sys.executable, "-c", f"from benchmarks.ops import *; print({call})"],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            result.add(label, error=f"not measured: {lines[-1]}")
            continue
        extra = int(done.stdout)
        ours = contender == "ours"
        result.add(
            label,
            target=f"< {MEMORY_TARGET:g}x output" if ours else None,
            outcome=("PASS" if extra < MEMORY_TARGET * out_bytes else "MISS") if ours else None,
            **{"extra MB": extra / 1e6, "of output": extra / out_bytes},
        )


# --- registration ---------------------------------------------------------------------------------


def overhead_contenders() -> dict[str, Callable[[], Any]]:
    """One DDIM step of 12 numbers, by way of each kind of registration."""
    import torch
    from torch import library as torch_library

    from fuseengine.kernels import ddim_step

    direct = sys.modules["fuseengine.kernels.ddim_step"]._cpu

    def step(x: Tensor, eps: Tensor, a: float, b: float, c: float, d: float) -> Tensor:
        return direct(x, eps, a, b, c, d)

    schema = "(Tensor x, Tensor eps, float a, float b, float c, float d) -> Tensor"
    custom = torch_library.custom_op(
        "benchmarks_ops::ddim_step", step, mutates_args=(), schema=schema
    )
    x, eps = torch.randn(2, 1, 3, 2, 2)
    out, (a, b, c, d) = np.empty(x.shape, np.float32), SCALES
    base = {"sqrt_abar": a, "sqrt_one_minus_abar": b, "sqrt_abar_prev": c, "direction": d}
    return {
        "native kernel on arrays": partial(
            _native.ddim_step, x.numpy(), eps.numpy(), None, out, **base
        ),
        "Python function": partial(direct, x, eps, *SCALES),
        "Library.define and impl": partial(torch.ops.fuse.ddim_step, x, eps, *SCALES),
        "PyTorch's custom_op": partial(custom, x, eps, *SCALES),
        "public function": partial(ddim_step, x, eps, *SCALES),
    }


def measure_overhead(result: harness.Result, rounds: int, calls: int = 500) -> None:
    """Microseconds a call, and over the plain Python function that does the work."""
    import torch

    def repeated(call: Callable[[], Any], *, inference: bool) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode(inference):
                for _ in range(calls):
                    call()

        return run

    for inference, mode in ((False, "gradients enabled"), (True, "inference mode")):
        contenders = {
            name: repeated(call, inference=inference)
            for name, call in overhead_contenders().items()
        }
        times = harness.interleave(contenders, rounds=rounds, warmup=3)
        single = {n: harness.Samples(n, s.ns // calls) for n, s in times.items()}
        base = single["Python function"].p50
        for name, samples in single.items():
            over = 1e3 * (samples.p50 - base)
            fields = {"us a call": 1e3 * samples.p50, "us over function": over}
            result.add(f"{name}, {mode}", samples, **fields)


# --- command line ---------------------------------------------------------------------------------


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--threads", type=int, default=2, help="of every contender (default: 2)")
    made.add_argument("--only", default="", help="part of an op's name")
    made.add_argument("--level", help="baseline, avx2 or avx512; default: the best there is")
    made.add_argument("--size", nargs="+", type=_size, default=list(SIZES), metavar="HxW")
    made.add_argument("--rounds", type=int, help="instead of each op's own number")
    made.add_argument(
        "--budget-s", type=float, default=120, help="for the rounds of one op (default: 120)"
    )
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    made.add_argument("--overhead", action="store_true", help="measure registration instead")
    made.add_argument("--out", type=Path, help="folder of results instead of benchmarks/results")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark: 0, also when a target is missed."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    _native.set_num_threads(args.threads)
    if args.level:
        _native.set_simd_level(args.level)
    level = _native.simd_level()
    threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
    settings = {"threads": args.threads, "level": level}
    if args.overhead:
        result = harness.Result("op-overhead", "cpu", "What a call of an op costs", settings)
        result.notes = ["A DDIM step of 12 numbers; p50 is of one call."]
        measure_overhead(result, args.rounds or 60)
    else:
        result = harness.Result(
            f"ops-{level}-{threads.replace(' ', '-')}",
            "cpu",
            f"Native ops against PyTorch, {level}, {threads}",
            settings,
        )
        result.notes = [
            "ratio: the peer's time over ours, median of the rounds' own ratios, 95% interval.",
            "Ours writes into an array that is there; as a PyTorch op it allocates its result, as "
            "the peers do.",
        ]
        if args.threads != 2:
            result.notes.append("The targets are meant for two threads.")
        with torch.inference_mode():
            for case in cases(args.size, compiled=not args.no_compile):
                if args.only in case.name:
                    measure(result, case, args.rounds, args.budget_s)
        if args.only in "criss_cross_attention":
            measure_memory(result, args.size[-1], args.threads)
        lost = [row["name"] for row in result.rows if row.get("outcome") == "MISS"]
        result.notes += [f"MISS: {name}" for name in lost]
    result.command = harness.command_line("benchmarks.ops", words)
    result.finish(args.out, write=not args.only)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
