"""Gain control, dead pixels and streaks on made-up thermal frames."""

from __future__ import annotations

import numpy as np
import pytest

from fuseengine.errors import FrameError, SettingError, UnknownNameError
from fuseengine.thermal import (
    DeadPixels,
    LocalEqualisation,
    PercentileGain,
    PlateauEqualisation,
    StreakFilter,
    ThermalInput,
)


def scene(mean=22_000, spread=60, size=(96, 128), seed=0):
    """A radiometric frame: a smooth background, a hot square, noise."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[: size[0], : size[1]]
    x = mean + spread * np.sin(row / 17) * np.cos(column / 23) + 4 * rng.standard_normal(size)
    x[30:50, 40:60] += 8 * spread
    return np.rint(x).astype(np.uint16)


class TestPercentileGain:
    def test_the_line(self):
        x, gain = scene(), PercentileGain(1, 99)
        picture = gain(x)
        low, high = np.percentile(x, [1, 99], method="inverted_cdf")
        expected = np.clip((x.astype(float) - low) / (high - low), 0, 1)
        np.testing.assert_allclose(picture, expected, atol=1e-6)
        assert picture.dtype == np.float32

    def test_bounds_follow_slowly_but_jump_at_a_cut(self):
        gain = PercentileGain(0, 100, smoothing=0.9)
        gain(scene())
        low, high = gain.bounds
        gain(scene(mean=22_100))
        assert gain.bounds[0] - low == pytest.approx(10, abs=3)
        gain(scene(mean=40_000))
        assert gain.bounds[0] > 39_000
        gain.reset()
        gain(scene())
        assert gain.bounds == (low, high)

    def test_an_even_scene_stays_even(self):
        picture = PercentileGain(least=50)(np.full((8, 8), 1000, np.uint16))
        np.testing.assert_allclose(picture, 0.5)

    def test_eight_bits(self):
        x = np.arange(256, dtype=np.uint8).reshape(16, 16)
        np.testing.assert_allclose(PercentileGain(0, 100)(x), x / 255, atol=1e-6)


class TestPlateauEqualisation:
    def test_without_a_plateau_levels_are_even(self):
        picture = PlateauEqualisation(1.0)(scene())
        assert np.histogram(picture, 8, (0, 1))[0].std() < 0.15 * picture.size / 8

    def test_a_large_background_does_not_take_all_levels(self):
        x = scene(spread=1)
        x[30:50, 40:60] = 22_500 + np.arange(400).reshape(20, 20)
        spans = [np.ptp(PlateauEqualisation(p)(x)[30:50, 40:60]) for p in (1.0, 0.002)]
        assert spans[1] > 5 * spans[0]

    def test_it_keeps_order_and_smooths(self):
        gain = PlateauEqualisation(smoothing=0.5)
        first = gain.table(scene()).copy()
        assert (np.diff(first) >= 0).all() and first.min() >= 0 and first.max() <= 1
        second = gain.table(scene(mean=22_050))
        gain.reset()
        alone = gain.table(scene(mean=22_050))
        np.testing.assert_allclose(second, (first + alone) / 2, atol=1e-6)


class TestLocalEqualisation:
    def test_local_contrast_comes_out(self):
        """A faint texture beside a hot target, which a straight line would hide."""
        x = scene()
        x[60:, ::2] += 12
        line, local = PercentileGain(0.1, 99.9)(x), LocalEqualisation((6, 8))(x)

        def texture(p):
            return np.abs(np.diff(p[64:90], axis=1)).mean()

        assert texture(local) > 1.8 * texture(line)
        assert local.min() >= 0 and local.max() <= 1

    def test_more_tiles_than_pixels(self):
        assert LocalEqualisation((64, 64))(scene(size=(5, 7))).shape == (5, 7)


class TestDeadPixels:
    def test_places_are_found_and_replaced(self):
        places = [(3, 4), (3, 5), (0, 0), (95, 127), (40, 50)]

        def broken(seed):
            x = scene(seed=seed)
            x = np.roll(x, (7 * seed, 9 * seed), axis=(0, 1))  # what stays in place is the sensor's
            for n, (row, column) in enumerate(places):
                x[row, column] = (0, 65535, 21_000)[n % 3]
            return x

        found = DeadPixels.find(broken(seed) for seed in range(12))
        assert {tuple(p) for p in found.places} == set(places)
        x, clean = broken(3), np.roll(scene(seed=3), (21, 27), axis=(0, 1)).astype(int)
        fixed = found(x)
        assert x[3, 4] == 0  # the given frame is as it was
        for row, column in places:
            assert abs(int(fixed[row, column]) - clean[row, column]) < 40
        rest = np.ones(x.shape, bool)
        rest[tuple(found.places.T)] = False
        np.testing.assert_array_equal(fixed[rest], x[rest])

    def test_a_dead_block_takes_wider_surroundings(self):
        x = np.full((20, 20), 500, np.uint16)
        block = [(row, column) for row in range(8, 13) for column in range(8, 13)]
        x[8:13, 8:13] = 0
        assert (DeadPixels(block)(x) == 500).all()

    def test_none_at_all(self):
        x = scene()
        np.testing.assert_array_equal(DeadPixels([])(x), x)

    def test_refusals(self):
        with pytest.raises(FrameError, match=r"frame of 5x5 .*dead pixels up to \(9, 2\)"):
            DeadPixels([(9, 2)])(np.zeros((5, 5), np.uint16))
        with pytest.raises(FrameError, match="no frames"):
            DeadPixels.find([])
        with pytest.raises(SettingError, match="pairs from 0"):
            DeadPixels([(-1, 2)])


class TestStreakFilter:
    def test_offsets_go_and_the_scene_stays(self):
        rng = np.random.default_rng(1)
        offsets = 15 * rng.standard_normal(128)
        filtered, filter_ = None, StreakFilter(smoothing=0.5)
        for seed in range(8):
            clean = scene(seed=seed)
            x = np.rint(clean + offsets).astype(np.uint16)
            filtered = filter_(x)

        def columns(y):
            return (y.astype(float) - clean).mean(0)

        left = columns(filtered)
        assert left.std() < 0.35 * columns(x).std()
        assert filtered.dtype == np.uint16
        # The hot square's border is the scene's.
        step = filtered[30:50, 60:64].mean() - filtered[30:50, 54:58].mean()
        assert step == pytest.approx(
            clean[30:50, 60:64].mean() - clean[30:50, 54:58].mean(), rel=0.1
        )


class TestThermalInput:
    def test_all_in_order(self):
        x = scene()
        x[7, 9] = 0
        camera = ThermalInput("plateau", dead_pixels=[(7, 9)], destreak=True)
        before = x.copy()
        picture = camera(x)
        np.testing.assert_array_equal(x, before)
        assert picture.shape == x.shape and abs(picture[7, 9] - picture[6:9, 8:11].mean()) < 0.2
        out = np.empty_like(picture)
        camera.reset()
        assert camera(x, out) is out
        np.testing.assert_array_equal(out, picture)

    def test_refusals(self):
        with pytest.raises(UnknownNameError, match="Did you mean 'plateau'"):
            ThermalInput("platau")
        with pytest.raises(FrameError, match=r"got float32 \(4, 4\); expected counts"):
            ThermalInput()(np.zeros((4, 4), np.float32))
        for wrong in ({"low": 50, "high": 40}, {"smoothing": 1.0}, {"least": 0}):
            with pytest.raises(SettingError, match="expected"):
                PercentileGain(**wrong)
        with pytest.raises(SettingError, match="expected a share"):
            PlateauEqualisation(0.0)
        with pytest.raises(SettingError, match="expected at least 1 x 1"):
            LocalEqualisation(limit=0.5)
        with pytest.raises(SettingError, match="expected a radius"):
            StreakFilter(radius=0)
