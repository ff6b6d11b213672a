"""Measure every fused image of every method, on all cores."""

from __future__ import annotations

import os
import platform
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fuseengine.errors import FuseEngineError, SettingError, UnknownNameError
from fuseengine.evaluation.pairing import Case, Pairing, Refusal, UnusablePairsError
from fuseengine.metrics import METRICS, evaluate
from fuseengine.metrics.conventions import find_convention
from fuseengine.metrics.images import grey_levels as to_grey
from fuseengine.runtime.images import read_image

_T = TypeVar("_T")
_R = TypeVar("_R")

ValueRange = tuple[float, float] | Literal["minmax"] | None
"""What becomes black and white of an infrared image; None: the range of its type."""

Track = Callable[[Iterable[_T], int], Iterable[_T]]
"""Wraps an iterable of so many items to show how far it is; ``tqdm`` with its total does."""

USUAL = ("EN", "SD", "SF", "AG", "SCD", "MI", "VIF", "Qabf")
"""The metrics that most papers on infrared and visible images print."""

COLOUR, DEEP, COUNTS, CONSTANT = "colour", "16 bits", "dark 16 bits", "constant"
"""What can be said of a picture that a reader of its numbers should know."""

_COUNTS_BELOW = 16384
"""A 16-bit picture without a value from here on holds counts of a camera rather than levels."""

_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
_MOST_PROCESSES = 61
"""More than this many cannot be waited for on Windows."""


@dataclass(frozen=True)
class Latency:
    """What fusing one pair takes, frames in memory to fused frame in memory.

    Attributes:
        milliseconds: of every pair; each size was fused once before its first one was timed.
        machine: processor and number of cores, or the GPU.
        engine: model, backend and precision in one line.
        sizes: number of different frame sizes.
    """

    milliseconds: tuple[float, ...]
    machine: str
    engine: str
    sizes: int

    def percentiles(self) -> dict[str, float]:
        """p50, p90 and p99 in milliseconds."""
        values = np.percentile(self.milliseconds, (50, 90, 99))
        return dict(zip(("p50", "p90", "p99"), map(float, values), strict=True))


@dataclass(frozen=True)
class Evaluation:
    """The values of all metrics for all images of all methods.

    Attributes:
        methods: names.
        metrics: keys of :data:`fuseengine.metrics.METRICS`.
        cases: what was measured.
        values: float64 (methods, cases, metrics); NaN where a metric is undefined.
        convention: of the metrics.
        infrared_range: how infrared images were brought to 8 bits.
        folders: role or method -> folder.
        unpaired: role or method -> files without partners.
        left_out: pairs that could not be measured.
        facts: (role or method, fact) -> names of the images it is true of.
        latencies: method -> its times, for those that were fused here.
    """

    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    cases: tuple[Case, ...]
    values: NDArray[np.float64]
    convention: str
    infrared_range: ValueRange
    folders: dict[str, Path]
    unpaired: dict[str, tuple[str, ...]]
    left_out: tuple[Refusal, ...]
    facts: dict[tuple[str, str], tuple[str, ...]]
    latencies: dict[str, Latency] = field(default_factory=dict)


@dataclass(frozen=True)
class _Settings:
    metrics: tuple[str, ...]
    convention: str
    infrared_range: ValueRange


@dataclass(frozen=True)
class _Task:
    case: Case
    method: int
    settings: _Settings


@dataclass(frozen=True)
class _Measured:
    values: dict[str, float]
    facts: tuple[tuple[int, str], ...]
    """(0 infrared, 1 visible, 2 fused; fact)"""


