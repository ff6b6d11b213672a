"""Mask-DiFuser: counts of the reading, its parts' equations, and what its settings promise."""

from __future__ import annotations

import pytest
import torch

import fuseengine as fe
from fuseengine.errors import SettingError
from fuseengine.models.mask_difuser import ContentEncoder, FeatureMixer, SemanticEncoder
from tests.models.tools import operations

TINY = {
    "width": 8,
    "content_width": 4,
    "content_blocks": 1,
    "semantic_widths": (4, 8),
    "semantic_layers": 1,
    "multipliers": (1, 1, 2),
    "blocks": 1,
    "groups": 2,
}


def count(module):
    return sum(p.numel() for p in module.parameters())


def pair(height, width, channels=(3, 3), batch=1):
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(batch, c, height, width, generator=generator) for c in channels]


class TestCounts:
    @pytest.mark.parametrize(
        ("semantic", "expected"), [("budget", 171_278_145), ("lean", 84_764_723)]
    )
    def test_full_size(self, semantic, expected):
        with torch.device("meta"):
            model = fe.build("mask-difuser", semantic=semantic)
        assert count(model) == expected
        if semantic == "budget":
            assert abs(count(model) / 171.26e6 - 1) < 0.03  # printed

    def test_content_encoder(self):
        encoder = ContentEncoder(64, 128, blocks=4, patch=1)
        assert count(encoder) - count(encoder.hint) == 1_119_728

    def test_semantic_encoder(self):
        encoder = SemanticEncoder((64, 128), 4, coarse=None, out=128, groups=32)
        assert count(encoder) == 917_056

    def test_small_fits_an_edge_device(self):
        with torch.device("meta"):
            model = fe.build("mask-difuser-s")
            a = b = torch.zeros(1, 3, 480, 640)
            names = ["x_T", *(f"z_t{step.t}" for step in model.schedule()[:-1])]
            noise = {name: torch.zeros(1, 3, 480, 640) for name in names}
            total, _ = operations(model, a, b, noise)
        assert count(model) <= 4e6
        assert total <= 120e9


class TestParts:
    def test_feature_mixer(self):
        torch.manual_seed(0)
        mixer = FeatureMixer(6, 2).double()
        x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
        channel = mixer.channel(x.mean((2, 3), keepdim=True)).expand_as(x)
        torch.testing.assert_close(mixer(x), x * (1 + torch.sigmoid(channel + mixer.pixel(x))))

    def test_hint_is_the_other_half_of_one_convolution(self):
        """conv[head]([conv x, F_f]) = stem(x) + hint: what the reading says."""
        torch.manual_seed(0)
        model = fe.build("mask-difuser", **TINY).double()
        x, a, b = (t.double() for t in pair(16, 16, (3, 3, 3)))
        content = model.content
        both = torch.cat([content.extract(a), content.extract(b)], dim=1)
        features = content.reinforce(content.mix(both))
        first, head = model.unet.stem
        weight = torch.cat([head.weight, content.hint.weight], dim=1)
        together = torch.cat([first(x), features], dim=1)
        expected = torch.nn.functional.conv2d(together, weight, head.bias, padding=1)
        torch.testing.assert_close(model.unet.stem(x) + content(a, b), expected)

    def test_both_resolutions_of_the_large_preset(self):
        encoder = SemanticEncoder((8, 16), 1, coarse=(24, 1), out=8, groups=4)
        assert encoder(torch.randn(1, 3, 32, 16)).shape == (1, 8, 8, 4)


class TestModel:
    @pytest.mark.parametrize("size", [(16, 32), (17, 9), (30, 44)])
    @pytest.mark.parametrize("channels", [(3, 3), (1, 3)])
    def test_any_size_gray_or_colour(self, size, channels):
        model = fe.build("mask-difuser", **TINY)
        with torch.no_grad():
            fused = model(*pair(*size, channels))
        assert fused.shape == (1, 3, *size)
        assert fused.min() == 0 and fused.max() == 1  # stretched over the whole picture

    def test_clamping_keeps_the_range(self):
        model = fe.build("mask-difuser", **TINY, scaling="clamp", predict="clean")
        with torch.no_grad():
            fused = model(*pair(16, 16))
        assert fused.min() >= 0 and fused.max() <= 1

    def test_ancestral_steps_follow_the_equation(self):
        """x <- sqrt(a') x0 + sqrt(1 - a' - s^2) e + s z with eta = 1."""
        model = fe.build("mask-difuser", **TINY, steps=2).double()
        a, b = (t.double() for t in pair(16, 16))
        generator = torch.Generator().manual_seed(0)
        x, z = torch.randn(2, 1, 3, 16, 16, generator=generator, dtype=torch.float64)
        first, last = model.schedule()
        with torch.no_grad():
            found = model.sample(a, b, {"x_T": x, f"z_t{first.t}": z})
            sources = model.sources(a, b)
            now, then = first.sqrt_abar**2, first.sqrt_abar_prev**2
            s = ((1 - now / then) * (1 - then) / (1 - now)) ** 0.5
            eps = model.unet(x, model.time(first.t), *sources)
            x0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
            x = then**0.5 * x0 + (1 - then - s * s) ** 0.5 * eps + s * z
            eps = model.unet(x, model.time(last.t), *sources)
            x = (x - last.sqrt_one_minus_abar * eps) / last.sqrt_abar
        torch.testing.assert_close(found, x)

    def test_predicting_the_picture_is_predicting_its_noise(self):
        model = fe.build("mask-difuser", **TINY, predict="clean").double()
        a, b = (t.double() for t in pair(16, 16))
        step = model.schedule()[1]
        x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
        with torch.no_grad():
            sources = model.sources(a, b)
            clean = model.unet(x, model.time(step.t), *sources)
            eps = model.noise(x, step, *sources)
        torch.testing.assert_close(step.sqrt_abar * clean + step.sqrt_one_minus_abar * eps, x)

    def test_every_parameter_learns(self):
        torch.manual_seed(0)
        model = fe.build("mask-difuser", **TINY).train()
        model.sample(*pair(16, 16)).square().mean().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None]

    @pytest.mark.parametrize(
        "settings",
        [{"predict": "x"}, {"scaling": "x"}, {"semantic": "x"}, {"eta": 2.0}, {"steps": 0}],
    )
    def test_refused_settings(self, settings):
        with pytest.raises(SettingError, match="expected"):
            fe.build("mask-difuser", **{**TINY, **settings})
