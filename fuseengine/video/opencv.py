"""Cameras and pipelines through OpenCV: V4L2, CSI and GStreamer; files where PyAV is missing.

V4L2 frames are taken as the camera has them (YUYV, NV12, 8 and 16 bit gray); only compressed
formats go through OpenCV's conversion.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fuseengine.errors import SourceError
from fuseengine.video.frames import CameraFrame, Colour, Format, Image
from fuseengine.video.sources import Lost, Reconnecting, Source

_FOURCC: dict[str, Format] = {
    "YUYV": "yuyv",
    "YUY2": "yuyv",
    "NV12": "nv12",
    "YU12": "i420",
    "I420": "i420",
    "GREY": "gray8",
    "Y800": "gray8",
    "Y16 ": "gray16",
}
"""Uncompressed formats of cameras that are taken as they are."""

_ASKED = {"yuyv": "YUYV", "nv12": "NV12", "gray8": "GREY", "y16": "Y16 ", "mjpg": "MJPG"}
_SINK = "appsink drop=true max-buffers=1 sync=false"
_FAILURES = 5
"""Reads without a frame after which a camera is taken as lost."""


class OpenCVCamera(Reconnecting):
    """A live source of ``cv2.VideoCapture``."""

    def __init__(
        self, name: str, connect: Callable[[], Any], *, raw: Format | None, rate: float | None
    ) -> None:
        """Opens the camera and reads a frame, because what drivers say about sizes may be wrong.

        Args:
            name: for people.
            connect: gives an open capture.
            raw: the format of two-dimensional bytes that are no gray picture, or of the frames as
                a whole where the capture does not convert; None: as OpenCV gives them.
            rate: nominal frames per second.

        Raises:
            SourceError: it cannot be opened, or gives no frame.
        """
        super().__init__(name, live=True, rate=rate, size=(0, 0))
        self._connect, self._raw, self._asked_rate = connect, raw, rate
        self._capture: Any = None
        self._count = 0
        self._first: CameraFrame | None = None
        self.reopen()

    def reopen(self) -> None:  # noqa: D102
        self.close()
        self._capture = self._connect()
        try:
            self._first = self._next()
        except Lost:
            self.close()
            raise SourceError(
                f"source: {self.name} was opened but gives no frame; check that no other program "
                "uses it, and the size, rate and format that were asked for"
            ) from None
        self.size = self._first.size
        import cv2

        told = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = self._asked_rate or (told if 0 < told <= 1000 else None)

    def grab(self) -> CameraFrame:  # noqa: D102
        frame, self._first = self._first, None
        return frame if frame is not None else self._next()

    def close(self) -> None:  # noqa: D102
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.release()

    def _next(self) -> CameraFrame:
        for _ in range(_FAILURES):
            there, image = self._capture.read()
            if there and image is not None and image.size:
                break
            if self._stopped.wait(0.02):
                raise Lost("it was stopped")
        else:
            raise Lost("it gives no frames")
        arrived = time.monotonic()
        image, name = self._form(image)
        index, self._count = self._count, self._count + 1
        return CameraFrame(image, name, Colour(), self._moment(arrived), index, arrived)

    def _form(self, image: Image) -> tuple[Image, Format]:
        import cv2

        if self._raw is None:
            return from_opencv(image)
        height = round(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        width = round(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        return shape_raw(image, self._raw, (height, width))

    def _moment(self, arrived: float) -> float:
        """The driver's time stamp where it is one of the same clock, as with V4L2."""
        import cv2

        stamp = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
        return stamp if arrived - 1.0 < stamp <= arrived else arrived


