"""A model repository for NVIDIA's Triton Inference Server.

    DIR/drfusion-s/config.pbtxt
    DIR/drfusion-s/1/model.onnx        or model.plan

    tritonserver --model-repository=DIR

The whole model in one file, so that a request is one inference: "infrared" and "visible" in,
"fused" out, as uint8 frames (infrared (H, W), visible and fused (H, W, 3) RGB) or as float32
planes. Requests that arrive together are made one batch where the model gives the same pictures
then, which is tried when it is written.

Form of config.pbtxt: ``ModelConfig`` of triton-inference-server/common,
``protobuf/model_config.proto``, in protobuf's text form; layout of the folders and names of the
files: the server's "Model Repository" page.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray

from fuseengine.errors import CompileError, SettingError
from fuseengine.export.batching import check_batches, open_batch
from fuseengine.export.whole import NOISE, whole_to_onnx
from fuseengine.stages import ModelStages
from fuseengine.tracing import capture

if TYPE_CHECKING:
    from torch import nn

CONFIG = "config.pbtxt"
MARK = "# Written by 'fuseengine export triton-server'; a newer model becomes a new version folder."

_FILES = {"onnxruntime_onnx": "model.onnx", "tensorrt_plan": "model.plan"}
"""Platform -> the file's name that the server expects."""

_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
}
_KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


@dataclass(frozen=True)
class Tensor:
    """An input or output of a served model.

    Attributes:
        name: of the tensor.
        type: as the server names it, such as "TYPE_UINT8".
        dims: without the batch where the server makes batches; -1 is open.
    """

    name: str
    type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class ServedModel:
    """A model's configuration.

    Attributes:
        name: of the model and its folder.
        platform: "onnxruntime_onnx" or "tensorrt_plan".
        max_batch_size: of the batches that the server makes; 0: it makes none, and dims say all.
        inputs: in order.
        outputs: in order.
        instances: copies of the model that run at once, per GPU or on the CPU.
        device: "auto", "cpu" or "gpu".
        delay_us: microseconds that a request may wait for others to join its batch.
    """

    name: str
    platform: str
    max_batch_size: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    instances: int = 1
    device: str = "auto"
    delay_us: int = 500

    def config(self) -> str:
        """config.pbtxt."""
        lines = [
            MARK,
            f"name: {_quoted(self.name)}",
            f"platform: {_quoted(self.platform)}",
            f"max_batch_size: {self.max_batch_size}",
        ]
        for field, tensors in (("input", self.inputs), ("output", self.outputs)):
            for tensor in tensors:
                lines += [
                    f"{field} {{",
                    f"  name: {_quoted(tensor.name)}",
                    f"  data_type: {tensor.type}",
                    f"  dims: [ {', '.join(map(str, tensor.dims))} ]",
                    "}",
                ]
        lines += [
            "instance_group {",
            f"  count: {self.instances}",
            f"  kind: {_KINDS[self.device]}",
            "}",
        ]
        if self.max_batch_size > 1:
            lines += [
                "dynamic_batching {",
                f"  max_queue_delay_microseconds: {self.delay_us}",
                "}",
            ]
        return "\n".join([*lines, ""])


@dataclass(frozen=True)
class ServerExport:
    """What was written.

    Attributes:
        folder: of the model.
        version: number of the version.
        model: its configuration.
        note: why the server makes no batches, or what was not checked; "" otherwise.
    """

    folder: Path
    version: int
    model: ServedModel
    note: str

    def __str__(self) -> str:
        batches = f"batches of up to {self.model.max_batch_size}"
        if not self.model.max_batch_size:
            batches = "one request at a time"
        lines = [
            f"{self.folder}: version {self.version}, {self.model.platform}, {batches}",
            *(f"  in   {t.name}: {t.type} {list(t.dims)}" for t in self.model.inputs),
            *(f"  out  {t.name}: {t.type} {list(t.dims)}" for t in self.model.outputs),
        ]
        return "\n".join([*lines, self.note] if self.note else lines)


def export_triton_server(
    model: nn.Module,
    folder: str | os.PathLike[str],
    size: tuple[int, int] | None = None,
    *,
    name: str | None = None,
    precision: str = "fp32",
    frames: bool = True,
    max_batch: int = 8,
    instances: int = 1,
    device: str = "auto",
    delay_us: int = 500,
    plan: str | os.PathLike[str] | None = None,
) -> ServerExport:
    """Write a model repository, or add a model, or a version of a model, to one.

    Args:
        model: a fusion model in float32, as :func:`fuseengine.compile` takes it.
        folder: the repository; made if missing.
        size: height and width of the frames; None leaves them open, which costs speed and batches.
        name: of the model in the repository; the model's own by default.
        precision: "fp32", "fp16" or "bf16" of the networks; "fp32" for CPUs.
        frames: whether inputs and output are uint8 frames; else float32 planes (C, H, W) in [0, 1]
            whose sides are multiples of the model's.
        max_batch: largest batch that the server may make; 1 for none.
        instances: copies that run at once, per GPU or on the CPU.
        device: "cpu", "gpu", or "auto": a GPU if the server has one.
        delay_us: microseconds that a request may wait for others.
        plan: a TensorRT plan of this model at this size, made from ``fuseengine export onnx
            --whole`` on the server's own GPU, to serve instead of ONNX. It is copied as it is and
            served one request at a time.

    Returns:
        What was written.

    Raises:
        SettingError: a wrong setting, or the folder holds something else under that name.
        CompileError: a network or op has no ONNX form.
    """
    program = capture(model)
    served = name or program.model
    _check(served, max_batch, instances, delay_us, device)
    if plan is not None and size is None:
        raise SettingError("plan: a plan is for one size; give its frame size")
    made = whole_to_onnx(
        program, ModelStages(model, program), size, precision=precision, frames=frames
    )
    if any(entry.key == NOISE for entry in made.metadata_props):
        raise SettingError(
            f"{program.model} starts from noise, which is part of a model for a known size only; "
            "give a size"
        )
    note = ""
    if plan is not None:
        batch, note = 0, "the plan was copied as it is; the server checks it against this config"
    elif max_batch == 1:
        batch = 0
    else:
        batch, made, note = _batched(made, size, frames, max_batch)
    content = Path(plan).read_bytes() if plan is not None else made.SerializeToString()
    configured = ServedModel(
        name=served,
        platform="onnxruntime_onnx" if plan is None else "tensorrt_plan",
        max_batch_size=batch,
        inputs=tuple(_tensor(value, batch) for value in made.graph.input),
        outputs=tuple(_tensor(value, batch) for value in made.graph.output),
        instances=instances,
        device=device,
        delay_us=delay_us,
    )
    version = write_served_model(Path(folder), configured, content)
    return ServerExport(Path(folder) / served, version, configured, note)


