"""open_source: what each kind of address gives, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from fuseengine.errors import FrameError, SourceError
from fuseengine.runtime.images import write_image
from fuseengine.video import CameraFrame, open_source
from fuseengine.video.sources import Lost, Reconnecting
from tests.helpers import run_python
from tests.video.conftest import SIZE, moving, numbered

HINT = r"expected .*"


def write_video(
    path, frames, *, pix_fmt="yuv420p", codec="libx264", times=None, rate=30, **context
):
    """A video with PyAV itself, not with our sink; times in seconds."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        height, width = frames[0].shape[:2]
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.time_base = stream.codec_context.time_base = Fraction(1, 90000)
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        if codec == "libx264":
            stream.options = {"crf": "12", "bf": "0"}
        source = {2: "gray", 3: "rgb24"}[frames[0].ndim]
        if frames[0].dtype == np.uint16:
            source = "gray16le"
        for k, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=source)
            frame = frame.reformat(format=pix_fmt) if source != pix_fmt else frame
            moment = times[k] if times is not None else k / rate
            frame.pts, frame.time_base = round(moment * 90000), Fraction(1, 90000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


class TestArrays:
    def test_an_array_of_frames(self):
        with open_source(moving(5), rate=10) as source:
            assert (source.size, source.rate, source.live) == (SIZE, 10, False)
            frames = list(source)
        assert [frame.time_s for frame in frames] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
        assert [frame.index for frame in frames] == [0, 1, 2, 3, 4]
        assert frames[3].format == "gray8"

    def test_times_and_frames_of_ones_own(self):
        nv12 = CameraFrame(np.zeros((9, 8), np.uint8), "nv12", time_s=7.0)
        items = [(5.0, np.zeros((6, 8), np.uint16)), nv12]
        first, second = open_source(iter(items))
        assert (first.time_s, first.format) == (5.0, "gray16")
        assert (second.time_s, second.size) == (7.0, (6, 8))

    def test_live_has_the_time_of_arrival(self):
        begin = time.monotonic()
        frames = list(open_source(moving(2), live=True))
        assert begin <= frames[0].time_s <= frames[1].time_s <= time.monotonic()

    def test_no_frames(self):
        with pytest.raises(SourceError, match=r"holds no frame, expected at least one"):
            open_source([])

    def test_no_frame(self):
        with pytest.raises(FrameError, match="float64"):
            open_source([np.zeros((3, 4))])

    def test_realtime_keeps_the_pace(self):
        with open_source(moving(6), rate=50, realtime=True) as source:
            assert source.live
            frames = [(time.monotonic(), frame) for frame in source]
        gaps = np.diff([frame.time_s for _, frame in frames])
        np.testing.assert_allclose(gaps, 0.02, atol=1e-6)
        assert all(now >= frame.time_s for now, frame in frames)

    def test_stop_ends_a_wait(self):
        source = open_source(numbered(2), rate=0.01, realtime=True)
        source.read()
        thread = threading.Thread(target=source.read)
        thread.start()
        source.stop()
        thread.join(2)
        assert not thread.is_alive()


class TestImages:
    @pytest.fixture
    def folder(self, tmp_path):
        for k, number in enumerate((1, 2, 10, 12)):
            counts = np.full(SIZE, 1000 * k, np.uint16)
            write_image(tmp_path / f"t{number}.png", counts)
        return tmp_path

    @staticmethod
    def values(source):
        return [int(frame.image[0, 0]) for frame in source]

    def test_folder_in_natural_order_and_16_bits(self, folder):
        with open_source(folder, rate=25) as source:
            assert (source.size, source.rate) == (SIZE, 25)
            frames = list(source)
        assert self.values(frames) == [0, 1000, 2000, 3000]
        assert {frame.format for frame in frames} == {"gray16"}
        assert frames[2].time_s == pytest.approx(2 / 25)

    def test_glob(self, folder):
        assert self.values(open_source(f"{folder}/t1*.png")) == [0, 2000, 3000]
        assert self.values(open_source(f"file://{folder}/t?.png")) == [0, 1000]

    def test_numbered_pattern_keeps_gaps(self, folder):
        frames = list(open_source(f"{folder}/t%d.png", rate=10))
        assert self.values(frames) == [0, 1000, 2000, 3000]
        assert [frame.time_s for frame in frames] == pytest.approx([0, 0.1, 0.9, 1.1])

    def test_padded_pattern(self, tmp_path):
        for number in (7, 8):
            write_image(tmp_path / f"{number:04d}.tif", np.zeros(SIZE, np.uint16))
        write_image(tmp_path / "9.tif", np.zeros(SIZE, np.uint16))
        assert len(list(open_source(tmp_path / "%04d.tif"))) == 2

    def test_one_file(self, folder):
        assert self.values(open_source(folder / "t10.png")) == [2000]

    def test_damaged_image_is_skipped_and_counted(self, folder, events):
        (folder / "t2.png").write_bytes(b"no image")
        source = open_source(folder)
        source.listen("infrared", events)
        assert self.values(source) == [0, 2000, 3000]
        assert (source.broken, events.kinds("infrared")) == (1, ["broken"])
        assert "t2.png" in events[0].message

    def test_none(self, tmp_path):
        for uri in (
            tmp_path,
            f"{tmp_path}/*.png",
            f"{tmp_path}/%04d.png",
            tmp_path / "a" / "%d.png",
        ):
            with pytest.raises(SourceError, match=rf"no images in .*{HINT}check the path"):
                open_source(uri)

    def test_all_damaged(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"")
        with pytest.raises(SourceError, match="none of the 1 images"):
            open_source(tmp_path)


class TestMedia:
    def test_luma_and_chroma_without_rgb(self, tmp_path):
        path = write_video(tmp_path / "a.mp4", moving(12, colour=True))
        with open_source(path) as source:
            assert (source.size, source.rate, source.live) == (SIZE, 30, False)
            frames = list(source)
        assert len(frames) == 12
        assert {frame.format for frame in frames} == {"i420"}
        assert [frame.time_s for frame in frames] == pytest.approx(
            [k / 30 for k in range(12)], abs=1e-3
        )
        for frame, expected in zip(frames, moving(12), strict=True):
            assert np.abs(frame.luma().astype(int) - expected).mean() < 3
            assert np.abs(frame.rgb().astype(int) - expected[..., None]).mean() < 3

    def test_variable_rate_has_the_containers_times(self, tmp_path):
        times = [0, 0.04, 0.05, 0.3, 0.34, 1.0]
        path = write_video(tmp_path / "vfr.mp4", moving(6), times=times)
        got = [frame.time_s for frame in open_source(f"file://{path}")]
        assert got == pytest.approx(times, abs=1e-3)

    @pytest.mark.parametrize(("bits", "pix_fmt"), [(16, "gray16le"), (12, "gray12le")])
    def test_thermal_counts_keep_their_bits(self, tmp_path, bits, pix_fmt):
        av = pytest.importorskip("av")
        counts = np.random.default_rng(0).integers(0, 2**bits, (3, 10, 18), np.uint16)
        with av.open(str(tmp_path / "t.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=9)
            stream.width, stream.height, stream.pix_fmt = 18, 10, pix_fmt
            for image in counts:
                frame = av.VideoFrame(18, 10, pix_fmt)
                plane = np.frombuffer(frame.planes[0], np.uint16).reshape(10, -1)
                plane[:, :18] = image
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        frames = list(open_source(tmp_path / "t.mkv"))
        assert [frame.format for frame in frames] == ["gray16"] * 3
        for frame, image in zip(frames, counts, strict=True):
            np.testing.assert_array_equal(frame.image, image)

    def test_other_formats(self, tmp_path):
        pytest.importorskip("av")
        odd = moving(2, (33, 47), colour=True)
        path = write_video(tmp_path / "odd.mkv", odd, pix_fmt="bgr0", codec="ffv1")
        (frame, _) = open_source(path)
        assert (frame.format, frame.size) == ("rgb24", (33, 47))
        np.testing.assert_array_equal(frame.image, odd[0])
        path = write_video(tmp_path / "wide.mkv", moving(2), pix_fmt="yuv422p10le", codec="ffv1")
        (frame, _) = open_source(path)
        assert frame.format == "i420"
        assert np.abs(frame.luma().astype(int) - moving(1)[0]).mean() < 2

    def test_full_range_and_matrix(self, tmp_path):
        path = write_video(tmp_path / "full.mp4", moving(2), color_range=2, colorspace=1)
        frame = open_source(path).read()
        assert (frame.colour.full_range, frame.colour.matrix) == (True, "bt709")

    def test_broken_frames_are_skipped_counted_and_told(self, tmp_path, events):
        noisy = np.random.default_rng(0).integers(0, 256, (40, *SIZE), np.uint8)
        path = write_video(tmp_path / "b.mp4", list(noisy), gop_size=4)
        data = bytearray(path.read_bytes())
        start = data.index(b"mdat") + len(data) // 3
        data[start : start + 6000] = bytes(6000)
        path.write_bytes(data)
        source = open_source(path)
        source.listen("visible", events)
        frames = list(source)
        assert source.broken > 0
        assert 20 < len(frames) < 40
        assert events.kinds("visible")[0] == "broken"
        assert np.all(np.diff([frame.time_s for frame in frames]) > 0)

    def test_cut_off_and_empty_and_no_video(self, tmp_path):
        pytest.importorskip("av")
        path = write_video(tmp_path / "a.mp4", moving(30))
        cut = tmp_path / "cut.mp4"
        cut.write_bytes(path.read_bytes()[:600])
        empty, text = tmp_path / "empty.mp4", tmp_path / "text.mp4"
        empty.write_bytes(b"")
        text.write_text("this is no video\n" * 50)
        for bad in (cut, empty, text):
            with pytest.raises(SourceError, match=rf"{bad.name}.*expected a video"):
                open_source(bad)

    def test_network_address_that_nobody_serves(self):
        pytest.importorskip("av")
        with pytest.raises(SourceError) as raised:
            open_source("rtsp://user:secret@127.0.0.1:9/live")
        assert "127.0.0.1:9" in str(raised.value)
        assert "secret" not in str(raised.value)

    def test_opencv_where_pyav_is_missing(self, tmp_path, monkeypatch):
        pytest.importorskip("cv2")
        path = write_video(tmp_path / "a.mp4", moving(8, colour=True))
        monkeypatch.setitem(sys.modules, "av", None)
        with open_source(path) as source:
            frames = list(source)
        assert (source.size, source.rate, len(frames)) == (SIZE, 30, 8)
        assert frames[1].time_s == pytest.approx(1 / 30, abs=1e-3)
        assert np.abs(frames[5].image.astype(int) - moving(8, colour=True)[5]).mean() < 4


@contextlib.contextmanager
def sending(address):
    """A camera of MPEG-TS over the loopback."""
    av = pytest.importorskip("av")
    stop = threading.Event()

    def send():
        with av.open(f"{address}?pkt_size=1316", "w", format="mpegts") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.codec_context.gop_size = 2
            k = 0
            while not stop.wait(0.02):
                image = np.full((72, 64), k % 200, np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="yuv420p")
                frame.pts = k
                container.mux(stream.encode(frame))
                k += 1

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_network_stream_breaks_off_and_comes_back(events, monkeypatch):
    pytest.importorskip("av")
    from fuseengine.video import media

    monkeypatch.setattr(media, "_READ_S", 0.3)
    address = f"udp://127.0.0.1:{free_port()}"
    with sending(address):
        source = media.NetworkStream(address)
        source.first_pause_s = 0.05
        source.listen("visible", events)
        first = source.read()
        assert (first.format, first.size, source.size) == ("i420", SIZE, SIZE)
        assert abs(first.time_s - time.monotonic()) < 1
    again = threading.Event()

    def follow():
        while not again.is_set():
            source.read()

    reader = threading.Thread(target=follow)
    reader.start()
    wait_until(lambda: "lost" in events.kinds("visible"))
    with sending(address):
        wait_until(lambda: source.reconnects == 1)
        again.set()
        reader.join(5)
    assert events.kinds("visible")[:2] == ["lost", "reconnect"]
    source.stop()
    source.close()


def wait_until(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def free_port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Flaky(Reconnecting):
    """Breaks off after two frames, and cannot be opened at the first attempt."""

    first_pause_s = 0.01

    def __init__(self):
        super().__init__("flaky", live=True, rate=None, size=SIZE)
        self.left, self.refusals, self.attempts = 2, 1, 0

    def grab(self):
        if self.left == 0:
            raise Lost("cable pulled")
        self.left -= 1
        return CameraFrame(moving(1)[0], "gray8")

    def reopen(self):
        self.attempts += 1
        if self.refusals:
            self.refusals -= 1
            raise SourceError("not yet")
        self.left = 2


class TestReconnecting:
    def test_comes_back_and_says_so(self, events):
        source = Flaky()
        source.listen("infrared", events)
        assert all(source.read() is not None for _ in range(3))
        assert (source.attempts, source.reconnects) == (2, 1)
        assert events.kinds("infrared") == ["lost", "reconnect"]
        assert "cable pulled" in events[0].message

    def test_pauses_grow(self, events):
        source = Flaky()
        source.listen("infrared", events)
        source.refusals = 4
        begin = time.monotonic()
        for _ in range(3):
            source.read()
        assert time.monotonic() - begin >= 0.01 * (1 + 2 + 4 + 8 + 16)

    def test_stop_ends_the_attempts(self, events):
        source = Flaky()
        source.listen("infrared", events)
        source.refusals = 10**9
        threading.Timer(0.1, source.stop).start()
        frames = list(source)
        assert len(frames) == 2


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("nowhere.mp4", r"'nowhere.mp4' does not exist; expected a file.*check the path"),
        ("ftp://a/b.mp4", "unknown scheme 'ftp', expected a file"),
        ("/dev/video977", r"no camera /dev/video977; expected a device .*check the cable"),
        ("v4l2:///dev/video0?colour=1", "option 'colour', expected width, height"),
        ("v4l2:///dev/video0?width=x", "width=x, expected a number above 0"),
        ("csi://left", "expected csi:// and a sensor's number"),
        ("csi://0?depth=3", "option 'depth', expected width"),
        ("shm://not/a/name", "cannot open shm://not/a/name"),
        ("shm://fuse-no-such-ring", "there is no such ring; start its producer first"),
        (3, "got a int, expected a file"),
    ],
)
def test_what_cannot_be_opened(uri, text):
    with pytest.raises(SourceError, match=text):
        open_source(uri)


@pytest.mark.parametrize("uri", ["csi://0", "gst://videotestsrc", "videotestsrc ! appsink"])
def test_gstreamer_missing_says_where_to_get_it(uri, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  GStreamer:   NO\n")
    with pytest.raises(SourceError, match=r"needs an OpenCV with GStreamer.*python3-opencv"):
        open_source(uri)


def test_rate_is_checked():
    with pytest.raises(SourceError, match="rate: got 0"):
        open_source(moving(2), rate=0)


def test_importing_needs_neither_pyav_nor_opencv_nor_torch():
    script = (
        "import sys\n"
        "import fuseengine.video, fuseengine.cli.video\n"
        "import fuseengine as fe; fe.Stream, fe.open_source, fe.open_sink\n"
        "print(sorted({'av', 'cv2', 'torch'} & set(sys.modules)))"
    )
    assert run_python(script).strip() == "[]"


def test_a_palette_of_grays(tmp_path):
    Image.fromarray(moving(1)[0]).convert("P").save(tmp_path / "p.png")
    assert open_source(tmp_path / "p.png").read().format == "gray8"
