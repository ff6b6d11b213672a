"""``compile(model)``: from a model, or the name of a packaged one, to an engine."""

from __future__ import annotations

import logging
import operator
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fuseengine import cached_engine
from fuseengine.backends import BACKENDS, get_backend
from fuseengine.cache import fingerprint
from fuseengine.description import Description
from fuseengine.engine import Engine, available_threads
from fuseengine.errors import (
    BackendUnavailableError,
    FrameError,
    SettingError,
    UnknownNameError,
)
from fuseengine.program import Program
from fuseengine.search import Settings, check_pairs, search
from fuseengine.stages import ModelStages

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("fuseengine")

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16", "int8")
DEVICES = ("auto", "cpu", "cuda")
EFFORTS = ("quick", "full")
TEMPORAL = ("warm",)


def compile(
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
    calibration: Sequence[tuple[Any, Any]] | None = None,
    threads: int | None = None,
    portable: bool = False,
    temporal: str | None = None,
    warm_steps: int | None = None,
    merge: bool = True,
    cache: bool = True,
) -> Engine:
    """Turn a fusion model into an engine.

    Every installed backend lowers the model's stages; each is timed, its fused image compared with
    the float32 eager model's, and the fastest inside the guard is kept. What was tried is in
    ``engine.report`` and in the log.

    Capturing patches ``torch.nn.Module`` for a moment: do not run PyTorch models in other threads
    meanwhile.

    Args:
        model: a :class:`~fuseengine.models.base.FusionModel`, any module with
            ``forward(a, b) -> fused``, or the name of a packaged model (which, once its engine is
            in the cache, needs no PyTorch).
        size: (height, width) of the frames; None gives an engine that specialises itself to each
            size it meets, measured at 480x640.
        device: "cpu", "cuda", or "auto": a CUDA device if PyTorch sees one.
        precision: "fp32", "tf32", "bf16", "fp16", "int8", or "auto": the fastest inside the guard;
            int8 is among them where calibration is given, or with effort="full". Int8 keeps as
            few layers float as the guard asks for; the report names them.
        backend: "openvino", "onnxruntime", "torch", "inductor", "tensorrt", or "auto". One asked
            for by name is used or refused, never replaced.
        effort: "quick" tries what lowers in seconds; "full" everything.
        guard_db: least PSNR of the fused image against float32, in dB (peak 1).
        max_error: largest absolute difference from float32 allowed, on the scale [0, 1].
        examples: pairs of frames of this size to check on; by default the packaged demo pair.
        calibration: pairs of frames, (infrared, visible), of any size, that int8's ranges are read
            from: ten to fifty of what the engine will see. By default the demo pair and variations
            of it, which know one scene.
        threads: CPU threads; all that this process may use by default.
        portable: choose among what :meth:`Engine.save` can write: no stage runs on PyTorch.
        temporal: "warm": for video. The engine also holds a program with fewer sampling steps for
            a frame that starts from what the one before became; see
            :class:`fuseengine.Memory`.
        warm_steps: how many steps that are; by default what the model says is enough.
        merge: whether stages may be merged into one network where a frame takes long. It runs
            faster, but may load more slowly and take more memory (``dmfuse-s``: a quarter less
            per frame, 5 s to load where stages apart take 2); False where a cold start counts.
        cache: whether to look into and fill the cache of compiled engines.

    Returns:
        The engine.

    Raises:
        UnknownNameError: an unknown model, backend, device, precision or effort.
        BackendUnavailableError: a backend or device asked for by name cannot be used here.
        CaptureError: the model's forward cannot be captured.
        CompileError: nothing could lower the model, or what was asked for misses the guard.
        FrameError: a calibration pair or an example cannot be used.
        SettingError: a setting outside what is allowed; temporal="warm" of a model whose sampling
            cannot start from a picture.
    """
    begin = time.perf_counter()
    settings = _resolve(size, device, precision, backend, effort, guard_db, max_error, threads)
    settings = replace(
        settings,
        calibration=_calibration_key(calibration),
        portable=portable,
        resumed_steps=resumed_steps(temporal, warm_steps),
        merge=merge,
    )
    if portable and backend in BACKENDS and BACKENDS[backend].needs_module:
        raise SettingError(
            f"backend={backend!r}: it runs the PyTorch module, which no bundle holds; expected "
            "'auto', 'openvino', 'onnxruntime' or 'tensorrt'"
        )
    usable = cache and examples is None
    if isinstance(model, str):
        key = cached_engine.named_key(model, settings)
        name = model

        def load() -> nn.Module:
            from fuseengine.models.registry import load_model

            return load_model(name)

        if usable:
            found = cached_engine.load(key, settings, load)
            if found is not None:
                return _timed(found, begin)
        _need_torch(name)
        model = load()
        program, stages = _captured(model)
    elif not callable(getattr(model, "forward", None)):
        raise SettingError(
            f"model: got a {type(model).__name__}; expected a torch.nn.Module with "
            "forward(a, b) -> fused, or the name of a packaged model"
        )
    else:
        program, stages = _captured(model)
        captured = model
        key = cached_engine.content_key(program, stages, settings) if usable else ""
        found = cached_engine.load(key, settings, lambda: captured) if key else None
        if found is not None:
            return _timed(found, begin)
        usable = bool(key)
    resumed = _resumed(model, program, settings)
    best = search(program, stages, settings, check_pairs(program, settings, examples), calibration)
    if usable:
        description = Description(
            best.program, best.choice, best.report, settings.size, settings.device, resumed
        )
        cached_engine.store(key, description, best.stages)
    engine = Engine(
        best.program,
        best.stages,
        best.choice,
        best.report,
        size=settings.size,
        device=settings.device,
        threads=settings.threads,
        ready=best.executor,
        resumed=resumed,
    )
    return _timed(engine, begin)


