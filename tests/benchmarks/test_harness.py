"""The benchmarks' harness: it times fairly, and writes down only what is true and complete."""

import gc
import json
import math
import os
import platform
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import (
    PauseBefore,
    Result,
    ResultSchemaError,
    Samples,
    command_line,
    format_table,
    interleave,
    machine,
    machine_slug,
    max_abs_error,
    paired_ratio,
    peak_memory,
    psnr,
    slug,
    this_command,
    validate_result,
    write_atomically,
)

MACHINE = {
    "cpu": {
        "model": "Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz",
        "architecture": "x86_64",
        "cores": 4,
        "flags": ["avx2"],
        "governor": None,
        "max_mhz": None,
    },
    "ram_gb": 16.0,
    "os": "Linux 6.1",
    "python": "3.11.9",
    "packages": {"numpy": "2.0.0"},
    "threads": {},
    "git": {"commit": "0123456789ab", "dirty": True},
    "gpu": [],
    "board": None,
}


def samples(times_ms, name="x") -> Samples:
    return Samples(name, np.asarray(np.asarray(times_ms) * 1e6, np.int64))


def result() -> Result:
    out = Result("end-to-end", "cpu", "A title", machine=MACHINE, command="python -m benchmarks.x")
    out.add("torch", samples([2.0] * 30), psnr_db=math.inf, peak_mb=100.0)
    out.add("fuseengine", samples([1.0] * 30), psnr_db=60.5, command="python -m benchmarks.x y")
    out.add("tensorrt", error="not installed")
    return out


