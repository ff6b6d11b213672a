"""Pairs of frames as a program takes them: to check, time and verify engines on. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuseengine.program import Program
from fuseengine.runtime.frames import FrameAdapter, prepare_pair

Pair = tuple[NDArray[np.float32], NDArray[np.float32]]
"""The two sources, (1, C, H, W) in [0, 1], padded."""


def model_inputs(
    program: Program, size: tuple[int, int], examples: Iterable[tuple[Any, Any]]
) -> list[Pair]:
    """Frames as the program's inputs.

    Args:
        program: says planes, multiple and padding.
        size: height and width of the frames.
        examples: infrared and visible frames, or batches of them.

    Raises:
        FrameError: a frame that cannot be used, or of another size.
    """
    adapter = FrameAdapter(size, program.channels, program.multiple, program.padding)
    pairs = []
    for infrared, visible in examples:
        for ir, vis in prepare_pair(infrared, visible):
            a, b = np.empty((2, 1, adapter.planes, *adapter.padded), dtype=np.float32)
            adapter.load(ir, vis, a, b)
            pairs.append((a, b))
    return pairs
