"""What one optimiser step minimises, per family of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fuseengine.errors import TrainingError
from fuseengine.models.base import FusionModel
from fuseengine.models.drfusion import DRFusion
from fuseengine.training import losses
from fuseengine.training.degradations import degrade


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


class DRFusionRecipe:
    """DRFusion's self-supervised training: clean pairs are degraded at random and fused.

    The targets are computed from the clean sources. The paper's fusion term |f - max| and |grad|
    term reward a washed-out maximum; here the signed gradient selection and the correlation of
    differences carry the weight and the maximum only keeps targets bright.
    """

    def __init__(
        self, *, degrade_chance: float = 0.05, weights: DRFusionWeights | None = None
    ) -> None:
        self.weights = weights or DRFusionWeights()
        self.degrade_chance = degrade_chance

    def initialise(self, model: nn.Module) -> None:
        """Zero the heads: the untrained model is then the plain average (m = 1/2, no noise)."""
        for decoder in (model.unet.noise, model.unet.weight):
            nn.init.zeros_(decoder.head.weight)
            nn.init.zeros_(decoder.head.bias)

    def __call__(
        self, model: nn.Module, a: Tensor, b: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The loss's terms, already weighted, for clean patches a (infrared) and b (visible)."""
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


class Recipe(Protocol):
    """How a family of models is trained."""

    def initialise(self, model: nn.Module) -> None:
        """Prepare a model that has never been trained, in place."""

    def __call__(
        self, model: nn.Module, a: Tensor, b: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The weighted terms of the loss, 0-d tensors, for clean patches (N, 1, H, W)."""


def recipe_for(model: FusionModel) -> Recipe:
    """The recipe of a model's family.

    Raises:
        TrainingError: the family has none.
    """
    if isinstance(model, DRFusion):
        return DRFusionRecipe()
    raise TrainingError(f"no training recipe for {type(model).__name__}; there is one for DRFusion")
