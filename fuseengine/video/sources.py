"""Where frames come from: ``open_source(uri)``.

| what is given | what is opened |
| --- | --- |
| ``clip.mp4``, ``file:///data/clip.mkv`` | a video file (PyAV, else OpenCV) |
| ``frames/``, ``frames/*.png``, ``frames/%04d.tif`` | images, 8 or 16 bit |
| ``/dev/video1``, ``v4l2:///dev/video1?width=640&height=512&format=y16`` | a V4L2 camera (OpenCV) |
| ``csi://0?width=1920&height=1080&rate=30`` | a Jetson's CSI camera (OpenCV with GStreamer) |
| ``rtsp://...``, and rtsps, rtmp, rtp, udp, srt, http | a network camera (PyAV, else OpenCV) |
| ``gst://...``, or any text with ``!`` | a GStreamer pipeline (OpenCV with GStreamer) |
| ``shm://name`` | another process: ``csrc/fuse_shm.h`` |
| an iterable of arrays | arrays, ``(time_s, array)`` or :class:`CameraFrame` |
"""

from __future__ import annotations

import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from fuseengine.errors import SourceError
from fuseengine.video.events import Event, Kind, Listener, log_event
from fuseengine.video.frames import CameraFrame

NETWORK = ("rtsp", "rtsps", "rtmp", "rtp", "udp", "srt", "http", "https")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".ts", ".webm", ".y4m")
IMAGE_RATE = 30.0

_KNOWN = (
    "a file, a folder or pattern of images, file://, v4l2://, csi://, rtsp://, gst://, shm://, "
    "a GStreamer pipeline with '!', or an iterable of arrays"
)


class Source(ABC):
    """Frames, one after the other. Read by one thread at a time.

    Attributes:
        name: what was opened, for people.
        live: frames come at their own pace and carry times of ``time.monotonic()``.
        rate: nominal frames per second, None where unknown.
        size: (height, width) of the frames, as known when it was opened.
        broken: damaged frames skipped so far.
        missed: frames so far that were gone before they could be read.
        reconnects: times that it came back after it broke off.
    """

    def __init__(self, name: str, *, live: bool, rate: float | None, size: tuple[int, int]) -> None:
        self.name, self.live, self.rate, self.size = name, live, rate, size
        self.broken = self.missed = self.reconnects = 0
        self._camera = ""
        self._listener: Listener = log_event
        self._stopped = threading.Event()

    def listen(self, camera: str, listener: Listener) -> None:
        """Say who hears of its events, and which camera it is."""
        self._camera, self._listener = camera, listener

    @abstractmethod
    def read(self) -> CameraFrame | None:
        """Wait for the next frame; None at the end, and after :meth:`stop`.

        Raises:
            FuseEngineError: reading failed for good.
        """

    def stop(self) -> None:
        """Make a read that waits return None soon; may be called by any thread."""
        self._stopped.set()

    def close(self) -> None:  # noqa: B027 - many sources hold nothing
        """Give back what it holds. Called by the thread that reads."""

    def report(self, kind: Kind, message: str) -> None:
        """Tell an event."""
        self._listener(Event(kind, self._camera, message))

    def skip_broken(self, reason: str) -> None:
        """Count a damaged frame; the 1st, 10th, 100th ... is reported."""
        self.broken += 1
        if str(self.broken).strip("0") == "1":
            total = f" ({self.broken} so far)" if self.broken > 1 else ""
            self.report("broken", f"{self.name}: skipped a damaged frame: {reason}{total}")

    def __iter__(self) -> Iterator[CameraFrame]:
        while (frame := self.read()) is not None:
            yield frame

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class Paced(Source):
    """A source of recorded frames played at its own speed, as if it were a camera."""

    def __init__(self, source: Source) -> None:
        """Takes over a source that is not live; it starts when its first frame is read."""
        super().__init__(source.name, live=True, rate=source.rate, size=source.size)
        self._source = source
        self._start_s: float | None = None

    def start(self, start_s: float) -> None:
        """Say when its time zero is, by ``time.monotonic()``, so that two sources agree."""
        if self._start_s is None:
            self._start_s = start_s

    def listen(self, camera: str, listener: Listener) -> None:  # noqa: D102
        self._source.listen(camera, listener)

    def read(self) -> CameraFrame | None:  # noqa: D102
        frame = self._source.read()
        self.broken = self._source.broken
        if frame is None:
            return None
        now = time.monotonic()
        if self._start_s is None:
            self._start_s = now - frame.time_s
        due = self._start_s + frame.time_s
        if self._stopped.wait(max(0.0, due - now)):
            return None
        return CameraFrame(
            frame.image, frame.format, frame.colour, due, frame.index, time.monotonic()
        )

    def stop(self) -> None:  # noqa: D102
        super().stop()
        self._source.stop()

    def close(self) -> None:  # noqa: D102
        self._source.close()


class Lost(Exception):
    """A live source broke off."""


