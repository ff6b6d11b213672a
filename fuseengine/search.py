"""The search behind ``compile()``: lower with every candidate, check, time, choose.

Choosing happens here, once; nothing is chosen while frames are fused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fuseengine.backends import BACKENDS
from fuseengine.backends.base import network_kind
from fuseengine.demo import demo_pair
from fuseengine.description import Choice
from fuseengine.engine import build_executor
from fuseengine.errors import CompileError, FuseEngineError
from fuseengine.pairs import Pair, model_inputs
from fuseengine.program import Program, StageVariant
from fuseengine.report import Candidate, Report
from fuseengine.runtime.executor import Executor
from fuseengine.stages import ModelStages

if TYPE_CHECKING:
    from torch import nn

    from fuseengine.export.merged import MergedStages

log = logging.getLogger("fuseengine")

_EXACT_DB = 80.0
"""What a candidate that calls itself float32 must reach against the reference."""

_QUICK_SECONDS = 0.4
"""Time that a quick search spends on timing one candidate, about."""

_WORTH_MERGING_MS = 250.0
"""Merging is tried from here: below, what a frame saves hardly pays for the longer search."""

_MERGED_AT_MOST = 0.93
"""Of the time of stages apart: merged ones are taken below. They repeat what a loop repeats, so
they load up to twice as long and take more memory, which a few percent are not worth.
"""


@dataclass(frozen=True)
class Settings:
    """What compile() was asked for, resolved: no "auto" device, threads a number."""

    size: tuple[int, int] | None
    device: str
    precision: str
    backend: str
    effort: str
    guard_db: float
    max_error: float
    threads: int
    calibration: str = ""
    """Hash of the calibration frames; empty without any."""
    portable: bool = False
    """Whether backends that need the PyTorch module are left out."""
    resumed_steps: int | None = None
    """Steps of a frame that starts from the one before; 0: the model's own choice."""
    merge: bool = True
    """Whether merged stages may be tried."""

    @property
    def measured(self) -> tuple[int, int]:
        """The frame size to measure at: an engine without a fixed size is measured at VGA."""
        return self.size or (480, 640)


@dataclass
class _Trial:
    """A candidate that ran: its times per variant and its error."""

    backend: str
    precision: str
    executor: Executor
    times: dict[StageVariant, float]
    total: float
    psnr: float
    error: float


class Found(NamedTuple):
    """What a search came to.

    Attributes:
        program: the captured model, or one of merged stages that is faster.
        stages: its networks.
        choice: backend and precision per stage variant.
        report: the record of what was tried.
        executor: the one that was measured, for the engine to go on with.
    """

    program: Program
    stages: ModelStages | MergedStages
    choice: Choice
    report: Report
    executor: Executor


def search(
    program: Program,
    stages: ModelStages,
    settings: Settings,
    pairs: list[Pair],
    calibration: Sequence[tuple[Any, Any]] | None = None,
) -> Found:
    """Find the fastest lowering inside the guard.

    Args:
        program: the captured model.
        stages: its networks.
        settings: what was asked for.
        pairs: model inputs to check and time on, see :func:`check_pairs`.
        calibration: pairs of frames that int8 is calibrated on; the demo pair and variations of it
            by default.

    Returns:
        The program and its networks, what was chosen, the record, and the executor.

    Raises:
        CompileError: no candidate could be lowered and passed the guard.
        FrameError: a calibration pair cannot be used.
    """
    references, eager_ms = reference_pictures(stages.model, pairs, settings)
    int8 = Int8Networks(program, stages, settings, calibration)
    candidates: list[Candidate] = []
    trials: list[_Trial] = []
    for backend, precision, reason in _candidates(settings, trials, eager_ms):
        if reason:
            candidates.append(Candidate(backend, precision, note=reason))
            continue
        try:
            if network_kind(precision) == "int8":
                int8.prepare(pairs, references)
            trial = _try(program, stages, settings, backend, precision, pairs, references)
        except Exception as failure:
            # A backend's library may raise anything; another one may still do.
            log.debug("%s/%s failed", backend, precision, exc_info=True)
            candidates.append(Candidate(backend, precision, note=_first_line(failure)))
            continue
        note = _refusal(trial, settings)
        candidates.append(Candidate(backend, precision, trial.total, trial.psnr, trial.error, note))
        if not note:
            trials.append(trial)
    if not trials:
        shown = "; ".join(f"{c.backend}/{c.precision}: {c.note}" for c in candidates)
        raise CompileError(
            f"nothing could run {program.model} on {settings.device} as asked "
            f"(backend={settings.backend!r}, precision={settings.precision!r}, guard "
            f"{settings.guard_db} dB): {shown}. Ask for less, or lower guard_db if that is meant."
        )
    choice, psnr, error, executor = _choose(program, stages, settings, trials, pairs, references)
    kept = set(choice.values())
    report = Report(
        model=program.model,
        size=settings.measured,
        device=settings.device,
        choice={v.label: "/".join(how) for v, how in choice.items()},
        candidates=tuple(
            replace(c, note="chosen") if (c.backend, c.precision) in kept else c for c in candidates
        ),
        guard_db=settings.guard_db,
        psnr_db=psnr,
        max_error=error,
        seconds=0.0,
        threads=settings.threads,
        quantised=int8.record,
    )
    found = Found(program, stages, choice, report, executor)
    return _merged(found, settings, trials, pairs, references)


