"""The GPU suite's own machinery, and its dry run on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import gpu_suite

SCRIPT = gpu_suite.ROOT / "benchmarks" / "gpu_suite.sh"
FILES = {"summary.json", "summary.md", "suite.log", "artifacts.tar.gz"}


@pytest.fixture
def suite(tmp_path):
    return gpu_suite.Suite(tmp_path / "out", tmp_path / "work", 60, True)


def python(code):
    return [sys.executable, "-c", code]


def arguments(*words):
    return gpu_suite.parser().parse_args(["out", *words])


def plan(*words):
    return {part.name: part for part in gpu_suite.parts(arguments(*words))}


def test_install_needs_no_network():
    command = gpu_suite.install_commands("py")
    assert command[:4] == ["py", "-m", "pip", "install"]
    assert {"--no-build-isolation", "--no-deps", "--no-index"} <= set(command)
    assert command[-2:] == ["-e", str(gpu_suite.ROOT)]
    assert (Path(command[-1]) / "pyproject.toml").exists()


def test_the_environment_sees_the_packages_of_the_one_it_is_made_from(suite):
    found = gpu_suite._virtual_environment(suite)
    assert found is not None
    code = "import sys, numpy, pip; print(sys.prefix)"
    done = subprocess.run([found, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == suite.work / "venv"
    # cmake and ninja of the outer environment stay within reach, the inner python comes first.
    places = suite.environment["PATH"].split(os.pathsep)
    assert places[:2] == [str(suite.work / "venv" / "bin"), str(Path(sys.executable).parent)]


def test_a_failing_part_is_reported_and_the_next_one_runs(suite):
    assert suite.run("bad", python("print('why'); raise SystemExit(3)"), 30).status == "failed"
    assert suite.run("good", python("print('fine')"), 30).status == "ok"
    suite.write()
    data = json.loads((suite.out / "summary.json").read_text())
    assert data["failed"] == ["bad"]
    assert [(p["name"], p["status"]) for p in data["parts"]] == [("bad", "failed"), ("good", "ok")]
    assert data["parts"][0]["reason"] == "exit code 3: why"
    assert "| bad | failed |" in (suite.out / "summary.md").read_text()
    assert "fine" in (suite.out / "suite.log").read_text()


def test_a_part_that_hangs_is_killed_with_its_children(suite):
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print('child', child.pid, flush=True); time.sleep(60)"
    )
    begin = time.monotonic()
    outcome = suite.run("hang", python(code), 3)
    assert outcome.status == "timed out"
    assert time.monotonic() - begin < 20
    log = (suite.work / "logs" / "hang.log").read_text()
    child = int(log.split("child ")[-1])
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split(") ")[1][0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {child} lives on")


def test_a_program_that_cannot_start_is_a_failure(suite):
    outcome = suite.run("none", ["no-such-program"], 5)
    assert outcome.status == "failed" and "could not be started" in outcome.reason


def test_success_without_the_expected_output_is_a_failure(suite):
    # Tests that were all skipped exit with 0.
    assert suite.run("tests", python("print('3 skipped')"), 30, check=" passed").status == "failed"
    assert suite.run("tests", python("print('3 passed')"), 30, check=" passed").status == "ok"
    assert plan()["tests"].check == " passed"
    assert plan("--dry-run")["tests"].check == "skipped"


def test_folders_of_the_machine_are_not_in_the_summary(suite):
    code = f"print({str(suite.work)!r}); raise SystemExit({str(gpu_suite.ROOT)!r})"
    suite.run("bad", python(code), 30)
    suite.write()
    for name in ("summary.json", "summary.md", "suite.log"):
        text = (suite.out / name).read_text()
        assert str(suite.work) not in text and str(gpu_suite.ROOT) not in text


def test_the_archive_keeps_small_files_and_names_what_it_leaves_out(suite, monkeypatch):
    monkeypatch.setattr(gpu_suite, "_ARCHIVE_BYTES", 1000)
    training = suite.work / "training"
    training.mkdir()
    (training / "weights.safetensors").write_bytes(b"w" * 500)
    (training / "checkpoint.pt").write_bytes(b"c" * 2000)
    suite.write()
    with tarfile.open(suite.out / "artifacts.tar.gz") as archive:
        assert archive.getnames() == ["training/weights.safetensors"]
    assert suite.left_out == ["training/checkpoint.pt"]
    assert "checkpoint.pt" in (suite.out / "summary.md").read_text()
    assert {p.name for p in suite.out.iterdir()} == FILES


def run_plan(monkeypatch, suite, plan, args):
    monkeypatch.setattr(gpu_suite, "parts", lambda args: plan)
    started = []

    def run(name, command, limit_s, *, check=""):
        started.append((name, round(limit_s)))
        suite.outcomes.append(gpu_suite.Outcome(name, "ok"))
        return suite.outcomes[-1]

    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: None)
    gpu_suite._run(args, suite)
    return started[1:]  # after "device"


def test_parts_share_the_budget_and_training_keeps_its_share(monkeypatch, suite):
    suite.deadline = time.monotonic() + 100
    parts = [
        gpu_suite.Part("first", [], 500),
        gpu_suite.Part("training", [], 75, 50),
        gpu_suite.Part("long", [], 200, 150),
    ]
    started = run_plan(monkeypatch, suite, parts, arguments("--no-install", "--train", "30"))
    assert started == [("first", 50), ("training", 75)]
    (skipped,) = [o for o in suite.outcomes if o.name == "long"]
    assert skipped.status == "skipped" and "left of" in skipped.reason


def test_nothing_runs_when_the_package_cannot_be_installed(monkeypatch, suite):
    monkeypatch.setattr(gpu_suite, "install", lambda suite: None)
    run_plan(monkeypatch, suite, [gpu_suite.Part("first", [], 5)], arguments())
    (first,) = [o for o in suite.outcomes if o.name == "first"]
    assert first.status == "skipped" and "could not be installed" in first.reason


def test_the_plan_covers_models_and_sizes():
    names = list(plan())
    for model in ("drfusion", "drfusion-m", "drfusion-s"):
        assert f"{model} 480x640" in names and f"{model} 1080x1920" in names
    assert names[0] == "tests"
    for part in plan().values():
        if "benchmarks.end_to_end" in part.command:
            assert part.command[part.command.index("--device") + 1] == "cuda"
            packaged = part.command[2] == "drfusion-s"
            zoo = gpu_suite.ROOT / "fuseengine" / "zoo" / "drfusion-s.json"
            assert ("--untrained" in part.command) != (packaged and zoo.exists())


def test_the_plan_covers_the_kernels():
    """Their tests and, in both dtypes, their benchmark; the GPU's own tests come first."""
    names = list(plan())
    assert names.index("tests") < names.index("tests of kernels") < names.index("ops float16")
    assert plan()["tests of kernels"].check == " passed"
    tests = gpu_suite.ROOT / plan()["tests of kernels"].command[-1]
    assert tests.name == "test_triton_gpu.py" and tests.exists()
    for dtype in ("float16", "float32"):
        assert names.count(f"ops {dtype}") == 1


