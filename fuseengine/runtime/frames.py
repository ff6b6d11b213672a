"""Frames in, frames out: whatever a camera gives <-> the float planes a model works on.

``prepare_pair`` is the public border: it takes what the user has (NumPy, torch, DLPack; one
frame or a batch), checks it once and gives back plain frames. ``FrameAdapter`` is the fast part:
it belongs to one engine, knows its size and channels, and moves a frame into or out of the
engine's buffers in one pass, padding and cropping on the way.

Colour: luma is ITU-R BT.601 full range, ``Y = 0.299 R + 0.587 G + 0.114 B``. A luma model
fuses Y; the visible frame's chroma stays: ``out = clip(visible + (Y_fused - Y_visible))``, the
same amount added to R, G and B. That equals exchanging Y in YCbCr and converting back, as Cb
and Cr are multiples of B - Y and R - Y.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fuseengine import _native
from fuseengine.errors import FrameError, SettingError, SizeMismatchError, UnknownNameError

Frame = NDArray[Any]

# Full scale of each dtype maps to 1.0. Byte-swapped dtypes are other keys, hence refused.
_SCALE = {
    np.dtype(np.uint8): 1.0 / 255.0,
    np.dtype(np.uint16): 1.0 / 65535.0,
    np.dtype(np.float32): 1.0,
    np.dtype(np.float64): 1.0,
}
_PLANES = {"luma": 1, "rgb": 3}
_PADDINGS = ("reflect", "white")

# Beyond [0, 1] by more than this, a float frame is on another scale; less is rounding, clipped.
_SLACK = 1e-3


class FrameAdapter:
    """Moves frames of one size into and out of an engine's float buffers.

    Holds no buffer and no state: one adapter may serve several threads.

    Attributes:
        size: (height, width) of the frames.
        channels: "luma" or "rgb".
        planes: 1 or 3, the C below.
        padded: (height, width) of the buffers, ``size`` rounded up to the multiple.
        padding: "reflect" or "white".
    """

    def __init__(
        self,
        size: tuple[int, int],
        channels: str = "luma",
        multiple: int = 1,
        padding: str = "reflect",
    ) -> None:
        """Describes the frames.

        Args:
            size: (height, width), each at least 2 pixels.
            channels: "luma" (one plane) or "rgb" (three).
            multiple: The buffers' height and width are multiples of this.
            padding: What stands right of and below the frame: "reflect" (the edge pixel is not
                repeated) or "white" (1.0).

        Raises:
            SettingError: If size or multiple is out of range.
            UnknownNameError: If channels or padding is another word.
        """
        height, width = (int(n) for n in size)
        if height < 2 or width < 2:
            raise SettingError(f"size: got {height}x{width}, expected at least 2x2 pixels")
        if multiple < 1:
            raise SettingError(f"multiple: got {multiple}, expected 1 or more")
        if channels not in _PLANES:
            raise UnknownNameError("channels", channels, _PLANES)
        if padding not in _PADDINGS:
            raise UnknownNameError("padding", padding, _PADDINGS)
        self.size = (height, width)
        self.channels = channels
        self.padding = padding
        self.planes = _PLANES[channels]
        self.padded = (-(-height // multiple) * multiple, -(-width // multiple) * multiple)

    def load(
        self,
        infrared: Frame,
        visible: Frame,
        a_out: NDArray[np.float32],
        b_out: NDArray[np.float32],
    ) -> None:
        """Writes both frames, as floats in [0, 1] and padded, into the buffers.

        Frames: (H, W) or (H, W, 3) RGB;
        uint8, uint16 (full scale is 1.0), or float32, float64 in [0, 1]. A gray frame fills all
        three planes of an rgb model.

        Args:
            infrared: The infrared frame.
            visible: The visible frame.
            a_out: (1, C, Hp, Wp) float32, C-contiguous, for the infrared frame.
            b_out: The same for the visible frame.

        Raises:
            FrameError: If a frame has another shape or dtype, or holds NaN or infinity.
            SizeMismatchError: If a frame's size is not the adapter's.
        """
        self._load("infrared", infrared, a_out)
        self._load("visible", visible, b_out)

    def store(self, fused: NDArray[np.float32], visible: Frame, out: Frame | None = None) -> Frame:
        """Turns the fused planes into a frame of the visible frame's shape and dtype.

        Integers are rounded to nearest; everything is clipped to the dtype's range (floats to
        [0, 1]); NaN becomes 0. Gray visible frame and rgb model: the luma of the fused planes.

        Args:
            fused: (1, C, Hp, Wp) or (C, Hp, Wp) float32, C-contiguous, 1.0 is full scale.
            visible: The frame given to :meth:`load`; its chroma is kept by a luma model.
            out: Where to write, of the visible frame's shape and dtype; it may be ``visible``
                itself. A new array by default.

        Returns:
            ``out``.

        Raises:
            FrameError: If visible or out has another shape or dtype.
            SizeMismatchError: If visible's size is not the adapter's.
        """
        self._scale("visible", visible)
        if out is None:
            out = np.empty(visible.shape, visible.dtype)
        elif out.shape != visible.shape or out.dtype != visible.dtype:
            raise FrameError(
                f"out: got {_describe(out)}, expected {_describe(visible)} like the visible frame"
            )
        planes = fused[0] if fused.ndim == 4 and len(fused) == 1 else fused
        if planes.shape != (self.planes, *self.padded):
            raise FrameError(
                f"fused: got shape {fused.shape}, expected {(1, self.planes, *self.padded)}"
            )
        direct = out if _is_native(out) else np.empty(visible.shape, visible.dtype)
        _native.frame_out(planes, _to_native(visible), direct)
        if direct is not out:
            out[...] = direct
        return out

    def _load(self, name: str, frame: Frame, out: NDArray[np.float32]) -> None:
        scale = self._scale(name, frame)
        if out.shape != (1, self.planes, *self.padded):
            raise FrameError(
                f"{name} buffer: got shape {out.shape}, expected {(1, self.planes, *self.padded)}"
            )
        if not _native.frame_in(_to_native(frame), out[0], scale=scale):
            raise _not_finite(name, frame)
        if self.padding == "white":
            out[:, :, self.size[0] :] = 1.0
            out[:, :, :, self.size[1] :] = 1.0

    def _scale(self, name: str, frame: Frame) -> float:
        scale = _SCALE.get(frame.dtype)
        shape = frame.shape
        if scale is None or not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)):
            raise FrameError(
                f"{name} frame: got {_describe(frame)}, expected (H, W) or (H, W, 3) of uint8, "
                f"uint16, float32 or float64; prepare_pair() converts what can be converted"
            )
        if shape[:2] != self.size:
            raise SizeMismatchError(
                f"{name} frame: got {_by(shape)}, expected {_by(self.size)} (height x width); "
                f"resize the frame or compile an engine for its size"
            )
        return scale


class FramePair:
    """The checked frames of one call: iterate over the pairs, then give the results back.

    Made by :func:`prepare_pair`. Iterating gives ``(infrared, visible)``, NumPy frames of the
    kinds that :class:`FrameAdapter` takes, all of one size.

    Attributes:
        size: (height, width) of every frame.
    """

    def __init__(self, infrared: Sequence[Frame], visible: _Input) -> None:
        """Private: call :func:`prepare_pair`."""
        self._infrared = infrared
        self._visible = visible
        self.size: tuple[int, int] = visible.size

    def __len__(self) -> int:
        return len(self._infrared)

    def __iter__(self) -> Iterator[tuple[Frame, Frame]]:
        return zip(self._infrared, self._visible.frames, strict=True)

    def restore(self, outputs: Sequence[Frame]) -> Any:
        """The results in the visible input's kind, shape and dtype.

        Args:
            outputs: One fused frame per pair, as :meth:`FrameAdapter.store` returns them.

        Returns:
            A torch tensor if the visible input was one, else a NumPy array. A single frame is
            not copied: it shares the memory of ``outputs[0]``.

        Raises:
            FrameError: If there are not as many outputs as pairs.
        """
        if len(outputs) != len(self):
            raise FrameError(f"outputs: got {len(outputs)} frames, expected {len(self)}")
        source = self._visible
        result = outputs[0] if len(outputs) == 1 else np.stack(outputs)
        result = result.reshape(source.shape).astype(source.dtype, copy=False)
        if source.is_torch:
            return sys.modules["torch"].from_numpy(result)
        return result


def prepare_pair(
    infrared: Any,
    visible: Any,
    *,
    resize: Literal["infrared"] | None = None,
    infrared_range: tuple[float, float] | Literal["minmax"] | None = None,
) -> FramePair:
    """Checks an infrared and a visible input and makes plain frames of them.

    Both may be NumPy arrays, torch tensors on the CPU, or anything else with ``__dlpack__``:
    (H, W), (H, W, 1) or (H, W, 3) RGB, or batches (N, H, W), (N, H, W, 1), (N, H, W, 3); a 3-D
    array whose last axis is 3 is one colour frame. uint8 and uint16 count from 0 to full scale;
    float16, float32 and float64 lie in [0, 1]. An infrared frame of three channels (equal, as
    cameras and files often have it) is reduced to its luma by luma models. No copy is made of
    uint8, uint16, float32 and float64 data with adjacent pixels. Batches of frames 2 or 4 pixels
    wide need the axis of channels, as they look like images with alpha.

    Args:
        infrared: The infrared frame or frames.
        visible: The visible frame or frames; the results take its kind, shape and dtype.
        resize: "infrared" resamples infrared frames to the visible frames' size (bilinear, with
            Pillow; it averages when shrinking). By default sizes must be equal.
        infrared_range: ``(lo, hi)`` maps infrared values lo..hi linearly to 0..1 and clips,
            "minmax" takes each frame's smallest and largest value (a constant frame becomes 0).
            For thermal counts that use a small part of 16 bits, or floats in degrees.
            Three-channel infrared is reduced to luma first.

    Returns:
        The pair or pairs.

    Raises:
        FrameError: Another type, shape, dtype or channel count, fewer than 2x2 pixels, NaN,
            infinity, floats outside [0, 1], batches of different length.
        SizeMismatchError: The two have different sizes and ``resize`` is None.
        SettingError: A wrong ``resize`` or ``infrared_range``.

    Example:
        >>> import numpy as np
        >>> ir, vis = np.zeros((4, 6), np.uint8), np.zeros((4, 6, 3), np.uint8)
        >>> pair = prepare_pair(ir, vis)
        >>> [(a.shape, b.shape) for a, b in pair]
        [((4, 6), (4, 6, 3))]
    """
    if resize not in (None, "infrared"):
        raise SettingError(f"resize: got {resize!r}, expected None or 'infrared'")
    bounds = range_bounds(infrared_range)
    ir, vis = _Input("infrared", infrared), _Input("visible", visible)
    if len(ir.frames) != len(vis.frames):
        raise FrameError(
            f"got {len(ir.frames)} infrared and {len(vis.frames)} visible frames (shapes "
            f"{ir.shape} and {vis.shape}), expected as many of each; a 3-D array whose last axis "
            f"is not 3 is a batch (N, H, W): move the channels of a (3, H, W) array to the end"
        )
    if ir.size != vis.size and resize is None:
        raise SizeMismatchError(
            f"got infrared {_by(ir.size)} and visible {_by(vis.size)} (height x width), expected "
            f"equal sizes; pass resize='infrared' if both show the same view, else register them"
        )
    for frame in vis.frames:
        _check_values("visible", frame)
    frames = ir.frames
    if infrared_range is not None:
        frames = [_stretch(frame, bounds) for frame in frames]
    else:
        for frame in frames:
            _check_values("infrared", frame)
    if ir.size != vis.size:
        frames = [resample(frame, vis.size) for frame in frames]
    return FramePair(frames, vis)


class _Input:
    """One of the two inputs as a list of frames, and what is needed to answer in kind."""

    def __init__(self, name: str, given: Any) -> None:
        array, self.is_torch = _to_numpy(name, given)
        self.shape, self.dtype = array.shape, array.dtype
        native = array.dtype.newbyteorder("=")
        if native == np.float16:
            array = array.astype(np.float32)
        elif native not in _SCALE:
            raise FrameError(
                f"{name}: got dtype {array.dtype}, expected uint8, uint16, float16, float32 or "
                f"float64; {_dtype_remedy(array.dtype)}"
            )
        elif array.dtype != native:
            array = array.astype(native)
        array, batch = _strip(name, array)
        self.size: tuple[int, int] = array.shape[1:3] if batch else array.shape[:2]
        if batch and len(array) == 0:
            raise FrameError(f"{name}: got an empty batch {self.shape}, expected N >= 1 frames")
        if min(self.size) < 2:
            raise FrameError(
                f"{name}: got {_by(self.size)} pixels (shape {self.shape}), expected at least "
                f"2x2; check that the frame was read and the axes are (H, W) or (H, W, 3)"
            )
        self.frames = [_to_native(f) for f in array] if batch else [_to_native(array)]


def _to_numpy(name: str, given: Any) -> tuple[Frame, bool]:
    if isinstance(given, np.ndarray):
        return given, False
    # Only somebody who imported torch can hand over a tensor; the run side never imports it.
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    if tensor is not None and isinstance(given, tensor):
        if given.device.type != "cpu":
            raise FrameError(
                f"{name}: got a tensor on {given.device}, expected the CPU; call .cpu() on it"
            )
        try:
            return given.detach().numpy(), True
        except (TypeError, RuntimeError) as error:
            raise FrameError(
                f"{name}: got a {given.dtype} tensor that NumPy cannot see ({error}), expected a "
                f"dense uint8, uint16 or float tensor; convert it, for example with .float()"
            ) from None
    if hasattr(given, "__dlpack__"):
        try:
            return np.from_dlpack(given), False
        except (TypeError, ValueError, RuntimeError, BufferError) as error:
            raise FrameError(
                f"{name}: got a {type(given).__name__} that NumPy cannot read through DLPack "
                f"({error}), expected an array in CPU memory; copy it to the CPU"
            ) from None
    raise FrameError(
        f"{name}: got {type(given).__name__}, expected a NumPy array, a torch tensor or an array "
        f"with __dlpack__; np.asarray() makes one of most things, read_image() of a file"
    )


def _strip(name: str, array: Frame) -> tuple[Frame, bool]:
    """(array without a last axis of one channel, whether its first axis is a batch)."""
    shape = array.shape
    if array.ndim in (3, 4):
        channels = shape[-1]
        if channels in (2, 4):
            raise FrameError(
                f"{name}: got {channels} channels (shape {shape}), expected 1 or 3; alpha is not "
                f"supported: drop it with frame[..., :{channels - 1}]"
            )
        if channels == 1:
            return array[..., 0], array.ndim == 4
        if channels == 3 or array.ndim == 3:
            return array, array.ndim == 4 or channels != 3
        raise FrameError(
            f"{name}: got {channels} channels (shape {shape}), expected 1 or 3 on the last axis; "
            f"move the channels there: np.moveaxis(frames, 1, -1), or .permute(0, 2, 3, 1)"
        )
    if array.ndim == 2:
        return array, False
    raise FrameError(
        f"{name}: got {array.ndim} dimensions (shape {shape}), expected (H, W), (H, W, 3), "
        f"(N, H, W) or (N, H, W, 3); reshape it"
    )


def _dtype_remedy(dtype: np.dtype[Any]) -> str:
    if dtype.kind == "b":
        return "multiply a mask by 255 and convert it to uint8"
    if dtype.kind in "iu":
        return "convert counts with .astype(np.uint16), or scale them to floats in [0, 1]"
    if dtype.kind == "c":
        return "take its real part or its magnitude"
    return "convert it with .astype(np.float32)"


def split_frames(name: str, array: Any) -> list[Any]:
    """The frames (H, W) or (H, W, 3) of an array of any library that indexes as NumPy's do.

    Args:
        name: for the error.
        array: a frame or a batch, as :func:`prepare_pair` takes them.

    Raises:
        FrameError: another shape, or an empty batch.
    """
    array, batch = _strip(name, array)
    if batch and len(array) == 0:
        raise FrameError(f"{name}: got an empty batch {array.shape}, expected N >= 1 frames")
    return list(array) if batch else [array]


def range_bounds(infrared_range: Any) -> tuple[float, float] | None:
    """The two ends of a range; None for none and for "minmax".

    Raises:
        SettingError: something else, or no ascending finite numbers.
    """
    if infrared_range is None or infrared_range == "minmax":
        return None
    try:
        lo, hi = (float(v) for v in infrared_range)
    except (TypeError, ValueError):
        lo, hi = math.nan, math.nan
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise SettingError(
            f"infrared_range: got {infrared_range!r}, expected 'minmax' or (lo, hi), "
            f"two finite numbers with lo < hi"
        )
    return lo, hi


def _check_values(name: str, frame: Frame) -> None:
    if frame.dtype.kind != "f":
        return
    lo, hi, finite = _native.frame_range(frame)
    if not finite:
        raise _not_finite(name, frame)
    if lo < -_SLACK or hi > 1.0 + _SLACK:
        hint = ", or pass infrared_range=(lo, hi)" if name == "infrared" else ""
        raise FrameError(
            f"{name}: got floats from {lo:g} to {hi:g}, expected 0 to 1; divide by the largest "
            f"possible value (255 for 8 bits){hint}"
        )


def _stretch(frame: Frame, bounds: tuple[float, float] | None) -> NDArray[np.float32]:
    lo, hi = bounds or _native.frame_range(frame)[:2]
    scale = 1.0 / (hi - lo) if hi > lo else 0.0
    out = np.empty((1, *frame.shape[:2]), np.float32)
    if not _native.frame_in(frame, out, low=lo, scale=scale):
        raise _not_finite("infrared", frame)
    return out[0]


def resample(frame: Frame, size: tuple[int, int]) -> Frame:
    """A frame (H, W) or (H, W, 3) of another size (height, width): bilinear, in its own dtype.

    All but uint8 are worked in float32.
    """
    height, width = size
    if frame.dtype == np.uint8:
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image)
    planes = frame.astype(np.float32).reshape(*frame.shape[:2], -1)
    resized = np.stack(
        [
            np.asarray(
                Image.fromarray(np.ascontiguousarray(planes[..., c])).resize(
                    (width, height), Image.Resampling.BILINEAR
                )
            )
            for c in range(planes.shape[2])
        ],
        axis=-1,
    ).reshape(*size, *frame.shape[2:])
    if frame.dtype == np.uint16:
        resized = np.clip(np.rint(resized), 0, 65535)
    return resized.astype(frame.dtype)


def _is_native(frame: Frame) -> bool:
    """Whether the native code takes it: pixels of a row adjacent, rows ascending, aligned."""
    strides, item = frame.strides, frame.itemsize
    pixel = item
    if frame.ndim == 3:
        pixel = 3 * item
        if strides[2] != item:
            return False
    return (
        strides[1] == pixel and strides[0] >= frame.shape[1] * pixel and bool(frame.flags.aligned)
    )


def _to_native(frame: Frame) -> Frame:
    # .copy(), not ascontiguousarray: the latter returns contiguous but unaligned data as it is.
    return frame if _is_native(frame) else frame.copy(order="C")


def _not_finite(name: str, frame: Frame) -> FrameError:
    with np.errstate(over="ignore"):
        bad = int(np.count_nonzero(~np.isfinite(frame.astype(np.float32))))
    return FrameError(
        f"{name} frame: got NaN or infinity in {bad} of {frame.size} values, expected finite "
        f"numbers; mend dead pixels first, for example with np.nan_to_num"
    )


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _describe(frame: Frame) -> str:
    return f"{frame.dtype} {frame.shape}"
