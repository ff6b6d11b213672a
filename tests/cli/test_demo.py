"""``fuseengine demo``: the first thing a newcomer runs, so with the real engine."""

from __future__ import annotations

import numpy as np
import pytest

from fuseengine.cli import main
from fuseengine.demo import demo_pair
from fuseengine.runtime.images import read_image


@pytest.mark.slow
def test_demo(command, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    options = ["--backend", "onnxruntime", "--precision", "fp32"]
    done = command("demo", "-o", "x.png", "--keep-sources", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'x.png'}" in done.stdout
    assert "model: drfusion-s, 640x480" in done.stdout
    assert "backend onnxruntime, precision fp32" in done.stdout
    assert "ms per pair" in done.stdout and "dB PSNR" in done.stdout
    infrared, visible = demo_pair()
    np.testing.assert_array_equal(read_image(tmp_path / "x-infrared.png"), infrared)
    np.testing.assert_array_equal(read_image(tmp_path / "x-visible.png"), visible)
    fused = read_image(tmp_path / "x.png")
    assert fused.shape == visible.shape
    # Brighter where it is warm: the people show, as they hardly do in the visible image.
    warm = infrared > 200
    assert fused[warm].mean() > visible[warm].mean() + 40


def test_place_is_checked_first(tmp_path, fake, capsys):
    assert main(["demo", "-o", str(tmp_path / "no" / "x.png")]) == 2
    assert "make it first" in capsys.readouterr().err
    assert fake.asked == []
