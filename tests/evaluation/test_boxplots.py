"""Box plots: the numbers, the axis, and what the picture says."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseengine.evaluation.boxplots import box_of, box_plot, ticks


def test_box():
    values = [1, 2, 3, 4, 5, 6, 7, 8, 100, math.nan]
    box = box_of(values)
    assert (box.q1, box.median, box.q3) == tuple(np.percentile(values[:9], (25, 50, 75)))
    assert (box.low, box.high) == (1, 8)  # 100 is outside the whiskers
    assert box.mean == pytest.approx(np.mean(values[:9]))


def test_nothing_finite():
    assert box_of([math.nan, math.inf]) is None


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks(low, span):
    high = low + span
    marks = ticks(low, high)
    assert len(marks) <= 6
    slack = span * 1e-6 + abs(low) * 1e-9
    assert all(low - slack <= mark <= high + slack for mark in marks)
    assert marks == sorted(set(marks))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (6.2, 7.6), (-2, 2), (0.8019, 0.8204), (3, 90)])
def test_enough_ticks(low, high):
    assert len(ticks(low, high)) >= 2


class TestPlot:
    def parse(self, *args):
        return ElementTree.fromstring(box_plot(*args))

    def test_one_box_per_method(self):
        svg = self.parse("EN", ["x", "y"], [[1, 2, 3], [4, 5, math.nan]], ["a", "b", "c"])
        assert [g.get("class") for g in svg.iter("g")] == ["box m0", "box m1"]
        titles = [title.text for title in svg.iter("title")]
        assert "a: 1" in titles and "b: 5" in titles and "mean 4.5" in titles
        assert not any(title.startswith("c: nan") for title in titles)
        assert svg.get("aria-label").startswith("Box plot of EN. x: median 2, quartiles 1.5 to 2.5")

    def test_positions_are_in_order_and_inside(self):
        svg = self.parse("EN", ["x"], [[1, 2, 3, 4, 50]], list("abcde"))
        xs = [float(c.get("cx")) for c in svg.iter("circle")]
        assert xs == sorted(xs) and xs[0] >= 0 and xs[-1] <= 360
        # Linear: equal steps of the values are equal steps on paper.
        assert xs[1] - xs[0] == pytest.approx(xs[3] - xs[2], abs=0.2)

    @pytest.mark.parametrize("values", [[5, 5, 5], [0, 0], [math.nan], [math.inf]])
    def test_degenerate(self, values):
        svg = self.parse("EN", ["x"], [values], [str(i) for i in range(len(values))])
        assert "nan" not in ElementTree.tostring(svg, "unicode")
        assert [t.text for t in svg.iter("text")][-1] == "x"

    def test_many_images_show_outliers_only(self):
        values = [*np.linspace(0, 1, 200), 9.0]
        svg = self.parse("EN", ["x"], [values], [str(i) for i in range(201)])
        assert len(list(svg.iter("circle"))) == 1

    def test_names_are_escaped(self):
        svg = self.parse("<b>&", ['<script>"'], [[1, 2]], ["<i>", "&"])
        assert [t.text for t in svg.iter("text")][-1] == '<script>"'