def measure(
    pairing: Pairing,
    *,
    metrics: Sequence[str] | None = None,
    convention: str = "default",
    infrared_range: ValueRange = None,
    jobs: int | None = None,
    skip: bool = False,
    track: Track[Any] | None = None,
) -> Evaluation:
    """Measure every case of every method.

    Metrics see 8-bit grey levels: of colour the luma Y (BT.601), of 16 bits the levels divided by
    257 and rounded, or infrared_range. Nothing is ever resized.

    Args:
        pairing: what belongs together, see :func:`fuseengine.evaluation.pairing.pair_folders`.
        metrics: keys of :data:`fuseengine.metrics.METRICS`, see :func:`choose_metrics`.
        convention: whose form of the metrics, a name of :data:`fuseengine.metrics.CONVENTIONS`.
        infrared_range: (lo, hi) or "minmax" as for an engine: what of the infrared images becomes
            0 and 255.
        jobs: processes; one per core if None. With more than one they are started anew, so a
            script needs its ``if __name__ == "__main__"``. 1 measures in this process.
        skip: leave out pairs that cannot be measured instead of raising.
        track: shows progress.

    Returns:
        The values; what was left out is in it.

    Raises:
        UnusablePairsError: pairs that cannot be measured, all in one message.
        UnknownNameError: an unknown metric or convention.
        SettingError: jobs below 1, or a worker died.
    """
    settings = _Settings(choose_metrics(metrics, convention), convention, infrared_range)
    if pairing.refused and not skip:
        raise _unusable(pairing, ())
    tasks = [
        _Task(case, method, settings)
        for case in pairing.cases
        for method in range(len(pairing.methods))
    ]
    done = run_all(_measure, tasks, jobs)
    results = dict(done if track is None else track(done, len(tasks)))
    failed = {
        result.name: result for _, result in sorted(results.items()) if isinstance(result, Refusal)
    }
    kept = tuple(case for case in pairing.cases if case.name not in failed)
    if not kept or (failed and not skip):
        raise _unusable(pairing, tuple(failed.values()))
    measured = [
        (task, result)
        for index, task in enumerate(tasks)
        if task.case.name not in failed and isinstance(result := results[index], _Measured)
    ]
    return _collect(pairing, settings, kept, measured, (*pairing.refused, *failed.values()))


