"""Image files: read and write single frames, list folders, pair infrared with visible files."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fuseengine.errors import ImageFileError
from fuseengine.runtime.formats import FORMATS, SIXTEEN_BIT, SUFFIXES

_SUFFIXES = ", ".join(SUFFIXES)


class PairedFiles(NamedTuple):
    """What :func:`pair_files` found; everything is sorted by stem.

    Attributes:
        pairs: (infrared file, visible file) of one stem each.
        only_infrared: Infrared files without a visible one.
        only_visible: Visible files without an infrared one.
    """

    pairs: list[tuple[Path, Path]]
    only_infrared: list[Path]
    only_visible: list[Path]


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Reads an image file through Pillow.

    EXIF orientation is applied, an opaque alpha channel dropped, palettes and 1-bit images are
    expanded, CMYK and the like converted to RGB. Of several pages or animation frames, the first.
    Pillow reads 16-bit colour files as 8-bit.

    Args:
        path: A PNG, JPEG, TIFF, BMP or WebP file, or whatever else Pillow reads.

    Returns:
        uint8 (H, W) or (H, W, 3) RGB; uint16 (H, W) for 16-bit gray files.

    Raises:
        ImageFileError: The file is missing, a folder, empty, truncated, no image, too large,
            partly transparent, or holds floats or integers of more than 16 bits.
    """
    path = Path(path)
    if path.is_dir():
        raise ImageFileError(f"cannot read {path}: it is a folder, expected an image file")
    try:
        if path.stat().st_size == 0:
            raise ImageFileError(f"cannot read {path}: the file is empty; copy or record it again")
        with Image.open(path) as image:
            return _to_array(path, ImageOps.exif_transpose(image))
    except ImageFileError:
        raise
    except FileNotFoundError:
        raise ImageFileError(f"cannot read {path}: no such file; check the path") from None
    except PermissionError:
        raise ImageFileError(
            f"cannot read {path}: permission denied; check the file's rights"
        ) from None
    except UnidentifiedImageError:
        raise ImageFileError(
            f"cannot read {path}: not an image that Pillow knows; expected one of {_SUFFIXES}"
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageFileError(
            f"cannot read {path}: {error}; if it can be trusted, raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise ImageFileError(
            f"cannot read {path}: the file is damaged or truncated ({error}); "
            f"copy or record it again"
        ) from None


def write_image(path: str | os.PathLike[str], array: NDArray[Any]) -> None:
    """Writes an image file, whole or not at all.

    The file is written beside its place and then renamed, so an existing file is replaced only
    by a complete one and a failure leaves nothing behind. JPEG and WebP: quality 95.

    Args:
        path: Where to write; the suffix names the format (.png, .jpg, .tif, .bmp, .webp).
        array: uint8 (H, W) or (H, W, 3) RGB, or uint16 (H, W) for PNG and TIFF.

    Raises:
        ImageFileError: The suffix is unknown, the array does not fit the format, or the file
            cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ImageFileError(
            f"cannot write {path}: got suffix {path.suffix!r}, expected one of {_SUFFIXES}"
        )
    fmt, options = FORMATS[path.suffix.lower()]
    shape, dtype = array.shape, array.dtype
    gray, colour = array.ndim == 2, array.ndim == 3 and shape[2] == 3
    fits = (dtype == np.uint8 and (gray or colour)) or (
        dtype == np.uint16 and gray and fmt in SIXTEEN_BIT
    )
    if not fits or array.size == 0:
        raise ImageFileError(
            f"cannot write {path}: got {dtype} {shape}, expected uint8 (H, W) or (H, W, 3), or "
            f"uint16 (H, W) for .png and .tif; convert the array or change the suffix"
        )
    if path.is_dir():
        raise ImageFileError(f"cannot write {path}: it is a folder, expected a file name")
    image = Image.fromarray(np.ascontiguousarray(array))
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with part.open("xb") as file:
            image.save(file, format=fmt, **options)
        part.replace(path)
    except OSError as error:
        remedy = "make its folder first" if not path.parent.is_dir() else "check rights and space"
        raise ImageFileError(f"cannot write {path}: {error.strerror or error}; {remedy}") from None
    finally:
        part.unlink(missing_ok=True)


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The image files of a folder by suffix, sorted by name; hidden files are passed over.

    Args:
        folder: An existing folder; its subfolders are not entered.

    Raises:
        ImageFileError: The folder is missing, no folder, or cannot be listed.
    """
    folder = Path(folder)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ImageFileError(
            f"cannot list {folder}: {error.strerror or error}; expected a folder of images"
        ) from None
    return [
        entry
        for entry in entries
        if entry.suffix.lower() in FORMATS and not entry.name.startswith(".") and entry.is_file()
    ]


def pair_files(
    infrared_dir: str | os.PathLike[str], visible_dir: str | os.PathLike[str]
) -> PairedFiles:
    """Pairs the images of two folders that have the same name up to the suffix.

    Args:
        infrared_dir: Folder of infrared images.
        visible_dir: Folder of visible images.

    Returns:
        The pairs and the files of each folder that have no partner.

    Raises:
        ImageFileError: A folder cannot be listed, or has two images of one stem
            (``7.png`` and ``7.jpg``).
    """
    infrared, visible = files_by_stem(infrared_dir), files_by_stem(visible_dir)
    return PairedFiles(
        [(infrared[stem], visible[stem]) for stem in sorted(infrared) if stem in visible],
        [infrared[stem] for stem in sorted(infrared) if stem not in visible],
        [visible[stem] for stem in sorted(visible) if stem not in infrared],
    )


def files_by_stem(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The image files of a folder by their name without the suffix, sorted.

    Args:
        folder: An existing folder; its subfolders are not entered.

    Raises:
        ImageFileError: The folder cannot be listed, or has two images of one stem.
    """
    files: dict[str, Path] = {}
    for path in list_images(folder):
        other = files.setdefault(path.stem, path)
        if other is not path:
            raise ImageFileError(
                f"cannot pair the images of {folder}: {other.name} and {path.name} have the same "
                f"stem, expected one file each; move one of them away"
            )
    return files


def _to_array(path: Path, image: Image.Image) -> NDArray[np.uint8] | NDArray[np.uint16]:
    mode = image.mode
    if mode.startswith("I"):
        array = np.array(image)
        if array.min() < 0 or array.max() > 65535:
            raise ImageFileError(
                f"cannot read {path}: got integers from {array.min()} to {array.max()}, expected "
                f"at most 16 bits; rescale and save as a 16-bit PNG or TIFF"
            )
        return array.astype(np.uint16)
    if mode == "F":
        raise ImageFileError(
            f"cannot read {path}: got floating-point pixels, expected 8 or 16 bit integers; "
            f"rescale and save as a 16-bit PNG or TIFF, or pass the array to the engine itself"
        )
    if "A" in mode or mode.endswith("a") or "transparency" in image.info:
        image = image.convert("LA" if mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = np.asarray(image.getchannel("A"))
        if alpha.min() < 255:
            raise ImageFileError(
                f"cannot read {path}: its alpha channel is not opaque everywhere, expected an "
                f"image without alpha; flatten it on a background first"
            )
        gray = image.mode == "LA"
    else:
        gray = mode in ("1", "L")
    if mode == "P" and not gray:
        rgb = np.array(image.convert("RGB"))
        # A palette of grays is how some thermal cameras store one channel.
        is_gray = bool((rgb == rgb[..., :1]).all())
        return rgb[..., 0].copy() if is_gray else rgb
    return np.array(image.convert("L" if gray else "RGB"))
