"""DMNet: counts of the paper, its layers' properties, and what its settings promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fuseengine as fe
from fuseengine.errors import SettingError
from fuseengine.models.dmnet import (
    Bottleneck,
    ChannelSpatialAttention,
    DenseInvertibleBlock,
    InvertibleLayer,
    Latent,
)
from tests.models.tools import operations

TINY = {
    "width": 8,
    "layers": (2, 2, 1),
    "heads": 2,
    "unet_width": 4,
    "multipliers": (1, 2, 2),
    "blocks": 1,
    "groups": 2,
}


def count(module):
    return sum(p.numel() for p in module.parameters())


def pair(height, width, batch=1):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(2, batch, 1, height, width, generator=generator).unbind()


class TestCounts:
    def test_full_size_is_the_papers(self):
        with torch.device("meta"):
            model = fe.build("dmnet")
        assert count(model.unet) + count(model.time) == 370_058_882
        assert count(model) == 385_804_684  # printed: 386.358 M
        assert abs(count(model) / 386.358e6 - 1) < 0.03

    def test_parts(self):
        assert count(InvertibleLayer(64)) == 18_176
        assert count(ChannelSpatialAttention(64)) == 610

    def test_small_fits_an_edge_device(self):
        with torch.device("meta"):
            model = fe.build("dmnet-s")
            level = torch.zeros(1)
            a = b = torch.zeros(1, 1, 480, 640)
            noise = {f"level_t{t}": level for t in model.times}
            noise |= {f"noise_t{t}": torch.zeros(1, 2, 240, 320) for t in model.times}
            total, _ = operations(model, a, b, noise)
        assert count(model) <= 4e6
        assert total <= 120e9


class TestLayers:
    def test_invertible_layer_is_inverted(self):
        torch.manual_seed(0)
        layer = InvertibleLayer(8).double()
        x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
        torch.testing.assert_close(layer.inverse(layer(x)), x)

    def test_dense_block_is_the_mean_of_its_layers(self):
        block = DenseInvertibleBlock(8, layers=3).double()
        x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
        first = block.layers[0](x)
        second = block.layers[1](first)
        third = block.layers[2](second)
        torch.testing.assert_close(block(x), (first + second + third) / 3)

    def test_bottleneck_reflects_its_border(self):
        layer = Bottleneck(4).double()
        x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
        inside = F.relu6(layer.widen(x))
        padded = F.pad(inside, (1, 1, 1, 1), mode="reflect")
        expected = layer.narrow(F.relu6(layer.mix(padded)))
        torch.testing.assert_close(layer(x), expected)

    def test_latent_is_one_convolution_over_the_concatenation(self):
        """Exactly so for maps of one size; smaller ones are enlarged afterwards."""
        torch.manual_seed(0)
        latent = Latent([3, 5], [1, 1], 4).double()
        maps = [torch.randn(1, c, 6, 7, dtype=torch.float64) for c in (3, 5)]
        weight = torch.cat([part.weight for part in latent.parts], dim=1)
        expected = F.conv2d(torch.cat(maps, dim=1), weight, latent.bias, padding=1)
        torch.testing.assert_close(latent(*maps), expected)

    def test_latent_enlarges_small_maps(self):
        latent = Latent([3, 5], [1, 4], 4)
        assert latent(torch.randn(2, 3, 8, 12), torch.randn(2, 5, 2, 3)).shape == (2, 4, 8, 12)


class TestModel:
    @pytest.mark.parametrize("size", [(16, 24), (17, 9), (30, 44)])
    def test_any_size(self, size):
        model = fe.build("dmnet", **TINY)
        with torch.no_grad():
            fused = model(*pair(*size))
        assert fused.shape == (1, 1, *size)
        assert fused.min() >= 0 and fused.max() <= 1

    def test_same_seed_same_picture(self):
        model, (a, b) = fe.build("dmnet", **TINY), pair(16, 16)
        with torch.no_grad():
            first, second = model(a, b), model(a, b)
            model.seed = 1
            other = model(a, b)
        assert torch.equal(first, second)
        assert not torch.equal(first, other)

    def test_noise_can_be_handed_in(self):
        model, (a, b) = fe.build("dmnet", times=(5,), **TINY), pair(16, 16)
        level = torch.tensor([0.97])
        noise = {"noise_t5": torch.randn(1, 2, 16, 16), "level_t5": level}
        seen = []
        handle = model.unet.register_forward_pre_hook(lambda _, given: seen.append(given))
        with torch.no_grad():
            model(a, b, noise)
            base = [model.encoder(x)[0] for x in (a, b)]
            x = model.compress(torch.cat(base, dim=1))
            shifts = model.time(level)
        handle.remove()
        torch.testing.assert_close(
            seen[0][0], 0.97 * x + (1 - 0.97**2) ** 0.5 * noise["noise_t5"], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(seen[0][1], shifts)

    def test_every_parameter_learns_in_one_of_the_stages(self):
        torch.manual_seed(0)
        model = fe.build("dmnet", **TINY).train()
        a, b = pair(16, 16)
        model(a, b).square().mean().backward()
        idle = {n for n, p in model.named_parameters() if p.grad is None}
        # The denoiser's own result is trained by the noise loss alone.
        assert idle == {f"unet.{n}.{k}" for n in ("norm", "head") for k in ("weight", "bias")}

    def test_reconstruction_needs_one_picture(self):
        model, (a, _) = fe.build("dmnet", **TINY), pair(16, 24)
        assert model.reconstruct(a).shape == a.shape

    @pytest.mark.parametrize(
        "settings", [{"times": ()}, {"times": (0,)}, {"heads": 3}, {"width": 0}, {"patch": 0}]
    )
    def test_refused_settings(self, settings):
        with pytest.raises(SettingError, match="expected"):
            fe.build("dmnet", **{**TINY, **settings})
