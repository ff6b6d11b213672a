"""Reduced pictures stay within their budget and keep their proportions."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from fuseengine.evaluation.pairing import pair_folders
from fuseengine.evaluation.previews import PreviewTask, make_previews, plan_previews

from .conftest import picture, save


def decode(preview):
    head, _, data = preview.uri.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert head == f"data:image/{image.format.lower()};base64"
    return image


@pytest.fixture
def case(tmp_path):
    """Large noise: it takes as many bytes as pictures can."""
    rng = np.random.default_rng(0)
    for name in ("ir", "vis", "one"):
        save(tmp_path / name / "x.png", rng.integers(0, 256, (300, 450), np.uint8))
    found = pair_folders(tmp_path / "ir", tmp_path / "vis", {"one": tmp_path / "one"})
    return found.cases[0]


@pytest.mark.parametrize("limit", [1e9, 200_000, 60_000])
def test_fits(case, limit):
    previews = make_previews(PreviewTask(case, None, limit))
    assert len(previews) == 3
    images = [decode(preview) for preview in previews]
    assert len({image.size for image in images}) == 1
    assert images[0].size == (previews[0].width, previews[0].height)
    width, height = images[0].size
    assert width / height == pytest.approx(1.5, abs=0.01)
    assert sum(len(base64.b64decode(p.uri.partition(",")[2])) for p in previews) <= limit
    assert (width == 450) == (limit == 1e9)  # never enlarged, not reduced without need


def test_colour_and_depth(folders):
    colour = picture(3, channels=3)
    save(folders / "vis" / "a.bmp", colour)
    save(folders / "ir" / "a.png", (picture(1).astype(np.uint16) * 20 + 1000))
    found = pair_folders(folders / "ir", folders / "vis", {"one": folders / "one"})
    infrared, visible, _ = map(decode, make_previews(PreviewTask(found.cases[0], "minmax", 1e9)))
    assert np.asarray(infrared.convert("L")).std() > 20  # stretched as it is measured
    difference = np.asarray(visible.convert("RGB"), np.float64) - colour
    assert np.abs(difference).mean() < 12


class TestPlan:
    def test_all(self, folders):
        found = pair_folders(folders / "ir", folders / "vis", {"one": folders / "one"})
        tasks = plan_previews(found.cases, None, 24)
        assert [task.case for task in tasks] == list(found.cases)
        assert sum(task.limit for task in tasks) * 4 / 3 == pytest.approx(24e6)

    def test_too_many(self, folders):
        found = pair_folders(folders / "ir", folders / "vis", {"one": folders / "one"})
        cases = found.cases * 1000
        tasks = plan_previews(cases, None, 1)
        assert 10 < len(tasks) < 60
        assert sum(task.limit for task in tasks) * 4 / 3 == pytest.approx(1e6)
        assert tasks[0].limit / 3 >= 6000

    @pytest.mark.parametrize("megabytes", [0, 0.001])
    def test_none_and_at_least_one(self, folders, megabytes):
        found = pair_folders(folders / "ir", folders / "vis", {"one": folders / "one"})
        assert len(plan_previews(found.cases, None, megabytes)) == (megabytes > 0)
