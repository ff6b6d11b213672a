"""The benchmark of temporal="warm", short: its rows, and the video it is measured on."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fuseengine as fe
from benchmarks import temporal

pytest.importorskip("scipy")


def test_rows(tmp_path, capsys):
    words = ["--size", "48x64", "--frames", "6", "--steps", "1", "--precision", "fp32"]
    assert temporal.main([*words, "--threads", "1", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.rglob("temporal--*.json")
    warm, full = json.loads(file.read_text())["rows"]
    assert (warm["resumed"], warm["in_full"]) == (4, 2)  # the first frame, and the cut
    assert warm["psnr_db"] > 40 and warm["n"] == full["n"] == 4
    assert 0 < warm["flicker"] < 2 * full["flicker"]
    assert len(list(tmp_path.glob("*.png"))) == 8
    assert "flicker" in capsys.readouterr().out


def test_video():
    infrared, visible = temporal.video(*fe.demo_pair((80, 100)), (48, 64), 8, noise=0.0)
    assert infrared.shape == (8, 48, 64) and visible.shape == (8, 48, 64, 3)
    change = np.abs(np.diff(infrared.astype(int), axis=0)).mean(axis=(1, 2))
    assert change.argmax() == 3 and change[3] > 2 * np.delete(change, 3).max()  # the cut
    assert (infrared[:5] == 235).any(axis=(1, 2)).all()  # the disc, until it leaves


def test_pair_too_small(tmp_path):
    for name, image in zip(("ir.png", "vis.png"), fe.demo_pair((40, 60)), strict=True):
        fe.write_image(tmp_path / name, image)
    with pytest.raises(SystemExit, match="expected"):
        temporal.main(["--pair", str(tmp_path / "ir.png"), str(tmp_path / "vis.png")])