class Int8Networks:
    """Quantised networks of the stages, made when the first candidate needs them.

    Attributes:
        record: how they were made, for the report; None before.
    """

    def __init__(
        self,
        program: Program,
        stages: ModelStages,
        settings: Settings,
        calibration: Sequence[tuple[Any, Any]] | None,
    ) -> None:
        self.program, self.stages, self.settings = program, stages, settings
        self.pictures = "the demo pair and variations of it"
        self.pairs: list[Pair] | None = None
        self.record: dict[str, Any] | None = None
        self.failure: Exception | None = None
        if calibration is not None:
            from fuseengine.export.calibration import calibration_pairs

            # Here, because a bad picture is the caller's error and no candidate's.
            self.pairs = calibration_pairs(program, calibration)
            self.pictures = f"{len(self.pairs)} given pairs"

    def prepare(self, pairs: list[Pair], references: list[NDArray[np.float32]]) -> None:
        """Make the networks, once; what went wrong is raised again for every candidate."""
        if self.failure is not None:
            raise self.failure
        if self.record is not None:
            return
        from fuseengine.export.calibration import calibration_pairs
        from fuseengine.export.quantize import quantise_stages

        try:
            quantised = quantise_stages(
                self.program,
                self.stages,
                self.pairs or calibration_pairs(self.program, None),
                guard_db=self.settings.guard_db,
                max_error=self.settings.max_error,
                check=pairs,
                references=references,
                threads=self.settings.threads,
            )
        except Exception as failure:
            self.failure = failure
            raise
        self.stages.int8 = dict(quantised.networks)
        self.record = {"pictures": self.pictures, **quantised.record}


def reference_pictures(
    model: nn.Module, pairs: list[Pair], settings: Settings
) -> tuple[list[NDArray[np.float32]], float]:
    """The eager model's fused images in float32, and its time for the last one in ms."""
    import torch

    training, elapsed, fused = model.training, 0.0, []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if settings.device == "cpu":
        torch.set_num_threads(settings.threads)
    model.eval()
    exact = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=False, allow_tf32=False
    )
    with torch.inference_mode(), exact:
        for pair in pairs:
            begin = time.perf_counter()
            result = model(*(torch.from_numpy(x).to(device) for x in pair))
            fused.append(result.float().cpu().numpy())
            elapsed = time.perf_counter() - begin
        if elapsed < _QUICK_SECONDS:
            # Cheap enough to time once more, now that everything has been set up.
            begin = time.perf_counter()
            model(*(torch.from_numpy(x).to(device) for x in pairs[-1])).cpu()
            elapsed = time.perf_counter() - begin
    model.train(training)
    return fused, elapsed * 1e3


