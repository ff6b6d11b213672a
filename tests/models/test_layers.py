"""Layers and the U-Net, each variant against the same thing written out."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fuseengine.errors import SettingError
from fuseengine.models.layers import (
    BlockConv,
    ChannelSpatialGate,
    CrossAttention,
    KeysAndValues,
    ResidualBlock,
    SelfAttention,
    TimeShifts,
    attend,
    timestep_embedding,
)
from fuseengine.models.unet import ConditionedUNet, UNet
from tests.helpers import randomise


def close(one, two, tolerance=1e-12):
    torch.testing.assert_close(one, two, rtol=0, atol=tolerance)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestTime:
    @pytest.mark.parametrize("reach_max", [False, True])
    def test_layouts(self, reach_max):
        t, k = np.array([0.0, 3.0, 812.0]), 5
        f = 10_000.0 ** (-np.arange(k) / (k - 1 if reach_max else k))
        sin, cos = np.sin(t[:, None] * f), np.cos(t[:, None] * f)
        expected = {
            "cos-sin": np.concatenate([cos, sin], 1),
            "sin-cos": np.concatenate([sin, cos], 1),
            "interleaved": np.stack([sin, cos], 2).reshape(3, 2 * k),
        }
        for layout, array in expected.items():
            made = timestep_embedding(
                torch.from_numpy(t), 2 * k, layout=layout, reach_max=reach_max
            )
            close(made, torch.from_numpy(array))

    @pytest.mark.parametrize("activate", [True, False])
    def test_shifts(self, activate):
        time = randomise(
            TimeShifts(6, 10, [3, 5], out=4, layout="sin-cos", activate=activate)
        ).double()
        level = torch.tensor([0.3, 0.9], dtype=torch.float64)
        e = time.embed(timestep_embedding(level, 6, layout="sin-cos"))
        e = F.silu(e) if activate else e
        close(time(level), torch.cat([project(e) for project in time.project], 1))
        close(time(0.3), time(level[:1]))
        assert (
            time.embed[2].out_features == 4 and TimeShifts(6, 10, [3]).embed[2].out_features == 10
        )


class TestResidualBlock:
    @pytest.mark.parametrize("widths", [(8, 8), (8, 4)])
    def test_with_another_activation_and_epsilon(self, widths):
        block = ResidualBlock(*widths, groups=2, eps=0.5, activation=F.leaky_relu)
        block = randomise(block).double()
        x, shift = noise(2, 8, 5, 6), noise(1, widths[1])
        h = F.group_norm(x, 2, block.norm1.weight, block.norm1.bias, 0.5)
        h = block.conv1(F.leaky_relu(h)) + shift[:, :, None, None]
        h = F.group_norm(h, 2, block.norm2.weight, block.norm2.bias, 0.5)
        close(block(x, shift), block.shortcut(x) + block.conv2(F.leaky_relu(h)))


def attend_by_hand(q, k, v):
    scores = torch.einsum("nchw,ncyx->nhwyx", q, k) / q.shape[1] ** 0.5
    weights = scores.flatten(3).softmax(-1).reshape(scores.shape)
    return torch.einsum("nhwyx,ncyx->nchw", weights, v)


class TestAttention:
    def test_attend(self):
        q, k, v = noise(2, 6, 3, 4), noise(2, 6, 5, 2, seed=1), noise(2, 4, 5, 2, seed=2)
        close(attend(q, k, v), attend_by_hand(q, k, v))

    @pytest.mark.parametrize("bias", [True, False])
    def test_self_attention(self, bias):
        layer = randomise(SelfAttention(8, groups=4, bias=bias)).double()
        x = noise(2, 8, 3, 5)
        q, k, v = layer.qkv(layer.norm(x)).chunk(3, dim=1)
        close(layer(x), x + layer.out(attend_by_hand(q, k, v)))
        assert (layer.qkv.bias is None) is not bias

    def test_cross_attention_to_two_sources(self):
        """Keys and values of all attentions come from one projection, side by side."""
        layers = [randomise(CrossAttention(width, groups=4)).double() for width in (8, 12)]
        project = randomise(KeysAndValues(6, [8, 12])).double()
        one, two = (project(noise(1, 6, 2, 3, seed=seed)) for seed in (1, 2))
        for layer, start in zip(layers, (0, 16), strict=True):
            channels = layer.norm.num_channels
            x = noise(1, channels, 4, 5)
            part = slice(start, start + 2 * channels)
            q = layer.query(layer.norm(x))
            seen = [attend_by_hand(q, *s[:, part].chunk(2, dim=1)) for s in (one, two)]
            close(layer(x, one[:, part], two[:, part]), x + layer.out(torch.cat(seen, 1)))


class TestGate:
    def test_sum_of_channel_and_spatial(self):
        gate = randomise(ChannelSpatialGate(8, 2, combine="sum")).double()
        x = noise(2, 8, 4, 5)
        squeezed = F.relu(gate.squeeze(x.mean((2, 3), keepdim=True)))
        channel, spatial = torch.sigmoid(gate.excite(squeezed)), torch.sigmoid(gate.spatial(x))
        close(gate(x), x * channel + x * spatial)
        assert gate.squeeze.out_channels == 4


def test_block_convolution_is_one_over_pixels():
    """A 3x3 convolution over 2x2 blocks is a 6x6 convolution with stride 2."""
    layer = randomise(BlockConv(3, 5, patch=2)).double()
    weight = layer.conv.weight.reshape(5, 3, 2, 2, 3, 3).permute(0, 1, 4, 2, 5, 3)
    x = noise(1, 3, 8, 10)
    expected = F.conv2d(x, weight.reshape(5, 3, 6, 6), layer.conv.bias, stride=2, padding=2)
    close(layer(x), expected)


MULTIPLIERS = (1, 2, 3)


def small(cls=UNet, seed=0, **settings):
    settings = {"multipliers": MULTIPLIERS, "blocks": 2, "groups": 2, **settings}
    return randomise(cls(3, 2, 4, **settings), seed).double()


def shifts(unet):
    return noise(1, sum(unet.widths))


class TestUNet:
    @pytest.mark.parametrize("concat", [(0, 1, 2), (2,), ()])
    @pytest.mark.parametrize("down_padding", ["both", "after"])
    def test_against_the_network_written_out(self, concat, down_padding):
        unet = small(
            attention=partial(SelfAttention, groups=2),
            attention_levels=(1,),
            concat_levels=concat,
            down_padding=down_padding,
            eps=1e-3,
            activation=F.leaky_relu,
        )
        x, given = noise(2, 3, 8, 12), shifts(unet)
        parts = iter(given.split(unet.widths, dim=1))
        h = unet.stem(x)
        skips = [h]
        for i, level in enumerate(unet.down):
            for j in range(2):
                h = level.blocks[j](h, next(parts))
                h = level.attention[j](h) if i == 1 else h
                skips.append(h)
            if i < 2:
                wide = F.pad(h, (1, 1, 1, 1) if down_padding == "both" else (0, 1, 0, 1))
                h = F.conv2d(wide, level.resample.weight, level.resample.bias, stride=2)
                skips.append(h)
        h = unet.middle.blocks[0](h, next(parts))
        h = unet.middle.blocks[1](unet.middle.attention[0](h), next(parts))
        for i in (2, 1, 0):
            for j in range(3):
                skip = skips.pop()
                h = torch.cat([h, skip], 1) if i in concat else h
                h = unet.up[i].blocks[j](h, next(parts))
                h = unet.up[i].attention[j](h) if i == 1 else h
            if i:
                h = unet.up[i].resample(h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        close(unet(x, given), unet.head(F.leaky_relu(unet.norm(h))))
        assert not skips and next(parts, None) is None
        assert all(block.norm1.eps == 1e-3 for block in unet.blocks())
        assert len(list(unet.attentions())) == 2 + 1 + 3

    def test_taps_are_what_the_blocks_gave(self):
        unet = small(taps=[(i, j) for i in range(3) for j in range(3)])
        seen = {}
        for i, level in enumerate(unet.up):
            for j, block in enumerate(level.blocks):
                block.register_forward_hook(lambda m, a, o, at=(i, j): seen.update({at: o}))
        result, *taps = unet(noise(1, 3, 8, 8), shifts(unet))
        assert result.shape == (1, 2, 8, 8) and len(taps) == 9
        for at, tap in zip(unet.taps, taps, strict=True):
            assert torch.equal(tap, seen[at])
            assert tap.shape == (1, 4 * MULTIPLIERS[at[0]], 8 >> at[0], 8 >> at[0])

    @pytest.mark.parametrize("patch", [1, 2])
    def test_a_hint_is_what_the_first_convolution_saw_besides(self, patch):
        """The hinted network equals one whose stem sees both pictures at once."""
        hinted = small(ConditionedUNet, patch=patch)
        condition = randomise(BlockConv(5, 4, patch=patch, bias=False), 1).double()
        whole = small(patch=patch)
        both = torch.cat([condition.conv.weight, hinted.stem.conv.weight], dim=1)
        x, seen = noise(1, 3, 16, 8), noise(1, 5, 16, 8)
        whole.stem = nn.Conv2d(8, 4, 3, padding=1).double()
        whole.stem.weight.data, whole.stem.bias.data = both.data, hinted.stem.conv.bias.data
        blocks = [F.pixel_unshuffle(p, patch) if patch > 1 else p for p in (seen, x)]
        given = shifts(whole)
        close(
            hinted(x, given, condition(seen)),
            whole.denoise(whole.stem(torch.cat(blocks, dim=1)), given),
        )
        assert hinted.multiple == 4 * patch

    def test_every_attention_gets_its_context(self):
        unet = small(attention=partial(CrossAttention, groups=2, sources=1), attention_levels=(2,))
        widths = [a.norm.num_channels for a in unet.attentions()]
        assert widths == [12] * 6
        contexts = [(noise(1, 24, 2, 2, seed=seed),) for seed in range(6)]
        taken = []
        for attention in unet.attentions():
            attention.register_forward_hook(lambda m, i, o: taken.append(i[1]))
        unet.denoise(unet.stem(noise(1, 3, 8, 8)), shifts(unet), contexts)
        assert all(torch.equal(t, c) for t, (c,) in zip(taken, contexts, strict=True))

    def test_without_attention(self):
        assert list(small().attentions()) == []
        unet = small(attention=partial(SelfAttention, groups=2), attention_in_middle=False)
        assert list(unet.attentions()) == []

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"groups": 3}, r"groups=3, widths \(4, 4, 8, 12\); expected groups to divide"),
            ({"multipliers": (1, 0.1)}, "expected each >= 1"),
            ({"multipliers": ()}, "expected each >= 1"),
            ({"blocks": 0}, "blocks=0.*expected each >= 1"),
            ({"patch": 0}, "patch=0"),
        ],
    )
    def test_refused(self, settings, message):
        with pytest.raises(SettingError, match=message):
            small(**settings)
