"""Compile a network of your own: one stage, or a loop around stages.

python examples/own_model.py
"""

import torch
from torch import nn

import fuseengine as fe


class OneNetwork(nn.Module):
    """Any module with forward(a, b) -> fused, (N, 1, H, W) in [0, 1], is one stage."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1)
        )

    def forward(self, a, b):
        return torch.sigmoid(self.body(torch.cat([a, b], dim=1)))


class Iterated(fe.FusionModel):
    """Named stages make the loop a program: one network, lowered once, called thrice."""

    stages = ("net",)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, a, b):
        fused = (a + b) * 0.5
        for _ in range(3):
            fused = fused + self.net(torch.cat([a, b, fused], dim=1)) * 0.1
        return fused.clamp(0.0, 1.0)


infrared, visible = fe.demo_pair()
for model in (OneNetwork().eval(), Iterated().eval()):
    engine = fe.compile(model, size=visible.shape[:2])
    print(engine.program)
    print(engine.report)
    print(engine(infrared, visible).shape)
