"""DRMF: a restoration network per modality, then the weights that compose them.

The paper ends there. A weighted mean of two pictures is never sharper than they are, and those of
small networks are soft; ``drmf-s`` therefore refines what its networks say in the last step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuseengine.models.drmf import DRMF
from fuseengine.models.sampling import Step, diffuse, predict_x0
from fuseengine.training import losses
from fuseengine.training.degradations import OF_MODALITY, degrade_some_of, gaussian_blur
from fuseengine.training.diffusion import antithetic_timesteps, normal, sqrt_abar
from fuseengine.training.recipes.base import (
    ColourFusionWeights,
    ExtraWeights,
    Recipe,
    sometimes_grey,
    zero_head,
)

_Network = Literal["infrared", "visible"]
_NETWORKS: tuple[_Network, ...] = ("infrared", "visible")


def _networks(model: DRMF) -> list[_Network]:
    return [name for name in _NETWORKS if hasattr(model, name)]


def _degraded(
    model: DRMF, pictures: Sequence[Tensor], generator: torch.Generator, chance: float
) -> list[Tensor]:
    modalities: tuple[str, ...] = ("ct", "mri") if model.task == "medical" else _NETWORKS
    return [
        degrade_some_of(x, OF_MODALITY[modality], generator, chance=chance)
        for x, modality in zip(pictures, modalities, strict=True)
    ]


@dataclass(frozen=True)
class DRMFRestorationWeights:
    """Weights of the two networks' losses; they share nothing, so only the clipping sees them."""

    infrared: float = 1.0
    visible: float = 1.0


