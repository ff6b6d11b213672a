"""DMNet: an autoencoder and a diffusion model, then fusion by both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuseengine.models.dmnet import DMNet
from fuseengine.models.sampling import diffuse
from fuseengine.training import losses
from fuseengine.training.diffusion import levels_between, normal, random_levels
from fuseengine.training.recipes.base import ExtraWeights, Recipe


def noise_loss(model: DMNet, x: Tensor, generator: torch.Generator) -> Tensor:
    """Mean square of the U-Net's error of the noise in x (N, 2, h, w) (equation 17)."""
    level, noise = random_levels(model.table, x, generator), normal(x, generator)
    found = model.unet(diffuse(x, noise, level), model.time(level))[0]
    return (found - noise).square().mean()


@dataclass(frozen=True)
class DMNetReconstructionWeights:
    """Weights of stage I's terms; the paper gives no numbers, CDDFuse has 1 and 5.

    Attributes:
        infrared: l1 of equation 13.
        visible: of the visible picture's terms.
        ssim: mu of equation 14, of 1 - SSIM beside the mean square.
        noise: of the U-Net's loss (equation 17).
    """

    infrared: float = 1.0
    visible: float = 1.0
    ssim: float = 5.0
    noise: float = 1.0


class DMNetReconstruction(Recipe):
    """Stage I: each picture through encoder and decoder; the U-Net on pairs as two channels.

    The U-Net of a model that works on p x p blocks sees the pair's block means, in [-1, 1]: in
    stage II its input has that size.
    """

    stage = "reconstruction"
    smallest_patch = 16
    default = DMNetReconstructionWeights()

    def trained(self, model: DMNet) -> list[nn.Module]:
        """All but what only stage II uses: the way into the U-Net and its features' way out."""
        return [model.encoder, model.head.attention, model.head.decoder, model.unet, model.time]

    def __call__(
        self, model: DMNet, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The loss's terms for patches a (infrared) and b (visible)."""
        w, terms = self.weights, {}
        for name, scale, x in zip(
            ("infrared", "visible"), (w.infrared, w.visible), pictures, strict=True
        ):
            made = model.reconstruct(x)
            unlike = (1.0 - losses.ssim(made, x)).mean()
            terms[name] = scale * ((made - x).square().mean() + w.ssim * unlike)
        pair = F.avg_pool2d(torch.cat(list(pictures), dim=1), model.head.decoder.patch)
        terms["noise"] = w.noise * noise_loss(model, pair * 2.0 - 1.0, generator)
        return terms

    def show(
        self, model: DMNet, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> list[Tensor]:
        """Infrared and its reconstruction, visible and its reconstruction."""
        return [y for x in pictures for y in (x, model.reconstruct(x))]


@dataclass(frozen=True)
class DMNetFusionWeights(ExtraWeights):
    """Weights of stage II's terms (equation 18); l2 is not given in the paper, CDDFuse has 10.

    Attributes:
        intensity: |f - max(a, b)|_1.
        noise: of the U-Net's loss (equation 17).
        gradient: l2, of :func:`losses.strongest_edges` (equation 19).
    """

    intensity: float = 1.0
    noise: float = 1.0
    gradient: float = 10.0


class DMNetFusion(Recipe):
    """Stage II: the fused picture against both sources; everything is trained.

    The U-Net's own loss sees the compressed features as they are, without a gradient into them:
    they would otherwise grow, because noise is easiest to tell from a signal that is large.
    """

    stage = "fusion"
    augment = True
    default = DMNetFusionWeights()

    def __call__(
        self, model: DMNet, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The loss's terms for patches a (infrared) and b (visible)."""
        a, b = pictures
        with torch.no_grad():
            features = model.compress(torch.cat([model.encoder(x)[0] for x in (a, b)], dim=1))
        fused, w = model(a, b, self.noise(model, features, generator)), self.weights
        return {
            "intensity": w.intensity * losses.brightest(fused, a, b),
            "gradient": w.gradient * losses.strongest_edges(fused, a, b),
            "noise": w.noise * noise_loss(model, features, generator),
            **w.terms(fused, a, b),
        }

    def noise(self, model: DMNet, like: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """All random numbers of one forward, by name."""
        made = {}
        for t in model.times:
            steps = torch.full((len(like),), t)
            made[f"level_t{t}"] = levels_between(model.table, steps, generator, like)
            made[f"noise_t{t}"] = normal(like, generator)
        return made

    def show(
        self, model: DMNet, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> list[Tensor]:
        """Infrared, visible, fused."""
        return [*pictures, model(*pictures)]
