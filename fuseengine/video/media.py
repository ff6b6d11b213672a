"""Video files and network cameras through PyAV."""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import av
import numpy as np

from fuseengine.errors import SourceError
from fuseengine.video.frames import CameraFrame, Colour, Format, Image
from fuseengine.video.sources import Lost, Reconnecting, Source

_HD_ROWS = 720
"""A video of so many rows that does not say its matrix has BT.709's, as players see it."""

_FULL_RANGE, _BT709 = 2, 1
_BT601 = (5, 6)  # of PAL and NTSC; the same numbers
_OPEN_S, _READ_S = 10.0, 5.0
_DAMAGED_IN_A_ROW = 1000
"""Packets; a file with more of them has no more frames."""


def picture_of(frame: Any) -> tuple[Image, Format, Colour]:
    """The image of an ``av.VideoFrame`` in the nearest of our formats.

    YUV 4:2:0 of 8 bits, NV12 and YUYV are kept, gray keeps its bits; other YUV becomes I420, other
    colour RGB.
    """
    name = frame.format.name
    if name.startswith("gray"):
        if name == "gray":
            return frame.to_ndarray(), "gray8", Colour()
        if name.endswith("le") and not name.startswith("grayf"):
            return _gray16(frame), "gray16", Colour()
        return frame.to_ndarray(format="gray16le"), "gray16", Colour()
    even = frame.width % 2 == 0 and frame.height % 2 == 0
    if not even or not (name.startswith(("yuv", "nv")) and "a" not in name):
        return frame.to_ndarray(format="rgb24"), "rgb24", Colour()
    colour = _colour(frame, name)
    if name == "nv12":
        return frame.to_ndarray(), "nv12", colour
    if name == "yuyv422":
        return frame.to_ndarray(), "yuyv", colour
    if name not in ("yuv420p", "yuvj420p"):
        frame = frame.reformat(format="yuv420p")
    return frame.to_ndarray(), "i420", colour


