"""Means and ranks of an evaluation, and what a reader of its numbers should know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fuseengine.evaluation.run import COLOUR, CONSTANT, COUNTS, DEEP, Evaluation
from fuseengine.metrics import METRICS
from fuseengine.metrics.conventions import find_convention
from fuseengine.metrics.registry import Metric

_MOST_NAMES = 12
"""Names that a note lists; the JSON file has all."""


@dataclass(frozen=True)
class Mean:
    """Mean of one metric over the images of one method.

    Attributes:
        value: over the images where the metric is a finite number; NaN if there are none.
        std: sample standard deviation (n - 1); NaN below two images.
        n: images it is over.
        of: all images.
    """

    value: float
    std: float
    n: int
    of: int


@dataclass(frozen=True)
class Summary:
    """Means and ranks of an evaluation.

    Attributes:
        means: per method, per metric.
        ranks: likewise: 1 for the best mean, equal means share a rank, None without a mean. All
            None where there is one method only.
        mean_ranks: per method, over the metrics that have a rank for every method; None without.
    """

    means: tuple[tuple[Mean, ...], ...]
    ranks: tuple[tuple[int | None, ...], ...]
    mean_ranks: tuple[float | None, ...]


def summarise(evaluation: Evaluation) -> Summary:
    """Means, standard deviations and ranks."""
    means = tuple(
        tuple(_mean(values[:, index]) for index in range(len(evaluation.metrics)))
        for values in evaluation.values
    )
    by_metric = [
        rank([row[index].value for row in means], metric_of(evaluation, key).higher_is_better)
        if len(means) > 1
        else [None] * len(means)
        for index, key in enumerate(evaluation.metrics)
    ]
    complete = [ranks for ranks in by_metric if None not in ranks]
    return Summary(
        means,
        tuple(zip(*by_metric, strict=True)),
        tuple(
            float(np.mean([ranks[method] for ranks in complete])) if complete else None
            for method in range(len(means))
        ),
    )


def rank(values: Sequence[float | None], higher_is_better: bool) -> list[int | None]:
    """1 for the best value, equal values share a rank, None for None and NaN."""
    known = [value for value in values if value is not None and not math.isnan(value)]

    def better(x: float, y: float) -> bool:
        return x > y if higher_is_better else x < y

    return [
        None
        if value is None or math.isnan(value)
        else 1 + sum(better(other, value) for other in known)
        for value in values
    ]


def metric_of(evaluation: Evaluation, key: str) -> Metric:
    """The metric that was computed for a key: the convention's form of it, or itself."""
    return METRICS[find_convention(evaluation.convention).variant(key)]


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader of the numbers should know, a sentence or two each."""
    found = []
    colour = _tell(evaluation, COLOUR)
    if colour:
        found.append(f"Colour images: metrics see their luma Y (BT.601): {colour}.")
    deep = _tell(evaluation, DEEP)
    if deep:
        found.append(f"16-bit images: levels divided by 257 and rounded to 8 bits: {deep}.")
    if evaluation.infrared_range is not None:
        low_high = (
            "the least and the largest value of each image"
            if evaluation.infrared_range == "minmax"
            else "{:g} and {:g}".format(*evaluation.infrared_range)
        )
        found.append(f"Infrared images: {low_high} became 0 and 255 before anything else.")
    counts = _tell(evaluation, COUNTS)
    if counts:
        found.append(
            f"16-bit images that use less than a quarter of their range: {counts}. If these are a "
            "camera's counts, say what is black and white with --infrared-range."
        )
    constant = _tell(evaluation, CONSTANT, names=True)
    if constant:
        found.append(
            f"Images of one single value: {constant}. There a correlation counts as 0, and other "
            "metrics have the value that their definition gives them or none."
        )
    for method, means in zip(evaluation.methods, summarise(evaluation).means, strict=True):
        found += [
            _undefined(evaluation, method, index, mean)
            for index, mean in enumerate(means)
            if mean.n < mean.of
        ]
    for role, files in evaluation.unpaired.items():
        found.append(f"{role} without a partner, not measured: {_names(files)}.")
    found += [f"Left out: {item.name}: {item.reason}." for item in evaluation.left_out]
    return found


def _mean(values: np.ndarray) -> Mean:
    finite = values[np.isfinite(values)]
    n = len(finite)
    return Mean(
        float(finite.mean()) if n else math.nan,
        float(finite.std(ddof=1)) if n > 1 else math.nan,
        n,
        len(values),
    )


def _undefined(evaluation: Evaluation, method: str, index: int, mean: Mean) -> str:
    metric = metric_of(evaluation, evaluation.metrics[index])
    values = evaluation.values[evaluation.methods.index(method), :, index]
    cases = [c for c, v in zip(evaluation.cases, values, strict=True) if not math.isfinite(v)]
    why = "undefined or infinite"
    if all(min(case.size) < metric.min_side for case in cases):
        why = f"undefined (below {metric.min_side} pixels a side)"
    return (
        f"{evaluation.metrics[index]} of {method} is {why} for "
        f"{_names([case.name for case in cases])}: its mean is over {mean.n} of {mean.of} images."
    )


def _tell(evaluation: Evaluation, fact: str, *, names: bool = False) -> str:
    """Of whose images a fact is true: "12 visible, 3 of average (02, 03, 08)"."""
    total = len(evaluation.cases)
    parts = []
    for role in ("infrared", "visible", *evaluation.methods):
        of_role = evaluation.facts.get((role, fact), ())
        if of_role:
            listed = f" ({_names(of_role)})" if names else ""
            parts.append(f"{role} {len(of_role)} of {total}{listed}")
    return ", ".join(parts)


def _names(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
