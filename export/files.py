"""Models as ONNX files: all of it in one, or a file per network; written, described, checked."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from fuseengine.backends.onnxruntime import session_options
from fuseengine.demo import demo_pair
from fuseengine.engine import available_threads, build_executor
from fuseengine.errors import CompileError, SettingError
from fuseengine.export.graph import fixed, opset_of, split_attention
from fuseengine.export.typed import TypeCount, check_names, count_types, emulated, typed
from fuseengine.export.whole import INPUTS, noise_for, whole_to_onnx
from fuseengine.program import Program, StageVariant, resolve
from fuseengine.runtime import tensors
from fuseengine.runtime.frames import FrameAdapter
from fuseengine.stages import ModelStages
from fuseengine.tracing import capture

if TYPE_CHECKING:
    from torch import nn

PROGRAM = "program.json"
CONSTANTS = "constants.safetensors"

_OPEN_SIZE = (240, 320)
"""Frame size at which models without a size of their own are checked."""


@dataclass(frozen=True)
class OnnxFile:
    """What was written.

    Attributes:
        path: the file.
        inputs: name and type of each input, such as ("infrared", "float32[1, 1, 480, 640]").
        outputs: likewise.
        opset: version of the standard operators.
        nodes: number of them.
        megabytes: size of the file.
        types: how much is half and how much float32.
    """

    path: Path
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    opset: int
    nodes: int
    megabytes: float
    types: TypeCount

    def __str__(self) -> str:
        lines = [
            f"{self.path}: opset {self.opset}, {self.nodes} nodes, {self.megabytes:.1f} MB",
            *(f"  in   {name}: {kind}" for name, kind in self.inputs),
            *(f"  out  {name}: {kind}" for name, kind in self.outputs),
        ]
        if self.types.half:
            lines.append(f"  {self.types}")
        return "\n".join(lines)


@dataclass(frozen=True)
class OnnxExport:
    """The files of one export, and how far their picture is from the model's.

    Attributes:
        files: what was written.
        size: frame size of the comparison; None where there was none.
        psnr_db: PSNR of the fused demo pair against the float32 eager model (peak 1).
        max_error: largest absolute difference, on the scale [0, 1].
    """

    files: tuple[OnnxFile, ...]
    size: tuple[int, int] | None = None
    psnr_db: float | None = None
    max_error: float | None = None

    def __str__(self) -> str:
        lines = [str(file) for file in self.files]
        if self.size is None:
            return "\n".join([*lines, "not compared with the model"])
        height, width = self.size
        return "\n".join(
            [
                *lines,
                f"checked in ONNX Runtime at {width}x{height} against the float32 model: "
                f"{self.psnr_db:.1f} dB, largest error {self.max_error:.2g}",
            ]
        )


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    size: tuple[int, int] | None = None,
    *,
    whole: bool = False,
    precision: str = "fp32",
    keep: Iterable[str] = (),
    frames: bool = False,
    noise: str | None = None,
    attention_limit: int | None = None,
    check: bool = True,
) -> OnnxExport:
    """Write a model as ONNX.

    Args:
        model: a fusion model in float32, as :func:`fuseengine.compile` takes it.
        path: the file with ``whole``; else a folder (made if missing), which gets a file per
            network, the program that calls them (program.json) and its constants.
        size: frame height and width; None leaves them open. Networks are written for the size
            padded to the model's multiple.
        whole: whether everything goes into one model, see
            :func:`fuseengine.export.whole.whole_to_onnx`.
        precision: "fp32", "fp16" or "bf16", see :func:`fuseengine.export.typed.typed`.
        keep: what stays in float32 in half precision.
        frames: whole models only: inputs and output are uint8 frames.
        noise: whole models only: "constant" or "input".
        attention_limit: bytes of the largest attention map, for a known size.
        check: whether to run what was written, and the model, on the demo pair. Half precision is
            checked with float32 arithmetic and every half value rounded, as GPUs compute it
            (:func:`fuseengine.export.typed.emulated`).

    Returns:
        What was written and how exact it is.

    Raises:
        SettingError: settings that do not go together, or a path that cannot be written.
        CompileError: a network or op has no ONNX form.
    """
    program = capture(model)
    stages = ModelStages(model, program)
    path = Path(path)
    if whole:
        padded = size if frames or size is None else _padded(program, size)
        made = whole_to_onnx(
            program,
            stages,
            padded,
            precision=precision,
            keep=keep,
            frames=frames,
            noise=noise,
            attention_limit=attention_limit,
        )
        files: tuple[OnnxFile, ...] = (_save(made, path),)
        if not check:
            return OnnxExport(files)
        run = made if frames else partial(_run_whole, made)
        return _compared(files, model, program, size, run)
    if frames or noise:
        raise SettingError("frames and noise are settings of whole models; expected whole=True")
    networks = _networks(program, stages, size, precision, tuple(keep), attention_limit)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror}; expected a folder to write into") from error
    files = tuple(
        _save(network, path / f"{variant.label}.onnx") for variant, network in networks.items()
    )
    _write(path / PROGRAM, program.to_json().encode())
    _write(path / CONSTANTS, tensors.pack(program.constants))
    if not check:
        return OnnxExport(files)
    return _compared(files, model, program, size, partial(_run_staged, program, networks))


def _padded(program: Program, size: tuple[int, int]) -> tuple[int, int]:
    return FrameAdapter(size, program.channels, program.multiple).padded


def _networks(
    program: Program,
    stages: ModelStages,
    size: tuple[int, int] | None,
    precision: str,
    keep: tuple[str, ...],
    attention_limit: int | None,
) -> dict[StageVariant, onnx.ModelProto]:
    """Every variant's network in a precision, checked."""
    networks = {}
    for variant, calls in program.variants().items():
        network = onnx.load_model_from_string(stages.onnx(variant))
        if size is not None:
            padded = _padded(program, size)
            shapes = [resolve(program.values[name].shape, padded) for name in calls[0].inputs]
            names = [value.name for value in network.graph.input]
            network = fixed(network, dict(zip(names, shapes, strict=True)))
            if attention_limit is not None:
                network = split_attention(network, attention_limit)
        networks[variant] = network
    check_names(keep, *networks.values())
    for variant, network in networks.items():
        networks[variant] = typed(network, precision, keep)
        onnx.checker.check_model(networks[variant], full_check=True)
    return networks


