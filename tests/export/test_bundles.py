"""Bundles for a GPU that is not here: the precision, the networks, what is said of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from fuseengine import saved_engine
from fuseengine.errors import BackendUnavailableError, SettingError
from fuseengine.export import bundles
from fuseengine.export.bundles import compile_for
from fuseengine.program import resolve
from fuseengine.runtime.bundle import Bundle
from fuseengine.runtime.cubins import Store
from fuseengine.runtime.frames import FrameAdapter
from fuseengine.runtime.launches import Launches, key_of
from fuseengine.targets import get_target
from tests.helpers import psnr
from tests.saved import SIZE, frames, little_engine, little_model

pytest.importorskip("triton", reason="compiles the kernels")

ORIN = get_target("orin")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("orin") / "little.fuse"
    return compile_for(little_model(), SIZE, ORIN, path, threads=1)


@pytest.fixture
def quickly(written, tmp_path, monkeypatch):
    """Compiles for Orin with the kernels that were compiled before."""
    monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path / "cache"))
    with Bundle(written.path) as opened:
        store = opened.kernels()
    monkeypatch.setattr(bundles, "_kernels", lambda *args: Store.load(store.folder))

    def run(**options):
        path = tmp_path / "x.fuse"
        return compile_for(little_model(), SIZE, ORIN, path, threads=1, **options)

    return run


def kinds(path):
    """Element types of the networks' weights, per precision."""
    with Bundle(path) as opened:
        return {
            precision: {t.data_type for t in onnx.load_model_from_string(content).graph.initializer}
            for (variant, precision) in opened.networks
            if variant.label == "net-0-1"
            for content in [opened.onnx(variant, precision)]
        }


def test_what_is_in_it(written):
    assert written.precision == "fp16"
    with Bundle(written.path) as opened:
        assert opened.description.device == "cuda" and opened.target.compute_capability == 87
        assert set(opened.description.choice.values()) == {("tensorrt", "fp16")}
        store = opened.kernels()
    assert store.capabilities == [87]
    assert {"ddim_step", "frame_in", "frame_out"} <= {entry.op for entry in store.entries}
    found = kinds(written.path)
    half = onnx.TensorProto.FLOAT16
    assert half in found["fp16"] and half not in found["fp32"]
    (text,) = written.verified
    assert "every half value rounded" in text and text.endswith("dB")
    assert any("compiled, not run" in text for text in written.not_verified)


def test_a_video_has_its_program_and_kernels(tmp_path):
    path = tmp_path / "video.fuse"
    compile_for(little_model(), SIZE, ORIN, path, threads=1, resumed_steps=1)
    with Bundle(path) as opened:
        folder = opened.kernels().folder
        programs = opened.description.programs
        assert len(programs) == 2 and len(programs[1].inputs) == 3
    launches = Launches.load(folder)
    adapter = FrameAdapter(SIZE, multiple=programs[0].multiple)
    for program in programs:
        for node in program.nodes:
            if node.target == "ddim_step":
                shapes = [
                    resolve(program.values[n].shape, adapter.padded)
                    for n in (*node.inputs, *node.made())
                ]
                key = key_of(node.target, shapes[:-1], shapes[-1], node.attrs)
                assert launches.get(key, 87) is not None, node


def test_it_refuses_this_machine_and_runs_on_its_cpu(written):
    if saved_engine.gpus():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendUnavailableError, match=r"8\.7; this machine has no NVIDIA GPU"):
        saved_engine.load(written.path)
    loaded = saved_engine.load(written.path, device="cpu", backend="onnxruntime", threads=1)
    expected = little_engine()(*frames())
    assert psnr(loaded(*frames()) / 255, expected / 255) >= 60
    np.testing.assert_array_equal(loaded(*frames()), expected)


@pytest.mark.parametrize(("precision", "kind"), [("bf16", "BFLOAT16"), ("fp32", "FLOAT")])
def test_precisions(quickly, precision, kind):
    made = quickly(precision=precision)
    assert made.precision == precision and len(made.verified) == 1
    assert onnx.TensorProto.DataType.Value(kind) in kinds(made.path)[precision]


def test_tf32_is_not_verified(quickly):
    made = quickly(precision="tf32")
    assert made.verified == () and "not run" in made.not_verified[-1]
    assert set(kinds(made.path)) == {"fp32"}


def test_int8(quickly):
    made = quickly(precision="int8", guard_db=15)
    assert made.precision == "int8" and set(kinds(made.path)) == {"fp32", "int8"}
    with Bundle(made.path) as opened:
        record = opened.description.report.quantised
    assert record is not None and record["pictures"].startswith("the demo pair")
    with Bundle(made.path) as opened:
        ops = {
            node.op_type
            for key in opened.networks
            if key[1] == "int8"
            for node in onnx.load_model_from_string(opened.onnx(*key)).graph.node
        }
    assert {"QuantizeLinear", "DequantizeLinear"} <= ops


def test_the_guard(quickly, caplog):
    assert quickly(guard_db=100).precision == "fp32"
    assert "fp16 misses the guard" in caplog.text
    with pytest.raises(SettingError, match=r"precision='fp16': \d+\.\d dB, below the guard of 100"):
        quickly(precision="fp16", guard_db=100)


def test_refused(tmp_path):
    for options, message in (
        ({"target": get_target("x86-cpu")}, "is no GPU"),
        ({"precision": "fp8"}, "expected auto or one of"),
    ):
        given = {"target": ORIN, **options}
        with pytest.raises(SettingError, match=message):
            compile_for(little_model(), SIZE, path=tmp_path / "x.fuse", **given)
    assert list(tmp_path.iterdir()) == []
