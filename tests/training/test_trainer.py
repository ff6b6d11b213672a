"""The training loop on random pairs: it learns, resumes and refuses."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import fuseengine as fe
from fuseengine.errors import TrainingError
from fuseengine.training.recipes import DRFusionRecipe, recipe_for
from fuseengine.training.trainer import TrainSettings, train
from tests.helpers import picture_pair, tiny
from tests.training.test_data import write_pairs

SETTINGS = TrainSettings(
    steps=6, rate=1e-3, warmup=2, patch=16, batch=2, save_every=3, show_every=4
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def small(**settings):
    torch.manual_seed(0)
    return tiny(**{"steps": 2, **settings})


def run(data, out, model=None, settings=SETTINGS, **options):
    model = model or small()
    return model, train(model, data, out, settings, progress=False, **options)


class TestRecipe:
    def test_the_untrained_model_is_the_average(self):
        """Zero heads: no noise predicted, equal weights."""
        model = small()
        DRFusionRecipe().initialise(model)
        a, b = picture_pair((16, 16))
        with torch.no_grad():
            torch.testing.assert_close(model(a, b), (a + b) / 2, rtol=0, atol=1e-5)

    def test_steps_lower_the_loss(self):
        model = small()
        recipe = recipe_for(model)
        model.train()
        a, b = picture_pair((16, 16), batch=2)
        optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
        seen = []
        for _ in range(12):
            parts = recipe(model, (a, b), torch.Generator().manual_seed(0))
            loss = torch.stack(list(parts.values())).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            seen.append(float(loss.detach()))
        assert set(parts) == {"gradient", "correlation", "brightest", "sources", "range"}
        assert seen[-1] < 0.9 * seen[0]

    def test_no_recipe(self, data, tmp_path):
        class Mine(fe.FusionModel):
            def __init__(self):
                super().__init__()
                self.net = torch.nn.Conv2d(1, 1, 1)

        with pytest.raises(TrainingError, match="no training recipe for Mine"):
            train(Mine(), data, tmp_path, SETTINGS, progress=False)


class TestTrain:
    def test_what_it_writes(self, data, tmp_path):
        _, summary = run(data, tmp_path / "out")
        assert summary["steps"] == 6 and summary["pairs"] == 3 and summary["seconds"] > 0
        assert summary["weights"] == tmp_path / "out" / "weights.safetensors"
        assert np.isfinite(list(summary["losses"].values())).all()
        parts = [v for name, v in summary["losses"].items() if name != "loss"]
        assert summary["losses"]["loss"] == pytest.approx(sum(parts), rel=1e-5)
        names = {p.name for p in (tmp_path / "out").iterdir()}
        grids = {n for n in names if n.startswith("grid")}
        assert names - grids == {"checkpoint.pt", "weights.safetensors", "log.jsonl"}
        assert grids == {"grid_000004.png", "grid_000006.png"}
        with Image.open(tmp_path / "out" / "grid_000006.png") as grid:
            assert grid.size == (3 * 16, 2 * 16)  # infrared, visible, fused; a row per patch
            assert np.asarray(grid).std() > 1
        lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[-1]) == {"step": 6, **summary["losses"]}

    def test_saved_weights_are_those_of_the_model(self, data, tmp_path):
        model, _ = run(data, tmp_path)
        assert not model.training
        again = fe.load_checkpoint(
            fe.build("drfusion-s", **model.settings), tmp_path / "weights.safetensors"
        )
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        assert not torch.equal(model.alpha, small().alpha)  # it moved

    def test_same_seed_same_weights(self, data, tmp_path):
        one, _ = run(data, tmp_path / "one")
        two, _ = run(data, tmp_path / "two")
        settings = dataclasses.replace(SETTINGS, seed=1)
        other, _ = run(data, tmp_path / "three", settings=settings)
        for name, value in one.state_dict().items():
            assert torch.equal(two.state_dict()[name], value), name
        assert not torch.equal(other.unet.stem.weight, one.unet.stem.weight)

    def test_interrupted_and_resumed_equals_one_run(self, data, tmp_path):
        whole, summary = run(data, tmp_path / "whole")
        _, first = run(data, tmp_path / "parts", stop_after=0.0)
        assert first["steps"] == 1
        resumed, second = run(data, tmp_path / "parts", model=small(seed=9))
        assert second["steps"] == 6 and second["seconds"] > first["seconds"]
        assert second["losses"] == pytest.approx(summary["losses"], rel=1e-6)
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=1e-7)

    def test_finished_run_is_left_as_it_is(self, data, tmp_path):
        model, _ = run(data, tmp_path)
        kept = (tmp_path / "weights.safetensors").read_bytes()
        again, summary = run(data, tmp_path, model=small(seed=9))
        assert summary["steps"] == 6
        assert (tmp_path / "weights.safetensors").read_bytes() == kept
        assert torch.equal(again.alpha, model.alpha)

    def test_longer_later(self, data, tmp_path):
        run(data, tmp_path)
        _, summary = run(data, tmp_path, settings=dataclasses.replace(SETTINGS, steps=8))
        assert summary["steps"] == 8

    def test_run_of_another_model(self, data, tmp_path):
        run(data, tmp_path)
        other = fe.build("drfusion", width=8, groups=4, steps=2)
        with pytest.raises(TrainingError, match="'drfusion-s' .*expected 'drfusion'"):
            run(data, tmp_path, model=other)

    def test_no_pairs(self, tmp_path):
        with pytest.raises(TrainingError, match="no image pairs"):
            run(tmp_path, tmp_path / "out")
        (tmp_path / "ir").mkdir()
        (tmp_path / "vis").mkdir()
        with pytest.raises(TrainingError, match="no two images of one name"):
            run(tmp_path, tmp_path / "out")

    def test_no_checkpoint(self, data, tmp_path):
        (tmp_path / "checkpoint.pt").write_bytes(b"something else")
        with pytest.raises(TrainingError, match=r"checkpoint\.pt is not a checkpoint"):
            run(data, tmp_path)

    @pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
    def test_a_loss_that_is_not_finite(self, data, tmp_path):
        model = small()
        model.alpha.data.fill_(torch.nan)
        with pytest.raises(TrainingError, match="the loss is nan at step 0; lower the learning"):
            run(data, tmp_path, model=model)
