"""``compile(model)`` and the engine it gives."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections import OrderedDict
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np

from fuseengine.backends import BACKENDS, StageSource
from fuseengine.description import Choice
from fuseengine.errors import FrameError, SettingError, SizeMismatchError
from fuseengine.pipelined import Pipelined
from fuseengine.program import Program, StageVariant, resolve
from fuseengine.report import Profile, Report
from fuseengine.runtime import gpu_frames
from fuseengine.runtime.executor import CpuDevice, Device, Executor, StageRunner
from fuseengine.runtime.frames import FrameAdapter, prepare_pair
from fuseengine.temporal import Memory

_SIZES_KEPT = 4
"""Executors that an engine without a fixed size keeps."""


class Engine:
    """A program whose stages are lowered, with its buffers: call it with frames.

    One engine fuses one pair at a time; calls from several threads wait for each other. Made by
    :func:`fuseengine.compile`.

    Attributes:
        program: the captured model, with its stages merged where that was faster; prints readably.
        report: what compile() tried and chose; prints as a table.
        resumed: the program of a frame that starts from the one before; None: there is none.
        size: (height, width) of the frames it takes, or None: it specialises itself to each size.
        device: "cpu" or "cuda".
    """

    def __init__(
        self,
        program: Program,
        source: StageSource,
        choice: Choice,
        report: Report,
        *,
        size: tuple[int, int] | None,
        device: str,
        threads: int,
        ready: Executor | None = None,
        resumed: Program | None = None,
    ) -> None:
        self.program, self.report, self.resumed = program, report, resumed
        self.size, self.device, self.threads = size, device, threads
        self._source, self._choice = source, dict(choice)
        self._plans: OrderedDict[tuple[int, int], tuple[FrameAdapter, Executor]] = OrderedDict()
        self._ready = ready
        self._resumed: WeakKeyDictionary[Executor, Executor] = WeakKeyDictionary()
        self._lock = threading.Lock()
        if size is not None:
            self._plan(size)

    def __call__(
        self,
        infrared: Any,
        visible: Any,
        *,
        out: Any | None = None,
        resize: Literal["infrared"] | None = None,
        infrared_range: tuple[float, float] | Literal["minmax"] | None = None,
        memory: Memory | None = None,
    ) -> Any:
        """Fuse one pair, or a batch of pairs.

        Args:
            infrared: (H, W) or (H, W, 3), or a batch with a leading N; uint8, uint16 or floats in
                [0, 1]; NumPy, torch or anything with DLPack. See
                :func:`fuseengine.runtime.frames.prepare_pair` for all that is taken. An engine that
                runs on a GPU without PyTorch takes frames that are there already, without a copy:
                :func:`fuseengine.runtime.gpu_frames.fuse`.
            visible: likewise; RGB or grey.
            out: for one NumPy pair: where to write, of the visible frame's shape and dtype. By
                default every call gives a new array that the caller owns.
            resize: "infrared" resamples the infrared frame to the visible frame's size.
            infrared_range: (lo, hi) or "minmax": what maps to 0..1, for thermal counts.
            memory: what the frames before became, for an engine compiled with temporal="warm"; a
                batch is then a piece of the video. On a GPU it takes frames of the host.

        Returns:
            The fused frame in the kind, shape and dtype of the visible one; a luma model keeps the
            visible chroma (BT.601 full range).

        Raises:
            FrameError: a frame that cannot be used; SizeMismatchError when the two sizes differ or
                are not the engine's.
            SettingError: a memory, and the engine was compiled without temporal.
        """
        if memory is not None and self.resumed is None:
            raise SettingError(
                "memory: this engine samples every frame in full; expected one compiled with "
                "temporal='warm'"
            )
        on_cupy = self.device != "cpu" and _without_torch(self._source)
        if (
            on_cupy
            and memory is None
            and (gpu_frames.on_gpu(infrared) or gpu_frames.on_gpu(visible))
        ):
            with self._lock:
                return gpu_frames.fuse(
                    self._checked_plan, infrared, visible, infrared_range=infrared_range, out=out
                )
        pair = prepare_pair(infrared, visible, resize=resize, infrared_range=infrared_range)
        self._check_size(pair.size)
        if out is not None:
            _check_out(out, visible, len(pair))
        with self._lock:
            adapter, executor = self._plan(pair.size)
            results = [self._fuse(adapter, executor, ir, vis, memory) for ir, vis in pair]
        if out is None:
            return pair.restore(results)
        out[...] = pair.restore(results)
        return out

    def pipelined(self) -> Pipelined:
        """For frames one after the other on a GPU: copies of one while another is computed.

        Returns:
            A pipeline, to be closed; it takes frames of the host and gives the pictures that calls
            of the engine give. See :class:`fuseengine.pipelined.Pipelined`.

        Raises:
            SettingError: the engine runs on the CPU, where there is nothing to overlap.
        """
        if self.device == "cpu":
            raise SettingError(
                "a pipeline of an engine on the CPU, where there is nothing to overlap; expected "
                "one on a GPU: call the engine itself"
            )
        return Pipelined(self._checked_plan, self._lock)

    def profile(self, runs: int = 20, size: tuple[int, int] | None = None) -> Profile:
        """Time the engine's parts on a synthetic pair.

        Args:
            runs: timed repetitions, after three that are not counted.
            size: frame size; the engine's own, or the one it was measured at, by default.

        Returns:
            p50, p90 and p99 of frames in, every stage and op, frames out, and the whole call.

        Raises:
            SettingError: runs below 1.
        """
        if runs < 1:
            raise SettingError(f"runs={runs}; expected a number >= 1")
        size = size or self.size or self.report.size
        rng = np.random.default_rng(0)
        ir = rng.integers(0, 256, size, dtype=np.uint8)
        vis = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        for _ in range(3):
            self(ir, vis)
        calls, nodes = [], []
        frame, into, out_of, whole = np.zeros((4, runs))
        for run in range(runs):
            begin = time.perf_counter()
            self(ir, vis)
            frame[run] = time.perf_counter() - begin
            # Once more with a clock around each part: overhead is what the parts leave over.
            begin = time.perf_counter()
            pair = prepare_pair(ir, vis)
            with self._lock:
                adapter, executor = self._plan(pair.size)
                start = time.perf_counter()
                for given_ir, given_vis in pair:
                    self._load(adapter, executor, given_ir, given_vis)
                executor.device.synchronize()
                into[run] = time.perf_counter() - start
                nodes.append(executor.run_timed())
                start = time.perf_counter()
                fused = self._store(adapter, executor, vis)
                out_of[run] = time.perf_counter() - start
            pair.restore([fused])
            whole[run] = time.perf_counter() - begin
            calls.append(into[run] + out_of[run] + sum(nodes[-1]) / 1e3)
        rows = [
            ("frames in", into * 1e3),
            *((timing.label, timing.samples) for timing in executor.timings(nodes)),
            ("frames out", out_of * 1e3),
        ]
        return Profile(tuple(rows), frame * 1e3, (whole - np.array(calls)) * 1e3)

    def warm(self, size: tuple[int, int] | None = None) -> None:
        """Run once on what stands in the buffers: first runs are slower, and find what is wrong.

        Args:
            size: (height, width) of the frames; by default the engine's, or the one it was
                measured at.
        """
        executor = self.executor(size)
        with self._lock:
            executor.run()
            executor.device.synchronize()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the engine as one file, which :func:`fuseengine.load` reads without PyTorch.

        Args:
            path: file to write, replaced when it is there; by custom it ends in ``.fuse``.

        Raises:
            BundleError: a stage runs on PyTorch, or the file cannot be written.
        """
        from fuseengine.saved_engine import save

        save(path, self)

    @property
    def choice(self) -> Choice:
        """Backend and precision per stage variant."""
        return self._choice

    @property
    def source(self) -> StageSource:
        """Where its networks come from."""
        return self._source

    def executor(self, size: tuple[int, int] | None = None) -> Executor:
        """What runs the program for frames of a size: for looking at its parts.

        It is the engine's own: whoever uses it sees to it that nobody fuses meanwhile.

        Args:
            size: (height, width); by default the engine's, or the one it was measured at.

        Raises:
            SizeMismatchError: it is not the engine's size.
        """
        size = size or self.size or self.report.size
        with self._lock:
            return self._checked_plan(size)[1]

    def __repr__(self) -> str:
        return f"<Engine {self.report.summary()}>"

    def _check_size(self, size: tuple[int, int]) -> None:
        if self.size is not None and size != self.size:
            raise SizeMismatchError(
                f"the frames are {size[0]}x{size[1]} (height x width), expected "
                f"{self.size[0]}x{self.size[1]}, for which this engine was compiled; compile one "
                "for their size, or with size=None for any size"
            )

    def _checked_plan(self, size: tuple[int, int]) -> tuple[FrameAdapter, Executor]:
        self._check_size(size)
        return self._plan(size)

    def _fuse(
        self, adapter: FrameAdapter, executor: Executor, ir: Any, vis: Any, memory: Memory | None
    ) -> Any:
        self._load(adapter, executor, ir, vis)
        if memory is not None:
            executor = self._next(executor, adapter.size, memory)
        else:
            executor.run()
        return self._store(adapter, executor, vis)

    def _next(self, executor: Executor, frame: tuple[int, int], memory: Memory) -> Executor:
        """Fuse what is loaded as a video's next frame; gives the executor that has the result."""
        device = executor.device
        goes_on = memory.goes_on(*map(device.host, executor.inputs))
        with device.active():
            if goes_on:
                if executor not in self._resumed and self.resumed is not None:
                    self._resumed[executor] = executor.resumed(self.resumed)
                executor = self._resumed[executor]
                executor.inputs[2][...] = memory.estimate
        executor.run()
        with device.active():
            memory.keep(executor.output, frame, self.program.padding, device)
        return executor

    def _load(self, adapter: FrameAdapter, executor: Executor, ir: Any, vis: Any) -> None:
        device = executor.device
        adapter.load(ir, vis, *(device.host(array) for array in executor.inputs))
        for array in executor.inputs:
            device.send(array)

    def _store(self, adapter: FrameAdapter, executor: Executor, vis: Any) -> Any:
        return adapter.store(executor.device.fetch(executor.output), vis)

    def _plan(self, size: tuple[int, int]) -> tuple[FrameAdapter, Executor]:
        plan = self._plans.get(size)
        if plan is None:
            program = self.program
            adapter = FrameAdapter(size, program.channels, program.multiple, program.padding)
            plan = adapter, self._executor(adapter.padded).of_frame(size)
            self._plans[size] = plan
            while len(self._plans) > _SIZES_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(size)
        return plan

    def _executor(self, padded: tuple[int, int]) -> Executor:
        # Sizes that pad to the same one share an executor: lowering is what costs.
        ready, self._ready = self._ready, None
        for executor in (ready, *(executor for _, executor in self._plans.values())):
            if executor is not None and executor.size == padded:
                return executor
        executor = build_executor(
            self.program, self._source, self._choice, padded, self.device, self.threads
        )
        if self.device != "cpu" or any(
            backend == "inductor" for backend, _ in self._choice.values()
        ):
            # Graphs are captured and kernels compiled by the first run: not in a user's frame.
            executor.run()
        return executor


