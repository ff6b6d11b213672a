"""Dual masks: how many cells of each kind, and that both views together hold the picture."""

from __future__ import annotations

import pytest
import torch

from fuseengine.errors import TrainingError
from fuseengine.training.masking import (
    CELLS,
    CLEAN,
    DEGRADED,
    HIDDEN,
    draw_cells,
    dual_mask,
    exposure_pair,
    focus_pair,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("form", CELLS)
class TestCells:
    def test_proportions(self, form):
        clean, degraded, hidden, behind = CELLS[form]
        for seed in range(10):
            for cells in draw_cells(generator(seed), form=form):
                assert cells.shape == (8, 8)
                counts = torch.bincount(cells.flatten(), minlength=3).tolist()
                assert counts == [clean, degraded + behind, hidden]
        assert clean + degraded == hidden + behind == 32  # the mask is one half

    def test_what_one_view_hides_the_other_shows(self, form):
        for seed in range(20):
            a, b = draw_cells(generator(seed), form=form)
            assert not ((a == HIDDEN) & (b == HIDDEN)).any()
            assert not ((a == CLEAN) & (b == CLEAN)).any()  # M1 of A lies in M, of B in Mc
            assert ((a != HIDDEN) | (b != HIDDEN)).all()

    def test_every_draw_is_another(self, form):
        source = generator()
        first, second = draw_cells(source, form=form), draw_cells(source, form=form)
        assert not torch.equal(first[0], second[0])
        again = draw_cells(generator(), form=form)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_the_paper_has_four_to_one():
    clean, degraded, hidden, behind = CELLS["paper"]
    # The nearest whole numbers of cells: one cell moved either way is further from 4.
    for many, few in ((clean, degraded), (hidden, behind)):
        assert abs(many / few - 4) < abs((many - 1) / (few + 1) - 4)
        assert abs(many / few - 4) < abs((many + 1) / (few - 1) - 4)


class TestViews:
    def test_cells_of_the_picture(self):
        clean = torch.rand((2, 3, 32, 48), generator=generator(1)) * 0.4 + 0.3
        degraded = -clean  # tells the kinds apart by sign
        views = dual_mask(clean, degraded, generator())
        for n in range(2):
            seen = []
            for view in views:
                x = view[n]
                kinds = torch.full((32, 48), HIDDEN)
                kinds[(x == clean[n]).all(0)] = CLEAN
                kinds[(x == degraded[n]).all(0)] = DEGRADED
                cells = kinds.reshape(8, 4, 8, 6)
                assert (cells == cells[:, :1, :, :1]).all()  # whole cells
                assert (kinds == CLEAN).sum() == 26 * 24 and (kinds == HIDDEN).sum() == 26 * 24
                seen.append(x[:, kinds == HIDDEN])
            grey = seen[0].unique()
            assert len(grey) == 1 and 0 <= grey[0] <= 1
            assert torch.equal(grey, seen[1].unique())  # one value for both views
        assert not torch.equal(views[0][0] == clean[0], views[0][1] == clean[1])

    def test_size(self):
        x = torch.zeros(1, 3, 16, 20)
        with pytest.raises(TrainingError, match="16 x 20; expected multiples of 8"):
            dual_mask(x, x, generator())


class TestPairsOfOnePicture:
    def test_exposures(self):
        """Dark and bright in 8-bit steps; what the bright one clips the dark one still orders."""
        x = torch.linspace(0, 1, 64).expand(3, 3, 16, 64).contiguous()
        under, over = exposure_pair(x, generator())
        for made in (under, over):
            assert made.shape == x.shape and made.min() >= 0 and made.max() <= 1
            torch.testing.assert_close(made * 255, (made * 255).round())
        assert (under <= x * 0.75 + 1 / 255).all() and (over >= x - 1e-6).all()
        assert (over == 1).any() and (under.diff(dim=3) >= 0).all() and under.max() < 0.62

    def test_focal_planes(self):
        """Everywhere one of the two is nearly the picture, and neither is so everywhere."""
        x = torch.rand((4, 3, 64, 96), generator=generator(1))
        near, far = focus_pair(x, generator())
        errors = torch.stack([(near - x).abs(), (far - x).abs()]).mean(dim=2)
        assert errors.amin(dim=0).mean() < 0.15 * errors.amax(dim=0).mean()
        assert ((errors > 0.05).float().mean(dim=(1, 2, 3)) > 0.2).all()
        assert focus_pair(x[:0], generator())[0].shape == (0, 3, 64, 96)
