"""The terms of the published losses against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fuseengine.training import losses
from tests.helpers import picture_pair


def colours(*, batch=2, size=(20, 28), seed=0):
    planes = [picture_pair(size, batch=batch, seed=seed + i)[0] for i in range(3)]
    return torch.cat(planes, dim=1)


def _lost(a, b, f):
    """1 - (I(a; f) + I(b; f)) / (H(a) + H(b)) of integer levels."""

    def entropy(*pictures):
        _, counts = np.unique(np.stack([p.ravel() for p in pictures]), axis=1, return_counts=True)
        p = counts / counts.sum()
        return -(p * np.log2(p)).sum()

    shared = sum(entropy(x) + entropy(f) - entropy(x, f) for x in (a, b))
    return 1 - shared / (entropy(a) + entropy(b))


class TestEdges:
    def test_ramp(self):
        """Sobel of a slope s per pixel is 8 s, the border (replicated) left aside."""
        x = torch.arange(8.0)[None, None, None].expand(1, 1, 6, 8) * 0.05
        torch.testing.assert_close(
            losses.edge_strength(x)[..., 1:-1, 1:-1], torch.full((1, 1, 4, 6), 0.4)
        )
        torch.testing.assert_close(
            losses.edge_strength(x + x[..., :6].transpose(2, 3).repeat(1, 1, 1, 2)[..., :8])[
                ..., 1:-1, 1:5
            ],
            torch.full((1, 1, 4, 4), 0.8),
        )

    def test_strongest(self):
        x = torch.arange(8.0)[None, None, None].expand(1, 1, 6, 8) * 0.05
        flat = torch.zeros_like(x)
        assert losses.strongest_edges(x, flat, x) == 0
        assert losses.strongest_edges(1 - x, x, flat) == pytest.approx(0, abs=1e-6)  # no polarity
        expected = losses.edge_strength(x).mean() / 2
        assert losses.strongest_edges(x / 2, flat, x) == pytest.approx(float(expected), rel=1e-5)

    def test_lost_contrast(self):
        x = torch.arange(8.0)[None, None, None].expand(2, 1, 6, 8) * 0.05
        flat = torch.full_like(x, 0.5)
        assert losses.lost_contrast(x + 0.3, x, flat) == pytest.approx(0, abs=1e-5)
        assert losses.lost_contrast(2 * x, x, flat) == 0  # more is no loss
        assert losses.lost_contrast(x / 4, x, x / 2) == pytest.approx(0.75, abs=1e-4)
        assert losses.lost_contrast(1 - x, x, flat) == pytest.approx(2, abs=1e-4)  # polarity
        noise = torch.randn(2, 1, 6, 8, generator=torch.Generator().manual_seed(0))
        down = torch.arange(6.0)[None, None, :, None].expand(2, 1, 6, 8)
        noise = noise.mean(dim=3, keepdim=True) * down  # across the edges, not along them
        assert losses.lost_contrast(x / 2 + noise, x, flat) == pytest.approx(0.5, abs=1e-4)
        assert losses.lost_contrast(flat, flat, flat) == pytest.approx(1)  # and no gradient

    def test_invented_edges(self):
        x = torch.arange(8.0)[None, None, None].expand(2, 1, 6, 8) * 0.05
        flat = torch.full_like(x, 0.5)
        assert losses.invented_edges(x, x, flat) == pytest.approx(0, abs=1e-6)
        assert losses.invented_edges(0.9 - 0.5 * x, x, flat) == pytest.approx(0, abs=1e-6)
        assert losses.invented_edges(3 * x, x, flat) == pytest.approx(2, rel=1e-4)
        dashes = flat + 0.01 * (torch.arange(6)[None, None, :, None] % 2)
        # 5 x 8 differences down of 0.01, 6 x 7 across of 0.05.
        expected = pytest.approx(40 * 0.01 / (42 * 0.05), rel=1e-3)
        assert losses.invented_edges(x + dashes, x, flat) == expected
        assert losses.invented_edges(dashes, flat, flat) == pytest.approx(
            0.01 * 255 * 40 / 82, rel=1e-3
        )

    def test_lost_information(self):
        """Grey levels on the bins' centres: the histograms are plain ones."""
        rng = np.random.default_rng(0)
        levels = rng.integers(0, 32, (3, 2, 1, 24, 24))
        levels[2] = levels[1] // 2
        a, b, f = torch.from_numpy(levels / 31.0)
        images = {k: levels[i, :, 0] for i, k in enumerate("abf")}
        expected = np.mean([_lost(*(images[k][n] for k in "abf")) for n in range(2)])
        assert losses.lost_information(f, a, b) == pytest.approx(expected, abs=1e-6)
        assert losses.lost_information(a, a, a) == pytest.approx(0, abs=1e-6)
        assert losses.lost_information(1 - a, a, a) == pytest.approx(0, abs=1e-6)  # a tone curve
        flat = torch.zeros_like(a)
        assert losses.lost_information(flat, a, b) == pytest.approx(1, abs=1e-6)
        assert losses.lost_information(flat, flat, flat) == pytest.approx(1)  # and no gradient

    def test_lost_information_descends(self):
        """Following its slope brings a picture nearer to what tells of both."""
        a, b = picture_pair((32, 32), batch=1, seed=3)
        f = (0.5 * (a + b)).requires_grad_(True)
        before = losses.lost_information(f, a, b)
        (slope,) = torch.autograd.grad(before, f)
        after = losses.lost_information(f - 0.002 * slope.sign(), a, b)
        assert after < before

    def test_stronger_chroma(self):
        grey, colour = torch.zeros(1, 2, 3, 3), torch.full((1, 2, 3, 3), -0.2)
        assert torch.equal(losses.stronger_chroma(grey, colour), colour)
        assert torch.equal(losses.stronger_chroma(colour, grey), colour)
        swapped = colour.flip(1) * -1
        assert torch.equal(losses.stronger_chroma(swapped, colour), colour)


