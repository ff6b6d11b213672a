"""Several metrics of one fused image at once."""

from __future__ import annotations

from collections.abc import Iterable

from numpy.typing import ArrayLike

from fuseengine.errors import UnknownNameError
from fuseengine.metrics.conventions import find_convention
from fuseengine.metrics.images import Images
from fuseengine.metrics.registry import METRICS


def evaluate(
    fused: ArrayLike,
    a: ArrayLike | None = None,
    b: ArrayLike | None = None,
    metrics: Iterable[str] | None = None,
    *,
    convention: str = "default",
) -> dict[str, float]:
    """Several metrics of one fused image; what they share is computed once.

    Args:
        fused: (H, W) grey or (H, W, 3) RGB on the 8-bit scale, see :class:`Images`.
        a: first source, infrared.
        b: second source, visible.
        metrics: keys of :data:`METRICS`; by default all that are not another program's form of one,
            and for which the pictures are large enough.
        convention: whose scale, a name of :data:`CONVENTIONS`.

    Returns:
        Value per key, in the order asked for; under the keys asked for, whatever the convention.

    Raises:
        FrameError: a picture that cannot be measured, pictures of different sizes, or smaller than
            a metric asked for by its key allows.
        UnknownNameError: unknown metric or convention.
    """
    scale = find_convention(convention)
    keys = [key for key in METRICS if METRICS[key].default] if metrics is None else list(metrics)
    for key in keys:
        if key not in METRICS:
            raise UnknownNameError("metric", key, METRICS)
    chosen = {key: METRICS[scale.variant(key)] for key in keys}
    sources = metrics is None or any(metric.needs_sources for metric in chosen.values())
    images = Images(fused, a, b, sources=sources)
    if metrics is None:
        side = min(images.shape)
        chosen = {key: metric for key, metric in chosen.items() if metric.min_side <= side}
    for metric in chosen.values():
        metric.check_size(images.shape)
    return {key: metric.measure(images) for key, metric in chosen.items()}
