"""The benchmark of frames: right before timed, one row per peer and number of threads."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("cv2")


from benchmarks import frames

pytestmark = pytest.mark.usefixtures("threads_restored")


def test_every_case_against_its_peers(tmp_path, capsys):
    words = ["--size", "37x52", "--threads", "1", "2", "--rounds", "3"]
    assert frames.main([*words, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.rglob("frames--*.json")
    result = json.loads(file.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    peers = {
        "uint8 to YCbCr": ["OpenCV", "OpenCV in float32", "Pillow", "NumPy"],
        "uint8 to luma": ["OpenCV", "Pillow", "NumPy"],
        "uint16 to a plane": ["OpenCV", "NumPy"],
        "luma and chroma to uint8": ["OpenCV", "Pillow", "NumPy"],
        "homography": ["OpenCV"],
    }
    expected = [
        f"{case} 37x52 vs {peer}, {threads}"
        for case, names in peers.items()
        for threads in ("1 thread", "2 threads")
        for peer in names
    ]
    assert list(rows) == expected
    assert all(row["n"] == 3 and row["p50_ms"] > 0 and row["gb_per_s"] > 0 for row in rows.values())
    assert result["command"] == f"python -m benchmarks.frames {' '.join(words)}"
    lost = [name for name in rows if f"slower than the peer: {name}" in result["notes"]]
    assert all(float(rows[name]["ratio"].split()[0]) < 1 for name in lost)
    assert "uint8 to YCbCr 37x52 vs Pillow, 2 threads" in capsys.readouterr().out


def test_one_case_is_shown_and_not_kept(tmp_path, capsys):
    words = ["--size", "37x52", "--threads", "1", "--rounds", "2", "--only", "LUMA 37"]
    assert frames.main([*words, "--out", str(tmp_path)]) == 0
    assert "uint8 to luma 37x52 vs NumPy, 1 thread" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["ours", "OpenCV"])
def test_a_wrong_contender_is_not_timed(monkeypatch, wrong):
    case = next(frames.cases(16, 20))
    bad = lambda: case.exact + 0.01  # noqa: E731
    if wrong == "ours":
        case = dataclasses.replace(case, ours=bad)
    else:
        case = dataclasses.replace(case, peers={**case.peers, wrong: bad})
    monkeypatch.setattr(frames, "cases", lambda *size: [case])
    with pytest.raises(SystemExit, match=f"YCbCr 16x20, {wrong}: differs by 0.01"):
        frames.main(["--size", "16x20", "--threads", "1"])
