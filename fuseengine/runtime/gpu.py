"""NVIDIA GPUs as the driver reports them: no torch, no CuPy, no CUDA toolkit, no nvidia-smi.

Asks ``libcuda`` through ctypes; where there is no driver there are no GPUs. Numbers follow
``CUDA_VISIBLE_DEVICES``, as they do for every CUDA program.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass

_LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
_CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        index: its number.
        name: as NVIDIA calls it, "Orin" for example.
        capability: compute capability without its point: 87 for 8.7, 120 for 12.0.
        memory_bytes: of the device; on a Jetson that of the whole board.
        driver: newest CUDA version that the driver runs, 12060 for 12.6.
    """

    index: int
    name: str
    capability: int
    memory_bytes: int
    driver: int


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA programs of this process see; none without a driver."""
    try:
        cuda = ctypes.CDLL(_LIBRARY)
    except OSError:
        return ()
    return read(cuda)


def read(cuda: ctypes.CDLL) -> tuple[Gpu, ...]:
    """The GPUs of a loaded driver library; none where it refuses to start."""
    count, driver = ctypes.c_int(), ctypes.c_int()
    if (
        cuda.cuInit(0)
        or cuda.cuDriverGetVersion(ctypes.byref(driver))
        or cuda.cuDeviceGetCount(ctypes.byref(count))
    ):
        return ()
    found = (_read_one(cuda, index, driver.value) for index in range(count.value))
    return tuple(gpu for gpu in found if gpu is not None)


def _read_one(cuda: ctypes.CDLL, index: int, driver: int) -> Gpu | None:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    if (
        cuda.cuDeviceGet(ctypes.byref(device), index)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY[0], device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY[1], device)
    ):
        return None
    capability = 10 * major.value + minor.value
    return Gpu(index, name.value.decode(errors="replace"), capability, memory.value, driver)
