"""Mask-DiFuser: pictures put together again from two complementary, partly degraded views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fuseengine.models.mask_difuser import MaskDiFuser
from fuseengine.models.sampling import diffuse
from fuseengine.training import losses
from fuseengine.training.degradations import MASKED, degrade_one_of
from fuseengine.training.diffusion import antithetic_timesteps, normal, sqrt_abar
from fuseengine.training.masking import dual_mask
from fuseengine.training.perceptual import perceptual_loss
from fuseengine.training.recipes.base import Recipe


@dataclass(frozen=True)
class MaskDiFuserWeights:
    """Weights of the loss's terms (equation 18).

    Attributes:
        diffusion: L_diff (equation 12), mean square of the error of what the U-Net predicts.
        pixel: :func:`losses.distance` of x_0 (equation 14).
        ssim: 1 - SSIM (equation 15 prints the index itself).
        perceptual: :class:`~fuseengine.training.perceptual.Perceptual` (equation 16).
        colour: :func:`losses.colour_angle` (equation 17).
    """

    diffusion: float = 1.0
    pixel: float = 0.05
    ssim: float = 0.05
    perceptual: float = 0.1
    colour: float = 1.0


class MaskDiFuserRecipe(Recipe):
    """Self-supervised dual masking on colour pictures.

    Each picture gets one degradation of the set, and two views by :func:`dual_mask`; the model is
    to find the picture from both. The terms on pictures are those of x_0 (equation 13) in [0, 1];
    a model that predicts the noise has its estimate clamped there, because at large t an error of
    the noise is one 26 times as large of the picture. A model that predicts x_0 itself
    (``predict="clean"``) has L_diff as the mean square of that: the noise's divided by the
    signal-to-noise ratio abar / (1 - abar), so that no timestep is forgotten.

    The perceptual term needs torchvision's VGG16; without it the term is left out, with a warning.

    Args:
        weights: weights of the loss's terms that replace the recipe's own.
        form: number of cells: "paper" (4:1:4:1) or "code" (30:2:28:4).
    """

    stage = "fusion"
    layout = "pictures"
    smallest_patch = 16
    default = MaskDiFuserWeights()

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        form: Literal["paper", "code"] = "paper",
    ) -> None:
        super().__init__(weights)
        self.form = form
        self.perceptual = perceptual_loss() if self.weights.perceptual else None

    def __call__(
        self, model: MaskDiFuser, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The loss's terms for clean patches x."""
        (x,) = pictures
        sources = model.sources(*self.views(x, generator))
        target = x * 2.0 - 1.0
        timesteps = antithetic_timesteps(len(x), len(model.table) - 1, generator)
        level, noise = sqrt_abar(model.table, timesteps, x), normal(x, generator)
        noisy = diffuse(target, noise, level)
        found = model.unet(noisy, model.time(timesteps.to(x)), *sources)
        if model.predict == "clean":
            diffusion, clean = (found - target).square().mean(), found * 0.5 + 0.5
        else:
            diffusion, scale = (found - noise).square().mean(), level.reshape(-1, 1, 1, 1)
            clean = (noisy - (1.0 - scale**2).sqrt() * found) / scale
            clean = (clean * 0.5 + 0.5).clamp(0.0, 1.0)
        w = self.weights
        terms = {
            "diffusion": w.diffusion * diffusion,
            "pixel": w.pixel * losses.distance(clean, x),
            "ssim": w.ssim * (1.0 - losses.ssim(clean, x)).mean(),
            "colour": w.colour * losses.colour_angle(clean.clamp(0.0, 1.0), x),
        }
        if self.perceptual is not None:
            terms["perceptual"] = w.perceptual * self.perceptual.to(x.device)(clean, x)
        return terms

    def views(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two complementary views of clean pictures."""
        return dual_mask(x, degrade_one_of(x, MASKED, generator), generator, form=self.form)

    def show(
        self, model: MaskDiFuser, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> list[Tensor]:
        """View A, view B, what the model makes of them, the picture."""
        views = self.views(pictures[0], generator)
        return [*views, model(*views), pictures[0]]
