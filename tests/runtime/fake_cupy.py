"""A stand-in for CuPy without a GPU: for the order of things and the life of memory, not for CUDA.

Arrays are NumPy's. What is queued on a stream happens at once and is written to ``events``; kernels
of ours are written there with the words that the driver would get, and nobody runs them. A captured
graph repeats what was queued while it was captured. What a real device does is in tests/gpu.

With ``cuda.chance``, a ``random.Random``, streams go on by themselves by chance, as far as events
let them, and otherwise only when the host waits for them: what a program does not order happens in
an order that hurts sooner or later.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections import deque

import numpy as np


class FakeError(RuntimeError):
    """As CuPy's errors of driver and runtime."""


class FakePointer:
    def __init__(self, array, cuda):
        self.array, self.cuda = array, cuda
        self.ptr = array.__array_interface__["data"][0]

    def copy_from_host_async(self, address, count, stream):
        self._copy("to device", address, self.ptr, count, stream)

    def copy_to_host_async(self, address, count, stream):
        self._copy("to host", self.ptr, address, count, stream)

    def copy_from_device_async(self, source, count, stream):
        self._copy("on device", source.ptr, self.ptr, count, stream)

    def _copy(self, way, source, target, count, stream):
        import ctypes

        self.cuda.do((way, count), lambda: ctypes.memmove(target, source, count), stream=stream)


class FakeArray(np.ndarray):
    """A NumPy array with what device code asks of a CuPy array."""

    module = None

    @property
    def data(self):
        return FakePointer(np.asarray(self), self.module.cuda)

    @property
    def __cuda_array_interface__(self):
        return {**np.asarray(self).__array_interface__, "version": 3, "strides": None}

    def get(self):
        self.module.cuda.forbid_in_capture("get")
        return np.array(self)


class FakeStream:
    def __init__(self, cuda, name):
        self.cuda, self.name, self.captured, self.ptr = cuda, name, None, id(self)
        self.queue, self.queued, self.done = deque(), 0, 0
        cuda.all_streams.append(self)

    def __enter__(self):
        self.cuda.streams.append(self)
        return self

    def __exit__(self, *error):
        self.cuda.streams.pop()

    def synchronize(self):
        self.cuda.forbid_in_capture("synchronize")
        self.cuda.events.append(("synchronize", self.name))
        self.finish(self.queued)

    def add(self, work):
        """Queue a call, or an event's place in another stream to wait for."""
        with self.cuda.lock:
            self.queue.append(work)
            self.queued += 1
            if self.cuda.chance is None:
                self.finish(self.queued)
            else:
                self.cuda.play()

    def blocked(self):
        """Where another stream must have come first."""
        head = self.queue[0]
        return head if isinstance(head, tuple) and head[0].done < head[1] else None

    def step(self):
        work = self.queue.popleft()
        if not isinstance(work, tuple):
            work()
        self.done += 1

    def finish(self, count):
        """Do what was queued up to a place, and only what that needs of other streams."""
        with self.cuda.lock:
            while self.done < count:
                before = self.blocked()
                if before is not None:
                    before[0].finish(before[1])
                self.step()

    def begin_capture(self):
        assert self.name != "null", "CUDA refuses to capture the legacy stream"
        self.cuda.events.append(("begin capture", self.name))
        self.captured = []

    def end_capture(self):
        captured, self.captured = self.captured, None
        self.cuda.events.append(("end capture", self.name))
        if self.cuda.broken_capture:
            self.cuda.broken_capture = False
            raise FakeError("cudaErrorStreamCaptureInvalidated")
        return FakeGraph(self.cuda, captured)

    def wait_event(self, event):
        self.cuda.events.append(("wait", self.name, event.stream.name))
        self.add((event.stream, event.count))


class FakeGraph:
    def __init__(self, cuda, calls):
        self.cuda, self.calls = cuda, calls

    def launch(self, stream):
        self.cuda.events.append(("graph", stream.name))
        for call in self.calls:
            stream.add(call)


class FakeEvent:
    def __init__(self, block=False, disable_timing=False):
        self.stream, self.count = None, 0

    def record(self, stream):
        self.stream, self.count = stream, stream.queued

    def synchronize(self):
        if self.stream is not None:
            self.stream.cuda.forbid_in_capture("synchronize")
            self.stream.finish(self.count)


