"""DMFuse: a diffusion model of single pictures, then a fusion head on its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fuseengine.models.dmfuse import DMFuse
from fuseengine.models.sampling import diffuse
from fuseengine.training import losses
from fuseengine.training.diffusion import levels_between, normal, random_levels
from fuseengine.training.recipes.base import ExtraWeights, Recipe


@dataclass(frozen=True)
class NoiseWeights:
    """Weight of the only term, the mean square of the error of the noise (equation 4)."""

    noise: float = 1.0


class DMFuseDiffusion(Recipe):
    """Stage 1: the U-Net learns to predict the noise in single pictures of any kind.

    The level is drawn between sqrt(abar_t) and sqrt(abar_{t-1}) for a t in 1 .. T. The weights
    start orthogonal, as in the public code.
    """

    stage = "diffusion"
    layout = "pictures"
    default = NoiseWeights()

    def initialise(self, model: DMFuse) -> None:
        """Orthogonal weights and zero biases in the U-Net."""
        for module in model.diffusion.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def trained(self, model: DMFuse) -> list[nn.Module]:
        """The U-Net with its time shifts."""
        return [model.diffusion]

    def __call__(
        self, model: DMFuse, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The loss's only term for patches (N, 1, H, W)."""
        x = (pictures[0] * 2.0 - 1.0).expand(-1, 3, -1, -1)
        level, noise = random_levels(model.table, x, generator), normal(x, generator)
        found = model.diffusion(diffuse(x, noise, level), level)[0]
        return {"noise": self.weights.noise * (found - noise).square().mean()}

    def show(
        self, model: DMFuse, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> list[Tensor]:
        """Clean, noisy (a level per picture), what one prediction makes of it."""
        x = (pictures[0] * 2.0 - 1.0).expand(-1, 3, -1, -1)
        level = torch.linspace(0.95, 0.5, len(x)).to(x)
        noisy = diffuse(x, normal(x, generator), level)
        scale = level.reshape(-1, 1, 1, 1)
        found = (noisy - (1.0 - scale**2).sqrt() * model.diffusion(noisy, level)[0]) / scale
        return [pictures[0], *((y[:, :1] * 0.5 + 0.5).clamp(0.0, 1.0) for y in (noisy, found))]


@dataclass(frozen=True)
class DMFuseWeights(ExtraWeights):
    """Weights of the head's loss; the public code's.

    Attributes:
        ssim: 1 - (w_a SSIM(f, a) + w_b SSIM(f, b)).
        gradient: :func:`losses.strongest_edges`.
        intensity: |f - max(a, b)|_1, or |f - (a + b) / 2|_1.
    """

    ssim: float = 10.0
    gradient: float = 16.0
    intensity: float = 14.0


class DMFuseFusion(Recipe):
    """Stage 2: the head, with the U-Net frozen. Noise and levels are drawn anew in every step.

    Pictures in the loss are those in [0, 1], the networks see [-1, 1]. Where paper and code differ:

    * "code": weights 10, 16 and 14; the intensity's target is max(a, b); w_a and w_b are each
      source's mean |grad| over their sum;
    * "paper": weights 1, 20 and 4; the target is the mean; w_a = w_b = 1/2.

    Args:
        weights: weights of the loss's terms that replace the form's own.
        form: "code" or "paper".
    """

    stage = "fusion"
    augment = True
    smallest_patch = 16

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        form: Literal["code", "paper"] = "code",
    ) -> None:
        self.form = form
        self.default = (
            DMFuseWeights()
            if form == "code"
            else DMFuseWeights(ssim=1.0, gradient=20.0, intensity=4.0)
        )
        super().__init__(weights)

    def trained(self, model: DMFuse) -> list[nn.Module]:
        """Everything but the U-Net."""
        return [module for module in model.children() if module is not model.diffusion]

    def __call__(
        self, model: DMFuse, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The loss's terms for patches a (infrared) and b (visible)."""
        a, b = pictures
        fused, w = model.fuse(a, b, self.noise(model, a, generator)), self.weights
        share_a, share_b = (losses.edge_strength(x).mean(dim=(1, 2, 3)) for x in (a, b))
        if self.form == "paper":
            share_a = share_b = torch.ones_like(share_a)
        total = (share_a + share_b).clamp_min(1e-6)
        likeness = (share_a * losses.ssim(fused, a) + share_b * losses.ssim(fused, b)) / total
        target = torch.maximum(a, b) if self.form == "code" else (a + b) / 2
        return {
            "ssim": w.ssim * (1.0 - likeness).mean(),
            "gradient": w.gradient * losses.strongest_edges(fused, a, b),
            "intensity": w.intensity * (fused - target).abs().mean(),
            **w.terms(fused, a, b),
        }

    def noise(self, model: DMFuse, like: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """All random numbers of one forward, by name."""
        made = {}
        for name in model.noise_names():
            steps = torch.full((len(like),), int(name.rpartition("_t")[2]))
            made[name] = (
                levels_between(model.table, steps, generator, like)
                if name.startswith("level")
                else normal(like.expand(-1, 3, -1, -1), generator)
            )
        return made

    def show(
        self, model: DMFuse, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> list[Tensor]:
        """Infrared, visible, fused."""
        return [*pictures, model(*pictures)]
