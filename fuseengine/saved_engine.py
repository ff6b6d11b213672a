"""Engines as files: ``Engine.save(path)`` and ``fuseengine.load(path)``. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform

import numpy as np

from fuseengine.backends import BACKENDS, StageSource, get_backend
from fuseengine.backends.base import network_kind
from fuseengine.description import Choice, Description
from fuseengine.engine import Engine, available_threads
from fuseengine.errors import BackendUnavailableError, BundleError, FuseEngineError, SettingError
from fuseengine.program import StageVariant
from fuseengine.report import Report
from fuseengine.runtime import bundle
from fuseengine.runtime.bundle import BuiltFor, Bundle
from fuseengine.runtime.gpu import gpus

_SMALL = (64, 64)
"""Height and width at which an engine of any size is tried."""


def save(
    path: str | os.PathLike[str], engine: Engine, target: tuple[str, str] | None = None
) -> None:
    """Write an engine as a bundle; see :meth:`fuseengine.engine.Engine.save`.

    Args:
        path: file to write.
        engine: the engine.
        target: name and title of what it is for; this machine by default.
    """
    source, choice = engine.source, engine.choice
    if isinstance(source, Bundle) and source.description.choice == choice:
        source.copy(path)  # with the kernels and plans in it
        return
    description = Description(
        engine.program, choice, engine.report, engine.size, engine.device, engine.resumed
    )
    bundle.write(
        path,
        description,
        stored_networks(source, choice),
        target=_this(engine.device) if target is None else BuiltFor(*target, None),
        verified=_verified(engine.report),
    )


def stored_networks(source: StageSource, choice: Choice) -> dict[tuple[StageVariant, str], bytes]:
    """The networks that a bundle of an engine holds.

    The float32 ones are always among them: ``fuseengine verify`` compares with them, and every
    backend can run them.

    Raises:
        BundleError: a stage runs on PyTorch.
    """
    networks: dict[tuple[StageVariant, str], bytes] = {}
    for variant, (backend, precision) in choice.items():
        if BACKENDS[backend].needs_module:
            raise BundleError(
                f"the stage {variant.label} runs on {backend!r}, which needs the PyTorch module; "
                "expected stages that a bundle holds: compile with portable=True before saving"
            )
        networks[variant, "fp32"] = source.onnx(variant)
        kind = network_kind(precision)
        if kind != "fp32":
            networks[variant, kind] = source.onnx(variant, kind)
        elif backend == "tensorrt" and precision in ("fp16", "bf16"):
            from fuseengine.backends.tensorrt import typed_network

            networks[variant, precision] = typed_network(source, variant, precision)
    return networks


def _this(device: str) -> BuiltFor:
    """This machine, as what an engine was compiled for."""
    if device == "cpu":
        return BuiltFor("this", f"CPU, {platform.machine()}", None)
    gpu = gpus()[0]
    return BuiltFor("this", gpu.name, gpu.capability)


def _verified(report: Report) -> list[str]:
    if math.isnan(report.psnr_db):
        return []
    height, width = report.size
    return [
        f"all stages and ops on {report.device}, {width}x{height}: fused image against PyTorch in "
        f"float32, {report.psnr_db:.1f} dB, max error {report.max_error:.2g}"
    ]


def load(
    path: str | os.PathLike[str],
    *,
    device: str | None = None,
    backend: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
) -> Engine:
    """The engine in a bundle; needs no PyTorch.

    Where stages run in OpenVINO, the first start on a machine keeps the compiled networks in the
    cache folder (``~/.cache/fuseengine``, or ``FUSEENGINE_CACHE``), up to three times the bundle's
    size; later ones load in half the time. Where it cannot be written, all are first starts.

    Args:
        path: a file that :meth:`Engine.save <fuseengine.engine.Engine.save>` or ``fuseengine
            compile`` wrote.
        device: "cpu" or "cuda", other than it was compiled for: a GPU's bundle runs on a CPU with
            ``backend="onnxruntime"``, slowly.
        backend: for all stages, instead of those that compile() chose.
        precision: for all stages; "fp32" by default where a backend is given.
        threads: CPU threads; all that this process may use by default.

    Returns:
        The engine, which has run once: one of a fixed size is ready, one of any size prepares
        itself when it meets one.

    Raises:
        BundleError: the file cannot be read, is damaged, of a newer schema, or its content does
            not fit together.
        BackendUnavailableError: this machine lacks what the bundle was compiled for.
        UnknownNameError: no such backend.
    """
    opened = Bundle(path)
    try:
        return _engine(opened, device, backend, precision, threads)
    except FuseEngineError as error:
        opened.close()
        if isinstance(error, (BundleError, BackendUnavailableError, SettingError, LookupError)):
            raise
        raise BundleError(f"{opened.path} is refused: {error}") from error
    except Exception as error:
        opened.close()
        # A runtime that refuses a network, or a program whose parts do not fit together, may raise
        # anything.
        text = " ".join(str(error).split())[:300]
        raise BundleError(
            f"{opened.path} is refused: its engine cannot be built ({type(error).__name__}: {text})"
            "; compile it again"
        ) from error


def _engine(
    opened: Bundle,
    device: str | None,
    backend: str | None,
    precision: str | None,
    threads: int | None,
) -> Engine:
    description = opened.description
    device = description.device if device is None else device
    if device not in ("cpu", "cuda"):
        raise SettingError(f"device={device!r}; expected 'cpu' or 'cuda'")
    _check_capability(opened, device)
    if backend is not None:
        precision = precision or "fp32"
    choice = {
        variant: (backend or chosen, precision or kind)
        for variant, (chosen, kind) in description.choice.items()
    }
    for variant, (name, kind) in choice.items():
        _check_backend(opened, variant, name, kind, device)
    engine = Engine(
        description.program,
        opened,
        choice,
        description.report,
        size=description.size,
        device=device,
        threads=threads or available_threads(),
        resumed=description.resumed,
    )
    # One of any size is tried at a small one: what is malformed is refused here, not later. On a
    # GPU that would build plans for minutes.
    size = description.size or (_SMALL if device == "cpu" else None)
    if size is not None:
        with np.errstate(all="ignore"):  # on black frames
            engine.warm(size)
    _give_back_memory()
    return engine


def _give_back_memory() -> None:
    """Return what building has freed to the system; the C library keeps it otherwise."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _check_capability(opened: Bundle, device: str) -> None:
    wanted = opened.target.compute_capability
    if device == "cpu" or wanted is None:
        return
    present = gpus()
    if not present or present[0].capability != wanted:
        found = "no NVIDIA GPU"
        if present:
            found = f"{present[0].name} of {_point(present[0].capability)}"
        raise BackendUnavailableError(
            f"{opened.path} was compiled for {opened.target.name} ({opened.target.title}), compute "
            f"capability {_point(wanted)}; this machine has {found}: compile it for this machine, "
            "or load it with device='cpu', backend='onnxruntime'"
        )


def _point(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


def _check_backend(
    opened: Bundle, variant: StageVariant, backend: str, precision: str, device: str
) -> None:
    try:
        offered = get_backend(backend, device).precisions(device)
    except BackendUnavailableError as error:
        raise BackendUnavailableError(
            f"{opened.path}: the stage {variant.label} was compiled for {backend}: {error}; or "
            "load it with device='cpu', backend='onnxruntime'"
        ) from error
    if precision not in offered:
        raise BackendUnavailableError(
            f"{opened.path}: the stage {variant.label} is {precision} on {backend}, which here "
            f"offers {', '.join(offered)}: load it with precision='fp32'"
        )
