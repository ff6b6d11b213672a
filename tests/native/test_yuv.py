"""YUV frames to RGB: bit by bit what NumPy makes of them in float32, and their refusals."""

from __future__ import annotations

import numpy as np
import pytest

from fuseengine import _native

FORMATS = ("yuyv", "nv12", "i420")
COLOURS = [(full, matrix) for full in (False, True) for matrix in ("bt601", "bt709")]
# One pair of pixels; rows of I420's chroma in halves; one block of columns, and a little more.
SIZES = [(2, 2), (6, 8), (14, 22), (4, 512), (26, 1034)]
WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}


def shape_of(name, height, width):
    return (height, width, 2) if name == "yuyv" else (height * 3 // 2, width)


def frame(name, height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, shape_of(name, height, width), np.uint8)


def planes(image, name):
    """Y, U and V, each (H, W): chroma repeated over the pixels it covers."""
    if name == "yuyv":
        y, u, v = image[..., 0], image[:, 0::2, 1], image[:, 1::2, 1]
    else:
        height = image.shape[0] * 2 // 3
        y, rest = image[:height], image[height:]
        if name == "nv12":
            u, v = rest[:, 0::2], rest[:, 1::2]
        else:
            u, v = rest.reshape(2, height // 2, -1)
        u, v = u.repeat(2, axis=0), v.repeat(2, axis=0)
    return y, u.repeat(2, axis=1), v.repeat(2, axis=1)


def unrounded(image, name, full_range, matrix, dtype):
    """Red, green and blue, neither rounded nor clipped, in the given precision."""
    y, u, v = (plane.astype(dtype) for plane in planes(image, name))
    u, v = u - dtype(128), v - dtype(128)
    if not full_range:
        y = (y - dtype(16)) * dtype(255 / 219)
        u, v = u * dtype(255 / 224), v * dtype(255 / 224)
    red, blue = WEIGHTS[matrix]
    green = 1 - red - blue
    of_red, of_blue = 2 * (1 - red), 2 * (1 - blue)
    changes = (
        dtype(of_red) * v,
        dtype(-of_red * red / green) * v - dtype(of_blue * blue / green) * u,
        dtype(of_blue) * u,
    )
    return np.stack([y + change for change in changes], axis=-1)


def expected(image, name, full_range, matrix):
    values = unrounded(image, name, full_range, matrix, np.float32)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def converted(image, name, full_range=False, matrix="bt601", out=None):
    if out is None:
        height, width = image.shape[:2]
        out = np.full((height if name == "yuyv" else height * 2 // 3, width, 3), 77, np.uint8)
    _native.yuv_to_rgb(image, out, format=name, full_range=full_range, matrix=matrix)
    return out


@pytest.mark.parametrize(("full_range", "matrix"), COLOURS)
@pytest.mark.parametrize("name", FORMATS)
class TestValues:
    @pytest.mark.parametrize("size", SIZES)
    def test_bits_of_float32(self, name, full_range, matrix, size, level):
        image = frame(name, *size)
        ours = converted(image, name, full_range, matrix)
        np.testing.assert_array_equal(ours, expected(image, name, full_range, matrix))

    def test_extreme_values(self, name, full_range, matrix, level):
        extremes = np.array([0, 1, 15, 16, 127, 128, 129, 235, 240, 254, 255], np.uint8)
        shape = shape_of(name, 64, 66)
        image = np.random.default_rng(1).choice(extremes, shape)
        ours = converted(image, name, full_range, matrix)
        np.testing.assert_array_equal(ours, expected(image, name, full_range, matrix))

    def test_nearest_level_of_the_exact_colour(self, name, full_range, matrix):
        image = frame(name, 64, 512)
        exact = np.clip(unrounded(image, name, full_range, matrix, np.float64), 0, 255)
        ours = converted(image, name, full_range, matrix)
        assert np.abs(ours - exact).max() <= 0.5 + 1e-4

    def test_threads_do_not_matter(self, name, full_range, matrix, same_bits):
        image = frame(name, 110, 1030)
        same_bits(
            lambda out: converted(image, name, full_range, matrix, out),
            np.zeros((110, 1030, 3), np.uint8),
        )


def test_every_luma_and_both_chromas(level):
    """All 2^16 pairs of Y and V with one U, and of Y and U with one V."""
    luma, chroma = np.divmod(np.arange(65536), 256)
    for swap in (False, True):
        image = np.full((256, 512, 2), 99, np.uint8)
        image[:, 0::2, 0] = image[:, 1::2, 0] = luma.reshape(256, 256)
        image[:, (0 if swap else 1) :: 2, 1] = chroma.reshape(256, 256)
        for colour in COLOURS:
            ours = converted(image, "yuyv", *colour)
            np.testing.assert_array_equal(ours, expected(image, "yuyv", *colour))


def test_known_colours():
    """Black, white, and the saturated primaries of BT.601 in limited range (H.273 rounded)."""
    colours = {
        (16, 128, 128): (0, 0, 0),
        (235, 128, 128): (255, 255, 255),
        (81, 90, 240): (254, 0, 0),
        (145, 54, 34): (0, 255, 1),
        (41, 240, 110): (0, 0, 255),
    }
    for (y, u, v), rgb in colours.items():
        image = np.array([[[y, u], [y, v]]], np.uint8)
        assert converted(image, "yuyv").tolist() == [[list(rgb)] * 2]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_may_be_further_apart_than_they_are_long(name):
    image = frame(name, 6, 10)
    wide = np.full((image.shape[0], 13, *image.shape[2:]), 55, np.uint8)
    wide[:, :10] = image
    out = np.full((6, 17, 3), 77, np.uint8)
    converted(wide[:, :10], name, out=out[:, :10])
    np.testing.assert_array_equal(out[:, :10], converted(image, name))
    assert (out[:, 10:] == 77).all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "shape", "told"),
        [
            ("yuyv", (4, 7, 2), "even W"),
            ("yuyv", (4, 8), r"shape \(H, W, 2\)"),
            ("yuyv", (4, 8, 3), r"shape \(H, W, 2\)"),
            ("yuyv", (0, 8, 2), "H >= 1"),
            ("nv12", (8, 8), "even H"),
            ("nv12", (9, 7), "even H, W"),
            ("i420", (9, 8, 1), r"shape \(H \* 3 / 2, W\)"),
            ("i420", (0, 8), ">= 2"),
        ],
    )
    def test_shapes(self, name, shape, told):
        with pytest.raises(ValueError, match=f"image: got uint8.*{told}"):
            converted(np.zeros(shape, np.uint8), name, out=np.zeros((6, 8, 3), np.uint8))

    @pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.float32])
    def test_types(self, dtype):
        with pytest.raises(ValueError, match="image: got .* expected aligned uint8"):
            converted(np.zeros((9, 8), dtype), "nv12")
        with pytest.raises(ValueError, match="out: got .* expected aligned uint8"):
            converted(frame("nv12", 6, 8), "nv12", out=np.zeros((6, 8, 3), dtype))

    @pytest.mark.parametrize("shape", [(6, 8), (9, 8, 3), (6, 7, 3), (6, 8, 4)])
    def test_outputs(self, shape):
        with pytest.raises(ValueError, match=r"out: got uint8.* expected shape \(6, 8, 3\)"):
            converted(frame("i420", 6, 8), "i420", out=np.zeros(shape, np.uint8))

    def test_layouts(self):
        packed, planar = frame("yuyv", 12, 16), frame("nv12", 12, 18)
        for image, name in [
            (packed[:, ::2], "yuyv"),
            (packed[::-1], "yuyv"),
            (packed[..., ::-1], "yuyv"),
            (planar.T, "nv12"),
            (planar[:, :16:2], "i420"),
        ]:
            with pytest.raises(ValueError, match="image: got .* expected adjacent pixels"):
                converted(image, name)
        with pytest.raises(ValueError, match="out: got .* expected adjacent pixels"):
            converted(packed, "yuyv", out=np.zeros((12, 32, 3), np.uint8)[:, ::2])

    def test_memory(self):
        image = np.zeros((6, 8, 3), np.uint8)
        with pytest.raises(ValueError, match="out overlaps image in memory"):
            converted(image.reshape(-1)[:72].reshape(9, 8), "nv12", out=image)
        image.flags.writeable = False
        with pytest.raises(ValueError, match="expected a writeable array"):
            converted(frame("nv12", 6, 8), "nv12", out=image)

    def test_words(self):
        with pytest.raises(ValueError, match="format: got 'yuv', expected yuyv, nv12 or i420"):
            converted(np.zeros((9, 8), np.uint8), "yuv")
        with pytest.raises(ValueError, match="matrix: got 'bt2020', expected bt601 or bt709"):
            converted(frame("nv12", 6, 8), "nv12", matrix="bt2020")