# --- files ----------------------------------------------------------------------------------------


def _save(model: onnx.ModelProto, path: Path) -> OnnxFile:
    content = model.SerializeToString()
    _write(path, content)
    return OnnxFile(
        path=path,
        inputs=_described(model.graph.input),
        outputs=_described(model.graph.output),
        opset=opset_of(model),
        nodes=len(model.graph.node),
        megabytes=len(content) / 1e6,
        types=count_types(model),
    )


def _described(values: Iterable[onnx.ValueInfoProto]) -> tuple[tuple[str, str], ...]:
    found = []
    for value in values:
        tensor = value.type.tensor_type
        dims = ", ".join(str(d.dim_param or d.dim_value) for d in tensor.shape.dim)
        kind = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
        found.append((value.name, f"{kind}[{dims}]"))
    return tuple(found)


def _write(path: Path, content: bytes) -> None:
    """The whole file or nothing: beside its place, then renamed."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        remedy = "make its folder first" if not path.parent.is_dir() else "give a file's name"
        raise SettingError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


# --- the comparison -------------------------------------------------------------------------------

_Picture = NDArray[np.float32]


def _compared(
    files: tuple[OnnxFile, ...],
    model: nn.Module,
    program: Program,
    size: tuple[int, int] | None,
    run: Callable[[_Picture, _Picture], _Picture] | onnx.ModelProto,
) -> OnnxExport:
    """Fuse the demo pair with the eager model and with what was written.

    Args:
        files: what was written.
        model: the model.
        program: its program.
        size: of the frames.
        run: planes (1, C, H, W) -> fused planes; or a whole model of uint8 frames.
    """
    size = size or _OPEN_SIZE
    infrared, visible = demo_pair(size)
    adapter = FrameAdapter(size, program.channels, program.multiple, program.padding)
    a, b = np.zeros((2, 1, adapter.planes, *adapter.padded), np.float32)
    adapter.load(infrared, visible, a, b)
    expected = _eager(model, a, b)
    found: NDArray[np.floating[Any]]
    wanted: NDArray[np.floating[Any]]
    if isinstance(run, onnx.ModelProto):
        noise = noise_for(run, adapter.padded)
        feeds = dict(zip(INPUTS, (infrared[None], visible[None]), strict=True))
        found = _run(run, {**feeds, **noise})[0] / 255.0
        wanted = adapter.store(expected, visible) / 255.0
    else:
        height, width = size
        found, wanted = (x[..., :height, :width] for x in (run(a, b), expected))
    difference = np.asarray(found, np.float64) - wanted
    square = float((difference**2).mean())
    psnr = -10 * float(np.log10(square)) if square else float("inf")
    return OnnxExport(files, size, psnr, float(np.abs(difference).max()))


def _eager(model: nn.Module, a: _Picture, b: _Picture) -> _Picture:
    import torch

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    with torch.inference_mode():
        fused = model(*(torch.from_numpy(x).to(device) for x in (a, b)))
    model.train(training)
    return np.ascontiguousarray(fused.float().cpu().numpy())


def _run(model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """A model's outputs in ONNX Runtime, with every half value rounded."""
    import onnxruntime as ort

    options = session_options(available_threads())
    content = emulated(model).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def _run_whole(model: onnx.ModelProto, a: _Picture, b: _Picture) -> _Picture:
    height, width = a.shape[2:]
    feeds = dict(zip(INPUTS, (a, b), strict=True))
    (fused,) = _run(model, {**feeds, **noise_for(model, (height, width))})
    return fused


class _Networks:
    """Networks in memory as the source of an engine's stages."""

    settled = False

    def __init__(self, networks: Mapping[StageVariant, onnx.ModelProto]) -> None:
        self.networks = networks

    def onnx(self, variant: StageVariant, precision: str = "fp32") -> bytes:
        """The network, with every half value rounded."""
        return emulated(self.networks[variant]).SerializeToString()

    def module(self, variant: StageVariant) -> Any:
        """There is none, and the one backend that these networks are checked in needs none."""
        raise CompileError(f"{variant.label} is here as ONNX alone; expected backend 'onnxruntime'")


def _run_staged(
    program: Program,
    networks: Mapping[StageVariant, onnx.ModelProto],
    a: _Picture,
    b: _Picture,
) -> _Picture:
    """The program's executor with the written networks as its stages."""
    choice = dict.fromkeys(networks, ("onnxruntime", "fp32"))
    height, width = a.shape[2:]
    executor = build_executor(program, _Networks(networks), choice, (height, width), "cpu", 1)
    for target, given in zip(executor.inputs, (a, b), strict=True):
        target[...] = given
    executor.run()
    return executor.output
