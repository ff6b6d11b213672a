"""Rings in shared memory: the layout as documented, C on either side, producers that die."""

from __future__ import annotations

import itertools
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fuseengine.errors import SinkError, SourceError
from fuseengine.video import Colour, Picture, include_dir, open_source
from fuseengine.video.shared_memory import SharedMemoryWriter
from tests.helpers import ROOT
from tests.video.conftest import SIZE, moving

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /dev/shm")

COUNTER = itertools.count()


@pytest.fixture
def name():
    name = f"fuse-test-{os.getpid()}-{next(COUNTER)}"
    yield name
    Path("/dev/shm", name).unlink(missing_ok=True)


@pytest.fixture
def writer(name):
    writer = SharedMemoryWriter(name)
    yield writer
    writer.close()


def gray(value, size=SIZE):
    return Picture(np.full(size, value, np.uint8), "gray8")


PICTURES = {
    "gray8": np.arange(24, dtype=np.uint8).reshape(4, 6),
    "gray16": np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000,
    "rgb24": np.arange(72, dtype=np.uint8).reshape(4, 6, 3),
    "yuyv": np.arange(48, dtype=np.uint8).reshape(4, 6, 2),
    "nv12": np.arange(36, dtype=np.uint8).reshape(6, 6),
    "i420": np.arange(36, dtype=np.uint8).reshape(6, 6),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_every_format_arrives_as_it_was(kind, name, writer):
    colour = Colour(True, "bt709") if kind in ("nv12", "yuyv") else Colour()
    writer.write(Picture(PICTURES[kind], kind, colour), 12.5)
    with open_source(f"shm://{name}") as source:
        assert (source.size, source.live) == ((4, 6), True)
        frame = source.read()
    np.testing.assert_array_equal(frame.image, PICTURES[kind])
    assert (frame.format, frame.colour, frame.time_s, frame.index) == (kind, colour, 12.5, 0)


def test_memory_is_what_the_header_file_says(name, writer):
    for k in range(3):
        writer.write(gray(k + 1), k / 10)
    with Path("/dev/shm", name).open("rb") as file:
        data = file.read()
    head = struct.unpack_from("=8sIIIIIIQQQQIII", data)
    magic, version, header_bytes, width, height, kind, slots, slot_bytes, frame_bytes = head[:9]
    written, heartbeat, producer, state, flags = head[9:]
    assert (magic, version, header_bytes) == (b"FUSESHM1", 1, 128)
    assert (width, height, kind, slots, flags) == (SIZE[1], SIZE[0], 1, 4, 0)
    assert frame_bytes == SIZE[0] * SIZE[1]
    assert slot_bytes == (64 + frame_bytes + 63) // 64 * 64
    assert len(data) == header_bytes + slots * slot_bytes
    assert (written, producer, state) == (3, os.getpid(), 1)
    assert 0 <= time.monotonic_ns() - heartbeat < 5e9
    for k in range(3):
        at = header_bytes + k * slot_bytes
        assert struct.unpack_from("=QQ", data, at) == (2 * k + 2, k * 10**8)
        assert set(data[at + 64 : at + 64 + frame_bytes]) == {k + 1}


def test_frames_in_order_and_the_newest_when_it_falls_behind(name, writer):
    writer.write(gray(0), 0)
    with open_source(f"shm://{name}") as source:
        assert source.read().index == 0
        writer.write(gray(1), 1)
        writer.write(gray(2), 2)
        assert [source.read().index for _ in range(2)] == [1, 2]
        for k in range(3, 13):
            writer.write(gray(k), k)
        assert source.read().index == 12
        assert source.missed == 9


def test_torn_frame_is_not_delivered(name, writer):
    """A producer that died in the middle of a frame leaves an odd sequence."""
    for k in range(4):
        writer.write(gray(k), k)
    source = open_source(f"shm://{name}")
    with Path("/dev/shm", name).open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        slot = 128 + 3 * struct.unpack_from("=Q", memory, 32)[0]
        struct.pack_into("=Q", memory, slot, 7)
    assert source._ring.read(3, np.empty(SIZE, np.uint8)) is None
    assert source._ring.read(2, np.empty(SIZE, np.uint8)) == 2 * 10**9
    source.close()


def test_no_torn_frame_while_both_are_busy(name, writer):
    size = (300, 400)
    writer.write(gray(0, size), 0)
    source = open_source(f"shm://{name}")
    stop = threading.Event()

    def produce():
        for k in itertools.count(1):
            if stop.is_set():
                break
            writer.write(gray(k % 256, size), k)

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        for _ in range(150):
            frame = source.read()
            assert frame.image.min() == frame.image.max() == round(frame.time_s) % 256
    finally:
        stop.set()
        thread.join()
        source.close()


def test_end_of_the_stream(name, writer):
    writer.write(gray(5), 0)
    source = open_source(f"shm://{name}")
    writer.write(gray(6), 0)
    writer.close()
    assert [frame.image[0, 0] for frame in source] == [5, 6]
    source.close()
    assert not Path("/dev/shm", name).exists()


def test_another_size_is_another_ring(name, writer):
    writer.write(gray(1), 0)
    source = open_source(f"shm://{name}")
    source.read()
    writer.write(gray(2, (10, 20)), 0)
    frame = source.read()
    assert (frame.size, frame.image[0, 0], source.reconnects) == ((10, 20), 2, 0)
    source.close()


PRODUCER = """
import sys, time, itertools, numpy as np
from fuseengine.video import Picture
from fuseengine.video.shared_memory import SharedMemoryWriter
writer = SharedMemoryWriter(sys.argv[1])
for k in itertools.count():
    writer.write(Picture(np.full((48, 64), int(sys.argv[2]), np.uint8), "gray8"), time.monotonic())
    time.sleep(0.01)
"""


def start_producer(name, value):
    process = subprocess.Popen([sys.executable, "-c", PRODUCER, name, str(value)])
    end = time.monotonic() + 20
    while True:
        try:
            source = open_source(f"shm://{name}")
        except SourceError:
            assert time.monotonic() < end
            time.sleep(0.02)
            continue
        if source.read().image[0, 0] == value:
            source.close()
            return process
        source.close()


def test_producer_killed_and_started_again(name, events):
    first = start_producer(name, 1)
    source = open_source(f"shm://{name}")
    source.listen("infrared", events)
    assert source.read().image[0, 0] == 1
    first.send_signal(signal.SIGKILL)
    first.wait()
    seen = []
    reader = threading.Thread(target=lambda: seen.extend(itertools.islice(source, 40)))
    reader.start()
    second = None
    try:
        end = time.monotonic() + 10
        while "lost" not in events.kinds("infrared") and time.monotonic() < end:
            time.sleep(0.01)
        assert events.kinds("infrared") == ["lost"]
        assert f"process {first.pid}) is gone" in events[0].message
        second = start_producer(name, 2)
        reader.join(20)
        assert not reader.is_alive()
    finally:
        source.stop()
        reader.join()
        source.close()
        if second is not None:
            second.kill()
            second.wait()
    assert events.kinds("infrared") == ["lost", "reconnect"]
    assert seen[-1].image[0, 0] == 2
    assert source.reconnects == 1


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    target = tmp_path_factory.mktemp("c") / "shm"
    source = Path(__file__).with_name("shm_program.c")
    flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror"]
    done = subprocess.run(
        [compiler, *flags, f"-I{include_dir()}", str(source), "-o", str(target), "-lrt"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_header_is_the_one_that_was_built():
    folder = include_dir()
    assert folder.is_absolute()
    assert [file.name for file in folder.iterdir()] == ["fuse_shm.h"]
    assert (folder / "fuse_shm.h").read_bytes() == (ROOT / "csrc" / "fuse_shm.h").read_bytes()


class TestC:
    """fuse_shm.h as a C99 program of its own uses it."""

    def test_c_writes_and_python_reads(self, program, name):
        process = subprocess.Popen([program, "write", name, "20"], stdin=subprocess.PIPE)
        end = time.monotonic() + 10
        while not Path("/dev/shm", name).exists() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)
        source = open_source(f"shm://{name}")
        process.stdin.close()  # now it writes
        frames = list(source)
        assert process.wait(10) == 0
        assert (frames[-1].index, frames[-1].format, frames[-1].size) == (19, "gray16", (5, 7))
        for frame in frames:
            expected = (1000 * frame.index + np.arange(35)).reshape(5, 7)
            np.testing.assert_array_equal(frame.image, expected)
        assert abs(frames[-1].time_s - time.monotonic()) < 10
        source.close()

    def test_python_writes_and_c_reads(self, program, name, writer):
        image = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000
        writer.write(Picture(image, "gray16"), 3.25)
        done = subprocess.run([program, "read", name], capture_output=True, text=True, timeout=10)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["7", "5", "2", "3250000000", str(int(image.sum()))]


class TestRefusals:
    def write(self, name, **changes):
        fields = {
            "magic": b"FUSESHM1",
            "version": 1,
            "header": 128,
            "width": 8,
            "height": 4,
            "format": 1,
            "slots": 2,
            "slot": 128,
            "frame": 32,
            "size": 128 + 2 * 128,
        }
        fields.update(changes)
        size = fields.pop("size")
        data = struct.pack("=8sIIIIIIQQ", *fields.values())
        Path("/dev/shm", name).write_bytes(data.ljust(size, b"\0")[:size])

    def test_what_is_written_here_is_a_ring(self, name):
        self.write(name)
        open_source(f"shm://{name}").close()

    @pytest.mark.parametrize(
        "changes",
        [
            {"magic": b"OTHER..."},
            {"version": 2},
            {"header": 64},
            {"width": 0},
            {"width": 2**31},
            {"format": 99},
            {"slots": 0},
            {"slots": 2**32 - 1},
            {"slot": 2**63},
            {"slot": 64},
            {"frame": 2**40},
            {"frame": 31},
            {"size": 128 + 2 * 128 - 1},
        ],
        ids=str,
    )
    def test_header_that_lies(self, name, changes):
        self.write(name, **changes)
        with pytest.raises(SourceError, match=r"no ring of frames of version 1"):
            open_source(f"shm://{name}")

    @pytest.mark.parametrize("changes", [{"magic": bytes(8)}, {"size": 0}], ids=str)
    def test_not_ready(self, name, changes):
        self.write(name, **changes)
        with pytest.raises(SourceError, match=r"not ready yet; start its producer"):
            open_source(f"shm://{name}")

    def test_ring_that_cannot_be(self, name):
        with pytest.raises(SinkError, match=r"1 gray8 frames of 64x48.*expected a name"):
            SharedMemoryWriter(name, slots=1).write(gray(0), 0)
        with pytest.raises(SinkError, match="even sides"):
            SharedMemoryWriter(name).write(Picture(np.zeros((3, 5), np.uint8), "nv12"), 0)
        with pytest.raises(SinkError):
            SharedMemoryWriter("a/b").write(gray(0), 0)

    def test_native_ring_checks_arrays(self, name, writer):
        writer.write(gray(0), 0)
        ring = writer._ring
        with pytest.raises(ValueError, match="expected 3072 bytes"):
            ring.write(np.zeros(5, np.uint8), 0)
        with pytest.raises(ValueError, match="C-contiguous"):
            ring.write(moving(1, (64, 48))[0].T, 0)
        ring.close()
        with pytest.raises(ValueError, match="closed"):
            _ = ring.written