def resumed_steps(temporal: str | None, warm_steps: int | None) -> int | None:
    """What ``Settings.resumed_steps`` are, of what :func:`compile` is given.

    Raises:
        UnknownNameError, SettingError: it cannot be used.
    """
    if temporal is None:
        if warm_steps is not None:
            raise SettingError(f"warm_steps={warm_steps} without temporal; give temporal='warm'")
        return None
    if temporal not in TEMPORAL:
        raise UnknownNameError("temporal", temporal, TEMPORAL)
    if warm_steps is not None and warm_steps < 1:
        raise SettingError(f"warm_steps={warm_steps}; expected 1 or more")
    return warm_steps or 0


def _timed(engine: Engine, begin: float) -> Engine:
    engine.report = replace(engine.report, seconds=time.perf_counter() - begin)
    log.info("%s", engine.report.summary())
    return engine


def _resolve(
    size: tuple[int, int] | None,
    device: str,
    precision: str,
    backend: str,
    effort: str,
    guard_db: float,
    max_error: float,
    threads: int | None,
) -> Settings:
    for kind, given, known in (
        ("device", device, DEVICES),
        ("precision", precision, PRECISIONS),
        ("effort", effort, EFFORTS),
        ("backend", backend, ("auto", *BACKENDS)),
    ):
        if given not in known:
            raise UnknownNameError(kind, given, known)
    if size is not None:
        try:
            height, width = (operator.index(n) for n in size)
        except (TypeError, ValueError):
            height = width = 0
        if min(height, width) < 2:
            raise SettingError(
                f"size={size!r}; expected (height, width), two integers of at least 2"
            )
        size = height, width
    if threads is not None and threads < 1:
        raise SettingError(f"threads={threads}; expected a number >= 1, or None for all")
    if not guard_db > 0 or not max_error > 0:
        raise SettingError(f"guard_db={guard_db}, max_error={max_error}; expected both above 0")
    if device == "auto":
        on_gpu = ("auto", "torch", "inductor", "tensorrt")
        device = "cuda" if backend in on_gpu and _cuda_at_hand() else "cpu"
    elif device == "cuda" and not _cuda_at_hand():
        raise BackendUnavailableError(
            "device 'cuda' was asked for, but PyTorch sees no CUDA device here; use device='cpu', "
            "or install a CUDA build of PyTorch and the driver"
        )
    if backend != "auto":
        get_backend(backend, device)
    threads = threads or available_threads()
    return Settings(size, device, precision, backend, effort, guard_db, max_error, threads)


def _calibration_key(pairs: Sequence[tuple[Any, Any]] | None) -> str:
    """Hash of calibration frames for the cache; empty for None. Their values are checked later."""
    if pairs is None:
        return ""
    if not len(pairs):
        raise SettingError(
            "calibration: got no pairs; expected at least one, better ten to fifty that look like "
            "what the engine will see"
        )
    frames = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise FrameError(
                f"calibration pair {number}: got a {type(pair).__name__}; expected two frames, "
                "(infrared, visible)"
            )
        frames += [(f"{number}.{place}", np.asarray(frame)) for place, frame in enumerate(pair)]
    return fingerprint(frames)


def _cuda_at_hand() -> bool:
    # Importing PyTorch takes a second: only where a driver shows a device.
    nodes = ("nvidia[0-9]*", "nvhost-gpu", "nvgpu", "dxg")
    if os.name == "posix" and not any(any(Path("/dev").glob(node)) for node in nodes):
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
            f"compiling {name!r} needs PyTorch, which is not installed (its engine is not in the "
            "cache either); install it with: pip install 'fuseengine[compile]'"
        ) from error


def _resumed(model: nn.Module, program: Program, settings: Settings) -> Program | None:
    if settings.resumed_steps is None:
        return None
    from fuseengine.tracing import capture_resumed

    return capture_resumed(model, program, settings.resumed_steps)


def _captured(model: nn.Module) -> tuple[Program, ModelStages]:
    from fuseengine.tracing import capture

    program = capture(model)
    return program, ModelStages(model, program)
