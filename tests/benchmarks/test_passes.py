"""The benchmark of the passes: right before timed, nothing claimed where nothing changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fuseengine as fe
from benchmarks import passes
from fuseengine import _native
from fuseengine.passes import PASSES
from fuseengine.tracing import capture
from tests.helpers import system

NAMES = [*(apply.__name__ for apply in PASSES), "batch_siblings"]


@pytest.fixture(autouse=True)
def _threads():
    """The benchmark sets them for its whole process."""
    before = torch.get_num_threads(), _native.num_threads()
    yield
    torch.set_num_threads(before[0])
    _native.set_num_threads(before[1])


@pytest.fixture
def small(monkeypatch):
    """Every system of the benchmark at a size for tests."""
    built = {name: system(name) for name in passes.SYSTEMS}
    monkeypatch.setattr(fe, "build", built.__getitem__)


def rows_of(folder):
    (file,) = Path(folder).rglob("*.json")
    return {row["name"]: row for row in json.loads(file.read_text())["rows"]}


def test_rows(small, tmp_path, capsys):
    words = ["--systems", "drfusion-s", "dmnet-s", "--size", "64x64", "--rounds", "2"]
    words += ["--threads", "1", "--backend", "onnxruntime", "--out", str(tmp_path)]
    assert passes.main(words) == 0
    rows = rows_of(tmp_path)
    assert list(rows) == [f"{s}: {p}" for s in ("drfusion-s", "dmnet-s") for p in NAMES]
    for name, row in rows.items():
        changed = row["verdict"] != "leaves this program as it is"
        assert changed == ("p50_ms" in row and "ratio" in row), name
        assert row["GFLOP with"] <= row["GFLOP without"]
    assert rows["drfusion-s: prune"]["GFLOP with"] < rows["drfusion-s: prune"]["GFLOP without"]
    assert rows["dmnet-s: batch_siblings"]["n"] == 2
    assert "p50_ms" not in rows["drfusion-s: batch_siblings"]  # each step waits for the last
    assert "GFLOP" in capsys.readouterr().out


def test_arithmetic_alone(small, tmp_path):
    words = ["--systems", "drmf-s", "--no-time", "--size", "40x40", "--out", str(tmp_path)]
    assert passes.main(words) == 0
    assert all("p50_ms" not in row for row in rows_of(tmp_path).values())


def test_flops_are_the_networks(monkeypatch):
    """One convolution called twice: 2 calls x 2 x 9 taps x pixels."""
    from tests.test_tracing import staged

    model = staged(lambda self, a, b: self.net(a) + self.net(b))
    assert passes.flops(capture(model), model, (8, 10)) == 2 * 2 * 9 * 80


def test_flops_leave_out_what_is_not_used():
    model = system("drfusion-s")
    program = capture(model)
    both, one = sorted(program.variants(), key=lambda v: -len(v.use))
    size = (32, 32)
    counts = [
        passes._flops_of(v, program.variants()[v][0].inputs, program, model, size)
        for v in (both, one)
    ]
    assert 0 < counts[1] < 0.95 * counts[0]


def test_a_wrong_contender_has_no_time(small, monkeypatch, tmp_path):
    build = passes.executor_of

    def wrong(*given):
        executor = build(*given)
        run = executor.run

        def spoil():
            run()
            executor.output[...] += 0.1

        executor.run = spoil
        return executor

    monkeypatch.setattr(passes, "executor_of", wrong)
    words = ["--systems", "dmnet-s", "--size", "64x64", "--backend", "onnxruntime"]
    with pytest.raises(SystemExit, match=r"dmnet-s: 20\.0 dB, expected 80 dB or more"):
        passes.main([*words, "--out", str(tmp_path)])
