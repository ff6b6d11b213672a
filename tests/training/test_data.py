"""Pairs from folders, patches, degradations, losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fuseengine.errors import TrainingError
from fuseengine.training import losses
from fuseengine.training.data import (
    Patches,
    PatchSettings,
    add_grain,
    change_tone,
    find_pair_folders,
    find_pairs,
    find_pictures,
    read_luma,
    read_planes,
)
from fuseengine.training.degradations import (
    add_noise,
    add_stripes,
    defocus,
    degrade,
    gaussian_blur,
    lower_resolution,
)
from tests.helpers import picture_pair


def write_pairs(root, sizes=((40, 52), (36, 44), (20, 18)), names=("ir", "vis"), seed=0):
    rng = np.random.default_rng(seed)
    for index, size in enumerate(sizes):
        for name in names:
            (root / name).mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (6, 7), np.uint8)
            picture = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
            picture.save(root / name / f"{index:02d}.png")
    return root


class TestFolders:
    @pytest.mark.parametrize("names", [("ir", "vis"), ("infrared", "visible"), ("a", "b")])
    def test_names(self, tmp_path, names):
        write_pairs(tmp_path / "deep" / "down", names=names)
        (pair,) = find_pair_folders(tmp_path)
        assert tuple(folder.name for folder in pair) == names

    def test_several_sets(self, tmp_path):
        write_pairs(tmp_path / "one", ((16, 16),))
        write_pairs(tmp_path / "two", ((16, 16), (20, 20)), names=("infrared", "visible"))
        assert len(find_pairs(tmp_path)) == 3
        assert len(find_pairs([tmp_path / "one", tmp_path / "two"])) == 3
        assert len(find_pairs([tmp_path / "one"])) == 1

    def test_clean_versions_are_taken(self, tmp_path):
        write_pairs(tmp_path, ((16, 16), (16, 16)))
        write_pairs(tmp_path, ((16, 16),), names=("ir_clean",))
        ((first, second),) = find_pair_folders(tmp_path)
        assert (first.name, second.name) == ("ir_clean", "vis")
        assert len(find_pairs(tmp_path)) == 1
        assert sorted(p.parent.name for (p,) in find_pictures(tmp_path)) == [
            "ir_clean",
            "vis",
            "vis",
        ]

    def test_pictures(self, tmp_path):
        write_pairs(tmp_path / "deep", ((16, 16),), names=("x",))
        write_pairs(tmp_path, ((16, 16), (20, 20)), names=("y",))
        assert len(find_pictures(tmp_path)) == 3
        (tmp_path / "empty").mkdir()
        for root in (tmp_path / "empty", tmp_path / "missing"):
            with pytest.raises(TrainingError, match="no images; expected a folder"):
                find_pictures([tmp_path, root])

    def test_none(self, tmp_path):
        (tmp_path / "ir").mkdir()
        for root in (tmp_path, tmp_path / "missing"):
            with pytest.raises(TrainingError, match="no image pairs; expected a folder"):
                find_pair_folders(root)

    def test_two_sizes(self, tmp_path):
        write_pairs(tmp_path, ((16, 16),))
        Image.new("L", (17, 16)).save(tmp_path / "vis" / "00.png")
        with pytest.raises(TrainingError, match=r"\(16, 16\) and .* is \(16, 17\)"):
            Patches(find_pairs(tmp_path), PatchSettings(16, 1))

    def test_luma(self, tmp_path):
        colour = np.zeros((4, 5, 3), np.uint8)
        colour[..., 0], colour[..., 1], colour[..., 2] = 200, 100, 50
        Image.fromarray(colour).save(tmp_path / "c.png")
        assert np.unique(read_luma(tmp_path / "c.png")) == [round(59.8 + 58.7 + 5.7)]
        deep = np.array([[0, 257, 65535]] * 2, np.uint16)
        Image.fromarray(deep).save(tmp_path / "d.png")
        np.testing.assert_array_equal(read_luma(tmp_path / "d.png"), [[0, 1, 255]] * 2)
        for channels, planes in (("luma", 1), ("rgb", 3)):
            assert read_planes(tmp_path / "c.png", channels).shape == (planes, 4, 5)
            assert read_planes(tmp_path / "d.png", channels).shape == (1, 2, 3)
        assert read_planes(tmp_path / "c.png", "rgb")[:, 0, 0].tolist() == [200, 100, 50]


class TestPatches:
    def patches(self, root, seed=0, size=24, batch=3):
        return Patches(find_pairs(root), PatchSettings(size, batch), seed)

    def test_a_batch_is_a_function_of_seed_and_number(self, tmp_path):
        write_pairs(tmp_path)
        one, two = self.patches(tmp_path), self.patches(tmp_path)
        two.batch(3)  # what was drawn before must not matter
        for n in (0, 7, 2**31):
            for first, second in zip(one.batch(n), two.batch(n), strict=True):
                assert torch.equal(first, second)
        assert not torch.equal(one.batch(0)[0], one.batch(1)[0])
        assert not torch.equal(one.batch(0)[0], self.patches(tmp_path, seed=1).batch(0)[0])

    @pytest.mark.parametrize("size", [8, 24, 64])  # 64: larger than every picture
    def test_shape_and_range(self, tmp_path, size):
        write_pairs(tmp_path)
        patches = self.patches(tmp_path, size=size)
        for n in range(6):
            for x in patches.batch(n):
                assert x.shape == (3, 1, size, size) and x.dtype == torch.float32
                assert torch.isfinite(x).all() and x.min() >= 0 and x.max() <= 1

    def test_both_sources_show_the_same_place(self, tmp_path):
        """Equal pictures give equal patches where neither tone nor grain was changed."""
        write_pairs(tmp_path)
        for path in (tmp_path / "ir").iterdir():
            (tmp_path / "vis" / path.name).write_bytes(path.read_bytes())
        plain = PatchSettings(16, 8, tone_chance=0.0, grain_chance=0.0)
        patches = Patches(find_pairs(tmp_path), plain)
        for n in range(5):
            a, b = patches.batch(n)
            assert torch.equal(a, b) and a.std() > 0.01

    def test_colour(self, tmp_path):
        """Three planes of both; a grey picture's are equal, its partner's the file's colours."""
        write_pairs(tmp_path)
        for path in (tmp_path / "vis").iterdir():
            grey = np.asarray(Image.open(tmp_path / "ir" / path.name))
            Image.fromarray(np.stack([grey, grey // 2, grey // 4], -1)).save(path)
        plain = PatchSettings(16, 4, tone_chance=0.0, grain_chance=0.0)
        a, b = Patches(find_pairs(tmp_path), plain, channels="rgb").batch(0)
        assert a.shape == b.shape == (4, 3, 16, 16) and a.std() > 0.01
        assert torch.equal(a[:, 0], a[:, 1]) and torch.equal(a[:, 0], a[:, 2])
        torch.testing.assert_close(b[:, 0], a[:, 0])
        torch.testing.assert_close(b[:, 1], a[:, 0] / 2, rtol=0, atol=1 / 255)
        torch.testing.assert_close(b[:, 2], a[:, 0] / 4, rtol=0, atol=1 / 255)

    def test_single_pictures(self, tmp_path):
        write_pairs(tmp_path)
        patches = Patches(find_pictures(tmp_path), PatchSettings(16, 2), channels="rgb")
        (x,) = patches.batch(0)
        assert len(patches) == 6 and x.shape == (2, 3, 16, 16)

    def test_tone_stays_in_range_and_in_order(self):
        rng = np.random.default_rng(0)
        x = torch.linspace(0, 1, 50)[None, None, None]
        for _ in range(50):
            y = change_tone(x, rng).flatten()
            assert y.min() >= -1e-6 and y.max() <= 1 + 1e-6
            assert (y.diff() >= 0).all() and y[-1] - y[0] >= 0.34

    def test_grain_leaves_black(self):
        x = torch.full((1, 1, 24, 24), 0.5)
        x[..., :8, :] = 0.0
        for seed in range(4):
            y = add_grain(x, np.random.default_rng(seed))
            assert torch.equal(y[..., :8, :], x[..., :8, :])
            noise = y[..., 8:, :] - 0.5
            assert 0 < noise.std() < 0.03 and abs(noise.mean()) < 0.005


class TestDegradations:
    def generator(self, seed=0):
        return torch.Generator().manual_seed(seed)

    @pytest.mark.parametrize("function", [add_noise, add_stripes, defocus, lower_resolution])
    @pytest.mark.parametrize("size", [(1, 1, 16, 24), (3, 1, 10, 6)])
    def test_repeatable(self, function, size):
        x, _ = picture_pair(size[2:], batch=size[0])
        one, two = function(x, self.generator()), function(x, self.generator())
        assert one.shape == size and torch.equal(one, two)
        assert not torch.equal(one, x)
        if function is not lower_resolution:
            assert not torch.equal(one, function(x, self.generator(1)))

    def test_sizes_of_the_noise(self):
        flat = torch.full((2, 1, 64, 64), 0.5)
        for seed in range(20):
            assert 0 < add_noise(flat, self.generator(seed)).std() < 0.1
        stripes = add_stripes(flat, self.generator())
        assert torch.equal(stripes[:, :, :1].expand_as(stripes), stripes)  # constant per column
        assert stripes[0, 0, 0].std() > 0

    def test_blur(self):
        flat = torch.full((1, 2, 9, 7), 0.25)
        torch.testing.assert_close(gaussian_blur(flat, 1.5), flat)
        point = torch.zeros(1, 1, 21, 21)
        point[..., 10, 10] = 1
        blurred = gaussian_blur(point, 2.0)
        torch.testing.assert_close(blurred, blurred.flip(2).transpose(2, 3))
        y = torch.arange(21.0) - 10
        variance = (blurred[0, 0].sum(1) * y**2).sum()
        assert variance == pytest.approx(4.0, rel=0.05)  # cut off at 3 sigma

    def test_chance(self):
        x, _ = picture_pair((16, 16), batch=2)
        assert degrade(x, self.generator(), infrared=True, chance=0.0) is x
        changed = 0
        for seed in range(30):
            y = degrade(x, self.generator(seed), infrared=True, chance=0.5)
            assert y.min() >= 0 and y.max() <= 1
            changed += not torch.equal(x, y)
        assert 5 <= changed <= 25


class TestLosses:
    def pair(self):
        return picture_pair((20, 28), batch=2)

    def test_brightest(self):
        a, b = self.pair()
        assert losses.brightest(torch.maximum(a, b), a, b) == 0
        assert losses.brightest(a, a, b) > 0

    def test_gradient_selection(self):
        a, b = self.pair()
        assert losses.gradient_selection(a, a, 0.5 * a) == pytest.approx(0, abs=1e-6)
        # A brightness offset is free, the wrong polarity is not.
        assert losses.gradient_selection(a + 0.1, a, 0.5 * a) == pytest.approx(0, abs=1e-4)
        assert losses.gradient_selection(-a, a, 0.5 * a) > 1.5
        # Relative: a picture of a tenth of the contrast counts as much.
        one = losses.gradient_selection(b, a, 0.5 * a)
        assert losses.gradient_selection(b / 5, a / 5, a / 10) == pytest.approx(
            float(one), rel=1e-4
        )

    def test_correlation(self):
        a, b = self.pair()
        assert losses.correlation(a, 3 * a + 1).tolist() == pytest.approx([1, 1], abs=1e-3)
        assert losses.correlation(a, -a).tolist() == pytest.approx([-1, -1], abs=1e-3)
        assert (losses.correlation(a, b).abs() < 1).all()
        assert losses.difference_correlation(a + b, a, b) == pytest.approx(0, abs=1e-3)

    def test_out_of_range(self):
        x = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.25])
        assert losses.out_of_range(x) == pytest.approx(0.15)

    @pytest.mark.parametrize(
        "loss",
        [losses.gradient_selection, losses.brightest, losses.difference_correlation],
    )
    def test_flat_patches_have_finite_gradients(self, loss):
        """Sky and walls: no edge and no variance anywhere."""
        fused = torch.full((2, 1, 8, 8), 0.5, requires_grad=True)
        a, b = torch.full((2, 1, 8, 8), 0.5), torch.full((2, 1, 8, 8), 0.2)
        value = loss(fused, a, b)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(fused.grad).all()

    def test_gradients_are_those_of_the_values(self):
        a, b = (x.double()[:, :, :5, :6] for x in picture_pair((20, 28)))
        fused = (0.3 * a + 0.6 * b + 0.01).requires_grad_()
        for loss in (
            losses.gradient_selection,
            losses.brightest,
            losses.difference_correlation,
        ):
            assert torch.autograd.gradcheck(lambda f, loss=loss: loss(f, a, b), (fused,))
