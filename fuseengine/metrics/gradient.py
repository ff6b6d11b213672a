"""Edges kept, lost and added: the metrics on Sobel gradients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fuseengine.metrics.images import NAMES, SOURCES, Image, Images, Levels, strips
from fuseengine.metrics.registry import metric

Signed = NDArray[np.int16]


@metric(
    "Qabf",
    "gradient-based fusion performance",
    range=(0, 0.9873),
    source="Xydeas, Petrovic 2000, Objective image fusion performance measure",
)
def qabf(images: Images) -> float:
    """Qabf = sum(Q_AF g_A + Q_BF g_B) / sum(g_A + g_B).

    g is the Sobel magnitude and a the angle of the gradient, the image bordered by zeros. With
    G = min(g_X, g_F) / max(g_X, g_F) and D = 1 - |a_X - a_F| / (pi/2), Q_XF is
    0.9994 / (1 + exp(-15 (G - 0.5))) * 0.9879 / (1 + exp(-22 (D - 0.8))). Not 1 for A = B = F: at
    most 0.9873. Without any gradient in A and B it is 0.
    """
    kept = total = 0.0
    for rows in strips(*images.shape):
        edges = {name: _edges(*images.once(_sobel, name, "constant"), rows) for name in NAMES}
        for x in SOURCES:
            kept += np.vdot(_xydeas(edges[x], edges["f"]), edges[x].strength)
            total += edges[x].strength.sum()
    return float(kept / total) if total else 0.0


@metric(
    "Qpv",
    "total fusion performance",
    range=(0, 1),
    source="Petrovic, Xydeas 2005, Objective image fusion performance characterisation",
)
def qpv(images: Images) -> float:
    """Qpv = sum(Q_AF w_A + Q_BF w_B) / sum(w_A + w_B); Qpv + Labf + Nabf = 1.

    Sobel / 8 with a mirrored border; w = g^1.5 where g >= 2, else 0.001; D is folded, so that
    opposite directions count as equal; Q_XF is
    sqrt(0.9999 / (1 + exp(-19 (G - 0.5))) * 0.9995 / (1 + exp(-22 (D - 0.5)))).
    Without any gradient in A and B it is 0.
    """
    return images.once(_petrovic, "f", "a", "b").kept


@metric(
    "Labf",
    "fusion loss",
    range=(0, 1),
    higher_is_better=False,
    source="Petrovic, Xydeas 2005, Objective image fusion performance characterisation",
)
def labf(images: Images) -> float:
    """Labf = sum (1 - n)((1 - Q_AF) w_A + (1 - Q_BF) w_B) / sum(w_A + w_B), n as in Nabf."""
    return images.once(_petrovic, "f", "a", "b").lost


@metric(
    "Nabf",
    "fusion artefacts",
    range=(0, 1),
    higher_is_better=False,
    source="Shreyamsha Kumar 2013, Multifocus and multispectral image fusion based on pixel "
    "significance, after Petrovic and Xydeas 2005",
)
def nabf(images: Images) -> float:
    """Nabf = sum n((1 - Q_AF) w_A + (1 - Q_BF) w_B) / sum(w_A + w_B).

    n = 1 where g_F is greater than g_A and g_B, else 0; the rest as in Qpv.
    """
    return images.once(_petrovic, "f", "a", "b").added


@metric(
    "Q_G",
    "gradient metric of Liu's toolbox",
    range=(0, 1),
    source="Xydeas, Petrovic 2000, in the form of Liu et al. 2012, Objective assessment of "
    "multiresolution image fusion algorithms",
)
def q_g(images: Images) -> float:
    """Q_G = mean of (Q_AF g_A + Q_BF g_B) / (g_A + g_B): every pixel counts the same.

    Sobel as in Qabf; a horizontal difference, g_X or g_F of exactly 0 becomes 1e-5; D is folded;
    Q_XF = 1 / (1 + exp(-10 (G - 0.5))) * 1 / (1 + exp(-20 (D - 0.75))). Without any gradient in A
    and B it is 0.
    """
    sobel = {name: images.once(_sobel, name, "constant") for name in NAMES}
    if not any(part.any() for x in SOURCES for part in sobel[x]):
        return 0.0
    total = 0.0
    for rows in strips(*images.shape):
        edges = {name: _edges(*sobel[name], rows, tiny=1e-5) for name in NAMES}
        kept = np.zeros_like(edges["f"].strength)
        for x in SOURCES:
            q = _logistic(_ratio(edges[x], edges["f"]), 10, 0.5)
            q *= _logistic(_folded(edges[x], edges["f"]), 20, 0.75)
            q *= edges[x].strength
            kept += q
        kept /= edges["a"].strength + edges["b"].strength
        total += float(kept.sum())
    return total / images.levels["f"].size


@metric(
    "Qabf_unit_range",
    "gradient-based fusion performance on 0..1 floats",
    range=(0, 0.9873),
    variant_of="Qabf",
    source="the MATLAB code of Evaluation-for-Image-Fusion before March 2023",
)
def qabf_unit_range(images: Images) -> float:
    """Qabf of images on 0..1: rounding decides the sign of vertical gradients' angles."""
    kept = total = 0.0
    edges = {name: _float_edges(images.floats[name] / 255) for name in NAMES}
    for x in SOURCES:
        kept += np.vdot(_xydeas(edges[x], edges["f"]), edges[x].strength)
        total += edges[x].strength.sum()
    return float(kept / total) if total else 0.0


@metric(
    "Nabf_swapped",
    "fusion artefacts, A taken for the fused image",
    range=(0, 1),
    higher_is_better=False,
    variant_of="Nabf",
    source="the MATLAB code of Evaluation-for-Image-Fusion",
)
def nabf_swapped(images: Images) -> float:
    """Nabf of A as if it were fused from B and F: the program passes (A, B, F) for (F, A, B)."""
    return images.once(_petrovic, "a", "b", "f").added


