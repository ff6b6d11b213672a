"""Triton kernels that import Triton when they first run, and the launches that ops plan.

An op describes what it would launch as a list of :class:`Launch`. Running that list on a device and
compiling it ahead of time (:mod:`fuseengine.kernels.aot`) read the same description, and one rule,
:func:`fuseengine.runtime.cubins.variant_of`, says what of it is compiled in. Triton's own launcher,
which would look at each value by itself, has no part in it.

A launch takes its code from the store in use (:mod:`fuseengine.kernels._cubins`), else Triton
compiles it; ``FUSEENGINE_NO_JIT=1`` makes it raise instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fuseengine.errors import BackendUnavailableError
from fuseengine.kernels import _cubins
from fuseengine.runtime.cubins import Pointer, Store, Value, Variant, describe, variant_of

log = logging.getLogger("fuseengine")

NO_JIT = "FUSEENGINE_NO_JIT"

FP_FUSION = True
"""Contract a * b + c into one instruction. Always said, as Triton's default changed."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels take; float64 runs through PyTorch."""

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.uint16: "*u16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Kernel:
    """A kernel's Python function, compiled by Triton on demand.

    A kernel may call other functions that are decorated as kernels.

    Attributes:
        function: the undecorated function; ``tl`` in it is ``triton.language``.
        name: its name, which is also the entry point of compiled code.
    """

    def __init__(self, function: FunctionType) -> None:
        self.function = function
        self.name = function.__name__
        self.__doc__ = function.__doc__

    @functools.cached_property
    def jit(self) -> Any:
        """Triton's form of the function.

        Raises:
            BackendUnavailableError: Triton is not installed.
        """
        try:
            import triton
            import triton.language as tl
        except ImportError as error:
            raise BackendUnavailableError(
                f"the GPU kernel {self.name} needs Triton, which is not installed here: "
                "pip install 'fuseengine[gpu]'"
            ) from error
        # The modules know `tl` for type checkers only, so that importing them costs nothing.
        namespace = self.function.__globals__
        namespace["tl"] = tl
        called = {
            name: value.jit
            for name in self.function.__code__.co_names
            if isinstance(value := namespace.get(name), Kernel)
        }
        return triton.jit(_with_globals(self.function, called) if called else self.function)

    @property
    def interpreted(self) -> bool:
        """Whether Triton runs the function with NumPy (TRITON_INTERPRET=1 at its import)."""
        return type(self.jit).__name__ == "InterpretedFunction"


def _with_globals(function: FunctionType, values: Mapping[str, Any]) -> FunctionType:
    """A copy of a function that sees other values under some of its module's names."""
    copy = FunctionType(
        function.__code__, {**function.__globals__, **values}, function.__name__,
        function.__defaults__,
    )  # fmt: skip
    for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(copy, name, getattr(function, name))
    return copy


