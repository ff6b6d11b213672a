"""Stages through TensorRT or TensorRT-RTX, on a CUDA device. No torch, no CuPy of its own.

Arrays are whatever has ``__cuda_array_interface__``: PyTorch's on the compile side, CuPy's on the
run side. Scratch memory and the current stream come from the library that the arrays are of.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fuseengine.backends.base import Backend, StageSource, network_kind
from fuseengine.errors import BackendUnavailableError, CompileError, SettingError
from fuseengine.program import StageVariant
from fuseengine.runtime.bundle import Bundle
from fuseengine.runtime.executor import StageRunner
from fuseengine.runtime.gpu import gpus

if TYPE_CHECKING:
    from fuseengine.export.tensorrt import LoadedPlan


_REFUSED = {"bf16": frozenset({"ConvTranspose"})}
"""Operators that TensorRT does not build in a half type (Myelin: "Could not infer output types for
operation: deconv", seen with TensorRT-RTX 1.7.1); they stay in float32."""


class TensorRtBackend(Backend):
    """One plan per stage variant and size, built for the GPU of the machine and kept."""

    name = "tensorrt"
    extra = "tensorrt"
    package = "tensorrt"
    quick = False

    def unavailable(self, device: str) -> str | None:
        """Needs a CUDA device and ``tensorrt``, or ``tensorrt_rtx`` and a GPU that it knows."""
        if device != "cuda":
            return "it runs stages on NVIDIA GPUs; use device='cuda' or another backend"
        from fuseengine.export.tensorrt import find_library

        try:
            found = find_library()
        except BackendUnavailableError as error:
            return str(error)
        present = gpus()
        if not present:
            return f"{found.name} {found.version} is installed, but the driver shows no GPU"
        if found.is_rtx and present[0].capability not in found.targets():
            return (
                f"{found.name} {found.version} does not know compute capability "
                f"{present[0].capability}: install tensorrt"
            )
        return None

    def precisions(self, device: str) -> tuple[str, ...]:
        """Float32, TF32, both half types, and int8 with the rest in float32."""
        return ("fp32", "tf32", "fp16", "bf16", "int8")

    def lower(
        self,
        source: StageSource,
        variant: StageVariant,
        shapes: tuple[tuple[int, ...], ...],
        *,
        precision: str,
        device: str,
        threads: int,
    ) -> StageRunner:
        """Build the variant's plan for these shapes, or take it from the cache."""
        from fuseengine.export.tensorrt import BuildSettings, LoadedPlan, build

        settings = BuildSettings(
            shapes={f"in{i}": tuple(shape) for i, shape in enumerate(shapes)},
            tf32=precision == "tf32",
        )
        bundle = source if isinstance(source, Bundle) else None
        plan = build(typed_network(source, variant, precision), settings, bundle=bundle)
        return PlanRunner(LoadedPlan(plan))


def typed_network(source: StageSource, variant: StageVariant, precision: str) -> bytes:
    """A variant's ONNX network in a precision, float32 at its border.

    Raises:
        BackendUnavailableError: half precision is to be written into a float32 network, and the
            package ``onnx`` is not installed.
    """
    network = source.onnx(variant, network_kind(precision))
    if precision not in ("fp16", "bf16"):
        return network
    if importlib.util.find_spec("onnx") is None:
        raise BackendUnavailableError(
            f"{precision} for {variant.label}: the package onnx, which writes it into the network, "
            "is not installed; install it with: pip install onnx"
        )
    import onnx

    from fuseengine.export.typed import typed

    model = onnx.load_model_from_string(network)
    refused = _REFUSED.get(precision, frozenset())
    keep = sorted(refused.intersection(node.op_type for node in model.graph.node))
    return typed(model, precision, keep).SerializeToString()


class PlanRunner:
    """Executes one plan. All calls of a stage share one context and its scratch memory.

    Args:
        plan: the plan, read.
    """

    def __init__(self, plan: LoadedPlan) -> None:
        self.plan = plan
        strategy = plan.reader.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self.context = plan.engine.create_execution_context(strategy)
        if self.context is None:
            raise CompileError(
                f"{plan.reader.name} gives no execution context (out of device memory?); free "
                "memory, or use a smaller picture size"
            )
        self._scratch: Any = None

    def bind(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Callable[[], object]:
        """See :class:`fuseengine.runtime.executor.StageRunner`.

        Raises:
            SettingError: an array that is not dense float32 on a GPU, or of another shape.
        """
        plan, context = self.plan, self.context
        tensors = [
            *zip(plan.inputs, inputs, strict=True),
            *zip(plan.outputs, outputs, strict=True),
        ]
        addresses = [(name, address_of(array, name)) for name, array in tensors]
        for name, array in zip(plan.inputs, inputs, strict=True):
            if not context.set_input_shape(name, tuple(array.shape)):
                raise SettingError(
                    f"{name} {tuple(array.shape)}; the plan was built for "
                    f"{tuple(plan.engine.get_tensor_shape(name))}: build one for this size"
                )
        for name, array in zip(plan.outputs, outputs, strict=True):
            made = tuple(context.get_tensor_shape(name))
            if made != tuple(array.shape):
                raise SettingError(f"buffer for {name} {tuple(array.shape)}; expected {made}")
        if self._scratch is None:
            self._scratch = _bytes_beside(inputs[0], max(plan.activation_bytes, 1))
            where = address_of(self._scratch, "scratch", "|u1")
            context.set_device_memory(where, plan.activation_bytes)
        stream = _stream_of(inputs[0])
        library = f"{plan.reader.name} {plan.reader.version}"

        # `keep` holds the arrays: a captured graph writes to their addresses.
        def call(keep: object = tensors) -> None:
            for name, address in addresses:
                context.set_tensor_address(name, address)
            if not context.execute_async_v3(stream()):
                raise CompileError(
                    f"{library} could not enqueue a stage; the logger 'fuseengine.tensorrt' has "
                    "its reason"
                )

        return call


def address_of(array: Any, name: str, kind: str = "<f4") -> int:
    """Device address of a dense array.

    Args:
        array: anything with ``__cuda_array_interface__``.
        name: for the error.
        kind: element type as NumPy writes it.

    Raises:
        SettingError: it is not on a GPU, not dense, or of another type.
    """
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        raise SettingError(
            f"{name}: a {type(array).__name__} without __cuda_array_interface__; expected an array "
            "on the GPU: CuPy's, or a PyTorch tensor on cuda"
        )
    if interface["typestr"] != kind:
        raise SettingError(f"{name}: elements {interface['typestr']}; expected {kind}")
    strides = interface.get("strides")
    if strides is not None and tuple(strides) != dense_strides(interface["shape"], int(kind[-1])):
        raise SettingError(
            f"{name}: shape {interface['shape']}, strides {strides}; expected a dense array: copy "
            "it with ascontiguousarray()"
        )
    return int(interface["data"][0])


def dense_strides(shape: Sequence[int], item: int) -> tuple[int, ...]:
    """Strides in bytes of a C-contiguous array; those of dimensions of 1 count as well."""
    strides = []
    for size in reversed(shape):
        strides.append(item)
        item *= size
    return tuple(reversed(strides))


def _bytes_beside(array: Any, count: int) -> Any:
    """Uninitialised device memory from the library that an array is of."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return torch.empty(count, dtype=torch.uint8, device=array.device)
    import cupy

    return cupy.empty(count, cupy.uint8)


def _stream_of(array: Any) -> Callable[[], int]:
    """Gives the address of the stream that is current where an array is from."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        device = array.device
        return lambda: int(torch.cuda.current_stream(device).cuda_stream)
    import cupy

    return lambda: int(cupy.cuda.get_current_stream().ptr)
