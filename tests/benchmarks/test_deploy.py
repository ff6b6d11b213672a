"""The benchmark of the run side, tiny."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest

from benchmarks import deploy
from benchmarks.harness import Result, validate_result

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


WAYS = ["onnxruntime/fp32"] + ["openvino/fp32"] * (find_spec("openvino") is not None)


def test_a_small_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path / "cache"))
    words = f"drfusion-s --size 40x32 --ways {','.join(WAYS)} --runs 1 --threads 1 --out"
    monkeypatch.setattr(sys, "argv", ["deploy", *words.split(), str(tmp_path)])
    deploy.main()
    (path,) = tmp_path.rglob("deploy-drfusion-s-32x40--*.json")
    result = json.loads(path.read_text())
    validate_result(result)
    eager, ours, *others = result["rows"]
    assert ours["name"] == "bundle, onnxruntime/fp32" and ours["how"] == "onnxruntime/fp32"
    assert ours["psnr_db"] == "inf" or ours["psnr_db"] > 60
    # A process without PyTorch is smaller, whatever else is measured.
    assert ours["resident_mb"] < eager["resident_mb"]
    assert eager["of eager's memory"] == 1.0
    assert "onnxruntime/fp32" in capsys.readouterr().out
    if others:
        first, later = others
        assert first["name"] == "bundle, openvino/fp32, first start"
        assert later["name"] == "bundle, openvino/fp32"
        assert later["load_s"] < first["load_s"] and later["psnr_db"] == first["psnr_db"]


def test_what_misses_a_target_is_noted():
    result = Result(suite="x", device="cpu", title="x", machine={})
    run = {"import_s": 0.1, "load_s": 1, "resident_mb": 90.0, "peak_mb": 95.0, "how": ["a/b"]}
    frame = [[0, 1]]
    eager = {**run, "resident_mb": 300.0, "load_to_frame_s": 3, "fused": frame}
    ours = {**run, "load_to_frame_s": 1.7, "fused": frame}
    deploy.add_rows(result, {"eager PyTorch": [eager], "bundle": [ours]})
    assert result.notes == ["MISS: bundle: load_to_frame_s 1.7, target 1.5"]
    assert result.rows[1]["of eager's memory"] == 0.3
