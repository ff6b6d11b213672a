"""Triton kernels that import Triton when they first run, and the launches that ops plan.

An op describes what it would launch as a list of :class:`Launch`. Running that list on a device and
compiling it ahead of time (:mod:`fuseengine.kernels.aot`) read the same description, so that both
compile the same code for the same shapes.

``FUSEENGINE_NO_JIT=1`` makes every launch raise that would compile at run time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fuseengine.errors import BackendUnavailableError

NO_JIT = "FUSEENGINE_NO_JIT"

FP_FUSION = True
"""Contract a * b + c into one instruction. Always said, as Triton's default changed."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels take; float64 runs through PyTorch."""


class Kernel:
    """A kernel's Python function, compiled by Triton on demand.

    Attributes:
        function: the undecorated function; ``tl`` in it is ``triton.language``.
        name: its name, which is also the entry point of compiled code.
    """

    def __init__(self, function: Callable[..., None]) -> None:
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
        self.function.__globals__["tl"] = tl
        return triton.jit(self.function)

    @property
    def interpreted(self) -> bool:
        """Whether Triton runs the function with NumPy (TRITON_INTERPRET=1 at its import)."""
        return type(self.jit).__name__ == "InterpretedFunction"


def kernel(function: Callable[..., None]) -> Kernel:
    """Decorator for a Triton kernel."""
    return Kernel(function)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: what.
        label: name of the launch within its op, for example "row".
        grid: number of programs per axis.
        grid_rule: the same as text, in terms of the arguments and constants.
        arguments: run-time arguments in the kernel's order: tensors, numbers, None.
        constants: compile-time arguments.
        num_warps: 32 threads each.
        num_stages: depth of software pipelining.
    """

    kernel: Kernel
    label: str
    grid: tuple[int, ...]
    grid_rule: str
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2

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
    """Whether the kernels take these tensors: on CUDA, a dtype of :data:`DTYPES`, Triton there."""
    given = [t for t in tensors if t is not None]
    return (
        all(t.is_cuda and t.dtype in DTYPES for t in given)
        and installed()
        and device_capability(given[0].device) >= 80
    )


@functools.cache
def device_capability(device: torch.device) -> int:
    """Compute capability of a CUDA device as two digits, 87 for 8.7."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Launch in order on the device's current stream.

    Raises:
        BackendUnavailableError: Triton is missing, or it would compile and FUSEENGINE_NO_JIT=1.
    """
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        for launch in launches:
            _refuse_jit(launch)
            launch.kernel.jit[launch.grid](
                *launch.arguments.values(), **launch.constants, **launch.options
            )


def _refuse_jit(launch: Launch) -> None:
    if os.environ.get(NO_JIT, "") in ("", "0") or launch.kernel.interpreted:
        return
    raise BackendUnavailableError(
        f"{launch.kernel.name} ({launch.label}) would be compiled now, and {NO_JIT}=1 forbids "
        "that; expected a kernel compiled ahead of time: use one of "
        f"fuseengine.kernels.aot.compile, or unset {NO_JIT}"
    )


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
