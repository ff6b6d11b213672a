"""The degradations of Mask-DiFuser and DRMF: bounded, repeatable, and what they say."""

from __future__ import annotations

import pytest
import torch

from fuseengine.training import degradations
from fuseengine.training.degradations import MASKED, OF_MODALITY, degrade_one_of, degrade_some_of
from tests.helpers import picture_pair

ALL = sorted(
    {*MASKED, *(f for options in OF_MODALITY.values() for f in options)}, key=lambda f: f.__name__
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def colours(batch=1, size=(24, 32)):
    return torch.cat([picture_pair(size, batch=batch, seed=i)[0] for i in range(3)], dim=1)


@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(2, 3, 24, 32), (1, 1, 16, 20)])
def test_each(function, shape):
    x = colours(shape[0], shape[2:])[:, : shape[1]]
    kept, changed = x.clone(), 0
    for seed in range(8):
        one = function(x, generator(seed))
        assert one.shape == shape and one.dtype == x.dtype and torch.isfinite(one).all()
        assert torch.equal(one, function(x, generator(seed)))
        assert one.min() > -1.0 and one.max() < 2.0  # what clamping takes away is not most of it
        assert torch.equal(x, kept)
        changed += not torch.equal(one, x)
    assert changed >= 3  # a small picture may get no flake of snow


def test_snow_only_brightens():
    x = colours()
    for seed in range(5):
        y = degradations.add_snow(x, generator(seed))
        assert (y >= x - 1e-6).all() and y.max() <= 1 + 1e-6
        changed = ((y - x) > 0.1).any(1).float().mean()
        assert 0 < changed < 0.5


def test_spectrum_keeps_the_exposure():
    x = colours(size=(32, 32))
    for seed in range(5):
        y = degradations.disturb_spectrum(x, generator(seed))
        torch.testing.assert_close(y.mean((2, 3)), x.mean((2, 3)), rtol=0, atol=1e-5)
        assert (y - x).abs().mean() > 1e-3


def test_gamma_goes_both_ways():
    x = torch.full((1, 1, 2, 2), 0.5)
    made = [float(degradations.change_gamma(x, generator(seed)).mean()) for seed in range(40)]
    assert min(made) >= 0.5**3 and max(made) <= 0.5**0.3
    assert 10 < sum(m > 0.5 for m in made) < 30


def test_quarter_resolution_takes_fine_detail():
    x = (torch.arange(32) % 2).float().expand(1, 1, 32, 32)
    assert degradations.quarter_resolution(x, generator()).std() < 0.05


def test_thermal_noise_is_grey():
    x = torch.full((1, 3, 16, 16), 0.5)
    y = degradations.add_thermal_noise(x, generator(1))
    assert torch.equal(y[:, 0], y[:, 1]) and 0 < y.std() < 0.15


def test_low_light_is_darker():
    x = colours()
    for seed in range(10):
        assert degradations.dim(x, generator(seed)).mean() < x.mean()


def test_one_of():
    """Each picture gets its own; every kind comes up; the result is in range."""
    x = colours(batch=4)
    for seed in range(5):
        y = degrade_one_of(x, MASKED, generator(seed))
        assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
        assert all(not torch.equal(y[i], x[i]) for i in range(4))
    called = []
    options = [lambda p, g, i=i: called.append(i) or p for i in range(3)]
    for seed in range(5):
        degrade_one_of(x, options, generator(seed))
    assert len(called) == 20 and set(called) == {0, 1, 2}


def test_some_of():
    x = colours(batch=4)
    for options in OF_MODALITY.values():
        assert torch.equal(degrade_some_of(x, options, generator(), chance=0.0), x)
        y = degrade_some_of(x, options, generator(), chance=1.0)
        assert y.min() >= 0 and y.max() <= 1 and not torch.equal(x, y)
    called = []
    options = [lambda p, g, i=i: called.append(i) or p for i in range(3)]
    degrade_some_of(x, options, generator(), chance=1.0)
    assert called == [0, 1, 2] * 4
    called.clear()
    for seed in range(10):
        degrade_some_of(x, options, generator(seed), chance=0.5)
    assert 40 < len(called) < 80
