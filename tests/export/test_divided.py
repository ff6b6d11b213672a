"""Convolutions whose results are split: one per part, the same numbers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from fuseengine.export.onnx import stage_to_onnx
from fuseengine.models.transformer import GatedFeedForward
from tests.helpers import randomise


class Parts(nn.Module):
    """Layers, then what is made of the parts of their result."""

    def __init__(self, *layers, chunks=2, dim=1, also=False):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.chunks, self.dim, self.also = chunks, dim, also

    def forward(self, x):
        y = self.layers(x)
        if self.chunks == 2:
            a, b = y.chunk(2, dim=self.dim)
            made = torch.tanh(a), torch.sigmoid(b)
        else:
            a, b, c = y.chunk(3, dim=self.dim)
            made = torch.tanh(a), torch.sigmoid(b), c
        return (*made, y) if self.also else made


def check(module, channels=6, *, rows=10):
    """Operators of the network, which gives what the module gives."""
    module = randomise(module.eval())
    x = torch.randn(2, channels, rows, 12)
    with torch.no_grad():
        expected = module(x)
    if isinstance(expected, torch.Tensor):
        expected = (expected,)
    model = stage_to_onnx(
        module,
        [("x", (2, channels, "h", "w"))],
        [(f"y{i}", (2, e.shape[1], "h2", "w2")) for i, e in enumerate(expected)],
        fallback=False,
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for got, wanted in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=2e-6)
    used = {name for node in model.graph.node for name in node.input}
    assert {i.name for i in model.graph.initializer} <= used  # the whole's weights are gone
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunks", [2, 3])
def test_a_convolution(bias, chunks):
    ops = check(Parts(nn.Conv2d(6, 12, 3, padding=1, stride=2, bias=bias), chunks=chunks))
    assert ops["Conv"] == chunks and ops["Split"] == 0


def test_a_depthwise_one_with_the_one_before():
    before, depthwise = nn.Conv2d(6, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
    ops = check(Parts(before, depthwise, chunks=3))
    assert ops["Conv"] == 6 and ops["Split"] == 0
    twice = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
    ops = check(Parts(before, depthwise, twice))
    assert ops["Conv"] == 6 and ops["Split"] == 0


def test_a_gated_layer():
    ops = check(GatedFeedForward(6, 2.66))
    assert ops["Conv"] == 5 and ops["Split"] == 0


def test_one_network_has_many():
    ops = check(nn.Sequential(*(GatedFeedForward(6, 2.0) for _ in range(3))))
    assert ops["Conv"] == 15 and ops["Split"] == 0


@pytest.mark.parametrize(
    "module",
    [
        Parts(nn.Conv2d(6, 8, 1), also=True),  # somebody reads all of it
        Parts(nn.Conv2d(6, 8, 1), dim=2),  # not by channels
        Parts(nn.Conv2d(6, 7, 1)),  # 4 and 3 channels
        Parts(nn.Conv2d(6, 8, 1, groups=2)),  # groups, but not depthwise
        Parts(nn.Conv2d(6, 6, 3, groups=6)),  # depthwise, of what no convolution makes
        Parts(nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6)),
        Parts(nn.Conv2d(6, 12, 1), nn.Conv2d(12, 24, 3, groups=12)),  # two per channel
        Parts(nn.Conv2d(6, 8, 1), nn.SiLU()),
    ],
)
def test_left_as_it_is(module):
    ops = check(module)
    convolutions = [layer for layer in module.layers if isinstance(layer, nn.Conv2d)]
    assert ops["Split"] == 1 and ops["Conv"] == len(convolutions)
