"""The GPU for the executor where PyTorch is not installed: CuPy arrays, one stream, one CUDA graph.

Ops with kernels of ours are launched from code that was compiled ahead of time
(:mod:`fuseengine.runtime.cubins`), as planned by the compile side
(:mod:`fuseengine.runtime.launches`). The filters of lengths that those kernels do not do are
cuFFT's. The few others (sums, products, copies) are CuPy's: it compiles them with NVRTC when a
program first runs, before its graph is captured, and keeps them in its own cache.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fuseengine.errors import BackendUnavailableError, CaptureError, FrameError, FuseEngineError
from fuseengine.program import Node
from fuseengine.runtime import ops
from fuseengine.runtime.cubins import Store
from fuseengine.runtime.executor import Call
from fuseengine.runtime.lanes import Mark
from fuseengine.runtime.launches import FILE, BoundLaunch, Launches, OpCall, frame_key, key_of

log = logging.getLogger("fuseengine")

CUBINS = "FUSEENGINE_CUBINS"
"""Names a folder of compiled kernels, for engines that do not bring their own."""

_PLANNED = (
    "compose_priors",
    "criss_cross_attention",
    "ddim_step",
    "joint_ddim_step",
)
"""Ops that only kernels of ours compute here."""

_FILTERS = ("circular_convolution", "wiener_deconvolution")


class CupyDevice:
    """Arrays are float32 CuPy arrays; everything runs on one non-blocking stream.

    Args:
        kernels: a store of compiled kernels, or its folder; None: what FUSEENGINE_CUBINS names,
            else none, and only programs of elementwise ops and filters run.
        index: number of the GPU.

    Attributes:
        stream: the stream.
        capability: of the GPU, two digits.
        why_no_graph: why the last program is not one CUDA graph; "" when it is.

    Raises:
        BackendUnavailableError: CuPy is not installed or finds no GPU, or the kernels do not run
            on it.
        KernelStoreError: the folder is damaged.
    """

    def __init__(self, kernels: Store | Path | str | None = None, index: int = 0) -> None:
        self._cp = _cupy()
        self.index = index
        try:
            self.capability = int(self._cp.cuda.Device(index).compute_capability)
            with self._cp.cuda.Device(index):
                self.stream = self._cp.cuda.Stream(non_blocking=True)
        except RuntimeError as error:  # CuPy's errors of driver and runtime
            raise BackendUnavailableError(
                f"CuPy finds no usable GPU {index} ({error}); expected an NVIDIA GPU and a driver "
                "for the CUDA version that CuPy is built for"
            ) from error
        kernels = kernels or os.environ.get(CUBINS) or None
        self._store = Store.load(kernels) if isinstance(kernels, (str, Path)) else kernels
        self._target, self._launches = self.capability, Launches()
        if self._store is not None:
            self._target = self._store.target(self.capability)
            if (self._store.folder / FILE).exists():
                self._launches = Launches.load(self._store.folder)
        self._staged: dict[int, tuple[Any, NDArray[np.float32]]] = {}
        self._conversions: dict[str, list[BoundLaunch] | None] = {}
        self._lanes: CupyLanes | None = None
        self.why_no_graph = ""

    # --- the executor's protocol ------------------------------------------------------------------

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The GPU and the stream, current for this thread."""
        with self._cp.cuda.Device(self.index), self.stream:
            yield

    def empty(self, shape: tuple[int, ...]) -> Any:
        """A float32 array of zeros."""
        with self.active():
            return self._cp.zeros(shape, np.float32)

    def constant(self, array: NDArray[np.float32]) -> Any:
        """The array on the GPU."""
        return self._upload(np.ascontiguousarray(array, np.float32))

    def bind_op(self, node: Node, inputs: Sequence[Any], output: Any) -> Call:
        """The call that computes an op in place, on the stream that is current when it is made.

        Raises:
            CaptureError: unknown op.
            BackendUnavailableError: no launches were planned for these shapes, or their code is
                not in the store.
        """
        if node.target not in ops.OPS:
            raise CaptureError(
                f"op {node.target!r} is unknown; a newer version may have written it"
            )
        with self.active():
            if node.target in ops.PORTABLE:
                return ops.bind(node.target, inputs, output, node.attrs, self._cp)
            key = key_of(node.target, [x.shape for x in inputs], output.shape, node.attrs)
            call = self._launches.get(key, self._target)
            if node.target in _FILTERS:
                return self._bind_filter(node, inputs, output, call)
            if call is None:
                raise BackendUnavailableError(self._unplanned(node.target, inputs, output))
            return self._bind_planned(call, {**_numbered(inputs), "out": output})

    def wrap(self, calls: Sequence[Call]) -> Call:
        """One CUDA graph of all calls; where one of them cannot be captured, the calls.

        They run twice before: what allocates, plans or compiles does so then. What they allocate
        comes from a pool that nobody else uses, because a replayed graph writes there again.
        """
        calls = tuple(calls)
        pool = self._cp.cuda.MemoryPool()

        def run() -> None:
            for call in calls:
                call()

        with self.active(), self._cp.cuda.using_allocator(pool.malloc):
            run()
            run()
            self.stream.synchronize()
            graph = self._captured(run)
        if graph is None:

            def one_by_one() -> None:
                with self.active():
                    run()

            return one_by_one
        stream = self.stream

        # `keep`: the graph knows addresses only.
        def replay(keep: object = (pool, calls)) -> None:
            graph.launch(stream)

        return replay

    def _captured(self, run: Call) -> Any:
        self.why_no_graph = ""
        self.stream.begin_capture()
        try:
            run()
        except (RuntimeError, FuseEngineError) as error:
            # Ending is what makes the stream usable again; it fails as the capture did.
            with contextlib.suppress(RuntimeError):
                self.stream.end_capture()
            self.why_no_graph = f"{type(error).__name__}: {error}"
        else:
            try:
                return self.stream.end_capture()
            except RuntimeError as error:
                self.why_no_graph = f"{type(error).__name__}: {error}"
        log.warning(
            "the program is not captured into a CUDA graph and runs call by call: %s",
            self.why_no_graph,
        )
        return None

    def host(self, array: Any) -> NDArray[np.float32]:
        """Page-locked memory beside an array, made once and kept."""
        if id(array) not in self._staged:
            import cupyx

            # The array is kept as well: another one may not get its id.
            self._staged[id(array)] = array, cupyx.empty_pinned(array.shape, np.float32)
        return self._staged[id(array)][1]

    def send(self, array: Any) -> None:
        """Copy from page-locked memory without waiting."""
        host = self.host(array)
        array.data.copy_from_host_async(host.ctypes.data, host.nbytes, self.stream)

    def fetch(self, array: Any) -> NDArray[np.float32]:
        """Copy to page-locked memory, and wait for it."""
        host = self.host(array)
        array.data.copy_to_host_async(host.ctypes.data, host.nbytes, self.stream)
        self.stream.synchronize()
        return host

    def synchronize(self) -> None:
        """Wait for the stream."""
        self.stream.synchronize()

    def lanes(self) -> CupyLanes:
        """Streams for copies beside the device's own."""
        if self._lanes is None:
            self._lanes = CupyLanes(self)
        return self._lanes

    # --- ops --------------------------------------------------------------------------------------

    def _upload(self, array: NDArray[Any]) -> Any:
        with self.active():
            made = self._cp.asarray(array)
            self.stream.synchronize()  # the source may go
            return made

    def _bind_planned(self, call: OpCall, arrays: Mapping[str, Any]) -> Call:
        cp = self._cp
        arrays = dict(arrays)
        arrays |= {f"scratch{i}": cp.empty(n, cp.uint8) for i, n in enumerate(call.scratch)}
        arrays |= {f"table{i}": self._upload(table) for i, table in enumerate(call.tables)}
        addresses = {name: int(array.data.ptr) for name, array in arrays.items()}
        assert self._store is not None  # where the launches are from
        launches = [
            BoundLaunch(launch, self._store, self.capability, addresses, self.index)
            for launch in call.launches
        ]

        # `keep`: launches know addresses only.
        def run(keep: object = arrays) -> None:
            for launch in launches:
                launch()

        return run

    def _bind_filter(
        self, node: Node, inputs: Sequence[Any], output: Any, call: OpCall | None
    ) -> Call:
        # A filter's kernel is a constant of the program: its spectrum is made once, in float64.
        x, kernel = inputs
        height, width = (int(n) for n in x.shape[-2:])
        spectrum = ops.filter_spectrum(node.target, kernel.get(), (height, width), node.attrs)
        if call is not None:
            gain = self._upload(spectrum.astype(np.complex64))
            return self._bind_planned(call, {"in0": x, "spectrum": gain, "out": output})
        # cuFFT scales neither way.
        gain = self._upload((spectrum / (height * width)).astype(np.complex64))
        return self._bind_cufft(x, gain, output)

    def _bind_cufft(self, x: Any, gain: Any, output: Any) -> Call:
        """``irfft2(gain rfft2(x))``: plans and the half spectrum are made here and kept."""
        from cupyx.scipy.fftpack import get_fft_plan

        cp, cufft = self._cp, self._cp.cuda.cufft
        size = (int(x.shape[-2]), int(x.shape[-1]))
        source, target = x.reshape(-1, *size), output.reshape(-1, *size)
        half = cp.empty((len(source), *gain.shape), cp.complex64)
        forward = get_fft_plan(source, axes=(1, 2), value_type="R2C")
        back = get_fft_plan(half, shape=size, axes=(1, 2), value_type="C2R")

        def run() -> None:
            forward.fft(source, half, cufft.CUFFT_FORWARD)
            cp.multiply(half, gain, out=half)
            back.fft(half, target, cufft.CUFFT_INVERSE)

        return run

    def _unplanned(self, op: str, inputs: Sequence[Any], output: Any) -> str:
        shapes = ", ".join(str(tuple(x.shape)) for x in (*inputs, output))
        if self._store is None:
            return (
                f"{op} needs compiled kernels, and this engine brings none; compile it with "
                f"--target of a GPU, or name a folder of them in {CUBINS}"
            )
        return (
            f"no launches of {op} for {shapes} and capability {self._target} in "
            f"{self._store.folder}, which was compiled for results of "
            f"{', '.join(self._launches.sizes()[:6]) or 'no shape'}; compile the engine for this "
            "frame size and GPU (--size, --target)"
        )

    # --- frames that are on the GPU already -------------------------------------------------------

    def load_frame(
        self, frame: Any, planes: Any, channels: str, *, low: float, scale: float, padding: str
    ) -> None:
        """``planes = clip((frame - low) scale, 0, 1)``, padded; on the stream, without waiting.

        Args:
            frame: (H, W) or (H, W, 3) CuPy array: uint8, uint16 or float32.
            planes: (1, 1 or 3, Hp, Wp) of the executor.
            channels: "luma" or "rgb".
            low: the value that becomes 0.
            scale: 1 / (value that becomes 1 - low).
            padding: "reflect" or "white".

        Raises:
            FrameError: no kernel for such frames.
        """
        with self.active():
            frame = self._dense(frame)
            launches = self._conversion("frame_in", frame, planes, channels)
            addresses = {"in0": int(frame.data.ptr), "out": int(planes.data.ptr)}
            for launch in launches:
                launch(addresses, {"low": low, "scale": scale})
            if padding == "white":
                planes[..., frame.shape[0] :, :] = 1.0
                planes[..., frame.shape[1] :] = 1.0

    def store_frame(self, fused: Any, visible: Any, out: Any, channels: str) -> None:
        """The fused planes as a frame like the visible one; on the stream, without waiting.

        Args:
            fused: (1, 1 or 3, Hp, Wp) of the executor.
            visible: the visible frame, as :meth:`load_frame` takes it.
            out: dense CuPy array of its shape and type; not ``visible`` itself.
            channels: "luma" or "rgb".

        Raises:
            FrameError: no kernel for such frames.
        """
        with self.active():
            visible = self._dense(visible)
            addresses = {"in0": fused, "in1": visible, "out": out}
            for launch in self._conversion("frame_out", visible, fused, channels):
                launch({name: int(array.data.ptr) for name, array in addresses.items()})

    def _dense(self, frame: Any) -> Any:
        """The frame as the kernels take it: contiguous, four bytes at a time."""
        if frame.flags.c_contiguous and frame.data.ptr % 4 == 0:
            return frame
        return frame.copy(order="C")

    def _conversion(self, way: str, frame: Any, planes: Any, channels: str) -> list[BoundLaunch]:
        key = frame_key(way, frame.dtype.str, frame.shape, planes.shape, channels)
        if key not in self._conversions:
            call = self._launches.get(key, self._target)
            self._conversions[key] = None
            if call is not None and self._store is not None:
                self._conversions[key] = [
                    BoundLaunch(launch, self._store, self.capability, {}, self.index)
                    for launch in call.launches
                ]
        launches = self._conversions[key]
        if launches is None:
            raise FrameError(
                f"a {frame.dtype} frame {frame.shape} on the GPU: no conversion of it was compiled "
                "into this engine; expected (H, W) or (H, W, 3) of uint8 or float32, or (H, W) of "
                "uint16, of the engine's size: convert it, or hand over a NumPy array"
            )
        return launches


