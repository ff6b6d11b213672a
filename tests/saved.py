"""A little model whose bundle is a few dozen kilobytes, and what is recorded of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import fuseengine as fe
from tests.helpers import randomise

SIZE = (22, 30)
DATA = Path(__file__).parent / "data"


def frames(size=SIZE, seed=0):
    """A pair of 8-bit frames, (H, W) and (H, W, 3)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, size, np.uint8), rng.integers(0, 256, (*size, 3), np.uint8)


def little_model(seed=0):
    """Two networks, one of which is called with and without its second result; ops; a constant."""
    import torch
    from torch import nn

    from fuseengine import kernels

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.body = nn.Conv2d(8, 8, 3, padding=1)
            self.norm = nn.GroupNorm(2, 8)
            self.noise = nn.Conv2d(8, 1, 1)
            self.weight = nn.Conv2d(8, 1, 1)

        def forward(self, x):
            h = torch.nn.functional.silu(self.norm(self.body(self.stem(x))))
            return self.noise(h), torch.sigmoid(self.weight(h))

    class Little(fe.FusionModel):
        stages = ("net", "last")
        multiple = 4

        def __init__(self):
            super().__init__()
            self.net = Network()
            self.last = nn.Conv2d(2, 1, 3, padding=1)
            self.register_buffer("level", torch.tensor([[[[0.5]]]]))

        def forward(self, a, b):
            return self.sampled(a, b, (a + b) * self.level, 2)

        def resume(self, a, b, previous, *, steps):
            return self.sampled(a, b, previous, steps)

        def sampled(self, a, b, fused, steps):
            for now, before in ((0.6, 0.8), (0.8, 0.96))[-steps:]:
                eps, weight = self.net(torch.cat([a, b, fused], dim=1))
                scales = (now, (1 - now**2) ** 0.5, before, (1 - before**2) ** 0.5)
                fused = kernels.ddim_step(fused, eps * 0.1, *scales)
                fused = weight * fused + (1.0 - weight) * a
            eps, _ = self.net(torch.cat([a, b, fused], dim=1))
            return self.last(torch.cat([fused, eps], dim=1)).clamp(0.0, 1.0)

    model = randomise(Little(), seed)
    model.name = "little"
    return model


def little_engine(size=SIZE, **options):
    """The little model as an engine of ONNX Runtime in float32."""
    given = {"backend": "onnxruntime", "precision": "fp32", "threads": 1, "cache": False}
    return fe.compile(little_model(), size, **{**given, **options})


def main():
    """Write the bundle that later versions must still read, and its picture: once per schema."""
    from PIL import Image

    from fuseengine.runtime.bundle import SCHEMA

    DATA.mkdir(exist_ok=True)
    engine = little_engine(temporal="warm", warm_steps=1)
    engine.save(DATA / f"schema-{SCHEMA}.fuse")
    Image.fromarray(engine(*frames())).save(DATA / f"schema-{SCHEMA}.png")


if __name__ == "__main__":
    main()
