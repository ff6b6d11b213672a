"""Where fused frames go: ``open_sink(uri)``.

| what is given | what is written |
| --- | --- |
| ``fused.mp4``, ``file:///data/fused.mkv``, ``.mov`` | H.264 (PyAV) |
| ``frames/``, ``frames/%05d.png`` | images, one per frame |
| ``shm://name`` | frames for another process: ``csrc/fuse_shm.h`` |
| ``display://``, ``display://title`` | a window (OpenCV) |
| ``null`` | nothing |
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from fuseengine.errors import SettingError, SinkError
from fuseengine.runtime.formats import SUFFIXES
from fuseengine.runtime.images import write_image
from fuseengine.video.frames import YUV, FusedFrame
from fuseengine.video.shared_memory import SharedMemoryWriter
from fuseengine.video.sources import file_path

MEDIA_SUFFIXES = (".mp4", ".mkv", ".mov")
_NUMBER = re.compile(r"%0?\d*d")
_KNOWN = (
    f"a file with one of {', '.join(MEDIA_SUFFIXES)}, a folder or a pattern such as %05d.png for "
    "images, shm://NAME, display:// or null"
)


class Sink:
    """Takes fused frames, one after the other; this one forgets them.

    Attributes:
        name: what was opened, for people.
        written: frames so far.
        dismissed: the user has closed it, and wants no more.
    """

    def __init__(self, name: str = "null") -> None:
        self.name, self.written, self.dismissed = name, 0, False

    def write(self, frame: FusedFrame) -> None:
        """Take a frame.

        Raises:
            SinkError: it cannot be written.
        """
        self._write(frame)
        self.written += 1

    def close(self) -> None:
        """Finish what was written. May be called more than once."""

    def _write(self, frame: FusedFrame) -> None:
        pass

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class ImageSink(Sink):
    """One image file per frame; each is written whole or not at all."""

    def __init__(self, path: Path) -> None:
        """Makes the folder.

        Args:
            path: a folder for ``00000.png`` and so on, or a pattern such as ``%05d.tif``.

        Raises:
            SinkError: the folder cannot be made, or the suffix is that of no image.
        """
        super().__init__(str(path))
        self._folder, self._pattern = path, "%05d.png"
        if _NUMBER.search(path.name):
            self._folder, self._pattern = path.parent, path.name
            if path.suffix.lower() not in SUFFIXES:
                raise SinkError(
                    f"sink: got {path} with the suffix {path.suffix!r}, expected one of "
                    f"{', '.join(SUFFIXES)}"
                )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SinkError(
                f"sink: cannot make the folder {self._folder}: {error.strerror}; expected a place "
                "that can be written"
            ) from None

    def _write(self, frame: FusedFrame) -> None:
        image = frame.rgb() if frame.format in YUV else frame.image
        write_image(self._folder / (self._pattern % frame.index), image)


class SharedMemorySink(Sink):
    """A ring in shared memory, for other processes."""

    def __init__(self, name: str) -> None:
        super().__init__(f"shm://{name}")
        if not name or "/" in name:
            raise SinkError(f"sink: got shm://{name}, expected a name without '/'")
        self._writer = SharedMemoryWriter(name)

    def close(self) -> None:  # noqa: D102
        self._writer.close()

    def _write(self, frame: FusedFrame) -> None:
        self._writer.write(frame, frame.time_s)


class WindowSink(Sink):
    """A window; ``q``, Escape or closing it says that the user wants no more."""

    def __init__(self, title: str) -> None:
        """Opens the window.

        Raises:
            SinkError: there is no display, or OpenCV was built without windows.
        """
        super().__init__(f"display://{title}")
        try:
            import cv2
        except ImportError:
            raise SinkError(
                "sink: a window needs OpenCV, which is not installed: pip install opencv-python"
            ) from None
        # OpenCV's toolkits end the process when there is no display.
        if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
            raise SinkError(
                "sink: there is no display for a window (neither DISPLAY nor WAYLAND_DISPLAY is "
                "set); write a file instead, or log in with a desktop or ssh -X"
            )
        self._title = title
        try:
            cv2.namedWindow(title, cv2.WINDOW_NORMAL)
        except cv2.error:
            raise SinkError(
                "sink: this OpenCV was built without windows; install opencv-python in the place "
                "of opencv-python-headless"
            ) from None

    def _write(self, frame: FusedFrame) -> None:
        import cv2

        cv2.imshow(self._title, cv2.cvtColor(frame.rgb(), cv2.COLOR_RGB2BGR))
        pressed = cv2.waitKey(1) & 0xFF
        closed = cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) < 1
        self.dismissed = self.dismissed or closed or pressed in (ord("q"), 27)

    def close(self) -> None:  # noqa: D102
        import cv2

        if cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) >= 1:
            cv2.destroyWindow(self._title)


def open_sink(uri: Any, *, rate: float | None = None) -> Sink:
    """Open a place for fused frames.

    Args:
        uri: see the table of this module; an open sink is given back as it is.
        rate: nominal frames per second, which video files note; frames keep their own times.

    Returns:
        The sink; close it, or use it in a ``with`` statement.

    Raises:
        SinkError: it cannot be opened.
    """
    if rate is not None and not 0 < rate < float("inf"):
        raise SettingError(f"rate: got {rate}, expected frames per second above 0")
    if isinstance(uri, Sink):
        return uri
    text = str(uri).strip()
    scheme, separator, rest = text.partition("://")
    if text == "null" or (separator and scheme == "null"):
        return Sink()
    if separator and scheme == "shm":
        return SharedMemorySink(rest)
    if separator and scheme == "display":
        return WindowSink(rest or "FuseEngine")
    if separator and scheme == "file":
        text = str(file_path(text)) + "/" * text.endswith("/")
    elif separator:
        raise SinkError(f"sink: got {text!r} with the unknown scheme {scheme!r}, expected {_KNOWN}")
    return _open_path(Path(text), text, rate)


def _open_path(path: Path, text: str, rate: float | None) -> Sink:
    if path.is_dir() or text.endswith("/") or _NUMBER.search(path.name):
        return ImageSink(path)
    if path.suffix.lower() in MEDIA_SUFFIXES:
        from fuseengine.video.video_file import VideoSink

        return VideoSink(path, rate=rate)
    raise SinkError(f"sink: got {text!r}, expected {_KNOWN}")
