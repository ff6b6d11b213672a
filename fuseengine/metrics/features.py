"""Feature mutual information: how much the windows of a feature map tell about the fused ones.

Each 3 x 3 window is a density over its nine places in column-major order, and the joint density of
two windows a mixture of independence and of the strongest dependence there can be, by their
correlation. The arithmetic is ``csrc/window_information.h``; here are the maps.
"""

from __future__ import annotations

import numpy as np
import scipy.fft

from fuseengine import _native
from fuseengine.metrics.gradient import sobel
from fuseengine.metrics.images import NAMES, SOURCES, Image, Images, Levels
from fuseengine.metrics.registry import metric

_SOURCE = (
    "Haghighat, Razian 2014, Fast-FMI: non-reference image fusion metric; the metric: Haghighat, "
    "Aghagolzadeh, Seyedarabi 2011"
)


@metric(
    "FMI_edge",
    "feature mutual information of edges",
    range=(0, 1),
    min_side=3,
    source=_SOURCE,
)
def fmi_edge(images: Images) -> float:
    """FMI_edge = mean of 2 I(X; F) / (H(X) + H(F)) over the 3 x 3 windows of Sobel edge maps.

    The public function computes this one when it is not told otherwise: the "FMI_pixel" of about
    0.9 in papers is FMI_edge. Edges by the rule of MATLAB's ``edge``: squared magnitude above four
    times its mean, and a maximum along the stronger direction. Identical windows count 1, two
    constant ones too, and a constant one with another 0.
    """
    return _mean_information({name: _edges(images.levels[name]) for name in NAMES})


@metric(
    "FMI_none",
    "feature mutual information of grey levels",
    range=(0, 1),
    min_side=3,
    source=_SOURCE,
)
def fmi_none(images: Images) -> float:
    """FMI_none = mean of 2 I(X; F) / (H(X) + H(F)) over the 3 x 3 windows of grey levels.

    Not the "FMI_pixel" of papers, see FMI_edge, also for identical and constant windows.
    """
    return _mean_information(images.floats)


@metric(
    "FMI_gradient",
    "feature mutual information of horizontal gradients",
    range=(0, 1),
    min_side=3,
    source=_SOURCE,
)
def fmi_gradient(images: Images) -> float:
    """FMI_gradient = the same of central differences along x, one-sided at the border."""
    return _mean_information({name: np.gradient(x, axis=1) for name, x in images.floats.items()})


@metric(
    "FMI_dct",
    "feature mutual information of cosine coefficients",
    range=(0, 1),
    min_side=3,
    source=_SOURCE,
)
def fmi_dct(images: Images) -> float:
    """FMI_dct = the same of the orthonormal two-dimensional DCT of the whole images.

    Coefficients below 1e-9 are rounding errors and count as 0.
    """
    return _mean_information({name: _cosines(x) for name, x in images.floats.items()})


def _cosines(x: Image) -> Image:
    coefficients = scipy.fft.dctn(x, norm="ortho")
    coefficients[np.abs(coefficients) < 1e-9] = 0
    return coefficients


def _edges(levels: Levels) -> Image:
    """MATLAB's Sobel edges, 0 and 1; never at the border."""
    across, down = (part.astype(np.int32) for part in sobel(levels, "edge"))
    square = across * across + down * down
    inner = square[1:-1, 1:-1]
    flat, steep = np.abs(across[1:-1, 1:-1]), np.abs(down[1:-1, 1:-1])
    left, right = square[1:-1, :-2], square[1:-1, 2:]
    upper, lower = square[:-2, 1:-1], square[2:, 1:-1]
    edges = np.zeros(square.shape)
    edges[1:-1, 1:-1] = (inner > 4 * square.mean()) & (
        ((flat >= steep) & (inner >= left) & (inner > right))
        | ((steep >= flat) & (inner >= upper) & (inner > lower))
    )
    return edges


def _mean_information(maps: dict[str, Image]) -> float:
    """Mean over the windows and both sources."""
    height, width = maps["f"].shape
    values = np.empty((height - 2, width - 2))
    total = 0.0
    for x in SOURCES:
        source, fused = (np.ascontiguousarray(maps[name]) for name in (x, "f"))
        _native.window_information(source, fused, values)
        total += float(values.mean()) / 2
    return total
