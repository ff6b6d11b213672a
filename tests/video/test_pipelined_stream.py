"""A stream on a device with lanes: what overlaps, and that nothing else changes."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest

from fuseengine.errors import DeadlineError, FrameError
from fuseengine.pipelined import SLOTS
from fuseengine.video import Stream, open_source
from tests.video.conftest import camera, moving, numbered
from tests.video.lane_engine import LaneEngine

COPY_MS, COMPUTE_MS = 15.0, 30.0


@pytest.fixture
def make():
    made = []

    def make(*times):
        made.append(LaneEngine(*times))
        return made[-1]

    yield make
    for engine in made:
        assert all(not pipeline._busy or pipeline._closed for pipeline in engine.pipelines)
        engine.on.stop()


def first_values(frames):
    return [int(frame.image[0, 0, 0]) for frame in frames]


def live(frames, rate=100.0):
    return open_source(camera(frames, rate=rate), live=True)


def endless():
    return itertools.cycle(numbered(10))


class TestRecordings:
    def test_nothing_is_dropped_and_order_stays(self, make, events):
        engine = make(1, 1)
        stream = Stream(engine, on_event=events)
        frames = list(stream.run(moving(60), numbered(60)))
        assert first_values(frames) == list(range(60))
        assert [frame.index for frame in frames] == list(range(60))
        stats = stream.stats
        assert (stats.paired, stats.fused, stats.dropped, stats.late) == (60, 60, 0, 0)
        assert events.kinds() == ["end", "end"]
        assert engine.most == SLOTS and engine.called == 0

    def test_copies_run_beside_computation(self, make):
        intervals = []
        for engine in (make(COPY_MS, COMPUTE_MS), make(COPY_MS, COMPUTE_MS).__call__):
            stamps = [time.perf_counter() for _ in Stream(engine).run(moving(14), numbered(14))]
            intervals.append(np.median(np.diff(stamps[3:])) * 1e3)
        overlapped, alone = intervals
        assert alone > 2 * COPY_MS + COMPUTE_MS
        # Two slots, each taken for two copies and a frame: half of that, or the frame alone.
        assert COMPUTE_MS <= overlapped < COMPUTE_MS + COPY_MS

    def test_slow_consumer_holds_everything_back(self, make):
        taken = [0]

        def count(frames):
            for frame in frames:
                taken[0] += 1
                yield frame

        run = Stream(make()).run(moving(500), count(numbered(500)))
        next(run)
        time.sleep(0.2)
        assert taken[0] < 23
        run.close()

    def test_latency_is_counted_up_to_the_result(self, make):
        frames = list(Stream(make(5, 20)).run(moving(5), numbered(5)))
        assert all(30 <= frame.latency_ms < 2000 for frame in frames)


class TestLive:
    def test_the_newest_pair_is_chosen_when_the_device_is_free(self, make):
        """Saturated: no frame waits on the device, and the copy back costs no time."""
        engine = make(COPY_MS, COMPUTE_MS)
        stream = Stream(engine)
        stamps, frames = [], []
        for frame in stream.run(live(moving(160)), live(numbered(160))):
            stamps.append(time.perf_counter())
            frames.append(frame)
        stats = stream.stats
        assert stats.dropped > 20 and stats.fused + stats.dropped == stats.paired
        alone = 2 * COPY_MS + COMPUTE_MS
        assert np.median(np.diff(stamps)[3:]) * 1e3 < alone - COPY_MS / 3
        # Queued behind another, a frame would take COMPUTE_MS longer.
        assert np.median([frame.latency_ms for frame in frames[3:]]) < alone + 0.8 * COMPUTE_MS
        values = np.unwrap(first_values(frames), period=256)
        assert (np.diff(values) > 0).all()

    def test_no_frame_waits_on_the_device(self, make):
        engine = make(4, 40)
        frames = list(Stream(engine).run(live(moving(120)), live(numbered(120))))
        # 48 ms and up to 10 for the camera; queued behind another, two times 40 ms.
        assert np.median([frame.latency_ms for frame in frames[3:]]) < 70

    def test_an_idle_device_gives_its_result_at_once(self, make):
        stream = Stream(make(5, 10), deadline_ms=500)
        frames = list(stream.run(live(moving(20), 15), live(numbered(20), 15)))
        assert len(frames) > 8
        # The next pair comes after 67 ms; a result that waited for it would be as late.
        assert np.median([frame.latency_ms for frame in frames]) < 45

    def test_a_slow_consumer_gets_no_older_frames(self, make):
        ages = []
        for engine in (make(2, 4), make(2, 4).__call__):
            seen = []
            for frame in Stream(engine).run(live(moving(160)), live(numbered(160))):
                seen.append(time.monotonic() - frame.visible_time_s)
                time.sleep(0.06)
            ages.append(np.median(seen[3:]) * 1e3)
        # One that is chosen while another has still to be handed over is 60 ms older.
        assert ages[0] < ages[1] + 30

    def test_a_deadline_skips_what_would_be_late(self, make):
        stream = Stream(make(5, 30), queue=8, deadline_ms=75, on_event=lambda _: None)
        frames = list(stream.run(live(moving(60), 50), live(numbered(60), 50)))
        assert np.median([frame.latency_ms for frame in frames[5:]]) < 130
        assert stream.stats.dropped > 5

    def test_memory_is_there_before_the_first_frame(self, make):
        engine = make(1, 1)
        run = Stream(engine).run(live(moving(3)), live(numbered(3)))
        (pipeline,) = engine.pipelines
        assert pipeline._free and engine.on.runs > 1
        list(run)

    def test_a_strict_deadline(self, make):
        engine = make(5, 20)
        with pytest.raises(DeadlineError):
            Stream(engine, deadline_ms=5, strict=True).run(moving(3), numbered(3))
        assert engine.pipelines[0]._closed


class TestFaults:
    def bad(self, *where):
        calls = itertools.count()  # not the frames' own numbers: of live ones some are dropped

        def prepare(frame):
            image = frame.image / 255
            if next(calls) in where:
                image[3, 4] = np.nan
            return image

        return prepare

    def test_refused_frames_between_good_ones(self, make, events):
        stream = Stream(make(1, 1), prepare_infrared=self.bad(3, 4, 8), on_event=events)
        frames = list(stream.run(moving(12), numbered(12)))
        assert first_values(frames) == [0, 1, 2, 5, 6, 7, 9, 10, 11]
        assert [frame.index for frame in frames] == list(range(9))
        assert stream.stats.refused == 3
        assert events.kinds().count("refused") == 2  # told once, and again after good ones

    def test_refused_frames_of_live_cameras_take_no_room(self, make):
        stream = Stream(make(1, 1), prepare_infrared=self.bad(*range(25)), on_event=lambda _: None)
        frames = list(stream.run(live(moving(60)), live(numbered(60))))
        assert stream.stats.refused > 2 and len(frames) > 2  # more than there are slots

    @pytest.mark.parametrize("where", ["loading", "queueing"])
    def test_an_error_comes_after_the_frames_before_it(self, make, monkeypatch, where):
        engine = make(5, 20)
        load, calls = engine.adapter.load, itertools.count(1)

        def fails(*given):
            if next(calls) == 5:
                raise RuntimeError("the host is on fire")
            load(*given)

        if where == "loading":
            monkeypatch.setattr(engine.adapter, "load", fails)
        else:
            engine.on.fail_at = 5
        found = []
        with pytest.raises(RuntimeError, match="on fire"):
            for frame in Stream(engine).run(endless(), endless()):
                found.append(frame)
        assert first_values(found) == [0, 1, 2, 3]

    def test_an_error_of_a_result(self, make, monkeypatch):
        engine = make(1, 1)
        monkeypatch.setattr(engine.adapter, "store", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(Stream(engine).run(endless(), endless()))

    def test_an_error_of_a_source(self, make):
        def dies():
            yield from numbered(5)
            raise OSError("disk on fire")

        with pytest.raises(OSError, match="disk on fire"):
            list(Stream(make(5, 5)).run(endless(), dies()))

    @pytest.mark.parametrize("cameras", [endless, lambda: live(endless())])
    def test_leaving_with_frames_under_way(self, make, cameras):
        engine = make(20, 20)
        with Stream(engine) as stream:
            for _ in stream.run(cameras(), cameras()):
                break
        (pipeline,) = engine.pipelines
        assert pipeline._closed
        for slot in pipeline._busy:  # those that nobody fetched are done
            assert slot._done.reached.is_set()

    def test_closing_from_another_thread(self, make):
        stream = Stream(make(3, 3))
        threading.Timer(0.2, stream.close).start()
        begin = time.monotonic()
        for _ in stream.run(endless(), endless()):
            pass
        assert time.monotonic() - begin < 5

    def test_closing_before_it_starts(self, make):
        engine = make()
        stream = Stream(engine)
        run = stream.run(endless(), endless())
        stream.close()
        assert list(run) == [] and engine.pipelines[0]._closed

    def test_it_runs_again(self, make):
        engine = make(1, 1)
        with Stream(engine) as stream:
            for _ in range(2):
                assert first_values(stream.run(moving(5), numbered(5))) == list(range(5))
        assert len(engine.pipelines) == 2


class TestWhen:
    def test_frames_that_are_not_arrays_of_the_host_go_to_the_engine(self, make):
        class OnGpu:
            """As a CuPy array: no ndarray."""

            def __init__(self, image):
                self.image = image

            def __array__(self, dtype=None, copy=None):
                return self.image

        engine = make(1, 1)
        upload = {2, 3, 7}
        stream = Stream(
            engine,
            prepare_visible=lambda f: OnGpu(f.image) if f.index in upload else f.image,
        )
        assert first_values(stream.run(moving(10), numbered(10))) == list(range(10))
        assert engine.called == len(upload)

    def test_a_frame_that_starts_from_the_one_before(self, make):
        engine = make()
        engine.resumed = object()
        assert Stream(engine, temporal="warm").pipeline() is None
        assert Stream(engine).pipeline() is not None

    def test_an_engine_on_the_cpu(self, make):
        engine = make()
        engine.device = "cpu"
        assert Stream(engine).pipeline() is None
        assert Stream(lambda infrared, visible: visible).pipeline() is None

    def test_options_reach_the_pipeline(self, make):
        stream = Stream(make(), resize="infrared", infrared_range=(0, 100))
        assert len(list(stream.run(moving(3, (24, 32)), numbered(3)))) == 3

    def test_an_option_that_a_frame_does_not_fit(self, make, events):
        with pytest.raises(FrameError):
            make().pipelined().submit(moving(1)[0].astype(np.int64), numbered(1)[0])
