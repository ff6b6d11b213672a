"""What every recipe is to the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fuseengine.errors import UnknownNameError
from fuseengine.training import losses


@dataclass(frozen=True)
class ExtraWeights:
    """Terms of this project that a published fusion loss can be given, by default without weight.

    A loss of max(a, b) and the strongest |grad| alone is least for the washed-out maximum.

    Attributes:
        selection: :func:`losses.gradient_selection`.
        correlation: :func:`losses.difference_correlation`.
        contrast: :func:`losses.lost_contrast`.
        invented: :func:`losses.invented_edges`.
        information: :func:`losses.lost_information`.
        range: :func:`losses.out_of_range`; for heads that are not bounded by themselves.
    """

    selection: float = 0.0
    correlation: float = 0.0
    contrast: float = 0.0
    invented: float = 0.0
    information: float = 0.0
    range: float = 0.0

    def terms(self, fused: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """The terms that have a weight, for luma pictures."""
        made = {}
        if self.selection:
            made["selection"] = self.selection * losses.gradient_selection(fused, a, b)
        if self.correlation:
            made["correlation"] = self.correlation * losses.difference_correlation(fused, a, b)
        if self.contrast:
            made["contrast"] = self.contrast * losses.lost_contrast(fused, a, b)
        if self.invented:
            made["invented"] = self.invented * losses.invented_edges(fused, a, b)
        if self.information:
            made["information"] = self.information * losses.lost_information(fused, a, b)
        if self.range:
            made["range"] = self.range * losses.out_of_range(fused)
        return made


COLOUR_TERMS = (
    "gradient",
    "correlation",
    "brightest",
    "chroma",
    "contrast",
    "invented",
    "information",
    "range",
)
"""Terms of :class:`ColourFusionWeights`."""


@dataclass(frozen=True)
class ColourFusionWeights:
    """Weights of this project's terms on fused colour pictures; Y is luma, C chroma.

    Attributes:
        gradient: :func:`losses.gradient_selection` of Y.
        correlation: :func:`losses.difference_correlation` of Y.
        brightest: :func:`losses.brightest` of Y.
        chroma: |C - :func:`losses.stronger_chroma`|, summed over both.
        contrast: :func:`losses.lost_contrast` of Y.
        invented: :func:`losses.invented_edges` of Y.
        information: :func:`losses.lost_information` of Y.
        range: :func:`losses.out_of_range`.
    """

    gradient: float = 0.4
    correlation: float = 0.2
    brightest: float = 0.3
    chroma: float = 2.0
    contrast: float = 0.2
    invented: float = 0.2
    information: float = 0.0
    range: float = 5.0

    def terms(
        self, fused: Tensor, a: Tensor, b: Tensor, names: Collection[str] = COLOUR_TERMS
    ) -> dict[str, Tensor]:
        """The weighted terms of some names, those without weight left out.

        Args:
            fused: (N, 3, H, W), in [0, 1] but for what ``range`` is to bring back.
            a: source A, (N, 3, H, W) in [0, 1].
            b: source B, likewise.
            names: some of :data:`COLOUR_TERMS`.
        """
        (y, chroma), (y_a, chroma_a), (y_b, chroma_b) = map(losses.to_ycbcr, (fused, a, b))
        wanted = losses.stronger_chroma(chroma_a, chroma_b)
        made: dict[str, Callable[[], Tensor]] = {
            "gradient": lambda: losses.gradient_selection(y, y_a, y_b),
            "correlation": lambda: losses.difference_correlation(y, y_a, y_b),
            "brightest": lambda: losses.brightest(y, y_a, y_b),
            "chroma": lambda: (chroma - wanted).abs().sum(1).mean(),
            "contrast": lambda: losses.lost_contrast(y, y_a, y_b),
            "invented": lambda: losses.invented_edges(y, y_a, y_b),
            "information": lambda: losses.lost_information(y, y_a, y_b),
            "range": lambda: losses.out_of_range(fused),
        }
        weights = {name: getattr(self, name) for name in names}
        return {name: weight * made[name]() for name, weight in weights.items() if weight}


class Recipe(ABC):
    """One stage of a system's training.

    Args:
        weights: weights of the loss's terms that replace :attr:`default`'s.

    Raises:
        UnknownNameError: a term that the recipe does not have.
    """

    stage: ClassVar[str]
    """Name of the stage."""

    layout: ClassVar[Literal["pairs", "pictures"]] = "pairs"
    """Whether an item of the data is a registered pair or a picture."""

    augment: ClassVar[bool] = False
    """Whether tone curves and grain of the patches are changed, see ``PatchSettings``."""

    smallest_patch: ClassVar[int] = 1
    """What a patch's side must be at least."""

    default: Any
    """Weights of the loss's terms, a dataclass."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        known = [field.name for field in fields(self.default)]
        for name in weights or ():
            if name not in known:
                raise UnknownNameError("loss term", name, known)
        self.weights = replace(self.default, **(weights or {}))

    @classmethod
    def suits(cls, model: Any) -> bool:
        """Whether the stage exists for a model of the family."""
        return True

    def initialise(self, model: Any) -> None:  # noqa: B027 (PyTorch's own start is good for many)
        """Prepare a model that has never been trained, in place, for this and later stages."""

    def trained(self, model: Any) -> list[nn.Module]:
        """The submodules that this stage trains; the others are frozen."""
        return [model]

    @abstractmethod
    def __call__(
        self, model: Any, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The weighted terms of the loss, 0-d tensors.

        Args:
            model: the model; its channels are the pictures'.
            pictures: clean patches (N, C, H, W) in [0, 1]: a and b, or one.
            generator: source of every draw, on the CPU.
        """

    @abstractmethod
    def show(
        self, model: Any, pictures: Sequence[Tensor], generator: torch.Generator
    ) -> list[Tensor]:
        """Columns of the grid to look at: (N, 1 or 3, H, W) in [0, 1]."""


def sometimes_grey(a: Tensor, b: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs (N, 3, H, W), a quarter of them without colour: two grey pictures make a grey one.

    Most visible pictures have colour, and a model that sees no others may give grey ones a tint.

    Args:
        a: source A in [0, 1].
        b: source B, likewise.
        generator: source of the draws, on the CPU.
    """
    grey = torch.rand(len(a), generator=generator).to(a).reshape(-1, 1, 1, 1) < 0.25
    (luma_a, _), (luma_b, _) = losses.to_ycbcr(a), losses.to_ycbcr(b)
    return torch.where(grey, luma_a, a), torch.where(grey, luma_b, b)


def zero_head(head: nn.Module) -> None:
    """Make a convolution answer 0."""
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
