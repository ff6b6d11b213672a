"""OpenCV's cameras, with a capture in the place of cv2's: there is no camera here."""

from __future__ import annotations

import time

import numpy as np
import pytest

from fuseengine.errors import SourceError
from fuseengine.video import opencv
from fuseengine.video.opencv import OpenCVCamera, csi_pipeline, open_v4l2, shape_raw
from fuseengine.video.sources import Lost

cv2 = pytest.importorskip("cv2")


class Capture:
    """Gives frames of a format as OpenCV's V4L2 capture does without conversion."""

    def __init__(self, frames, fourcc="YUYV", size=(4, 6), opened=True):
        self.frames, self.opened, self.released = list(frames), opened, False
        self.values = {
            cv2.CAP_PROP_FOURCC: int.from_bytes(fourcc.encode(), "little"),
            cv2.CAP_PROP_FRAME_HEIGHT: size[0],
            cv2.CAP_PROP_FRAME_WIDTH: size[1],
            cv2.CAP_PROP_FPS: 30.0,
        }

    def isOpened(self):
        return self.opened

    def get(self, key):
        return self.values.get(key, 0.0)

    def set(self, key, value):
        self.values[key] = value

    def read(self):
        return (True, self.frames.pop(0)) if self.frames else (False, None)

    def release(self):
        self.released = True


RAW = {
    "YUYV": ("yuyv", np.arange(48, dtype=np.uint8).reshape(4, 6, 2)),
    "NV12": ("nv12", np.arange(36, dtype=np.uint8).reshape(1, 36)),
    "Y16 ": ("gray16", np.arange(24, dtype=np.uint16).reshape(4, 6)),
    "GREY": ("gray8", np.arange(24, dtype=np.uint8).reshape(1, 24)),
}


@pytest.mark.parametrize("fourcc", RAW)
def test_uncompressed_formats_are_taken_as_they_are(fourcc, monkeypatch, tmp_path):
    name, data = RAW[fourcc]
    made = []

    def capture(*_):
        made.append(Capture([data] * 3, fourcc))
        return made[-1]

    monkeypatch.setattr(cv2, "VideoCapture", capture)
    source = open_v4l2(
        str(tmp_path), {"format": {"GREY": "gray8", "Y16 ": "y16"}.get(fourcc, name)}
    )
    frame = source.read()
    assert (frame.format, frame.size) == (name, (4, 6))
    assert frame.image.tobytes() == data.tobytes()
    assert made[-1].values[cv2.CAP_PROP_CONVERT_RGB] == 0
    assert (source.live, source.rate, source.size) == (True, 30, (4, 6))
    source.close()
    assert all(one.released for one in made)


def test_compressed_formats_are_converted(monkeypatch, tmp_path):
    bgr = np.zeros((4, 6, 3), np.uint8)
    bgr[..., 0] = 9
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: Capture([bgr] * 2, "MJPG"))
    options = {"format": "mjpg", "width": "6", "height": "4", "rate": "15"}
    frame = open_v4l2(str(tmp_path), options).read()
    assert frame.format == "rgb24"
    assert frame.image[0, 0].tolist() == [0, 0, 9]


def test_drivers_time_stamp_of_the_same_clock():
    capture = Capture([np.zeros((4, 6), np.uint8)] * 3)
    camera = OpenCVCamera("c", lambda: capture, raw=None, rate=None)
    camera.read()
    stamp = time.monotonic() - 0.02
    capture.values[cv2.CAP_PROP_POS_MSEC] = stamp * 1e3
    assert camera.read().time_s == pytest.approx(stamp)
    capture.values[cv2.CAP_PROP_POS_MSEC] = 40.0  # counted from the start: another clock
    assert abs(camera.read().time_s - time.monotonic()) < 0.5


def test_no_frame(monkeypatch):
    with pytest.raises(SourceError, match=r"opened but gives no frame; check"):
        OpenCVCamera("/dev/video0", lambda: Capture([]), raw=None, rate=None)


def test_camera_that_is_unplugged_comes_back(events):
    frame = np.zeros((4, 6), np.uint8)
    captures = [Capture([frame] * 2), Capture([frame] * 2)]
    source = OpenCVCamera("/dev/video0", lambda: captures.pop(0), raw=None, rate=None)
    source.first_pause_s = 0.01
    source.listen("visible", events)
    assert [source.read().index for _ in range(4)] == [0, 1, 2, 3]
    assert events.kinds("visible") == ["lost", "reconnect"]


def test_not_allowed(monkeypatch, tmp_path):
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: Capture([], opened=False))
    with pytest.raises(SourceError, match=r"cannot open .*group 'video'"):
        open_v4l2(str(tmp_path), {})
    with pytest.raises(SourceError, match=r"format 'h264', expected one of yuyv"):
        open_v4l2(str(tmp_path), {"format": "h264"})


def test_short_frame_is_a_loss():
    with pytest.raises(Lost, match="10 bytes, expected 36 of nv12"):
        shape_raw(np.zeros(10, np.uint8), "nv12", (4, 6))


def test_csi_pipeline():
    pipeline = csi_pipeline(1, 1920, 1080, 29.97)
    assert pipeline.startswith(
        "nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM), width=1920"
    )
    assert "framerate=29970/1000" in pipeline
    assert "framerate=30/1" in csi_pipeline(0, 1280, 720, 30.0)
    assert pipeline.endswith("drop=true max-buffers=1 sync=false")


@pytest.mark.parametrize(
    ("given", "raw"),
    [
        ("videotestsrc ! video/x-raw, format=NV12 !", "nv12"),
        ("videotestsrc ! video/x-raw,format=(string)I420", "i420"),
        ("videotestsrc ! video/x-raw,format=BGR ! appsink", None),
    ],
)
def test_gstreamer(given, raw, monkeypatch):
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  GStreamer:   YES (1.24)\n")
    asked = []
    shape = (6, 6) if raw else (4, 6, 3)

    def capture(pipeline, api):
        asked.append((pipeline, api))
        return Capture([np.zeros(shape, np.uint8)] * 2)

    monkeypatch.setattr(cv2, "VideoCapture", capture)
    source = opencv.open_gstreamer(given)
    assert asked[0][1] == cv2.CAP_GSTREAMER
    assert asked[0][0].count("appsink") == 1
    assert source.read().format == (raw or "rgb24")
