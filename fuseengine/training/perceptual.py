"""Distance of pictures in the features of VGG16, where torchvision and its weights are at hand.

Nothing is downloaded. The weights are looked for where torchvision keeps them
(``torch.hub.get_dir()/checkpoints/vgg16-*.pth``).

Source: Johnson, Alahi, Fei-Fei, "Perceptual losses for real-time style transfer and
super-resolution", ECCV 2016; Simonyan and Zisserman, ICLR 2015 (VGG).
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

_LAYERS = (3, 8, 15)
"""ReLU 1_2, 2_2 and 3_3 of ``vgg16().features``."""
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the pictures that torchvision's networks were trained on."""


class Perceptual(nn.Module):
    """Mean absolute difference of three feature maps, summed.

    Args:
        features: the layers of ``vgg16().features``.
    """

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.ModuleList(list(features)[: _LAYERS[-1] + 1])
        # A ReLU in place would change what was kept before it.
        for layer in self.layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None])
        self.register_buffer("deviation", torch.tensor(_DEVIATION)[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two (N, 3, H, W) in [0, 1] -> 0-d; gradients flow into x."""
        x, y = (x - self.mean) / self.deviation, (y - self.mean) / self.deviation
        total = x.new_zeros(())
        for index, layer in enumerate(self.layers):
            x, y = layer(x), layer(y)
            if index in _LAYERS:
                total = total + (x - y).abs().mean()
        return total


@lru_cache(maxsize=1)
def perceptual_loss() -> Perceptual | None:
    """The loss, or None with one warning that says what is missing."""
    try:
        from torchvision.models import VGG16_Weights, vgg16
    # One that was built for another PyTorch is found and fails when its operators are registered.
    except (ImportError, RuntimeError, OSError) as error:
        _say_left_out(f"torchvision cannot be imported ({error})")
        return None
    name = Path(VGG16_Weights.IMAGENET1K_V1.url).name
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not file.is_file():
        _say_left_out(f"{file} is not there")
        return None
    network = vgg16()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return Perceptual(network.features)


def _say_left_out(reason: str) -> None:
    warnings.warn(
        f"training without the perceptual term: {reason}; install torchvision and call "
        "torchvision.models.vgg16(weights='IMAGENET1K_V1') once to have it",
        stacklevel=3,
    )
