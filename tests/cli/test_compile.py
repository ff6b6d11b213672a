"""``compile``, ``inspect``, ``verify`` and ``fuse --engine``: from a model to a picture."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

import fuseengine as fe
from fuseengine.cli import main
from fuseengine.runtime.bundle import Bundle
from fuseengine.runtime.images import read_image
from tests.saved import DATA

from .conftest import make_pair, save

OLD = DATA / "schema-1.fuse"
"""A bundle of the little model, 30x22, ONNX Runtime in float32."""

LITTLE = (22, 30)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def pair(tmp_path):
    ir, vis = make_pair(size=LITTLE)
    return save(tmp_path / "ir.png", ir), save(tmp_path / "vis.png", vis)


def error_of(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fuseengine: error: ") and captured.err.count("\n") == 1
    return captured.err


def run(*argv):
    return main([str(word) for word in argv])


class TestCompile:
    def test_for_this_machine(self, tmp_path, capsys):
        out = tmp_path / "d.fuse"
        options = "--size 40x32 --backend onnxruntime --precision fp32 --threads 1 --no-cache"
        assert run("compile", "drfusion-s", "-o", out, *options.split()) == 0
        captured = capsys.readouterr()
        assert "predicted, not measured: drfusion-s 40x32" in captured.out
        assert f"{out}: " in captured.out and " MB, for " in captured.out
        assert "dB, max error" in captured.err
        with Bundle(out) as opened:
            assert opened.target.name == "this" and opened.description.size == (32, 40)
            assert len(opened.manifest["verified"]) == 1
        ir, vis = make_pair(size=(32, 40))
        ready = fe.compile("drfusion-s", (32, 40), backend="onnxruntime", threads=1, cache=False)
        np.testing.assert_array_equal(fe.load(out, threads=1)(ir, vis), ready(ir, vis))

    def test_stages_apart(self, tmp_path, monkeypatch):
        from fuseengine import search

        monkeypatch.setattr(search, "_WORTH_MERGING_MS", 0.0)
        monkeypatch.setattr(search, "_MERGED_AT_MOST", 1e9)
        options = "--size 32x32 --backend onnxruntime --precision fp32 --threads 1 --no-cache -q"
        for name, more in (("merged", ()), ("apart", ("--no-merge",))):
            out = tmp_path / f"{name}.fuse"
            assert run("compile", "dmfuse-s", "-o", out, *options.split(), *more) == 0
            with Bundle(out) as opened:
                stages = {v.stage for v in opened.description.program.variants()}
            assert any(stage.startswith("merged.") for stage in stages) == (name == "merged")

    def test_for_video(self, tmp_path, capsys):
        out = tmp_path / "m.fuse"
        options = "--size 32x32 --backend onnxruntime --precision fp32 --threads 1 --no-cache -q"
        words = ["compile", "mask-difuser-s", "-o", out, *options.split()]
        assert run(*words, "--temporal", "warm", "--warm-steps", "2") == 0
        engine = fe.load(out, threads=1)
        assert [call.target for call in engine.resumed.stage_calls()].count("unet") == 2
        capsys.readouterr()
        assert run("inspect", out) == 0
        assert "resumed.previous" in capsys.readouterr().out
        assert run(*words, "--warm-steps", "2") == 2
        assert "warm_steps=2 without temporal; give --temporal warm" in error_of(capsys)
        words[1] = "drfusion-s"
        assert run(*words, "--temporal", "warm") == 2
        assert "drfusion-s cannot start from the frame before" in error_of(capsys)

    def test_for_a_cpu_elsewhere(self, tmp_path, capsys):
        out = tmp_path / "d.fuse"
        options = "--random-weights --size 32x32 --target x86-cpu --threads 1 --no-cache -q"
        assert run("compile", "dmnet-s", "-o", out, *options.split()) == 0
        assert capsys.readouterr().out == ""
        with Bundle(out) as opened:
            assert opened.target.name.startswith("x86-cpu")
            # What this machine computes in, others of its kind may not.
            assert {precision for _, precision in opened.description.choice.values()} == {"fp32"}

    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
    def test_for_a_gpu_that_is_not_here(self, tmp_path, capsys):
        out = tmp_path / "d.fuse"
        options = "--size 40x32 --target orin --threads 1"
        assert run("compile", "drfusion-s", "-o", out, *options.split()) == 0
        captured = capsys.readouterr()
        assert "predicted, not measured: drfusion-s 40x32 on Jetson AGX Orin" in captured.out
        assert "not verified: the stages on Jetson AGX Orin" in captured.err
        assert "verified: the fp16 networks in ONNX Runtime on the CPU, 40x32" in captured.err
        with Bundle(out) as opened:
            assert opened.target.compute_capability == 87
            assert set(opened.description.choice.values()) == {("tensorrt", "fp16")}
            assert {kind for _, kind in opened.networks} == {"fp32", "fp16"}
            assert {entry["capability"] for entry in opened.manifest["kernels"]} == {87}
            ops = {entry.op for entry in opened.kernels().entries}
            assert {"joint_ddim_step", "ddim_step", "frame_in", "frame_out"} <= ops
        assert run("inspect", out) == 0
        text = capsys.readouterr().out
        assert "compiled for: orin" in text and "cubin for compute capability 8.7" in text
        assert "NOT verified: the kernels for compute capability 87: compiled, not run" in text
        assert "not run yet" in text
        ir, vis = make_pair(size=(32, 40))
        files = save(tmp_path / "ir.png", ir), save(tmp_path / "vis.png", vis)
        fused = tmp_path / "fused.png"
        assert run("fuse", "--engine", out, *files, "-o", fused) == 2
        assert "this machine has" in error_of(capsys)
        on_cpu = ["--device", "cpu", "--backend", "onnxruntime"]
        assert run("fuse", "--engine", out, *files, "-o", fused, *on_cpu) == 0
        assert run("verify", out, *on_cpu, "--threads", 1) == 0

    @pytest.mark.parametrize(
        ("argv", "text"),
        [
            (["drfusion-s", "-o", "x.zip"], "expected a name that ends in .fuse"),
            (["drfusion-s", "-o", "no/x.fuse"], "no folder no; make it first"),
            (["drfusion", "-o", "x.fuse"], "unknown packaged model 'drfusion'"),
            (["drfusion-s", "-o", "x.fuse", "--target", "orion"], "unknown target 'orion'"),
            (["drfusion-s", "-o", "x.fuse", "--target", "orin"], "give --size"),
            (["drfusion-s", "-o", "x.fuse", "--size", "9"], "expected WIDTHxHEIGHT"),
            (["drfusion-s", "-o", "x.fuse", "--backend", "torch"], "which no bundle holds"),
            (
                ["drfusion-s", "-o", "x.fuse", "--target", "x86-cpu", "--precision", "fp16"],
                "precision 'fp16': x86-cpu",
            ),
            (
                [
                    "drfusion-s",
                    "-o",
                    "x.fuse",
                    "--target",
                    "orin",
                    "--size",
                    "40x32",
                    "--backend",
                    "openvino",
                ],
                "stages on orin:maxn are TensorRT's",
            ),
        ],
    )
    def test_refused(self, argv, text, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert run("compile", *argv) == 2
        assert text in error_of(capsys)
        assert list(tmp_path.iterdir()) == []


class TestInspect:
    def test_what_it_prints(self, capsys):
        assert run("inspect", OLD) == 0
        text = capsys.readouterr().out
        for part in (
            "schema 1, fuseengine 0.1.0",
            "model: little; luma is fused",
            "frames: 30x22, padded to multiples of 4",
            "compiled for: this (CPU, ",
            "net-0-1  onnxruntime  fp32       2      fp32 0.01 MB",
            "kernels: none",
            "verified: all stages and ops on cpu",
            "program little(a: f32[1, 1, H, W]",
        ):
            assert part in text

    def test_json(self, capsys):
        assert run("inspect", OLD, "--json") == 0
        assert json.loads(capsys.readouterr().out)["schema"] == 1

    def test_damaged(self, tmp_path, capsys):
        path = tmp_path / "x.fuse"
        path.write_bytes(OLD.read_bytes()[:-1])
        assert run("inspect", path) == 2
        assert "x.fuse is cut off" in error_of(capsys)

    def test_no_file(self, tmp_path, capsys):
        assert run("inspect", tmp_path / "x.fuse") == 2
        assert "there is no such file" in error_of(capsys)


class TestVerify:
    def test_the_demo_pair(self, capsys):
        assert run("verify", OLD, "--threads", 1) == 0
        captured = capsys.readouterr()
        assert "stage net-0-1  onnxruntime/fp32" in captured.out
        assert "1 picture, worst the demo pair: PSNR 1" in captured.out and captured.err == ""

    def test_folders(self, tmp_path, capsys):
        for seed, size in enumerate((LITTLE, (40, 50))):  # another size is resampled
            ir, vis = make_pair(seed, size)
            save(tmp_path / "ir" / f"{seed}.png", ir)
            save(tmp_path / "vis" / f"{seed}.png", vis)
        folders = ["--infrared", tmp_path / "ir", "--visible", tmp_path / "vis"]
        assert run("verify", OLD, *folders, "--json") == 0
        data = json.loads(capsys.readouterr().out)
        assert [p["name"] for p in data["pictures"]] == ["0", "1"] and data["failures"] == []
        assert run("verify", OLD, *folders, "--limit", 1) == 0
        assert "1 picture" in capsys.readouterr().out

    def test_what_is_wrong_fails(self, monkeypatch, capsys):
        from fuseengine import verify

        monkeypatch.setattr(verify, "EXACT_DB", 300.0)
        assert run("verify", OLD, "-q") == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "not as exact as expected: ddim_step (native): 1" in captured.err
        assert "not as exact as expected: picture the demo pair" in captured.err

    def test_refused(self, tmp_path, capsys):
        assert run("verify", OLD, "--infrared", tmp_path) == 2
        assert "expected both or none" in error_of(capsys)
        assert run("verify", OLD, "--infrared", tmp_path, "--visible", tmp_path) == 2
        assert "no pairs in" in error_of(capsys)
        assert run("verify", OLD, "--backend", "onnx") == 2
        assert "unknown backend 'onnx'" in error_of(capsys)


class TestFuse:
    def test_a_pair(self, pair, tmp_path, capsys):
        assert run("fuse", "--engine", OLD, *pair, "-o", tmp_path / "f.png", "--threads", 1) == 0
        expected = fe.load(OLD, threads=1)(*map(read_image, pair))
        np.testing.assert_array_equal(read_image(tmp_path / "f.png"), expected)
        assert "little 30x22 on cpu" in capsys.readouterr().err

    def test_folders(self, tmp_path, capsys):
        for seed, size in enumerate((LITTLE, LITTLE, (40, 50))):
            ir, vis = make_pair(seed, size)
            save(tmp_path / "ir" / f"{seed}.png", ir)
            save(tmp_path / "vis" / f"{seed}.png", vis)
        folders = [tmp_path / "ir", tmp_path / "vis", "-o", tmp_path / "out"]
        assert run("fuse", *folders, "--engine", OLD, "--progress") == 2
        captured = capsys.readouterr()
        assert (
            "fused 2 of 3 pairs" in captured.out and "2.png: the frames are 40x50" in captured.out
        )
        assert "schema-1: " in captured.err  # the progress bar's name

    @pytest.mark.parametrize(
        ("argv", "text"),
        [
            (["--effort", "full"], "it is compiled already"),
            (["--model", "x"], "it is compiled already"),
            (["--precision", "int8"], "holds no int8 network"),
            (["--precision", "bf8"], "bf8 on onnxruntime, which here offers"),
            (["--device", "cuda"], "onnxruntime: backend 'onnxruntime' cannot be used on cuda"),
        ],
    )
    def test_refused(self, pair, tmp_path, argv, text, capsys):
        assert run("fuse", "--engine", OLD, *pair, "-o", tmp_path / "f.png", *argv) == 2
        assert text in error_of(capsys)
        assert not (tmp_path / "f.png").exists()

    def test_another_size(self, tmp_path, capsys):
        ir, vis = make_pair()
        files = save(tmp_path / "ir.png", ir), save(tmp_path / "vis.png", vis)
        assert run("fuse", "--engine", OLD, *files, "-o", tmp_path / "f.png") == 2
        assert "the frames are 48x64" in error_of(capsys)

    def test_nothing_heavy_is_imported(self, pair, tmp_path, command):
        done = command("fuse", "--engine", OLD, *pair, "-o", tmp_path / "f.png", probe=True)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "imported:"
        done = command("inspect", OLD, probe=True)
        assert done.stdout.splitlines()[-1] == "imported:"
