"""What several test files need: reference data, small models with random weights, distances."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]

BLOCK_TORCH = "import sys; sys.modules['torch'] = None\n"
"""Put before a script: ``import torch`` fails in it as on a machine without PyTorch."""


def shared_path(*parts):
    """A path in the project's reference data; the test is skipped where it is absent."""
    chosen = os.environ.get("FUSEENGINE_SHARED")
    root = Path(chosen) if chosen else ROOT.parent / "shared"
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs reference data {'/'.join(parts)}; FUSEENGINE_SHARED names its folder")
    return path


def load_golden(*parts):
    """Arrays of a golden file by name, and its config."""
    with np.load(shared_path("reference", *parts)) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return arrays, json.loads(str(arrays.pop("config")))


def load_fill():
    """The module that fills parameters from their names."""
    spec = importlib.util.spec_from_file_location("fill", shared_path("reference", "fill.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def randomise(model, seed=0):
    """Random weights in place, norms and biases too, so that no layer is an identity by chance."""
    import torch

    # Models this small only lose by more threads, and a busy machine makes them lose much.
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("alpha"):
                parameter.copy_(0.5 + 0.1 * noise.clamp(-2, 2))
            elif parameter.ndim <= 1:
                parameter.copy_((1.0 if name.endswith("weight") else 0.0) + 0.1 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def tiny(name="drfusion-s", *, seed=0, **settings):
    """A model of a family at an eighth of its size or less, with random weights."""
    import fuseengine as fe

    return randomise(fe.build(name, **{"width": 8, "groups": 4, **settings}), seed)


TINY = {
    "drfusion": {"width": 8, "blocks": 1, "groups": 4},
    "drfusion-s": {"width": 8, "groups": 4},
    "dmfuse": {
        "width": 8,
        "multipliers": (1, 2, 2),
        "blocks": 1,
        "groups": 2,
        "head_width": 8,
        "attention": (2,),
    },
    "dmfuse-s": {"width": 8, "multipliers": (1, 1, 2), "groups": 2, "head_width": 8},
    "drmf": {
        "width": 8,
        "weight_width": 8,
        "multipliers": (1, 2, 2),
        "blocks": 1,
        "groups": 2,
    },
    "drmf-s": {"width": 8, "weight_width": 8, "multipliers": (1, 1, 2), "groups": 2},
    "dmnet": {
        "width": 8,
        "layers": (2, 2, 1),
        "heads": 2,
        "unet_width": 4,
        "multipliers": (1, 2, 2),
        "blocks": 1,
        "groups": 2,
    },
    "dmnet-s": {
        "width": 8,
        "layers": (2, 1, 1),
        "heads": 2,
        "unet_width": 4,
        "multipliers": (1, 2, 2),
        "groups": 2,
    },
    "mask-difuser": {
        "width": 8,
        "content_width": 4,
        "content_blocks": 1,
        "semantic_widths": (8, 8),
        "semantic_layers": 1,
        "multipliers": (1, 1, 2),
        "blocks": 1,
        "groups": 2,
    },
    "mask-difuser-s": {
        "width": 8,
        "content_width": 4,
        "content_blocks": 1,
        "semantic_widths": (8, 8, 8),
        "semantic_layers": 1,
        "multipliers": (1, 1, 2),
        "attention": (2,),
        "groups": 2,
    },
}
"""Settings that make every system so small that a test can afford it, with all its parts."""


def system(name, *, seed=0, **settings):
    """A system of :data:`TINY` with random weights."""
    return tiny(name, seed=seed, **{**TINY[name], **settings})


def pictures_for(model, size, *, batch=1, seed=0):
    """A pair (N, C, H, W) with the planes that a model takes; colours differ."""
    import torch

    if model.channels == "luma":
        return picture_pair(size, batch=batch, seed=seed)
    planes = [picture_pair(size, batch=batch, seed=seed + i) for i in range(3)]
    return tuple(torch.cat(parts, dim=1) for parts in zip(*planes, strict=True))


def picture_pair(size, *, batch=1, seed=0):
    """Two smooth random pictures in [0, 1] as float32 tensors (N, 1, H, W)."""
    import torch

    rng = np.random.default_rng(seed)
    coarse = rng.random((2, batch, 1, 6, 7))
    pair = []
    for picture in torch.from_numpy(coarse).float():
        smooth = torch.nn.functional.interpolate(picture, size, mode="bicubic")
        pair.append((smooth + 0.02 * torch.from_numpy(rng.normal(size=smooth.shape))).clamp(0, 1))
    return tuple(picture.float() for picture in pair)


def psnr(x, y):
    """Peak signal-to-noise ratio in dB for a peak of 1."""
    square = float(np.mean((np.asarray(x, np.float64) - np.asarray(y, np.float64)) ** 2))
    return float("inf") if square == 0 else -10 * np.log10(square)


def run_python(script, *, timeout=120, **environment):
    """Run a script in a fresh interpreter and return its standard output; a failure is shown."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
