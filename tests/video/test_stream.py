"""The pipeline: what arrives, what is dropped, what is survived, how it ends."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fuseengine.alignment import Alignment, Rig
from fuseengine.errors import (
    DeadlineError,
    FrameError,
    SettingError,
    SizeMismatchError,
    SourceError,
)
from fuseengine.thermal import ThermalInput
from fuseengine.video import CameraFrame, Stream, open_source
from fuseengine.video.frames import Colour, Picture
from tests.helpers import tiny
from tests.video.conftest import SIZE, SleepingEngine, camera, moving, numbered


def live(frames, **settings):
    return open_source(camera(frames, **settings), live=True)


def first_values(frames):
    return [int(frame.image[0, 0, 0]) for frame in frames]


class TestRecordings:
    def test_nothing_is_dropped_and_order_stays(self, events):
        stream = Stream(SleepingEngine(1), on_event=events)
        frames = list(stream.run(moving(60), numbered(60)))
        assert first_values(frames) == list(range(60))
        assert [frame.index for frame in frames] == list(range(60))
        stats = stream.stats
        assert (stats.paired, stats.fused, stats.dropped, stats.late) == (60, 60, 0, 0)
        assert stats.infrared.unpaired == stats.visible.unpaired == 0
        assert events.kinds() == ["end", "end"]
        assert frames[7].time_s == frames[7].visible_time_s == pytest.approx(7 / 30)

    def test_slow_consumer_holds_everything_back(self):
        taken = [0]

        def count(frames):
            for frame in frames:
                taken[0] += 1
                yield frame

        stream = Stream(SleepingEngine())
        run = stream.run(moving(500), count(numbered(500)))
        next(run)
        time.sleep(0.2)
        # One fused, one waiting, one prepared, one being prepared, a few to be paired.
        assert taken[0] < 20
        run.close()

    def test_different_lengths(self, events):
        stream = Stream(SleepingEngine(), on_event=events)
        assert len(list(stream.run(moving(10), numbered(25)))) == 10
        assert events.kinds("infrared") == ["end"]
        assert "after 10" in events[0].message

    def test_different_rates_and_an_offset(self):
        infrared = [(5.0 + k / 9, frame) for k, frame in enumerate(moving(9))]
        visible = [(k / 30, frame) for k, frame in enumerate(numbered(30))]
        stream = Stream(SleepingEngine(), offset_ms=5000)
        frames = list(stream.run(infrared, visible))
        assert len(frames) == 9
        assert all(abs(f.infrared_time_s - 5 - f.visible_time_s) <= 0.0171 for f in frames)
        assert stream.stats.visible.unpaired >= 18

    def test_tolerance(self):
        infrared = [(k / 30 + 0.012, frame) for k, frame in enumerate(moving(10))]
        assert list(Stream(SleepingEngine(), tolerance_ms=5).run(infrared, numbered(10))) == []
        assert len(list(Stream(SleepingEngine()).run(infrared, numbered(10)))) == 10

    def test_latency_is_counted_from_reading(self):
        stream = Stream(SleepingEngine(20))
        frames = list(stream.run(moving(5), numbered(5)))
        assert all(20 <= frame.latency_ms < 2000 for frame in frames)
        assert stream.stats.latency_ms(50) >= 20

    def test_one_stream_runs_again(self):
        with Stream(SleepingEngine()) as stream:
            for _ in range(2):
                assert len(list(stream.run(moving(5), numbered(5)))) == 5
                assert stream.stats.fused == 5


class TestLive:
    def test_slow_engine_gets_the_newest_pair_and_drops_are_counted(self):
        stream = Stream(SleepingEngine(40))
        frames = list(stream.run(live(moving(80)), live(numbered(80))))
        stats = stream.stats
        assert 10 < len(frames) < 40
        assert stats.dropped > 20
        assert stats.fused + stats.dropped == stats.paired
        values = first_values(frames)
        assert values == sorted(values)
        # Latency does not grow: no queue does.
        latency = [frame.latency_ms for frame in frames]
        third = len(latency) // 3
        assert np.median(latency[-third:]) < 2 * np.median(latency[:third]) + 20

    def test_fast_engine_drops_next_to_nothing(self):
        stream = Stream(SleepingEngine(1))
        frames = list(stream.run(live(moving(30), rate=30), live(numbered(30), rate=30)))
        assert stream.stats.dropped <= 2
        assert len(frames) > 12  # the two cameras' phases differ by chance: some stay alone

    def test_queue_smooths_over_a_hiccup(self):
        class Hiccup(SleepingEngine):
            def __call__(self, infrared, visible, **options):
                self.seconds = 0.12 if self.calls == 12 else 0.0
                return super().__call__(infrared, visible, **options)

        dropped = []
        for queue in (1, 12):
            stream = Stream(Hiccup(), queue=queue)
            frames = list(stream.run(live(moving(40), rate=50), live(numbered(40), rate=50)))
            assert len(frames) > 20
            dropped.append(stream.stats.dropped)
        assert dropped[0] >= 3 > dropped[1]

    def test_deadline_skips_what_would_be_late_where_something_newer_waits(self):
        stream = Stream(SleepingEngine(30), queue=8, deadline_ms=75, on_event=lambda _: None)
        frames = list(stream.run(live(moving(60), rate=50), live(numbered(60), rate=50)))
        # Without skipping, what waits behind seven others is 160 ms old when its turn comes.
        assert np.median([frame.latency_ms for frame in frames[5:]]) < 130
        assert stream.stats.dropped > 10

    def test_late_frames_are_marked(self):
        stream = Stream(SleepingEngine(30), deadline_ms=10, on_event=lambda _: None)
        frames = list(stream.run(live(moving(20)), live(numbered(20))))
        assert frames
        assert all(frame.late for frame in frames)
        assert stream.stats.late == stream.stats.fused == len(frames)

    def test_recordings_under_a_deadline_play_at_their_speed(self):
        stream = Stream(SleepingEngine(60), deadline_ms=500)
        begin = time.monotonic()
        frames = list(stream.run(moving(30), numbered(30)))
        assert time.monotonic() - begin >= 29 / 30
        assert len(frames) < 25
        assert stream.stats.dropped > 3

    def test_stall_is_told_and_survived(self, events):
        stream = Stream(SleepingEngine(), stall_s=0.25, on_event=events)
        infrared = live(moving(30), pause=(10, 0.7))
        frames = list(stream.run(infrared, live(numbered(250))))
        assert events.kinds("infrared") == ["stall", "resume", "end"]
        assert stream.stats.infrared.stalls == stream.stats.stalls == 1
        assert len(frames) > 12
        assert frames[-1].infrared_time_s - frames[0].infrared_time_s > 0.7

    def test_live_and_recorded_do_not_mix(self):
        with pytest.raises(SourceError, match=r"recorded: .*realtime=True"):
            Stream(SleepingEngine()).run(live(moving(3)), numbered(3))


class TestDeadline:
    def engine(self):
        engine = SleepingEngine(30)
        rows = (("torch", "fp32", 70.0), ("openvino", "bf16", 28.0), ("x", "y", None))
        engine.report = SimpleNamespace(
            candidates=[
                SimpleNamespace(backend=b, precision=p, milliseconds=ms) for b, p, ms in rows
            ]
        )
        return engine

    def test_that_cannot_be_kept_is_said_at_the_start(self, events):
        stream = Stream(self.engine(), deadline_ms=12, on_event=events)
        run = stream.run(moving(3), numbered(3))
        assert events.kinds() == ["deadline"]
        for text in ("12 ms cannot be kept", "openvino bf16 is the fastest", "28.0 ms"):
            assert text in events[0].message
        assert len(list(run)) >= 1

    def test_another_precision_would_keep_it(self, events):
        Stream(self.engine(), deadline_ms=29, on_event=events).run(moving(3), numbered(3))
        assert "openvino bf16 keeps it with 28.0 ms" in events[0].message

    def test_strict(self):
        with pytest.raises(DeadlineError, match=r"5 ms cannot be kept: .*longer deadline"):
            Stream(SleepingEngine(20), deadline_ms=5, strict=True).run(moving(3), numbered(3))

    def test_that_can_be_kept_is_not_mentioned(self, events):
        Stream(SleepingEngine(1), deadline_ms=900, strict=True, on_event=events).run(
            moving(3), numbered(3)
        )
        assert events == []


class TestSizes:
    def test_refused_at_the_start(self):
        with pytest.raises(SizeMismatchError, match=r"visible frames .* are 48x64 .*32x32"):
            Stream(SleepingEngine(size=(32, 32))).run(moving(3), numbered(3))
        with pytest.raises(SizeMismatchError, match=r"pass an alignment .*resize='infrared'"):
            Stream(SleepingEngine()).run(moving(3, (24, 32)), numbered(3))

    def test_other_size_in_the_middle_is_dropped_and_told(self, events):
        visible = [*numbered(10), *numbered(5, (24, 32)), *numbered(10)]
        stream = Stream(SleepingEngine(size=SIZE), on_event=events)
        frames = list(stream.run(moving(25), visible))
        assert len(frames) == 20
        assert stream.stats.refused == 5
        told = [event for event in events if event.kind == "size"]
        assert [event.camera for event in told] == ["visible", "visible"]
        assert "from 48x64 to 24x32: dropped from now on" in told[0].message

    def test_engine_of_any_size_adapts(self, events):
        infrared = [*moving(5), *moving(5, (24, 32))]
        visible = [*numbered(5), *numbered(5, (24, 32))]
        frames = list(Stream(SleepingEngine(), on_event=events).run(infrared, visible))
        assert [frame.size for frame in frames] == [SIZE] * 5 + [(24, 32)] * 5
        assert events.kinds("infrared")[0] == "size"

    def test_infrared_of_another_size_is_resized_if_asked(self, events):
        engine = SleepingEngine()
        given = []
        stream = Stream(
            lambda ir, vis, **options: given.append(options) or engine(ir, vis),
            resize="infrared",
            infrared_range="minmax",
            on_event=events,
        )
        infrared = [*moving(3), *moving(3, (24, 32))]
        assert len(list(stream.run(infrared, numbered(6)))) == 6
        assert given[0] == {"resize": "infrared", "infrared_range": "minmax"}


class TestFormats:
    def nv12(self, count):
        rng = np.random.default_rng(0)
        images = rng.integers(30, 200, (count, 72, 64), np.uint8)
        return [
            CameraFrame(image, "nv12", Colour(True), time_s=k / 30, index=k)
            for k, image in enumerate(images)
        ]

    def test_luma_engine_gets_y_and_the_frame_stays_yuv(self):
        engine = SleepingEngine(channels="luma")
        visible = self.nv12(4)
        frames = list(Stream(engine).run(self.nv12(4), visible))
        assert engine.seen[0] == (SIZE, np.uint8, SIZE)
        for frame, given in zip(frames, visible, strict=True):
            assert (frame.format, frame.colour) == ("nv12", Colour(True))
            np.testing.assert_array_equal(frame.image, given.image)

    def test_rgb_engine_gets_rgb(self):
        engine = SleepingEngine()
        visible = self.nv12(2)
        frames = list(Stream(engine).run(moving(2), visible))
        assert engine.seen[0][2] == (*SIZE, 3)
        assert frames[0].format == "rgb24"
        np.testing.assert_array_equal(frames[0].image, visible[0].rgb())

    def test_thermal_counts_reach_the_engine(self):
        engine = SleepingEngine(channels="luma")
        counts = moving(2).astype(np.uint16) * 100
        list(Stream(engine).run(counts, numbered(2)))
        assert engine.seen[0][:2] == (SIZE, np.uint16)

    def test_own_preparation(self):
        engine = SleepingEngine(channels="luma")
        stream = Stream(
            engine,
            prepare_infrared=lambda frame: frame.image.astype(np.float32)[:20, :30] / 255,
            prepare_visible=lambda frame: frame.luma()[:20, :30],
        )
        frames = list(stream.run(moving(3, (20, 40)), self.nv12(3)))
        assert engine.seen[0] == ((20, 30), np.float32, (20, 30))
        assert (frames[0].format, frames[0].size) == ("gray8", (20, 30))

    def test_alignment_and_gain(self):
        """Counts of a small camera and YUV of a large one, both on a grid between them."""
        engine = SleepingEngine(channels="luma")
        counts = (moving(3, (12, 16)).astype(np.uint16) * 8) + 20_000
        rig = Rig.of_same_view((12, 16), SIZE)
        for gain in ("percentile", "clahe"):
            engine.seen.clear()
            stream = Stream(
                engine, thermal=ThermalInput(gain), alignment=Alignment(rig, (24, 32), clamp=True)
            )
            frames = list(stream.run(counts, self.nv12(3)))
            assert engine.seen[0] == ((24, 32), np.float32, (24, 32, 3))
            assert (frames[0].format, frames[0].size) == ("rgb24", (24, 32))

    def test_on_the_visible_camera_s_own_grid_yuv_stays_yuv(self):
        engine = SleepingEngine(channels="luma")
        align = Alignment(Rig.of_same_view((12, 16), SIZE))
        visible = self.nv12(2)
        frames = list(Stream(engine, alignment=align).run(moving(2, (12, 16)), visible))
        assert engine.seen[0] == (SIZE, np.float32, SIZE)
        assert frames[0].format == "nv12"
        np.testing.assert_array_equal(frames[0].image, visible[0].image)

    def test_gain_of_coloured_frames_for_a_colour_engine(self):
        """An infrared recording is YUV or RGB as any other: its luma is what gain control sees."""
        for infrared in (self.nv12(2), numbered(2)):
            engine = SleepingEngine(channels="rgb")
            list(Stream(engine, thermal=ThermalInput()).run(infrared, numbered(2)))
            assert engine.seen[0] == (SIZE, np.float32, (*SIZE, 3))

    def test_a_rig_of_other_cameras(self):
        stream = Stream(SleepingEngine(), alignment=Alignment(Rig.of_same_view((9, 9), SIZE)))
        with pytest.raises(SizeMismatchError, match=r"expected 9x9 and .*the rig was calibrated"):
            stream.run(moving(2), numbered(2))
        small = SleepingEngine(size=(8, 8))
        stream = Stream(small, alignment=Alignment(Rig.of_same_view(SIZE, SIZE)))
        with pytest.raises(SizeMismatchError, match=r"the aligned frames .*expected 8x8"):
            stream.run(moving(2), numbered(2))

    def test_frame_that_cannot_be_prepared_is_dropped_and_told_once(self, events):
        def prepare(frame):
            if 2 <= frame.index < 5:
                raise FrameError("all pixels are dead")
            return frame.image

        stream = Stream(SleepingEngine(), prepare_infrared=prepare, on_event=events)
        assert len(list(stream.run(moving(10), numbered(10)))) == 7
        assert stream.stats.refused == 3
        assert events.kinds().count("refused") == 1


class TestEnds:
    """No thread may stay: the fixture in conftest.py looks."""

    def endless(self):
        return itertools.cycle(numbered(10))

    def test_break(self):
        with Stream(SleepingEngine(1)) as stream:
            for frame in stream.run(self.endless(), self.endless()):
                if frame.index == 5:
                    break
        assert stream.stats.fused >= 6

    def test_break_without_with(self):
        for _ in Stream(SleepingEngine(1)).run(self.endless(), self.endless()):
            break
        gc.collect()

    def test_break_with_live_cameras(self):
        with Stream(SleepingEngine(1)) as stream:
            for _ in stream.run(live(self.endless()), live(self.endless())):
                break

    def test_never_started(self):
        closed = []

        def frames():
            try:
                yield from self.endless()
            finally:
                closed.append(True)

        stream = Stream(SleepingEngine())
        run = stream.run(frames(), frames())
        stream.close()
        assert closed == [True, True]
        assert list(run) == []

    def test_error_of_the_engine(self):
        engine = SleepingEngine(1)
        engine.fail_at = 4
        got = []
        with pytest.raises(RuntimeError, match="on fire"):
            got.extend(Stream(engine).run(self.endless(), self.endless()))

    def test_error_of_a_source(self):
        def dies():
            yield from numbered(5)
            raise OSError("disk on fire")

        with pytest.raises(OSError, match="disk on fire"):
            list(Stream(SleepingEngine()).run(self.endless(), dies()))

    def test_error_of_a_hook(self):
        def prepare(frame):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            list(Stream(SleepingEngine(), prepare_visible=prepare).run(moving(3), numbered(3)))

    def test_error_of_the_listener(self):
        def listener(event):
            raise KeyError(event.kind)

        with pytest.raises(KeyError, match="end"):
            list(Stream(SleepingEngine(), on_event=listener).run(moving(3), numbered(9)))

    def test_error_of_the_consumer(self):
        with pytest.raises(ValueError, match="mine"), Stream(SleepingEngine()) as stream:
            for _ in stream.run(self.endless(), self.endless()):
                raise ValueError("mine")

    def test_close_from_another_thread(self):
        stream = Stream(SleepingEngine(1))
        threading.Timer(0.2, stream.close).start()
        begin = time.monotonic()
        for _ in stream.run(self.endless(), self.endless()):
            pass
        assert time.monotonic() - begin < 5

    def test_second_source_does_not_open(self, tmp_path):
        with pytest.raises(SourceError, match="does not exist"):
            Stream(SleepingEngine()).run(self.endless(), tmp_path / "none.mp4")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"deadline_ms": 0}, "deadline_ms: got 0"),
        ({"deadline_ms": float("nan")}, "deadline_ms: got nan"),
        ({"queue": 0}, "queue: got 0"),
        ({"stall_s": 0}, "stall_s: got 0"),
        ({"tolerance_ms": -1}, "tolerance: got -1 ms"),
        ({"resize": "visible"}, "resize: got 'visible'"),
        ({"infrared_range": (3, 2)}, "infrared_range: got"),
    ],
)
def test_settings(settings, text):
    with pytest.raises(SettingError, match=text):
        Stream(SleepingEngine(), **settings)


def test_events_go_to_the_log_by_default(caplog):
    list(Stream(SleepingEngine(size=SIZE)).run(moving(4), [*numbered(2), *numbered(2, (8, 8))]))
    assert any("visible: frames changed from 48x64 to 8x8" in m for m in caplog.messages)


def test_a_compiled_engine():
    """A real luma engine: frames of a stream are those of single calls, YUV included."""
    import fuseengine as fe

    engine = fe.compile(
        tiny(), (48, 64), backend="onnxruntime", precision="fp32", cache=False, threads=1
    )
    infrared, visible = moving(6), moving(6, colour=True, step=3)
    with fe.Stream(engine) as stream:
        frames = list(stream.run(infrared, visible))
    assert len(frames) == 6
    for k, frame in enumerate(frames):
        np.testing.assert_array_equal(frame.image, engine(infrared[k], visible[k]))
    yuv = Picture(np.full((72, 64), 128, np.uint8), "nv12", Colour(True))
    yuv.image[:48] = visible[2][..., 0]
    source = [CameraFrame(yuv.image, "nv12", yuv.colour)]
    (frame,) = fe.Stream(engine).run(infrared[:1], source)
    np.testing.assert_array_equal(frame.luma(), engine(infrared[0], yuv.luma()))
    assert (frame.image[48:] == 128).all()