class Reconnecting(Source):
    """A live source that is opened anew when it breaks off."""

    first_pause_s = 0.5
    longest_pause_s = 8.0

    @abstractmethod
    def grab(self) -> CameraFrame:
        """The next frame.

        Raises:
            Lost: the source broke off.
        """

    @abstractmethod
    def reopen(self) -> None:
        """Open it anew.

        Raises:
            SourceError: it cannot be opened now.
        """

    def read(self) -> CameraFrame | None:  # noqa: D102
        while not self._stopped.is_set():
            try:
                return self.grab()
            except Lost as reason:
                if self._stopped.is_set():
                    break
                self.report("lost", f"{self.name} broke off: {reason}; trying to open it again")
            self._come_back()
        return None

    def _come_back(self) -> None:
        pause, begin = self.first_pause_s, time.monotonic()
        while not self._stopped.wait(pause):
            try:
                self.reopen()
            except SourceError:
                pause = min(2 * pause, self.longest_pause_s)
                continue
            self.reconnects += 1
            gone = time.monotonic() - begin
            self.report("reconnect", f"{self.name} is back after {gone:.1f} s")
            return


def open_source(
    uri: Any,
    *,
    rate: float | None = None,
    live: bool | None = None,
    realtime: bool = False,
) -> Source:
    """Open a source of frames.

    Args:
        uri: see the table of this module; an open source is given back as it is.
        rate: frames per second of images and arrays without times (default: 30), or what a camera
            is asked for.
        live: of an iterable: its frames come at their own pace; those without a time have that
            of their arrival.
        realtime: play recorded frames at their own speed, as if they came from a camera.

    Returns:
        The source; close it, or use it in a ``with`` statement.

    Raises:
        SourceError: it cannot be opened.

    Example:
        >>> import numpy as np
        >>> with open_source(np.zeros((2, 4, 6), np.uint8)) as source:
        ...     [frame.time_s for frame in source]
        [0.0, 0.03333333333333333]
    """
    if rate is not None and not 0 < rate < float("inf"):
        raise SourceError(f"rate: got {rate}, expected frames per second above 0")
    source = uri if isinstance(uri, Source) else _open(uri, rate, live)
    return Paced(source) if realtime and not source.live else source


def _open(uri: Any, rate: float | None, live: bool | None) -> Source:
    if isinstance(uri, Path):
        return _open_path(uri, str(uri), rate)
    if isinstance(uri, str):
        return _open_text(uri.strip(), rate)
    if isinstance(uri, Iterable):
        from fuseengine.video.arrays import ArraySource

        return ArraySource(uri, rate=rate, live=bool(live))
    raise SourceError(f"source: got a {type(uri).__name__}, expected {_KNOWN}")


def _open_text(text: str, rate: float | None) -> Source:
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower() if separator else ""
    if scheme == "gst" or "!" in text:
        from fuseengine.video.opencv import open_gstreamer

        return open_gstreamer(rest if scheme == "gst" else text)
    if not scheme:
        return _open_path(Path(text), text, rate)
    if scheme == "file":
        path = file_path(text)
        return _open_path(path, str(path), rate)
    if scheme in NETWORK:
        return _open_network(text, rate)
    if scheme == "shm":
        from fuseengine.video.shared_memory import SharedMemorySource

        return SharedMemorySource(rest)
    if scheme in ("v4l2", "csi"):
        from fuseengine.video.opencv import open_csi, open_v4l2

        place, _, query = rest.partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        if rate is not None:
            options.setdefault("rate", f"{rate:g}")
        return (open_v4l2 if scheme == "v4l2" else open_csi)(place, options)
    raise SourceError(f"source: got {text!r} with the unknown scheme {scheme!r}, expected {_KNOWN}")


def file_path(text: str) -> Path:
    """The path of ``file://PATH``; escapes such as %20 are resolved unless a file has that name.

    Relative paths are taken too, as ``file://clip.mp4``; no %20 is made of a pattern's ``%04d``.
    """
    raw = text.partition("://")[2]
    raw = raw.removeprefix("localhost") if raw.startswith("localhost/") else raw
    decoded = re.sub("%[0-9A-Fa-f]{2}(?!d)", lambda match: unquote(match[0]), raw)
    return Path(raw if Path(raw).exists() else decoded)


def _open_path(path: Path, text: str, rate: float | None) -> Source:
    if text.startswith("/dev/video"):
        from fuseengine.video.opencv import open_v4l2

        return open_v4l2(text, {} if rate is None else {"rate": f"{rate:g}"})
    from fuseengine.video.image_sequence import ImageSequence, is_images

    if is_images(path):
        return ImageSequence(path, rate=rate or IMAGE_RATE)
    if not path.exists():
        raise SourceError(f"source: {text!r} does not exist; expected {_KNOWN}: check the path")
    return _open_media(str(path), network=False)


def _open_network(text: str, rate: float | None) -> Source:
    scheme, path = text.partition("://")[0].lower(), urlsplit(text).path.lower()
    # A recording on a web server has an end; a web camera has none.
    recorded = scheme in ("http", "https") and path.endswith(VIDEO_SUFFIXES)
    return _open_media(text, network=not recorded, rate=rate)


def _open_media(text: str, *, network: bool, rate: float | None = None) -> Source:
    """With PyAV, or with OpenCV where that is missing."""
    try:
        import av  # noqa: F401
    except ImportError:
        from fuseengine.video.opencv import open_file

        return open_file(text, live=network)
    from fuseengine.video.media import MediaFile, NetworkStream

    return NetworkStream(text, rate=rate) if network else MediaFile(text)
