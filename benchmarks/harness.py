"""Timing, memory, accuracy and reporting for every benchmark of the project.

The rules it keeps:

* contenders are interleaved in one process, so that a clock that drifts drifts for all of them;
* a time is given as p50, p90, p99 and n, with a verdict on the measurement itself;
* a ratio is taken round by round and carries a confidence interval;
* peak memory is measured in a process of its own;
* a result file says machine, versions, commit and the command that repeats it, and nothing that
  identifies a person or a host.

Needs numpy and the standard library only.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SCHEMA_VERSION = 1
RESULTS = Path(__file__).parent / "results"

_REPOSITORY = Path(__file__).parent.parent
_ENOUGH = 20
_WIDE = 1.5
_DRIFT = 1.15


@dataclasses.dataclass(frozen=True)
class Samples:
    """The times of one contender.

    Attributes:
        name: the contender.
        ns: int64 (n,) nanoseconds, in the order of the rounds: sample k of every contender of one
            `interleave` call was taken in round k.
    """

    name: str
    ns: NDArray[np.int64]

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.ns)

    @property
    def p50(self) -> float:
        """Median, milliseconds."""
        return self.percentile(50)

    @property
    def p90(self) -> float:
        """90th percentile, milliseconds."""
        return self.percentile(90)

    @property
    def p99(self) -> float:
        """99th percentile, milliseconds; with n < 100 close to the slowest sample."""
        return self.percentile(99)

    @property
    def min(self) -> float:
        """Fastest sample, milliseconds."""
        return float(self.ns.min()) / 1e6

    def percentile(self, q: float) -> float:
        """The q-th percentile (0 to 100), linearly interpolated, milliseconds."""
        return float(np.percentile(self.ns, q)) / 1e6

    def gb_per_s(self, nbytes: int) -> float:
        """Bandwidth (1e9 bytes per second) at the median when a call moves `nbytes`."""
        return nbytes / (self.p50 * 1e6)

    @property
    def verdict(self) -> str:
        """What is wrong with the measurement, or "ok".

        * too few: below 20 samples, p90 and p99 mean little;
        * unstable: p90 is more than 1.5 times p10: something else used the machine, or the
          clock moves;
        * drifting: the medians of the first and the second half differ by more than 15%: not warm,
          or throttling;
        * clock-bound: the median is below 50 ticks of the clock.
        """
        found = []
        if self.n < _ENOUGH:
            found.append(f"too few samples (n={self.n}, expected {_ENOUGH})")
        low, high = self.percentile(10), self.percentile(90)
        if high > _WIDE * low:
            found.append(f"unstable (p90/p10 {high / max(low, 1e-9):.2f})")
        half = self.n // 2
        if half >= 5:
            first, last = np.median(self.ns[:half]), np.median(self.ns[-half:])
            drift = float(last / max(first, 1))
            if not 1 / _DRIFT <= drift <= _DRIFT:
                found.append(f"drifting (second half {drift:.2f}x the first)")
        if self.p50 < 50 * time.get_clock_info("perf_counter").resolution * 1e3:
            found.append("clock-bound (repeat the call inside the contender)")
        return "; ".join(found) or "ok"

    def row(self) -> dict[str, Any]:
        """The fields of a result row that a time has."""
        return {
            "n": self.n,
            "p50_ms": self.p50,
            "p90_ms": self.p90,
            "p99_ms": self.p99,
            "min_ms": self.min,
            "verdict": self.verdict,
        }


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times longer one contender takes than another.

    Attributes:
        median: median over the rounds of time / time; below 1 the first is faster.
        low: lower end of the confidence interval of the median.
        high: its upper end.
    """

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """One of "faster", "slower" and, when the interval holds 1, "no difference seen"."""
        if self.high < 1:
            return "faster"
        return "slower" if self.low > 1 else "no difference seen"

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 50,
    warmup: int = 5,
    budget_s: float | None = None,
    synchronize: Callable[[], object] | None = None,
    settle_s: float = 0.0,
) -> dict[str, Samples]:
    """Time contenders in turns, in this process.

    Each round calls every contender once. The order rotates from round to round, and turns round
    after each full rotation, so that nobody always runs after the same neighbour. The garbage
    collector is off while a call is timed; its youngest generation is collected between rounds.

    Args:
        contenders: name -> a function of no arguments. What it returns is dropped.
        rounds: samples per contender, at least 1.
        warmup: untimed rounds before.
        budget_s: stop after the round in which this much time (seconds, without the warm-up) is
            spent, even if fewer than `rounds` are done.
        synchronize: waits for the device, called before the clock starts and before it stops,
            for example `torch.cuda.synchronize`.
        settle_s: before each timed call, after synchronize, a contender is called untimed for this
            many seconds, unless its last warm-up call took as long. Cores that slept through a
            pause come back with cold caches and, on a virtual machine, for some ten milliseconds
            as two threads of one core. For calls that are done when they return.

    Returns:
        name -> samples, all of the same n.

    Raises:
        ValueError: no contenders, or fewer than 1 round.
        RuntimeError: a contender failed; the message names it, the cause is chained.
    """
    if not contenders:
        raise ValueError("no contenders: expected at least one name with its function")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds={rounds}, warmup={warmup}: expected rounds >= 1, warmup >= 0")
    names = list(contenders)
    wait = synchronize or (lambda: None)
    times: dict[str, list[int]] = {name: [] for name in names}

    settled: set[str] = set()

    def settle(run: Callable[[], object]) -> None:
        end = time.perf_counter() + settle_s
        while time.perf_counter() < end:
            run()

    def call(name: str) -> int:
        run = contenders[name]
        try:
            wait()
            if name in settled:
                settle(run)
            start = time.perf_counter_ns()
            run()
            wait()
            return time.perf_counter_ns() - start
        except Exception as error:
            raise RuntimeError(f"contender {name!r} failed: {error}") from error

    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        last = dict.fromkeys(names, settle_s)
        for _ in range(warmup):
            for name in names:
                last[name] = call(name) / 1e9
        settled.update(name for name in names if last[name] < settle_s)
        begin = time.monotonic()
        for k in range(rounds):
            shift = k % len(names)
            order = names[shift:] + names[:shift]
            if (k // len(names)) % 2:
                order.reverse()
            for name in order:
                times[name].append(call(name))
            gc.collect(0)
            if budget_s is not None and time.monotonic() - begin > budget_s:
                break
    finally:
        if was_enabled:
            gc.enable()
    return {name: Samples(name, np.asarray(ns, np.int64)) for name, ns in times.items()}


class PauseBefore:
    """For `interleave`: rest before each timed call and not after it.

    Some runtimes let their threads spin for a while after a call, which would slow down whoever
    comes next.

    Args:
        seconds: how long.
    """

    def __init__(self, seconds: float = 0.01) -> None:
        self.seconds, self.before = seconds, True

    def __call__(self) -> None:
        """Called before and after each call, in turns."""
        if self.before:
            time.sleep(self.seconds)
        self.before = not self.before


def paired_ratio(
    a: Samples, b: Samples, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Ratio:
    """Time of `a` over time of `b`, paired round by round, with a bootstrap interval.

    Args:
        a: samples of one contender.
        b: samples of the other, from the same `interleave` call.
        confidence: coverage of the interval, between 0 and 1.
        resamples: bootstrap resamples of the rounds.
        seed: of the resampling, so that a report is repeatable.

    Returns:
        The median ratio and its interval.

    Raises:
        ValueError: the two were not taken in the same rounds, or there are none.
    """
    if a.n != b.n or not a.n:
        raise ValueError(
            f"{a.name!r} has {a.n} samples, {b.name!r} has {b.n}: expected equal numbers above 0, "
            "from one call of interleave"
        )
    ratios = a.ns / np.maximum(b.ns, 1)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, a.n, (resamples, a.n))
    medians = np.median(ratios[picks], axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(medians, [tail, 100 - tail])
    return Ratio(float(np.median(ratios)), float(low), float(high))


# Linux starts a program's peak at that of the process it was forked from. A bare interpreter in
# between keeps the caller's memory (a loaded framework, test images) out of the contender's number.
_LAUNCHER = """
import os, sys
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as out:
    out.write(f"{os.waitstatus_to_exitcode(status)} {usage.ru_maxrss}")
"""

_CALLER = """
import importlib, json, sys
module, _, name = sys.argv[1].partition(":")
getattr(importlib.import_module(module), name)(*json.loads(sys.argv[2]))
"""


def peak_memory(
    target: str | Sequence[str],
    *args: Any,
    timeout_s: float = 600,
    env: Mapping[str, str] | None = None,
) -> int:
    """Peak resident memory of a contender in a process of its own.

    The number is the operating system's high-water mark of the whole process (`ru_maxrss`): the
    interpreter, the imported libraries, shared pages of mapped files that were touched, weights
    and buffers. Compare contenders with each other, or with a process that only imports. It holds
    the largest single process, not the sum, when the contender starts others; GPU memory and
    pages swapped out are not in it. A bare interpreter (about 10 MB) is the lowest value possible.

    Args:
        target: a command as a list of words, or "package.module:function".
        *args: arguments of the function, JSON values; not allowed with a command.
        timeout_s: seconds until the contender is killed.
        env: environment variables on top of this process's.

    Returns:
        bytes.

    Raises:
        ValueError: a target of neither form.
        RuntimeError: the contender failed or ran out of time; the message ends with what it
            printed on standard error.
        NotImplementedError: the platform has no `wait4` (Windows).
    """
    if not hasattr(os, "wait4"):
        raise NotImplementedError("peak_memory needs os.wait4: run it on Linux or macOS")
    if isinstance(target, str):
        if not re.fullmatch(r"[\w.]+:\w+", target):
            raise ValueError(f"{target!r}: expected 'package.module:function' or a list of words")
        command = [sys.executable, "-c", _CALLER, target, json.dumps(args)]
    else:
        command = list(target)
        if args or not command:
            raise ValueError("a command is a list of at least one word and takes no arguments")
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "usage"
        launcher = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(note), *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        try:
            _, errors = launcher.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            # The session that was started above: the launcher and the contender, nothing else.
            os.killpg(launcher.pid, 9)
            launcher.communicate()
            raise RuntimeError(f"{target}: not finished after {timeout_s} s") from None
        if not note.exists():
            raise RuntimeError(f"{target}: could not be started: {errors[-2000:].strip()}")
        code, peak = (int(word) for word in note.read_text().split())
    if code:
        raise RuntimeError(f"{target}: exit code {code}: {errors[-2000:].strip()}")
    return peak if sys.platform == "darwin" else peak * 1024


def psnr(a: ArrayLike, b: ArrayLike, peak: float) -> float:
    """Peak signal-to-noise ratio, computed in float64.

    Args:
        a: an array of any shape.
        b: one of the same shape.
        peak: the largest value a picture can have: 255 for uint8, 1 for floats in [0, 1].

    Returns:
        decibels; infinity for equal arrays, NaN when either holds a NaN.

    Raises:
        ValueError: shapes differ, arrays are empty, or the peak is not above 0.
    """
    if not peak > 0:
        raise ValueError(f"peak {peak}: expected the largest value of a picture, above 0")
    mse = float(np.mean(_difference(a, b) ** 2))
    return math.inf if mse == 0 else 10 * math.log10(peak * peak / mse)


def max_abs_error(a: ArrayLike, b: ArrayLike) -> float:
    """Largest absolute difference of two arrays of one shape, computed in float64."""
    return float(np.max(np.abs(_difference(a, b))))


def _difference(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"shapes {a.shape} and {b.shape}: expected equal ones with elements")
    return a - b


_PACKAGES = (
    "fuseengine", "numpy", "torch", "triton", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino",
    "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "cupy-cuda12x", "cupy-cuda13x",
)  # fmt: skip
_CPU_FLAGS = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip
_THREADS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY",
    "KMP_AFFINITY", "KMP_BLOCKTIME", "GOMP_CPU_AFFINITY",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, memory, software, settings and commit.

    Nothing is imported to find out: versions come from package metadata, and PyTorch is asked for
    its threads only when it is loaded already. Host names, user names and paths are left out.

    Returns:
        JSON values under `cpu`, `ram_gb`, `os`, `python`, `packages`, `threads`, `git`, `gpu`
        (a list, empty without an NVIDIA GPU) and `board` (the model of a Jetson, else None).
    """
    torch = sys.modules.get("torch")
    threads: dict[str, Any] = {key: os.environ[key] for key in _THREADS if key in os.environ}
    if torch is not None:
        threads["torch"] = torch.get_num_threads()
    board = _read("/proc/device-tree/model").strip("\0 \n") or None
    return {
        "cpu": _cpu(),
        "ram_gb": _ram_gb(),
        # The kernel's version alone: what follows it can name a site's own build.
        "os": f"{platform.system()} {re.split('[^0-9.]', platform.release())[0]}".strip(),
        "python": platform.python_version(),
        "packages": _versions(_PACKAGES),
        "threads": threads,
        "git": _git(),
        "gpu": _gpus(),
        "board": board,
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str | None:
    """Standard output of a command, or None when it is missing or fails."""
    if not shutil.which(command[0]):
        return None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, cwd=_REPOSITORY
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> dict[str, Any]:
    info = _read("/proc/cpuinfo")
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", info, re.MULTILINE)
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    affinity = getattr(os, "sched_getaffinity", None)
    base = "/sys/devices/system/cpu/cpu0/cpufreq/"
    max_khz = _read(base + "cpuinfo_max_freq").strip()
    return {
        "model": name[1].strip() if name else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "flags": [flag for flag in _CPU_FLAGS if flag in flags],
        "governor": _read(base + "scaling_governor").strip() or None,
        "max_mhz": int(max_khz) // 1000 if max_khz.isdigit() else None,
    }


def _ram_gb() -> float | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return round(int(found[1]) * 1024 / 1e9, 1) if found else None


def _versions(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git() -> dict[str, Any] | None:
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    # Result files are what a benchmark writes; they do not make its code dirty.
    changed = _output("git", "status", "--porcelain", "--", ":!benchmarks/results")
    return {"commit": commit, "dirty": changed is None or bool(changed)}


def _gpus() -> list[dict[str, Any]]:
    fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,compute_cap"
    text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    keys = ("name", "driver", "memory_mib", "sm_mhz", "max_sm_mhz", "compute_capability")
    if text:
        lines = [[word.strip() for word in line.split(",")] for line in text.splitlines()]
        return [dict(zip(keys, words, strict=True)) for words in lines if len(words) == len(keys)]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return [
            {"name": torch.cuda.get_device_name(k), "driver": None}
            for k in range(torch.cuda.device_count())
        ]
    return []


def machine_slug(info: Mapping[str, Any], device: str = "cpu") -> str:
    """A short file name part for a machine: its GPU for device "cuda", else CPU and cores."""
    if device.startswith("cuda") and info["gpu"]:
        return slug(info["board"] or info["gpu"][0]["name"])
    noise = r"\((R|TM)\)|@.*|\bCPU\b|\d+-Core Processor"
    name = info["board"] or re.sub(noise, " ", info["cpu"]["model"])
    return f"{slug(name)}-{info['cpu']['cores']}c"


def slug(text: str) -> str:
    """Lower-case letters, digits and single hyphens, never empty."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def this_command() -> str:
    """The command line of the running benchmark, as it would be typed in the repository root."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    words = ["python", "-m", spec.name] if spec else ["python", Path(sys.argv[0]).name]
    if words[-1].endswith(".__main__"):
        words[-1] = words[-1].removesuffix(".__main__")
    return " ".join([*words, *sys.argv[1:]])


def command_line(module: str, words: Sequence[str]) -> str:
    """What repeats a run of a benchmark; `--out`, where its results went, is nobody's business."""
    kept, skip = [], False
    for word in words:
        if not skip and not word.startswith("--out"):
            kept.append(word)
        skip = word == "--out"
    return " ".join(["python", "-m", module, *kept])


_HEADERS = {
    "name": "contender",
    "p50_ms": "p50 ms",
    "p90_ms": "p90 ms",
    "p99_ms": "p99 ms",
    "min_ms": "min ms",
    "n": "n",
    "gb_per_s": "GB/s",
    "peak_mb": "peak MB",
    "psnr_db": "PSNR dB",
    "max_abs_error": "max error",
    "ratio": "ratio",
    "verdict": "measurement",
}
_NUMBERS = {
    "p50_ms", "p90_ms", "p99_ms", "min_ms", "gb_per_s", "peak_mb", "psnr_db", "max_abs_error",
}  # fmt: skip
_TEXTS = {"verdict", "command", "error"}


def format_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None = None,
    *,
    markdown: bool = False,
    headers: Mapping[str, str] | None = None,
) -> str:
    """Rows as an aligned text table, numbers to the right.

    Args:
        rows: mappings of column -> value; floats are shown with four significant digits, a missing
            value or None as "-".
        columns: which, in order; by default all that occur except `command`, known ones first.
        markdown: with the bars of a Markdown table.
        headers: column -> title, on top of the usual ones.

    Returns:
        Lines joined by newlines, without one at the end.
    """
    if columns is None:
        seen = dict.fromkeys(key for row in rows for key in row if key != "command")
        columns = [key for key in _HEADERS if key in seen]
        columns += [key for key in seen if key not in _HEADERS]
    titles = {**_HEADERS, **(headers or {})}
    head = [titles.get(key, key.replace("_", " ")) for key in columns]
    body = [[_cell(row.get(key)) for key in columns] for row in rows]
    if markdown:
        body = [[text.replace("|", "\\|").replace("\n", " ") for text in line] for line in body]
    numeric = [
        all(_is_number(row.get(key)) or row.get(key) is None for row in rows) for key in columns
    ]
    widths = [
        max([3, len(title), *(len(line[k]) for line in body)]) for k, title in enumerate(head)
    ]

    def join(cells: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(cells, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    rule = [
        "-" * (width - 1) + (":" if right and markdown else "-")
        for width, right in zip(widths, numeric, strict=True)
    ]
    return "\n".join([join(head), join(rule), *(join(line) for line in body)])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        if not math.isfinite(value) or value == 0:
            return str(float(value))
        digits = max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.{digits}f}"
    return str(value)


class ResultSchemaError(ValueError):
    """A result does not follow the schema; `problems` lists everything found."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("the result does not follow the schema: " + "; ".join(self.problems))


_TOP: dict[str, type] = {
    "schema": int,
    "suite": str,
    "device": str,
    "title": str,
    "created": str,
    "fuseengine": str,
    "command": str,
    "settings": dict,
    "machine": dict,
    "rows": list,
    "notes": list,
}
_MACHINE = {"cpu", "ram_gb", "os", "python", "packages", "threads", "git", "gpu", "board"}
_PATH = re.compile(r"(?:^|[\s\"'=:(])(?:/|~/|[A-Za-z]:\\)[\w.-]+[/\\]")


def validate_result(result: Mapping[str, Any]) -> None:
    """Check a result against schema version 1.

    A result has exactly the keys of this table; a row has a `name` that no other row has, and at
    least one number or an `error`; times, errors, memory and bandwidth are finite and not
    negative (`psnr_db` may be the string "inf": equal arrays); every other value of a row is a
    JSON scalar. No string anywhere holds an absolute path.

    Args:
        result: as read from JSON, or as `Result.to_dict` gives it.

    Raises:
        ResultSchemaError: with the list of all problems.
    """
    problems = [f"{key}: missing" for key in _TOP if key not in result]
    problems += [f"{key}: unknown key" for key in result if key not in _TOP]
    for key, kind in _TOP.items():
        if key in result and (not isinstance(result[key], kind) or isinstance(result[key], bool)):
            problems.append(f"{key}: {type(result[key]).__name__}, expected {kind.__name__}")
    if problems:
        raise ResultSchemaError(problems)
    if result["schema"] != SCHEMA_VERSION:
        raise ResultSchemaError([f"schema: {result['schema']}, expected {SCHEMA_VERSION}"])
    for key in ("suite", "device"):
        if slug(result[key]) != result[key]:
            problems.append(f"{key}: {result[key]!r}, expected lower-case words and hyphens")
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", result["created"]):
        problems.append(f"created: {result['created']!r}, expected YYYY-MM-DDThh:mm:ssZ")
    problems += [f"machine.{key}: missing" for key in sorted(_MACHINE - set(result["machine"]))]
    if not result["rows"]:
        problems.append("rows: empty, expected at least one")
    names: set[str] = set()
    for k, row in enumerate(result["rows"]):
        problems += _row_problems(f"rows[{k}]", row, names)
    problems += [
        f"{where}: {text!r} holds an absolute path, expected paths from the repository root"
        for where, text in _strings("", result)
        if _PATH.search(text)
    ]
    try:
        json.dumps(result, allow_nan=False)
    except (TypeError, ValueError) as error:
        problems.append(f"not JSON: {error}")
    if problems:
        raise ResultSchemaError(problems)


def _row_problems(where: str, row: object, names: set[str]) -> list[str]:
    if not isinstance(row, dict):
        return [f"{where}: {type(row).__name__}, expected dict"]
    name = row.get("name")
    if not isinstance(name, str) or not name:
        return [f"{where}.name: {name!r}, expected a name"]
    problems = [f"{where}.name: {name!r} occurs twice"] if name in names else []
    names.add(name)
    if not row.get("error") and not any(_is_number(v) for v in row.values()):
        problems.append(f"{where}: neither a number nor an error")
    for key, value in row.items():
        at = f"{where}.{key}"
        if value is not None and not isinstance(value, (str, int, float, bool)):
            problems.append(f"{at}: {type(value).__name__}, expected a JSON scalar")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{at}: {value}, expected a finite number")
        elif key in _NUMBERS and value is not None and not (key == "psnr_db" and value == "inf"):
            if isinstance(value, (str, bool)):
                problems.append(f"{at}: {value!r}, expected a number")
            elif value < 0 and key != "psnr_db":
                problems.append(f"{at}: {value}, expected 0 or more")
        elif key in _TEXTS and value is not None and not isinstance(value, str):
            problems.append(f"{at}: {value!r}, expected text")
        elif key == "n" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            problems.append(f"{at}: {value!r}, expected a whole number above 0")
    return problems


def _strings(where: str, value: object) -> Iterable[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(f"{where}.{key}".lstrip("."), item)
    elif isinstance(value, (list, tuple)):
        for k, item in enumerate(value):
            yield from _strings(f"{where}[{k}]", item)


@dataclasses.dataclass
class Result:
    """What one run of a benchmark found.

    Attributes:
        suite: the benchmark's name, lower-case with hyphens.
        device: "cpu" or "cuda".
        title: one line for a reader.
        settings: what was run: model, size, rounds, threads; JSON values.
        notes: the honest reading: where we lose, what the numbers leave out.
        rows: one mapping per contender, see `validate_result`.
        command: repeats the whole run.
        machine: see `machine`.
    """

    suite: str
    device: str
    title: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    command: str = dataclasses.field(default_factory=this_command)
    machine: dict[str, Any] = dataclasses.field(default_factory=machine)

    def add(
        self,
        name: str,
        samples: Samples | None = None,
        *,
        command: str | None = None,
        **fields: str | int | float | bool | None,
    ) -> None:
        """Append a row.

        Args:
            name: the contender; unique among the rows.
            samples: its times, if it was timed.
            command: repeats this row alone.
            **fields: more columns. Known ones: `gb_per_s`, `peak_mb`, `psnr_db`, `max_abs_error`,
                `ratio` (text or number), `error` (why there is no number).
        """
        row: dict[str, Any] = {"name": name, **(samples.row() if samples else {})}
        for key, value in fields.items():
            plain = value.item() if isinstance(value, np.generic) else value
            row[key] = "inf" if key == "psnr_db" and plain == math.inf else plain
        if command is not None:
            row["command"] = command
        self.rows.append(row)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values, validated."""
        version = _versions(["fuseengine"]).get("fuseengine", "unversioned")
        result = {
            "schema": SCHEMA_VERSION,
            "suite": self.suite,
            "device": self.device,
            "title": self.title,
            "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "fuseengine": version,
            "command": self.command,
            "settings": self.settings,
            "machine": self.machine,
            "rows": self.rows,
            "notes": self.notes,
        }
        validate_result(result)
        return result

    def table(self, *, markdown: bool = False) -> str:
        """The rows as a table."""
        return format_table(self.rows, markdown=markdown)

    def finish(self, root: Path | None = None, *, write: bool = True) -> None:
        """Print the table and the notes, and write the result files unless told not to.

        Raises:
            ResultSchemaError: the result is not valid; nothing is written.
        """
        print(self.table())
        for note in self.notes:
            print(f"* {note}")
        if write:
            print(*self.write(root), sep="\n")

    def note_slower(self) -> None:
        """A note for every row whose ratio, the peer's time over ours, is below 1."""
        lost = [row["name"] for row in self.rows if float(str(row["ratio"]).split()[0]) < 1]
        self.notes += [f"slower than the peer: {name}" for name in lost]

    def write(self, root: Path | None = None) -> tuple[Path, Path]:
        """Write the JSON and the Markdown file, each whole or not at all.

        Args:
            root: folder of all results, by default `benchmarks/results`.

        Returns:
            Paths of the .json and the .md file,
            `<root>/<fuseengine version>/<suite>--<machine>--<device>`.

        Raises:
            ResultSchemaError: the result is not valid; nothing is written.
        """
        result = self.to_dict()
        folder = (root or RESULTS) / result["fuseengine"]
        stem = f"{self.suite}--{machine_slug(self.machine, self.device)}--{self.device}"
        paths = folder / f"{stem}.json", folder / f"{stem}.md"
        write_atomically(paths[0], json.dumps(result, indent=1, allow_nan=False) + "\n")
        write_atomically(paths[1], to_markdown(result))
        return paths


def to_markdown(result: Mapping[str, Any]) -> str:
    """A validated result as a page for a reader."""
    info, cpu = result["machine"], result["machine"]["cpu"]
    git = info["git"]
    commit = f"{git['commit']}{' + changes' if git['dirty'] else ''}" if git else "no commit"
    facts = {
        "machine": ", ".join(
            [
                f"{cpu['model']}, {cpu['cores']} cores ({' '.join(cpu['flags']) or 'no flags'})",
                *(f"{gpu['name']}, driver {gpu['driver']}" for gpu in info["gpu"]),
                f"{info['ram_gb']} GB",
                info["os"],
            ]
        ),
        "software": ", ".join(
            [f"Python {info['python']}", *(f"{k} {v}" for k, v in info["packages"].items())]
        ),
        "threads": ", ".join(f"{k}={v}" for k, v in info["threads"].items()) or "defaults",
        "settings": ", ".join(f"{k}={v}" for k, v in result["settings"].items()) or "none",
        "commit": commit,
        "date": result["created"],
    }
    lines = [f"# {result['title']}", "", f"    {result['command']}", ""]
    lines += [format_table(result["rows"], markdown=True), ""]
    lines += [f"* {note}" for note in result["notes"]]
    lines += [""] if result["notes"] else []
    lines += [f"* **{key}**: {value}" for key, value in facts.items()]
    commands = [row for row in result["rows"] if row.get("command")]
    if commands:
        lines += ["", "Repeat one row:", ""]
        lines += [f"* {row['name']}: `{row['command']}`" for row in commands]
    return "\n".join(lines) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file beside its place, then rename it; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
