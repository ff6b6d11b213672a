"""What the metrics take as a picture, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fuseengine.errors import FrameError, SizeMismatchError
from fuseengine.metrics import evaluate, grey_levels, qabf
from fuseengine.metrics.images import Images, strips
from tests.metrics.pictures import picture, triple

KEYS = ["EN", "MI", "SSIM", "Qabf"]


class TestTaken:
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int32", "uint64"])
    def test_numbers_of_the_8_bit_range(self, dtype):
        levels = picture(0) // 2
        np.testing.assert_array_equal(grey_levels(levels.astype(dtype)), levels)

    def test_floats_are_rounded_as_saving_does(self):
        x = np.array([[0.4, 0.6], [254.6, -0.3]])
        np.testing.assert_array_equal(grey_levels(x), [[0, 1], [255, 0]])

    def test_16_bit_is_scaled(self):
        x = np.array([[0, 128, 129, 257], [300, 32_768, 65_534, 65_535]], np.uint16)
        np.testing.assert_array_equal(grey_levels(x), np.rint(x / 257))

    def test_colour_is_the_luma_of_pillow(self):
        rgb = np.stack([picture(seed) for seed in range(3)], axis=2)
        expected = np.asarray(Image.fromarray(rgb).convert("L"))
        np.testing.assert_array_equal(grey_levels(rgb), expected)
        grey = np.repeat(picture(0)[..., None], 3, axis=2)
        np.testing.assert_array_equal(grey_levels(grey), picture(0))

    def test_colour_beside_grey(self):
        fused, a, b = triple()
        colour = np.repeat(b[..., None], 3, axis=2)
        assert evaluate(fused, a, colour, KEYS) == evaluate(fused, a, b, KEYS)

    def test_views_and_lists(self):
        fused, a, b = triple((24, 30))
        values = evaluate(fused, a, b, KEYS)
        assert evaluate(*(x.tolist() for x in (fused, a, b)), KEYS) == values
        turned = [np.asfortranarray(x) for x in (fused, a, b)]
        assert evaluate(*turned, KEYS) == values
        wide = [np.repeat(x, 2, axis=1)[:, ::2] for x in (fused, a, b)]
        assert evaluate(*wide, KEYS) == values

    def test_a_tensor(self):
        torch = pytest.importorskip("torch")
        fused, a, b = triple((24, 30))
        tensors = [torch.from_numpy(x) for x in (fused, a, b)]
        assert evaluate(*tensors, KEYS) == evaluate(fused, a, b, KEYS)

    def test_pictures_are_not_changed(self):
        given = triple((24, 30))
        copies = [x.copy() for x in given]
        for x in given:
            x.setflags(write=False)
        evaluate(*given)
        for x, copy in zip(given, copies, strict=True):
            np.testing.assert_array_equal(x, copy)

    def test_the_fused_image_alone(self):
        fused, _, _ = triple()
        assert list(evaluate(fused, metrics=["EN", "SD", "SF", "AG"])) == ["EN", "SD", "SF", "AG"]


class TestRefused:
    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (np.full((40, 50), 0.5), r"b holds 0\.5\.\.0\.5; expected grey levels.*multiply"),
            (np.full((40, 50), np.nan), "b holds NaN or infinity; expected 0..255; replace"),
            (np.full((40, 50), np.inf), "b holds NaN or infinity"),
            (np.full((40, 50), 256), r"b holds 256\.\.256; expected 0..255; scale it, or give"),
            (np.full((40, 50), -1), r"b holds -1\.\.-1"),
            (np.full((40, 50), 255.6), r"b holds 256\.0\.\.256\.0"),
            (np.ones((40, 50), bool), "b has dtype bool; expected uint8, uint16, or numbers"),
            (np.ones((40, 50), complex), "b has dtype complex128"),
            (np.full((40, 50), "x"), "b has dtype <U1"),
            (
                np.zeros((1, 40, 50)),
                r"b has shape \(1, 40, 50\); expected \(H, W\), or \(H, W, 3\)",
            ),
            (np.zeros((3, 40, 50)), "put channels last"),
            (np.zeros((40, 50, 4)), r"b has shape \(40, 50, 4\)"),
            (np.zeros(40), r"b has shape \(40,\)"),
            (np.zeros((1, 50)), "at least 2x2"),
            (np.zeros((0, 0)), "at least 2x2"),
        ],
    )
    def test_a_picture(self, other, message):
        with pytest.raises(FrameError, match=message):
            qabf(picture(0), picture(1), other)

    def test_sizes_that_differ(self):
        x = picture(0)
        message = (
            r"fused \(40, 50\), a \(40, 50\), b \(40, 49\); expected three \(H, W\) of one size"
        )
        with pytest.raises(SizeMismatchError, match=message):
            evaluate(x, x, x[:, 1:])

    def test_sources_that_are_missing(self):
        x = picture(0)
        with pytest.raises(FrameError, match="no b; expected the fused image and both"):
            qabf(x, x)
        with pytest.raises(FrameError, match="no a and no b"):
            evaluate(x)
        with pytest.raises(FrameError, match="no a and no b"):
            evaluate(x, metrics=["EN", "MI"])

    def test_black_and_white_floats_may_be_grey_levels(self):
        """Only 0 and 1: nothing says that they are a range of 0..1."""
        assert grey_levels(np.eye(4)).max() == 1


class TestImages:
    def test_shared_results_are_computed_once(self):
        calls = []

        def compute(images, x):
            calls.append(x)
            return x

        images = Images(*triple())
        assert [images.once(compute, x) for x in (1, 2, 1)] == [1, 2, 1]
        assert calls == [1, 2]

    def test_stretched(self):
        fused = np.array([[10, 20], [30, 61]], np.uint8)
        stretched = Images(fused, fused, fused * 0).stretched
        np.testing.assert_array_equal(stretched["f"], [[0, 50], [100, 255]])
        np.testing.assert_array_equal(stretched["b"], 0)

    @pytest.mark.parametrize("size", [(1, 1), (7, 5), (100, 3), (3, 20_000)])
    def test_strips_cover_all_rows(self, size):
        rows = [row for part in strips(*size, 64) for row in range(size[0])[part]]
        assert rows == list(range(size[0]))
