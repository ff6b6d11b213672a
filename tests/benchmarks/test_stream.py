"""The benchmark of streams, short: its rows, and that a stream that queues would miss."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import harness, stream
from tests.video.conftest import SIZE
from tests.video.lane_engine import LaneEngine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_all_measurements(tmp_path, capsys):
    words = ["--model", "none", "--size", "24x32", "--rounds", "2", "--seconds", "2"]
    assert stream.main([*words, "--frames", "400", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.rglob("stream--*.json")
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    alone, inside, slow, soak = rows.values()
    assert alone["p50_ms"] >= 60
    assert inside["p50_ms"] >= 60
    assert inside["n"] == alone["n"] == 24
    assert slow["captured"] <= 60
    assert slow["dropped"] > 10
    assert slow["fps"] < 17
    assert soak["fused"] == 400
    assert capsys.readouterr().out.count("soak of 400 frames 24x32") == 1


@pytest.fixture
def engine():
    made = LaneEngine(6, 12)
    yield made
    made.on.stop()


def test_pipelining(engine):
    result = harness.Result("stream", "cuda", "title")
    stream.pipelining(result, "lanes", engine, SIZE, 2)
    called, pipelined = result.to_dict()["rows"]
    assert called["n"] == pipelined["n"] == 96
    assert called["p50_ms"] > 24  # two copies and a frame, one after the other
    assert pipelined["outcome"] == "PASS" and pipelined["fps"] > 1.3 * called["fps"]
    assert len(engine.pipelines) == 3  # eight frames to compare, and a run in each round


def test_pipelining_compares_pictures_first(engine, monkeypatch):
    monkeypatch.setattr(engine.adapter, "store", lambda fused, visible: visible + 1)
    monkeypatch.setattr(type(engine), "__call__", lambda self, infrared, visible, **_: visible)
    with pytest.raises(AssertionError, match="not the engine's"):
        stream.pipelining(harness.Result("stream", "cuda", "title"), "lanes", engine, SIZE, 1)


def test_pipelining_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        stream.main(["--only", "pipelining"])
    assert "expected --device cuda" in capsys.readouterr().err
