"""Bounds, symmetry, identical and constant pictures: what holds for every metric."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseengine.metrics import METRICS, evaluate
from tests.metrics.pictures import grain, picture, triple

SHAPE = (48, 53)
KEYS = [key for key in METRICS if METRICS[key].min_side <= min(SHAPE)]
FLAT = np.full(SHAPE, 128, np.uint8)
BLACK, WHITE = FLAT * 0, FLAT // 128 * 255
NOISE = [grain(SHAPE, seed, 127).astype(np.int64) + 127 for seed in range(3)]
HALF_FLAT = np.where(np.arange(SHAPE[1]) < 25, picture(0, SHAPE), FLAT)
SATURATED = np.minimum(picture(1, SHAPE).astype(int) * 3, 255)
LINE = (np.eye(*SHAPE) * 255).astype(np.uint8)
CHECKERS = np.add.outer(*(np.arange(n) for n in SHAPE)) % 2 * 255
DOT = BLACK.copy()
DOT[20, 30] = 1

PICTURES = {
    "structured": picture(2, SHAPE),
    "its negative": 255 - picture(2, SHAPE),
    "flat": FLAT,
    "black": BLACK,
    "white": WHITE,
    "noise": NOISE[0],
    "half flat": HALF_FLAT,
    "saturated": SATURATED,
    "line": LINE,
    "checkers": CHECKERS,
    "dot": DOT,
}


def assert_inside(values):
    for key, value in values.items():
        low, high = METRICS[key].range
        assert not math.isnan(value), key
        assert low - 1e-9 <= value <= high + 1e-9, (key, value)


class TestBounds:
    @pytest.mark.parametrize("name", PICTURES)
    def test_every_kind_of_picture(self, name):
        """In each of the places, beside every other kind; no warning on the way either."""
        x = PICTURES[name]
        others = list(PICTURES.values())
        for k, y in enumerate(others):
            z = others[(3 * k + 1) % len(others)]
            turn = [(x, y, z), (y, x, z), (z, y, x)][k % 3]
            assert_inside(evaluate(*turn, KEYS))

    @settings(max_examples=6)
    @given(st.integers(0, 10_000))
    def test_made_up_pictures(self, seed):
        fused, a, b = triple(SHAPE, seed)
        values, exchanged = evaluate(fused, a, b, KEYS), evaluate(fused, b, a, KEYS)
        assert_inside(values)
        # Q_C takes 0 for a weight of A below 0, and 1 for one of B.
        for key in set(KEYS) - {"Nabf_swapped", "Q_C"}:
            assert exchanged[key] == pytest.approx(values[key], rel=1e-9, abs=1e-12), key

    @settings(max_examples=3)
    @given(st.integers(0, 10_000))
    def test_large_enough_for_all(self, seed):
        assert_inside(evaluate(*triple((161, 167), seed), METRICS))

    def test_opposed_sources(self):
        """MEF's reference patch of an image and its negative is nothing but rounding errors."""
        x = PICTURES["structured"]
        assert_inside(evaluate(x, x, 255 - x, KEYS))

    def test_turned_around(self):
        """What depends on no direction."""
        fused, a, b = triple(SHAPE)
        turned = evaluate(*(x[::-1, ::-1] for x in (fused, a, b)), KEYS)
        values = evaluate(fused, a, b, KEYS)
        for key in (
            "EN",
            "SD",
            "SF",
            "AG",
            "CC",
            "SCD",
            "MI",
            "MSE",
            "Qabf",
            "Nabf",
            "Q_G",
            "SSIM",
        ):
            assert turned[key] == pytest.approx(values[key], rel=1e-9), key


class TestIdentical:
    VALUES = {
        "MSE": 0,
        "PSNR": math.inf,
        "CC": 1,
        "SCD": 0,  # the differences are constant
        "Q_MI": 2,
        "SSIM": 1,
        "MS_SSIM": 1,
        "MEF_SSIM": 1,
        "MEF_MS_SSIM": 1,
        "VIF": 2,
        "VIFF": 1,
        "Q_CB": 1,
        "Q_CV": 0,
        "Q_S": 1,
        "Q_W": 1,
        "Q_E": 1,
        "Q_Y": 1,
        "Q_C": 1,
        "FMI_edge": 1,
        "FMI_none": 1,
        "FMI_gradient": 1,
        "FMI_dct": 1,
        "Nabf": 0,
    }

    def test_a_is_b_is_f(self):
        x = picture(0, (165, 178))
        values = evaluate(x, x, x)
        for key, value in self.VALUES.items():
            assert values[key] == pytest.approx(value, abs=1e-7), key
        assert values["MI"] == pytest.approx(2 * values["EN"])
        assert 0.9 < values["Qabf"] < 0.9873
        assert 0.9 < values["Q_G"] < 1
        assert 0.9 < values["Q_P"] < 1
        assert values["Qpv"] == pytest.approx(0.9997, abs=1e-3)
        # All mutual coefficients are the entropy over 8: not 1.
        r = values["EN"] / 8
        share = np.array([1 + 2 * r, 1 - r, 1 - r]) / 3
        assert values["Q_NCIE"] == pytest.approx(
            1 + (share * np.log(share)).sum() / np.log(256), abs=1e-3
        )


