"""Moving pictures, stand-in engines and files of them."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fuseengine.errors import SizeMismatchError
from fuseengine.video import FusedFrame

SIZE = (48, 64)


def moving(count, size=SIZE, colour=False, step=1):
    """A square that moves to the right by `step` pixels a frame: (N, H, W) or (N, H, W, 3)."""
    height, width = size
    frames = np.full((count, height, width), 40, np.uint8)
    for k, frame in enumerate(frames):
        left = (k * step) % (width - 12)
        frame[12:28, left : left + 12] = 200
    return np.repeat(frames[..., None], 3, axis=-1) if colour else frames


def numbered(count, size=SIZE):
    """Frames whose every pixel is the frame's number."""
    return [np.full((*size, 3), k % 256, np.uint8) for k in range(count)]


class SleepingEngine:
    """Takes its time without the interpreter's lock, and gives the visible frame back."""

    def __init__(self, milliseconds=0.0, size=None, channels="rgb"):
        self.seconds, self.size = milliseconds / 1e3, size
        self.program = SimpleNamespace(channels=channels)
        self.seen = []
        self.calls = 0
        self.fail_at = None

    def __call__(self, infrared, visible, **options):
        self.calls += 1
        if self.fail_at == self.calls:
            raise RuntimeError("the engine is on fire")
        if self.size is not None and visible.shape[:2] != self.size:
            raise SizeMismatchError(f"got {visible.shape}, expected {self.size}")
        self.seen.append((infrared.shape, infrared.dtype, visible.shape))
        if self.seconds:
            time.sleep(self.seconds)
        return visible.copy()


class Events(list):
    """A listener."""

    def __call__(self, event):
        self.append(event)

    def kinds(self, camera=None):
        return [e.kind for e in self if camera is None or e.camera == camera]


@pytest.fixture
def events():
    return Events()


@pytest.fixture(autouse=True)
def no_thread_stays():
    """Whatever a test did, a stream leaves no thread behind."""
    yield
    end = time.monotonic() + 3
    while time.monotonic() < end:
        left = [t.name for t in threading.enumerate() if t.name.startswith("fuse: ")]
        if not left:
            return
        time.sleep(0.01)
    raise AssertionError(f"threads left: {left}")


def camera(frames, rate=100.0, pause=None):
    """A live generator: a frame each 1 / rate seconds; `pause` = (index, seconds) before it.

    As a camera, it does not make up for frames that nobody fetched.
    """
    due = time.monotonic()
    for k, frame in enumerate(frames):
        if pause is not None and k == pause[0]:
            time.sleep(pause[1])
        time.sleep(max(0.0, due - time.monotonic()))
        now = time.monotonic()
        yield now, frame
        due = max(due, now - 1 / rate) + 1 / rate


def fused(image, name="rgb24", time_s=0.0, index=0, **more):
    return FusedFrame(image, name, time_s=time_s, index=index, **more)
