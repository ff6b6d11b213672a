"""The run side on a CPU: cold start and memory of a bundle, beside eager PyTorch.

    python -m benchmarks.deploy drfusion-s --size 640x480
    python -m benchmarks.deploy drfusion-s --ways onnxruntime/fp32 --runs 3

Every number comes from processes of their own, in turns; each fuses the demo pair a few times. In a
bundle's process the imports of PyTorch, onnx and safetensors are blocked. OpenVINO's networks are
kept compiled after the first start on a machine: that one has a row of its own. Targets for
drfusion-s at 640x480: the package's import in 0.3 s, from fe.load() to the first fused frame in
1.5 s, resident memory under a third of the eager process's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Result, command_line, psnr

FRAMES = 5
"""Fused per process; the first one is timed as part of the start."""

_MEMORY = """
def memory(field):
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) / 1e3 for l in status if l.startswith(field + ":"))
"""

_BUNDLE = """
import sys, json, time
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "safetensors"):
            raise ModuleNotFoundError(name + " is blocked here", name=name)
sys.meta_path.insert(0, Blocker())
path, backend, precision, threads, out = sys.argv[1:]
clock = time.perf_counter
a = clock()
import fuseengine as fe
fe.load, fe.Engine
b = clock()
pair = fe.demo_pair(tuple(json.loads(sys.stdin.readline())))
c = clock()
options = {} if backend == "-" else {"backend": backend, "precision": precision}
engine = fe.load(path, threads=int(threads), **options)
d = clock()
fused = engine(*pair)
e = clock()
for _ in range(FRAMES - 1):
    engine(*pair)
import numpy as np
np.save(out, fused)
print(json.dumps({"import_s": b - a, "load_s": d - c, "load_to_frame_s": e - c,
    "resident_mb": memory("VmRSS"), "peak_mb": memory("VmHWM"),
    "how": sorted({"/".join(how) for how in engine.choice.values()})}))
"""

_EAGER = """
import sys, json, time
name, threads, out = sys.argv[1:]
size = tuple(json.loads(sys.stdin.readline()))
clock = time.perf_counter
a = clock()
import torch
import fuseengine as fe
from fuseengine.runtime.frames import FrameAdapter
b = clock()
torch.set_num_threads(int(threads))
import numpy as np
pair = fe.demo_pair(size)
c = clock()
model = fe.load_model(name)
adapter = FrameAdapter(size, model.channels, model.multiple, model.padding)
given = [np.empty((1, adapter.planes, *adapter.padded), np.float32) for _ in pair]
tensors = [torch.from_numpy(x[None] if x.ndim == 3 else x) for x in given]
def fuse():
    adapter.load(*pair, *(t.numpy() for t in tensors))
    with torch.inference_mode():
        return adapter.store(model(*tensors).numpy(), pair[1])
d = clock()
fused = fuse()
e = clock()
for _ in range(FRAMES - 1):
    fuse()
np.save(out, fused)
print(json.dumps({"import_s": b - a, "load_s": d - c, "load_to_frame_s": e - c,
    "resident_mb": memory("VmRSS"), "peak_mb": memory("VmHWM"), "how": ["eager/fp32"]}))
"""


def run_once(script: str, size: tuple[int, int], kept: str, *words: object) -> dict[str, Any]:
    """One process, with a cache folder: what it measured, and the frame that it fused."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "fused.npy"
        done = subprocess.run(
            [sys.executable, "-c", f"FRAMES = {FRAMES}\n{_MEMORY}{script}", *map(str, words), out],
            input=json.dumps(size) + "\n",
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "FUSEENGINE_CACHE": kept},
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:].strip())
        return {**json.loads(done.stdout.splitlines()[-1]), "fused": np.load(out)}


