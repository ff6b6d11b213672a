"""A small infrared/visible pair of the project's own making, for first steps and tests."""

from __future__ import annotations

from importlib import resources

import numpy as np
from numpy.typing import NDArray


def demo_pair(
    size: tuple[int, int] = (480, 640),
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The packaged pair: a street at dusk, registered.

    Args:
        size: (height, width); other sizes than its own are resampled (bilinear).

    Returns:
        infrared: uint8 (height, width), bright is warm.
        visible: uint8 (height, width, 3), sRGB.
    """
    from PIL import Image

    pair = []
    for name in ("infrared.png", "visible.png"):
        with resources.files(__package__).joinpath(name).open("rb") as file:
            image: Image.Image = Image.open(file)
            if image.size != size[::-1]:
                image = image.resize(size[::-1], Image.Resampling.BILINEAR)
            pair.append(np.asarray(image))
    return pair[0], pair[1]
