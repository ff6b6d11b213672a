"""Builds the package on a CUDA machine without network, runs GPU tests and GPU benchmarks.

    benchmarks/gpu_suite.sh OUT_DIR [--train SECONDS --data DIR] [--dry-run]

The machine has an interpreter with PyTorch, a C++ compiler, cmake, ninja, pybind11,
scikit-build-core, pytest and hypothesis. Nothing is installed into that interpreter: the package
goes into a virtual environment that sees its packages. Every part has its own time limit; one that
fails is reported and the rest goes on. OUT_DIR gets four files, rewritten after each part:

    summary.md        for reading: parts and tables
    summary.json      the same for programs, with every result in full
    suite.log         what the parts printed
    artifacts.tar.gz  logs, result files, trained weights

Exit code: 0 when nothing failed (skipping is said, and is no failure), else 1.
Needs the standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import site
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_PACKING_S = 10
_ARCHIVE_BYTES = 15 << 20
_LOG_BYTES = 4 << 20
_HD, _VGA = "1080x1920", "480x640"
_QUICK_PEERS = "eager,eager-nhwc,graph,graph-tf32,graph-bf16,graph-fp16"


@dataclasses.dataclass
class Part:
    """One step of the suite.

    Attributes:
        name: for logs and the summary.
        command: words after the interpreter.
        limit_s: time limit.
        least_s: not started with less time left.
        skip: why it is not run; "" when it is.
        check: what its output must hold; tests that were all skipped are no success.
    """

    name: str
    command: list[str]
    limit_s: float
    least_s: float = 15
    skip: str = ""
    check: str = ""


@dataclasses.dataclass
class Outcome:
    """What became of a part: status is "ok", "failed", "timed out" or "skipped"."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    command: str = ""


