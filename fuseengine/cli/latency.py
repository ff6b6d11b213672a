"""``fuseengine latency``: how late an engine's frames are when a camera sets the pace."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fuseengine.cli.common import RawHelp, frame_size, positive_float, positive_int
from fuseengine.errors import SettingError

if TYPE_CHECKING:
    from fuseengine.engine import Engine
    from fuseengine.latency import Latencies

_DESCRIPTION = """\
Measure latency as a camera sees it: frame k is due at k / rate, and its latency
counts from then, whether or not the engine was free. Frames that a newer one
overtakes are dropped and counted. Two and more engines are measured in turns,
block by block, and compared with an interval."""

_EPILOG = """\
examples:
  fuseengine latency drfusion.fuse --frames 2000 --rate 30
  fuseengine latency drfusion.fuse --rate 15 --deadline 80 --plot latency.svg
  fuseengine latency bf16.fuse fp32.fuse --rate 10 --frames 1000
  fuseengine latency drfusion-s --size 320x240 --rate 60     # compiled first"""


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "latency",
        help="measure how late frames are at a camera's rate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RawHelp,
    )
    parser.add_argument(
        "engines", nargs="+", metavar="ENGINE", help="a .fuse file, or a packaged model's name"
    )
    parser.add_argument(
        "--frames", type=positive_int, default=2000, metavar="N", help="frames due (default: 2000)"
    )
    parser.add_argument(
        "--rate", type=positive_float, default=30.0, metavar="FPS", help="per second (default: 30)"
    )
    parser.add_argument(
        "--deadline",
        type=positive_float,
        metavar="MS",
        help="latency above which a frame is a miss (default: the time between frames)",
    )
    parser.add_argument(
        "--size",
        type=frame_size,
        default=(480, 640),
        metavar="WxH",
        help="of engines that take any (default: 640x480)",
    )
    parser.add_argument("--queue", action="store_true", help="fuse every frame, however late")
    parser.add_argument(
        "--blocks", type=positive_int, default=10, metavar="N", help="turns of each (default: 10)"
    )
    parser.add_argument("--gc", action="store_true", help="let Python's collector run as it likes")
    parser.add_argument("--cpus", metavar="LIST", help="processors to run on, such as 2,3 or 4-7")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads per engine")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE.json", help="all that was measured"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="latency over percentile")
    parser.add_argument(
        "--histogram", type=Path, metavar="FILE.hgrm", help="HdrHistogram's percentile output"
    )
    parser.set_defaults(run=run, extra="video")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    from fuseengine.latency import Schedule, compare, joined, measure_in_turns, plot

    if len(set(args.engines)) != len(args.engines):
        raise SettingError(f"engines: got {args.engines}; expected each once")
    if args.cpus:
        _pin(args.cpus)
    schedule = Schedule(args.frames, args.rate, args.deadline, queue=args.queue, collect=args.gc)
    engines = {name: _engine(name, args) for name in args.engines}
    calls = {name: _caller(engine, args.size) for name, engine in engines.items()}
    blocks = args.blocks if len(calls) > 1 else 1
    runs = measure_in_turns(calls, schedule, blocks=blocks)
    whole = {name: joined(parts) for name, parts in runs.items()}
    for name, latencies in whole.items():
        _print(name, latencies)
    compared = compare(runs) if len(runs) > 1 else {}
    for name, found in compared.items():
        told = ", ".join(
            f"{key} {found.ratio[key]:.3f} [{low:.3f}, {high:.3f}]"
            for key, (low, high) in found.interval.items()
        )
        print(f"{name} over {args.engines[0]}: {told}")
    if args.plot:
        _write(args.plot, plot(whole))
    if args.histogram:
        _write(args.histogram, _percentiles(whole))
    if args.output:
        _write(args.output, json.dumps(_record(args, engines, whole, compared), indent=1) + "\n")
    return 0


def _engine(name: str, args: argparse.Namespace) -> Engine:
    import fuseengine as fe

    if name.endswith(".fuse") or Path(name).is_file():
        return fe.load(name, threads=args.threads)
    return fe.compile(name, size=args.size, threads=args.threads)


def _caller(engine: Engine, size: tuple[int, int]) -> Callable[[int], object]:
    """Fuses a moving pair: a frame that never changes would be an unlikely one."""
    height, width = engine.size or size
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 4), dtype=np.uint8)
    fine = np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1)
    pairs = []
    for shift in range(8):
        view = fine[shift : shift + height, shift : shift + width]
        pairs.append((np.ascontiguousarray(view[..., 3]), np.ascontiguousarray(view[..., :3])))
    out = np.empty((height, width, 3), np.uint8)
    return lambda frame: engine(*pairs[frame % len(pairs)], out=out)


def _print(name: str, latencies: Latencies) -> None:
    row = latencies.summary()
    schedule = latencies.schedule
    print(
        f"{name}: p50 {row['p50_ms']:.2f}  p90 {row['p90_ms']:.2f}  p99 {row['p99_ms']:.2f}  "
        f"p99.9 {row['p99.9_ms']:.2f}  max {row['max_ms']:.2f} ms, jitter {row['jitter_ms']:.2f} ms"
    )
    print(
        f"  {schedule.frames} frames at {schedule.rate:g}/s: {row['fused']:.0f} fused "
        f"({row['fused_per_s']:.1f}/s), {row['dropped']:.0f} dropped, {row['misses']:.0f} missed "
        f"{schedule.limit_ms:.1f} ms; the engine's own time p50 {row['service_p50_ms']:.2f}, "
        f"p99 {row['service_p99_ms']:.2f} ms"
    )


def _percentiles(whole: dict[str, Latencies]) -> str:
    import io

    out = io.BytesIO()
    for name, latencies in whole.items():
        out.write(f"# {name}, milliseconds\n".encode())
        latencies.histogram().output_percentile_distribution(out, 1000.0)
    return out.getvalue().decode()


def _record(
    args: argparse.Namespace, engines: dict[str, Engine], whole: dict[str, Latencies], compared: Any
) -> dict[str, Any]:
    import time

    from fuseengine.doctor import installed_version
    from fuseengine.machine import inspect_machine

    machine = inspect_machine()
    clock = time.get_clock_info("perf_counter")
    libraries = ("fuseengine", "numpy", "onnxruntime", "openvino", "tensorrt", "cupy")
    versions = {name: installed_version(name) for name in libraries}
    pinned = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    schedule = next(iter(whole.values())).schedule
    return {
        "machine": {"cpu": machine.cpu.name, "cores": machine.cpu.usable, "system": machine.system},
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
        "clock": {"name": clock.implementation, "resolution_s": clock.resolution},
        "processors": pinned,
        "rate": schedule.rate,
        "deadline_ms": schedule.limit_ms,
        "queue": args.queue,
        "garbage_collector": "on" if args.gc else "off",
        "engines": {
            name: {
                "engine": engines[name].report.summary(),
                **latencies.summary(),
                "latency_ms": [round(float(v), 4) for v in latencies.latency_ms],
                "frame": latencies.frame.tolist(),
            }
            for name, latencies in whole.items()
        },
        "compared": {
            name: {"ratio": dict(found.ratio), "interval": dict(found.interval)}
            for name, found in compared.items()
        },
    }


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    print(f"wrote {path}")


def _pin(text: str) -> None:
    chosen: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            chosen |= set(range(int(first), int(last or first) + 1))
        os.sched_setaffinity(0, chosen)
    except (ValueError, OSError, AttributeError) as error:
        usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "none"
        raise SettingError(
            f"--cpus {text!r} cannot be set ({error}); expected processors out of {usable}"
        ) from error
