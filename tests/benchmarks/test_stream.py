"""The benchmark of streams, short: its rows, and that a stream that queues would miss."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import stream

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