class FakeCuda:
    def __init__(self, module, capability):
        self.module, self.capability = module, capability
        self.events, self.broken_capture, self.pools = [], False, []
        self.chance, self.lock, self.all_streams = None, threading.RLock(), []
        self.null = FakeStream(self, "null")
        self.per_thread = threading.local()
        self.Event = FakeEvent
        self.cufft = types.SimpleNamespace(CUFFT_FORWARD=-1, CUFFT_INVERSE=1)

    def Device(self, index):
        device = contextlib.nullcontext()
        device.compute_capability = str(self.capability)
        return device

    def Stream(self, non_blocking=False):
        assert non_blocking, "a blocking stream waits for the legacy one"
        return FakeStream(self, f"stream {len(self.all_streams)}")

    @property
    def streams(self):
        """Of the calling thread, the current one last."""
        if not hasattr(self.per_thread, "streams"):
            self.per_thread.streams = [self.null]
        return self.per_thread.streams

    def get_current_stream(self):
        return self.streams[-1]

    def MemoryPool(self):
        return types.SimpleNamespace(malloc=object())

    @contextlib.contextmanager
    def using_allocator(self, malloc):
        self.pools.append(malloc)
        try:
            yield
        finally:
            self.pools.pop()

    def do(self, event, call, stream=None):
        """Queue something: now, or when the graph that is being captured is launched."""
        stream = stream or self.get_current_stream()
        self.events.append((*event, stream.name))
        if stream.captured is not None:
            stream.captured.append(call)
        else:
            stream.add(call)

    def play(self):
        """Let some streams go on."""
        for _ in range(self.chance.randrange(4)):
            stream = self.chance.choice(self.all_streams)
            if stream.queue and stream.blocked() is None:
                stream.step()

    def forbid_in_capture(self, what):
        if any(stream.captured is not None for stream in self.streams):
            raise FakeError(f"cudaErrorStreamCaptureUnsupported: {what}")


class FakeFunction:
    """A kernel: remembers its launches."""

    def __init__(self, cuda, path, entry):
        self.cuda, self.path, self.entry = cuda, path, entry

    def __call__(self, grid, block, words, shared_mem):
        run = self.cuda.module.run_kernel
        self.cuda.do(
            ("kernel", self.entry),
            lambda: run(self.path, self.entry, grid, block, words, shared_mem),
        )


def make(capability=87):
    """The modules ``cupy``, ``cupyx`` and ``cupyx.scipy.fftpack``."""
    module = types.ModuleType("cupy")
    module.__path__ = []
    cuda = module.cuda = FakeCuda(module, capability)
    kind = type("ndarray", (FakeArray,), {"module": module})
    module.ndarray = kind
    module.run_kernel = lambda *launch: None
    module.uint8, module.complex64, module.float32 = np.uint8, np.complex64, np.float32

    def own(array):
        cuda.forbid_in_capture("an allocation outside the pool" if not cuda.pools else "upload")
        return np.array(array).view(kind)

    module.asarray = lambda given: given if isinstance(given, kind) else own(given)
    module.zeros = lambda shape, dtype: own(np.zeros(shape, dtype))
    module.empty = lambda shape, dtype: own(np.full(shape, 77, dtype))  # fresh memory is anything
    module.where = np.where

    def queued(name):
        function = getattr(np, name)

        def call(*operands, out=None, **options):
            cuda.do((name,), lambda: function(*operands, out=out, **options))

        return call

    for name in ("add", "subtract", "multiply", "divide", "clip", "concatenate"):
        setattr(module, name, queued(name))
    module.copyto = lambda out, given: cuda.do(("copyto",), lambda: np.copyto(out, given))

    class RawModule:
        def __init__(self, path):
            cuda.forbid_in_capture("loading a module")
            self.path = path

        def get_function(self, entry):
            return FakeFunction(cuda, self.path, entry)

    module.RawModule = RawModule
    cupyx = types.ModuleType("cupyx")
    cupyx.empty_pinned = lambda shape, dtype: np.full(shape, 77, dtype)
    fftpack = types.ModuleType("cupyx.scipy.fftpack")
    fftpack.get_fft_plan = lambda a, shape=None, axes=None, value_type="C2C": FakeFft(
        cuda, shape, value_type
    )
    names = ("cupy", "cupyx", "cupyx.scipy", "cupyx.scipy.fftpack")
    return dict(zip(names, (module, cupyx, types.ModuleType("cupyx.scipy"), fftpack), strict=True))


class FakeFft:
    def __init__(self, cuda, shape, value_type):
        cuda.forbid_in_capture("making a plan")
        self.cuda, self.shape, self.value_type = cuda, shape, value_type

    def fft(self, given, out, direction):
        def run():
            if self.value_type == "R2C":
                out[...] = np.fft.rfft2(given)
            else:  # cuFFT does not scale
                out[...] = np.fft.irfft2(given, s=self.shape) * np.prod(self.shape)

        self.cuda.do(("fft", self.value_type), run)