class TestSSIM:
    def test_one_window(self):
        """11 x 11 pixels hold one window: the definition, in float64."""
        rng = np.random.default_rng(0)
        x, y = rng.random((2, 11, 11))
        taps = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
        window = np.outer(taps, taps) / taps.sum() ** 2
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
        cov = (window * (x - mx) * (y - my)).sum()
        c1, c2 = 1e-4, 9e-4
        expected = (2 * mx * my + c1) * (2 * cov + c2)
        expected /= (mx**2 + my**2 + c1) * (vx + vy + c2)
        made = losses.ssim(*(torch.from_numpy(z)[None, None] for z in (x, y)))
        assert made.tolist() == pytest.approx([expected], rel=1e-9)

    def test_mean_over_windows_and_planes(self):
        x, y = colours().double(), colours(seed=5).double()
        made = losses.ssim(x, y)
        windows = [
            losses.ssim(
                x[:, c : c + 1, i : i + 11, j : j + 11], y[:, c : c + 1, i : i + 11, j : j + 11]
            )
            for c in range(3)
            for i in range(10)
            for j in range(18)
        ]
        torch.testing.assert_close(made, torch.stack(windows).mean(0))
        assert losses.ssim(x, x).tolist() == pytest.approx([1, 1])
        assert (made < 0.9).all()


class TestDistances:
    def test_distance(self):
        x = torch.zeros(2, 3, 4, 5)
        y = x.clone()
        y[0], y[1] = 0.3, 0.1
        assert losses.distance(x, y) == pytest.approx(0.2, rel=1e-5)

    def test_angle(self):
        def angle(x, y):
            pictures = [torch.tensor(v)[None, :, None, None] - 1 / 255 for v in (x, y)]
            return float(losses.colour_angle(*pictures))

        assert angle([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]) == pytest.approx(math.pi / 2, abs=1e-5)
        assert angle([0.5, 0.5, 0.0], [0.5, 0.0, 0.0]) == pytest.approx(math.pi / 4, abs=1e-5)
        assert angle([0.2, 0.3, 0.4], [0.4, 0.6, 0.8]) == pytest.approx(0, abs=1e-4)
        assert angle([0.2, 0.3, 0.4], [0.4, 0.3, 0.4]) == pytest.approx(
            math.acos((0.08 + 0.09 + 0.16) / math.sqrt(0.29 * 0.41)), abs=1e-5
        )

    def test_black_has_a_direction(self):
        x = torch.zeros(1, 3, 4, 4, requires_grad=True)
        value = losses.colour_angle(x, torch.zeros(1, 3, 4, 4))
        value.backward()
        assert value < 0.1 and torch.isfinite(x.grad).all()

    def test_ycbcr(self):
        x = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.0, 0.0, 1.0]])[..., None, None]
        y, chroma = losses.to_ycbcr(x)
        assert y.flatten().tolist() == pytest.approx([0.299, 0.5, 0.114])
        expected = [[-0.168736, 0.5], [0, 0], [0.5, -0.081312]]
        np.testing.assert_allclose(chroma[..., 0, 0], expected, atol=1e-6)


@pytest.mark.parametrize(
    "loss", [losses.ssim, losses.distance, losses.colour_angle], ids=lambda f: f.__name__
)
def test_gradients_are_those_of_the_values(loss):
    x, y = (
        colours(batch=1, size=(12, 12)).double(),
        colours(batch=1, size=(12, 12), seed=7).double(),
    )
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    at = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: loss(x + t * direction, y).sum(), (at,))


def test_gradients_of_edges_and_colour_planes():
    a, b = (p.double()[:, :, :6, :6] for p in picture_pair((20, 28)))
    fused = (0.3 * a + 0.6 * b + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: losses.strongest_edges(f, a, b), (fused,))
    assert torch.autograd.gradcheck(lambda f: losses.lost_contrast(f, a, b), (fused,))
    assert torch.autograd.gradcheck(lambda f: losses.invented_edges(f, a, b), (fused,))
    x = colours(batch=1, size=(6, 6)).double().requires_grad_()
    assert torch.autograd.gradcheck(losses.to_ycbcr, (x,))