def kernel(function: Callable[..., Any]) -> Kernel:
    """Decorator for a Triton kernel, or for a function that kernels call."""
    return Kernel(function)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: what.
        label: name of the launch within its op, for example "row".
        grid: number of programs per axis.
        grid_rule: the same as text, in terms of the arguments and constants.
        arguments: run-time arguments in the kernel's order: tensors and numbers; None is compiled
            in.
        constants: compile-time arguments: flags, block sizes, strides that are always 1.
        num_warps: 32 threads each.
        num_stages: depth of software pipelining.
        multiples: integer arguments that are multiples of 8 when sizes are: those that rows, planes
            and the ends of loops are counted by.
    """

    kernel: Kernel
    label: str
    grid: tuple[int, ...]
    grid_rule: str
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    multiples: Sequence[str] = ()

    def variant(self, *, aligned: bool | None = None) -> Variant:
        """What is compiled in for these arguments; ``aligned`` as in :func:`variant_of`."""
        values = self.values()
        absent = {name: None for name in self.arguments if name not in values}
        return variant_of(
            self.kernel.name,
            values,
            {**self.constants, **absent},
            self.multiples,
            self.options,
            aligned=aligned,
        )

    def values(self) -> dict[str, Value]:
        """The run-time arguments as the driver takes them."""
        return {
            name: Pointer(value.data_ptr(), _POINTERS[value.dtype])
            if isinstance(value, Tensor)
            else value
            for name, value in self.arguments.items()
            if value is not None
        }

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options; Triton's defaults are not relied upon."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": FP_FUSION,
        }


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported; asks without importing it."""
    return importlib.util.find_spec("triton") is not None


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: on CUDA, a dtype of :data:`DTYPES`, code to run."""
    given = [t for t in tensors if t is not None]
    return (
        all(t.is_cuda and t.dtype in DTYPES for t in given)
        and (installed() or _cubins.active() is not None)
        and _capability(given[0].device) >= 80
    )


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def device_capability(device: torch.device) -> int:
    """Compute capability to plan for, two digits, 87 for 8.7.

    The device's own; or that of the PTX, where the store in use has nothing else for the device.

    Raises:
        BackendUnavailableError: the store in use has no code for the device.
    """
    store, own = _cubins.active(), _capability(device)
    return own if store is None else store.target(own)


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Launch in order on the device's current stream.

    Raises:
        BackendUnavailableError: no compiled code, and Triton is missing or FUSEENGINE_NO_JIT=1.
    """
    on_gpu = device.type == "cuda"
    store = _cubins.active() if on_gpu else None
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        for launch in launches:
            if store is None and launch.kernel.interpreted:
                launch.kernel.jit[launch.grid](**launch.arguments, **launch.constants)
                continue
            variant = launch.variant()
            entry = None if store is None else store.get(variant, _capability(device))
            if store is None or entry is None:
                _run_compiled_now(launch, variant, device, store)
            else:
                store.launch(
                    entry,
                    launch.grid,
                    launch.values().values(),
                    device=torch.cuda.current_device(),
                    stream=torch.cuda.current_stream().cuda_stream,
                )


_built: dict[tuple[Kernel, Variant, int], Any] = {}


def _run_compiled_now(
    launch: Launch, variant: Variant, device: torch.device, store: Store | None
) -> None:
    key = (launch.kernel, variant, torch.cuda.current_device() if device.type == "cuda" else 0)
    if key not in _built:
        forbidden = os.environ.get(NO_JIT, "") not in ("", "0")
        if forbidden or (store is not None and not installed()):
            raise BackendUnavailableError(_why_refused(launch, variant, device, store))
        if store is not None:
            log.warning("compiling: %s", store.missing(variant, launch.label, _capability(device)))
        _built[key] = build(launch.kernel, variant, _capability(device))
    given = {**launch.arguments, **launch.constants}
    values = (given[name] for name in launch.kernel.jit.arg_names)
    _built[key][(*launch.grid, 1, 1)[:3]](*values)


def _why_refused(
    launch: Launch, variant: Variant, device: torch.device, store: Store | None
) -> str:
    if store is not None:
        return store.missing(variant, launch.label, _capability(device))
    return (
        f"{launch.kernel.name} ({launch.label}) would be compiled now, and {NO_JIT}=1 forbids "
        f"that: {describe(variant)}; expected a folder of kernels compiled ahead of time: "
        f"python -m fuseengine.kernels.aot --out FOLDER, then {_cubins.CUBINS}=FOLDER, or unset "
        f"{NO_JIT}"
    )


def build(kernel: Kernel, variant: Variant, capability: int, **options: Any) -> Any:
    """Triton's compiled kernel of a variant; needs no GPU.

    Args:
        kernel: the variant's kernel.
        variant: what is compiled in.
        capability: compute capability as two digits.
        options: for the compiler, beside the variant's.

    Raises:
        BackendUnavailableError: Triton is not installed.
    """
    names = kernel.jit.arg_names
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict(variant.parameters)
    source = ASTSource(
        fn=kernel.jit,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): [["tt.divisibility", by]] for name, by in variant.assumes},
    )
    target = GPUTarget("cuda", capability, 32)
    return compile(source, target=target, options={**dict(variant.options), **options})


def planes(x: Tensor) -> Tensor:
    """X (N, C, H, W) with dense planes: itself, or a contiguous copy."""
    height, width = x.shape[2:]
    rows_follow = height == 1 or x.stride(2) == width
    return x if rows_follow and (width == 1 or x.stride(3) == 1) else x.contiguous()


def power_of_two(number: int, *, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two that is not below a number, within limits."""
    return max(least, min(most, 1 << max(number - 1, 0).bit_length()))


def blocks(count: int, block: int) -> int:
    """How many blocks cover a count."""
    return -(-count // block)