class OpenCVFile(Source):
    """A video file, where PyAV is missing: 8-bit RGB."""

    def __init__(self, path: str) -> None:
        """Opens the file.

        Raises:
            SourceError: OpenCV cannot read it.
        """
        cv2 = _cv2(path)
        self._capture = cv2.VideoCapture(path)
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        height = round(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        width = round(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        if not self._capture.isOpened() or min(height, width) < 2:
            raise SourceError(
                f"source: OpenCV cannot open {path}, expected a video; check the file, or install "
                "PyAV, which reads more: pip install 'fuseengine[video]'"
            )
        super().__init__(path, live=False, rate=rate if rate > 0 else None, size=(height, width))
        self._count = 0
        self._last_s = 0.0

    def read(self) -> CameraFrame | None:  # noqa: D102
        import cv2

        if self._stopped.is_set():
            return None
        there, image = self._capture.read()
        if not there:
            return None
        moment = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
        index, self._count = self._count, self._count + 1
        if index and moment <= self._last_s:
            moment = self._last_s + 1.0 / (self.rate or 30.0)
        self._last_s = moment
        image, name = from_opencv(image)
        return CameraFrame(image, name, Colour(), moment, index, time.monotonic())

    def close(self) -> None:  # noqa: D102
        self._capture.release()


def from_opencv(image: Image) -> tuple[Image, Format]:
    """What ``VideoCapture.read`` gives when it converts: BGR or gray."""
    import cv2

    if image.ndim == 3 and image.shape[2] == 3:
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), "rgb24"
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.ndim == 3 and image.shape[2] == 2:
        return image, "yuyv"
    return image, "gray16" if image.dtype == np.uint16 else "gray8"


def shape_raw(image: Image, name: Format, size: tuple[int, int]) -> tuple[Image, Format]:
    """The bytes of an unconverted frame in the shape of its format.

    Args:
        image: of any shape.
        name: its format.
        size: (height, width) of the picture.

    Raises:
        Lost: another number of bytes.
    """
    height, width = size
    data = np.ascontiguousarray(image).reshape(-1).view(np.uint8)
    shape: tuple[int, ...] = {
        "gray8": (height, width),
        "gray16": (height, 2 * width),
        "yuyv": (height, width, 2),
    }.get(name, (height * 3 // 2, width))
    if data.size < np.prod(shape):
        raise Lost(f"a frame of {data.size} bytes, expected {np.prod(shape)} of {name}")
    shaped = data[: np.prod(shape)].reshape(shape)
    return (shaped.view(np.uint16) if name == "gray16" else shaped), name


def open_v4l2(device: str, options: Mapping[str, str]) -> Source:
    """A V4L2 camera.

    Args:
        device: ``/dev/videoN``.
        options: width, height, rate, and format (yuyv, nv12, gray8, y16, mjpg): what to ask for.

    Raises:
        SourceError: no such camera, or unknown options.
    """
    _check(f"v4l2://{device}", options, ("width", "height", "rate", "format"))
    if not Path(device).exists():
        present = sorted(str(path) for path in Path("/dev").glob("video*"))
        raise SourceError(
            f"source: there is no camera {device}; expected a device as /dev/video0 "
            f"(here: {', '.join(present) or 'none'}); check the cable and the number"
        )
    cv2 = _cv2(device)
    asked = options.get("format")
    if asked is not None and asked not in _ASKED:
        raise SourceError(
            f"source: v4l2://{device}: got format {asked!r}, expected one of {', '.join(_ASKED)}"
        )
    wanted = {
        cv2.CAP_PROP_FRAME_WIDTH: _number(options, "width"),
        cv2.CAP_PROP_FRAME_HEIGHT: _number(options, "height"),
        cv2.CAP_PROP_FPS: _number(options, "rate"),
    }
    raw: list[Format | None] = [None]

    def connect() -> Any:
        capture = cv2.VideoCapture(device, cv2.CAP_V4L2)
        if not capture.isOpened():
            raise SourceError(
                f"source: cannot open {device}; expected a capture device that nobody else uses "
                "and that this user may read (group 'video')"
            )
        if asked is not None:
            capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*_ASKED[asked]))
        for key, value in wanted.items():
            if value is not None:
                capture.set(key, value)
        code = int(capture.get(cv2.CAP_PROP_FOURCC))
        raw[0] = _FOURCC.get(code.to_bytes(4, "little").decode("latin1"))
        if raw[0] is not None:
            capture.set(cv2.CAP_PROP_CONVERT_RGB, 0)
        return capture

    probe = connect()
    probe.release()
    return OpenCVCamera(device, connect, raw=raw[0], rate=_number(options, "rate"))


def csi_pipeline(sensor: int, width: int, height: int, rate: float) -> str:
    """The GStreamer pipeline of a Jetson's CSI camera: NV12 frames, the newest only.

    Args:
        sensor: 0, 1 ...
        width: pixels.
        height: pixels.
        rate: frames per second; fractions become thousandths.
    """
    fraction = f"{rate:g}/1" if rate == int(rate) else f"{round(rate * 1000)}/1000"
    return (
        f"nvarguscamerasrc sensor-id={sensor} ! video/x-raw(memory:NVMM), width={width}, "
        f"height={height}, framerate={fraction}, format=NV12 ! nvvidconv ! "
        f"video/x-raw, format=NV12 ! {_SINK}"
    )


def open_csi(sensor: str, options: Mapping[str, str]) -> Source:
    """A CSI camera of a Jetson.

    Args:
        sensor: its number.
        options: width (1280), height (720) and rate (30).

    Raises:
        SourceError: no number, unknown options, or the camera cannot be opened.
    """
    name = f"csi://{sensor}"
    _check(name, options, ("width", "height", "rate"))
    if not sensor.isdecimal():
        raise SourceError(f"source: got {name}, expected csi:// and a sensor's number, as csi://0")
    rate = _number(options, "rate") or 30.0
    width, height = (round(_number(options, k) or d) for k, d in (("width", 1280), ("height", 720)))
    pipeline = csi_pipeline(int(sensor), width, height, rate)
    return _gstreamer(name, pipeline, raw="nv12", rate=rate)


def open_gstreamer(pipeline: str) -> Source:
    """A GStreamer pipeline.

    Args:
        pipeline: as for gst-launch; without an appsink at its end one is added that keeps the
            newest frame. It should deliver BGR, GRAY8, GRAY16_LE or, with ``format=NV12`` or
            ``format=I420`` in its last caps, these.

    Raises:
        SourceError: it cannot be opened.
    """
    pipeline = pipeline.strip().rstrip("!").strip()
    raw: Format | None = None
    last = pipeline.rpartition("format=")[2] if "format=" in pipeline else ""
    last = last.replace("(string)", "").strip()
    if last[:4] in ("NV12", "I420"):
        raw = "nv12" if last.startswith("NV12") else "i420"
    if "appsink" not in pipeline:
        pipeline = f"{pipeline} ! {_SINK}"
    return _gstreamer(f"gst://{pipeline}", pipeline, raw=raw, rate=None)


def open_file(path: str, *, live: bool) -> Source:
    """A file or network stream, where PyAV is missing.

    Raises:
        SourceError: OpenCV cannot read it.
    """
    if not live:
        return OpenCVFile(path)
    cv2 = _cv2(path)

    def connect() -> Any:
        capture = cv2.VideoCapture(path)
        if not capture.isOpened():
            raise SourceError(f"source: OpenCV cannot open {path}; check the address")
        return capture

    return OpenCVCamera(path, connect, raw=None, rate=None)


def _gstreamer(name: str, pipeline: str, *, raw: Format | None, rate: float | None) -> Source:
    cv2 = _cv2(name)
    if not _has_gstreamer(cv2):
        raise SourceError(
            f"source: {name} needs an OpenCV with GStreamer; this one ({cv2.__version__}) was "
            "built without, as those of PyPI are: on a Jetson or Debian install python3-opencv "
            "and use the system's Python, or feed frames through shm://"
        )

    def connect() -> Any:
        capture = cv2.VideoCapture(pipeline, cv2.CAP_GSTREAMER)
        if not capture.isOpened():
            raise SourceError(
                f"source: GStreamer cannot run this pipeline: {pipeline}; try it with "
                "gst-launch-1.0, where it says why"
            )
        return capture

    return OpenCVCamera(name, connect, raw=raw, rate=rate)


def _has_gstreamer(cv2: Any) -> bool:
    lines = (line.strip() for line in cv2.getBuildInformation().splitlines())
    return any(line.startswith("GStreamer:") and "YES" in line for line in lines)


def _cv2(name: str) -> Any:
    try:
        import cv2
    except ImportError:
        raise SourceError(
            f"source: {name} needs OpenCV or PyAV, which are not installed: "
            "pip install 'fuseengine[video]'"
        ) from None
    return cv2


def _check(name: str, options: Mapping[str, str], known: tuple[str, ...]) -> None:
    for key in options:
        if key not in known:
            raise SourceError(
                f"source: {name}: got the option {key!r}, expected {', '.join(known)}"
            )
    for key in ("width", "height", "rate"):
        _number(options, key)


def _number(options: Mapping[str, str], key: str) -> float | None:
    text = options.get(key)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise SourceError(f"source: got {key}={text}, expected a number above 0")
    return value