class TestInterleave:
    def test_every_round_calls_everybody_once_in_a_new_order(self):
        calls = []
        contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
        out = interleave(contenders, rounds=6, warmup=1)
        rounds = ["".join(calls[k : k + 3]) for k in range(0, len(calls), 3)]
        assert rounds == ["abc", "abc", "bca", "cab", "cba", "acb", "bac"]
        assert [s.n for s in out.values()] == [6, 6, 6]

    def test_measures_what_a_call_takes(self):
        out = interleave(
            {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.006)},
            rounds=7,
            warmup=0,
        )
        assert 1 <= out["short"].min < 4
        assert 6 <= out["long"].min < 9

    def test_collector_is_off_inside_and_as_before_after(self):
        seen = []
        assert gc.isenabled()
        interleave({"a": lambda: seen.append(gc.isenabled())}, rounds=2, warmup=0)
        assert seen == [False, False]
        assert gc.isenabled()

    def test_waits_for_the_device_on_both_sides_of_the_call(self):
        log = []
        interleave(
            {"a": lambda: log.append("run")},
            rounds=1,
            warmup=0,
            synchronize=lambda: log.append("wait"),
        )
        assert log == ["wait", "run", "wait"]

    def test_pause_comes_before_the_clock_starts_only(self):
        pause, spent = PauseBefore(0.05), []
        for _ in range(4):
            begin = time.perf_counter()
            pause()
            spent.append(time.perf_counter() - begin)
        assert min(spent[0], spent[2]) >= 0.05
        assert max(spent[1], spent[3]) < 0.05

    def test_quick_contenders_settle_after_the_pause(self):
        log = []

        def slow():
            log.append("slow")
            time.sleep(0.02)

        quick = lambda: log.append("quick")  # noqa: E731
        wait = lambda: log.append("wait")  # noqa: E731
        out = interleave(
            {"slow": slow, "quick": quick},
            rounds=1,
            warmup=1,
            synchronize=wait,
            settle_s=0.01,
        )
        assert log[:9] == ["wait", "slow", "wait", "wait", "quick", "wait", "wait", "slow", "wait"]
        assert log[9] == log[-1] == "wait" and set(log[10:-1]) == {"quick"} and len(log) > 13
        assert [s.n for s in out.values()] == [1, 1]

    def test_budget_ends_after_a_whole_round(self):
        out = interleave(
            {"a": lambda: time.sleep(0.01), "b": lambda: None},
            rounds=1000,
            warmup=0,
            budget_s=0.05,
        )
        assert 1 <= out["a"].n == out["b"].n < 50

    def test_a_failure_names_the_contender_and_restores_the_collector(self):
        with pytest.raises(RuntimeError, match="contender 'bad' failed: integer division"):
            interleave({"good": lambda: None, "bad": lambda: 1 // 0})
        assert gc.isenabled()

    @pytest.mark.parametrize("rounds", [0, -1])
    def test_refuses_no_rounds(self, rounds):
        with pytest.raises(ValueError, match="expected rounds >= 1"):
            interleave({"a": lambda: None}, rounds=rounds)

    def test_refuses_no_contenders(self):
        with pytest.raises(ValueError, match="no contenders"):
            interleave({})


class TestSamples:
    def test_percentiles_are_milliseconds(self):
        s = samples(np.arange(1, 102))
        assert (s.n, s.min, s.p50, s.p90, s.p99) == (101, 1, 51, 91, 100)

    def test_bandwidth(self):
        assert samples([2.0] * 3).gb_per_s(8_000_000) == pytest.approx(4.0)

    @pytest.mark.parametrize(
        ("times", "verdict"),
        [
            ([1.0] * 30, "ok"),
            ([1.0] * 6, r"too few samples \(n=6, expected 20\)"),
            ([1.0, 3.0] * 15, r"unstable \(p90/p10 3.00\)"),
            ([1.0] * 15 + [1.3] * 15, r"drifting \(second half 1.30x the first\)"),
            ([1.3] * 15 + [1.0] * 15, r"drifting \(second half 0.77x the first\)"),
            ([1e-6] * 30, "clock-bound"),
            ([1.0, 2.0], "too few samples.*; unstable"),
        ],
    )
    def test_verdict(self, times, verdict):
        assert re.match(verdict, samples(times).verdict)


class TestRatio:
    def test_pairs_cancel_what_both_suffer(self):
        rng = np.random.default_rng(1)
        weather = rng.uniform(1, 5, 100)
        ratio = paired_ratio(samples(0.8 * weather), samples(weather))
        assert ratio.median == pytest.approx(0.8, rel=1e-4)
        assert ratio.high - ratio.low < 1e-4
        assert ratio.verdict == "faster"
        assert paired_ratio(samples(weather), samples(0.8 * weather)).verdict == "slower"

    def test_noise_is_no_difference(self):
        rng = np.random.default_rng(2)
        a, b = rng.uniform(1, 2, (2, 60))
        ratio = paired_ratio(samples(a), samples(b))
        assert ratio.low < 1 < ratio.high
        assert ratio.verdict == "no difference seen"

    def test_interval_covers_the_truth_about_as_often_as_it_says(self):
        rng = np.random.default_rng(3)
        hits = 0
        for k in range(100):
            noise = np.exp(rng.normal(0, 0.2, 40))
            ratio = paired_ratio(
                samples(1000 * noise), samples(np.full(40, 1000.0)), resamples=300, seed=k
            )
            hits += ratio.low <= 1 <= ratio.high
        assert 88 <= hits <= 99

    def test_refuses_samples_of_different_rounds(self):
        with pytest.raises(ValueError, match="'a' has 3 samples, 'b' has 2"):
            paired_ratio(samples([1, 2, 3], "a"), samples([1, 2], "b"))


class TestPeakMemory:
    def test_counts_the_contender_and_not_this_process(self):
        ballast = np.ones(40_000_000)  # 320 MB here
        small = peak_memory([sys.executable, "-c", "pass"])
        large = peak_memory([sys.executable, "-c", "x = b'1' * 150_000_000"])
        assert ballast[-1] == 1
        assert 3e6 < small < 80e6
        assert 140e6 < large - small < 165e6

    def test_calls_a_function_with_arguments(self):
        base = peak_memory("numpy:ones", 1)
        assert 75e6 < peak_memory("numpy:ones", 10_000_000) - base < 95e6

    def test_passes_environment(self):
        code = "import os; assert os.environ['HARNESS_TEST'] == 'yes'"
        assert peak_memory([sys.executable, "-c", code], env={"HARNESS_TEST": "yes"}) > 0

    def test_failure_tells_what_was_printed(self):
        with pytest.raises(RuntimeError, match=r"(?s)exit code 1.*ZeroDivisionError"):
            peak_memory([sys.executable, "-c", "1 // 0"])

    def test_missing_program(self):
        with pytest.raises(RuntimeError, match=r"(?s)could not be started.*no-such-program"):
            peak_memory(["no-such-program"])

    def test_time_limit_ends_the_contender(self, tmp_path):
        flag = tmp_path / "late"
        code = f"import time, pathlib; time.sleep(1); pathlib.Path({str(flag)!r}).touch()"
        with pytest.raises(RuntimeError, match=r"not finished after 0\.4 s"):
            peak_memory([sys.executable, "-c", code], timeout_s=0.4)
        time.sleep(1.0)
        assert not flag.exists()

    @pytest.mark.parametrize("target", ["numpy", "numpy ones", "a:b:c"])
    def test_refuses_other_targets(self, target):
        with pytest.raises(ValueError, match=r"package\.module:function"):
            peak_memory(target)


class TestAccuracy:
    def test_psnr_known_value(self):
        a = np.zeros((10, 10), np.uint8)
        assert psnr(a, a + 5, 255) == pytest.approx(20 * math.log10(255 / 5))
        assert psnr(a / 255, (a + 5) / 255, 1) == pytest.approx(20 * math.log10(255 / 5))

    def test_unsigned_values_do_not_wrap(self):
        a, b = np.array([3], np.uint8), np.array([5], np.uint8)
        assert max_abs_error(a, b) == 2
        assert psnr(a, b, 255) == psnr(b, a, 255)

    def test_equal_is_infinite_and_nan_stays(self):
        a = np.ones(4)
        assert psnr(a, a, 1) == math.inf
        assert math.isnan(psnr(a, a * math.nan, 1))
        assert math.isnan(max_abs_error(a, a * math.nan))

    @pytest.mark.parametrize(("a", "b"), [(np.ones(3), np.ones((3, 1))), (np.ones(0), np.ones(0))])
    def test_refuses_shapes(self, a, b):
        with pytest.raises(ValueError, match="expected equal ones"):
            psnr(a, b, 1)

    def test_refuses_peak(self):
        with pytest.raises(ValueError, match="peak 0"):
            psnr(np.ones(2), np.ones(2), 0)


class TestMachine:
    def test_says_what_is_needed_and_who_nobody_is(self):
        info = machine()
        assert info["cpu"]["cores"] >= 1
        assert info["cpu"]["model"]
        assert info["python"] == platform.python_version()
        assert info["packages"]["numpy"] == np.__version__
        text = json.dumps(info)
        for private in (str(Path.home()), str(Path.cwd()), sys.prefix):
            assert private not in text

    def test_asks_for_settings(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert machine()["threads"]["OMP_NUM_THREADS"] == "3"

    @pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs CPU affinity (Linux)")
    def test_cores_are_those_allowed(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5})
        assert machine()["cpu"]["cores"] == 3

    def test_slug(self):
        assert machine_slug(MACHINE) == "intel-xeon-gold-6338-4c"
        gpu = {**MACHINE, "gpu": [{"name": "NVIDIA H200", "driver": "1"}]}
        assert machine_slug(gpu, "cuda") == "nvidia-h200"
        assert machine_slug(gpu, "cpu") == "intel-xeon-gold-6338-4c"
        assert machine_slug({**gpu, "board": "NVIDIA Jetson Orin NX"}, "cuda") == (
            "nvidia-jetson-orin-nx"
        )
        assert slug(" ** ") == "unknown"

    def test_command(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["somewhere/bench.py", "drfusion-s", "--size", "480x640"])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
        assert this_command() == "python bench.py drfusion-s --size 480x640"

    def test_command_line_says_nothing_of_where_results_went(self):
        words = ["drfusion-s", "--out", "/tmp/x", "--rounds", "3", "--out=/tmp/y"]
        assert command_line("benchmarks.x", words) == "python -m benchmarks.x drfusion-s --rounds 3"


class TestTable:
    ROWS = ({"name": "a", "p50_ms": 12.3456, "note": "x|y"}, {"name": "bb", "p50_ms": None})

    def test_plain(self):
        assert format_table(self.ROWS) == (
            "contender  p50 ms  note\n"
            "---------  ------  ----\n"
            "a           12.35  x|y\n"
            "bb              -  -"
        )

    def test_markdown(self):
        assert format_table(self.ROWS, ["name", "p50_ms", "note"], markdown=True) == (
            "| contender | p50 ms | note |\n"
            "| --------- | -----: | ---- |\n"
            "| a         |  12.35 | x\\|y |\n"
            "| bb        |      - | -    |"
        )

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.0, "0.0"),
            (1234.5, "1234"),
            (0.012345, "0.01235"),
            (1.2345e-7, "1.23e-07"),
            (math.inf, "inf"),
            (7, "7"),
            (True, "yes"),
        ],
    )
    def test_numbers(self, value, text):
        assert format_table([{"x": value}]).splitlines()[-1].strip() == text


