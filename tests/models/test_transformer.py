"""Restormer's layer against its equations, written out per pixel and per head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fuseengine.models.transformer import ChannelAttention, ChannelNorm, TransformerLayer


def test_channel_norm_is_layer_norm_of_every_pixel():
    norm = ChannelNorm(6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6))
        norm.bias.copy_(torch.randn(6))
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    expected = F.layer_norm(x.permute(0, 2, 3, 1), (6,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(x), expected.permute(0, 3, 1, 2))


def test_attention_mixes_channels_within_a_head():
    torch.manual_seed(0)
    layer = ChannelAttention(8, 2).double()
    with torch.no_grad():
        layer.temperature.copy_(torch.tensor([1.5, 0.3]).reshape(2, 1, 1))
    x = torch.randn(1, 8, 4, 3, dtype=torch.float64)
    q, k, v = layer.mix(layer.qkv(x))[0].flatten(1).split(8)
    parts = []
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        a, b = (t[rows] / t[rows].norm(dim=1, keepdim=True) for t in (q, k))
        parts.append(torch.softmax(a @ b.T * layer.temperature[head], dim=1) @ v[rows])
    expected = layer.out(torch.cat(parts).reshape(1, 8, 4, 3))
    torch.testing.assert_close(layer(x), expected)


def test_parameters_as_in_cddfuse():
    assert sum(p.numel() for p in TransformerLayer(64, 8, 2.0).parameters()) == 45_256
