"""``fuseengine train``."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from fuseengine.cli import main
from fuseengine.cli.train import _duration


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("ir", "vis"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(2):
            image = rng.integers(0, 256, (40, 48), np.uint8)
            Image.fromarray(image).save(tmp_path / "data" / name / f"{index}.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("45m", 2700), ("2h30m", 9000), ("1h1m1s", 3661), ("0.5h", 1800)],
)
def test_durations(text, seconds):
    assert _duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "2x", "h", "30m2h", "-5", "1e3"])
def test_wrong_durations(text, capsys):
    argv = ["train", "drfusion-s", "--data", ".", "--out", "o", f"--stop-after={text}"]
    assert main(argv) == 2
    assert "expected a time such as" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "ssim", "ssim=", "=1", "ssim=-1", "ssim=nan", "ssim=inf"])
def test_wrong_loss_weights(text, capsys):
    argv = ["train", "drfusion-s", "--data", ".", "--out", "o", f"--loss-weight={text}"]
    assert main(argv) == 2
    assert "expected TERM=W with a number W >= 0" in capsys.readouterr().err


def test_what_is_handed_on(data, tmp_path, capsys, monkeypatch):
    trainer = pytest.importorskip("fuseengine.training.trainer")
    seen = {}

    def fake(model, folders, out, settings, **options):
        seen.update(options, name=model.name, data=folders, out=out, settings=settings)
        weights = out / "fusion" / "weights.safetensors"
        return {"steps": 5, "seconds": 60.0, "pictures": 7, "losses": {}, "weights": weights}

    monkeypatch.setattr(trainer, "train", fake)
    argv = ["train", "dmfuse-s", "--stage", "fusion", "--data", str(data), "--data", str(tmp_path)]
    argv += ["--out", str(tmp_path / "out"), "--init", "first.pt", "--steps", "5"]
    argv += ["--loss-weight", "ssim=2", "--loss-weight", "correlation=0.5", "--device", "cpu"]
    assert main(argv) == 0
    assert seen["data"] == [data, tmp_path] and seen["name"] == "dmfuse-s"
    assert seen["stage"] == "fusion" and str(seen["init"]) == "first.pt"
    assert seen["loss_weights"] == {"ssim": 2.0, "correlation": 0.5}
    told = capsys.readouterr().out
    assert "5 of 5 steps on 7 pictures in 1.0 min" in told
    assert told.splitlines()[-1].endswith("weights.safetensors") and "fusion" in told


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (["drfusio-s"], "Did you mean 'drfusion-s'?"),
        (["drfusion-s", "--data", "nowhere"], "no folder nowhere"),
        (["drfusion-s", "--device", "cpo"], "Did you mean 'cpu'?"),
        (["drfusion-s", "--patch", "37"], "expected a multiple of 4"),
        (
            ["drmf-s"],
            "expected one of restoration, fusion, refinement, in this order: give --stage NAME",
        ),
        (["drmf-s", "--stage", "restore"], "Did you mean 'restoration'?"),
        (["drmf-s", "--stage", "fusion"], "into the same folder, or give --init FILE"),
        (["drfusion-s", "--init", "nowhere.pt"], "nowhere.pt: no such file"),
        (["drfusion-s", "--loss-weight", "range2=1"], "Did you mean 'range'?"),
    ],
)
def test_bad_input(data, tmp_path, capsys, change, text):
    pytest.importorskip("torch")
    name, *rest = change
    argv = ["train", name, "--data", str(data), "--out", str(tmp_path / "out"), *rest]
    assert main(argv) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("fuseengine: error: ") and text in captured
    assert captured.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(data, tmp_path, capsys):
    (tmp_path / "out").touch()
    argv = ["train", "drfusion-s", "--data", str(data), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err


def test_without_torch(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    argv = ["train", "drfusion-s", "--data", str(data), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "pip install 'fuseengine[train]'" in capsys.readouterr().err


@pytest.mark.slow
def test_trains_and_resumes(data, tmp_path, command):
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    out = tmp_path / "out"
    size = ["--patch", 32, "--batch", 1, "--device", "cpu", "--threads", 1]
    for steps in (1, 2):
        done = command("train", "drfusion-s", "--data", data, "--out", out, *size, "--steps", steps)
        assert done.returncode == 0, done.stderr
        assert f"{steps} of {steps} steps on 2 pairs" in done.stdout
        assert "last losses: " in done.stdout
        assert done.stderr == ""  # no progress bar without a terminal
    assert (out / "weights.safetensors").stat().st_size > 1e6
    # The second run took the first one's step over.
    assert [line[:10] for line in (out / "log.jsonl").read_text().splitlines()] == [
        '{"step": 1',
        '{"step": 2',
    ]


def test_interrupted(data, tmp_path, capsys, monkeypatch):
    trainer = pytest.importorskip("fuseengine.training.trainer")

    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", stop)
    argv = ["train", "drfusion-s", "--data", str(data), "--out", str(tmp_path / "out")]
    assert main(argv) == 130
    assert "the same command goes on from the last one" in capsys.readouterr().err
