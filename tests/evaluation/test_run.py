"""Measuring: grey levels, one process or several, and what cannot be measured."""

from __future__ import annotations

import dataclasses
import functools
import math
import os

import numpy as np
import pytest
from PIL import Image

from fuseengine.errors import SettingError, UnknownNameError
from fuseengine.evaluation.pairing import UnusablePairsError, pair_folders
from fuseengine.evaluation.run import (
    COLOUR,
    CONSTANT,
    COUNTS,
    DEEP,
    USUAL,
    Latency,
    choose_metrics,
    grey_levels,
    machine_name,
    measure,
    run_all,
)
from fuseengine.metrics import METRICS, evaluate
from fuseengine.runtime.images import read_image
from tests.helpers import BLOCK_TORCH, run_python

from .conftest import SIZE, picture, save


def pairing(folders, *methods):
    methods = methods or ("one", "two")
    return pair_folders(folders / "ir", folders / "vis", {name: folders / name for name in methods})


class TestGreyLevels:
    def test_grey_stays(self):
        image = picture(0)
        grey, facts = grey_levels(image)
        np.testing.assert_array_equal(grey, image)
        assert facts == ()

    def test_colour_becomes_luma(self):
        image = picture(0, channels=3)
        grey, facts = grey_levels(image)
        np.testing.assert_array_equal(grey, np.asarray(Image.fromarray(image).convert("L")))
        assert facts == (COLOUR,)

    def test_three_equal_channels_are_grey(self):
        image = picture(0)
        grey, facts = grey_levels(np.stack([image] * 3, axis=-1))
        np.testing.assert_array_equal(grey, image)
        assert facts == ()

    def test_sixteen_bits(self):
        image = np.array([[0, 128, 129], [257, 65535, 40000]], np.uint16)
        grey, facts = grey_levels(image)
        np.testing.assert_array_equal(grey, np.rint(image / 257))
        assert facts == (DEEP,)

    def test_counts_are_told(self):
        counts = np.array([[7000, 9000], [8000, 16383]], np.uint16)
        assert grey_levels(counts)[1] == (DEEP, COUNTS)
        grey, facts = grey_levels(counts, (7000, 9000))
        np.testing.assert_array_equal(grey, [[0, 255], [128, 255]])
        assert facts == (DEEP,)

    def test_minmax(self):
        grey, _ = grey_levels(np.array([[10, 20], [15, 12]], np.uint8), "minmax")
        np.testing.assert_array_equal(grey, [[0, 255], [128, 51]])
        assert grey.dtype == np.uint8

    @pytest.mark.parametrize("value_range", [None, "minmax", (0, 10)])
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_constant(self, value_range, dtype):
        _, facts = grey_levels(np.full((3, 4), 7, dtype), value_range)
        assert CONSTANT in facts


class TestMetricChoice:
    def test_usual(self):
        assert choose_metrics(None) == USUAL
        assert all(METRICS[key].default for key in USUAL)

    def test_convention_s_own(self):
        assert choose_metrics(None, "drmf") == ("MI", "SF", "SD", "VIF")

    def test_all(self):
        assert set(USUAL) < set(choose_metrics(["all"]))
        assert "MI_nats" not in choose_metrics(["all"])

    def test_unknown(self):
        with pytest.raises(UnknownNameError, match="Did you mean 'Qabf'"):
            choose_metrics(["EN", "Qabff"])
        with pytest.raises(UnknownNameError, match="convention 'dmnett'"):
            choose_metrics(None, "dmnett")


