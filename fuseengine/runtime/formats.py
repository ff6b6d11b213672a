"""The image formats that files are read and written in; imports nothing heavy."""

from __future__ import annotations

from typing import Any

# Suffix -> (Pillow's format, options for writing).
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".bmp": ("BMP", {}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".png": ("PNG", {}),
    ".tif": ("TIFF", {"compression": "tiff_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_deflate"}),
    ".webp": ("WEBP", {"quality": 95}),
}
SUFFIXES = tuple(FORMATS)
SIXTEEN_BIT = ("PNG", "TIFF")
"""Formats (Pillow's names) that hold 16-bit grey pictures."""
