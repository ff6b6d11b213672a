"""Frames as cameras give them, and fused ones.

A frame keeps the format it came in. Who consumes it decides about conversion: a luma model takes
``luma()`` of a YUV frame as it is, and its result goes back into the frame's own chroma
(:func:`with_luma`), so that nothing on the way from a camera to an encoder is ever RGB.

Range and matrix of YUV: ITU-T H.273. Limited range has Y from 16 to 235 and chroma from 16 to
240; engines work on full range.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fuseengine import _native
from fuseengine.errors import FrameError

Image = NDArray[Any]
Format = Literal["gray8", "gray16", "rgb24", "yuyv", "nv12", "i420"]
FORMATS: tuple[str, ...] = get_args(Format)
YUV: tuple[str, ...] = ("yuyv", "nv12", "i420")


@dataclass(frozen=True)
class Colour:
    """What the numbers of a YUV frame mean.

    Attributes:
        full_range: Y and chroma use 0 to 255; otherwise 16 to 235 and 16 to 240.
        matrix: "bt601" (standard definition, webcams) or "bt709" (high definition).
    """

    full_range: bool = False
    matrix: Literal["bt601", "bt709"] = "bt601"


@dataclass(frozen=True)
class Picture:
    """An image with its format.

    Attributes:
        image: "gray8": uint8 (H, W); "gray16": uint16 (H, W); "rgb24": uint8 (H, W, 3); "yuyv":
            uint8 (H, W, 2), Y and in turns U and V; "nv12": uint8 (H * 3 / 2, W), Y and then rows
            of U V pairs; "i420": uint8 (H * 3 / 2, W), the planes Y, U and V one after the other.
        format: which of these.
        colour: for the YUV formats.
    """

    image: Image
    format: Format
    colour: Colour = Colour()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture."""
        rows, columns = self.image.shape[:2]
        return (rows * 2 // 3 if self.format in ("nv12", "i420") else rows), columns

    def luma(self) -> Image:
        """(H, W) in full range: uint8, or uint16 for "gray16". May share the frame's memory."""
        if self.format in ("gray8", "gray16"):
            return self.image
        if self.format == "rgb24":
            values = self.image @ np.array([0.299, 0.587, 0.114], np.float32)
            return np.rint(values).astype(np.uint8)
        plane = _luma_plane(self.image, self.format)
        if self.colour.full_range:
            return plane
        return _look_up(plane, _to_full())

    def rgb(self) -> Image:
        """uint8 (H, W, 3). "gray16" keeps its upper eight bits."""
        if self.format == "rgb24":
            return self.image
        if self.format in YUV:
            return _yuv_to_rgb(self)
        gray = self.image if self.format == "gray8" else (self.image >> 8).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)


@dataclass(frozen=True)
class CameraFrame(Picture):
    """A frame of a source.

    Attributes:
        time_s: when it was captured. Of a live source: seconds of ``time.monotonic()``. Of a
            file: seconds from its first frame.
        index: 0, 1, 2 ... of its source; frames that were lost leave gaps where that is known.
        arrived_s: when the source handed it over, seconds of ``time.monotonic()``.
    """

    time_s: float = 0.0
    index: int = 0
    arrived_s: float = 0.0


@dataclass(frozen=True)
class FusedFrame(Picture):
    """A fused frame, in the format of the visible one.

    Attributes:
        time_s: capture time of the visible frame.
        index: 0, 1, 2 ... of the frames that were fused.
        infrared_time_s: capture time of the infrared frame, by the infrared camera's clock.
        visible_time_s: capture time of the visible frame.
        latency_ms: from the capture of the older of the two to the end of fusion; of files, from
            when they were read.
        late: it took longer than the stream's deadline.
    """

    time_s: float = 0.0
    index: int = 0
    infrared_time_s: float = 0.0
    visible_time_s: float = 0.0
    latency_ms: float = 0.0
    late: bool = False


def format_of(image: Image) -> Format:
    """The format of a plain array.

    Raises:
        FrameError: no gray8, gray16 or rgb24 array.
    """
    shape, dtype = image.shape, image.dtype
    if dtype == np.uint8 and len(shape) == 2:
        return "gray8"
    if dtype == np.uint16 and len(shape) == 2:
        return "gray16"
    if dtype == np.uint8 and len(shape) == 3 and shape[2] == 3:
        return "rgb24"
    raise FrameError(
        f"frame: got {dtype} {shape}, expected uint8 (H, W) or (H, W, 3), or uint16 (H, W); "
        "convert it, or wrap it in a CameraFrame that names its format"
    )


def check_picture(picture: Picture) -> None:
    """Refuse a frame whose image does not fit its format.

    Raises:
        FrameError: an unknown format, or another shape or dtype than the format has.
    """
    image, name = picture.image, picture.format
    if name not in FORMATS:
        raise FrameError(f"frame: got format {name!r}, expected one of {', '.join(FORMATS)}")
    if name in ("gray8", "gray16", "rgb24"):
        fits = format_of(image) == name
    else:
        even = image.ndim >= 2 and image.shape[1] % 2 == 0
        if name == "yuyv":
            fits = even and image.ndim == 3 and image.shape[2] == 2
        else:
            fits = even and image.ndim == 2 and image.shape[0] % 3 == 0
        fits = fits and image.dtype == np.uint8
    if not fits:
        raise FrameError(
            f"frame: got {image.dtype} {image.shape}, which is no {name}; see "
            "fuseengine.video.Picture for the shapes of formats"
        )


def with_luma(luma: NDArray[np.uint8], picture: Picture) -> Image:
    """A YUV image with another luma and its own chroma.

    Args:
        luma: uint8 (H, W), full range.
        picture: of a YUV format and the same size.

    Returns:
        A new array of the picture's shape.
    """
    image = picture.image
    if picture.format == "yuyv":
        out = image.copy()
        out[..., 0] = luma if picture.colour.full_range else _look_up(luma, _from_full())
        return out
    height = luma.shape[0]
    out = np.empty(image.shape, np.uint8)
    out[height:] = image[height:]
    if picture.colour.full_range:
        out[:height] = luma
    else:
        _look_up(luma, _from_full(), out[:height])
    return out


def _luma_plane(image: Image, name: str) -> Image:
    return image[..., 0] if name == "yuyv" else image[: image.shape[0] * 2 // 3]


@cache
def _to_full() -> NDArray[np.uint8]:
    return np.clip(np.rint((np.arange(256) - 16) * (255 / 219)), 0, 255).astype(np.uint8)


@cache
def _from_full() -> NDArray[np.uint8]:
    return np.rint(np.arange(256) * (219 / 255) + 16).astype(np.uint8)


def _look_up(
    plane: Image, table: NDArray[np.uint8], out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    out = np.empty(plane.shape, np.uint8) if out is None else out
    _native.look_up(np.ascontiguousarray(plane), table, out)
    return out


def _yuv_to_rgb(picture: Picture) -> NDArray[np.uint8]:
    """Each chroma sample stands for the pixels it covers, without interpolation."""
    out = np.empty((*picture.size, 3), np.uint8)
    _native.yuv_to_rgb(
        np.ascontiguousarray(picture.image),
        out,
        format=picture.format,
        full_range=picture.colour.full_range,
        matrix=picture.colour.matrix,
    )
    return out
