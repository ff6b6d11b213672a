"""Every metric against reference values on real pictures.

Odd sizes, RGB files with grey content and saturated pictures are among them. What two correct
programs disagree about is null in the file.
"""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
from PIL import Image

from fuseengine.metrics import METRICS, evaluate
from tests.helpers import shared_path

PAIRS = ["02", "06", "08", "14", "16", "41"]
ALGORITHMS = ["SeAFusion", "DenseFuse"]


@functools.cache
def golden():
    return json.loads(shared_path("reference", "metrics_golden.json").read_text())


def entry(pair, algorithm):
    (found,) = [e for e in golden()["images"] if (e["pair"], e["algorithm"]) == (pair, algorithm)]
    return found


def read(path):
    with Image.open(shared_path("reference") / path) as image:
        return np.asarray(image)


def test_keys():
    assert golden()["pairs"] == PAIRS and golden()["algorithms"] == ALGORITHMS
    for key, about in golden()["metrics"].items():
        assert METRICS[key].default == about["default"], key
    ours = {key for key, metric in METRICS.items() if metric.default}
    assert ours <= set(golden()["metrics"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("pair", PAIRS)
def test_values(pair, algorithm):
    case = entry(pair, algorithm)
    fused, a, b = (read(case[name]) for name in ("fused", "infrared", "visible"))
    assert fused.shape[:2] == (case["height"], case["width"])
    values = evaluate(fused, a, b, METRICS)
    assert all(math.isfinite(value) for value in values.values())
    checked, wrong = 0, []
    for key, about in golden()["metrics"].items():
        reference = case["values"][key]
        if reference["value"] is None:
            assert key in ("Q_C", "Q_Y", "Q_S") and reference["why"]
            continue
        tolerance = reference.get("tolerance", about["tolerance"])
        expected = [(reference["value"], tolerance)]
        if "derived" in reference:
            expected.append((reference["derived"], about["derived_tolerance"]))
        for value, limit in expected:
            checked += 1
            if not abs(values[key] - value) <= limit:
                wrong.append(f"{key}: {values[key]}, expected {value} within {limit}")
    assert not wrong
    assert checked >= 70

    # Other programs' forms that stand beside the main references; they work in float32.
    also = {key: reference.get("also", {}) for key, reference in case["values"].items()}
    assert values["MI_nats"] == pytest.approx(also["MI"]["python_nats"], abs=1e-9)
    peak = also["PSNR"]["python_peak_maxF"]
    assert values["PSNR_peak_max"] == pytest.approx(peak, abs=1e-5)
    assert values["SF_unit_range"] == pytest.approx(case["values"]["SF"]["value"] / 255)
    assert values["VIF_mean"] == pytest.approx(case["values"]["VIF"]["value"] / 2)
