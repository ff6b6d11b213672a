"""Histograms, ranges and what calibration takes and refuses."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import fuseengine as fe
from fuseengine.errors import FrameError, ImageFileError, SettingError, SizeMismatchError
from fuseengine.export import calibration
from fuseengine.export.calibration import (
    LEVELS,
    Histogram,
    calibration_pairs,
    evenly,
    observe,
    read_pairs,
)
from fuseengine.export.onnx import stage_to_onnx
from tests.helpers import tiny

RNG = np.random.default_rng(5)


def filled(*parts):
    histogram = Histogram()
    for part in parts:
        histogram.add(np.asarray(part, dtype=np.float32))
    return histogram


def rounding_error(values, top):
    step = top / LEVELS
    rounded = np.clip(np.rint(values / step), -LEVELS, LEVELS) * step
    return float(np.mean((rounded - values) ** 2))


class TestRange:
    @pytest.mark.parametrize("share", [1, 50, 90, 99.9])
    def test_percentile_of_a_uniform_distribution(self, share):
        histogram = filled(RNG.uniform(-3, 3, 200_000))
        # Below it lies the share of |x|, which is uniform on [0, 3]; 4 sigma of the sample.
        spread = 4 * 3 * (share / 100 * (1 - share / 100) / 200_000) ** 0.5
        wanted = 3 * share / 100
        assert abs(histogram.range("percentile", share) - wanted) <= spread + histogram.width

    def test_percentile_of_a_normal_distribution(self):
        histogram = filled(RNG.normal(0, 0.7, 250_000))
        assert histogram.range("percentile", 68.27) == pytest.approx(0.7, rel=0.01)
        assert histogram.range("percentile", 99.73) == pytest.approx(2.1, rel=0.02)
        assert histogram.range("percentile", 100) == histogram.top == histogram.range("max")

    def test_percentile_of_few_values(self):
        histogram = filled([0.0, 1.0, -2.0, 3.0])
        assert histogram.range("percentile", 75) == pytest.approx(2.0, abs=histogram.width)
        assert histogram.range("percentile", 76) == 3.0

    def test_signs_do_not_matter(self):
        values = RNG.normal(size=1000)
        one, two = filled(values), filled(-np.abs(values))
        np.testing.assert_array_equal(one.counts, two.counts)

    @pytest.mark.parametrize(
        "values",
        [
            RNG.normal(size=100_000),
            RNG.laplace(size=100_000),
            RNG.uniform(-1, 1, 100_000),
            np.append(RNG.normal(size=100_000), 60.0),
            (lambda x: x / (1 + np.exp(-x)))(RNG.normal(size=100_000)),
        ],
        ids=["normal", "laplace", "uniform", "outlier", "silu"],
    )
    def test_mse_is_the_least(self, values):
        """Against a fine search over the values themselves, in float64."""
        found = filled(values).range("mse")
        tops = np.linspace(0.02, 1, 400) * np.abs(values).max()
        least = min(rounding_error(values, top) for top in tops)
        assert rounding_error(values, found) <= 1.03 * least

    def test_mse_clips_an_outlier_and_no_uniform_values(self):
        assert 30 < filled(np.append(RNG.normal(size=100_000), 60.0)).range("mse") < 50
        assert filled(RNG.uniform(-1, 1, 100_000)).range("mse") > 0.97

    def test_order_and_pieces_do_not_matter(self):
        values = RNG.normal(size=20_000) * np.geomspace(1e-3, 50, 20_000)
        whole = filled(values)
        for parts in (np.split(values, 40), np.split(values[::-1], 8)):
            pieces = filled(*parts)
            np.testing.assert_array_equal(pieces.counts, whole.counts)
            assert pieces.width == whole.width and pieces.top == whole.top

    def test_memory_does_not_grow(self):
        histogram = filled(np.full(4, 1e-30), np.zeros((3, 5)), np.full(4, 1e30), [2.0**-140])
        assert histogram.counts.nbytes == Histogram().counts.nbytes
        assert histogram.counts.sum() == 4 + 15 + 4 + 1
        assert histogram.range("max") == np.float32(1e30)

    def test_the_largest_of_many_is_seen(self):
        values = RNG.uniform(-1, 1, 1_200_000).astype(np.float32)
        values[777_777] = -9.5
        histogram = filled(values)
        assert histogram.top == 9.5 and histogram.counts.sum() < values.size

    @pytest.mark.parametrize("method", ["max", "percentile", "mse"])
    def test_zeros_only(self, method):
        assert filled(np.zeros(7), np.zeros(0)).range(method) == 1.0

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, bad):
        with pytest.raises(FrameError, match="NaN or infinity.*expected finite"):
            filled([0.5, bad])

    def test_refused(self):
        histogram = filled([1.0])
        with pytest.raises(SettingError, match=r"method='entropy'.*percentile, mse"):
            histogram.range("entropy")
        for percentile in (0, 101, float("nan")):
            with pytest.raises(SettingError, match="expected a number in"):
                histogram.range("percentile", percentile)


@pytest.fixture(scope="module")
def program():
    return fe.capture(tiny())


def grey(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class TestPairs:
    def test_windows_and_padding(self, program):
        frames = [(grey((300, 700), i), grey((300, 700, 3), i + 9)) for i in range(2)]
        frames.append((grey((37, 53)), grey((37, 53))))
        large, other, small = calibration_pairs(program, frames)
        assert large[0].shape == large[1].shape == other[0].shape == (1, 1, 256, 320)
        assert small[0].shape == (1, 1, 40, 56)  # padded to the model's multiple of 4
        np.testing.assert_allclose(
            large[0][0, 0] * 255, frames[0][0][22 : 22 + 256, 190 : 190 + 320], atol=1e-3
        )
        centre = frames[1][0][22 : 22 + 256, 190 : 190 + 320]
        assert np.abs(other[0][0, 0] * 255 - centre).max() > 1  # another place

    def test_the_default_is_the_demo_pair_and_more(self, program):
        pairs = calibration_pairs(program, None)
        assert len(pairs) == 6
        assert all(x.min() >= 0 and x.max() <= 1 and x.std() > 0.01 for p in pairs for x in p)

    def test_batches_count_as_pairs(self, program):
        assert len(calibration_pairs(program, [(grey((3, 8, 8)), grey((3, 8, 8, 3)))])) == 3

    @pytest.mark.parametrize(
        ("frames", "error", "message"),
        [
            ((grey((8, 8)), grey((8, 9))), SizeMismatchError, "calibration pair 1: .*8x8.*8x9"),
            ((np.full((8, 8), np.nan), grey((8, 8))), FrameError, "calibration pair 1: .*NaN"),
            ((grey((1, 8)), grey((1, 8))), FrameError, "calibration pair 1: "),
            (("ir.png", "vis.png"), FrameError, "calibration pair 1: "),
        ],
        ids=["sizes", "nan", "one row", "texts"],
    )
    def test_refused(self, program, frames, error, message):
        good = grey((8, 8)), grey((8, 8))
        with pytest.raises(error, match=message):
            calibration_pairs(program, [good, frames])

    def test_evenly(self):
        assert list(evenly(3, 8)) == [0, 1, 2] and list(evenly(0)) == []
        assert list(evenly(9, 4)) == [0, 3, 6]
        assert len(evenly(1000)) <= 32

    def test_folders(self, tmp_path):
        folders = tmp_path / "ir", tmp_path / "vis"
        for folder in folders:
            folder.mkdir()
        with pytest.raises(ImageFileError, match="got 0 images .* expected at least one pair"):
            read_pairs(*folders)
        fe.write_image(folders[0] / "a.png", grey((4, 6)))
        with pytest.raises(ImageFileError, match="got 1 images .* and 0 in"):
            read_pairs(*folders)
        fe.write_image(folders[1] / "a.png", grey((4, 6, 3), 1))
        ((ir, vis),) = read_pairs(*folders)
        np.testing.assert_array_equal(ir, grey((4, 6)))
        assert vis.shape == (4, 6, 3)
        with pytest.raises(ImageFileError, match="cannot list"):
            read_pairs(tmp_path / "none", folders[1])


class TestObserve:
    @pytest.mark.parametrize("share", [1, 1 << 30])
    def test_magnitudes_of_inner_tensors(self, monkeypatch, share):
        """Against the layers' own outputs; with one tensor at a time and with all at once."""
        monkeypatch.setattr(calibration, "_SHARE", share)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.SiLU(), nn.Conv2d(3, 1, 1)).eval()
        shape = (1, 2, "H", "W")
        model = stage_to_onnx(net, [("in0", shape)], [("out0", (1, 1, "H", "W"))])
        convs = [node for node in model.graph.node if node.op_type == "Conv"]
        tensors = ["in0", *(node.output[0] for node in convs), convs[1].input[0]]
        calls = [[RNG.normal(size=(1, 2, 6, 5)).astype(np.float32)] for _ in range(3)]
        seen = observe(model, tensors, calls)
        x = torch.from_numpy(np.concatenate([call[0] for call in calls]))
        with torch.no_grad():
            values = [x, net[0](x), net(x), net[:2](x)]
        for name, value in zip(tensors, values, strict=True):
            assert seen.histograms[name].top == pytest.approx(float(value.abs().max()), rel=1e-5)
            assert seen.histograms[name].counts.sum() == value.numel()
            assert seen.elements[name] == value[0].numel()
        assert onnx.checker.check_model(model) is None  # as it was
        assert len(model.graph.output) == 1

    def test_nan_inside(self):
        net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.SiLU()).eval()
        shape = (1, 1, "H", "W")
        model = stage_to_onnx(net, [("in0", shape)], [("out0", shape)])
        with pytest.raises(FrameError, match="inside a network"):
            observe(model, ["in0"], [[np.full((1, 1, 2, 2), np.nan, np.float32)]])
