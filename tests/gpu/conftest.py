"""Tests of this folder need a CUDA device; without one each is skipped, with the reason."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest


@functools.cache
def why_not() -> str:
    """Why these tests cannot run here; empty when they can."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device (no GPU, or no driver)"
    return ""


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if why_not():
                item.add_marker(pytest.mark.skip(reason=why_not()))


@pytest.fixture(scope="session")
def model():
    """drfusion-s on the CPU: the packaged weights, or random ones where none are packaged."""
    import torch

    import fuseengine as fe

    if "drfusion-s" in fe.packaged_models():
        return fe.load_model("drfusion-s")
    torch.manual_seed(0)
    return fe.build("drfusion-s")


@pytest.fixture(scope="session")
def make():
    """Compile for the GPU with eager PyTorch stages; nothing from the cache."""
    import fuseengine as fe

    def make(model, size, precision="fp32", **settings):
        chosen = {"device": "cuda", "backend": "torch", "cache": False, **settings}
        return fe.compile(model, size, precision=precision, **chosen)

    return make


@pytest.fixture
def pictures():
    """Smooth uint8 frames of a size: infrared (H, W), visible (H, W, 3)."""

    def pictures(size, seed=0):
        height, width = size
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width] / max(size)
        phase = rng.uniform(0, 6, 4)
        planes = [127 + 90 * np.sin(9 * x + p) * np.cos(7 * y - p) for p in phase]
        frames = np.stack(planes, axis=-1) + rng.normal(0, 6, (height, width, 4))
        frames = frames.clip(0, 255).astype(np.uint8)
        return np.ascontiguousarray(frames[..., 0]), np.ascontiguousarray(frames[..., 1:])

    return pictures