def _check_out(out: Any, visible: Any, pairs: int) -> None:
    if not isinstance(out, np.ndarray) or not isinstance(visible, np.ndarray):
        raise FrameError(
            f"out: got a {type(out).__name__} for a {type(visible).__name__} visible frame; "
            "expected NumPy arrays, the only kind that out= takes"
        )
    if pairs != 1 or out.shape != visible.shape or out.dtype != visible.dtype:
        raise FrameError(
            f"out: got {out.dtype} {out.shape}, expected {visible.dtype} {visible.shape} like the "
            f"visible frame, and one pair (got {pairs}); leave out= away for batches"
        )
    if not out.flags.writeable:
        raise FrameError("out: got a read-only array; expected one that can be written")


def available_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_executor(
    program: Program,
    source: StageSource,
    choice: Choice,
    size: tuple[int, int],
    device: str,
    threads: int,
) -> Executor:
    """Lower every stage variant as chosen and bind the program.

    Args:
        program: the captured model.
        source: where its networks come from.
        choice: backend and precision per variant.
        size: padded height and width.
        device: "cpu" or "cuda".
        threads: CPU threads per stage.

    Returns:
        A ready executor.
    """
    runners: dict[StageVariant, StageRunner] = {}
    for variant, calls in program.variants().items():
        shapes = tuple(resolve(program.values[name].shape, size) for name in calls[0].inputs)
        backend, precision = choice[variant]
        runners[variant] = BACKENDS[backend].lower(
            source, variant, shapes, precision=precision, device=device, threads=threads
        )
    return Executor(program, size, runners, make_device(device, threads, source))


def make_device(device: str, threads: int, source: StageSource | None = None) -> Device:
    """The executor's device.

    Args:
        device: "cpu" or "cuda".
        threads: that the CPU's native ops use.
        source: where networks come from. One that brings compiled GPU kernels, as a bundle can,
            runs without PyTorch, as does everything where that is missing.
    """
    if device == "cpu":
        return CpuDevice(threads)
    if not _without_torch(source):
        from fuseengine.backends.cuda_device import TorchDevice

        return TorchDevice(device)
    from fuseengine.runtime.cupy_device import CupyDevice

    kernels: Any = getattr(source, "kernels", None)
    return CupyDevice(kernels() if getattr(source, "has_kernels", False) else None)


def _without_torch(source: StageSource | None) -> bool:
    """Whether a GPU engine runs on CuPy."""
    return getattr(source, "has_kernels", False) or importlib.util.find_spec("torch") is None
