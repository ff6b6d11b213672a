"""The benchmark of the native ops: right before timed, judged by targets, memory counted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import harness, ops
from fuseengine import _native, kernels
from tests.helpers import ROOT, run_python

SMALL = ["--size", "6x10", "12x16", "--rounds", "3", "--no-compile", "--threads", "1"]


@pytest.fixture(autouse=True)
def _threads():
    """The benchmark sets them for its whole process."""
    before = torch.get_num_threads(), _native.num_threads()
    yield
    torch.set_num_threads(before[0])
    _native.set_num_threads(before[1])


def rows_of(folder):
    (file,) = Path(folder).rglob("*.json")
    result = json.loads(file.read_text())
    return {row["name"]: row for row in result["rows"]}, result


def test_every_op_against_its_peers(tmp_path, capsys):
    assert ops.main([*SMALL, "--out", str(tmp_path)]) == 0
    rows, result = rows_of(tmp_path)
    timed = {name: row for name, row in rows.items() if " vs " in name}
    assert set(timed) == {
        "criss_cross_attention 6x10 vs CCNet",
        "criss_cross_attention 12x16 vs CCNet",
        "wiener_filter 2x12x16 vs torch.fft",
        "group_norm_silu 32x12x16 vs eager",
        "ddim_step 3x12x16 vs eager",
        "compose_priors 3x12x16 vs eager",
        "joint_ddim_step 3x12x16 vs eager",
    }
    for name, row in timed.items():
        assert row["n"] == 3 and row["p50_ms"] > 0 and row["peer p50 ms"] > 0, name
        assert row["outcome"] in ("PASS", "MISS") or name.startswith("compose"), name
    missed = {f"MISS: {name}" for name, row in rows.items() if row.get("outcome") == "MISS"}
    assert missed <= set(result["notes"])
    assert result["command"] == f"python -m benchmarks.ops {' '.join(SMALL)}"
    printed = capsys.readouterr().out
    assert "target" in printed and (not missed or "* MISS: " in printed)


def test_every_target_belongs_to_a_row():
    peers = {(case.op, peer) for case in ops.cases([(4, 6)], compiled=True) for peer in case.peers}
    assert set(ops.TARGETS) <= peers


def test_a_wrong_contender_is_not_timed():
    case = next(iter(ops.cases([(4, 6)], compiled=False)))
    wrong = dataclasses.replace(case, peers={"CCNet": lambda: case.function() + 1e-3})
    result = harness.Result("ops", "cpu", "A title")
    with pytest.raises(SystemExit, match="4x6: differs from CCNet by 0.001, expected at most"):
        ops.measure(result, wrong, 2)
    assert result.rows == []


@pytest.mark.parametrize("size", [(5, 7), (9, 4)])
def test_the_peer_is_the_same_attention(size):
    *given, _ = (torch.from_numpy(a) for a in ops.attention_arrays(*size))
    expected = kernels.criss_cross_attention_reference(*given)
    torch.testing.assert_close(ops.ccnet(*given), expected, rtol=0, atol=1e-5)


def test_outcome():
    assert [ops.outcome(r, 2.0) for r in (1.99, 2.0, 2.5)] == ["MISS", "PASS", "PASS"]
    assert ops.outcome(0.1, None) is None


def test_verdicts_name_both_sides():
    good = harness.Samples("a", np.full(30, 1_000_000))
    bad = harness.Samples("b", np.tile([1_000_000, 3_000_000], 15))
    assert ops._verdicts(ours=good, peer=good) == "ok"
    assert ops._verdicts(ours=good, peer=bad).startswith("peer unstable (p90/p10 3.00)")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
class TestMemory:
    SIZE = (240, 120)

    def test_attention(self):
        """The maps that the peer holds have H + W - 1 numbers per pixel; ours holds none."""
        result = harness.Result("ops", "cpu", "A title")
        ops.measure_memory(result, self.SIZE, 1)
        ours, peer = (row["extra MB"] * 1e6 for row in result.rows)
        height, width = self.SIZE
        assert 0 < ours < 4 * ops.CHANNELS * height * width  # the output is not in it
        assert peer > 2 * 4 * height * width * (height + width)
        assert result.rows[0]["outcome"] == "PASS"

    def test_counts_what_was_freed_before(self):
        """The peak is reset: memory that was given back earlier hides nothing."""
        script = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); import numpy as np\n"
            "from benchmarks import ops\n"
            "before = np.ones(50_000_000); del before\n"  # 400 MB
            "ops.ccnet = lambda q, k, v: (np.ones(10_000_000), v.clone())[1]\n"  # 80 MB
            "print(ops.extra_memory('peer', 16, 16, 1))"
        )
        assert 75e6 < int(run_python(script)) < 90e6

    def test_a_failure_is_a_row_that_says_so(self, monkeypatch):
        monkeypatch.setattr(ops.sys, "executable", "/bin/false")
        result = harness.Result("ops", "cpu", "A title")
        ops.measure_memory(result, self.SIZE, 1)
        assert [row["error"] for row in result.rows] == ["not measured: exit code 1"] * 2


def test_overhead(tmp_path, capsys):
    assert ops.main(["--overhead", "--rounds", "3", "--threads", "1", "--out", str(tmp_path)]) == 0
    rows, result = rows_of(tmp_path)
    assert result["suite"] == "op-overhead"
    for mode in ("gradients enabled", "inference mode"):
        base = rows[f"Python function, {mode}"]["us a call"]
        for way in ("Library.define and impl", "PyTorch's custom_op", "public function"):
            row = rows[f"{way}, {mode}"]
            assert row["us a call"] == pytest.approx(1e3 * row["p50_ms"])
            assert row["us over function"] == pytest.approx(row["us a call"] - base)
            assert 0.1 < row["us a call"] < 1000


def test_ways_of_calling_do_the_same():
    contenders = ops.overhead_contenders()
    contenders.pop("native kernel on arrays")
    results = [call() for call in contenders.values()]
    assert all(torch.equal(r, results[0]) for r in results)