class DRMFRestoration(Recipe):
    """Each modality's network learns to denoise x_t given the degraded picture, for every t.

    The loss of a network that predicts the noise is the mean square of its error (the code's is the
    sum over a picture, which is the same to Adam), that of one that predicts the clean picture the
    mean square of that: the noise's divided by abar / (1 - abar). With the noise's own weight
    nearly all of the loss would lie at t = 0, where x_t is the clean picture and nothing is to be
    restored.

    Args:
        weights: weights of the loss's terms that replace the recipe's own.
        chance: of each degradation of a modality, see :data:`~..degradations.OF_MODALITY`; some
            pictures stay clean, so that clean pictures are left as they are.
    """

    stage = "restoration"
    default = DRMFRestorationWeights()

    def __init__(self, weights: Mapping[str, float] | None = None, *, chance: float = 0.4) -> None:
        super().__init__(weights)
        self.chance = chance

    def initialise(self, model: DRMF) -> None:
        """The weight is 1/2 everywhere, and a correction of the picture (predict "clean") 0."""
        if hasattr(model, "weight"):
            zero_head(model.weight.unet.head)
        if model.predict == "clean":
            for name in _networks(model):
                zero_head(getattr(model, name).unet.head)

    def trained(self, model: DRMF) -> list[nn.Module]:
        """The restoration networks."""
        return [getattr(model, name) for name in _networks(model)]

    def __call__(
        self, model: DRMF, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The loss's terms for clean patches of both modalities."""
        seen = _degraded(model, pictures, generator, self.chance)
        terms: dict[str, Tensor] = {}
        for name, x, y in zip(_networks(model), pictures, seen, strict=False):
            network, target, given = getattr(model, name), x * 2.0 - 1.0, y * 2.0 - 1.0
            timesteps = antithetic_timesteps(len(x), len(model.table) - 1, generator)
            noise = normal(x, generator)
            noisy = diffuse(target, noise, sqrt_abar(model.table, timesteps, x))
            found = network(noisy, timesteps.to(x), network.condition(given))
            if model.predict == "clean":
                found, wanted = found + given, target
            else:
                wanted = noise
            terms[name] = getattr(self.weights, name) * (found - wanted).square().mean()
        return terms

    def show(
        self, model: DRMF, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> list[Tensor]:
        """Per modality: degraded, restored in five steps, clean."""
        seen = _degraded(model, pictures, generator, self.chance)
        shown = []
        for name, x, y in zip(_networks(model), pictures, seen, strict=False):
            shown += [y, model.restore(y, name, steps=5), x]
        return shown


@dataclass(frozen=True)
class DRMFWeights(ExtraWeights):
    """Weights of the fusion stage's terms; the public code's (its fusion loss times 10).

    ``c = sqrt(abar)`` of the step, Y and C luma and chroma of the step's x_0, m the targets' mask.

    Attributes:
        brightest: c |Y - max(Y_A, Y_B)|.
        inside: c |m (Y - Y_A)|.
        outside: c |(1 - m) (Y - Y_B)|.
        chroma: c |(1 - m) (C - the stronger source's C)|, summed over both.
        gradient: c ||grad Y| - max(|grad Y_A|, |grad Y_B|)|.
        inside_gradient: |m (|grad Y| - |grad Y_A|)|.
        smooth: mean |Sobel w|.
        mask: binary cross-entropy of w and m.
    """

    brightest: float = 100.0
    inside: float = 400.0
    outside: float = 50.0
    chroma: float = 10.0
    gradient: float = 100.0
    inside_gradient: float = 500.0
    smooth: float = 1.0
    mask: float = 5.0


class DRMFFusion(Recipe):
    """The weight network learns, through the whole sampling chain; the others are frozen.

    Two things of the public code look like slips and are not repeated by default:

    * its loop adds the fusion loss only where the step's index equals the batch size less one
      (with batch 1, the paper's, the second step counts alone). Here every step whose weight is
      learned counts; ``steps="code"`` has the second alone;
    * its luma is taken of pictures in [-1, 1] and clamped to [0, 1], so that the darker half has
      no gradient. Here it is taken in [0, 1], unclamped.

    The code's mask comes with its data (labelled targets); unlabelled pairs get
    :func:`target_mask`. Medical pairs have no targets: m = 0, and neither the mask's terms nor
    ``outside``. Chroma is compared with the source that has more of it (the code: with B), so that
    PET and SPECT keep their colours; for grey infrared that is B.

    Args:
        weights: weights of the loss's terms that replace the recipe's own.
        chance: of each degradation of the sources; the loss compares with the clean ones.
        steps: "all" or "code".
    """

    stage = "fusion"
    default = DRMFWeights()

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        chance: float = 0.15,
        steps: Literal["all", "code"] = "all",
    ) -> None:
        super().__init__(weights)
        self.chance, self.steps = chance, steps

    @classmethod
    def suits(cls, model: DRMF) -> bool:
        """Not where no weight is learned: a single step takes 1/2, unless medical."""
        learned = model.task == "medical" or len(model.schedule()) > 1
        return model.task != "restore" and learned

    def trained(self, model: DRMF) -> list[nn.Module]:
        """The weight network."""
        return [model.weight]

    def __call__(
        self, model: DRMF, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The loss's terms, summed over the steps, for clean patches of both modalities."""
        a, b = pictures
        y_a, y_b = losses.to_ycbcr(a)[0], losses.to_ycbcr(b)[0]
        medical = model.task == "medical"
        mask = torch.zeros_like(y_a) if medical else target_mask(y_a, y_b)
        second = model.schedule()[:2][-1].t
        terms: dict[str, Tensor] = {}

        def add(name: str, value: Tensor) -> None:
            terms[name] = terms.get(name, 0.0) + getattr(self.weights, name) * value

        def watch(x: Tensor, prior_a: Tensor, prior_b: Tensor, w: Tensor, step: Step) -> None:
            if not medical and step.t > second:  # w is 1/2 there, not learned
                return
            if self.steps == "all" or step.t == second:
                prior = w * prior_a + (1.0 - w) * prior_b
                x0 = prior if model.predict == "clean" else predict_x0(x, prior, step)
                parts = self.fusion(x0 * 0.5 + 0.5, pictures, mask, float(step.sqrt_abar))
                for name, value in parts.items():
                    if not (medical and name == "outside"):
                        add(name, value)
            add("smooth", losses.edge_strength(w).mean())
            if not medical:
                add("mask", F.binary_cross_entropy(w.clamp(1e-4, 1.0 - 1e-4), mask))

        noise = {"x_T": normal(a, generator)}
        seen_a, seen_b = _degraded(model, pictures, generator, self.chance)
        x = model.sample(seen_a, seen_b, noise, watch=watch)
        fused = losses.to_ycbcr(x * 0.5 + 0.5)[0]
        return {**terms, **self.weights.terms(fused, y_a, y_b)}

    @staticmethod
    def fusion(
        fused: Tensor, pictures: Sequence[Tensor], mask: Tensor, scale: float
    ) -> dict[str, Tensor]:
        """The fusion loss's terms of one step, unweighted; see :class:`DRMFWeights`."""
        y, chroma = losses.to_ycbcr(fused)
        (y_a, chroma_a), (y_b, chroma_b) = (losses.to_ycbcr(x) for x in pictures)
        wanted = losses.stronger_chroma(chroma_a, chroma_b)
        edges, edges_a = losses.edge_strength(y), losses.edge_strength(y_a)
        return {
            "brightest": scale * losses.brightest(y, y_a, y_b),
            "inside": scale * (mask * (y - y_a)).abs().mean(),
            "outside": scale * ((1.0 - mask) * (y - y_b)).abs().mean(),
            "chroma": scale * ((1.0 - mask) * (chroma - wanted)).abs().sum(1).mean(),
            "gradient": scale * losses.strongest_edges(y, y_a, y_b),
            "inside_gradient": (mask * (edges - edges_a)).abs().mean(),
        }

    def show(
        self, model: DRMF, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> list[Tensor]:
        """A, B, fused; then both degraded, fused."""
        seen = _degraded(model, pictures, generator, 0.4)
        return [*pictures, model(*pictures), *seen, model(*seen)]


class DRMFRefinement(Recipe):
    """The restoration networks learn what the last step's composition should be. Not in the paper.

    Only the last step (t = 0) has a gradient: what a network says at a larger t stays restoration,
    and a step costs as much as two plain ones. The weight network is frozen.

    Args:
        weights: weights of the loss's terms that replace the recipe's own.
        chance: of each degradation of the sources; the loss compares with the clean ones.
    """

    stage = "refinement"
    augment = True
    default = ColourFusionWeights()

    def __init__(self, weights: Mapping[str, float] | None = None, *, chance: float = 0.1) -> None:
        super().__init__(weights)
        self.chance = chance

    @classmethod
    def suits(cls, model: DRMF) -> bool:
        """Networks that give the clean picture, in fusion."""
        return model.predict == "clean" and model.task != "restore"

    def trained(self, model: DRMF) -> list[nn.Module]:
        """The restoration networks."""
        return [getattr(model, name) for name in _networks(model)]

    def __call__(
        self, model: DRMF, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The loss's terms for clean patches of both modalities."""
        a, b = pictures
        a, b = sometimes_grey(a, b, generator)
        seen_a, seen_b = _degraded(model, (a, b), generator, self.chance)
        noise = {"x_T": normal(a, generator)}
        fused = self.last_step(model, seen_a, seen_b, noise) * 0.5 + 0.5
        terms: dict[str, Tensor] = self.weights.terms(fused, a, b)
        return terms

    @staticmethod
    def last_step(model: DRMF, a: Tensor, b: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The composed x_0 of the last step, (N, 3, H, W), with a gradient to both networks."""
        last: list[tuple[Tensor, Tensor, Step]] = []

        def watch(x: Tensor, prior_a: Tensor, prior_b: Tensor, w: Tensor, step: Step) -> None:
            last[:] = [(x, w, step)]

        with torch.no_grad():
            model.sample(a, b, noise, watch=watch)
        ((x, w, step),) = last
        priors = []
        for network, picture in ((model.infrared, a * 2.0 - 1.0), (model.visible, b * 2.0 - 1.0)):
            priors.append(model.prior(network, x, step, picture, network.condition(picture)))
        return w * priors[0] + (1.0 - w) * priors[1]

    def show(
        self, model: DRMF, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> list[Tensor]:
        """A, B, fused."""
        return [*pictures, model(*pictures)]


def target_mask(infrared: Tensor, visible: Tensor) -> Tensor:
    """Where hot targets stand out, (N, 1, H, W) of 0 and 1, in place of labels.

    1 where the infrared picture, blurred a little (sigma 1.5), lies above its patch's mean by more
    than a standard deviation and by at least a tenth of full scale, and above the visible one: a
    person, a warm engine. Lamps, bright in both, stay out, and so does the grain of a flat patch.
    """
    smooth = gaussian_blur(infrared, 1.5)
    above = smooth - infrared.mean(dim=(2, 3), keepdim=True)
    deviation = infrared.std(dim=(2, 3), keepdim=True)
    hot = above > deviation.clamp_min(0.1)
    return (hot & (smooth > gaussian_blur(visible, 1.5))).to(infrared)
