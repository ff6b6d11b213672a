"""Frames from image files: a folder, a glob or a numbered pattern."""

from __future__ import annotations

import glob
import re
import time
from pathlib import Path

from fuseengine.errors import ImageFileError, SourceError
from fuseengine.runtime.formats import SUFFIXES
from fuseengine.runtime.images import list_images, read_image
from fuseengine.video.frames import CameraFrame, format_of
from fuseengine.video.sources import Source

_NUMBER = re.compile(r"%0?(\d*)d")


def is_images(path: Path) -> bool:
    """Whether a path means images: a folder, a glob, ``%04d``, or one image file."""
    name = path.name
    if path.is_file():
        return path.suffix.lower() in SUFFIXES
    return path.is_dir() or _NUMBER.search(name) is not None or glob.has_magic(name)


class ImageSequence(Source):
    """Images as frames; 16-bit gray files stay 16-bit.

    Files of a folder or glob follow each other in natural order (2 before 10). Files of a
    numbered pattern have their number's time: a missing one leaves a gap.
    """

    def __init__(self, path: Path, *, rate: float) -> None:
        """Lists the files.

        Args:
            path: folder, glob, pattern such as ``%04d.png``, or a file.
            rate: frames per second.

        Raises:
            SourceError: there is no such image, or none that can be read.
        """
        super().__init__(str(path), live=False, rate=rate, size=(0, 0))
        self._files = _list(path)
        if not self._files:
            raise SourceError(
                f"source: no images in {path}, expected files with one of {', '.join(SUFFIXES)}; "
                "check the path and the pattern"
            )
        self._next = 0
        self._first = self._read()
        if self._first is None:
            raise SourceError(
                f"source: none of the {len(self._files)} images of {path} can be read; record or "
                "copy them again"
            )
        self.size = self._first.size

    def read(self) -> CameraFrame | None:  # noqa: D102
        if self._stopped.is_set():
            return None
        frame, self._first = self._first, None
        return frame if frame is not None else self._read()

    def _read(self) -> CameraFrame | None:
        while self._next < len(self._files):
            number, file = self._files[self._next]
            self._next += 1
            try:
                image = read_image(file)
            except ImageFileError as error:
                self.skip_broken(str(error))
                continue
            return CameraFrame(
                image,
                format_of(image),
                time_s=number / (self.rate or 1.0),
                index=number,
                arrived_s=time.monotonic(),
            )
        return None


def _list(path: Path) -> list[tuple[int, Path]]:
    """(place in time, file), sorted."""
    if path.is_file():
        return [(0, path)]
    if path.is_dir():
        return list(enumerate(sorted(list_images(path), key=_natural)))
    number = _NUMBER.search(path.name)
    if number is None:
        root = Path(path.anchor or ".")
        found = root.glob(str(path.relative_to(path.anchor) if path.anchor else path))
        images = [file for file in found if file.suffix.lower() in SUFFIXES]
        return list(enumerate(sorted(images, key=_natural)))
    head, tail = re.escape(path.name[: number.start()]), re.escape(path.name[number.end() :])
    digits = rf"\d{{{number[1]},}}" if number[1] else r"\d+"
    pattern = re.compile(f"{head}({digits}){tail}")
    if not path.parent.is_dir():
        return []
    numbered = sorted(
        (int(match[1]), file)
        for file in path.parent.iterdir()
        if (match := pattern.fullmatch(file.name))
    )
    return [(place - numbered[0][0], file) for place, file in numbered]


def _natural(path: Path) -> list[tuple[int, int | str]]:
    return [
        (0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path.name)
    ]
