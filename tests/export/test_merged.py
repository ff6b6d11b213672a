"""Stages and ops as one network: the same picture, and when the search takes it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import fuseengine as fe
from fuseengine import search
from fuseengine.engine import build_executor
from fuseengine.errors import CompileError, SettingError
from fuseengine.export.merged import INSIDE, merge
from fuseengine.stages import ModelStages
from fuseengine.tracing import capture
from tests.helpers import TINY, pictures_for, psnr, system

SIZE = (32, 64)


def merged(model):
    program = capture(model)
    return program, ModelStages(model, program), merge(program, ModelStages(model, program))


def fused(program, stages, pair, backend="onnxruntime"):
    choice = dict.fromkeys(program.variants(), (backend, "fp32"))
    executor = build_executor(program, stages, choice, SIZE, "cpu", 1)
    for target, picture in zip(executor.inputs, pair, strict=True):
        target[...] = picture
    executor.run()
    return executor.output.copy()


@pytest.mark.parametrize("name", [name for name in TINY if name != "drmf"])
def test_the_same_picture(name):
    model = system(name)
    program, stages, made = merged(model)
    assert made is not None
    less, networks = made
    assert len(less.stage_calls()) < len(program.stage_calls())
    pair = [x.numpy() for x in pictures_for(model, SIZE)]
    assert psnr(fused(less, networks, pair), fused(program, stages, pair)) > 85


def test_what_stays_an_op():
    program, _, (less, _) = merged(system("dmfuse-s"))

    def attention(p):
        return [node.target for node in p.nodes].count("criss_cross_attention")

    assert attention(less) == attention(program) > 1
    assert len(less.stage_calls()) == 2  # before all attention and after it
    program, _, (less, _) = merged(system("mask-difuser-s"))
    left = {node.target for node in less.nodes if node.kind == "op"}
    assert left and not left & INSIDE  # the noise that is drawn once per size


def test_networks():
    _, _, (less, networks) = merged(system("drmf-s"))
    (variant,) = less.variants()
    model = onnx.load_model_from_string(networks.onnx(variant))
    onnx.checker.check_model(model, full_check=True)
    names = [value.name for value in model.graph.input]
    assert names == [f"in{i}" for i in range(len(names))]
    assert networks.onnx(variant) is networks.onnx(variant)
    with pytest.raises(SettingError, match="int8: merged stages are there in fp32 alone"):
        networks.onnx(variant, "int8")
    with pytest.raises(CompileError, match="several stages"):
        networks.module(variant)


def test_a_model_of_one_stage_has_nothing_to_merge():
    import torch

    class Mean(torch.nn.Module):
        def forward(self, a, b):
            return (a + b) / 2

    assert merged(Mean())[2] is None


class TestSearch:
    @pytest.fixture
    def compiled(self, monkeypatch, tmp_path):
        monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path))
        monkeypatch.setattr(search, "_WORTH_MERGING_MS", 0.0)

        def make(clearly, **options):
            monkeypatch.setattr(search, "_MERGED_AT_MOST", clearly)
            given = {"backend": "onnxruntime", "precision": "fp32", "threads": 1, **options}
            return fe.compile(system("dmnet-s"), SIZE, guard_db=30.0, **given)

        return make

    def test_taken_where_it_is_faster(self, compiled, tmp_path):
        engine = compiled(1e9)
        assert engine.report.candidates[-1].note == "chosen: merged stages"
        assert [v.stage for v in engine.program.variants()] == ["merged.0"]
        assert engine.report.choice == {"merged.0-0": "onnxruntime/fp32"}
        apart = compiled(0.0, cache=False)
        assert "of the time apart" in apart.report.candidates[-1].note
        assert [c.note for c in apart.report.candidates].count("chosen") == 1
        assert "merged.0" not in str(apart.program)
        rng = np.random.default_rng(0)
        frames = rng.integers(0, 256, (2, *SIZE), np.uint8)
        assert np.abs(engine(*frames).astype(int) - apart(*frames)).max() <= 1
        again = compiled(1e9)
        assert again.report.from_cache
        np.testing.assert_array_equal(again(*frames), engine(*frames))
        engine.save(tmp_path / "merged.fuse")
        loaded = fe.load(tmp_path / "merged.fuse", threads=1)
        np.testing.assert_array_equal(loaded(*frames), engine(*frames))

    def test_not_where_it_is_ruled_out(self, compiled):
        assert compiled(1e9, merge=True).report.choice == {"merged.0-0": "onnxruntime/fp32"}
        engine = compiled(1e9, merge=False)  # another key in the cache
        assert not engine.report.from_cache
        assert not any("merged" in c.note for c in engine.report.candidates)
        assert "merged.0" not in str(engine.program)

    def test_not_for_video(self, compiled):
        model = system("mask-difuser-s")
        engine = fe.compile(
            model, SIZE, backend="onnxruntime", precision="fp32", temporal="warm", guard_db=30.0,
            threads=1, cache=False,
        )  # fmt: skip
        assert not any("merged" in c.note for c in engine.report.candidates)

    def test_a_failure_is_a_row(self, compiled, monkeypatch):
        from fuseengine.export import merged as module

        def fails(*_):
            raise CompileError("no form")

        monkeypatch.setattr(module, "part_to_onnx", fails)
        engine = compiled(1e9, cache=False)
        assert engine.report.candidates[-1].note == "merged: no form"
        assert "merged.0" not in str(engine.program)
