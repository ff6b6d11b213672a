"""The benchmark of preparation: right before timed, one row per kind of pair, peer and threads."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("cv2")


from benchmarks import preparation

SIZES = ["--visible", "36x52", "--infrared", "21x30"]


pytestmark = pytest.mark.usefixtures("threads_restored")


def test_every_pair_against_its_peers(tmp_path, capsys):
    words = [*SIZES, "--threads", "1", "2", "--rounds", "3"]
    assert preparation.main([*words, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.rglob("preparation--*.json")
    result = json.loads(file.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        f"{kind} for {model} model vs {peer}, {threads}"
        for kind in ("rgb24", "nv12", "yuyv")
        for model in ("a luma", "an RGB")
        for threads in ("1 thread", "2 threads")
        for peer in ("OpenCV", "a Stream")
    ]
    for row in rows.values():
        assert row["n"] == 3
        assert row["outcome"] == ("PASS" if row["p50_ms"] < 6 else "MISS")
    assert result["settings"]["visible"] == "36x52"
    assert result["command"] == f"python -m benchmarks.preparation {' '.join(words)}"
    lost = [name for name, row in rows.items() if float(row["ratio"].split()[0]) < 1]
    assert [f"slower than the peer: {name}" for name in lost] == result["notes"][3:]
    assert "yuyv for an RGB model vs OpenCV, 2 threads" in capsys.readouterr().out


def test_one_pair_is_shown_and_not_kept(tmp_path, capsys):
    words = [*SIZES, "--threads", "1", "--rounds", "2", "--only", "NV12 for a luma"]
    assert preparation.main([*words, "--out", str(tmp_path)]) == 0
    assert "nv12 for a luma model vs OpenCV, 1 thread" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_slow_preparation_misses_the_target(monkeypatch, capsys):
    monkeypatch.setattr(preparation, "TARGET_MS", 0.0)
    preparation.main([*SIZES, "--threads", "1", "--rounds", "2", "--only", "rgb24 for a luma"])
    assert capsys.readouterr().out.count("MISS") == 2


@pytest.mark.parametrize("wrong", ["ours", "OpenCV", "a Stream"])
@pytest.mark.parametrize("buffer", [0, 1])
def test_a_wrong_contender_is_not_timed(monkeypatch, wrong, buffer):
    case = next(preparation.cases((36, 52), (21, 30)))

    def bad():
        pair = [plane.copy() for plane in case.exact]
        pair[buffer] += 0.1
        return tuple(pair)

    if wrong == "ours":
        case = dataclasses.replace(case, ours=bad)
    else:
        case = dataclasses.replace(case, peers={**case.peers, wrong: bad})
    monkeypatch.setattr(preparation, "cases", lambda *sizes: [case])
    with pytest.raises(SystemExit, match=f"rgb24 for a luma model, {wrong}: differs by 0.1"):
        preparation.main([*SIZES, "--threads", "1"])


def test_the_scene_is_one_that_needs_all_steps():
    """Counts in a small part of 16 bits, places outside the infrared picture, rows to pad."""
    scene = preparation.scene("yuyv", "rgb", (36, 52), (21, 30))
    assert scene.visible.image.shape == (36, 52, 2)
    assert np.ptp(scene.counts) < 2_000
    infrared, visible = preparation.exact(scene)
    assert infrared.shape == visible.shape == (1, 3, 48, 64)
    assert (infrared == 0).any()
    assert np.ptp(infrared) > 0.8
    assert np.ptp(visible, axis=(0, 2, 3)).min() > 0.3
