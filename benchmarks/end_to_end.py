"""A model end to end: FuseEngine against PyTorch, torch.compile, ONNX Runtime and OpenVINO.

Peers run ``model(a, b)`` on prepared float tensors. FuseEngine is shown twice: its program on the
same prepared floats, and the whole call from uint8 frames to a uint8 frame. Every contender is
first compared with the float32 eager model on the packaged demo pair; one that is wrong gets no
time. Contenders are timed in turns in one process; peak memory is measured in a process each.

    python -m benchmarks.end_to_end drfusion-s --size 480x640
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import peers
from benchmarks.harness import (
    PauseBefore,
    Ratio,
    Result,
    Samples,
    command_line,
    interleave,
    max_abs_error,
    paired_ratio,
    peak_memory,
    psnr,
    slug,
)
from benchmarks.peers import Case, Contender, Engines, Ready
from fuseengine.errors import BackendUnavailableError, FuseEngineError, UnknownNameError
from fuseengine.runtime.frames import FrameAdapter

if TYPE_CHECKING:
    from torch import nn


class Checked:
    """A prepared contender with its verdict.

    Attributes:
        contender: which.
        ready: its calls; None when it could not be prepared.
        fields: columns of its row.
        error: why it gets no time; "" when it does.
    """

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.ready: Ready | None = None
        self.fields: dict[str, Any] = {"precision": contender.precision}
        self.error = ""


def check(
    contender: Contender,
    reference: NDArray[np.float32],
    frame: NDArray[np.uint8],
    *,
    limit_s: float | None = None,
) -> Checked:
    """Prepare a contender and compare what it makes with the reference.

    Args:
        contender: which.
        reference: float32 eager's fused image, (1, 1, H, W).
        frame: the uint8 frame that follows from it.
        limit_s: give up preparing after this many seconds.

    Returns:
        The contender; its ``error`` says what kept it from being ready or right.
    """
    checked = Checked(contender)
    begin = time.perf_counter()
    try:
        with _deadline(limit_s), _device_memory(checked.fields):
            ready = contender.prepare()
            ready.run()
            result = ready.result()
    except Exception as error:
        # A peer's library may raise anything; the others are still measured.
        checked.error = peers.reason(error)
        return checked
    seconds = time.perf_counter() - begin if ready.seconds is None else ready.seconds
    expected: NDArray[Any] = frame if contender.frames else reference
    scale = 255.0 if contender.frames else 1.0
    decibels = psnr(result, expected, scale)
    checked.fields |= {
        "psnr_db": decibels if np.isfinite(decibels) or decibels > 0 else None,
        "max_abs_error": max_abs_error(result, expected) / scale,
        "compile_s": seconds,
        "how": ready.how,
    }
    if not np.isfinite(checked.fields["max_abs_error"]):
        checked.fields["max_abs_error"] = None
    if not decibels >= contender.least_db:
        checked.error = (
            f"wrong: {decibels:.1f} dB against float32 eager, expected {contender.least_db:.0f}"
        )
        return checked
    checked.ready = ready
    return checked


def prepare(
    contenders: Sequence[Contender],
    reference: NDArray[np.float32],
    frame: NDArray[np.uint8],
    budget_s: float | None,
) -> list[Checked]:
    """Check every contender within a time for all of them.

    What takes minutes to compile comes last, so that it cannot take the others' time; the rows
    keep the contenders' order.
    """
    begin, rows = time.monotonic(), {}
    for contender in sorted(contenders, key=lambda c: c.key.startswith("compile")):
        left = None if budget_s is None else budget_s - (time.monotonic() - begin)
        if left is not None and left <= 0:
            row = Checked(contender)
            row.error = f"skipped: the {budget_s:.0f} s for preparing are spent"
        else:
            row = check(contender, reference, frame, limit_s=left)
        rows[contender.key] = row
        _say(f"{contender.name}: {row.error or 'ready'}")
    return [rows[contender.key] for contender in contenders]


def measure(
    checked: Sequence[Checked], *, rounds: int, budget_s: float | None, device: str
) -> dict[str, Samples]:
    """Time the ready contenders in turns; short name -> samples."""
    calls = {c.contender.key: c.ready.run for c in checked if c.ready is not None}
    if not calls:
        return {}
    if device == "cuda":
        import torch

        return interleave(
            calls, rounds=rounds, budget_s=budget_s, synchronize=torch.cuda.synchronize
        )
    return interleave(calls, rounds=rounds, warmup=2, budget_s=budget_s, synchronize=PauseBefore())


def device_times(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds between CUDA events around each call, in turns, one wait at the end."""
    import torch

    pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: float(np.median([start.elapsed_time(end) for start, end in events]))
        for name, events in pairs.items()
    }