def test_the_plan_covers_streams():
    names = [name for name in plan() if name.startswith("stream ")]
    assert names == ["stream drfusion-s 480x640", "stream drfusion-s 1080x1920"]
    places = {plan()[name].command[-1] for name in names}
    assert len(places) == 2  # results of one benchmark at two sizes do not overwrite each other
    assert all("no copies" in plan("--dry-run")[name].skip for name in names)


def test_every_planned_benchmark_is_a_valid_command_line():
    from benchmarks import end_to_end, stream

    gpu_ops = pytest.importorskip("benchmarks.gpu_ops")
    for words in ([], ["--dry-run"]):
        for part in plan(*words).values():
            if "benchmarks.gpu_ops" in part.command:
                args = gpu_ops.parser().parse_args(part.command[2:])
                assert args.device == ("cpu" if words else "cuda")
                assert args.budget_s is None or args.budget_s + 30 <= part.limit_s
            if "benchmarks.stream" in part.command:
                args = stream.parser().parse_args(part.command[2:])
                assert (args.device, args.only) == ("cuda", "pipelining")
            if "benchmarks.end_to_end" in part.command:
                args = end_to_end.parser().parse_args(part.command[2:])
                known = end_to_end.peers.peer_keys(args.device)
                assert args.peers == "all" or set(args.peers.split(",")) <= set(known)


def test_training_needs_data(capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(["out", "--train", "5"])
    assert "--data DIR" in capsys.readouterr().err


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(["out", "--only", "lunch"])
    assert "drfusion-s 480x640" in capsys.readouterr().err


def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    args = [str(tmp_path / "out"), "--no-install", "--only", "tests"]
    assert gpu_suite.main(args) == 1
    data = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert data["failed"] == ["device"]
    assert "--dry-run" in data["parts"][1]["reason"]
    assert [p["status"] for p in data["parts"] if p["name"] == "tests"] == ["skipped"]


@pytest.mark.slow
def test_dry_run(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("ir", "vis"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for k in range(2):
            picture = rng.integers(0, 256, (64, 64), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "data" / folder / f"{k}.png")
    # A relative folder is the caller's, not the repository's.
    words = ["out", "--dry-run", "--no-install", "--train", "20", "--data", "data"]
    words += ["--only", "tests", "drfusion-s 480x640", "drfusion-m 480x640", "training"]
    words += ["tests of kernels", "ops float16"]
    done = subprocess.run(
        [str(SCRIPT), *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == FILES
    assert all(p.stat().st_size < 16 << 20 for p in out.iterdir())
    data = json.loads((out / "summary.json").read_text())
    assert data["dry_run"] and data["failed"] == []
    status = {part["name"]: part["status"] for part in data["parts"]}
    assert status["device"] == status["tests"] == status["training"] == "ok"
    assert status["drfusion-s 480x640"] == status["ops float16"] == "ok"
    assert status["tests of kernels"] == "ok"
    assert status["drfusion-m 480x640"] == "skipped"
    found = {result["suite"]: result for result in data["results"]}
    assert any(row["name"].endswith("fuseengine") for row in found["gpu-ops"]["rows"])
    rows = {row["name"]: row for row in data["results"][-1]["rows"]}
    assert rows["FuseEngine fp32"]["psnr_db"] >= 80 and rows["FuseEngine fp32"]["p50_ms"] > 0
    with tarfile.open(out / "artifacts.tar.gz") as archive:
        assert "training/weights.safetensors" in archive.getnames()
    assert "FuseEngine fp32, frames" in (out / "summary.md").read_text()