def _check(name: str, max_batch: int, instances: int, delay_us: int, device: str) -> None:
    if not _NAME.fullmatch(name):
        raise SettingError(
            f"name {name!r}: expected letters, digits, '_', '-' and '.', as it names a folder"
        )
    if max_batch < 1 or instances < 1 or delay_us < 0:
        raise SettingError(
            f"max_batch={max_batch}, instances={instances}, delay_us={delay_us}; expected at least "
            "1, 1 and 0"
        )
    if device not in _KINDS:
        raise SettingError(f"device={device!r}; expected one of {', '.join(_KINDS)}")


def _batched(
    made: onnx.ModelProto, size: tuple[int, int] | None, frames: bool, max_batch: int
) -> tuple[int, onnx.ModelProto, str]:
    """(max_batch_size, model, note): the model with an open batch where that is right."""
    if size is None:
        return 0, made, "no batches: they need a known size"
    try:
        several = open_batch(made)
        check_batches(several, _two_pairs(made), 1.0 if frames else 1e-3)
    except CompileError as error:
        return 0, made, f"no batches: {error}"
    return max_batch, several, ""


def _two_pairs(made: onnx.ModelProto) -> dict[str, NDArray[np.generic]]:
    """Two different pictures per input: random blocks of 8x8 pixels."""
    rng = np.random.default_rng(0)
    given: dict[str, NDArray[np.generic]] = {}
    for value in made.graph.input:
        tensor = value.type.tensor_type
        shape = [2, *(dim.dim_value for dim in tensor.shape.dim[1:])]
        sides = slice(1, 3) if tensor.elem_type == onnx.TensorProto.UINT8 else slice(2, 4)
        coarse = list(shape)
        coarse[sides] = [-(-n // 8) for n in shape[sides]]
        picture = rng.random(coarse, dtype=np.float32)
        for axis in range(*sides.indices(4)):
            picture = np.repeat(picture, 8, axis=axis)
        picture = picture[tuple(slice(n) for n in shape)]
        if tensor.elem_type == onnx.TensorProto.UINT8:
            picture = (picture * 255).astype(np.uint8)
        given[value.name] = np.ascontiguousarray(picture)
    return given


def _tensor(value: onnx.ValueInfoProto, batch: int) -> Tensor:
    """A border as the server describes it; the batch is not among its dims where it makes them."""
    tensor = value.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
    return Tensor(value.name, _TYPES[tensor.elem_type], tuple(dims[1:] if batch else dims))


# --- the folders ----------------------------------------------------------------------------------


def write_served_model(repository: Path, model: ServedModel, content: bytes) -> int:
    """Put a model into a repository, whole or not at all; the number of its version.

    A model that this function wrote before gets a new version beside the old ones, if the
    configuration is the same; the server serves the latest. Anything else under that name is left
    alone.

    Args:
        repository: the folder; made if missing.
        model: its configuration.
        content: of the model's file.

    Raises:
        SettingError: something else is there, or the folder cannot be written.
    """
    folder, config = repository / model.name, model.config()
    if repository.exists() and not repository.is_dir():
        raise SettingError(f"{repository} is a file; expected a folder for the repository")
    new = not folder.exists()
    version = 1 if new else _next_version(folder, config)
    try:
        repository.mkdir(parents=True, exist_ok=True)
        # Beside the repository, not in it: a server that polls would take it for a model.
        part = Path(tempfile.mkdtemp(prefix=f".{model.name}-", dir=repository.resolve().parent))
    except OSError as error:
        raise SettingError(f"cannot write {repository}: {error.strerror or error}") from error
    try:
        made = part / model.name / str(version)
        made.mkdir(parents=True)
        (made / _FILES[model.platform]).write_bytes(content)
        (part / model.name / CONFIG).write_text(config, encoding="utf-8")
        if new:
            (part / model.name).rename(folder)
        else:
            made.rename(folder / str(version))
    except OSError as error:
        raise SettingError(
            f"cannot write {folder}: {error.strerror or error}; check rights and space"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return version


def _next_version(folder: Path, config: str) -> int:
    """The number after the last version of a model that was written here.

    Raises:
        SettingError: the folder is not ours, or its configuration is another.
    """
    try:
        found = (folder / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        found = ""
    if not found.startswith(MARK):
        raise SettingError(
            f"{folder} exists and was not written by this command; choose another name or folder"
        )
    if found != config:
        raise SettingError(
            f"{folder / CONFIG} configures the model in another way (size, batches or instances); "
            "a new version must have the same configuration: choose another name"
        )
    return 1 + max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0)


def _quoted(text: str) -> str:
    """A string of protobuf's text form; names have no other characters than are checked for."""
    return f'"{text}"'
