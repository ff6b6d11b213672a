"""open_sink: round trips, interrupted files, what it says when it cannot."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fuseengine.errors import SinkError
from fuseengine.runtime.images import read_image
from fuseengine.video import Colour, open_sink, open_source
from tests.video.conftest import SIZE, fused, moving


def write(path, frames, name="rgb24", times=None, rate=None, **more):
    with open_sink(path, rate=rate) as sink:
        for k, image in enumerate(frames):
            moment = times[k] if times is not None else k / 30
            sink.write(fused(image, name, time_s=100.0 + moment, index=k, **more))
    return sink


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_video_round_trip(tmp_path, suffix):
    pytest.importorskip("av")
    path = tmp_path / f"fused{suffix}"
    frames = moving(20, colour=True)
    assert write(path, frames).written == 20
    with open_source(path) as source:
        got = list(source)
    assert source.size == SIZE
    assert len(got) == 20
    for frame, expected in zip(got, frames, strict=True):
        assert np.abs(frame.rgb().astype(int) - expected).mean() < 3
    np.testing.assert_allclose([f.time_s for f in got], np.arange(20) / 30, atol=1.1e-3)


def test_frames_keep_their_times(tmp_path):
    pytest.importorskip("av")
    times = [0, 0.02, 0.02, 0.5, 0.4, 2.0]  # equal, and one that goes back
    write(tmp_path / "t.mp4", moving(6, colour=True), times=times)
    got = [frame.time_s for frame in open_source(tmp_path / "t.mp4")]
    np.testing.assert_allclose(got, [0, 0.02, 0.02, 0.5, 0.5, 2.0], atol=1e-3)
    assert np.all(np.diff(got) > 0)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["i420", "nv12"])
def test_yuv_goes_to_the_encoder_as_it_is(tmp_path, name, full):
    pytest.importorskip("av")
    rng = np.random.default_rng(0)
    image = np.full((72, 64), 128, np.uint8)
    image[:48] = np.repeat(rng.integers(40, 200, (48, 4), np.uint8), 16, axis=1)
    if name == "i420":
        image[48:60], image[60:] = 90, 160
    else:
        image[48:, 0::2], image[48:, 1::2] = 90, 160
    write(tmp_path / "y.mp4", [image] * 3, name, colour=Colour(full, "bt709"))
    frame = open_source(tmp_path / "y.mp4").read()
    assert (frame.format, frame.colour) == ("i420", Colour(full, "bt709"))
    # Lossy: but another range would be 6 off on average.
    assert np.abs(frame.image[:48].astype(int) - image[:48]).mean() < 3
    assert np.abs(frame.image[48:60].astype(int) - 90).max() <= 3
    assert np.abs(frame.image[60:].astype(int) - 160).max() <= 3


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("gray8", np.full(SIZE, 77, np.uint8), 77),
        ("gray16", np.full(SIZE, 77 * 256, np.uint16), 77),
        ("yuyv", np.full((*SIZE, 2), 128, np.uint8), 130),
    ],
)
def test_other_formats(tmp_path, name, image, expected):
    pytest.importorskip("av")
    write(tmp_path / "g.mp4", [image] * 2, name)
    frame = open_source(tmp_path / "g.mp4").read()
    assert np.abs(frame.rgb().astype(int) - expected).max() <= 3


def test_odd_sides_and_changing_size(tmp_path):
    pytest.importorskip("av")
    frames = [*moving(2, (33, 47), colour=True), *moving(2, (66, 94), colour=True)]
    write(tmp_path / "o.mp4", frames)
    with open_source(tmp_path / "o.mp4") as source:
        got = list(source)
    assert [frame.size for frame in got] == [(34, 48)] * 4
    assert np.abs(got[0].rgb()[:33, :47].astype(int) - frames[0]).mean() < 3


def test_file_is_whole_after_an_exception(tmp_path):
    pytest.importorskip("av")
    with pytest.raises(ZeroDivisionError), open_sink(tmp_path / "e.mp4") as sink:
        for k, image in enumerate(moving(10, colour=True)):
            sink.write(fused(image, time_s=k / 30, index=k))
        1 / 0  # noqa: B018
    assert len(list(open_source(tmp_path / "e.mp4"))) == 10


def test_closing_twice_and_writing_after(tmp_path):
    pytest.importorskip("av")
    sink = write(tmp_path / "c.mp4", moving(2, colour=True))
    sink.close()
    with pytest.raises(SinkError, match="is closed"):
        sink.write(fused(moving(1, colour=True)[0]))


def test_no_frame_leaves_no_file(tmp_path):
    pytest.importorskip("av")
    open_sink(tmp_path / "n.mp4").close()
    assert not (tmp_path / "n.mp4").exists()


@pytest.mark.parametrize("where", ["out/", "%03d.png", "file://{}/f%04d.tif"])
def test_images(tmp_path, where):
    uri = (
        where.format(tmp_path)
        if "{}" in where
        else str(tmp_path / where) + "/" * where.endswith("/")
    )
    counts = np.arange(48 * 64, dtype=np.uint16).reshape(SIZE)
    write(uri, [counts, counts + 1], "gray16")
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    expected = {"out/": ["00000.png", "00001.png"], "%03d.png": ["000.png", "001.png"]}
    assert [file.name for file in files] == expected.get(where, ["f0000.tif", "f0001.tif"])
    np.testing.assert_array_equal(read_image(files[1]), counts + 1)


def test_images_of_yuv_are_rgb(tmp_path):
    write(f"{tmp_path}/", [np.full((72, 64), 128, np.uint8)], "nv12", colour=Colour(True))
    assert read_image(tmp_path / "00000.png").shape == (*SIZE, 3)


def test_null():
    assert write("null", moving(3)).written == 3


@pytest.mark.skipif(sys.platform != "linux", reason="shm:// is tested on Linux")
def test_shared_memory():
    image = moving(1, colour=True)[0]
    with open_sink("shm://fuse-test-sink") as sink:
        sink.write(fused(image, time_s=3.5))
        with open_source("shm://fuse-test-sink") as source:
            frame = source.read()
    np.testing.assert_array_equal(frame.image, image)
    assert frame.time_s == 3.5


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("fused.webp4", r"got 'fused.webp4', expected a file with one of .mp4, .mkv"),
        ("rtsp://a/b", "unknown scheme 'rtsp', expected a file"),
        ("%03d.txt", r"suffix '.txt', expected one of .*png"),
        ("shm://a/b", "expected a name without '/'"),
        ("no/such/folder/a.mp4", r"no folder no/such/folder; make it first"),
    ],
)
def test_what_cannot_be_opened(uri, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SinkError, match=text):
        open_sink(uri)


def test_pyav_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SinkError, match=r"needs PyAV.*pip install 'fuseengine\[video\]'"):
        open_sink(tmp_path / "a.mp4")


@pytest.mark.skipif(sys.platform != "linux", reason="asks for DISPLAY")
def test_no_display(monkeypatch):
    pytest.importorskip("cv2")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(SinkError, match="no display for a window"):
        open_sink("display://")


def test_opencv_without_windows(monkeypatch):
    cv2 = pytest.importorskip("cv2")

    def no_window(*_):
        raise cv2.error("The function is not implemented")

    monkeypatch.setenv("DISPLAY", ":77")
    monkeypatch.setattr(cv2, "namedWindow", no_window, raising=False)
    with pytest.raises(SinkError, match=r"without windows; install opencv-python in the place"):
        open_sink("display://")


def test_window_is_dismissed_by_a_key(monkeypatch):
    cv2 = pytest.importorskip("cv2")
    shown, keys = [], iter([-1, ord("q")])
    monkeypatch.setenv("DISPLAY", ":77")
    for name, function in {
        "namedWindow": lambda *_: None,
        "imshow": lambda title, image: shown.append((title, image[0, 0].tolist())),
        "waitKey": lambda _: next(keys),
        "getWindowProperty": lambda *_: 1.0,
        "destroyWindow": lambda _: None,
    }.items():
        monkeypatch.setattr(cv2, name, function, raising=False)
    image = np.zeros((*SIZE, 3), np.uint8)
    image[..., 0] = 9
    with open_sink("display://fused") as sink:
        sink.write(fused(image))
        assert not sink.dismissed
        sink.write(fused(image))
        assert sink.dismissed
    assert shown == [("fused", [0, 0, 9])] * 2  # OpenCV's order is BGR