def _gray16(frame: Any) -> Image:
    """Counts of 9 to 16 bits as they are."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint16).reshape(frame.height, plane.line_size // 2)
    return rows[:, : frame.width].copy()


def _colour(frame: Any, name: str) -> Colour:
    full = int(frame.color_range) == _FULL_RANGE or name.startswith("yuvj")
    matrix = int(frame.colorspace)
    hd = matrix == _BT709 or (matrix not in _BT601 and frame.height >= _HD_ROWS)
    return Colour(full, "bt709" if hd else "bt601")


class MediaFile(Source):
    """A video file. Times are those of the container; damaged frames are skipped and counted."""

    def __init__(self, path: str) -> None:
        """Opens the file.

        Args:
            path: of the file, or the address of one on a web server.

        Raises:
            SourceError: it is no video that can be read.
        """
        self._container = _open(path)
        try:
            stream = _video_stream(path, self._container)
        except SourceError:
            self._container.close()
            raise
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate) if stream.average_rate else None
        size = stream.codec_context.height, stream.codec_context.width
        super().__init__(path, live=False, rate=rate, size=size)
        self._stream = stream
        self._frames = self._decode()
        self._count = 0
        self._start_s: float | None = None
        self._last_s = 0.0

    def read(self) -> CameraFrame | None:  # noqa: D102
        if self._stopped.is_set():
            return None
        frame = next(self._frames, None)
        if frame is None:
            return None
        image, name, colour = picture_of(frame)
        index, moment = self._count, self._time(frame)
        self._count += 1
        return CameraFrame(image, name, colour, moment, index, time.monotonic())

    def close(self) -> None:  # noqa: D102
        self._frames.close()
        self._container.close()

    def _time(self, frame: Any) -> float:
        given = frame.time
        if given is not None and self._start_s is None:
            self._start_s = given
        step = 1.0 / (self.rate or 30.0)
        moment = given - self._start_s if given is not None and self._start_s is not None else None
        if moment is None or (self._count and moment <= self._last_s):
            # No time stamp, or one that goes back.
            moment = self._last_s + step if self._count else 0.0
        self._last_s = moment
        return moment

    def _decode(self) -> Generator[Any, None, None]:
        damaged = 0
        packets = self._container.demux(self._stream)
        while damaged < _DAMAGED_IN_A_ROW:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.FFmpegError as error:
                damaged += 1
                self.skip_broken(_reason(error))
                if isinstance(error, av.error.EOFError):
                    return
                packets = self._container.demux(self._stream)
                continue
            try:
                frames = packet.decode()
            except av.error.FFmpegError as error:
                damaged += 1
                self.skip_broken(_reason(error))
                continue
            for frame in frames:
                if frame.is_corrupt:
                    damaged += 1
                    self.skip_broken("the decoder calls it corrupt")
                    continue
                damaged = 0
                yield frame


class NetworkStream(Reconnecting):
    """A network camera. Frames have the time of their arrival, and come back after a break.

    RTSP goes over TCP, because lost UDP packets are damaged pictures.
    """

    def __init__(self, address: str, *, rate: float | None = None) -> None:
        """Opens the stream.

        Args:
            address: with its scheme.
            rate: nominal frames per second, if the stream does not say.

        Raises:
            SourceError: nobody answers, or there is no video.
        """
        super().__init__(_without_password(address), live=True, rate=rate, size=(0, 0))
        self._address, self._given_rate = address, rate
        self._container: Any = None
        self._count = 0
        self.reopen()

    def reopen(self) -> None:  # noqa: D102
        self._release()
        options = {"fflags": "nobuffer", "flags": "low_delay"}
        if self._address.lower().startswith("rtsp"):
            options["rtsp_transport"] = "tcp"
        container = _open(self._address, options, shown=self.name)
        try:
            stream = _video_stream(self.name, container)
        except SourceError:
            container.close()
            raise
        stream.thread_type = "SLICE"  # threads per frame would hold frames back
        self._container, self._frames = container, container.decode(stream)
        self.size = stream.codec_context.height, stream.codec_context.width
        self.rate = self._given_rate or (float(stream.average_rate or 0) or None)

    def grab(self) -> CameraFrame:  # noqa: D102
        while True:
            try:
                frame = next(self._frames)
            except StopIteration:
                raise Lost("the stream ended") from None
            except av.error.InvalidDataError as error:
                self.skip_broken(_reason(error))
                self._frames = self._container.decode(self._container.streams.video[0])
                continue
            except av.error.FFmpegError as error:
                raise Lost(_reason(error)) from None
            if not frame.is_corrupt:
                break
            self.skip_broken("the decoder calls it corrupt")
        now = time.monotonic()
        image, name, colour = picture_of(frame)
        index, self._count = self._count, self._count + 1
        return CameraFrame(image, name, colour, now, index, now)

    def close(self) -> None:  # noqa: D102
        self._release()

    def _release(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            self._frames.close()
            container.close()


def _open(address: str, options: dict[str, str] | None = None, shown: str | None = None) -> Any:
    shown = shown or address
    path = Path(address)
    if options is None and path.is_file() and path.stat().st_size == 0:
        raise SourceError(f"source: {shown} is empty, expected a video; record or copy it again")
    try:
        return av.open(address, options=options or {}, timeout=(_OPEN_S, _READ_S))
    except av.error.FFmpegError as error:
        raise SourceError(
            f"source: cannot open {shown}: {_reason(error)}; expected a video that FFmpeg reads: "
            "check the address, or record or copy it again (a recording that was cut off may lack "
            "its index)"
        ) from None


def _video_stream(name: str, container: Any) -> Any:
    if not container.streams.video:
        raise SourceError(f"source: {name} has no video, expected one with pictures")
    stream = container.streams.video[0]
    if min(stream.codec_context.width, stream.codec_context.height) < 2:
        raise SourceError(f"source: {name} does not say the size of its pictures; record it again")
    return stream


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def _without_password(address: str) -> str:
    scheme, _, rest = address.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"
