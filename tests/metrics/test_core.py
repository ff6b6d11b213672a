"""The metrics against reference values, at the edges, and by their properties."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fuseengine.errors import FrameError, UnknownNameError
from fuseengine.metrics import METRICS, evaluate
from tests.helpers import shared_path

KEYS = ["EN", "SD", "SF", "AG", "SCD", "MI", "VIF", "Qabf"]
PAIRS = ["02", "06", "08", "14", "16", "41"]


@functools.cache
def golden():
    return json.loads(shared_path("reference", "metrics_golden.json").read_text())


def read(path):
    with Image.open(shared_path("reference") / path) as image:
        return np.asarray(image.convert("L"))


class TestGolden:
    def test_list(self):
        assert list(METRICS) == KEYS
        assert golden()["pairs"] == PAIRS
        assert all(golden()["metrics"][key]["default"] for key in KEYS)

    @pytest.mark.parametrize("algorithm", ["SeAFusion", "DenseFuse"])
    @pytest.mark.parametrize("pair", PAIRS)
    def test_values(self, pair, algorithm):
        """Odd sizes, RGB files with grey content and saturated pictures are among them."""
        (entry,) = [
            e for e in golden()["images"] if (e["pair"], e["algorithm"]) == (pair, algorithm)
        ]
        fused, a, b = (read(entry[name]) for name in ("fused", "infrared", "visible"))
        assert fused.shape == (entry["height"], entry["width"])
        for key, value in evaluate(fused, a, b).items():
            tolerance = golden()["metrics"][key]["derived_tolerance"]
            assert abs(value - entry["values"][key]["derived"]) <= tolerance, key


def picture(seed, shape=(40, 50)):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6), np.uint8)
    smooth = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC)
    noise = np.random.default_rng(seed + 100).integers(-8, 9, shape)
    return np.clip(np.asarray(smooth).astype(int) + noise, 0, 255).astype(np.uint8)


BOUNDS = {
    "EN": (0, 8),
    "SD": (0, 127.5),
    "SF": (0, 361),
    "AG": (0, 200),
    "SCD": (-2, 2),
    "MI": (0, 16),
    "VIF": (0, 3),
    "Qabf": (0, 0.9873),
}

FLAT = np.full((40, 50), 128, np.uint8)


class TestDegenerate:
    @pytest.mark.parametrize(
        "images",
        [
            (FLAT, FLAT, FLAT),
            (FLAT, picture(0), picture(1)),
            (picture(0), FLAT, picture(1)),
            (picture(0), FLAT, FLAT),
            (FLAT * 0, FLAT * 0, FLAT * 0),
            (FLAT * 0, FLAT // 128 * 255, picture(0)),
            (np.eye(40, 50) * 255, FLAT, FLAT),
        ],
        ids=["all flat", "fused", "infrared", "both sources", "black", "black of white", "line"],
    )
    @pytest.mark.filterwarnings("error")  # no division by zero on the way either
    def test_defined_finite_values(self, images):
        for key, value in evaluate(*images).items():
            low, high = BOUNDS[key]
            assert np.isfinite(value) and low - 1e-9 <= value <= high, key

    def test_the_values_that_are_agreed(self):
        """metrics.md, section 11: our choice where the public code gives NaN."""
        for flat in (FLAT, FLAT * 0):
            values = evaluate(flat, flat, flat)
            assert [abs(values[k]) for k in ("EN", "SD", "SF", "AG", "SCD", "MI")] == [0] * 6
            assert values["VIF"] == 2.0  # a constant reference counts as 1, twice
        # Black only: Sobel's border of zeros is an edge of every other constant.
        assert values["Qabf"] == 0

    def test_identical_images(self):
        x = picture(0)
        values = evaluate(x, x, x)
        assert values["VIF"] == pytest.approx(2, abs=1e-6)
        assert values["MI"] == pytest.approx(2 * values["EN"], abs=1e-9)
        assert 0.97 < values["Qabf"] < 0.9874
        assert values["SCD"] == 0  # the differences are constant

    @pytest.mark.parametrize("shape", [(17, 50), (50, 17), (16, 16), (5, 90), (2, 2)])
    def test_small_pictures(self, shape):
        """VIF's coarser scales do not fit; what fits is used."""
        values = evaluate(picture(0, shape), picture(1, shape), picture(2, shape))
        assert np.isfinite(list(values.values())).all()


class TestProperties:
    @settings(max_examples=8)
    @given(st.integers(0, 10_000))
    def test_bounds_and_symmetry(self, seed):
        fused, a, b = picture(seed), picture(seed + 1), picture(seed + 2)
        values, exchanged = evaluate(fused, a, b), evaluate(fused, b, a)
        for key, value in values.items():
            low, high = BOUNDS[key]
            assert low <= value <= high, key
            assert exchanged[key] == pytest.approx(value, rel=1e-12), key
        turned = evaluate(fused[::-1, ::-1], a[::-1, ::-1], b[::-1, ::-1])
        for key in ("EN", "SD", "SF", "AG", "SCD", "MI", "Qabf"):
            assert turned[key] == pytest.approx(values[key], rel=1e-9), key

    def test_better_is_higher(self):
        """Fusions ordered by what they keep of the sources."""
        a, b = picture(0), picture(1)
        mean = ((a.astype(int) + b) // 2).astype(np.uint8)
        dark = (mean // 4).astype(np.uint8)
        for key in ("SD", "SF", "AG", "MI", "VIF", "Qabf"):
            assert evaluate(mean, a, b)[key] > evaluate(dark, a, b)[key], key
        # Not MI: at this size its histograms give noise a high value.
        for key in ("VIF", "Qabf"):
            assert evaluate(mean, a, b)[key] > evaluate(picture(7), a, b)[key], key

    def test_by_hand(self):
        f = np.array([[0, 0], [0, 4]], np.uint8)
        values = evaluate(f, f, f)
        assert values["EN"] == pytest.approx(0.75 * np.log2(4 / 3) + 0.25 * 2)
        assert values["SD"] == pytest.approx(np.sqrt(3))
        assert values["SF"] == pytest.approx(np.sqrt(16 / 2 + 16 / 2))
        # One-sided differences at the border: sqrt((gx^2 + gy^2) / 2) of 0 0, 0 4, 4 0, 4 4.
        assert values["AG"] == pytest.approx(0 + 2 * np.sqrt(8) + 4)

    def test_dtypes(self):
        x, y, z = picture(0), picture(1), picture(2)
        values = evaluate(x, y, z)
        for dtype in (np.float32, np.float64, np.int32, np.uint16):
            assert evaluate(*(i.astype(dtype) for i in (x, y, z))) == values
        lists = evaluate(x.tolist(), y.tolist(), z.tolist())
        assert lists == values

    def test_a_choice_in_the_order_asked_for(self):
        x = picture(0)
        assert list(evaluate(x, x, x, ["MI", "EN"])) == ["MI", "EN"]
        assert evaluate(x, x, x, []) == {}

    def test_refused(self):
        x = picture(0)
        with pytest.raises(UnknownNameError, match="unknown metric 'en'.*expected one of: AG"):
            evaluate(x, x, x, ["en"])
        with pytest.raises(FrameError, match=r"b \(40, 49\); expected three \(H, W\) of one size"):
            evaluate(x, x, x[:, 1:])
        with pytest.raises(FrameError, match="expected three"):
            evaluate(*[np.zeros((4, 5, 3))] * 3)