def reading(rows: Sequence[Checked], samples: Mapping[str, Samples]) -> list[str]:
    """What the times say about FuseEngine, losses first said as losses."""
    notes = []
    for row in rows:
        own = samples.get(row.contender.key)
        if not row.contender.ours or row.contender.frames or own is None:
            continue
        # A float32 row owes nothing to peers that round; a reduced one answers to all.
        against = [("fp32 peer", "fp32"), ("peer of any precision", None)]
        for label, precision in against[: 1 if row.contender.precision == "fp32" else 2]:
            best = best_peer(rows, samples, precision)
            if best is not None:
                ratio = paired_ratio(own, samples[best.key])
                notes.append(
                    f"{row.contender.name} against the best {label}, {best.name}: "
                    f"{ratio.verdict}, {ratio} of its time"
                )
    return notes


def best_peer(
    rows: Sequence[Checked], samples: Mapping[str, Samples], precision: str | None = "fp32"
) -> Contender | None:
    """The fastest peer that was right, of one precision or of all."""
    timed = [
        row.contender
        for row in rows
        if not row.contender.ours
        and row.contender.key in samples
        and precision in (None, row.contender.precision)
    ]
    return min(timed, key=lambda peer: samples[peer.key].p50, default=None)


def run(args: argparse.Namespace) -> Result:
    """Do what the command line says; see :func:`parser`."""
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise BackendUnavailableError(
                "--device cuda: PyTorch sees no CUDA device here; use --device cpu"
            )
    threads = args.threads or _cores()
    case = Case(args.model, args.size, args.device, threads, args.untrained)
    with tempfile.TemporaryDirectory() as place, _environment(FUSEENGINE_CACHE=f"{place}/cache"):
        return _run(args, case, Path(place))


def _run(args: argparse.Namespace, case: Case, folder: Path) -> Result:
    import torch

    torch.set_num_threads(case.threads)
    model = case.load()
    adapter = FrameAdapter(case.size, getattr(model, "channels", "luma"), model.multiple)
    ir, vis = peers.demo_frames(case.size)
    a, b = np.empty((2, 1, adapter.planes, *adapter.padded), dtype=np.float32)
    adapter.load(ir, vis, a, b)
    np.savez(folder / "inputs.npz", a=a, b=b, ir=ir, vis=vis)
    reference = _reference(model, a, b, case)
    frame = adapter.store(reference, vis)

    contenders = peers.make_peers(
        case, model, a, b, folder, keys=args.peers, compile_mode=args.compile_mode
    )
    engines = Engines(case, model, a, b, (ir, vis), args.effort)
    for precision in args.precision_rows:
        contenders += engines.contenders(precision)
    if not contenders:
        raise SystemExit("nothing to measure: --peers none and --precision-rows none")

    rows = prepare(contenders, reference, frame, args.prepare_s)
    samples = measure(rows, rounds=args.rounds, budget_s=args.budget_s, device=case.device)
    if case.device == "cuda":
        calls = {r.contender.key: r.ready.run for r in rows if r.ready and not r.contender.frames}
        for key, value in device_times(calls, args.rounds).items():
            next(r for r in rows if r.contender.key == key).fields["device_ms"] = value
    elif args.memory:
        _measure_memory(rows, case, folder, args.effort)
    return _result(args, case, model, rows, samples)


def _result(
    args: argparse.Namespace,
    case: Case,
    model: nn.Module,
    rows: Sequence[Checked],
    samples: Mapping[str, Samples],
) -> Result:
    height, width = case.size
    result = Result(
        suite=slug(f"end-to-end {case.model} {height}x{width}"),
        device=case.device,
        title=f"{case.model} at {width}x{height} on {case.device}, end to end",
        settings={
            "model": case.model,
            "weights": "untrained, seed 0" if case.untrained else "packaged",
            "parameters": sum(p.numel() for p in model.parameters()),
            "size": f"{height}x{width}",
            "threads": case.threads,
            "rounds": max((s.n for s in samples.values()), default=0),
            "effort": args.effort,
            "compile_mode": args.compile_mode,
        },
        command=args.command,
    )
    best = best_peer(rows, samples)
    for row in rows:
        own = samples.get(row.contender.key)
        fields = {key: value for key, value in row.fields.items() if value not in (None, "")}
        if own is not None:
            fields["ratio"] = _ratio(own, samples, best.key if best else None)
            fields["ratio_to_eager"] = _ratio(own, samples, "eager")
        if row.error:
            fields["error"] = row.error
        result.add(row.contender.name, own, **fields)
    result.notes += reading(rows, samples)
    result.notes += [
        "ratio: time over the best fp32 peer's"
        + (f", {best.name}" if best else "")
        + "; ratio to eager: time over torch eager fp32's. Medians of the rounds' own ratios with "
        "the 95% interval.",
        "Peers run the whole model on prepared floats. FuseEngine's plain rows do the same; its "
        "'frames' rows also convert uint8 frames and keep the colour.",
        "PSNR and max error against float32 eager on the packaged demo pair, scale [0, 1].",
    ]
    if case.device == "cuda":
        result.notes.append(
            "p50, p90, p99: host clock around call and synchronisation; device ms: between CUDA "
            "events, calls queued; gpu peak MB: device memory that preparing and running added."
        )
    elif any("peak_mb" in row.fields for row in rows):
        result.notes.append(
            "peak MB: high-water mark of a process that only runs this contender: runtimes from "
            "the exported ONNX file and FuseEngine from its warm cache, without PyTorch unless "
            "they need it; torch.compile's holds its compilation."
        )
    if any(row.contender.key in peers.RUNTIME_PEERS for row in rows):
        result.notes.append(
            "compile s: the export to ONNX is in the number of the first runtime that needed it."
        )
    if case.untrained:
        result.notes.append("The weights are random: times hold, pictures mean nothing.")
    return result


