"""``fuseengine evaluate``: what it prints and writes, fusing first, and all that can be wrong."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pytest

from fuseengine.cli import main
from fuseengine.metrics import METRICS, evaluate
from fuseengine.runtime.images import read_image

from .conftest import save

SIZE = (40, 56)


def picture(seed, size=SIZE):
    """Columns of light and grain: every metric is defined."""
    rng = np.random.default_rng(seed)
    waves = 128 + 80 * np.sin(np.arange(size[1]) / (3 + seed % 5))
    return np.clip(waves + rng.normal(0, 20, size), 0, 255).astype(np.uint8)


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Folders ir, vis, high, low and mean of three images, in the working folder."""
    for index, name in enumerate("abc"):
        ir, vis = picture(index), picture(10 + index)
        save(tmp_path / "ir" / f"{name}.png", ir)
        save(tmp_path / "vis" / f"{name}.png", vis)
        save(tmp_path / "high" / f"{name}.png", np.maximum(ir, vis))
        save(tmp_path / "low" / f"{name}.png", np.minimum(ir, vis))
        save(tmp_path / "mean" / f"{name}.png", ((ir + vis.astype(int)) // 2).astype(np.uint8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv, jobs=1):
    sources = ["--infrared", "ir", "--visible", "vis", "--jobs", jobs]
    return main(["evaluate", *map(str, argv), *map(str, sources)])


def error_of(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fuseengine: error: ") and captured.err.count("\n") == 1
    return captured.err


class TestReport:
    def test_one_folder(self, sets, capsys):
        assert run("high") == 0
        captured = capsys.readouterr()
        assert captured.err == ""  # no bar without a terminal
        assert captured.out.startswith("high\nimage ")
        assert "± std" in captured.out and "rank" not in captured.out
        assert "wrote report/index.html (" in captured.out
        names = sorted(path.name for path in (sets / "report").iterdir())
        assert names == ["index.html", "results.csv", "results.json"]
        with (sets / "report" / "results.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        expected = evaluate(*(read_image(f"{d}/b.png") for d in ("high", "ir", "vis")), ["EN"])
        assert float(rows[1]["EN"]) == expected["EN"]
        page = (sets / "report" / "index.html").read_text(encoding="utf-8")
        assert page.count("data:image/") == 9 and "<svg" in page

    def test_several_folders(self, sets, capsys):
        assert run("high", "--compare", "LOW=low", "mean", "-o", "out", "--metrics", "SD,MSE") == 0
        text = capsys.readouterr().out
        assert "mean ± std over 3 images (rank)" in text and "mean rank" in text
        data = json.loads((sets / "out" / "results.json").read_text(encoding="utf-8"))
        assert list(data["methods"]) == ["high", "LOW", "mean"]
        assert list(data["metrics"]) == ["SD", "MSE"]
        ranks = {m: values["metrics"]["MSE"]["rank"] for m, values in data["methods"].items()}
        # Whichever source a pixel is taken from, both errors together are the same.
        assert ranks == {"high": 2, "LOW": 2, "mean": 1}

    def test_json_is_all_there_is(self, sets, capsys):
        assert run("high", "--json", "--paper", "TNO") == 0
        captured = capsys.readouterr()
        data = json.loads(captured.out)
        assert captured.err == "" and not (sets / "report").exists()
        assert [image["name"] for image in data["images"]] == ["a", "b", "c"]
        assert {table["dataset"] for table in data["published"]} == {"TNO"}
        assert run("high", "--json", "-o", "out") == 0
        assert (sets / "out" / "index.html").exists()
        assert json.loads(capsys.readouterr().out)

    def test_paper(self, sets, capsys):
        assert run("high", "--paper", "tno", "--metrics", "EN,VIF") == 0
        text = capsys.readouterr().out
        assert "As printed by DMNet: TNO, 25 pairs" in text
        assert "not recomputed" in text and "high (measured)" in text
        page = (sets / "report" / "index.html").read_text(encoding="utf-8")
        assert "As printed by DMFuse: TNO, 25 pairs" in page

    def test_convention(self, sets, capsys):
        assert run("high", "--json", "--convention", "cddfuse") == 0
        data = json.loads(capsys.readouterr().out)
        assert data["metrics"]["MI"]["form"] == "MI_nats"

    def test_all_metrics(self, sets, capsys):
        assert run("high", "--json", "--metrics", "all") == 0
        data = json.loads(capsys.readouterr().out)
        assert list(data["metrics"]) == [key for key, m in METRICS.items() if m.default]
        # Forty pixels are too few for it, which is said and not hidden.
        assert data["methods"]["high"]["metrics"]["MS_SSIM"]["n"] == 0
        assert any("MS_SSIM" in note and "0 of 3" in note for note in data["notes"])

    def test_sixteen_bit_infrared(self, sets, capsys):
        for name in "abc":
            save(sets / "ir" / f"{name}.png", picture(0).astype(np.uint16) * 8 + 7000)
        assert run("high", "--json") == 0
        notes = json.loads(capsys.readouterr().out)["notes"]
        assert any("--infrared-range" in note for note in notes)
        assert run("high", "--json", "--infrared-range", "7000,9040") == 0
        notes = json.loads(capsys.readouterr().out)["notes"]
        assert not any("--infrared-range" in note for note in notes)
        assert any("7000 and 9040 became 0 and 255" in note for note in notes)

    def test_no_pictures(self, sets):
        assert run("high", "--picture-mb", "0", "-q") == 0
        assert "data:image" not in (sets / "report" / "index.html").read_text(encoding="utf-8")

    def test_quiet_and_progress(self, sets, capsys):
        assert run("high", "-q") == 0
        assert capsys.readouterr() == ("", "")
        assert run("high", "--progress") == 0
        assert "measuring: 100%" in capsys.readouterr().err

    def test_files_without_partner_are_listed(self, sets, capsys):
        (sets / "high" / "c.png").rename(sets / "high" / "z.png")
        assert run("high") == 0
        text = capsys.readouterr().out
        assert "note: high without a partner, not measured: z.png.\n" in text
        assert "note: infrared without a partner, not measured: c.png.\n" in text

    @pytest.mark.slow
    def test_processes(self, sets, command):
        argv = ["evaluate", "high", "--infrared", "ir", "--visible", "vis", "--jobs", 2]
        done = command(*argv, cwd=sets, probe=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert done.stdout.splitlines()[-1] == "imported:"  # no torch, no tqdm


class TestSkip:
    @pytest.fixture(autouse=True)
    def damage(self, sets):
        save(sets / "high" / "b.png", picture(0, (20, 28)))
        (sets / "high" / "c.png").write_bytes(b"")

    def test_an_error_lists_all(self, sets, capsys):
        assert run("high") == 2
        message = error_of(capsys)
        assert "2 of 3 pairs cannot be measured: b: sizes differ" in message
        assert "high 20x28" in message and "the file is empty" in message
        assert "with --skip" in message
        assert not (sets / "report").exists()

    def test_skip(self, sets, capsys):
        assert run("high", "--skip") == 0
        text = capsys.readouterr().out
        assert "note: Left out: b: sizes differ" in text and "note: Left out: c:" in text
        page = (sets / "report" / "index.html").read_text(encoding="utf-8")
        assert "Left out: b: sizes differ" in page

    def test_nothing_left(self, sets, capsys):
        (sets / "high" / "a.png").write_bytes(b"")
        assert run("high", "--skip") == 2
        assert "3 of 3 pairs" in error_of(capsys)


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("argv", "text"),
        [
            ([], "nothing to measure; give a folder of fused images, or --model NAME"),
            (["high", "--metrics", "EN,Qbaf"], "unknown metric 'Qbaf'"),
            (["high", "--metrics", "EN,,SD"], "expected different metrics between commas"),
            (["high", "--metrics", "EN,EN"], "expected different metrics between commas"),
            (["high", "--convention", "dmnett"], "Did you mean 'dmnet'?"),
            (["high", "--paper", "tnoo"], "Did you mean 'tno'?"),
            (["high", "--jobs", "0"], "got '0', expected a whole number"),
            (["high", "--picture-mb", "-1"], "got '-1', expected a number of 0 or more"),
            (["high", "--compare", "ir/../high"], "method 'ir/../high': got the name"),
            (["high", "--compare", "visible=low"], "neither source"),
            (["high", "--precision", "fp32"], "--precision is for fusing; give --model NAME"),
            (["nowhere"], "cannot list nowhere"),
            (["high", "-o", "high/a.png"], "is a file, expected a folder"),
            (["high", "--infrared", "gone"], "--infrared: no folder gone"),
            (["--model", "drfusion-z"], "Did you mean 'drfusion-s'?"),
        ],
    )
    def test_one_line(self, sets, capsys, argv, text):
        sources = ["--infrared", "ir", "--visible", "vis", "--jobs", "1"]
        assert main(["evaluate", *sources, *argv]) == 2
        assert text in error_of(capsys)
        assert not (sets / "report" / "index.html").exists()

    def test_sources_are_needed(self, capsys):
        assert main(["evaluate", "high"]) == 2
        assert "required: --infrared, --visible" in error_of(capsys)

    def test_no_common_names(self, sets, capsys):
        save(sets / "other" / "x.png", picture(0))
        assert run("other") == 2
        assert "no image is in all folders; got infrared ir (3)" in error_of(capsys)

    def test_without_scipy(self, sets, capsys, monkeypatch):
        for name in [m for m in sys.modules if m.startswith(("fuseengine.metrics", "scipy"))]:
            monkeypatch.delitem(sys.modules, name)
        for name in [m for m in sys.modules if m.startswith("fuseengine.evaluation.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "scipy", None)
        assert run("high") == 2
        assert "pip install 'fuseengine[evaluate]'" in error_of(capsys)


class TestModel:
    @pytest.fixture(autouse=True)
    def device(self, fake):
        fake.report.device = "cpu"

    def test_fuses_first(self, sets, fake, capsys):
        assert run("--model", "drfusion-s", "--precision", "fp32", "--threads", "2") == 0
        ((model, size, options),) = fake.asked
        assert (model, size) == ("drfusion-s", None)
        assert (options["precision"], options["threads"]) == ("fp32", 2)
        for name in "abc":
            fused = read_image(sets / "report" / "fused" / f"{name}.png")
            np.testing.assert_array_equal(fused, read_image(sets / "vis" / f"{name}.png") // 2 + 1)
        captured = capsys.readouterr()
        assert "latency, ms" in captured.out and " cores" in captured.out
        assert captured.err == "fake engine, 99 dB\n"
        data = json.loads((sets / "report" / "results.json").read_text(encoding="utf-8"))
        latency = data["methods"]["drfusion-s"]["latency"]
        assert latency["n"] == 3 and latency["sizes"] == 1
        assert 0 < latency["p50_ms"] <= latency["p90_ms"] <= latency["p99_ms"]
        # The first pair of a size is fused twice: a time of it is one of a ready engine.
        assert len(fake.calls) == 4

    def test_beside_folders(self, sets, fake):
        assert run("high", "--compare", "low", "--model", "drfusion-s", "-o", "out", "-q") == 0
        data = json.loads((sets / "out" / "results.json").read_text(encoding="utf-8"))
        assert list(data["methods"]) == ["high", "low", "drfusion-s"]
        assert data["methods"]["high"]["latency"] is None
        assert "a ready engine" not in (sets / "out" / "index.html").read_text(encoding="utf-8")

    def test_infrared_range_reaches_the_engine(self, sets, fake):
        assert run("--model", "drfusion-s", "--infrared-range", "minmax", "-q") == 0
        assert {call[1]["infrared_range"] for call in fake.calls} == {"minmax"}

    def test_failures_are_errors(self, sets, fake, capsys):
        fake.fail = {2: RuntimeError("bad kernel")}
        assert run("--model", "drfusion-s") == 2
        message = capsys.readouterr().err
        assert "1 of 3 pairs cannot be measured" in message
        assert "a: not fused: RuntimeError: bad kernel" in message

    def test_leftovers_are_not_measured(self, sets, fake, capsys):
        assert run("--model", "drfusion-s", "-q") == 0
        fake.calls.clear()
        fake.fail = {3: RuntimeError("bad kernel")}
        assert run("--model", "drfusion-s", "--skip", "--json") == 0
        data = json.loads(capsys.readouterr().out)
        assert [image["name"] for image in data["images"]] == ["a", "c"]
        assert data["left_out"] == {"b": "not fused: RuntimeError: bad kernel"}

    def test_a_folder_of_the_model_s_name(self, sets, fake, capsys):
        assert run("drfusion-s=high", "--model", "drfusion-s") == 2
        assert "has the model's name 'drfusion-s'" in error_of(capsys)
        assert fake.asked == []

    def test_inputs_are_not_replaced(self, sets, fake, capsys):
        (sets / "vis").rename(sets / "fused")
        argv = ["--model", "drfusion-s", "--infrared", "ir", "--visible", "fused", "-o", "."]
        assert main(["evaluate", *argv]) == 2
        assert "is one of the inputs" in error_of(capsys)
        assert fake.asked == []

    @pytest.mark.slow
    def test_a_real_engine(self, sets, command):
        pytest.importorskip("torch")
        pytest.importorskip("onnxruntime")
        argv = ["--infrared", "ir", "--visible", "vis", "--metrics", "EN,SD", "--jobs", 1]
        options = ["--device", "cpu", "--backend", "onnxruntime", "--precision", "fp32"]
        done = command("evaluate", "--model", "drfusion-s", *argv, *options, "--json", cwd=sets)
        assert done.returncode == 0, done.stderr
        method = json.loads(done.stdout)["methods"]["drfusion-s"]
        assert method["latency"]["p50_ms"] > 0 and "onnxruntime/fp32" in method["latency"]["engine"]
        assert method["metrics"]["SD"]["mean"] > 5
