"""Dual masks: how many cells of each kind, and that both views together hold the picture."""

from __future__ import annotations

import pytest
import torch

from fuseengine.errors import TrainingError
from fuseengine.training.masking import CELLS, CLEAN, DEGRADED, HIDDEN, draw_cells, dual_mask


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
