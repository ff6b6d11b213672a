"""DRFusion: clean pairs are degraded at random and fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuseengine.models.drfusion import DRFusion
from fuseengine.training import losses
from fuseengine.training.degradations import degrade
from fuseengine.training.recipes.base import Recipe, zero_head


@dataclass(frozen=True)
class DRFusionWeights:
    """Weights of the loss's terms; all terms are means over pixels.

    Attributes:
        gradient: :func:`losses.gradient_selection`.
        correlation: :func:`losses.difference_correlation`.
        brightest: :func:`losses.brightest`.
        sources: |x1 - c1|_1 + |x2 - c2|_1, the reconstruction of both clean sources (equation 21).
        range: :func:`losses.out_of_range` of the fused image.
    """

    gradient: float = 0.4
    correlation: float = 0.2
    brightest: float = 0.3
    sources: float = 0.5
    range: float = 5.0


class DRFusionRecipe(Recipe):
    """DRFusion's self-supervised training: clean pairs are degraded at random and fused.

    The targets are computed from the clean sources. The paper's fusion term |f - max| and |grad|
    term reward a washed-out maximum; here the signed gradient selection and the correlation of
    differences carry the weight and the maximum only keeps targets bright.
    """

    stage = "fusion"
    augment = True
    default = DRFusionWeights()

    def __init__(
        self, weights: Mapping[str, float] | None = None, *, degrade_chance: float = 0.05
    ) -> None:
        super().__init__(weights)
        self.degrade_chance = degrade_chance

    def initialise(self, model: DRFusion) -> None:
        """Zero the heads: the untrained model is then the plain average (m = 1/2, no noise)."""
        for decoder in (model.unet.noise, model.unet.weight):
            zero_head(decoder.head)

    def __call__(
        self, model: DRFusion, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The loss's terms for clean patches a (infrared) and b (visible)."""
        a, b = pictures
        seen_a = degrade(a, generator, infrared=True, chance=self.degrade_chance)
        seen_b = degrade(b, generator, infrared=False, chance=self.degrade_chance)
        joint = model.sample(seen_a, seen_b)
        fused, w = joint[:, 2:3], self.weights
        return {
            "gradient": w.gradient * losses.gradient_selection(fused, a, b),
            "correlation": w.correlation * losses.difference_correlation(fused, a, b),
            "brightest": w.brightest * losses.brightest(fused, a, b),
            "sources": w.sources
            * ((joint[:, 0:1] - a).abs().mean() + (joint[:, 1:2] - b).abs().mean()),
            "range": w.range * losses.out_of_range(fused),
        }

    def show(
        self, model: DRFusion, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> list[Tensor]:
        """Infrared, visible, fused."""
        return [*pictures, model(*pictures)]
