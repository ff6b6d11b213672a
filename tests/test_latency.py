"""Latency from when frames are due, on engines whose time is known."""

from __future__ import annotations

import gc
import json
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from fuseengine.cli import main
from fuseengine.errors import SettingError
from fuseengine.latency import (
    Latencies,
    Schedule,
    compare,
    joined,
    measure,
    measure_in_turns,
    plot,
)


def sleeper(ms, slow=()):
    """An engine that takes so long, and ten times as long for some frames."""
    return lambda frame: time.sleep(ms / 1e3 * (10 if frame in slow else 1))


def made(latencies_ms, *, rate=100.0, frames=None, deadline=None):
    """A run with given latencies, one per frame."""
    n = len(latencies_ms)
    due = (np.arange(n) * 1e9 / rate).astype(np.int64)
    done = due + (np.asarray(latencies_ms) * 1e6).astype(np.int64)
    return Latencies(Schedule(frames or n, rate, deadline), np.arange(n), due, due, done)


class TestMeasure:
    def test_an_engine_that_keeps_up(self):
        found = measure(sleeper(2), Schedule(30, 100.0, warmup=0))
        assert found.dropped == 0 and found.misses == 0
        row = found.summary()
        assert 2 <= row["p50_ms"] < 8 and row["fused"] == 30
        assert row["fused_per_s"] == pytest.approx(100, rel=0.05)
        np.testing.assert_array_equal(found.frame, np.arange(30))
        assert (found.begin >= found.due).all()

    def test_what_a_late_frame_waited_counts(self):
        """One slow call delays those after it; a loop without a schedule would not see that."""
        found = measure(sleeper(4, slow={5}), Schedule(20, 125.0, warmup=0, queue=True))
        assert found.dropped == 0 and (found.service_ms[6:9] < 20).all()
        assert (found.latency_ms[6:9] > 15).all() and found.latency_ms[6] > 30

    def test_the_newest_frame_wins(self):
        found = measure(sleeper(25), Schedule(40, 100.0, warmup=0))
        assert 20 <= found.dropped <= 32
        assert (np.diff(found.frame) >= 2).mean() > 0.8
        # No growing queue: what is fused is at most one frame's time old when it begins.
        assert (found.begin - found.due)[:-1].max() < 11e6 and found.misses == 40

    def test_collector_and_callbacks(self):
        seen, fused = [], []
        schedule = Schedule(3, 500.0, warmup=2)
        measure(lambda frame: seen.append(gc.isenabled()), schedule, on_frame=fused.append)
        assert seen == [True, True, False, False, False] and fused == [0, 1, 2] and gc.isenabled()
        measure(lambda frame: seen.append(gc.isenabled()), Schedule(1, 500.0, collect=True))
        assert seen[-1]

    def test_refusals(self):
        for wrong in ({"frames": 0}, {"rate": 0.0}, {"deadline_ms": -1.0}, {"warmup": -1}):
            with pytest.raises(SettingError, match="expected"):
                Schedule(**wrong)
        with pytest.raises(SettingError, match="a frame per block"):
            measure_in_turns({"a": sleeper(0)}, Schedule(3), blocks=4)


class TestNumbers:
    def test_summary_by_hand(self):
        run = made([1.0] * 98 + [5.0, 30.0], frames=103, deadline=4.0)
        row = run.summary()
        assert row["p50_ms"] == 1.0 and row["max_ms"] == 30.0
        assert (row["dropped"], row["misses"]) == (3, 5)
        assert row["jitter_ms"] == pytest.approx((4 + 25) / 99)

    def test_the_histogram_has_hdr_precision(self):
        pytest.importorskip("hdrh")
        made_of = np.random.default_rng(0).uniform(1, 90, 5000)
        histogram = made(made_of).histogram()
        assert histogram.get_total_count() == 5000
        for p in (50, 99):
            expected = np.percentile(made_of, p) * 1e3
            assert histogram.get_value_at_percentile(p) == pytest.approx(expected, rel=5e-3)

    def test_joined_runs_follow_each_other(self):
        one, two = made([1.0, 2.0], frames=3), made([3.0])
        both = joined([one, two])
        assert both.frame.tolist() == [0, 1, 3] and both.dropped == 1
        np.testing.assert_allclose(both.latency_ms, [1, 2, 3])

    def test_comparison_finds_a_ratio(self):
        rng = np.random.default_rng(0)
        base = [made(rng.normal(10, 0.5, 50)) for _ in range(8)]
        slower = [made(rng.normal(12, 0.5, 50)) for _ in range(8)]
        found = compare({"base": base, "slower": slower})["slower"]
        low, high = found.interval["p50"]
        assert found.ratio["p50"] == pytest.approx(1.2, abs=0.03) and low < 1.2 < high
        assert high - low < 0.1

    def test_plot_is_a_picture_of_the_tail(self):
        root = ET.fromstring(plot({"a <b>": made(np.linspace(1, 20, 1000))}))
        lines = [e for e in root.iter() if e.tag.endswith("polyline")]
        points = np.array([p.split(",") for p in lines[0].get("points").split()], float)
        assert len(points) == 1000 and (np.diff(points[:, 0]) >= 0).all()
        assert (np.diff(points[:, 1]) <= 0).all() and points[:, 0].max() <= 700
        assert "a <b>" in "".join(root.itertext())


class TestCommand:
    def test_two_engines(self, tmp_path, capsys, monkeypatch):
        """Engines by name, with the engine itself replaced: what is tested is all around it."""
        import fuseengine.cli.latency as command

        class Report:
            def summary(self):
                return "an engine"

        class Engine:
            size, report = (16, 24), Report()

            def __init__(self, ms):
                self.ms = ms

            def __call__(self, infrared, visible, out):
                assert infrared.shape == (16, 24) and visible.shape == out.shape == (16, 24, 3)
                time.sleep(self.ms / 1e3)
                return out

        engines = {"quick": Engine(1), "slow": Engine(3)}
        monkeypatch.setattr(command, "_engine", lambda name, args: engines[name])
        out, svg = tmp_path / "out.json", tmp_path / "plot.svg"
        options = ["--frames", "40", "--rate", "200", "--blocks", "4", "-o", str(out)]
        assert main(["latency", "quick", "slow", *options, "--plot", str(svg)]) == 0
        told = capsys.readouterr().out
        assert "quick: p50" in told and "slow over quick: p50" in told
        record = json.loads(out.read_text())
        assert record["machine"]["cpu"] and record["versions"]["numpy"] == np.__version__
        assert record["engines"]["slow"]["fused"] + record["engines"]["slow"]["dropped"] == 40
        low, high = record["compared"]["slow"]["interval"]["p50"]
        assert 1.2 < low <= high < 6
        assert svg.read_text().startswith("<svg")
        assert main(["latency", "quick", "quick"]) == 2
        assert "expected each once" in capsys.readouterr().err
        assert main(["latency", "quick", "--cpus", "9999"]) == 2
        assert "expected processors out of" in capsys.readouterr().err