def measure(
    name: str, bundle: Path, size: tuple[int, int], ways: Sequence[str], threads: int, runs: int
) -> dict[str, list[dict[str, Any]]]:
    """Contender -> what each of its processes measured, taken in turns."""
    found: dict[str, list[dict[str, Any]]] = {}

    def note(label: str, measured: dict[str, Any]) -> None:
        found.setdefault(label, []).append(measured)

    for _ in range(runs):
        with tempfile.TemporaryDirectory() as kept:
            note("eager PyTorch", run_once(_EAGER, size, kept, name, threads))
        for way in ways:
            backend, _, precision = way.partition("/")
            label = "bundle, as compiled" if way == "-" else f"bundle, {way}"
            words = (bundle, backend, precision or "-", threads)
            with tempfile.TemporaryDirectory() as kept:
                first = run_once(_BUNDLE, size, kept, *words)
                if any(Path(kept).iterdir()):
                    note(f"{label}, first start", first)
                    note(label, run_once(_BUNDLE, size, kept, *words))
                else:
                    note(label, first)
    return found


_NUMBERS = ("import_s", "load_s", "load_to_frame_s", "resident_mb", "peak_mb")
_TARGETS = {"import_s": 0.3, "load_to_frame_s": 1.5, "of eager's memory": 1 / 3}


def add_rows(result: Result, found: dict[str, list[dict[str, Any]]]) -> None:
    """Medians per contender, and a note per target that is missed."""
    eager = found["eager PyTorch"]
    resident = float(np.median([run["resident_mb"] for run in eager]))
    for label, measured in found.items():
        row: dict[str, Any] = {
            key: round(float(np.median([run[key] for run in measured])), 3) for key in _NUMBERS
        }
        row["of eager's memory"] = round(row["resident_mb"] / resident, 3)
        row["psnr_db"] = psnr(measured[0]["fused"], eager[0]["fused"], 255)
        row["how"] = ", ".join(measured[0]["how"])
        row["runs"] = len(measured)
        result.add(label, **row)
        if label == "eager PyTorch":
            continue
        for key, most in _TARGETS.items():
            if row[key] > most:
                result.notes.append(f"MISS: {label}: {key} {row[key]:.3g}, target {most:.3g}")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a packaged model")
    parser.add_argument("--size", default="640x480", metavar="WxH")
    parser.add_argument(
        "--ways",
        default="-,openvino/bf16,openvino/fp32,onnxruntime/fp32",
        help="backend/precision to load the bundle with; '-': as it was compiled",
    )
    parser.add_argument(
        "--no-merge", action="store_true", help="a bundle with its stages apart, see compile()"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=int, default=5, help="processes per contender")
    parser.add_argument("--out", type=Path, help="folder of results (default: benchmarks/results)")
    args = parser.parse_args()
    import fuseengine as fe

    width, height = (int(number) for number in args.size.split("x"))
    size = (height, width)
    apart = "-stages-apart" if args.no_merge else ""
    engine = fe.compile(
        args.model, size, portable=True, threads=args.threads, merge=not args.no_merge
    )
    result = Result(
        suite=f"deploy-{args.model}-{height}x{width}{apart}",
        device="cpu",
        title=f"{args.model} {width}x{height} from a file{apart.replace('-', ' ')}: "
        "cold start and memory, medians",
        settings={"threads": args.threads, "runs": args.runs, "frames": FRAMES},
        command=command_line("benchmarks.deploy", sys.argv[1:]),
    )
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "engine.fuse"
        engine.save(bundle)
        result.settings["bundle_mb"] = round(bundle.stat().st_size / 1e6, 2)
        ways = args.ways.split(",")
        add_rows(result, measure(args.model, bundle, size, ways, args.threads, args.runs))
    result.notes.append(
        "Seconds are the clock's: import of the package (NumPy and Pillow with it), load (the "
        "runtime's own import with it), and from the load to the first fused frame."
    )
    print(result.table())
    print(*result.notes, *result.write(args.out), sep="\n")


if __name__ == "__main__":
    main()
