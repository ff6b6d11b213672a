"""Bundles for a GPU that is not at hand: networks in a precision, and kernels compiled for it.

Nothing can be measured or chosen here, so TensorRT on the device gets every stage, in one
precision; it builds its plans there, at first use. What can be checked on this machine is: the
networks run in ONNX Runtime on the CPU, rounded as their types say, and the fused image is compared
with the float32 model.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuseengine.backends.onnxruntime import OnnxRuntimeBackend
from fuseengine.backends.tensorrt import typed_network
from fuseengine.description import Description
from fuseengine.engine import available_threads
from fuseengine.errors import SettingError
from fuseengine.program import Program, StageVariant, resolve
from fuseengine.report import Candidate, Report
from fuseengine.runtime import bundle
from fuseengine.runtime.bundle import BuiltFor
from fuseengine.runtime.cubins import Store
from fuseengine.runtime.executor import CpuDevice, Executor
from fuseengine.search import (
    Int8Networks,
    Settings,
    check_pairs,
    picture_errors,
    reference_pictures,
)
from fuseengine.stages import ModelStages
from fuseengine.targets import Target
from fuseengine.tracing import capture, capture_resumed

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("fuseengine")

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class Written:
    """A bundle that was written.

    Attributes:
        path: the file.
        program: the captured model.
        stages: its networks.
        precision: of the stages.
        verified: what was run and compared here, in words.
        not_verified: what was not.
    """

    path: Path
    program: Program
    stages: ModelStages
    precision: str
    verified: tuple[str, ...]
    not_verified: tuple[str, ...]


def compile_for(
    model: nn.Module,
    size: tuple[int, int],
    target: Target,
    path: str | os.PathLike[str],
    *,
    precision: str = "auto",
    guard_db: float = 45.0,
    max_error: float = 0.1,
    calibration: Sequence[tuple[Any, Any]] | None = None,
    threads: int | None = None,
    resumed_steps: int | None = None,
) -> Written:
    """Write a bundle for a GPU, with none present.

    Args:
        model: a fusion model on the CPU.
        size: (height, width) of the frames.
        target: the GPU.
        path: file to write.
        precision: of the stages; "auto" is fp16, or fp32 where fp16 misses the guard.
        guard_db: least PSNR of the fused image against float32, in dB (peak 1), where the networks
            can be run here.
        max_error: largest absolute difference allowed there.
        calibration: pairs of frames for int8; the demo pair and variations of it by default.
        threads: CPU threads for checking.
        resumed_steps: also hold a program of so many steps for a video's frames that start from
            the one before; 0: as many as the model says are enough.

    Returns:
        What was written.

    Raises:
        SettingError: the target is no GPU, or a precision that it does not compute in, or that
            misses the guard.
        BackendUnavailableError: Triton, which compiles the kernels, is not installed.
        BundleError: the file cannot be written.
    """
    if target.capability is None:
        raise SettingError(f"target {target.name} is no GPU; expected one, or fuseengine.compile()")
    if precision not in ("auto", *PRECISIONS):
        raise SettingError(
            f"precision={precision!r}; expected auto or one of {', '.join(PRECISIONS)}"
        )
    if precision != "auto":
        target.peak(precision)  # refuses what the device does not compute in
    program = capture(model)
    stages = ModelStages(model, program)
    resumed = None
    if resumed_steps is not None:
        resumed = capture_resumed(model, program, resumed_steps)
    settings = Settings(
        size, "cpu", precision, "tensorrt", "quick", guard_db, max_error,
        threads or available_threads(),
    )  # fmt: skip
    checker = _Checker(program, stages, settings, calibration)
    chosen, networks, measured = checker.choose(precision)
    verified, not_verified = _words(target, size, chosen, measured)
    with tempfile.TemporaryDirectory() as folder:
        bundle.write(
            path,
            _description(program, settings, chosen, resumed, checker.int8.record),
            networks,
            target=BuiltFor(target.name, target.title, int(target.sm)),
            kernels=_kernels(program, resumed, size, int(target.sm), Path(folder)),
            verified=verified,
            not_verified=not_verified,
        )
    return Written(Path(path), program, stages, chosen, tuple(verified), tuple(not_verified))


def _kernels(
    program: Program, resumed: Program | None, size: tuple[int, int], capability: int, folder: Path
) -> Store:
    from fuseengine.kernels import recording

    recording.write(program, size, folder, (capability,), ptx=False, resumed=resumed)
    return Store.load(folder)


def _description(
    program: Program,
    settings: Settings,
    precision: str,
    resumed: Program | None,
    quantised: dict[str, Any] | None,
) -> Description:
    choice = dict.fromkeys(program.variants(), ("tensorrt", precision))
    report = Report(
        model=program.model,
        size=settings.measured,
        device="cuda",
        choice={variant.label: f"tensorrt/{precision}" for variant in choice},
        candidates=(Candidate("tensorrt", precision, note="chosen; built on the device"),),
        guard_db=settings.guard_db,
        psnr_db=math.nan,
        max_error=math.nan,
        seconds=0.0,
        threads=settings.threads,
        quantised=quantised,
    )
    return Description(program, choice, report, settings.size, "cuda", resumed)


def _words(
    target: Target, size: tuple[int, int], precision: str, measured: str
) -> tuple[list[str], list[str]]:
    """What was verified and what not."""
    where = f"{size[1]}x{size[0]}"
    rounded = ", every half value rounded" if precision in ("fp16", "bf16") else ""
    not_verified = [
        f"the stages on {target.title}: TensorRT builds them there at first use",
        f"the kernels for compute capability {target.sm}: compiled, not run",
    ]
    if not measured.endswith("dB"):
        return [], [*not_verified, f"the {precision} networks: {measured}"]
    picture = f"fused image of the demo pair against PyTorch in float32, {measured}"
    where = f"in ONNX Runtime on the CPU, {where}{rounded}"
    return [f"the {precision} networks {where}: {picture}"], not_verified


Networks = dict[tuple[StageVariant, str], bytes]


class _Checker:
    """Makes networks in a precision and runs them on the CPU."""

    def __init__(
        self,
        program: Program,
        stages: ModelStages,
        settings: Settings,
        calibration: Sequence[tuple[Any, Any]] | None,
    ) -> None:
        self.program, self.stages, self.settings = program, stages, settings
        self.int8 = Int8Networks(program, stages, settings, calibration)
        self.pairs = check_pairs(program, settings, None)
        self.references, _ = reference_pictures(stages.model, self.pairs, settings)

    def choose(self, precision: str) -> tuple[str, Networks, str]:
        """The precision to take, its networks, and what running them gave.

        Raises:
            SettingError: it misses the guard.
        """
        wanted = "fp16" if precision == "auto" else precision
        networks, measured, fits = self._measure(wanted)
        if not fits and precision == "auto":
            log.warning("fp16 misses the guard (%s); fp32 is taken", measured)
            wanted = "fp32"
            networks, measured, fits = self._measure(wanted)
        if not fits:
            raise SettingError(
                f"precision={wanted!r}: {measured}, below the guard of "
                f"{self.settings.guard_db:.0f} dB; ask for fp32, or lower guard_db if that is meant"
            )
        return wanted, networks, measured

    def _measure(self, precision: str) -> tuple[Networks, str, bool]:
        if precision == "int8":
            self.int8.prepare(self.pairs, self.references)
        variants = self.program.variants()
        networks: Networks = {(v, "fp32"): self.stages.onnx(v) for v in variants}
        kind = "fp32" if precision == "tf32" else precision
        for variant in variants:
            networks[variant, kind] = self._network(variant, kind)
        if precision == "tf32":
            return networks, "TF32 is a GPU's; not run", True
        try:
            psnr, error = self._run({v: _runnable(networks[v, kind], kind) for v in variants})
        except Exception as failure:
            # ONNX Runtime has no kernels for every type on a CPU; the device is another matter.
            log.debug("%s networks do not run here", precision, exc_info=True)
            return networks, f"ONNX Runtime does not run them here ({_first(failure)})", True
        fits = psnr >= self.settings.guard_db and error <= self.settings.max_error
        return networks, f"{psnr:.1f} dB", fits

    def _network(self, variant: StageVariant, kind: str) -> bytes:
        if kind == "int8":
            return self.stages.onnx(variant, "int8")
        return typed_network(self.stages, variant, kind)

    def _run(self, networks: dict[StageVariant, bytes]) -> tuple[float, float]:
        """Worst PSNR and largest error of the program with these networks."""
        size = (int(self.pairs[0][0].shape[2]), int(self.pairs[0][0].shape[3]))
        threads = self.settings.threads
        runners = {}
        for variant, calls in self.program.variants().items():
            shapes = tuple(resolve(self.program.values[n].shape, size) for n in calls[0].inputs)
            runners[variant] = OnnxRuntimeBackend().lower(
                _As(networks[variant]), variant, shapes,
                precision="fp32", device="cpu", threads=threads,
            )  # fmt: skip
        executor = Executor(self.program, size, runners, CpuDevice(threads))
        return picture_errors(executor, self.pairs, self.references)


class _As:
    """A source that gives one network, whatever precision is asked for."""

    settled = False

    def __init__(self, network: bytes) -> None:
        self.network = network

    def onnx(self, variant: StageVariant, precision: str = "fp32") -> bytes:
        """The network."""
        return self.network

    def module(self, variant: StageVariant) -> Any:
        """There is none."""
        raise SettingError(f"no module of {variant.label}; expected a backend of ONNX networks")


def _runnable(network: bytes, kind: str) -> bytes:
    """The network as ONNX Runtime's CPU provider computes what its types say."""
    if kind not in ("fp16", "bf16"):
        return network
    import onnx

    from fuseengine.export.typed import emulated

    return emulated(onnx.load_model_from_string(network)).SerializeToString()


def _first(failure: Exception) -> str:
    return " ".join(str(failure).split())[:80] or type(failure).__name__
