"""Two frames under way: the pictures of single calls, in order, whatever happens in between.

The device is TorchDevice on the CPU, which has everything of a GPU's lanes but the streams; what
those do is in runtime/test_cupy_device.py, and on a GPU in gpu/test_pipelined.py.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

import fuseengine as fe
import fuseengine.engine as module
from fuseengine.errors import FrameError, SettingError, SizeMismatchError
from fuseengine.pipelined import SLOTS
from fuseengine.runtime.executor import CpuDevice, Executor
from fuseengine.video import CameraFrame
from fuseengine.video.frames import Colour
from tests.helpers import tiny

SIZE = (18, 27)


def frames(count, size=SIZE, seed=0):
    rng = np.random.default_rng(seed)
    shapes = size, (*size, 3)
    return [tuple(rng.integers(0, 256, s, np.uint8) for s in shapes) for _ in range(count)]


@pytest.fixture(scope="module")
def engine():
    """Of any size; its device is called "cuda" and computes on the CPU."""
    from fuseengine.backends.cuda_device import TorchDevice

    made = fe.compile(tiny(), None, backend="torch", precision="fp32", cache=False, threads=1)
    on_cpu = made.executor((20, 28))
    runners = on_cpu.runners  # eager modules: of any size

    def build(program, source, choice, size, device, threads):
        return Executor(program, size, runners, TorchDevice("cpu"))

    patched = pytest.MonkeyPatch()
    patched.setattr(module, "build_executor", build)
    yield module.Engine(
        made.program, made.source, made.choice, made.report, size=None, device="cuda", threads=1
    )
    patched.undo()


@pytest.fixture
def pipeline(engine):
    with engine.pipelined() as made:
        yield made


def check(found, engine, pairs, **options):
    for fused, pair in zip(found, pairs, strict=True):
        np.testing.assert_array_equal(fused, engine(*pair, **options))


class TestMap:
    def test_equals_the_engine(self, engine, pipeline):
        pairs = frames(9)
        found = list(pipeline.map(pairs))
        check(found, engine, pairs)
        assert len({fused.tobytes() for fused in found}) == 9

    @pytest.mark.parametrize("count", [0, 1, 2, 3])
    def test_few(self, engine, pipeline, count):
        pairs = frames(count)
        check(list(pipeline.map(pairs)), engine, pairs)

    def test_sizes_change(self, engine, pipeline):
        sizes = [(18, 27), (18, 27), (20, 28), (32, 16), (32, 16), (18, 27)]
        pairs = [frames(1, size, k)[0] for k, size in enumerate(sizes)]
        check(list(pipeline.map(pairs)), engine, pairs)

    def test_kinds_of_frames(self, engine, pipeline):
        import torch

        ((ir, vis),) = frames(1)
        kinds = [
            (ir, vis),
            (ir, vis[..., 1]),
            (ir.astype(np.uint16) * 257, vis),
            (ir, (vis / 255).astype(np.float32)),
            (ir[:, ::-1], vis[::-1]),
            (torch.from_numpy(ir), torch.from_numpy(vis)),
            (ir[None], vis[None]),
        ]
        for fused, pair in zip(pipeline.map(kinds), kinds, strict=True):
            assert type(fused) is type(pair[1]) and fused.dtype == pair[1].dtype
            np.testing.assert_array_equal(fused, engine(*pair))

    def test_options(self, engine, pipeline):
        pairs = [(ir[:9].astype(np.uint16), vis) for ir, vis in frames(3)]
        options = {"resize": "infrared", "infrared_range": (10, 200)}
        check(list(pipeline.map(pairs, **options)), engine, pairs, **options)

    def test_results_are_the_callers_own(self, pipeline):
        found = list(pipeline.map(frames(5)))
        kept = [fused.copy() for fused in found]
        list(pipeline.map(frames(5, seed=1)))
        for fused, before in zip(found, kept, strict=True):
            np.testing.assert_array_equal(fused, before)

    def test_no_more_than_two_are_taken_ahead(self, pipeline):
        taken = []
        run = pipeline.map(taken.append(k) or pair for k, pair in enumerate(frames(6)))
        ahead = [len(taken) - done for done, _ in enumerate(run)]
        assert ahead == [SLOTS] * 5 + [1]

    def test_an_error_comes_in_its_place(self, engine, pipeline):
        pairs = frames(6)
        bad = pairs[3][0] / 255
        bad[2, 3] = np.nan
        given = [*pairs[:3], (bad, pairs[3][1]), *pairs[4:]]
        found = []
        with pytest.raises(FrameError, match="NaN"):
            for fused in pipeline.map(given):
                found.append(fused)
        check(found, engine, pairs[:3])
        check(list(pipeline.map(pairs)), engine, pairs)

    def test_leaving_the_loop(self, engine, pipeline):
        pairs = frames(6)
        run = pipeline.map(pairs)
        next(run)
        run.close()
        check(list(pipeline.map(pairs)), engine, pairs)


class TestSubmit:
    def test_a_bad_frame_between_good_ones(self, engine, pipeline):
        pairs = frames(2)
        first = pipeline.submit(*pairs[0])
        refused = [
            (pairs[0][0][:4], pairs[0][1], SizeMismatchError),
            (pairs[0][0].astype(np.int32), pairs[0][1], FrameError),
            (np.full(SIZE, np.inf), pairs[0][1], FrameError),
            ("frame.png", pairs[0][1], FrameError),
        ]
        for ir, vis, error in refused * 2:  # a slot that stays taken would show
            with pytest.raises(error):
                pipeline.submit(ir, vis)
        second = pipeline.submit(*pairs[1])
        check([first.result(), second.result()], engine, pairs)

    def test_a_frame_that_fails_when_it_is_loaded(self, engine, pipeline, monkeypatch):
        """prepare_pair lets NaN pass in no case; what else a load may raise frees the slot too."""
        pairs = frames(3)
        engine(*pairs[0])
        adapter, _ = engine._checked_plan(SIZE)
        first = pipeline.submit(*pairs[0])
        with monkeypatch.context() as patched:
            patched.setattr(adapter, "load", lambda *_: 1 / 0)
            for _ in range(3):
                with pytest.raises(ZeroDivisionError):
                    pipeline.submit(*pairs[1])
        second = pipeline.submit(*pairs[2])
        check([first.result(), second.result()], engine, pairs[::2])

    def test_an_engine_that_fails(self, engine, pipeline, monkeypatch):
        pairs = frames(3)
        engine(*pairs[0])
        _, executor = engine._checked_plan(SIZE)
        first = pipeline.submit(*pairs[0])
        with monkeypatch.context() as patched:
            patched.setattr(executor, "_run", lambda: 1 / 0)
            for _ in range(3):
                with pytest.raises(ZeroDivisionError):
                    pipeline.submit(*pairs[1])
        second = pipeline.submit(*pairs[2])
        check([first.result(), second.result()], engine, pairs[::2])

    def test_no_third(self, engine, pipeline):
        pairs = frames(3)
        tickets = [pipeline.submit(*pair) for pair in pairs[:2]]
        with pytest.raises(SettingError, match=r"2 frames are under way.*result\(\) before"):
            pipeline.submit(*pairs[2])
        found = [tickets[0].result()]
        tickets.append(pipeline.submit(*pairs[2]))
        check(found + [ticket.result() for ticket in tickets[1:]], engine, pairs)

    def test_a_result_is_there_once(self, pipeline):
        ticket = pipeline.submit(*frames(1)[0])
        ticket.result()
        ticket.computed()
        with pytest.raises(SettingError, match="taken before"):
            ticket.result()

    def test_whoever_takes_a_result_is_not_ahead_of_who_waits_for_the_device(
        self, pipeline, monkeypatch
    ):
        ticket = pipeline.submit(*frames(1)[0])
        (slot,) = pipeline._busy
        waits, order = threading.Event(), []
        monkeypatch.setattr(slot, "computed", lambda: order.append("computed"))
        monkeypatch.setattr(slot, "result", lambda: waits.wait() and type(slot).result(slot))
        taker = threading.Thread(target=lambda: (ticket.result(), order.append("result")))
        taker.start()
        while not ticket._taken:
            time.sleep(1e-3)
        ticket.computed()
        waits.set()
        taker.join(10)
        assert order == ["computed", "result"]

    def test_a_batch(self, pipeline):
        (ir, vis), _ = frames(2)
        with pytest.raises(FrameError, match="batch of 2 pairs"):
            pipeline.submit(np.stack([ir, ir]), np.stack([vis, vis]))

    def test_closed(self, engine):
        pairs = frames(2)
        with engine.pipelined() as pipeline:
            tickets = [pipeline.submit(*pair) for pair in pairs]
        check([ticket.result() for ticket in tickets], engine, pairs)
        with pytest.raises(SettingError, match="closed"):
            pipeline.submit(*pairs[0])
        pipeline.close()

    def test_one_thread_submits_and_another_collects(self, engine, pipeline):
        pairs, found, tickets = frames(40), [], []
        room, there = threading.Semaphore(SLOTS), threading.Semaphore(0)

        def collect():
            for k in range(len(pairs)):
                there.acquire()
                found.append(tickets[k].result())
                room.release()

        thread = threading.Thread(target=collect)
        thread.start()
        for pair in pairs:
            room.acquire()
            tickets.append(pipeline.submit(*pair))
            there.release()
        thread.join(60)
        check(found, engine, pairs)

    def test_the_engine_is_called_meanwhile(self, engine, pipeline):
        pairs = frames(12)
        expected = [engine(*pair) for pair in pairs]
        wrong = []

        def call():
            for k in range(len(pairs)):
                if (engine(*pairs[-k]) != expected[-k]).any():
                    wrong.append(k)

        thread = threading.Thread(target=call)
        thread.start()
        found = list(pipeline.map(pairs))
        thread.join(60)
        assert not wrong
        for fused, picture in zip(found, expected, strict=True):
            np.testing.assert_array_equal(fused, picture)


def test_a_stream(engine):
    """Through the pipeline, YUV included: the pictures of single calls."""
    pairs = frames(8)
    infrared, visible = zip(*pairs, strict=True)
    check([f.image for f in fe.Stream(engine).run(iter(infrared), iter(visible))], engine, pairs)
    size = (18, 26)
    rng = np.random.default_rng(3)
    yuv = rng.integers(30, 200, (5, 27, 26), np.uint8)
    cameras = [
        CameraFrame(image, "nv12", Colour(True), time_s=k / 30) for k, image in enumerate(yuv)
    ]
    counts = [rng.integers(0, 256, size, np.uint8) for _ in yuv]
    stream = fe.Stream(engine)
    for k, frame in enumerate(stream.run(iter(counts), iter(cameras))):
        np.testing.assert_array_equal(frame.luma(), engine(counts[k], cameras[k].luma()))
        np.testing.assert_array_equal(frame.image[18:], yuv[k][18:])
    assert stream.stats.fused == 5


def test_memory_is_made_once(engine):
    with engine.pipelined() as pipeline:
        list(pipeline.map(frames(3)))
        slots = list(pipeline._free)
        list(pipeline.map(frames(7)))
        assert len(slots) == len(pipeline._free) == SLOTS
        assert all(slot in slots for slot in pipeline._free)
        list(pipeline.map(frames(2, (32, 16))))  # that of another size goes
        assert len(pipeline._free) == SLOTS
        assert not any(slot in slots for slot in pipeline._free)


def test_an_engine_on_the_cpu_has_none():
    made = fe.compile(tiny(), (16, 16), backend="torch", precision="fp32", cache=False, threads=1)
    with pytest.raises(SettingError, match="nothing to overlap.*call the engine itself"):
        made.pipelined()
    assert CpuDevice().lanes() is None
