"""The benchmark of the GPU ops: what can be checked of it without a GPU."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import gpu_ops
from benchmarks.gpu_ops import Roof, Work
from fuseengine import kernels

DRY = ["--device", "cpu", "--size", "12x20", "--rounds", "2", "--no-compile"]


@pytest.fixture(autouse=True)
def _matmul():
    """A run forbids TF32 for its whole process."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def rows_of(folder):
    (file,) = folder.rglob("*.json")
    result = json.loads(file.read_text())
    return {row["name"]: row for row in result["rows"]}, result


def test_dry_run_times_every_op_and_peer(tmp_path):
    words = [*DRY, "--dtype", "float32", "float16", "--out", str(tmp_path)]
    assert gpu_ops.main(words) == 0
    rows, result = rows_of(tmp_path)
    for op, dtype in ((op, dtype) for op in gpu_ops.OPS for dtype in ("float32", "float16")):
        for contender in ("eager", "fuseengine", *gpu_ops.OPS[op].peers):
            row = rows[f"{op} 12x20 {dtype}, {contender}"]
            assert row["p50_ms"] > 0 and "error" not in row, row
    assert result["command"] == f"python -m benchmarks.gpu_ops {' '.join(words[:-2])}"


def test_every_op_has_a_row():
    ops = {name.removesuffix("_reference") for name in kernels.__all__ if "_reference" in name}
    assert ops - {"wiener_spectrum"} <= set(gpu_ops.OPS)  # that one is torch.fft, once per kernel


def test_a_wrong_contender_gets_no_time(tmp_path, monkeypatch):
    op = gpu_ops.OPS["ddim_step"]
    wrong = {"wrong": lambda x, eps: op.eager(x, eps) + 1e-3}
    monkeypatch.setitem(gpu_ops.OPS, "ddim_step", gpu_ops.dataclasses.replace(op, peers=wrong))
    words = [*DRY, "--op", "ddim_step", "--dtype", "float32", "--out", str(tmp_path)]
    assert gpu_ops.main(words) == 0
    rows, _ = rows_of(tmp_path)
    row = rows["ddim_step 12x20 float32, wrong"]
    assert "wrong: error 0.001" in row["error"] and "p50_ms" not in row


def test_a_spent_budget_is_said(tmp_path):
    words = [*DRY, "--op", "ddim_step", "compose_priors", "--dtype", "float32"]
    assert gpu_ops.main([*words, "--budget-s", "-1", "--out", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []  # nothing ran, nothing is written
    args = gpu_ops.parser().parse_args([*words, "--budget-s", "-1"])
    result = gpu_ops.run_all(args, [torch.float32])
    assert result.rows == []
    assert "ddim_step 12x20 float32, compose_priors 12x20 float32" in result.notes[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 4, 32, 5, 7), (2, 3, 5, 6, 1), (1, 16, 40, 9, 4)])
def test_two_attentions_merged_are_one_criss_cross_attention(shape, dtype):
    n, queries, channels, h, w = shape
    tensors = [torch.randn(n, c, h, w).to(dtype) for c in (queries, queries, channels)]
    exact = kernels.criss_cross_attention_reference(*(t.double() for t in tensors))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    found = gpu_ops.two_attentions(*tensors).double()
    torch.testing.assert_close(found, exact, rtol=0, atol=tolerance)


class TestRoof:
    ROOF = Roof(nbytes=1e12, operations=1e14, exponentials=1e12)

    @pytest.mark.parametrize(
        ("work", "seconds", "bound"),
        [
            (Work(2_000_000, 0, 0, 1), 2e-6, "memory"),
            (Work(2_000_000, 10**9, 0, 1), 1e-5, "matrix products"),
            (Work(2_000_000, 10**8, 10**8, 1), 1e-4, "exponentials"),
        ],
    )
    def test_the_longest_part_bounds(self, work, seconds, bound):
        assert self.ROOF.least(work) == (pytest.approx(seconds), bound)

    def test_an_unknown_clock_bounds_nothing(self):
        assert gpu_ops.highest_mhz([{"max_sm_mhz": "1980"}]) == 1980
        for gpus in ([], [{"name": "x"}], [{"max_sm_mhz": "[N/A]"}]):
            assert gpu_ops.highest_mhz(gpus) == math.inf
        roof = gpu_ops.dataclasses.replace(self.ROOF, exponentials=math.inf)
        assert roof.least(Work(10, 0, 10**12, 1))[1] == "memory"

    def test_work_is_what_the_tensors_hold(self):
        """Traffic is at least every input read once and the result written once."""
        for name, op in gpu_ops.OPS.items():
            (inputs,) = gpu_ops.draw(op, (96, 144), torch.float16, "cpu", 1)
            held = [t for t in (*inputs, op.ours(*inputs)) if t.numel() > 1000]
            least = sum(t.numel() * t.element_size() for t in held)
            most = 5 if name == "wiener_filter" else 1.5  # the spectrum goes out and in
            assert 0.98 * least <= op.work(96, 144, 2).nbytes <= most * least, name


class TestTargets:
    def judge(self, op="ddim_step", size=gpu_ops.LARGE, contender="fuseengine", **row):
        return gpu_ops.judged(op, size, contender, row).get("outcome")

    def test_share_of_the_roof_at_the_large_size(self):
        assert [self.judge(of_roof=x) for x in (0.69, 0.7, 0.9)] == ["MISS", "PASS", "PASS"]
        assert self.judge(size=(480, 640), of_roof=0.1) is None
        assert self.judge(contender="eager", of_roof=0.1) is None

    def test_attention_against_eager(self):
        given = {"op": "criss_cross_attention", "contender": "eager"}
        assert [self.judge(**given, times_slower=x) for x in (19.9, 20.0)] == ["MISS", "PASS"]
        assert self.judge(contender="eager", times_slower=0.5) is None


class TestOrin:
    def test_the_data_sheet(self):
        """What NVIDIA's headline says of AGX Orin: 42.6 dense FP16 TFLOPS, 204.8 GB/s."""
        roof = gpu_ops.orin_roof("AGX Orin 64 GB, MAXN")
        assert roof.operations == pytest.approx(42.6e12, rel=1e-3)
        assert roof.nbytes == 204.8e9

    def test_a_copyable_number(self):
        (row,) = (r for r in gpu_ops.orin_estimate((480, 640)) if r["op"].startswith("ddim_step"))
        moved = 9 * 480 * 640 * 2  # x and eps read, out written, three planes each
        assert row["AGX Orin 64 GB, MAXN, ms"] == pytest.approx(moved / 204.8e9 * 1e3)
        assert row["bound by"] == "memory"

    def test_the_page_says_what_it_is(self, tmp_path, capsys):
        assert gpu_ops.main(["--orin", "--out", str(tmp_path)]) == 0
        (page,) = tmp_path.rglob("*.md")
        text = page.read_text()
        assert text.startswith("# ESTIMATE") and "Nothing here was run" in text
        assert str(tmp_path) not in text and text in capsys.readouterr().out
        for op in gpu_ops.OPS:
            assert f"| {op} 480x640" in text and f"| {op} 1080x1920" in text


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(SystemExit) as caught:
        gpu_ops.main([])
    assert caught.value.code == 2
    assert "no CUDA device; --device cpu for a look" in capsys.readouterr().err
