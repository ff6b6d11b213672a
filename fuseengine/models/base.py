"""What every fusion network is to the rest of the engine."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor, fx, nn

from fuseengine.errors import SettingError
from fuseengine.models.pictures import Padding, check_pictures, pad_picture


class FusionModel(nn.Module):
    """Base class: ``forward(a, b) -> fused``, floats in [0, 1], (N, C, H, W).

    A model that draws random numbers takes them by name as a third argument, ``noise``; what is not
    given there is drawn from the seed's streams (:class:`~fuseengine.models.sampling.Draws`).

    A subclass says on which image channels it works, which submodules are stages (dense networks
    that a backend lowers as a whole) and what its sizes must be a multiple of. It knows nothing of
    engines.
    """

    channels: ClassVar[Literal["luma", "rgb"]] = "luma"
    """``luma``: (N, 1, H, W), the visible image's chroma is kept; ``rgb``: (N, 3, H, W)."""

    stages: tuple[str, ...] = ()
    """Names of the submodules that are stages; empty: the whole model is one stage."""

    multiple: int = 1
    """Height and width that the networks take are multiples of this; others are padded."""

    padding: Padding = "reflect"
    """What stands right of and below a picture that is padded."""

    steps: int = 1
    """Sampling steps of one forward."""

    resumed_steps: int = 0
    """Steps of :meth:`resume` that are enough; 0: the model cannot resume."""

    seed: int = 0
    """Of the random numbers that one forward draws."""

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

    def resume(self, a: Tensor, b: Tensor, previous: Tensor, *, steps: int) -> Tensor:
        """Fuse a video's next pair in fewer steps, from what the frame before became.

        Args:
            a: source a, as ``forward`` takes it.
            b: source b, likewise.
            previous: the fused image of the frame before, as ``forward`` gives it.
            steps: how many of the sampling steps, the last ones, are done.

        Raises:
            SettingError: the model cannot resume, or not in so many steps.
        """
        raise SettingError(
            f"{self.name or type(self).__name__} cannot start from the frame before: it does not "
            "sample from noise around a picture; leave temporal away, or use a model that does: "
            "mask-difuser"
        )

    def prepare(self, *pictures: Tensor) -> list[Tensor]:
        """Pictures as the networks take them: with their planes, padded to the multiple.

        Raises:
            FrameError: a picture in another form than ``forward`` takes.
            SizeMismatchError: they differ in size.
        """
        if isinstance(pictures[0], fx.Proxy):  # capture gives frames that are ready
            return list(pictures)
        planes = 3 if self.channels == "rgb" else 1
        check_pictures(pictures, planes)
        return [pad_picture(x, planes, self.multiple, self.padding) for x in pictures]
