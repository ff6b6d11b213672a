"""A whole synthetic rig, from boards to a fused file: calibrate, video and latency.

The visible camera sees a textured plane and a dark square that moves over it; the infrared one
sees the square as the only warm thing, through its own lens and place, 80 ms later, with noise.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from fuseengine.alignment import Alignment, Rig
from fuseengine.cli import main
from fuseengine.runtime.images import write_image
from fuseengine.video import open_source
from tests.video.rig import Renderer, board_poses, rig

av = pytest.importorskip("av", reason="needs PyAV: pip install 'fuseengine[video]'")

RATE, FRAMES, LATE = 25, 18, 2
"""Frames per second, of each file, and how many the infrared camera is behind."""
GRID = (180, 240)


def square(frame: int) -> tuple[float, float]:
    """Centre of the warm square on the visible undistorted view."""
    return 140.0 + 10.0 * frame, 120.0 + 5.0 * frame


def inside(places: np.ndarray, frame: int) -> np.ndarray:
    column, row = square(frame)
    return (np.abs(places[..., 0] - column) < 26) & (np.abs(places[..., 1] - row) < 26)


def write_video(path, frames) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=RATE)
        height, width = frames[0].shape[:2]
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "12", "preset": "ultrafast"}
        for image in frames:
            picture = image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Boards of both cameras, and both cameras' recordings."""
    root, draw = tmp_path_factory.mktemp("rig"), Renderer(rig(), oversampling=2)
    for name in ("board_ir", "board_vis"):
        (root / name).mkdir()
    for index, board in enumerate(board_poses(8, seed=3)):
        write_image(root / "board_ir" / f"{index}.png", draw.infrared(board.shade, seed=index))
        write_image(root / "board_vis" / f"{index}.png", draw.visible(board.shade))
    rng = np.random.default_rng(0)
    visible, infrared = [], []
    for frame in range(FRAMES):

        def seen(places, frame=frame):
            texture = 0.5 + 0.2 * np.sin(places[..., 0] / 9) * np.cos(places[..., 1] / 11)
            return np.where(inside(places, frame), 0.25, texture)

        def warm(places, frame=frame):
            return np.where(inside(places, frame), 0.9, 0.2)

        visible.append(draw.visible(seen))
        levels = 255 * draw.draw("infrared", warm)
        levels += 4.0 * rng.standard_normal(levels.shape)
        infrared.append(np.clip(np.rint(levels), 0, 255).astype(np.uint8))
    # Every infrared frame is written two frame times after the moment that it shows.
    write_video(root / "ir.mp4", [infrared[0]] * LATE + infrared[: FRAMES - LATE])
    write_video(root / "vis.mp4", visible)
    return root


def test_calibrate_video_and_latency(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "rig.json"
    boards = ["--infrared", str(folder / "board_ir"), "--visible", str(folder / "board_vis")]
    assert main(["calibrate", *boards, "--board", "9x6", "-o", str(file)]) == 0
    found = Rig.load(file)
    assert found.error_px < 0.4

    bundle, out = tmp_path / "engine.fuse", tmp_path / "fused.mp4"
    size = ["--size", f"{GRID[1]}x{GRID[0]}"]
    compiled = ["compile", "drfusion-s", *size, "--backend", "onnxruntime", "-o", str(bundle)]
    assert main(compiled) == 0
    cameras = ["--infrared", str(folder / "ir.mp4"), "--visible", str(folder / "vis.mp4")]
    how = ["--alignment", str(file), "--offset", f"{1000 * LATE / RATE:g}ms", "--agc", "percentile"]
    capsys.readouterr()
    assert main(["video", *cameras, *how, "--engine", str(bundle), "-o", str(out)]) == 0
    assert f"{FRAMES - LATE} frames" in capsys.readouterr().out

    # The file plays, and the warm square is bright where the visible camera saw a dark one.
    align = Alignment(found, GRID)
    source = open_source(str(out))
    frames = []
    while (frame := source.read()) is not None:
        frames.append(frame.rgb())
    source.close()
    assert len(frames) == FRAMES - LATE and frames[0].shape == (*GRID, 3)
    row, column = np.mgrid[: GRID[0], : GRID[1]]
    scale = np.array([found.visible.size[1] / GRID[1], found.visible.size[0] / GRID[0]])
    places = (np.stack([column, row], -1) + 0.5) * scale - 0.5
    for index in (0, 5, len(frames) - 1):
        luma = frames[index].astype(float).mean(-1)
        target = inside(places, index)
        moved = inside(places, index + 4)
        assert luma[target].mean() > 1.3 * luma[~target].mean()
        assert luma[target].mean() > luma[moved].mean()  # there, and not where it was or will be
        edge = inside(places + np.array([9.0, 0.0]), index) & ~target
        assert luma[edge].mean() < 0.85 * luma[target].mean()
    assert align.covered > 0.8

    record = tmp_path / "latency.json"
    timed = [
        "--frames",
        "12",
        "--rate",
        "200",
        "-o",
        str(record),
        "--plot",
        str(tmp_path / "l.svg"),
    ]
    assert main(["latency", str(bundle), *timed]) == 0
    engine = json.loads(record.read_text())["engines"][str(bundle)]
    assert engine["fused"] + engine["dropped"] == 12 and engine["p50_ms"] > 0


def test_a_rig_for_other_sizes_is_refused(folder, tmp_path, capsys):
    file = tmp_path / "rig.json"
    Rig.of_same_view((90, 120), (360, 480)).save(file)
    cameras = ["--infrared", str(folder / "ir.mp4"), "--visible", str(folder / "vis.mp4")]
    model = ["--model", "drfusion-s", "--backend", "onnxruntime", "--size", "64x48"]
    out = ["-o", str(tmp_path / "out.mp4"), "--alignment", str(file)]
    assert main(["video", *cameras, *model, *out]) == 2
    assert (
        "expected 90x120 and 360x480, for which the rig was calibrated" in capsys.readouterr().err
    )
