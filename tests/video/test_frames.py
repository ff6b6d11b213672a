"""Formats: shapes, luma, colour; YUV against PyAV's conversion."""

from __future__ import annotations

import numpy as np
import pytest

from fuseengine.errors import FrameError
from fuseengine.video.frames import Colour, Picture, check_picture, format_of, with_luma

RNG = np.random.default_rng(0)
SHAPES = {"yuyv": (6, 8, 2), "nv12": (9, 8), "i420": (9, 8)}
COLOURS = [Colour(full, matrix) for full in (False, True) for matrix in ("bt601", "bt709")]


def smooth(name):
    """Smooth Y and chroma inside the limited range."""
    return RNG.integers(60, 190, SHAPES[name], np.uint8)


@pytest.mark.parametrize("name", SHAPES)
def test_size_and_luma(name):
    image = smooth(name)
    picture = Picture(image, name, Colour(full_range=True))
    assert picture.size == (6, 8)
    plane = image[..., 0] if name == "yuyv" else image[:6]
    np.testing.assert_array_equal(picture.luma(), plane)


def test_limited_luma_becomes_full():
    image = np.full((9, 8), 128, np.uint8)
    image[0, :3] = 16, 235, 7
    luma = Picture(image, "nv12").luma()
    assert luma[0, :3].tolist() == [0, 255, 0]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("name", SHAPES)
def test_luma_goes_back_where_it_came_from(name, colour):
    image = smooth(name)
    picture = Picture(image, name, colour)
    before = image.copy()
    np.testing.assert_array_equal(with_luma(picture.luma(), picture), image)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", SHAPES)
def test_chroma_stays(name):
    picture = Picture(smooth(name), name, Colour(full_range=True))
    luma = np.zeros((6, 8), np.uint8)
    out = Picture(with_luma(luma, picture), name, picture.colour)
    np.testing.assert_array_equal(out.luma(), luma)
    rest = (lambda x: x[..., 1]) if name == "yuyv" else (lambda x: x[6:])
    np.testing.assert_array_equal(rest(out.image), rest(picture.image))


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("name", SHAPES)
def test_rgb_is_what_ffmpeg_makes_of_it(name, colour):
    av = pytest.importorskip("av")
    # Constant chroma: FFmpeg interpolates between samples, which is another matter.
    image = RNG.integers(40, 200, (16, 16, 2) if name == "yuyv" else (24, 16), np.uint8)
    if name == "yuyv":
        image[:, 0::2, 1], image[:, 1::2, 1] = 100, 150
    elif name == "nv12":
        image[16:, 0::2], image[16:, 1::2] = 100, 150
    else:
        image[16:20], image[20:] = 100, 150
    pix_fmt = {"yuyv": "yuyv422", "nv12": "nv12", "i420": "yuv420p"}[name]
    frame = av.VideoFrame.from_ndarray(image, format=pix_fmt)
    expected = frame.reformat(
        format="rgb24",
        src_colorspace=1 if colour.matrix == "bt709" else 5,
        src_color_range=2 if colour.full_range else 1,
        dst_color_range=2,
    ).to_ndarray()
    ours = Picture(image, name, colour).rgb()
    assert ours.shape == (16, 16, 3)
    # swscale works with fixed-point tables.
    assert np.abs(ours.astype(int) - expected).max() <= 3


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_slices_are_frames_too(name, full_range):
    """Padded rows, rows upside down, every other pixel: as the same frame in memory of its own."""
    image = RNG.integers(0, 256, SHAPES[name], np.uint8)
    padded = np.zeros((image.shape[0], 11, *image.shape[2:]), np.uint8)
    padded[:, :8] = image
    spread = np.repeat(image, 2, axis=1)
    luma = RNG.integers(0, 256, (6, 16), np.uint8)[:, ::2]
    whole = Picture(image, name, Colour(full_range))
    for view in (padded[:, :8], image[::-1].copy()[::-1], spread[:, ::2]):
        np.testing.assert_array_equal(view, image)
        part = Picture(view, name, Colour(full_range))
        np.testing.assert_array_equal(part.rgb(), whole.rgb())
        np.testing.assert_array_equal(part.luma(), whole.luma())
        np.testing.assert_array_equal(with_luma(luma, part), with_luma(luma.copy(), whole))


def test_gray_and_rgb():
    gray = RNG.integers(0, 256, (3, 4), np.uint8)
    assert (Picture(gray, "gray8").rgb() == gray[..., None]).all()
    counts = np.array([[0, 65535]], np.uint16)
    assert Picture(counts, "gray16").luma() is counts
    assert Picture(counts, "gray16").rgb()[0, :, 0].tolist() == [0, 255]
    rgb = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert Picture(rgb, "rgb24").luma().tolist() == [[76, 150, 29]]


@pytest.mark.parametrize(
    "image", [np.zeros((3, 4)), np.zeros((3, 4, 4), np.uint8), np.zeros((3, 4, 3), np.uint16)]
)
def test_no_format(image):
    with pytest.raises(FrameError, match=r"got .*, expected uint8 .* convert it"):
        format_of(image)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("nv12", np.zeros((8, 8), np.uint8)),
        ("nv12", np.zeros((9, 7), np.uint8)),
        ("yuyv", np.zeros((6, 8), np.uint8)),
        ("i420", np.zeros((9, 8), np.uint16)),
        ("gray16", np.zeros((9, 8), np.uint8)),
        ("bgr24", np.zeros((9, 8, 3), np.uint8)),
    ],
)
def test_image_that_does_not_fit_its_format(name, image):
    with pytest.raises(FrameError, match=name):
        check_picture(Picture(image, name))