class TestConstant:
    """Values where the public code gives NaN or an arbitrary number."""

    ZERO = [
        "EN", "SD", "SF", "AG", "CC", "SCD", "MI", "MSE", "Q_MI", "Q_P", "Nabf", "Labf", "Qpv",
        "Q_CV",
    ]  # fmt: skip
    ONE = [
        "SSIM", "MS_SSIM", "MEF_SSIM", "MEF_MS_SSIM", "VIFF", "FMI_edge", "FMI_none",
        "FMI_gradient", "FMI_dct", "Q_S", "Q_W", "Q_E", "Q_Y", "Q_C",
    ]  # fmt: skip

    @pytest.mark.parametrize("level", [0, 1, 128, 255])
    def test_all(self, level):
        x = np.full((165, 170), level, np.uint8)
        values = evaluate(x, x, x)
        for key in self.ZERO:
            assert values[key] == 0, key
        for key in self.ONE:
            assert values[key] == pytest.approx(1, abs=1e-12), key
        assert values["VIF"] == 2 and values["PSNR"] == math.inf
        assert values["Q_NCIE"] == pytest.approx(1 - math.log(3, 256))
        if level == 0:
            # Sobel's border of zeros is an edge of every other constant.
            assert values["Qabf"] == values["Q_G"] == 0

    def test_sources(self):
        f = picture(0, SHAPE)
        values = evaluate(f, FLAT, BLACK, KEYS)
        assert values["CC"] == values["MI"] == values["Nabf"] == values["Qpv"] == 0
        assert values["VIF"] == 2  # a constant reference counts as 1
        assert values["FMI_none"] == 0  # constant windows tell nothing about others

    def test_one_source(self):
        f, a, _ = triple(SHAPE)
        both, one = evaluate(f, a, a, KEYS), evaluate(f, a, FLAT, KEYS)
        for key in ("CC", "MI", "FMI_none"):
            assert one[key] == pytest.approx(both[key] / 2), key

    def test_fused(self):
        _, a, b = triple(SHAPE)
        values = evaluate(FLAT, a, b, KEYS)
        assert values["CC"] == values["MI"] == values["EN"] == 0
        assert values["SCD"] == pytest.approx(
            -2 * np.corrcoef(a.ravel(), b.ravel())[0, 1], rel=1e-9
        )
        # Only the border of zeros is an edge; apart from that all is lost.
        assert values["Labf"] > 0.9 and values["Nabf"] == 0


class TestDirection:
    STRUCTURE = [
        "SCD", "VIF", "VIFF", "Qabf", "SSIM", "MS_SSIM", "MEF_SSIM", "MEF_MS_SSIM", "FMI_dct",
        "Q_MI", "Q_G", "Q_S", "Q_W", "Q_E", "Q_Y", "Q_C",
    ]  # fmt: skip

    def test_better_fusion_scores_better(self):
        """Against one that keeps a tenth of the contrast, and against a foreign picture."""
        a, b = picture(0, (165, 170)), picture(1, (165, 170))
        good = (a.astype(int) + b) // 2
        kept, pale, foreign = (
            evaluate(x, a, b) for x in (good, good // 10 + 100, picture(9, (165, 170)))
        )
        for key in self.STRUCTURE:
            assert kept[key] > pale[key], key
            assert kept[key] > foreign[key], key
        for key in ("Labf", "MSE", "Q_CV"):
            assert kept[key] < pale[key], key
        for key in ("CC", "PSNR", "FMI_none", "FMI_gradient", "Q_P", "Q_CB"):
            assert kept[key] > foreign[key], key
        for key in ("Nabf", "MSE", "Q_CV"):
            assert kept[key] < foreign[key], key

    def test_noise_raises_statistics(self):
        f, a, b = triple(SHAPE)
        noisy = np.clip(f.astype(int) + grain(SHAPE, 5, 20), 0, 255)
        clean, dirty = evaluate(f, a, b, KEYS), evaluate(noisy, a, b, KEYS)
        for key in ("SF", "AG", "Nabf"):
            assert dirty[key] > clean[key], key
        for key in ("VIF", "Qabf", "SSIM", "FMI_none"):
            assert dirty[key] < clean[key], key
