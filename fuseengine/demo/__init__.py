"""A small infrared/visible pair of the project's own making, for first steps and tests."""

from __future__ import annotations

from importlib import resources

import numpy as np
from numpy.typing import NDArray


def demo_pair() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The packaged pair: a street at dusk, 480x640, registered.

    Returns:
        infrared: uint8 (480, 640), bright is warm.
        visible: uint8 (480, 640, 3), sRGB.
    """
    from PIL import Image

    pair = []
    for name in ("infrared.png", "visible.png"):
        with resources.files(__package__).joinpath(name).open("rb") as file:
            pair.append(np.asarray(Image.open(file)))
    return pair[0], pair[1]
