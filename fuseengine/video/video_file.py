"""Video files through PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from fuseengine.errors import SinkError
from fuseengine.video.frames import FusedFrame, Image
from fuseengine.video.sinks import Sink

_TICKS = 90_000
_USUAL_RATE = 30.0
_KEYFRAME_S = 2
_ENCODERS = {
    "libx264": {"preset": "veryfast", "crf": "18"},
    "libopenh264": {},
    "h264_nvenc": {},
    "h264_v4l2m2m": {},
}
_HYBRID_SINCE = (61, 7)
_HD_ROWS = 720
_BT709, _BT601 = 1, 5
_LIMITED, _FULL = 1, 2
_PIX_FMT = {"i420": "yuv420p", "nv12": "nv12", "yuyv": "yuyv422", "rgb24": "rgb24", "gray8": "gray"}


class VideoSink(Sink):
    """H.264 in MP4, MOV or Matroska, with the frames' own times.

    The file is written in fragments of two seconds, so what is there plays even after the process
    was killed; closing it makes an ordinary file of it where FFmpeg is 7.1 or newer. Frames of
    another size than the first are scaled to it; odd sides grow by a repeated row or column,
    because 4:2:0 has even ones.
    """

    def __init__(self, path: Path, *, rate: float | None = None) -> None:
        """Opens the file; the encoder starts with the first frame.

        Args:
            path: of the file, replaced when it is there.
            rate: nominal frames per second.

        Raises:
            SinkError: PyAV or its encoder is missing, or the file cannot be written.
        """
        super().__init__(str(path))
        try:
            import av
            from av import library_versions
        except ImportError:
            raise SinkError(
                f"sink: {path} needs PyAV, which is not installed: pip install 'fuseengine[video]'"
            ) from None
        self._encoder = next((name for name in _ENCODERS if name in av.codecs_available), "")
        if not self._encoder:
            raise SinkError(
                f"sink: {path}: this PyAV has no H.264 encoder, expected one of "
                f"{', '.join(_ENCODERS)}; install PyAV from PyPI, or write images"
            )
        if not path.parent.is_dir():
            raise SinkError(f"sink: cannot write {path}: no folder {path.parent}; make it first")
        options = {}
        if path.suffix.lower() != ".mkv":
            hybrid = library_versions["libavformat"] >= _HYBRID_SINCE
            options["movflags"] = "hybrid_fragmented" if hybrid else "frag_keyframe+empty_moov"
        try:
            self._container: Any = av.open(str(path), "w", options=options)
        except av.error.FFmpegError as error:
            raise SinkError(
                f"sink: cannot write {path}: {error.strerror}; check rights and space"
            ) from None
        self._rate = rate or _USUAL_RATE
        self._stream: Any = None
        self._start_s = 0.0
        self._last = -1

    def close(self) -> None:  # noqa: D102
        container, self._container = self._container, None
        if container is None:
            return
        try:
            if self._stream is not None:
                for packet in self._stream.encode():
                    container.mux(packet)
        finally:
            container.close()
            if self._stream is None:  # no frame, hence no video
                Path(self.name).unlink(missing_ok=True)

    def _write(self, frame: FusedFrame) -> None:
        import av

        if self._container is None:
            raise SinkError(f"sink: {self.name} is closed; open another one")
        if self._stream is None:
            self._begin(frame)
        picture = self._video_frame(frame)
        tick = round((frame.time_s - self._start_s) * _TICKS)
        self._last = picture.pts = max(tick, self._last + 1)
        picture.time_base = Fraction(1, _TICKS)
        try:
            for packet in self._stream.encode(picture):
                self._container.mux(packet)
        except av.error.FFmpegError as error:
            raise SinkError(
                f"sink: cannot write {self.name}: {error.strerror}; check the space on its disk"
            ) from None

    def _begin(self, frame: FusedFrame) -> None:
        height, width = (side + side % 2 for side in frame.size)
        rate = Fraction(self._rate).limit_denominator(1001)
        stream = self._container.add_stream(
            self._encoder, rate=rate, options=dict(_ENCODERS[self._encoder])
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, _TICKS)
        context = stream.codec_context
        context.time_base = Fraction(1, _TICKS)
        context.gop_size = max(1, round(_KEYFRAME_S * self._rate))
        if frame.format in ("i420", "nv12", "yuyv"):
            self._full = frame.colour.full_range
            self._matrix = _BT709 if frame.colour.matrix == "bt709" else _BT601
        else:
            self._full, self._matrix = False, _BT709 if height >= _HD_ROWS else _BT601
        context.color_range = _FULL if self._full else _LIMITED
        context.colorspace = self._matrix
        self._stream, self._start_s = stream, frame.time_s

    def _video_frame(self, frame: FusedFrame) -> Any:
        import av

        image, name = frame.image, frame.format
        if name == "gray16":
            image, name = (image >> 8).astype(np.uint8), "gray8"
        yuv = name in ("i420", "nv12", "yuyv")
        picture = av.VideoFrame.from_ndarray(_even(image, yuv), format=_PIX_FMT[name])
        width, height = self._stream.width, self._stream.height
        same = (picture.width, picture.height) == (width, height)
        full = frame.colour.full_range if yuv else True
        if name == "i420" and same and full == self._full:
            return picture
        matrix = _BT709 if frame.colour.matrix == "bt709" else _BT601
        return picture.reformat(
            width,
            height,
            "yuv420p",
            src_colorspace=matrix if yuv else self._matrix,
            dst_colorspace=self._matrix,
            src_color_range=_FULL if full else _LIMITED,
            dst_color_range=_FULL if self._full else _LIMITED,
        )


def _even(image: Image, yuv: bool) -> Image:
    """An array that PyAV takes, with even sides."""
    if not yuv and (image.shape[0] % 2 or image.shape[1] % 2):
        grow = [(0, image.shape[0] % 2), (0, image.shape[1] % 2)] + [(0, 0)] * (image.ndim - 2)
        image = np.pad(image, grow, mode="edge")
    return np.ascontiguousarray(image)
