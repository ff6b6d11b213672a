"""Timesteps, levels and noise of diffusion training; the perceptual loss."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch
from torch import nn

from fuseengine.models.sampling import cosine_schedule, linear_schedule
from fuseengine.training import perceptual
from fuseengine.training.diffusion import (
    antithetic_timesteps,
    levels_between,
    normal,
    random_levels,
    sqrt_abar,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_antithetic():
    for count in (1, 2, 5, 8):
        t = antithetic_timesteps(count, 1000, generator(count))
        assert t.shape == (count,) and t.min() >= 0 and t.max() <= 999
        half = count // 2 + 1
        assert torch.equal(t[half:], 999 - t[: count - half])
    source = generator()
    many = torch.cat([antithetic_timesteps(4, 10, source) for _ in range(400)])
    assert torch.bincount(many, minlength=10).min() > 100  # of 160


def test_sqrt_abar():
    table = linear_schedule(1000)
    like = torch.zeros(1)
    levels = sqrt_abar(table, torch.tensor([0, 999]), like)
    assert levels.dtype == torch.float32
    assert levels.tolist() == pytest.approx([(1 - 1e-4) ** 0.5, table[-1] ** 0.5], rel=1e-6)


def test_levels_lie_between_neighbours():
    table = cosine_schedule(2000)
    like = torch.zeros(1, dtype=torch.float64)
    steps = torch.tensor([1, 5, 50, 1000, 2000])
    for seed in range(10):
        levels = levels_between(table, steps, generator(seed), like)
        for level, step in zip(levels.tolist(), steps.tolist(), strict=True):
            assert table[step] ** 0.5 <= level <= table[step - 1] ** 0.5
    drawn = random_levels(table, torch.zeros(500, 1), generator())
    assert drawn.shape == (500,) and drawn.min() < 0.1 and drawn.max() > 0.99


def test_normal():
    x = normal(torch.zeros(2, 3, 20, 20, dtype=torch.float64), generator())
    assert x.dtype == torch.float64 and abs(float(x.mean())) < 0.1
    assert float(x.std()) == pytest.approx(1, abs=0.1)


class TestPerceptual:
    @pytest.fixture(autouse=True)
    def forget(self):
        perceptual.perceptual_loss.cache_clear()
        yield
        perceptual.perceptual_loss.cache_clear()

    def test_says_once_what_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision", None)
        monkeypatch.setitem(sys.modules, "torchvision.models", None)
        with pytest.warns(UserWarning, match="without the perceptual term: torchvision cannot"):
            assert perceptual.perceptual_loss() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert perceptual.perceptual_loss() is None

    def test_weights_at_hand(self, monkeypatch, tmp_path):
        """A stand-in for torchvision: the same layers as VGG16's first sixteen, but narrow."""

        def vgg16():
            torch.manual_seed(3)
            layers, before = [], 3
            for width in (4, 4, 0, 8, 8, 0, 8, 8, 8):
                if not width:
                    layers.append(nn.MaxPool2d(2))
                    continue
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
            network = nn.Module()
            network.features = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Conv2d(8, 8, 3))
            return network

        models = types.ModuleType("torchvision.models")
        weights = types.SimpleNamespace(url="https://example.org/vgg16-00.pth")
        models.VGG16_Weights = types.SimpleNamespace(IMAGENET1K_V1=weights)
        models.vgg16 = vgg16
        monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
        monkeypatch.setitem(sys.modules, "torchvision.models", models)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        with pytest.warns(UserWarning, match=r"vgg16-00\.pth is not there"):
            assert perceptual.perceptual_loss() is None

        perceptual.perceptual_loss.cache_clear()
        (tmp_path / "checkpoints").mkdir()
        torch.save(vgg16().state_dict(), tmp_path / "checkpoints" / "vgg16-00.pth")
        loss = perceptual.perceptual_loss()
        assert not any(p.requires_grad for p in loss.parameters())
        x = torch.rand((1, 3, 16, 16), generator=generator(), requires_grad=True)
        y = torch.rand((1, 3, 16, 16), generator=generator(1))
        assert loss(y, y) == 0
        value = loss(x, y)
        value.backward()
        assert x.grad.abs().sum() > 0
        # By hand, with the layers before the third ReLU that is looked at.
        mean, deviation = (
            torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        features = vgg16().features.requires_grad_(False)
        total = 0.0
        for last in (3, 8, 15):
            made = [features[: last + 1]((z.detach() - mean) / deviation) for z in (x, y)]
            total += float((made[0] - made[1]).abs().mean())
        assert float(value.detach()) == pytest.approx(total, rel=1e-5)