def _candidates(
    settings: Settings, trials: list[_Trial], eager_ms: float
) -> Iterable[tuple[str, str, str]]:
    """(backend, precision, why not) in the order to try."""
    named = settings.backend != "auto"
    for name, backend in BACKENDS.items():
        if named and name != settings.backend:
            continue
        reason = backend.unavailable(settings.device)
        if settings.portable and backend.needs_module:
            reason = "runs the PyTorch module, which no bundle holds"
        if reason:
            yield name, settings.precision, reason
            continue
        if not named and not backend.quick and settings.effort == "quick":
            yield name, settings.precision, "slow to compile; tried with effort='full'"
            continue
        offered = backend.precisions(settings.device)
        for precision in _wanted(settings, offered):
            if precision not in offered:
                yield name, precision, f"offers {', '.join(offered)} only"
                continue
            asked = settings.precision != "auto" or settings.calibration
            if network_kind(precision) == "int8" and not asked and settings.effort == "quick":
                yield name, precision, "needs calibration; tried when given, or with effort='full'"
                continue
            best = min((trial.total for trial in trials), default=float("inf"))
            slow = name == "torch" and settings.device == "cpu" and eager_ms > 2 * best
            if slow and not named and settings.effort == "quick":
                yield (
                    name,
                    precision,
                    f"eager took {eager_ms:.3g} ms, {eager_ms / best:.1f} x the best",
                )
                continue
            yield name, precision, ""


def _wanted(settings: Settings, offered: tuple[str, ...]) -> tuple[str, ...]:
    """The precisions to try of those that a backend offers, or the one that it should have."""
    if settings.precision == "auto":
        return offered
    if settings.precision == "int8":  # whatever the rest is in
        found = tuple(name for name in offered if network_kind(name) == "int8")
        return found or ("int8",)
    return (settings.precision,)


def _try(
    program: Program,
    stages: ModelStages | MergedStages,
    settings: Settings,
    backend: str,
    precision: str,
    pairs: list[Pair],
    references: list[NDArray[np.float32]],
) -> _Trial:
    choice = dict.fromkeys(program.variants(), (backend, precision))
    size = pairs[0][0].shape[2:]
    executor = build_executor(
        program, stages, choice, (size[0], size[1]), settings.device, settings.threads
    )
    psnr, error = picture_errors(executor, pairs, references)
    runs = 20
    if settings.effort == "quick":
        runs = min(5, max(1, round(_QUICK_SECONDS * 1e3 / _whole(executor))))
    # The minimum is the least disturbed on a shared machine; ratios are what counts here.
    times: dict[StageVariant, float] = {}
    for timing in executor.profile(runs):
        if timing.variant is not None:
            times[timing.variant] = times.get(timing.variant, 0.0) + float(timing.samples.min())
    total = min(_whole(executor) for _ in range(runs))
    return _Trial(backend, precision, executor, times, total, psnr, error)


def _whole(executor: Executor) -> float:
    """Milliseconds of one run of the program as frames run it (on a GPU: the captured graph)."""
    executor.device.synchronize()
    begin = time.perf_counter()
    executor.run()
    executor.device.synchronize()
    return (time.perf_counter() - begin) * 1e3


def picture_errors(
    executor: Executor, pairs: list[Pair], references: list[NDArray[np.float32]]
) -> tuple[float, float]:
    """Worst PSNR in dB (peak 1) and largest absolute error over the pairs."""
    psnr, error = float("inf"), 0.0
    device = executor.device
    for pair, reference in zip(pairs, references, strict=True):
        for target, source in zip(executor.inputs, pair, strict=True):
            target[...] = device.constant(source)
        executor.run()
        device.synchronize()
        fused = executor.output
        fused = fused if isinstance(fused, np.ndarray) else fused.cpu().numpy()
        difference = fused.astype(np.float64) - reference
        square = float((difference**2).mean())
        if not np.isfinite(square):
            return float("-inf"), float("inf")
        # Equal pictures have no PSNR; 200 dB stands for it.
        psnr = min(psnr, -10 * float(np.log10(square)) if square else 200.0)
        error = max(error, float(np.abs(difference).max()))
    return psnr, error


def _refusal(trial: _Trial, settings: Settings) -> str:
    least = _EXACT_DB if trial.precision == "fp32" else settings.guard_db
    if not trial.psnr >= least:
        return f"refused: {trial.psnr:.1f} dB is below the guard's {least:.0f} dB"
    if not trial.error <= settings.max_error:
        return f"refused: an error of {trial.error:.2g} is above {settings.max_error:.2g}"
    return ""