class TestResult:
    def test_writes_a_valid_file_and_a_page(self, tmp_path):
        file, page = result().write(tmp_path)
        loaded = json.loads(file.read_text())
        validate_result(loaded)
        assert file.name == "end-to-end--intel-xeon-gold-6338-4c--cpu.json"
        assert file.parent.name == loaded["fuseengine"]
        assert loaded["rows"][0]["psnr_db"] == "inf"
        assert loaded["rows"][1]["p50_ms"] == 1.0
        text = page.read_text()
        for expected in ("# A title", "| fuseengine", "not installed", "0123456789ab + changes"):
            assert expected in text
        assert "* fuseengine: `python -m benchmarks.x y`" in text
        assert sorted(p.name for p in file.parent.iterdir()) == sorted([file.name, page.name])

    def test_numpy_numbers_become_plain(self):
        out = result()
        out.add("more", psnr_db=np.float32(3.5), max_abs_error=np.float64(0.25))
        assert json.loads(json.dumps(out.to_dict()))["rows"][-1]["psnr_db"] == 3.5

    def test_this_machine_makes_a_valid_result(self):
        out = result()
        out.machine = machine()
        assert out.to_dict()["schema"] == 1

    def test_an_invalid_result_writes_nothing(self, tmp_path):
        out = result()
        out.add("torch", samples([1.0]))
        with pytest.raises(ResultSchemaError, match="'torch' occurs twice"):
            out.write(tmp_path)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda r: r.pop("machine"), "machine: missing"),
            (lambda r: r.update(extra=1), "extra: unknown key"),
            (lambda r: r.update(schema=2), "schema: 2, expected 1"),
            (lambda r: r.update(schema=True), "schema: bool, expected int"),
            (lambda r: r.update(rows={}), "rows: dict, expected list"),
            (lambda r: r.update(rows=[]), "rows: empty"),
            (lambda r: r.update(suite="End to end"), "suite: 'End to end'"),
            (lambda r: r.update(created="today"), "created: 'today'"),
            (lambda r: r["machine"].pop("cpu"), "machine.cpu: missing"),
            (lambda r: r["rows"].append("x"), r"rows\[3\]: str, expected dict"),
            (lambda r: r["rows"].append({"p50_ms": 1}), r"rows\[3\].name: None"),
            (lambda r: r["rows"].append({"name": "z"}), r"rows\[3\]: neither a number nor an"),
            (lambda r: r["rows"][0].update(p50_ms=math.nan), r"rows\[0\].p50_ms: nan"),
            (lambda r: r["rows"][0].update(p90_ms=-1.0), r"rows\[0\].p90_ms: -1.0"),
            (lambda r: r["rows"][0].update(p99_ms="1 ms"), r"rows\[0\].p99_ms: '1 ms'"),
            (lambda r: r["rows"][0].update(n=1.5), r"rows\[0\].n: 1.5"),
            (lambda r: r["rows"][0].update(verdict=3), r"rows\[0\].verdict: 3"),
            (lambda r: r["rows"][0].update(more=[1]), r"rows\[0\].more: list"),
            (lambda r: r.update(command="x --out /srv/data/y"), "command: .* absolute path"),
            (lambda r: r["settings"].update(a={"b": ["~/x/y"]}), r"settings.a.b\[0\]: .* path"),
            (lambda r: r["settings"].update(a={1, 2}), "not JSON"),
        ],
    )
    def test_schema_refuses(self, change, message):
        bad = json.loads(json.dumps(result().to_dict()))
        change(bad)
        with pytest.raises(ResultSchemaError, match=message):
            validate_result(bad)

    def test_schema_lists_all_problems(self):
        bad = result().to_dict()
        bad["rows"][0]["p50_ms"] = -1.0
        bad["rows"][1]["n"] = 0
        with pytest.raises(ResultSchemaError) as caught:
            validate_result(bad)
        assert len(caught.value.problems) == 2

    @pytest.mark.parametrize("text", ["8 GB/s", "https://example.org/a/b", "a/b/c", "and/or"])
    def test_no_path_is_seen_where_none_is(self, text):
        good = result().to_dict()
        good["notes"] = [text]
        validate_result(good)

    def test_written_results_are_valid(self):
        for file in (Path(__file__).parents[2] / "benchmarks" / "results").rglob("*.json"):
            validate_result(json.loads(file.read_text()))


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.txt"
    write_atomically(path, "old")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
