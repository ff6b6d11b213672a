"""Fusion metrics on 8-bit-range images: the field's definitions, float64 inside."""

from fuseengine.metrics.core import (
    METRICS,
    average_gradient,
    entropy,
    evaluate,
    mutual_information,
    qabf,
    scd,
    spatial_frequency,
    standard_deviation,
    vif,
)

__all__ = [
    "METRICS",
    "average_gradient",
    "entropy",
    "evaluate",
    "mutual_information",
    "qabf",
    "scd",
    "spatial_frequency",
    "standard_deviation",
    "vif",
]
