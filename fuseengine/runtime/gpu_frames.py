"""Frames that are on the GPU already: fused without a copy through the host. No torch.

Takes whatever has ``__cuda_array_interface__`` or DLPack on a CUDA device (CuPy, PyTorch, Numba,
a camera library's buffer); a frame on the host beside one on the GPU is uploaded. The work is
queued behind what the caller's current stream holds, and what the caller queues there next comes
after it: nobody waits on the host.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from fuseengine.errors import FrameError, SizeMismatchError
from fuseengine.runtime.executor import Executor
from fuseengine.runtime.frames import FrameAdapter, range_bounds, split_frames

_ON_CUDA = (2, 13)
"""DLPack's kDLCUDA and kDLCUDAManaged."""

_FULL_SCALE = {"|u1": 255.0, "<u2": 65535.0, "<f4": 1.0}

Plan = Callable[[tuple[int, int]], tuple[FrameAdapter, Executor]]
"""Frame size -> what an engine runs frames of that size with."""


def on_gpu(frame: Any) -> bool:
    """Whether a frame is an array on an NVIDIA GPU; asks the array, and imports nothing."""
    tensor = _torch_tensor(frame)
    if tensor is not None:
        return bool(tensor.is_cuda)
    if hasattr(frame, "__cuda_array_interface__"):
        return True
    ask = getattr(frame, "__dlpack_device__", None)
    return ask is not None and int(ask()[0]) in _ON_CUDA


def fuse(
    plan: Plan,
    infrared: Any,
    visible: Any,
    *,
    infrared_range: tuple[float, float] | Literal["minmax"] | None = None,
    out: Any = None,
) -> Any:
    """Fuse one pair or a batch of pairs of which a frame is on the GPU.

    Values are not looked at, as that would wait for the GPU: NaN counts as 0, and what is outside
    a frame's range is clipped.

    Args:
        plan: of the engine, whose executors run on a
            :class:`fuseengine.runtime.cupy_device.CupyDevice`.
        infrared: (H, W), (H, W, 3) or a batch: uint8, uint16 or float32.
        visible: likewise; its size.
        infrared_range: (lo, hi), what maps to 0..1.
        out: a dense array on the GPU to write, of the visible input's shape and dtype.

    Returns:
        ``out``; or a new array of the visible input's shape and dtype: a PyTorch tensor if that is
        one, else a CuPy array.

    Raises:
        FrameError: a shape or dtype that cannot be used, or settings that would wait for the GPU.
        SizeMismatchError: the two sizes differ.
    """
    import cupy

    if infrared_range == "minmax":
        raise FrameError(
            "infrared_range='minmax' for a frame on the GPU; expected (lo, hi), because finding "
            "them would wait for the GPU in every frame"
        )
    bounds = range_bounds(infrared_range)
    caller = _stream_of(cupy, visible)
    given_a, given_b = _array(cupy, "infrared", infrared), _array(cupy, "visible", visible)
    a_frames, b_frames = split_frames("infrared", given_a), split_frames("visible", given_b)
    sizes = [(int(f[0].shape[0]), int(f[0].shape[1])) for f in (a_frames, b_frames)]
    if len(a_frames) != len(b_frames):
        raise FrameError(
            f"got {len(a_frames)} infrared and {len(b_frames)} visible frames, expected as many"
        )
    if sizes[0] != sizes[1]:
        raise SizeMismatchError(
            f"got infrared {sizes[0]} and visible {sizes[1]} (height, width) on the GPU, expected "
            "equal sizes; resample them there, or hand over NumPy arrays with resize='infrared'"
        )
    adapter, executor = plan(sizes[1])
    device: Any = executor.device
    target = given_b if out is None else _target(cupy, out, given_b)
    _order(cupy, caller, device.stream)
    with device.active():
        if out is None:
            target = cupy.empty(given_b.shape, given_b.dtype)
        settings = {"channels": adapter.channels, "padding": adapter.padding}
        for a, b, made in zip(a_frames, b_frames, split_frames("out", target), strict=True):
            low, high = bounds or (0.0, _full_scale("infrared", a))
            load = device.load_frame
            load(a, executor.inputs[0], low=low, scale=1.0 / (high - low), **settings)
            load(b, executor.inputs[1], low=0.0, scale=1.0 / _full_scale("visible", b), **settings)
            executor.run()
            device.store_frame(executor.output, b, made, adapter.channels)
    _order(cupy, device.stream, caller)
    if out is not None:
        return out
    return target if _torch_tensor(visible) is None else sys.modules["torch"].from_dlpack(target)


def _torch_tensor(given: Any) -> Any:
    """What was given if it is a PyTorch tensor, without its gradient; else None."""
    kind = getattr(sys.modules.get("torch"), "Tensor", None)
    return given.detach() if kind is not None and isinstance(given, kind) else None


def _array(cupy: Any, name: str, given: Any) -> Any:
    """A CuPy array over the given memory; the host's is uploaded."""
    tensor = _torch_tensor(given)
    given = given if tensor is None else tensor
    try:
        if isinstance(given, np.ndarray) or hasattr(given, "__cuda_array_interface__"):
            return cupy.asarray(given)
        if hasattr(given, "__dlpack__"):
            shared = cupy if on_gpu(given) else np
            return cupy.asarray(shared.from_dlpack(given))
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise FrameError(
            f"{name}: a {type(given).__name__} that CuPy cannot take ({error}); expected an array "
            "of uint8, uint16 or float32 with __cuda_array_interface__ or DLPack"
        ) from error
    raise FrameError(
        f"{name}: got a {type(given).__name__}, expected a CuPy array, a PyTorch tensor, a NumPy "
        "array or anything else with __cuda_array_interface__ or DLPack"
    )


def _target(cupy: Any, out: Any, visible: Any) -> Any:
    target = _array(cupy, "out", out) if on_gpu(out) else None
    fits = target is not None and (target.shape, target.dtype) == (visible.shape, visible.dtype)
    if target is None or not fits or not target.flags.c_contiguous or target.data.ptr % 4:
        given = f"a {type(out).__name__}" if target is None else f"{target.dtype} {target.shape}"
        raise FrameError(
            f"out: got {given}, expected a dense array on the GPU of {visible.dtype} "
            f"{visible.shape}, like the visible input"
        )
    if target.data.ptr == visible.data.ptr:
        raise FrameError("out: got the visible frame itself, expected other memory")
    return target


def _full_scale(name: str, frame: Any) -> float:
    if frame.dtype.str not in _FULL_SCALE:
        raise FrameError(
            f"{name}: got {frame.dtype} on the GPU, expected uint8, uint16 or float32; convert it, "
            "for example with .astype('float32')"
        )
    return _FULL_SCALE[frame.dtype.str]


def _stream_of(cupy: Any, given: Any) -> Any:
    """The stream that the caller works on where the array is from."""
    if _torch_tensor(given) is not None and given.is_cuda:
        torch = sys.modules["torch"]
        return cupy.cuda.ExternalStream(torch.cuda.current_stream(given.device).cuda_stream)
    return cupy.cuda.get_current_stream()


def _order(cupy: Any, first: Any, second: Any) -> None:
    """What is queued on the second stream from now on comes after all that is on the first."""
    event = cupy.cuda.Event(disable_timing=True)
    event.record(first)
    second.wait_event(event)
