"""The benchmark of the predictions: rows with both times, rates that were measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fuseengine as fe
from benchmarks import roofline
from fuseengine import _native
from fuseengine.targets import get_target
from tests.helpers import system


@pytest.fixture(autouse=True)
def _threads():
    """The benchmark sets them for its whole process."""
    before = torch.get_num_threads(), _native.num_threads()
    yield
    torch.set_num_threads(before[0])
    _native.set_num_threads(before[1])


def test_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fe, "build", {"drfusion-s": system("drfusion-s")}.__getitem__)
    words = ["--systems", "drfusion-s", "--backends", "onnxruntime", "--size", "48x64"]
    words += ["--rounds", "2", "--threads", "1", "--out", str(tmp_path)]
    assert roofline.main(words) == 0
    assert "predicted / measured" in capsys.readouterr().out
    (file,) = Path(tmp_path).rglob("*.json")
    found = json.loads(file.read_text())
    (row,) = found["rows"]
    assert row["name"] == "drfusion-s, onnxruntime" and row["measured ms"] > 0
    ratio = row["predicted ms"] / row["measured ms"]
    assert row["predicted / measured"] == pytest.approx(ratio)
    assert found["settings"]["copy GB/s"] > 0.1


def test_best_takes_the_higher_rates():
    target = get_target("x86-cpu")
    faster = replace(target, peaks={"fp32": 2 * target.peak("fp32")}, bandwidth=1.0)
    best = roofline.best(target, faster)
    assert best.peak("fp32") == faster.peak("fp32") and best.bandwidth == target.bandwidth