def _ratio(own: Samples, samples: Mapping[str, Samples], other: str | None) -> str | None:
    if other is None or other not in samples:
        return None
    if samples[other] is own:
        return "1"
    ratio: Ratio = paired_ratio(own, samples[other])
    return str(ratio)


def _reference(
    model: nn.Module, a: NDArray[np.float32], b: NDArray[np.float32], case: Case
) -> NDArray[np.float32]:
    import torch

    given = [torch.from_numpy(x).to(case.device) for x in (a, b)]
    with torch.inference_mode(), peers.rounding(tf32=False):
        return model(*given).float().cpu().numpy()


def _measure_memory(rows: Sequence[Checked], case: Case, folder: Path, effort: str) -> None:
    for row in rows:
        if row.ready is None:
            continue
        key = row.contender.key
        try:
            peak = peak_memory(
                "benchmarks.peers:memory_of", key, case.to_json(), str(folder), effort
            )
        except RuntimeError as error:
            _say(f"memory of {row.contender.name}: {peers.reason(error)}")
            continue
        row.fields["peak_mb"] = peak / 1e6
        _say(f"memory of {row.contender.name}: {peak / 1e6:.0f} MB")


@contextlib.contextmanager
def _device_memory(fields: dict[str, Any]) -> Iterator[None]:
    """Note how much device memory the body took at its peak, on top of what was there."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    torch.cuda.synchronize()
    fields["gpu_peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6


@contextlib.contextmanager
def _deadline(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError in the body after some seconds, where the platform has timers."""
    if seconds is None or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "480x640"."""
    words = text.lower().split("x")
    if len(words) != 2 or not all(word.isdecimal() and int(word) >= 2 for word in words):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected HEIGHTxWIDTH such as 480x640, each at least 2"
        )
    return int(words[0]), int(words[1])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("model", help="configuration, such as drfusion-s")
    made.add_argument("--size", type=parse_size, default=(480, 640), metavar="HxW")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--threads", type=int, metavar="N", help="CPU threads of every contender")
    made.add_argument(
        "--untrained", action="store_true", help="random weights; for models without packaged ones"
    )
    made.add_argument("--rounds", type=int, default=50, metavar="N", help="samples per contender")
    made.add_argument(
        "--budget-s", type=float, metavar="S", help="stop timing after this long, rounds or not"
    )
    made.add_argument(
        "--prepare-s", type=float, metavar="S", help="time for preparing all contenders"
    )
    made.add_argument(
        "--peers",
        default="all",
        metavar="KEYS",
        help="all, none, or some of: "
        + ", ".join([*peers.peer_keys("cuda"), *peers.RUNTIME_PEERS]),
    )
    made.add_argument(
        "--precision-rows",
        default="fp32,auto",
        metavar="LIST",
        help="FuseEngine's precisions, or none (default: fp32,auto)",
    )
    made.add_argument("--effort", choices=("quick", "full"), default="quick", help="of our search")
    made.add_argument(
        "--compile-mode",
        help="mode of torch.compile (default: 'default' on a CPU, 'max-autotune' on cuda)",
    )
    made.add_argument(
        "--no-memory", dest="memory", action="store_false", help="skip the peak memory column"
    )
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the result files (benchmarks/results)"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 unless it could not be run."""
    words = list(sys.argv[1:] if argv is None else argv)
    made = parser()
    args = made.parse_args(words)
    known = peers.peer_keys(args.device)
    if args.peers == "all":
        args.peers = known
    else:
        args.peers = [] if args.peers == "none" else args.peers.split(",")
        unknown = sorted(set(args.peers) - set(known))
        if unknown:
            made.error(f"--peers: {', '.join(unknown)} on {args.device}; expected {known}")
    rows = args.precision_rows
    args.precision_rows = [] if rows == "none" else rows.split(",")
    if args.compile_mode is None:
        args.compile_mode = "max-autotune" if args.device == "cuda" else "default"
    args.command = command_line("benchmarks.end_to_end", words)
    warnings.filterwarnings("ignore", module="torch")
    try:
        result = run(args)
    except UnknownNameError as error:
        made.exit(2, f"{made.prog}: {error}; --untrained measures one with random weights\n")
    except FuseEngineError as error:
        made.exit(2, f"{made.prog}: {error}\n")
    print(result.table())
    for note in result.notes:
        print(f"* {note}")
    for path in result.write(args.out):
        _say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