class CupyLane:
    """A stream of a device."""

    def __init__(self, device: CupyDevice, stream: Any) -> None:
        self._device, self.stream = device, stream

    def send(self, array: Any, host: Any) -> None:
        """See :class:`fuseengine.runtime.lanes.Lane`."""
        array.data.copy_from_host_async(host.ctypes.data, host.nbytes, self.stream)

    def copy(self, target: Any, source: Any) -> None:
        """Likewise."""
        target.data.copy_from_device_async(source.data, target.nbytes, self.stream)

    def fetch(self, host: Any, array: Any) -> None:
        """Likewise."""
        array.data.copy_to_host_async(host.ctypes.data, host.nbytes, self.stream)

    def record(self, mark: Mark) -> None:
        """Likewise."""
        cast(Any, mark).record(self.stream)

    def after(self, mark: Mark) -> None:
        """Likewise."""
        self.stream.wait_event(mark)

    def active(self) -> contextlib.AbstractContextManager[object]:
        """The GPU is current, and the device's stream: executors run nowhere else."""
        return self._device.active()


class CupyLanes:
    """A stream for each way of copying; computation stays on the device's."""

    def __init__(self, device: CupyDevice) -> None:
        self._device, self._cp = device, device._cp
        with device.active():
            into, out = (self._cp.cuda.Stream(non_blocking=True) for _ in range(2))
        self.into, self.out = CupyLane(device, into), CupyLane(device, out)
        self.compute = CupyLane(device, device.stream)

    def empty(self, shape: tuple[int, ...]) -> Any:
        """An array of zeros."""
        return self._device.empty(shape)

    def pinned(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An array of the host."""
        import cupyx

        with self._device.active():
            return np.asarray(cupyx.empty_pinned(shape, np.float32))

    def mark(self) -> Mark:
        """An event that lets a waiting thread sleep: the processor has other frames to prepare."""
        with self._device.active():
            return cast(Mark, self._cp.cuda.Event(block=True, disable_timing=True))

    def synchronize(self) -> None:
        """Wait for the device's stream."""
        self._device.synchronize()


def _numbered(arrays: Sequence[Any]) -> dict[str, Any]:
    return {f"in{i}": array for i, array in enumerate(arrays)}


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise BackendUnavailableError(
            f"engines on a GPU need CuPy where PyTorch is not installed, and it cannot be imported "
            f"({error}): pip install cupy-cuda13x, or cupy-cuda12x for CUDA 12 (JetPack 6)"
        ) from error
    return cupy