def run_all(
    function: Callable[[_T], _R], tasks: Sequence[_T], jobs: int | None = None
) -> Iterator[tuple[int, _R]]:
    """``function`` of every task in processes of one thread each, as they get done.

    Args:
        function: of a module's top level.
        tasks: its arguments; they travel to the processes.
        jobs: processes; one per core if None; 1 means this process.

    Yields:
        (index of the task, result)

    Raises:
        SettingError: jobs below 1, or a process died.
    """
    if jobs is not None and jobs < 1:
        raise SettingError(f"jobs={jobs}; expected a number >= 1, or None for one per core")
    jobs = min(jobs or core_count(), len(tasks), _MOST_PROCESSES)
    if jobs <= 1:
        for index, task in enumerate(tasks):
            yield index, function(task)
        return
    # Spawned, not forked: this process may have threads of an engine, and a lock that one of them
    # holds would stay locked in a fork.
    with (
        _single_threaded(),
        ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_ignore_interrupt) as pool,
    ):
        try:
            indices = {pool.submit(function, task): index for index, task in enumerate(tasks)}
            for future in as_completed(indices):
                yield indices[future], future.result()
        except BrokenProcessPool:
            raise SettingError(
                f"one of {jobs} processes died, perhaps for want of memory; use fewer with jobs=N"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def machine_name(device: str = "cpu") -> str:
    """Processor and cores of this machine, or its GPU, for reports."""
    if device != "cpu":
        import torch

        return str(torch.cuda.get_device_name())
    name = platform.processor() or platform.machine()
    for place, pattern in (
        ("/proc/device-tree/model", r"([^\0]+)"),  # boards name themselves, their cores do not
        ("/proc/cpuinfo", r"(?m)^model name\s*: (.+)$"),
    ):
        with suppress(OSError):
            found = re.search(pattern, Path(place).read_text(encoding="utf-8", errors="replace"))
            if found:
                name = found[1].strip()
                break
    return f"{name}, {core_count()} cores"


def core_count() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def grey_levels(
    image: NDArray[np.uint8] | NDArray[np.uint16], value_range: ValueRange = None
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """A picture as the metrics take it.

    Args:
        image: uint8 (H, W) or (H, W, 3), or uint16 (H, W).
        value_range: (lo, hi) or "minmax": what becomes 0 and 255.

    Returns:
        uint8 (H, W), and what a reader of its numbers should know: :data:`COLOUR`, :data:`DEEP`,
        :data:`COUNTS`, :data:`CONSTANT`.
    """
    facts = []
    if image.ndim == 3 and (image != image[..., :1]).any():
        facts.append(COLOUR)
    if image.dtype == np.uint16:
        facts.append(DEEP)
        if value_range is None and image.max() < _COUNTS_BELOW:
            facts.append(COUNTS)
    grey = to_grey(image if value_range is None else _stretch(image, value_range))
    if (grey == grey[0, 0]).all():
        facts.append(CONSTANT)
    return grey, tuple(facts)


def read_pictures(case: Case, infrared_range: ValueRange) -> list[NDArray[np.uint8]]:
    """Infrared, visible and every fused picture as 8 bits a channel, colour kept.

    Raises:
        ImageFileError: one cannot be read.
    """
    return [
        _to_bytes(read_image(case.infrared), infrared_range),
        *(_to_bytes(read_image(path), None) for path in (case.visible, *case.fused)),
    ]


def _to_bytes(image: NDArray[Any], value_range: ValueRange) -> NDArray[np.uint8]:
    if value_range is not None:
        return _stretch(image, value_range)
    return image if image.dtype == np.uint8 else to_grey(image)


def _stretch(
    image: NDArray[Any], value_range: tuple[float, float] | Literal["minmax"]
) -> NDArray[np.uint8]:
    low, high = (float(image.min()), float(image.max())) if value_range == "minmax" else value_range
    scale = 255 / (high - low) if high > low else 0.0
    return np.rint(np.clip((image - low) * scale, 0, 255)).astype(np.uint8)


def _measure(task: _Task) -> _Measured | Refusal:
    case, settings = task.case, task.settings
    try:
        pictures = [
            grey_levels(read_image(path), value_range)
            for path, value_range in (
                (case.infrared, settings.infrared_range),
                (case.visible, None),
                (case.fused[task.method], None),
            )
        ]
        (a, _), (b, _), (fused, _) = pictures
        values = _values(fused, a, b, settings)
    except FuseEngineError as error:
        return Refusal(case.name, str(error))
    return _Measured(
        values, tuple((role, fact) for role, (_, facts) in enumerate(pictures) for fact in facts)
    )


def _values(
    fused: NDArray[np.uint8], a: NDArray[np.uint8], b: NDArray[np.uint8], settings: _Settings
) -> dict[str, float]:
    """The metrics of one image; NaN for those that need a larger one."""
    convention = find_convention(settings.convention)
    fitting = [
        key
        for key in settings.metrics
        if METRICS[convention.variant(key)].min_side <= min(fused.shape)
    ]
    values = evaluate(fused, a, b, metrics=fitting, convention=settings.convention)
    return {key: values.get(key, np.nan) for key in settings.metrics}


def choose_metrics(metrics: Sequence[str] | None, convention: str = "default") -> tuple[str, ...]:
    """Keys of the metrics to compute.

    Args:
        metrics: keys; ``["all"]`` for every metric that is one of its own; None for those that the
            convention's paper prints, or :data:`USUAL`.
        convention: a name of :data:`fuseengine.metrics.CONVENTIONS`.

    Raises:
        UnknownNameError: an unknown metric or convention.
    """
    printed = find_convention(convention).prints
    if metrics is None:
        return printed or USUAL
    if list(metrics) == ["all"]:
        return tuple(key for key, metric in METRICS.items() if metric.default)
    for key in metrics:
        if key not in METRICS:
            raise UnknownNameError("metric", key, [*METRICS, "all"])
    return tuple(metrics)


def _unusable(pairing: Pairing, failed: Sequence[Refusal]) -> UnusablePairsError:
    total = len(pairing.cases) + len(pairing.refused)
    return UnusablePairsError([*pairing.refused, *failed], total)


def _collect(
    pairing: Pairing,
    settings: _Settings,
    kept: tuple[Case, ...],
    measured: Sequence[tuple[_Task, _Measured]],
    left_out: tuple[Refusal, ...],
) -> Evaluation:
    rows = {case.name: index for index, case in enumerate(kept)}
    values = np.full((len(pairing.methods), len(kept), len(settings.metrics)), np.nan)
    facts: dict[tuple[str, str], list[str]] = {}
    for task, result in measured:
        values[task.method, rows[task.case.name]] = [result.values[k] for k in settings.metrics]
        for role, fact in result.facts:
            name = ("infrared", "visible", pairing.methods[task.method])[role]
            names = facts.setdefault((name, fact), [])
            if task.case.name not in names[-1:]:  # sources are met once per method
                names.append(task.case.name)
    return Evaluation(
        methods=pairing.methods,
        metrics=settings.metrics,
        cases=kept,
        values=values,
        convention=settings.convention,
        infrared_range=settings.infrared_range,
        folders=pairing.folders,
        unpaired=pairing.unpaired,
        left_out=left_out,
        facts={key: tuple(names) for key, names in facts.items()},
    )


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Processes started meanwhile use one thread each: NumPy's libraries read these when loaded."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _ignore_interrupt() -> None:
    # Ctrl-C reaches every process of a terminal; the first one decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
