"""An engine on a device with lanes: threads that take as long as they are told.

Memory and order are real, what is computed is not: the visible frame comes back.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from types import SimpleNamespace

import numpy as np

from fuseengine.pipelined import Pipelined
from fuseengine.runtime.frames import FrameAdapter
from tests.video.conftest import SIZE


class Mark:
    def __init__(self):
        self.reached = None

    def synchronize(self):
        if self.reached is not None:
            self.reached.wait()


class ThreadLane:
    """A queue and the thread that works it off; a copy takes its time."""

    def __init__(self, milliseconds):
        self.seconds, self.work = milliseconds / 1e3, queue.SimpleQueue()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        for call in iter(self.work.get, None):
            call()

    def send(self, array, host):
        def copy():
            time.sleep(self.seconds / 2)  # one of two inputs
            array[...] = host

        self.work.put(copy)

    def copy(self, target, source):
        self.work.put(lambda: np.copyto(target, source))

    def fetch(self, host, array):
        def copy():
            time.sleep(self.seconds)
            host[...] = array

        self.work.put(copy)

    def record(self, mark):
        mark.reached = threading.Event()
        self.work.put(mark.reached.set)

    def after(self, mark):
        self.work.put(mark.reached.wait)

    def active(self):
        return contextlib.nullcontext()


class Device:
    """Lanes, and an executor that gives the visible frame back."""

    def __init__(self, copy_ms, compute_ms):
        self.into, self.out = ThreadLane(copy_ms), ThreadLane(copy_ms)
        self.compute, self.seconds = ThreadLane(0), compute_ms / 1e3
        shape = (1, 3, *SIZE)
        self.inputs = tuple(np.empty(shape, np.float32) for _ in range(2))
        self.output = np.empty(shape, np.float32)
        self.device, self.fail_at, self.runs = self, None, 0
        self.empty = self.pinned = lambda shape: np.full(shape, np.nan, np.float32)
        self.mark, self.synchronize = Mark, lambda: None

    def lanes(self):
        return self

    def run(self):
        self.runs += 1
        if self.runs == self.fail_at:
            raise RuntimeError("the device is on fire")

        def fuse():
            time.sleep(self.seconds)
            np.copyto(self.output, self.inputs[1])

        self.compute.work.put(fuse)

    def stop(self):
        for lane in (self.into, self.compute, self.out):
            lane.work.put(None)


class LaneEngine:
    """What a stream sees of an engine on a GPU."""

    device, size = "cuda", SIZE

    def __init__(self, copy_ms=0.0, compute_ms=0.0):
        self.program = SimpleNamespace(channels="rgb")
        self.on = Device(copy_ms, compute_ms)
        self.adapter, self.lock = FrameAdapter(SIZE, "rgb"), threading.Lock()
        self.most, self.pipelines, self.called = 0, [], 0

    def pipelined(self):
        engine = self

        class Watched(Pipelined):
            def submit(self, *pair, **options):
                ticket = super().submit(*pair, **options)
                engine.most = max(engine.most, len(self._busy))
                return ticket

        self.pipelines.append(Watched(lambda size: (self.adapter, self.on), self.lock))
        return self.pipelines[-1]

    def __call__(self, infrared, visible, **options):
        """One pair from end to end, through the same lanes."""
        self.called += 1
        with Pipelined(lambda size: (self.adapter, self.on), self.lock) as alone:
            return alone.submit(np.asarray(infrared), np.asarray(visible), **options).result()
