"""Mask-DiFuser: pictures put together again from two complementary, partly degraded views.

The paper's training ends there. A small model then still averages where both views are clean, which
two real sources always are; ``mask-difuser-s`` therefore goes on to registered pairs.
"""

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
from fuseengine.training.masking import dual_mask, exposure_pair, focus_pair
from fuseengine.training.perceptual import perceptual_loss
from fuseengine.training.recipes.base import (
    COLOUR_TERMS,
    ColourFusionWeights,
    Recipe,
    sometimes_grey,
    zero_head,
)


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
    (``predict="clean"`` or ``"correction"``) has L_diff as the mean square of that: the noise's
    divided by the signal-to-noise ratio abar / (1 - abar), so that no timestep is forgotten.

    The perceptual term needs torchvision's VGG16; without it the term is left out, with a warning.

    Args:
        weights: weights of the loss's terms that replace the recipe's own.
        form: number of cells: "paper" (4:1:4:1) or "code" (30:2:28:4).
    """

    stage = "masking"
    layout = "pictures"
    smallest_patch = 16
    default = MaskDiFuserWeights()

    def initialise(self, model: MaskDiFuser) -> None:
        """A correction of the sources' mean starts at 0."""
        if model.predict == "correction":
            zero_head(model.unet.head)

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
        views = self.views(x, generator)
        sources, base = model.sources(*views), model.base(*views)
        target = x * 2.0 - 1.0
        timesteps = antithetic_timesteps(len(x), len(model.table) - 1, generator)
        level, noise = sqrt_abar(model.table, timesteps, x), normal(x, generator)
        noisy = diffuse(target, noise, level)
        found = model.unet(noisy, model.time(timesteps.to(x)), *sources)
        if model.predict != "noise":
            found = found if base is None else found + base
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


@dataclass(frozen=True)
class MaskDiFuserPairWeights(ColourFusionWeights):
    """Weights of the terms on registered pairs, and on pairs made from one picture.

    Attributes:
        known: |x_0 - x| where the answer is known: pairs made from one picture.
    """

    known: float = 2.0


_OF_BOTH = ("contrast", "information", "range")
"""Terms of both halves: the edges of an exposure may be stronger than those of the picture."""


class MaskDiFuserPairs(Recipe):
    """Registered pairs without an answer, and as many pairs made from one picture, which have one.

    Not in the paper. Real pairs have the terms that DRFusion's recipe has. Half of the others are
    two exposures, half two focal planes of the visible pictures: what is to be fused there is what
    is well exposed or in focus, not what is brightest. x_t is made of what the model itself finds
    in pure noise, as in sampling, without a gradient.
    """

    stage = "pairs"
    augment = True
    smallest_patch = 16
    default = MaskDiFuserPairWeights()

    @classmethod
    def suits(cls, model: MaskDiFuser) -> bool:
        """A model that predicts the noise has no estimate of x_0 to speak of at large t."""
        return model.predict != "noise"

    def __call__(
        self, model: MaskDiFuser, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The loss's terms for patches a and b."""
        a, b = pictures
        a, b = sometimes_grey(a, b, generator)
        made_a, made_b = self.known_pair(b, generator)
        all_a, all_b = torch.cat([a, made_a]), torch.cat([b, made_b])
        fused = self.estimate(model, all_a, all_b, generator)
        pair, known = fused.chunk(2)
        w = self.weights
        return {
            **w.terms(pair, a, b, [name for name in COLOUR_TERMS if name not in _OF_BOTH]),
            **w.terms(fused, all_a, all_b, _OF_BOTH),
            "known": w.known * (known - b).abs().mean(),
        }

    @staticmethod
    def known_pair(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two exposures of half of the pictures, two focal planes of the others; any order."""
        half = (len(x) + 1) // 2
        pairs = exposure_pair(x[:half], generator), focus_pair(x[half:], generator)
        a, b = (torch.cat(sides) for sides in zip(*pairs, strict=True))
        swap = torch.rand(len(x), generator=generator).to(x).reshape(-1, 1, 1, 1) < 0.5
        return torch.where(swap, b, a), torch.where(swap, a, b)

    @staticmethod
    def estimate(model: MaskDiFuser, a: Tensor, b: Tensor, generator: torch.Generator) -> Tensor:
        """x_0 in [0, 1] as the model finds it at a random timestep, (N, 3, H, W)."""
        sources, base = model.sources(a, b), model.base(a, b)
        zero = torch.zeros_like(a) if base is None else base
        with torch.no_grad():
            first = model.schedule()[0]
            found = zero + model.unet(normal(a, generator), model.time(first.t), *sources)
        timesteps = antithetic_timesteps(len(a), len(model.table) - 1, generator)
        noisy = diffuse(found, normal(a, generator), sqrt_abar(model.table, timesteps, a))
        return (zero + model.unet(noisy, model.time(timesteps.to(a)), *sources)) * 0.5 + 0.5

    def show(
        self, model: MaskDiFuser, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> list[Tensor]:
        """A, B, fused; then a pair made from B, fused."""
        made = self.known_pair(pictures[1], generator)
        return [*pictures, model(*pictures), *made, model(*made)]
