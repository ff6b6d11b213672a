"""Box plots as SVG, one row per method, without a library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import ArrayLike

_WIDTH, _ROW, _BOX, _AXIS = 360, 42, 14, 22
_LEFT, _RIGHT = 8, 352
_MOST_POINTS = 120
"""Up to this many images every one is drawn; beyond, only those outside the whiskers."""


@dataclass(frozen=True)
class Box:
    """Tukey's five numbers: whiskers end at the last values within 1.5 interquartile ranges."""

    low: float
    q1: float
    median: float
    q3: float
    high: float
    mean: float


def box_of(values: ArrayLike) -> Box | None:
    """The box of the finite values among these; None if there are none."""
    array = np.asarray(values, np.float64)
    array = array[np.isfinite(array)]
    if not len(array):
        return None
    q1, median, q3 = np.percentile(array, (25, 50, 75))
    reach = 1.5 * (q3 - q1)
    inside = array[(array >= q1 - reach) & (array <= q3 + reach)]
    return Box(
        float(inside.min()),
        float(q1),
        float(median),
        float(q3),
        float(inside.max()),
        float(array.mean()),
    )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most so many round numbers from low to high (low < high)."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(m for m in (1, 2, 2.5, 5, 10, 20) if (high - low) / (step * m) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + index) * step, 12) for index in range(count)]


def box_plot(
    title: str, methods: Sequence[str], values: Sequence[Sequence[float]], names: Sequence[str]
) -> str:
    """An SVG element of one metric.

    Args:
        title: what is plotted; part of the text that screen readers get.
        methods: one row each, drawn with the classes m0, m1, ... of the page.
        values: per method, per image; what is not finite is left out.
        names: of the images.
    """
    boxes = [box_of(of_method) for of_method in values]
    finite = [v for of_method in values for v in of_method if math.isfinite(v)]
    height = _AXIS + _ROW * len(methods)
    spoken = "; ".join(
        f"{method}: "
        + (
            f"median {box.median:.4g}, quartiles {box.q1:.4g} to {box.q3:.4g}"
            if box
            else "no values"
        )
        for method, box in zip(methods, boxes, strict=True)
    )
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(f"Box plot of {title}. {spoken}")}">'
    ]
    if finite:
        low, high = min(finite), max(finite)
        margin = 0.04 * (high - low) or abs(high) * 0.05 or 1.0
        low, high = low - margin, high + margin
        parts += _axis(low, high, height)
        for row, (box, of_method) in enumerate(zip(boxes, values, strict=True)):
            if box is not None:
                parts += _row(row, box, of_method, names, low, high)
    for row, method in enumerate(methods):
        text = method if len(method) <= 40 else method[:39] + "…"
        parts.append(f'<text class="label" x="{_LEFT}" y="{_ROW * row + 13}">{escape(text)}</text>')
    return "".join(parts) + "</svg>"


def _axis(low: float, high: float, height: int) -> list[str]:
    bottom = height - _AXIS
    marks = ticks(low, high)
    parts = []
    for value in marks:
        x = _x(value, low, high)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{bottom}"/>')
        anchor = "start" if x < 24 else "end" if x > _WIDTH - 24 else "middle"
        parts.append(
            f'<text class="tick" x="{x}" y="{height - 6}" text-anchor="{anchor}">{value:g}</text>'
        )
    return parts


def _row(
    row: int, box: Box, values: Sequence[float], names: Sequence[str], low: float, high: float
) -> list[str]:
    middle = _ROW * row + 27
    top, bottom = middle - _BOX // 2, middle + _BOX // 2
    x = {
        name: _x(getattr(box, name), low, high)
        for name in ("low", "q1", "median", "q3", "high", "mean")
    }
    parts = [
        f'<g class="box m{row % 8}">',
        f'<line x1="{x["low"]}" x2="{x["high"]}" y1="{middle}" y2="{middle}"/>',
        f'<line x1="{x["low"]}" x2="{x["low"]}" y1="{middle - 4}" y2="{middle + 4}"/>',
        f'<line x1="{x["high"]}" x2="{x["high"]}" y1="{middle - 4}" y2="{middle + 4}"/>',
        f'<rect x="{x["q1"]}" y="{top}" width="{max(x["q3"] - x["q1"], 0.5):.1f}" '
        f'height="{_BOX}" rx="2"/>',
        f'<line class="median" x1="{x["median"]}" x2="{x["median"]}" y1="{top}" y2="{bottom}"/>',
    ]
    all_points = len(values) <= _MOST_POINTS
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        if math.isfinite(value) and (all_points or not box.low <= value <= box.high):
            # Points of one value would hide each other: three lanes, the same every time.
            y = middle + (index % 3 - 1) * 3
            parts.append(
                f'<circle cx="{_x(value, low, high)}" cy="{y}" r="1.8">'
                f"<title>{escape(name)}: {value:.5g}</title></circle>"
            )
    mean = x["mean"]
    parts.append(
        f'<path class="mean" d="M{mean} {middle - 5}l5 5l-5 5l-5 -5z">'
        f"<title>mean {box.mean:.5g}</title></path></g>"
    )
    return parts


def _x(value: float, low: float, high: float) -> float:
    return round(_LEFT + (_RIGHT - _LEFT) * (value - low) / (high - low), 1)
