"""Packaged models: their cards agree with what is built."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

import fuseengine as fe
from tests.helpers import BLOCK_TORCH, picture_pair, run_python

NAMES = list(fe.packaged_models())


def test_which_are_packaged():
    assert {"drfusion-s", "dmfuse-s", "drmf-s", "dmnet-s", "mask-difuser-s"} == set(NAMES)
    assert set(NAMES) <= set(fe.model_names())


@pytest.mark.parametrize("name", NAMES)
class TestCards:
    def test_agrees_with_the_model(self, name):
        packaged = fe.packaged_models()[name]
        model = fe.build(name, **packaged.settings)
        assert packaged.name == name
        assert packaged.parameters == sum(p.numel() for p in model.parameters())
        assert packaged.channels == model.channels
        assert packaged.multiple == model.multiple
        assert packaged.steps == model.steps
        assert json.loads(json.dumps(packaged.card)) == packaged.card

    def test_file(self, name):
        weights = fe.packaged_models()[name].weights
        assert weights.suffix == ".safetensors"
        assert weights.stat().st_size < 10e6

    def test_loads_and_fuses(self, name):
        model = fe.load_model(name)
        torch.set_num_threads(1)
        assert not model.training and model.name == name
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert all(torch.isfinite(p).all() for p in model.parameters())
        step = max(64, 4 * model.multiple)
        a, b = picture_pair((step, step))
        with torch.no_grad():
            fused = model(a, b)
        # Trained, so it keeps what the sources show, and is no copy of one of them.
        assert fused.std() > 0.3 * max(a.std(), b.std())
        for source in (a, b):
            related = np.corrcoef(fused.flatten(), source.expand_as(fused).flatten())[0, 1]
            assert 0.1 < related < 0.999

    def test_loading_twice_gives_two_models(self, name):
        one, two = fe.load_model(name), fe.load_model(name)
        pairs = zip(one.parameters(), two.parameters(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
        next(one.parameters()).data.add_(1.0)
        assert not torch.equal(next(one.parameters()), next(two.parameters()))


def test_listing_needs_no_torch():
    out = run_python(BLOCK_TORCH + "import fuseengine as fe; print(*fe.packaged_models())")
    assert out.split() == NAMES
    assert "torch" in sys.modules  # of this process, which does have it
