"""``compile(model)``: capture, optimise, lower with every installed backend, measure, check, choose.

Choosing happens here, once; nothing is chosen while frames are fused.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fuseengine import cache as cache_store
from fuseengine.backends import BACKENDS, get_backend
from fuseengine.demo import demo_pair
from fuseengine.engine import Choice, Engine, build_executor
from fuseengine.errors import (
    BackendUnavailableError,
    CacheError,
    CaptureError,
    CompileError,
    FuseEngineError,
    SettingError,
    UnknownNameError,
)
from fuseengine.program import Program, StageVariant
from fuseengine.report import Candidate, Report
from fuseengine.runtime.executor import Executor
from fuseengine.runtime.frames import FrameAdapter, prepare_pair
from fuseengine.stages import CachedStages, ModelStages
from fuseengine.zoo import packaged_models

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("fuseengine")

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
EFFORTS = ("quick", "full")

_MEASURED_SIZE = (480, 640)
"""Where an engine without a fixed size is measured."""

_EXACT_DB = 80.0
"""What a candidate that calls itself float32 must reach against the reference."""

Pair = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class _Settings:
    """What compile() was asked for, resolved: no "auto" device, threads a number."""

    size: tuple[int, int] | None
    device: str
    precision: str
    backend: str
    effort: str
    guard_db: float
    max_error: float
    threads: int

    @property
    def measured(self) -> tuple[int, int]:
        return self.size or _MEASURED_SIZE


def compile(  # noqa: A001
    model: nn.Module | str,
    size: tuple[int, int] | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    backend: str = "auto",
    effort: str = "quick",
    guard_db: float = 45.0,
    max_error: float = 0.1,
    examples: Sequence[tuple[Any, Any]] | None = None,
    threads: int | None = None,
    cache: bool = True,
) -> Engine:
    """Turn a fusion model into an engine.

    Every installed backend lowers the model's stages; each is timed, its fused image compared with
    the float32 eager model's, and the fastest inside the guard is kept. What was tried is in
    ``engine.report`` and in the log.

    Args:
        model: a :class:`~fuseengine.models.base.FusionModel`, any module with
            ``forward(a, b) -> fused``, or the name of a packaged model (which, once its engine is
            in the cache, needs no PyTorch).
        size: (height, width) of the frames; None gives an engine that specialises itself to each
            size it meets, measured at 480x640.
        device: "cpu", "cuda", or "auto": a CUDA device if PyTorch sees one.
        precision: "fp32", "tf32", "bf16", "fp16", or "auto": the fastest inside the guard.
        backend: "openvino", "onnxruntime", "torch", "inductor", or "auto". One asked for by name
            is used or refused, never replaced.
        effort: "quick" tries what lowers in seconds; "full" everything.
        guard_db: least PSNR of the fused image against float32, in dB (peak 1).
        max_error: largest absolute difference from float32 allowed, on the scale [0, 1].
        examples: pairs of frames of this size to check on; by default the packaged demo pair.
        threads: CPU threads; all that this process may use by default.
        cache: whether to look into and fill the cache of compiled engines.

    Returns:
        The engine.

    Raises:
        UnknownNameError: an unknown model, backend, device, precision or effort.
        BackendUnavailableError: a backend or device asked for by name cannot be used here.
        CaptureError: the model's forward cannot be captured.
        CompileError: nothing could lower the model, or what was asked for misses the guard.
    """
    begin = time.perf_counter()
    settings = _resolve(size, device, precision, backend, effort, guard_db, max_error, threads)
    usable = cache and examples is None
    if isinstance(model, str):
        key = _named_key(model, settings)
        name = model

        def load() -> nn.Module:
            from fuseengine.models.registry import load_model

            return load_model(name)

        if usable:
            found = _from_cache(key, settings, load, begin)
            if found is not None:
                return found
        _need_torch(name)
        model = load()
        program, stages = _captured(model)
    else:
        program, stages = _captured(model)
        captured = model
        key = _content_key(program, stages, settings) if usable else ""
        found = _from_cache(key, settings, lambda: captured, begin) if key else None
        if found is not None:
            return found
        usable = bool(key)
    choice, report = _search(program, stages, settings, _pairs(program, settings, examples))
    report = replace(report, seconds=time.perf_counter() - begin)
    log.info("%s", report.summary())
    if usable:
        _to_cache(key, program, stages, choice, report)
    return Engine(
        program,
        stages,
        choice,
        report,
        size=settings.size,
        device=settings.device,
        threads=settings.threads,
    )


# --- what was asked for -----------------------------------------------------------------------------


def _resolve(
    size: tuple[int, int] | None,
    device: str,
    precision: str,
    backend: str,
    effort: str,
    guard_db: float,
    max_error: float,
    threads: int | None,
) -> _Settings:
    for kind, given, known in (
        ("device", device, DEVICES),
        ("precision", precision, PRECISIONS),
        ("effort", effort, EFFORTS),
        ("backend", backend, ("auto", *BACKENDS)),
    ):
        if given not in known:
            raise UnknownNameError(kind, given, known)
    if size is not None:
        if len(size) != 2 or min(size) < 2 or any(int(n) != n for n in size):
            raise SettingError(f"size={size!r}; expected (height, width), each at least 2")
        size = int(size[0]), int(size[1])
    if threads is not None and threads < 1:
        raise SettingError(f"threads={threads}; expected a number >= 1, or None for all")
    if not guard_db > 0 or not max_error > 0:
        raise SettingError(f"guard_db={guard_db}, max_error={max_error}; expected both above 0")
    if device == "auto":
        device = "cuda" if backend in ("auto", "torch", "inductor") and _cuda_at_hand() else "cpu"
    elif device == "cuda" and not _cuda_at_hand():
        raise BackendUnavailableError(
            "device 'cuda' was asked for, but PyTorch sees no CUDA device here; use device='cpu', or "
            "install a CUDA build of PyTorch and the driver"
        )
    if backend != "auto":
        get_backend(backend, device)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return _Settings(
        size, device, precision, backend, effort, guard_db, max_error, threads or available or 1
    )


def _cuda_at_hand() -> bool:
    # Importing PyTorch takes a second: only where a driver shows a device.
    nodes = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/dxg")
    if os.name == "posix" and not any(Path(node).exists() for node in nodes):
        return False
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _need_torch(name: str) -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError(
            f"compiling {name!r} needs PyTorch, which is not installed (its engine is not in the cache "
            "either); install it with: pip install 'fuseengine[compile]'"
        ) from error


def _captured(model: nn.Module) -> tuple[Program, ModelStages]:
    from fuseengine.capture import capture

    program = capture(model)
    return program, ModelStages(model, program)


def _pairs(
    program: Program, settings: _Settings, examples: Sequence[tuple[Any, Any]] | None
) -> list[Pair]:
    """Model inputs to check on: the examples, or the demo pair and its sources exchanged."""
    size = settings.measured
    adapter = FrameAdapter(size, program.channels, program.multiple)
    if examples is None:
        infrared, visible = (_fit(frame, size) for frame in demo_pair())
        examples = [(infrared, visible), (visible[::-1], infrared[::-1])]
    pairs = []
    for infrared, visible in examples:
        for ir, vis in prepare_pair(infrared, visible):
            a, b = np.empty((2, 1, adapter.planes, *adapter.padded), dtype=np.float32)
            adapter.load(ir, vis, a, b)
            pairs.append((a, b))
    return pairs


def _fit(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    from PIL import Image

    if frame.shape[:2] == size:
        return frame
    return np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BILINEAR))


# --- the search -------------------------------------------------------------------------------------


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


def _search(
    program: Program, stages: ModelStages, settings: _Settings, pairs: list[Pair]
) -> tuple[Choice, Report]:
    references, eager_ms = _reference(stages.model, pairs, settings)
    candidates: list[Candidate] = []
    trials: list[_Trial] = []
    for backend, precision, reason in _candidates(settings, trials, eager_ms):
        if reason:
            candidates.append(Candidate(backend, precision, note=reason))
            continue
        try:
            trial = _try(program, stages, settings, backend, precision, pairs, references)
        except Exception as error:
            # A backend's library may raise anything; another one may still do.
            log.debug("%s/%s failed", backend, precision, exc_info=True)
            candidates.append(Candidate(backend, precision, note=_first_line(error)))
            continue
        note = _refusal(trial, settings)
        candidates.append(
            Candidate(backend, precision, trial.total, trial.psnr, trial.error, note)
        )
        if not note:
            trials.append(trial)
    if not trials:
        shown = "; ".join(f"{c.backend}/{c.precision}: {c.note}" for c in candidates)
        raise CompileError(
            f"nothing could run {program.model} on {settings.device} as asked "
            f"(backend={settings.backend!r}, precision={settings.precision!r}, guard "
            f"{settings.guard_db} dB): {shown}. Ask for less, or lower guard_db if that is meant."
        )
    choice, psnr, error = _choose(program, stages, settings, trials, pairs, references)
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
    )
    return choice, report


def _reference(
    model: nn.Module, pairs: list[Pair], settings: _Settings
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
            elapsed = (time.perf_counter() - begin) * 1e3
    model.train(training)
    return fused, elapsed


def _candidates(
    settings: _Settings, trials: list[_Trial], eager_ms: float
) -> Iterable[tuple[str, str, str]]:
    """(backend, precision, why not) in the order to try."""
    named = settings.backend != "auto"
    for name, backend in BACKENDS.items():
        if named and name != settings.backend:
            continue
        reason = backend.unavailable(settings.device)
        if reason:
            yield name, settings.precision, reason
            continue
        if not named and not backend.quick and settings.effort == "quick":
            yield name, settings.precision, "slow to compile; tried with effort='full'"
            continue
        offered = backend.precisions(settings.device)
        wanted = offered if settings.precision == "auto" else (settings.precision,)
        for precision in wanted:
            if precision not in offered:
                yield name, precision, f"offers {', '.join(offered)} only"
                continue
            best = min((trial.total for trial in trials), default=float("inf"))
            slow = name == "torch" and settings.device == "cpu" and eager_ms > 2 * best
            if slow and not named and settings.effort == "quick":
                yield name, precision, f"eager took {eager_ms:.0f} ms, {eager_ms / best:.1f} x the best"
                continue
            yield name, precision, ""


def _try(
    program: Program,
    stages: ModelStages,
    settings: _Settings,
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
    psnr, error = _errors(executor, pairs, references)
    runs = 5 if settings.effort == "quick" else 20
    timings = executor.profile(runs)
    # The minimum is the least disturbed on a shared machine; ratios are what counts here.
    times: dict[StageVariant, float] = {}
    for timing in timings:
        if timing.variant is not None:
            times[timing.variant] = times.get(timing.variant, 0.0) + float(timing.samples.min())
    total = sum(float(timing.samples.min()) for timing in timings)
    return _Trial(backend, precision, executor, times, total, psnr, error)


def _errors(
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
        # A picture of NaN has no error; it is refused by the comparison in _refusal.
        psnr = min(psnr, -10 * np.log10(square)) if square != 0 else min(psnr, 200.0)
        error = max(error, float(np.abs(difference).max()))
        if not np.isfinite(square):
            return float("-inf"), float("inf")
    return float(psnr), error


def _refusal(trial: _Trial, settings: _Settings) -> str:
    least = _EXACT_DB if trial.precision == "fp32" else settings.guard_db
    if not trial.psnr >= least:
        return f"refused: {trial.psnr:.1f} dB is below the guard's {least:.0f} dB"
    if not trial.error <= settings.max_error:
        return f"refused: an error of {trial.error:.2g} is above {settings.max_error:.2g}"
    return ""


def _choose(
    program: Program,
    stages: ModelStages,
    settings: _Settings,
    trials: list[_Trial],
    pairs: list[Pair],
    references: list[NDArray[np.float32]],
) -> tuple[dict[StageVariant, tuple[str, str]], float, float]:
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
        return uniform, whole.psnr, whole.error
    size = pairs[0][0].shape[2:]
    executor = build_executor(
        program, stages, mixed, (size[0], size[1]), settings.device, settings.threads
    )
    psnr, error = _errors(executor, pairs, references)
    if psnr >= settings.guard_db and error <= settings.max_error:
        return mixed, psnr, error
    return uniform, whole.psnr, whole.error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    shown = text[0] if text else type(error).__name__
    if not isinstance(error, FuseEngineError):
        shown = f"{type(error).__name__}: {shown}"
    return shown[:120]


# --- the cache --------------------------------------------------------------------------------------


def _named_key(name: str, settings: _Settings) -> str:
    packaged = packaged_models()
    if name not in packaged:
        raise UnknownNameError("packaged model", name, packaged)
    model = packaged[name]
    weights = np.frombuffer(model.weights.read_bytes(), dtype=np.uint8)
    card = json.dumps(model.settings, sort_keys=True)
    content = cache_store.fingerprint([("weights", weights)], name, card)
    return cache_store.key_of({"model": content, **vars(settings)})


def _content_key(program: Program, stages: ModelStages, settings: _Settings) -> str:
    """Key of what was really captured; empty where the networks cannot be written quickly."""
    from fuseengine.export.onnx import UnsupportedLayerError

    try:
        networks = [(v.label, stages.onnx(v)) for v in program.variants()]
    except UnsupportedLayerError:
        return ""
    arrays = [(label, np.frombuffer(content, dtype=np.uint8)) for label, content in networks]
    content = cache_store.fingerprint([*arrays, *program.constants.items()], program.to_json())
    return cache_store.key_of({"content": content, **vars(settings)})


def _to_cache(
    key: str, program: Program, stages: ModelStages, choice: Choice, report: Report
) -> None:
    variants = list(program.variants())
    files = {
        "program.json": program.to_json().encode(),
        "constants.npz": cache_store.pack_arrays(dict(program.constants)),
        "report.json": json.dumps(report.to_dict()).encode(),
        "choice.json": json.dumps(
            [[v.stage, list(v.use), *choice[v], f"{i}.onnx"] for i, v in enumerate(variants)]
        ).encode(),
    }
    for index, variant in enumerate(variants):
        if variant in stages.written:
            files[f"{index}.onnx"] = stages.written[variant]
    try:
        cache_store.store(key, files)
    except CacheError as error:
        log.warning("%s", error)


def _from_cache(
    key: str, settings: _Settings, load: Callable[[], nn.Module], begin: float
) -> Engine | None:
    files = cache_store.load(key)
    if files is None:
        return None
    try:
        constants = cache_store.unpack_arrays(files["constants.npz"])
        program = Program.from_json(files["program.json"].decode(), constants)
        report = Report.from_dict(json.loads(files["report.json"]))
        choice: dict[StageVariant, tuple[str, str]] = {}
        networks: dict[StageVariant, bytes] = {}
        for stage, use, backend, precision, file in json.loads(files["choice.json"]):
            variant = StageVariant(stage, tuple(use))
            choice[variant] = (backend, precision)
            if file in files:
                networks[variant] = files[file]
    except (KeyError, ValueError, TypeError, CaptureError) as error:
        log.warning("cache entry %s is unreadable (%r) and compiled again", key, error)
        return None
    engine = Engine(
        program,
        CachedStages(networks, load),
        choice,
        report,
        size=settings.size,
        device=settings.device,
        threads=settings.threads,
    )
    elapsed = time.perf_counter() - begin
    engine.report = replace(report, from_cache=True, seconds=elapsed)
    log.info("%s", engine.report.summary())
    return engine