def _choose(
    program: Program,
    stages: ModelStages,
    settings: Settings,
    trials: list[_Trial],
    pairs: list[Pair],
    references: list[NDArray[np.float32]],
) -> tuple[dict[StageVariant, tuple[str, str]], float, float, Executor]:
    """The fastest backend per variant; the fastest single one if that mixture misses the guard."""
    whole = min(trials, key=lambda trial: trial.total)
    uniform = dict.fromkeys(program.variants(), (whole.backend, whole.precision))
    mixed = {}
    for variant in program.variants():
        best = min(trials, key=lambda trial: trial.times[variant])
        # Two runtimes have two thread pools and two copies of memory: only for a clear gain.
        clear = best.times[variant] < 0.9 * whole.times[variant]
        trial = best if clear else whole
        mixed[variant] = (trial.backend, trial.precision)
    if mixed == uniform:
        return uniform, whole.psnr, whole.error, whole.executor
    size = pairs[0][0].shape[2:]
    executor = build_executor(
        program, stages, mixed, (size[0], size[1]), settings.device, settings.threads
    )
    psnr, error = picture_errors(executor, pairs, references)
    if psnr >= settings.guard_db and error <= settings.max_error:
        return mixed, psnr, error, executor
    return uniform, whole.psnr, whole.error, whole.executor


def _merged(
    found: Found,
    settings: Settings,
    trials: list[_Trial],
    pairs: list[Pair],
    references: list[NDArray[np.float32]],
) -> Found:
    """What was found, or the same with its stages merged where that is clearly faster."""
    usable = [
        trial
        for trial in trials
        if not BACKENDS[trial.backend].needs_module and network_kind(trial.precision) == "fp32"
    ]
    alone = settings.device == "cpu" and settings.resumed_steps is None
    if not settings.merge or not alone or not usable or _whole(found.executor) < _WORTH_MERGING_MS:
        return found
    from fuseengine.export.merged import merge

    assert isinstance(found.stages, ModelStages)
    made = merge(found.program, found.stages)
    if made is None:
        return found
    best = min(usable, key=lambda trial: trial.total)
    program, stages = made
    how = (best.backend, best.precision)
    try:
        trial = _try(program, stages, settings, *how, pairs, references)
    except Exception as failure:
        log.debug("merged stages on %s failed", how, exc_info=True)
        return _with_candidate(found, Candidate(*how, note=f"merged: {_first_line(failure)}"))
    tried = Candidate(*how, trial.total, trial.psnr, trial.error)
    refused = _refusal(trial, settings)
    if refused:
        return _with_candidate(found, replace(tried, note=f"merged stages: {refused}"))
    # In turns: the two were measured seconds apart.
    turns = [(_whole(found.executor), _whole(trial.executor)) for _ in range(5)]
    apart, together = (min(times) for times in zip(*turns, strict=True))
    if together > _MERGED_AT_MOST * apart:
        note = f"merged stages: {together / apart:.2f} of the time apart"
        return _with_candidate(found, replace(tried, note=note))
    choice = dict.fromkeys(program.variants(), how)
    report = replace(
        found.report,
        choice={v.label: "/".join(how) for v in choice},
        candidates=tuple(
            replace(c, note="stages apart" if c.note == "chosen" else c.note)
            for c in found.report.candidates
        ),
        psnr_db=trial.psnr,
        max_error=trial.error,
    )
    found = Found(program, stages, choice, report, trial.executor)
    return _with_candidate(found, replace(tried, note="chosen: merged stages"))


def _with_candidate(found: Found, candidate: Candidate) -> Found:
    candidates = (*found.report.candidates, candidate)
    return found._replace(report=replace(found.report, candidates=candidates))


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    shown = text[0] if text else type(error).__name__
    if not isinstance(error, FuseEngineError):
        shown = f"{type(error).__name__}: {shown}"
    return shown[:120]


def check_pairs(
    program: Program, settings: Settings, examples: Sequence[tuple[Any, Any]] | None
) -> list[Pair]:
    """Model inputs to check on: the examples, or the demo pair (and its sources exchanged)."""
    size = settings.measured
    if examples is None:
        infrared, visible = demo_pair(size)
        examples = [(infrared, visible)]
        if settings.effort == "full":
            examples.append((visible[::-1], infrared[::-1]))
    return model_inputs(program, size, examples)
