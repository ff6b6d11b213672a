"""Entropy and mutual information of grey-level histograms."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fuseengine.metrics.images import SOURCES, Image, Images, Levels
from fuseengine.metrics.registry import metric

Counts = NDArray[np.intp]


@metric(
    "EN",
    "entropy",
    range=(0, 8),
    unit="bit",
    needs_sources=False,
    source="Roberts, van Aardt, Ahmed 2008, Assessment of image fusion procedures using entropy",
)
def entropy(images: Images) -> float:
    """EN = -sum p log2 p over F's histogram of 256 levels."""
    return _bits(np.bincount(images.levels["f"].ravel(), minlength=256))


@metric(
    "MI",
    "mutual information",
    range=(0, 16),
    unit="bit",
    source="Qu, Zhang, Yan 2002, Information measure for performance of image fusion",
)
def mutual_information(images: Images) -> float:
    """MI = I(A; F) + I(B; F), I(X; F) = H(X) + H(F) - H(X, F), 256 x 256 joint histograms, log2."""
    return _both_sources(images)


@metric(
    "Q_MI",
    "normalised mutual information",
    range=(0, 2),
    source="Hossny, Nahavandi, Creighton 2008, Comments on 'Information measure for performance "
    "of image fusion'",
)
def q_mi(images: Images) -> float:
    """Q_MI = 2 (I(A; F) / (H(A) + H(F)) + I(B; F) / (H(B) + H(F))) of the stretched images."""
    return 2 * sum(_normalised(images.once(_stretched_joint, x, "f")) for x in SOURCES)


@metric(
    "Q_NCIE",
    "nonlinear correlation information entropy",
    range=(1 - math.log(3, 256), 1),
    source="Wang, Shen, Jin 2008, Performance evaluation of image fusion techniques",
)
def q_ncie(images: Images) -> float:
    """Q_NCIE = 1 + sum (l / 3) log256(l / 3), l the eigenvalues of the matrix of I / 8.

    The 3 x 3 matrix has ones on its diagonal and I(X; Y) / 8 of the stretched images beside it.
    Independent images give 0.8019, so four decimals at least are needed.
    """
    matrix = np.eye(3)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        joint = images.once(_stretched_joint, "abf"[i], "abf"[j])
        matrix[i, j] = matrix[j, i] = _information(joint) / 8
    share = np.linalg.eigvalsh(matrix) / 3
    share = share[share > 0]
    return float(1 + (share * np.log(share)).sum() / math.log(256))


@metric(
    "MI_nats",
    "mutual information in nats",
    range=(0, 16 * math.log(2)),
    unit="nat",
    variant_of="MI",
    source="the Python evaluator of CDDFuse",
)
def mi_nats(images: Images) -> float:
    """MI log 2."""
    return _both_sources(images) * math.log(2)


@metric(
    "MI_joint254",
    "mutual information, levels 254 and 255 joined in the joint histogram",
    range=(0, 20),
    unit="bit",
    variant_of="MI",
    source="the MATLAB code of Evaluation-for-Image-Fusion",
)
def mi_joint254(images: Images) -> float:
    """MI where levels 254 and 255 fall together in H(X, F), but not in H(X) and H(F)."""
    total = 0.0
    for x in SOURCES:
        joint = images.once(_joint, x, "f")
        merged = joint[:255, :255].copy()
        merged[254] += joint[255, :255]
        merged[:, 254] += joint[:255, 255]
        merged[254, 254] += joint[255, 255]
        total += _bits(joint.sum(0)) + _bits(joint.sum(1)) - _bits(merged)
    return total


def _both_sources(images: Images) -> float:
    """I(A; F) + I(B; F) in bits."""
    return sum(_information(images.once(_joint, x, "f")) for x in SOURCES)


def _joint(images: Images, x: str, y: str) -> Counts:
    return _joint_histogram(images.levels[x], images.levels[y])


def _stretched_joint(images: Images, x: str, y: str) -> Counts:
    return _joint_histogram(images.stretched[x], images.stretched[y])


def _joint_histogram(x: Levels, y: Levels) -> Counts:
    """(256, 256) counts of level pairs."""
    both = x.astype(np.uint16)
    both <<= 8
    both |= y
    return np.bincount(both.ravel(), minlength=65536).reshape(256, 256)


def _bits(counts: Counts) -> float:
    """Entropy of a histogram in bits."""
    seen: Image = counts[counts > 0].astype(np.float64)
    total = seen.sum()
    return float(math.log2(total) - (seen * np.log2(seen)).sum() / total)


def _information(joint: Counts) -> float:
    """I of a joint histogram in bits; never below 0 by rounding."""
    return max(0.0, _bits(joint.sum(0)) + _bits(joint.sum(1)) - _bits(joint))


def _normalised(joint: Counts) -> float:
    entropies = _bits(joint.sum(0)) + _bits(joint.sum(1))
    return _information(joint) / entropies if entropies > 0 else 0.0