def install_commands(python: str, editable: Path = ROOT) -> list[str]:
    """The words that build and install the package without network."""
    return [
        *(python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"),
        *("--disable-pip-version-check", "-e", str(editable)),
    ]


def benchmark(
    model: str, size: str, extra: Sequence[str], *, limit_s: float, name: str = "", dry: bool
) -> Part:
    """The end-to-end benchmark of one model and size.

    Args:
        model: configuration.
        size: HEIGHTxWIDTH.
        extra: more arguments.
        limit_s: time limit.
        name: of the part.
        dry: on the CPU, tiny, few peers.
    """
    packaged = (ROOT / "fuseengine" / "zoo" / f"{model}.json").exists()
    command = ["-m", "benchmarks.end_to_end", model, "--no-memory"]
    command += [] if packaged else ["--untrained"]
    if dry:
        tiny = {_VGA: "64x96", _HD: "96x160"}[size]
        command += ["--size", tiny, "--device", "cpu", "--rounds", "3", "--peers", "eager"]
        command += ["--precision-rows", "fp32", "--out", "{work}/results"]
    else:
        # What is left after preparing: the import, the reference, some seconds of timing.
        command += ["--size", size, "--device", "cuda", "--rounds", "200", "--budget-s", "20"]
        command += ["--prepare-s", str(int(limit_s - 40)), "--out", "{work}/results", *extra]
    return Part(name or f"{model} {size}", command, limit_s)


def op_benchmark(dtype: str, *, dry: bool) -> Part:
    """The benchmark of the ops in one dtype; it ends by itself well before its limit.

    Args:
        dtype: of the tensors.
        dry: on the CPU, tiny, without ``torch.compile``.
    """
    command = ["-m", "benchmarks.gpu_ops", "--dtype", dtype, "--out", f"{{work}}/results/{dtype}"]
    if dry:
        command += ["--device", "cpu", "--size", "24x32", "--rounds", "2", "--no-compile"]
    else:
        command += ["--size", _HD, "--rounds", "30", "--budget-s", "110"]
    return Part(f"ops {dtype}", command, 150, 60)


def stream_benchmark(model: str, size: str, *, dry: bool) -> Part:
    """A stream with two frames under way beside one that calls the engine.

    Args:
        model: configuration.
        size: HEIGHTxWIDTH.
        dry: left out, because copies are the GPU's.
    """
    command = ["-m", "benchmarks.stream", "--only", "pipelining", "--device", "cuda"]
    command += ["--model", model, "--size", size, "--rounds", "12"]
    command += ["--out", f"{{work}}/results/stream-{size}"]
    skip = "a CPU has no copies that could overlap" if dry else ""
    return Part(f"stream {model} {size}", command, 90, 30, skip=skip)


def parts(args: argparse.Namespace) -> list[Part]:
    """Everything after the installation, the most telling first."""
    dry = args.dry_run
    pytest = ["-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "-o", "addopts="]
    pytest += ["-rfEs", "--import-mode=importlib"]
    quick = ["--peers", _QUICK_PEERS]
    deployed = ["tests/gpu/test_tensorrt.py", "tests/gpu/test_cupy_device.py"]
    tests = ["tests/gpu", "--ignore", "tests/gpu/test_inductor.py"]
    tests += [word for path in deployed for word in ("--ignore", path)]
    passed = "skipped" if dry else " passed"
    tests += [] if dry else ["tests/backends/test_cuda_device.py"]
    kernel_tests = [*pytest, "tests/kernels/test_triton_gpu.py"]
    plan = [
        Part("tests", [*pytest, *tests], 150, check=passed),
        Part("tests of kernels", kernel_tests, 150, 30, check=passed),
        Part(
            "tests of TensorRT and CuPy",
            [*pytest, *deployed],
            240,
            60,
            skip=_missing("tensorrt", "tensorrt_rtx", "cupy"),
            check=passed,
        ),
        op_benchmark("float16", dry=dry),
        benchmark("drfusion-s", _VGA, [], limit_s=170, dry=dry),
    ]
    if args.train:
        plan.append(_training(args))
    for model, size in (("drfusion", _VGA), ("drfusion-m", _VGA), ("drfusion-s", _HD)):
        plan.append(benchmark(model, size, quick, limit_s=75, dry=dry))
    full = ["--effort", "full", "--precision-rows", "auto", "--peers", "graph-fp16"]
    full += ["--out", "{work}/results/full"]  # the same model and size as above
    plan.append(
        benchmark("drfusion-s", _VGA, full, limit_s=150, name="drfusion-s full effort", dry=dry)
    )
    plan.append(op_benchmark("float32", dry=dry))
    for model in ("drfusion-m", "drfusion"):
        plan.append(benchmark(model, _HD, quick, limit_s=75, dry=dry))
    for size in (_VGA, _HD):
        plan.append(stream_benchmark("drfusion-s", size, dry=dry))
    words = [*pytest, "tests/gpu/test_inductor.py"]
    plan.append(Part("tests of inductor", words, 150, 60, check=passed))
    if dry:
        for part in plan:
            if part.name.startswith(("drfusion ", "drfusion-m ")) or "full effort" in part.name:
                part.skip = "too slow for a dry run on a CPU"
    if args.only:
        plan = [part for part in plan if part.name in args.only]
    return plan


def _missing(*libraries: str) -> str:
    """Why a part is skipped that needs one of these; "" when one is installed."""
    if any(importlib.util.find_spec(name) is not None for name in libraries):
        return ""
    return f"none of {', '.join(libraries)} is installed"


def _training(args: argparse.Namespace) -> Part:
    device = "cpu" if args.dry_run else "cuda"
    command = ["-m", "fuseengine", "train", "drfusion-s", "--data", str(args.data)]
    command += ["--out", "{work}/training", "--device", device]
    command += ["--stop-after", f"{args.train:g}s"]
    if args.dry_run:
        command += ["--steps", "2", "--patch", "32", "--batch", "1"]
    return Part("training", command, args.train + 45, args.train + 20)


class Suite:
    """Runs parts, keeps their logs, writes the summary.

    Args:
        out: folder of the four files.
        work: folder of everything else.
        budget_s: time for all parts.
        dry: whether this is a dry run.
    """

    def __init__(self, out: Path, work: Path, budget_s: float, dry: bool) -> None:
        self.out, self.work, self.dry = out, work, dry
        self.begin = time.monotonic()
        self.deadline = self.begin + budget_s - _PACKING_S
        self.outcomes: list[Outcome] = []
        self.left_out: list[str] = []
        self.environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "FUSEENGINE_CACHE": str(work / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        }
        for folder in ("logs", "results"):
            (work / folder).mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left_s(self) -> float:
        """Seconds left of the budget."""
        return self.deadline - time.monotonic()

    def run(self, name: str, command: Sequence[str], limit_s: float, *, check: str = "") -> Outcome:
        """Run a command in the repository's root and keep its output as a log.

        Args:
            name: of the part.
            command: all words; "{work}" is replaced.
            limit_s: killed after this long.
            check: a text that the output must hold, besides an exit code of 0.
        """
        words = [word.replace("{work}", str(self.work)) for word in command]
        log = self.work / "logs" / f"{name.replace(' ', '-')}.log"
        begin, reason = time.monotonic(), ""
        print(f"== {name} (at most {limit_s:.0f} s)", flush=True)
        with log.open("w", encoding="utf-8") as sink:
            sink.write(f"$ {self._shown(words)}\n")
            sink.flush()
            try:
                child = subprocess.Popen(
                    words,
                    cwd=ROOT,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                code, status, reason = -1, "failed", f"could not be started: {error.strerror}"
            else:
                try:
                    code = child.wait(limit_s)
                    status = "failed" if code else "ok"
                except subprocess.TimeoutExpired:
                    code, status = -9, "timed out"
                    reason = f"killed after {limit_s:.0f} s"
                finally:
                    self._end(child)
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if status == "failed" and not reason:
            reason = f"exit code {code}: {tail[-1][:200] if len(tail) > 1 else 'no output'}"
        elif status == "ok" and check and not any(check in line for line in tail):
            status, reason = "failed", f"the output lacks {check!r}"
        outcome = Outcome(
            name, status, time.monotonic() - begin, self._shown([reason]), self._shown(words)
        )
        self.outcomes.append(outcome)
        for line in tail[-4:] if status == "ok" else tail[-25:]:
            print(f"   {line}")
        print(f"   {name}: {status}, {outcome.seconds:.0f} s {outcome.reason}", flush=True)
        return outcome

    def skip(self, name: str, reason: str) -> None:
        """Note a part that is not run."""
        self.outcomes.append(Outcome(name, "skipped", reason=reason))
        print(f"== {name}: skipped: {reason}", flush=True)

    def results(self) -> list[dict[str, Any]]:
        """The benchmarks' result files."""
        found = []
        for path in sorted((self.work / "results").rglob("*.json"), key=_age):
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads(path.read_text(encoding="utf-8")))
        return found

    def write(self) -> None:
        """Write the four files."""
        results = self.results()
        self._archive()
        data = {
            "schema": 1,
            "dry_run": self.dry,
            "seconds": round(time.monotonic() - self.begin, 1),
            "failed": [o.name for o in self.outcomes if o.status in ("failed", "timed out")],
            "parts": [dataclasses.asdict(o) for o in self.outcomes],
            "left_out": self.left_out,
            "results": results,
        }
        _replace(self.out / "summary.json", json.dumps(data, indent=1))
        _replace(self.out / "summary.md", self._markdown(data))
        logs = sorted((self.work / "logs").glob("*.log"), key=_age)
        share = _LOG_BYTES // max(1, len(logs))
        texts = [f"===== {p.stem}\n{_tail(p, share)}\n" for p in logs]
        _replace(self.out / "suite.log", self._shown(["\n".join(texts)]))

    def _markdown(self, data: dict[str, Any]) -> str:
        kind = "GPU suite, dry run on the CPU" if self.dry else "GPU suite"
        lines = [
            f"# {kind}",
            "",
            "| part | status | seconds | reason |",
            "| --- | --- | ---: | --- |",
        ]
        for outcome in self.outcomes:
            reason = outcome.reason.replace("|", "\\|").replace("\n", " ")
            lines.append(
                f"| {outcome.name} | {outcome.status} | {outcome.seconds:.0f} | {reason} |"
            )
        pages = sorted((self.work / "results").rglob("*.md"), key=_age)
        lines += [f"\n{page.read_text(encoding='utf-8').rstrip()}" for page in pages]
        if data["left_out"]:
            lines += ["", "Not in the archive (too large): " + ", ".join(data["left_out"])]
        return "\n".join(lines) + "\n"

    def _archive(self) -> None:
        """Logs and results first, then what training left, smallest first, up to a size."""
        self.left_out, total = [], 0
        target = self.out / "artifacts.tar.gz"
        beside = target.with_name(".artifacts.tmp")
        with tarfile.open(beside, "w:gz") as archive:
            for folder in ("logs", "results", "training"):
                files = [p for p in (self.work / folder).rglob("*") if p.is_file()]
                for path in sorted(files, key=lambda p: p.stat().st_size):
                    name = str(path.relative_to(self.work))
                    total += path.stat().st_size
                    if total > _ARCHIVE_BYTES:
                        total -= path.stat().st_size
                        self.left_out.append(name)
                    else:
                        archive.add(path, name)
        beside.replace(target)

    def _shown(self, words: Sequence[str]) -> str:
        """A command or text without this machine's folders."""
        text = " ".join(words)
        places = {str(self.work): "WORK", str(ROOT): ".", str(Path(sys.executable).parent): "BIN"}
        for place, name in places.items():
            text = text.replace(place, name)
        return text

    @staticmethod
    def _end(child: subprocess.Popen[bytes]) -> None:
        # The session started for this part: the part and what it started, nothing else.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def install(suite: Suite) -> str | None:
    """Install into an environment of its own.

    Returns:
        The interpreter to go on with; None when it could not be installed.
    """
    for make in (_virtual_environment, _user_folder):
        python = make(suite)
        if python is None:
            continue
        label = "install" if make is _virtual_environment else "install for the user"
        extra = [] if make is _virtual_environment else ["--user", "--break-system-packages"]
        command = [*install_commands(python)[:4], *extra, *install_commands(python)[4:]]
        if suite.run(label, command, min(180, suite.left_s)).status == "ok":
            return python
    return None


def _virtual_environment(suite: Suite) -> str | None:
    place = suite.work / "venv"
    command = [sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(place)]
    if suite.run("virtual environment", command, 60).status != "ok":
        return None
    # An environment made from within another one sees the base interpreter's packages only, so
    # the packages of the one we run in are put on the path; pip is among them.
    folder = next(place.glob("lib*/python*/site-packages"), None)
    if folder is None:
        return None
    (folder / "outer_packages.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    bins = [str(place / "bin"), str(Path(sys.executable).parent)]
    suite.environment["PATH"] = os.pathsep.join([*bins, os.environ.get("PATH", os.defpath)])
    return str(place / "bin" / "python")


def _user_folder(suite: Suite) -> str | None:
    if sys.prefix != sys.base_prefix:  # pip refuses --user inside a virtual environment
        return None
    suite.environment["PYTHONUSERBASE"] = str(suite.work / "user")
    return sys.executable


_DEVICE = """
import importlib.metadata as m, platform, sys
print("python", platform.python_version())
for name in ("numpy", "torch", "triton", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx",
             "cupy-cuda13x", "onnx", "pytest", "hypothesis", "pybind11", "scikit-build-core"):
    try: print(name, m.version(name))
    except m.PackageNotFoundError: print(name, "not installed")
import fuseengine._native
print("native module: built")
import torch
if torch.cuda.is_available():
    print("device:", torch.cuda.get_device_name(), torch.cuda.get_device_capability(),
          "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
elif "--dry-run" in sys.argv:
    print("device: none, the dry run uses the CPU")
else:
    sys.exit("PyTorch sees no CUDA device here; --dry-run runs the same path on the CPU")
"""


def run(args: argparse.Namespace) -> int:
    """Run the suite; see :func:`parser`."""
    work = Path(tempfile.mkdtemp(prefix="fuseengine-gpu-suite-"))
    suite = Suite(args.out.resolve(), work, args.budget, args.dry_run)
    signal.signal(signal.SIGTERM, _stop)
    try:
        _run(args, suite)
    except KeyboardInterrupt:
        suite.outcomes.append(Outcome("suite", "failed", reason="interrupted"))
    finally:
        suite.write()
        shutil.rmtree(work, ignore_errors=True)
    failed = [o.name for o in suite.outcomes if o.status in ("failed", "timed out")]
    skipped = [o.name for o in suite.outcomes if o.status == "skipped"]
    print(f"\nfailed: {', '.join(failed) or 'nothing'}; skipped: {', '.join(skipped) or 'nothing'}")
    return 1 if failed else 0


def _run(args: argparse.Namespace, suite: Suite) -> None:
    if args.install:
        python = install(suite)
    else:
        python = sys.executable
        suite.skip("install", "--no-install: the current environment is used")
    plan = parts(args)
    blocked = "the package could not be installed" if python is None else ""
    if python is not None:
        words = [python, "-c", _DEVICE, *(["--dry-run"] if args.dry_run else [])]
        if suite.run("device", words, 90, check="device:").status != "ok":
            blocked = "no usable device, see the part 'device'"
        if shutil.which("nvidia-smi"):
            suite.run("nvidia-smi", ["nvidia-smi"], 30)
    suite.write()
    if not args.train:
        suite.skip("training", "not asked for (--train SECONDS --data DIR)")
    reserved = {part.name: part.least_s for part in plan if part.name == "training"}
    for part in plan:
        reserved.pop(part.name, None)
        left = suite.left_s - sum(reserved.values())
        if blocked or part.skip:
            suite.skip(part.name, blocked or part.skip)
        elif left < part.least_s:
            suite.skip(part.name, f"{max(left, 0):.0f} s left of {args.budget:.0f} s (--budget)")
        else:
            words = [python or "", *part.command]
            suite.run(part.name, words, min(part.limit_s, left), check=part.check)
        suite.write()


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _age(path: Path) -> float:
    return path.stat().st_mtime


def _tail(path: Path, limit: int) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    return text if len(text) <= limit else f"[...]\n{text[-limit:]}"


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="gpu_suite.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("out", type=Path, metavar="OUT_DIR", help="folder for the four files")
    made.add_argument(
        "--budget", type=float, default=540, metavar="SECONDS", help="for everything (default: 540)"
    )
    made.add_argument(
        "--train", type=float, default=0, metavar="SECONDS", help="also train drfusion-s this long"
    )
    made.add_argument("--data", type=Path, metavar="DIR", help="pairs to train on: ir/ and vis/")
    made.add_argument(
        "--dry-run", action="store_true", help="the same path on the CPU, tiny, in about a minute"
    )
    made.add_argument(
        "--no-install",
        dest="install",
        action="store_false",
        help="use the current environment, where the package is installed already",
    )
    made.add_argument("--only", nargs="+", metavar="PART", help="only these parts")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    made = parser()
    args = made.parse_args(argv)
    if args.train and (args.data is None or not args.data.is_dir()):
        made.error(f"--train needs --data DIR with pairs; got {args.data}")
    if args.data is not None:
        args.data = args.data.resolve()
    if args.only:
        known = [part.name for part in parts(argparse.Namespace(**{**vars(args), "only": None}))]
        unknown = [name for name in args.only if name not in known]
        if unknown:
            made.error(f"--only: {unknown}; expected some of {known}")
    return run(args)


if __name__ == "__main__":
    raise SystemExit(main())