class TestMeasure:
    def test_values_are_the_metrics_of_the_files(self, folders):
        found = measure(pairing(folders), metrics=["SD", "MI", "Qabf"], jobs=1)
        assert found.methods == ("one", "two") and found.metrics == ("SD", "MI", "Qabf")
        assert found.values.shape == (2, 3, 3)
        for row, name in enumerate("abc"):
            ir = read_image(folders / "ir" / f"{name}.png")
            vis = read_image(folders / "vis" / f"{name}.bmp")
            for index, method in enumerate(found.methods):
                fused = read_image(folders / method / f"{name}.png")
                expected = evaluate(fused, ir, vis, metrics=found.metrics)
                assert dict(zip(found.metrics, found.values[index, row], strict=True)) == expected

    def test_convention(self, folders):
        bits = measure(pairing(folders), metrics=["MI"], jobs=1).values
        nats = measure(pairing(folders), metrics=["MI"], convention="cddfuse", jobs=1).values
        np.testing.assert_allclose(nats, bits * math.log(2), rtol=1e-12)

    @pytest.mark.slow
    def test_processes_give_the_same(self, folders):
        alone = measure(pairing(folders), jobs=1)
        together = measure(pairing(folders), jobs=2)
        np.testing.assert_array_equal(together.values, alone.values)
        assert together.facts == alone.facts
        assert not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & (set(os.environ) - set(_BEFORE))

    def test_tracks_progress(self, folders):
        seen = []

        def track(items, total):
            for item in items:
                seen.append(total)
                yield item

        measure(pairing(folders), metrics=["SD"], jobs=1, track=track)
        assert seen == [6] * 6

    def test_facts(self, folders):
        save(folders / "vis" / "a.bmp", picture(3, channels=3))
        save(folders / "ir" / "b.png", picture(1).astype(np.uint16) * 40)
        save(folders / "two" / "c.png", np.full(SIZE, 9, np.uint8))
        found = measure(pairing(folders), metrics=["SD"], jobs=1)
        assert found.facts == {
            ("visible", COLOUR): ("a",),
            ("infrared", DEEP): ("b",),
            ("infrared", COUNTS): ("b",),
            ("two", CONSTANT): ("c",),
        }

    def test_infrared_range_is_for_the_infrared(self, folders):
        plain = measure(pairing(folders), metrics=["SD", "MI"], jobs=1).values
        ranged = measure(pairing(folders), metrics=["SD", "MI"], infrared_range=(0, 255), jobs=1)
        np.testing.assert_array_equal(ranged.values, plain)
        coarse = measure(pairing(folders), metrics=["SD", "MI"], infrared_range=(0, 1000), jobs=1)
        np.testing.assert_array_equal(coarse.values[..., 0], plain[..., 0])
        assert (coarse.values[..., 1] < plain[..., 1]).all()

    def test_a_picture_of_one_value_has_a_defined_result(self, folders):
        save(folders / "one" / "b.png", np.full(SIZE, 9, np.uint8))
        found = measure(pairing(folders, "one"), jobs=1)
        values = dict(zip(found.metrics, found.values[0, 1], strict=True))
        assert values["EN"] == values["SD"] == values["SF"] == values["AG"] == 0

    def test_too_small_for_a_metric(self, folders):
        found = measure(pairing(folders), metrics=["SD", "MS_SSIM"], jobs=1)
        assert np.isfinite(found.values[..., 0]).all() and np.isnan(found.values[..., 1]).all()


class TestUnusable:
    @pytest.fixture
    def damaged(self, folders):
        """One pair of wrong size, one whose fused file ends too early."""
        save(folders / "two" / "b.png", picture(0, (20, 28)))
        path = folders / "one" / "c.png"
        path.write_bytes(path.read_bytes()[:-300])
        return folders

    def test_sizes_are_an_error_before_anything_is_measured(self, damaged):
        def track(items, total):
            raise AssertionError("nothing should be measured")

        with pytest.raises(UnusablePairsError, match=r"1 of 3 pairs .*b: sizes differ"):
            measure(pairing(damaged), jobs=1, track=track)

    def test_all_are_listed(self, damaged):
        save(damaged / "two" / "b.png", picture(0))
        with pytest.raises(UnusablePairsError) as caught:
            measure(pairing(damaged), metrics=["SD"], jobs=1)
        (refusal,) = caught.value.refused
        assert refusal.name == "c" and "damaged or truncated" in refusal.reason

    def test_skip(self, damaged):
        found = measure(pairing(damaged), metrics=["SD"], jobs=1, skip=True)
        assert [case.name for case in found.cases] == ["a"]
        assert found.values.shape == (2, 1, 1) and np.isfinite(found.values).all()
        assert [item.name for item in found.left_out] == ["b", "c"]

    def test_nothing_is_left(self, damaged):
        for name in "ac":
            save(damaged / "two" / f"{name}.png", picture(0, (20, 28)))
        with pytest.raises(UnusablePairsError, match="3 of 3"):
            measure(pairing(damaged), jobs=1, skip=True)


class TestRunAll:
    def test_here(self):
        assert dict(run_all(math.sqrt, [1, 4, 9], 1)) == {0: 1, 1: 2, 2: 3}
        assert list(run_all(math.sqrt, [])) == []

    def test_jobs(self):
        with pytest.raises(SettingError, match="jobs=0"):
            list(run_all(math.sqrt, [1], 0))

    @pytest.mark.slow
    def test_elsewhere(self):
        before = dict(os.environ)
        names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
        found = dict(run_all(os.getenv, names * 2, 2))
        assert [found[index] for index in range(4)] == ["1"] * 4
        assert dict(os.environ) == before

    @pytest.mark.slow
    def test_a_process_that_dies(self):
        with pytest.raises(SettingError, match="one of 2 processes died.*jobs=N"):
            list(run_all(functools.partial(os._exit), [3, 3], 2))


def test_latency():
    latency = Latency(tuple(range(1, 102)), "a machine", "an engine", 1)
    assert latency.percentiles() == {"p50": 51, "p90": 91, "p99": 100}
    with pytest.raises(dataclasses.FrozenInstanceError):
        latency.sizes = 2


def test_machine_name():
    assert machine_name().endswith(" cores")


def test_needs_no_torch(folders):
    script = f"""
from pathlib import Path
from fuseengine.evaluation import pairing, report, run
folder = Path({str(folders)!r})
found = pairing.pair_folders(folder / "ir", folder / "vis", {{"one": folder / "one"}})
page = report.make_page(run.measure(found, metrics=["EN", "Qabf"], jobs=1))
print(len(page) > 5000)
"""
    assert run_python(BLOCK_TORCH + script).strip() == "True"


_BEFORE = dict(os.environ)