class _Edges(NamedTuple):
    strength: Image
    angle: Image


def _sobel(images: Images, name: str, border: str) -> tuple[Signed, Signed]:
    return sobel(images.levels[name], border)


def sobel(levels: Levels, border: str) -> tuple[Signed, Signed]:
    """Unnormalised Sobel differences, exact, (H, W) int16 each.

    Args:
        levels: (H, W).
        border: mode of ``numpy.pad`` for one pixel around.

    Returns:
        Correlations with [-1 0 1; -2 0 2; -1 0 1] and [1 2 1; 0 0 0; -1 -2 -1].
    """
    x = np.pad(levels.astype(np.int16), 1, mode=border)  # type: ignore[call-overload]
    across = x[:, 2:] - x[:, :-2]
    down = x[:-2] - x[2:]
    return (
        across[:-2] + 2 * across[1:-1] + across[2:],
        down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:],
    )


def _edges(dx: Signed, dy: Signed, rows: slice, tiny: float = 0.0) -> _Edges:
    """Magnitude and angle atan(dy / dx) of rows; with `tiny`, that takes the place of zeros.

    Without, the angle is pi/2 where dx = 0.
    """
    x, y = dx[rows].astype(np.float64), dy[rows].astype(np.float64)
    if tiny:
        x[x == 0] = tiny
        angle = np.arctan(y / x)
    else:
        flat = x == 0
        x[flat] = 1
        angle = np.arctan(y / x)
        angle[flat] = np.pi / 2
        x[flat] = 0
    x *= x
    y *= y
    x += y
    return _Edges(np.sqrt(x, out=x), angle)


def _float_edges(x: Image) -> _Edges:
    """The same as :func:`_edges` of a whole image of floats bordered by zeros."""
    x = np.pad(x, 1)
    across, down = x[:, 2:] - x[:, :-2], x[:-2] - x[2:]
    dx = across[:-2] + 2 * across[1:-1] + across[2:]
    dy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    angle = np.arctan(np.divide(dy, dx, out=np.zeros_like(dx), where=dx != 0))
    angle[dx == 0] = np.pi / 2
    return _Edges(np.sqrt(dx * dx + dy * dy), angle)


def _xydeas(x: _Edges, f: _Edges) -> Image:
    """Q_XF of Qabf."""
    ratio = _ratio(x, f)
    # Where both are equal the public code takes the strength itself: 0, or at least 1.
    np.copyto(ratio, f.strength, where=x.strength == f.strength)
    aligned = np.abs(x.angle - f.angle)
    aligned /= -np.pi / 2
    aligned += 1
    q = _logistic(ratio, 15, 0.5)
    q *= _logistic(aligned, 22, 0.8)
    q *= 0.9994 * 0.9879
    return q


class _Shares(NamedTuple):
    kept: float
    lost: float
    added: float


def _petrovic(images: Images, fused: str, *sources: str) -> _Shares:
    """The three shares that sum to 1; all 0 where the sources have no gradient."""
    sobel = {name: images.once(_sobel, name, "reflect") for name in (fused, *sources)}
    if not any(part.any() for x in sources for part in sobel[x]):
        return _Shares(0.0, 0.0, 0.0)
    kept = lost = added = total = 0.0
    for rows in strips(*images.shape):
        edges = {name: _petrovic_edges(*parts, rows) for name, parts in sobel.items()}
        f = edges[fused]
        stronger = np.logical_and(*(f.strength > edges[x].strength for x in sources))
        missed: Image = np.zeros_like(f.strength)
        for x in sources:
            q = _logistic(_ratio(edges[x], f), 19, 0.5)
            q *= _logistic(_folded(edges[x], f), 22, 0.5)
            q *= 0.9999 * 0.9995
            np.sqrt(q, out=q)
            weight = edges[x].strength * np.sqrt(edges[x].strength)
            weight[edges[x].strength < 2] = 0.001
            weights = float(weight.sum())
            q *= weight
            total += weights
            kept += float(q.sum())
            missed += np.subtract(weight, q, out=q)
        artefacts = float(missed.sum(where=stronger))
        added += artefacts
        lost += float(missed.sum()) - artefacts
    return _Shares(kept / total, lost / total, added / total)


def _petrovic_edges(dx: Signed, dy: Signed, rows: slice) -> _Edges:
    """Magnitude of Sobel / 8 and the angle of dx against dy, 0 where there is no gradient."""
    x, y = dx[rows].astype(np.float64), dy[rows].astype(np.float64)
    level = y == 0
    y[level] = 1e-300  # the quotient is huge, or 0 where dx is 0 too
    angle = np.arctan(x / y)
    y[level] = 0
    x *= x
    y *= y
    x += y
    np.sqrt(x, out=x)
    x *= 1 / 8
    return _Edges(x, angle)


def _ratio(x: _Edges, f: _Edges) -> Image:
    """The weaker over the stronger; 0 where one of them is 0."""
    ratio = np.maximum(x.strength, f.strength)
    ratio[ratio == 0] = 1
    return np.divide(np.minimum(x.strength, f.strength), ratio, out=ratio)


def _folded(x: _Edges, f: _Edges) -> Image:
    """1 for equal and for opposite directions, 0 for perpendicular ones."""
    d = np.abs(x.angle - f.angle)
    d -= np.pi / 2
    np.abs(d, out=d)
    d *= 2 / np.pi
    return d


def _logistic(x: Image, slope: float, middle: float) -> Image:
    """1 / (1 + exp(-slope (x - middle))), in place."""
    x -= middle
    x *= -slope
    np.exp(x, out=x)
    x += 1
    return np.reciprocal(x, out=x)
