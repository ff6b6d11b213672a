"""What every metric is: its key, name, direction, range, source, and the function that computes it.

A metric is written as a function of :class:`~fuseengine.metrics.images.Images` under
:func:`metric`, which lists it in :data:`METRICS` and turns it into the public function
``name(fused, a, b, convention="default")``. So a metric called alone and one of many in
:func:`~fuseengine.metrics.evaluate` run the same code.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Protocol

from numpy.typing import ArrayLike

from fuseengine.errors import FrameError
from fuseengine.metrics.conventions import find_convention
from fuseengine.metrics.images import Images


class MetricFunction(Protocol):
    """A public metric."""

    def __call__(
        self,
        fused: ArrayLike,
        a: ArrayLike | None = None,
        b: ArrayLike | None = None,
        *,
        convention: str = "default",
    ) -> float:
        """The value of one fused image."""
        ...


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric; calling it is calling its function.

    Attributes:
        key: short name, as papers print it: "Qabf".
        title: full name.
        function: ``function(fused, a, b, convention="default")``.
        measure: the same on checked :class:`Images`, sharing what was computed for others.
        higher_is_better: direction.
        range: lowest and highest value there can be, infinity where there is no bound.
        unit: "bit", "dB", "grey levels" or "".
        source: the paper it comes from.
        formula: one line.
        needs_sources: False for what looks at the fused image alone.
        needs_color: whether it looks at colour; none of these does, they measure the luma.
        min_side: smallest height and width in pixels.
        variant_of: key of the metric of which this is another program's form; None for defaults.
    """

    key: str
    title: str
    function: MetricFunction = dataclasses.field(repr=False)
    measure: Callable[[Images], float] = dataclasses.field(repr=False)
    higher_is_better: bool
    range: tuple[float, float]
    unit: str
    source: str
    formula: str
    needs_sources: bool = True
    needs_color: bool = False
    min_side: int = 2
    variant_of: str | None = None

    @property
    def default(self) -> bool:
        """Whether it is a metric of its own, not a form for comparing with someone's numbers."""
        return self.variant_of is None

    def __call__(
        self,
        fused: ArrayLike,
        a: ArrayLike | None = None,
        b: ArrayLike | None = None,
        *,
        convention: str = "default",
    ) -> float:
        """The value of one fused image; see :func:`fuseengine.metrics.evaluate`."""
        return self.function(fused, a, b, convention=convention)

    def check_size(self, shape: tuple[int, int]) -> None:
        """Raises.

        Raises:
            FrameError: pictures of this size are too small for the metric.
        """
        if min(shape) < self.min_side:
            raise FrameError(
                f"{self.key} of {shape[0]}x{shape[1]} pixels; expected at least {self.min_side} "
                "a side; leave it out for pictures of this size"
            )


METRICS: dict[str, Metric] = {}
"""Every metric by key: the defaults first, then the forms for comparing with printed numbers."""


def metric(
    key: str,
    title: str,
    *,
    range: tuple[float, float],
    source: str,
    higher_is_better: bool = True,
    unit: str = "",
    needs_sources: bool = True,
    min_side: int = 2,
    variant_of: str | None = None,
) -> Callable[[Callable[[Images], float]], MetricFunction]:
    """Lists a function of :class:`Images` as a metric and makes it public; see :class:`Metric`.

    The first paragraph of its docstring is the formula; the rest of this is added to it.
    """

    def register(measure: Callable[[Images], float]) -> MetricFunction:
        def function(
            fused: ArrayLike,
            a: ArrayLike | None = None,
            b: ArrayLike | None = None,
            *,
            convention: str = "default",
        ) -> float:
            chosen = METRICS[find_convention(convention).variant(key)]
            images = Images(fused, a, b, sources=chosen.needs_sources)
            chosen.check_size(images.shape)
            return chosen.measure(images)

        text = inspect.cleandoc(measure.__doc__ or "")
        function.__name__ = function.__qualname__ = measure.__name__
        function.__module__ = measure.__module__
        function.__doc__ = _docstring(text, title, range, unit, higher_is_better, source)
        METRICS[key] = Metric(
            key=key,
            title=title,
            function=function,
            measure=measure,
            higher_is_better=higher_is_better,
            range=range,
            unit=unit,
            source=source,
            formula=" ".join(text.split("\n\n")[0].split()),
            needs_sources=needs_sources,
            min_side=min_side,
            variant_of=variant_of,
        )
        return function

    return register


def _docstring(
    text: str,
    title: str,
    range: tuple[float, float],
    unit: str,
    higher_is_better: bool,
    source: str,
) -> str:
    low, high = (f"{end:.6g}" if math.isfinite(end) else f"{end}" for end in range)
    better = "higher" if higher_is_better else "lower"
    return f"""{text}

{title[0].upper()}{title[1:]}. Range {low}..{high}{f" {unit}" if unit else ""}, {better} is better.
Source: {source}.

Args:
    fused: (H, W) grey or (H, W, 3) RGB on the 8-bit scale, see :class:`Images`.
    a: first source, infrared.
    b: second source, visible.
    convention: whose scale, a name of :data:`CONVENTIONS`.

Returns:
    The value; defined for constant pictures too, never NaN.

Raises:
    FrameError: a picture that cannot be measured, too small, or of another size than the others.
    UnknownNameError: unknown convention.
"""
