from __future__ import annotations

import json
import math

import numpy as np

from fuseengine.video.statistics import LatencyHistogram, StreamStats


def test_percentiles_within_one_per_cent():
    values = np.random.default_rng(0).lognormal(3, 1, 5001)  # no rank falls between two
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(value)
    for q in (1, 50, 90, 99, 99.9):
        exact = np.percentile(values, q, method="inverted_cdf")
        assert abs(histogram.percentile(q) / exact - 1) < 0.0101
    assert histogram.percentile(100) == values.max()


def test_extremes():
    histogram = LatencyHistogram()
    assert math.isnan(histogram.percentile(50))
    for value in (-3.0, 0.0, 1e9):
        histogram.add(value)
    assert histogram.percentile(50) <= 0.00102
    assert histogram.percentile(100) == 1e9


def test_stats_are_json():
    stats = StreamStats()
    assert json.loads(json.dumps(stats.to_dict()))["fps"] is None
    for k in range(5):
        stats.count_fused(10 + k / 10, 20.0, late=k == 2)
    assert stats.fps == 10.0 or abs(stats.fps - 10) < 1e-9
    assert (stats.fused, stats.late) == (5, 1)
    assert abs(stats.latency_ms(50) - 20) < 0.21
    assert stats.to_dict()["infrared"]["captured"] == 0
