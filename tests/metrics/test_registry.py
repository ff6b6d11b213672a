"""The list of metrics, their descriptions, and the conventions."""

from __future__ import annotations

import dataclasses
import inspect
import math

import numpy as np
import pytest

import fuseengine.metrics as metrics
from fuseengine.errors import FrameError, UnknownNameError
from fuseengine.metrics import CONVENTIONS, METRICS, evaluate
from tests.helpers import run_python
from tests.metrics.pictures import picture, triple

DEFAULTS = [
    "EN", "SD", "SF", "AG", "CC", "SCD", "MI", "MSE", "PSNR", "VIF", "VIFF", "Qabf", "Nabf", "Labf",
    "Qpv", "SSIM", "MS_SSIM", "MEF_SSIM", "MEF_MS_SSIM", "FMI_edge", "FMI_none", "FMI_gradient",
    "FMI_dct", "Q_MI", "Q_NCIE", "Q_G", "Q_P", "Q_S", "Q_W", "Q_E", "Q_C", "Q_Y", "Q_CB", "Q_CV",
]  # fmt: skip


class TestMetrics:
    def test_list(self):
        assert [key for key, metric in METRICS.items() if metric.default] == DEFAULTS
        assert list(METRICS)[: len(DEFAULTS)] == DEFAULTS  # the others come after them
        assert {key for key in METRICS if not METRICS[key].higher_is_better} == {
            "MSE",
            "Nabf",
            "Labf",
            "Q_CV",
            "Nabf_swapped",
        }
        assert {key for key in METRICS if not METRICS[key].needs_sources} == {
            "EN",
            "SD",
            "SF",
            "AG",
            "SD_u8",
            "SF_unit_range",
            "AG_hw",
        }

    @pytest.mark.parametrize("key", METRICS)
    def test_description(self, key):
        metric = METRICS[key]
        assert metric.key == key and metric.title and metric.source
        assert metric.range[0] < metric.range[1]
        assert metric.variant_of is None or METRICS[metric.variant_of].default
        assert metric.formula == " ".join(metric.formula.split())
        text = inspect.getdoc(metric.function)
        for part in (metric.source, "better", "Range", "Args:", "Raises:"):
            assert part in text, part
        assert ("higher is better" in text) == metric.higher_is_better

    @pytest.mark.parametrize("key", METRICS)
    def test_public_function(self, key):
        function = METRICS[key].function
        assert getattr(metrics, function.__name__) is function
        assert function.__name__ in metrics.__all__
        assert list(inspect.signature(function).parameters) == ["fused", "a", "b", "convention"]

    def test_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            METRICS["EN"].key = "x"

    def test_alone_as_in_one_call(self):
        given = triple((164, 170))
        values = evaluate(*given, METRICS)
        assert list(values) == list(METRICS)
        for key, value in values.items():
            assert isinstance(value, float)
            assert METRICS[key](*given) == value, key

    def test_one_call_in_another_order(self):
        given = triple((164, 170))
        values = evaluate(*given, METRICS)
        assert evaluate(*given, reversed(METRICS)) == values


class TestEvaluate:
    def test_a_choice_in_the_order_asked_for(self):
        given = triple()
        assert list(evaluate(*given, ["MI", "EN"])) == ["MI", "EN"]
        assert evaluate(*given, []) == {}

    def test_without_a_choice_what_fits(self):
        assert list(evaluate(*triple((161, 161)))) == DEFAULTS
        small = evaluate(*triple((16, 20)))
        assert set(DEFAULTS) - set(small) == {"VIF", "VIFF", "MS_SSIM", "MEF_MS_SSIM"}
        assert set(evaluate(*triple((2, 2)))) >= {"EN", "Qabf", "Q_P", "Q_CB"}

    def test_too_small_for_what_is_asked_for(self):
        for call in (lambda *x: evaluate(*x, ["MS_SSIM"]), metrics.ms_ssim):
            with pytest.raises(
                FrameError, match="MS_SSIM of 160x170 pixels; expected at least 161"
            ):
                call(*triple((160, 170)))

    @pytest.mark.parametrize("key", METRICS)
    def test_smallest_size(self, key):
        side = METRICS[key].min_side
        value = METRICS[key](*triple((side, side + 1)))
        assert math.isfinite(value)
        if side > 2:
            with pytest.raises(FrameError, match=f"at least {side} a side"):
                METRICS[key](*triple((side + 1, side - 1)))

    def test_unknown_names(self):
        given = triple()
        with pytest.raises(UnknownNameError, match="unknown metric 'en'.*expected one of: AG"):
            evaluate(*given, ["en"])
        with pytest.raises(UnknownNameError, match="unknown convention 'cdd'.*Did you mean"):
            evaluate(*given, ["EN"], convention="cdd")
        with pytest.raises(UnknownNameError, match="unknown convention"):
            metrics.ssim(*given, convention="x")


class TestConventions:
    @pytest.mark.parametrize("name", CONVENTIONS)
    def test_names_what_exists(self, name):
        convention = CONVENTIONS[name]
        assert convention.name == name and convention.about
        for key, variant in convention.variants.items():
            assert METRICS[key].default and variant in METRICS
            assert METRICS[variant].variant_of in (key, None)
        assert set(convention.prints) <= set(DEFAULTS)

    def test_default_changes_nothing(self):
        given = triple()
        assert CONVENTIONS["default"].variants == {}
        assert evaluate(*given, convention="default") == evaluate(*given)

    def test_values_under_the_keys_asked_for(self):
        given = triple((164, 170))
        plain = evaluate(*given, METRICS)
        values = evaluate(*given, ["MI", "SSIM", "AG", "EN"], convention="cddfuse")
        assert values == {
            "MI": plain["MI_nats"],
            "SSIM": plain["SSIM_uniform7_R2_sum"],
            "AG": plain["AG_hw"],
            "EN": plain["EN"],
        }
        assert metrics.ms_ssim(*given, convention="dmnet") == plain["MS_SSIM_x255_sum"]
        assert metrics.ms_ssim(*given, convention="dmfuse") == plain["MEF_MS_SSIM"]
        assert METRICS["VIF"](*given, convention="dmfuse") == pytest.approx(plain["VIF"] / 2)
        old = evaluate(*given, ["SD", "SF", "PSNR", "VIF"], convention="matlab-2022")
        assert old["SD"] == plain["SD_u8"] < 16
        assert old["SF"] == pytest.approx(plain["SF"] / 255)
        assert old["PSNR"] == pytest.approx(plain["PSNR"] + 20 * np.log10(255))
        assert old["VIF"] == plain["VIF_u8"]

    def test_swapped(self):
        fused, a, b = triple()
        swapped = metrics.nabf(fused, a, b, convention="matlab")
        assert swapped == metrics.nabf(a, b, fused) != metrics.nabf(fused, a, b)

    def test_every_form_belongs_to_a_convention(self):
        used = {key for c in CONVENTIONS.values() for key in c.variants.values()}
        assert {key for key, metric in METRICS.items() if not metric.default} <= used


def test_without_scipy():
    script = """
import sys
sys.modules["scipy"] = None
try:
    import fuseengine.metrics
except ImportError as error:
    print(error)
"""
    assert "pip install 'fuseengine[metrics]'" in run_python(script)


def test_without_torch():
    script = """
import sys
sys.modules["torch"] = None
import numpy as np
from fuseengine.metrics import entropy
print(entropy(np.eye(4)))
"""
    assert float(run_python(script)) == metrics.entropy(np.eye(4))


def test_one_picture_alone():
    x = picture(0)
    assert metrics.entropy(x) == metrics.entropy(x, picture(1), picture(2))
