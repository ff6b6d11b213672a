"""``fuseengine export``."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file

import fuseengine
from fuseengine.cli import main
from tests.helpers import tiny


@pytest.fixture
def small(monkeypatch):
    """Stands for the packaged model: what is tested here is the command."""
    model = tiny()
    monkeypatch.setattr(fuseengine, "load_model", lambda name: model, raising=False)
    return model


def inputs(path):
    """Name -> dimensions of a model's inputs."""
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in onnx.load(path).graph.input
    }


def test_help_has_examples_and_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["export", "onnx", "--help"]) == 0
    text = capsys.readouterr().out
    assert "\n  fuseengine export onnx drfusion-s --size 640x480" in text
    assert max(map(len, text.splitlines())) <= 80


def test_one_model(small, tmp_path, capsys):
    path = tmp_path / "fuse.onnx"
    argv = ["export", "onnx", "drfusion-s", "--size", "41x30", "--whole", "-o", str(path)]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert inputs(path) == {name: [1, 1, 32, 44] for name in ("infrared", "visible")}
    assert text.startswith(f"{path}: opset 18, ")
    assert "  in   infrared: float32[1, 1, 32, 44]\n" in text
    assert "  out  fused: float32[1, 1, 32, 44]\n" in text
    last = text.splitlines()[-1]
    assert last.startswith("checked in ONNX Runtime at 41x30 against the float32 model: ")
    assert float(last.partition("model: ")[2].partition(" dB")[0]) >= 80


def test_frames(small, tmp_path):
    """The file fuses what cameras give, without this package."""
    path = tmp_path / "cam.onnx"
    argv = ["export", "onnx", "drfusion-s", "--size", "41x30", "--whole", "--frames", "-o"]
    assert main([*argv, str(path), "--no-check"]) == 0
    rng = np.random.default_rng(0)
    infrared = rng.integers(0, 256, (1, 30, 41), np.uint8)
    visible = rng.integers(0, 256, (1, 30, 41, 3), np.uint8)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (fused,) = session.run(None, {"infrared": infrared, "visible": visible})
    assert (fused.shape, fused.dtype) == (visible.shape, np.uint8)


def test_networks_in_half_precision(small, tmp_path, capsys):
    folder = tmp_path / "networks"
    argv = ["export", "onnx", "drfusion-s", "--dynamic", "--precision", "fp16", "-o", str(folder)]
    assert main([*argv, "--keep", "ConvTranspose", "--no-check"]) == 0
    text = capsys.readouterr().out
    names = sorted(p.name for p in folder.glob("*.onnx"))
    assert names == ["unet-0-1.onnx", "unet-0.onnx"]
    assert inputs(folder / names[0])["in0"] == [1, 3, "H", "W"]
    assert text.count(" half, ") == 2
    assert text.endswith("not compared with the model\n")


def test_own_weights(tmp_path, capsys, monkeypatch):
    model, other = tiny(seed=3), tiny(seed=1)
    monkeypatch.setattr(fuseengine, "build", lambda name: other, raising=False)
    weights = tmp_path / "weights.safetensors"
    save_file({n: p.detach() for n, p in model.named_parameters()}, weights)
    argv = ["export", "onnx", "drfusion-s", "--size", "24x16", "--whole", "--no-check", "-o"]
    written = [tmp_path / "random.onnx", tmp_path / "own.onnx"]
    assert main([*argv, str(written[0]), "--random-weights"]) == 0
    assert main([*argv, str(written[1]), "--weights", str(weights)]) == 0
    stems = []
    for path in written:
        tensors = {i.name: i for i in onnx.load(path).graph.initializer}
        stems.append(torch.from_numpy(onnx.numpy_helper.to_array(tensors["unet.stem.bias"]).copy()))
    assert torch.equal(stems[1], model.unet.stem.bias)
    assert not torch.equal(*stems)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["export"], "the following arguments are required: FORMAT"),
        (["export", "tflite"], "invalid choice: 'tflite'"),
        (["export", "onnx", "drfusion-s"], "required: -o/--output"),
        (["export", "onnx", "m", "-o", "x", "--size", "640"], "got '640', expected WIDTHxHEIGHT"),
        (["export", "onnx", "m", "-o", "x", "--size", "1x9"], "of at least 2"),
        (["export", "onnx", "m", "-o", "x", "--size", "8x8", "--dynamic"], "not allowed with"),
        (["export", "onnx", "m", "-o", "x", "--frames"], "give --whole too"),
        (["export", "onnx", "m", "-o", "x", "--attention-mb", "9"], "give --size too"),
        (["export", "onnx", "drfusion", "-o", "x"], "weights of 'drfusion' are not packaged"),
        (["export", "onnx", "drfusion-z", "-o", "x"], "Did you mean 'drfusion-s'"),
    ],
)
def test_one_line_errors(argv, message, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fuseengine: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_unknown_precision(small, tmp_path, capsys):
    assert main(["export", "onnx", "drfusion-s", "-o", str(tmp_path), "--precision", "fp8"]) == 2
    assert "unknown precision 'fp8'; expected one of: bf16, fp16, fp32" in capsys.readouterr().err
