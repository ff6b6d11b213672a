"""Reduced copies of the pictures, for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, features

from fuseengine.evaluation.pairing import Case
from fuseengine.evaluation.run import ValueRange, read_pictures

_MOST_SIDE, _LEAST_SIDE = 1280, 256
"""Pixels of a picture's longest side, unless it is smaller anyway."""

_LEAST_BYTES = 6000
"""A picture of 256 pixels takes about this much; with less per picture, fewer cases are shown."""

_QUALITY, _LEAST_QUALITY = 80, 60
"""The lower one is tried where even the least side takes too much."""

_BASE64 = 4 / 3


@dataclass(frozen=True)
class Preview:
    """One picture of a page: a data URI, and its size in pixels as embedded."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class PreviewTask:
    """A case and how many bytes its pictures may take together."""

    case: Case
    infrared_range: ValueRange
    limit: float


def plan_previews(
    cases: Sequence[Case], infrared_range: ValueRange, megabytes: float
) -> list[PreviewTask]:
    """Which cases are shown, and how much each may take, so that all stay below a size.

    Args:
        cases: all cases; where they are too many, evenly spaced ones of them are shown.
        infrared_range: of the infrared pictures.
        megabytes: for all data URIs together; 0 for no pictures.
    """
    if not cases or megabytes <= 0:
        return []
    pictures = 2 + len(cases[0].fused)
    budget = megabytes * 1e6 / _BASE64
    shown = min(len(cases), max(1, int(budget / (pictures * _LEAST_BYTES))))
    chosen = [cases[index * len(cases) // shown] for index in range(shown)]
    return [PreviewTask(case, infrared_range, budget / shown) for case in chosen]


def make_previews(task: PreviewTask) -> list[Preview]:
    """Infrared, visible and every fused picture of a case, all reduced alike."""
    pictures = [Image.fromarray(p) for p in read_pictures(task.case, task.infrared_range)]
    kind = "webp" if features.check("webp") else "jpeg"
    side, quality = min(_MOST_SIDE, max(pictures[0].size)), _QUALITY
    while True:
        reduced = [_reduce(picture, side) for picture in pictures]
        encoded = [_encode(picture, kind, quality) for picture in reduced]
        excess = sum(map(len, encoded)) / task.limit
        if excess <= 1 or quality == _LEAST_QUALITY:
            break
        if side <= _LEAST_SIDE:
            quality = _LEAST_QUALITY
        # Bytes grow more slowly than pixels: fine detail, which goes first, costs the most of them.
        side = max(min(_LEAST_SIDE, side), int(side / max(excess, 1.1) ** 0.55))
    return [
        Preview(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", *picture.size)
        for picture, data in zip(reduced, encoded, strict=True)
    ]


def _reduce(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(length * scale)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _encode(picture: Image.Image, kind: str, quality: int) -> bytes:
    file = io.BytesIO()
    # WebP's second method takes half the time of its fourth and a twentieth more bytes.
    picture.save(file, format=kind, quality=quality, **({"method": 2} if kind == "webp" else {}))
    return file.getvalue()
