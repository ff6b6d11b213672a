"""What every fusion network is to the rest of the engine."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor, nn


class FusionModel(nn.Module):
    """Base class: ``forward(a, b) -> fused``, floats in [0, 1], (N, C, H, W).

    A subclass says on which image channels it works, which submodules are stages (dense networks
    that a backend lowers as a whole) and what its sizes must be a multiple of. It knows nothing of
    engines.
    """

    channels: ClassVar[Literal["luma", "rgb"]] = "luma"
    """``luma``: (N, 1, H, W), the visible image's chroma is kept; ``rgb``: (N, 3, H, W)."""

    stages: ClassVar[tuple[str, ...]] = ()
    """Names of the submodules that are stages; empty: the whole model is one stage."""

    multiple: int = 1
    """Height and width must be multiples of this; frames are padded by reflection."""

    steps: int = 1
    """Sampling steps of one forward."""

    name: str = ""
    """Name it was built under, for reports; empty for a model of the user's own."""

    settings: dict[str, Any]
    """Keyword arguments it was built with, for checkpoints and reports."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = {}

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Fuse source a (infrared) and source b (visible)."""
        raise TypeError(f"{type(self).__name__} does not define forward(a, b)")
