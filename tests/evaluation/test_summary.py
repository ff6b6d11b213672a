"""Means, ranks and notes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fuseengine.evaluation.pairing import Refusal
from fuseengine.evaluation.run import COLOUR, CONSTANT, COUNTS, DEEP
from fuseengine.evaluation.summary import notes, rank, summarise

NAN = math.nan


class TestMeans:
    def test_values(self, make_evaluation):
        rng = np.random.default_rng(0)
        values = rng.normal(size=(2, 5, 2))
        summary = summarise(make_evaluation(values))
        for method in range(2):
            for metric in range(2):
                mean = summary.means[method][metric]
                assert mean.value == pytest.approx(values[method, :, metric].mean())
                assert mean.std == pytest.approx(values[method, :, metric].std(ddof=1))
                assert (mean.n, mean.of) == (5, 5)

    @pytest.mark.parametrize("hole", [NAN, math.inf, -math.inf])
    def test_undefined_values_are_counted_out(self, make_evaluation, hole):
        summary = summarise(make_evaluation([[[1, 2], [hole, 4], [3, 9]]]))
        first, second = summary.means[0]
        assert (first.value, first.n, first.of) == (2, 2, 3)
        assert (second.value, second.n) == (5, 3)

    def test_one_image_has_no_deviation(self, make_evaluation):
        mean = summarise(make_evaluation([[[1, 2]]])).means[0][0]
        assert mean.value == 1 and math.isnan(mean.std)

    def test_no_value_at_all(self, make_evaluation):
        mean = summarise(make_evaluation([[[NAN, 2], [NAN, 3]]])).means[0][0]
        assert math.isnan(mean.value) and (mean.n, mean.of) == (0, 2)


class TestRanks:
    @pytest.mark.parametrize(
        ("values", "higher", "expected"),
        [
            ([1, 3, 2], True, [3, 1, 2]),
            ([1, 3, 2], False, [1, 3, 2]),
            ([2, 2, 1], True, [1, 1, 3]),
            ([NAN, 2, None, 1], True, [None, 1, None, 2]),
            ([], True, []),
        ],
    )
    def test_rank(self, values, higher, expected):
        assert rank(values, higher) == expected

    def test_direction_is_the_metric_s(self, make_evaluation):
        values = [[[1, 1]], [[2, 2]], [[3, 3]]]
        summary = summarise(make_evaluation(values, ("EN", "MSE")))
        assert summary.ranks == ((3, 1), (2, 2), (1, 3))
        assert summary.mean_ranks == (2, 2, 2)

    def test_one_method_has_none(self, make_evaluation):
        summary = summarise(make_evaluation([[[1, 2]]]))
        assert summary.ranks == ((None, None),) and summary.mean_ranks == (None,)

    def test_mean_rank_leaves_out_what_some_lack(self, make_evaluation):
        summary = summarise(make_evaluation([[[1, NAN]], [[2, 5]]]))
        assert summary.ranks == ((2, None), (1, 1))
        assert summary.mean_ranks == (2, 1)


class TestNotes:
    def test_nothing_to_say(self, make_evaluation):
        assert notes(make_evaluation([[[1, 2], [3, 4]]])) == []

    def test_each(self, make_evaluation):
        facts = {
            ("visible", COLOUR): ("00", "01"),
            ("infrared", DEEP): ("00",),
            ("infrared", COUNTS): ("00",),
            ("method 0", CONSTANT): ("01",),
        }
        found = notes(
            make_evaluation(
                [[[1, NAN], [3, 4]]],
                facts=facts,
                infrared_range=(7000.0, 9500.0),
                unpaired={"visible": ("x.png", "y.png")},
                left_out=(Refusal("z", "sizes differ"),),
            )
        )
        expected = [
            "luma Y (BT.601): visible 2 of 2.",
            "divided by 257 and rounded to 8 bits: infrared 1 of 2.",
            "7000 and 9500 became 0 and 255",
            "less than a quarter of their range: infrared 1 of 2. If these",
            "one single value: method 0 1 of 2 (01). There a correlation counts as 0",
            "VIF of method 0 is undefined or infinite for 00: its mean is over 1 of 2 images.",
            "visible without a partner, not measured: x.png, y.png.",
            "Left out: z: sizes differ.",
        ]
        assert len(found) == len(expected)
        for text, part in zip(found, expected, strict=True):
            assert part in text

    def test_too_small_for_a_metric(self, make_evaluation):
        (note,) = notes(make_evaluation([[[1, NAN]]], ("EN", "MS_SSIM")))
        assert "MS_SSIM of method 0 is undefined (below 161 pixels a side) for 00" in note
        assert "over 0 of 1 images" in note

    def test_long_lists_are_cut(self, make_evaluation):
        names = tuple(f"{index}.png" for index in range(40))
        (note,) = notes(make_evaluation([[[1, 2]]], unpaired={"visible": names}))
        assert "11.png and 28 more" in note and "12.png" not in note
