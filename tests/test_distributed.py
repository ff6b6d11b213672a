"""Folders over Ray: what is finished, what fails, what a dead worker leaves; a real local cluster.

Without Ray, what surrounds it is tested with the actor called in this process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fuseengine import distributed
from fuseengine.cli import main
from fuseengine.distributed import RECORD, Job, Outcome, _Fuser, fuse_over_ray
from fuseengine.errors import SettingError
from fuseengine.runtime.images import pair_files, read_image

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'fuseengine[ray]'"
)

POISON = 255
"""A visible picture of this value kills the process that fuses it."""


@dataclass(frozen=True)
class Averaging(Job):
    """A job whose engine needs no compiling."""

    def engine(self):
        def fuse(infrared, visible, **options):
            if infrared.shape != visible.shape[:2]:
                raise SettingError("got two\nsizes")
            if visible.min() == POISON:
                os._exit(1)
            return visible // 2 + 1

        return fuse


@pytest.fixture
def folders(tmp_path):
    """Five pairs, and an output folder."""
    rng = np.random.default_rng(0)
    for name in ("ir", "vis", "out"):
        (tmp_path / name).mkdir()
    for index in range(5):
        ir = rng.integers(0, 200, (12, 16), np.uint8)
        vis = rng.integers(0, 200, (12, 16, 3), np.uint8)
        Image.fromarray(ir).save(tmp_path / "ir" / f"{index}.png")
        Image.fromarray(vis).save(tmp_path / "vis" / f"{index}.png")
    return tmp_path / "ir", tmp_path / "vis", tmp_path / "out"


@pytest.fixture
def in_process(monkeypatch):
    """The cluster is this process; ``died`` are stems at which it does."""
    died = []

    def results(rows, job, record, threads, gpu):
        actor = _Fuser(job, str(record), "this run")
        for row in rows:
            if Path(row["target"]).stem in died:
                raise RuntimeError("the cluster is gone")
            made = actor({name: [value] for name, value in row.items()})
            yield {name: values[0] for name, values in made.items()}

    class Nothing:
        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(distributed, "_results", results)
    monkeypatch.setattr(distributed, "_cluster", lambda address: Nothing())
    return died


def run(folders, job=None, **options):
    ir, vis, out = folders
    pairs = pair_files(ir, vis).pairs
    outcome = Outcome(len(pairs))
    fuse_over_ray(pairs, out, job or Averaging(), outcome, **options)
    return outcome


def pictures(out):
    return sorted(path.name for path in out.iterdir() if path.suffix == ".png")


class TestResume:
    def test_everything_then_nothing(self, folders, in_process):
        first = run(folders)
        assert (first.made, first.finished, first.failures) == (5, 0, [])
        times = {p: p.stat().st_mtime_ns for p in folders[2].iterdir()}
        second = run(folders)
        assert (second.made, second.finished) == (0, 5)
        assert {p: p.stat().st_mtime_ns for p in folders[2].iterdir()} == times
        expected = read_image(folders[1] / "3.png") // 2 + 1
        np.testing.assert_array_equal(read_image(folders[2] / "3.png"), expected)

    def test_goes_on_where_it_stopped(self, folders, in_process):
        in_process.append("2")
        with pytest.raises(RuntimeError, match="the cluster is gone"):
            run(folders)
        assert pictures(folders[2]) == ["0.png", "1.png"]
        in_process.clear()
        outcome = run(folders)
        assert (outcome.made, outcome.finished) == (3, 2)
        assert "5 pairs" in outcome.lines(folders[2]) and "2 were finished before" in outcome.lines(
            folders[2]
        )

    def test_a_source_that_changed_is_fused_again(self, folders, in_process):
        run(folders)
        later = time.time() + 10
        os.utime(folders[0] / "1.png", (later, later))
        outcome = run(folders)
        assert (outcome.made, outcome.finished) == (1, 4)

    def test_an_output_of_unknown_origin_is_made_again(self, folders, in_process):
        (folders[2] / "0.png").write_bytes(b"of another program")
        os.utime(folders[2] / "0.png", (1, 1))
        assert run(folders).made == 5
        read_image(folders[2] / "0.png")

    def test_an_empty_output_is_not_finished(self, folders, in_process):
        run(folders)
        (folders[2] / "4.png").write_bytes(b"")
        assert run(folders).made == 1

    def test_other_settings_are_refused(self, folders, in_process):
        run(folders, Averaging({"model": "drfusion-s", "precision": "fp32", "threads": 2}))
        same = Averaging({"model": "drfusion-s", "precision": "fp32", "threads": 8})
        assert run(folders, same).finished == 5
        other = Averaging({"model": "drfusion-s", "precision": "bf16"})
        with pytest.raises(SettingError, match=r"precision: 'fp32' before, now 'bf16'.*restart"):
            run(folders, other)
        with pytest.raises(SettingError, match=r"infrared_range: None before, now \[7, 9\]"):
            run(folders, Averaging(same.options, frames={"infrared_range": (7, 9)}))
        assert run(folders, other, restart=True).made == 5
        assert run(folders, other).finished == 5

    def test_a_record_that_cannot_be_read(self, folders, in_process):
        (folders[2] / RECORD).write_text("{")
        with pytest.raises(SettingError, match="its record cannot be read"):
            run(folders)

    def test_a_bundle_is_known_by_its_content(self, folders, in_process, tmp_path):
        bundle = tmp_path / "a.fuse"
        bundle.write_bytes(b"one")
        run(folders, Averaging(bundle=str(bundle)))
        moved = bundle.rename(tmp_path / "b.fuse")
        assert run(folders, Averaging(bundle=str(moved))).finished == 5
        moved.write_bytes(b"two")
        with pytest.raises(SettingError, match="bundle"):
            run(folders, Averaging(bundle=str(moved)))
        with pytest.raises(SettingError, match="No such file"):
            run(folders, Averaging(bundle=str(tmp_path / "none.fuse")))


class TestFailures:
    def test_are_listed_and_stop_nothing(self, folders, in_process):
        ir, _, out = folders
        (ir / "1.png").write_bytes(b"broken")
        Image.fromarray(np.zeros((5, 5), np.uint8)).save(ir / "3.png")
        outcome = run(folders)
        assert outcome.made == 3 and pictures(out) == ["0.png", "2.png", "4.png"]
        text = outcome.lines(out).splitlines()
        assert text[1] == "failed: 2" and text[2].startswith("  1: cannot read ")
        assert text[3] == "  3: got two sizes"
        assert run(folders).failures and run(folders).finished == 3  # tried again each time

    def test_a_fault_names_its_kind(self, folders, in_process, monkeypatch):
        def fail(self, infrared, visible, target):
            raise RuntimeError("bad kernel")

        monkeypatch.setattr(_Fuser, "_fuse", fail)
        assert run(folders).failures[0] == ("0", "RuntimeError: bad kernel")

    def test_a_pair_that_kills_is_not_tried_twice(self, folders, in_process):
        """Its mark is there when another actor takes over."""
        working = folders[2] / distributed._WORKING
        working.mkdir()
        (working / "2").write_text("this run")
        (working / "3").write_text("an earlier run")
        outcome = run(folders)
        assert outcome.failures == [
            ("2", "a worker died while fusing it (out of memory, or a fault in a library)")
        ]
        assert outcome.made == 4 and not working.exists()

    def test_pairs_that_nobody_reported(self, folders, monkeypatch, in_process):
        whole = distributed._results

        def some(*args):
            for index, result in enumerate(whole(*args)):
                if index != 2:  # was fused, but the answer was lost
                    yield result
                if index == 3:
                    return  # the fifth was not even begun

        monkeypatch.setattr(distributed, "_results", some)
        outcome = run(folders)
        assert outcome.made == 4
        assert outcome.failures == [("4", "the worker that had it was lost; see Ray's logs")]


class TestCommand:
    def call(self, folders, *words):
        ir, vis, out = map(str, folders)
        return main(["fuse", ir, vis, "-o", out, *words])

    def test_options_make_the_job(self, folders, monkeypatch, capsys):
        asked = []

        def fake(pairs, output, job, outcome, *, progress, **options):
            asked.append((job, options))
            outcome.made, outcome.seconds = 4, 1.0
            outcome.failures.append(("2", "sizes; pass resize='infrared'"))

        monkeypatch.setattr(distributed, "fuse_over_ray", fake)
        words = ["--ray", "--ray-address", "ray://head:10001", "--precision", "fp32", "--restart"]
        words += ["--threads", "2", "--infrared-range", "minmax", "--suffix", ".tif"]
        assert self.call(folders, *words) == 2
        ((job, options),) = asked
        assert job.options == {
            "model": "drfusion-s",
            "device": "auto",
            "backend": "auto",
            "precision": "fp32",
            "effort": "quick",
            "cache": True,
        }
        assert job.frames == {"resize": None, "infrared_range": "minmax"} and job.suffix == ".tif"
        wanted = {"address": "ray://head:10001", "threads": 2, "gpu": False, "restart": True}
        assert options == wanted
        text = capsys.readouterr().out
        assert text.startswith("fused 4 of 5 pairs") and "--resize infrared" in text

    def test_a_bundle(self, folders, tmp_path, monkeypatch):
        jobs = []
        monkeypatch.setattr(
            distributed, "fuse_over_ray", lambda p, o, job, outcome, **k: jobs.append(job)
        )
        self.call(folders, "--ray", "--engine", str(tmp_path / "a.fuse"))
        assert jobs[0].bundle == str(tmp_path / "a.fuse") and jobs[0].options["device"] is None

    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (["--restart"], "give --ray too"),
            (["--ray-address", "auto"], "give --ray too"),
            (["--ray", "--engine", "x.fuse", "--effort", "full"], "compiled already"),
        ],
    )
    def test_wrong_options(self, folders, capsys, words, text):
        assert self.call(folders, *words) == 2
        assert text in capsys.readouterr().err

    def test_files(self, folders, capsys):
        ir, vis, out = folders
        words = ["fuse", str(ir / "1.png"), str(vis / "1.png"), "-o", str(out / "1.png"), "--ray"]
        assert main(words) == 2
        assert "--ray spreads two folders" in capsys.readouterr().err

    def test_without_ray(self, folders, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "ray", None)
        assert self.call(folders, "--ray", "-q") == 2
        assert "pip install 'fuseengine[ray]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def cluster():
    """A cluster of one core for all tests, whose workers take this file's classes along."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'fuseengine[ray]'")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own: unclosed sockets, deprecated settings
class TestRay:
    def test_a_pair_that_kills_its_worker(self, cluster, folders):
        ir, vis, out = folders
        Image.fromarray(np.full((12, 16, 3), POISON, np.uint8)).save(vis / "2.png")
        (ir / "0.png").write_bytes(b"broken")
        outcome = run(folders, threads=1)
        assert (outcome.made, len(outcome.failures)) == (3, 2)
        reasons = dict(outcome.failures)
        assert reasons["2"].startswith("a worker died while fusing it")
        assert reasons["0"].startswith("cannot read")
        assert pictures(out) == ["1.png", "3.png", "4.png"]
        np.testing.assert_array_equal(read_image(out / "4.png"), read_image(vis / "4.png") // 2 + 1)
        # A better picture: only what is missing is made.
        Image.fromarray(np.full((12, 16, 3), 7, np.uint8)).save(vis / "2.png")
        again = run(folders, threads=1)
        assert (again.made, again.finished, len(again.failures)) == (1, 3, 1)
        assert json.loads((out / RECORD).read_text())["suffix"] == ".png"
