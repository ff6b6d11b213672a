"""Every error a user of FuseEngine can meet.

All derive from :class:`FuseEngineError`; the command line turns each into one line on
standard error and exit code 2. A message says what was given, what was expected and what
to do, in that order.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FuseEngineError(Exception):
    """Base class: catching it catches everything FuseEngine raises on purpose."""


class FrameError(FuseEngineError, ValueError):
    """A frame cannot be used: its shape, dtype, size or values (NaN, infinity)."""


class SizeMismatchError(FrameError):
    """Two frames of a pair, or a frame and an engine, have different sizes."""


class ImageFileError(FuseEngineError):
    """An image file is missing, empty, truncated, no image, or cannot be written."""


class UnknownNameError(FuseEngineError, LookupError):
    """A model, backend, precision or option name that does not exist."""

    def __init__(self, kind: str, given: object, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.given, self.known = kind, given, sorted(known)
        close = difflib.get_close_matches(str(given), self.known, n=1)
        if not hint and close:
            hint = f" Did you mean {close[0]!r}?"
        super().__init__(
            f"unknown {kind} {given!r}; expected one of: {', '.join(self.known)}.{hint}"
        )


class SettingError(FuseEngineError, ValueError):
    """A setting has a value outside what is allowed."""


class BackendUnavailableError(FuseEngineError):
    """A backend or device was asked for by name and cannot be used here."""


class CheckpointError(FuseEngineError):
    """A checkpoint does not fit the model, cannot be read, or is refused as unsafe."""


class CaptureError(FuseEngineError):
    """A model's forward could not be captured as a program."""


class CompileError(FuseEngineError):
    """No backend could lower the model, or none passed the accuracy guard."""


class CacheError(FuseEngineError):
    """A cache entry is damaged or the cache folder cannot be used."""


class BundleError(FuseEngineError):
    """A bundle is damaged, of a newer version or for another machine, or cannot be written."""


class KernelStoreError(FuseEngineError):
    """A folder of compiled kernels is missing, damaged or of another version."""


class TrainingError(FuseEngineError):
    """Training cannot start, resume or go on."""


class CalibrationError(FuseEngineError):
    """Two cameras cannot be calibrated from what was given."""


class SourceError(FuseEngineError):
    """A camera, file or stream cannot be opened or read as a source of frames."""


class SinkError(FuseEngineError):
    """A place for fused frames cannot be opened or written."""


class DeadlineError(FuseEngineError):
    """An engine cannot keep the deadline that a strict stream was given."""
