"""Input that nobody means to give: each a clear error or a right answer, never a traceback."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fuseengine as fe
from fuseengine import cache as cache_store
from fuseengine.errors import (
    CaptureError,
    CheckpointError,
    FuseEngineError,
    SettingError,
    TrainingError,
)
from fuseengine.tracing import capture
from fuseengine.training.trainer import TrainSettings, train
from tests.helpers import run_python, tiny
from tests.test_tracing import execute, picture_pair, staged
from tests.training.test_data import write_pairs


def test_capture_stays_a_function_after_compile():
    run_python(
        "import fuseengine as fe, fuseengine.tracing\nassert callable(fe.capture), fe.capture"
    )


@pytest.mark.parametrize("stages", [("net",), ()])
@pytest.mark.parametrize(
    "body", [lambda self, a, b, c: self.net(a) + b + c, lambda self, a: self.net(a)]
)
def test_wrong_number_of_sources(body, stages):
    with pytest.raises(CaptureError, match=r"expected \(a, b\)"):
        capture(staged(body, stages=stages))


@pytest.mark.parametrize("stages", [("net",), ()])
def test_several_results(stages):
    with pytest.raises(CaptureError, match="one tensor"):
        capture(staged(lambda self, a, b: (self.net(a), b), stages=stages))


def test_alpha_of_add_is_not_lost():
    model = staged(lambda self, a, b: torch.sub(torch.add(self.net(a), b, alpha=2), a, alpha=3))
    pair = picture_pair((6, 8))
    try:
        program = capture(model)
    except CaptureError:
        return  # refusing it is as good
    with torch.no_grad():
        torch.testing.assert_close(execute(program, model, pair), model(*pair), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        lambda self, a, b: self.net(a).clamp(min=b),
        lambda self, a, b: torch.clamp(input=self.net(a), min=0),
        lambda self, a, b: torch.cat(tensors=[self.net(a), b], dim=1),
        lambda self, a, b: self.net(a)[:, :, : a.shape[2]],
    ],
)
def test_forms_no_rule_covers(body):
    with contextlib.suppress(CaptureError):  # a right program is as good
        capture(staged(body)).to_json()


def test_tensors_made_in_forward_leave_no_trace():
    model = staged(lambda self, a, b: self.net(a) * torch.ones(1, 1, 1, 1))
    members = set(vars(model))
    capture(model)
    assert set(vars(model)) == members


def test_a_number_is_a_0d_constant():
    model = staged(lambda self, a, b: self.net(a) * self.gain)
    model.gain = nn.Parameter(torch.tensor(0.75))
    program = capture(model)
    for name, array in program.constants.items():
        assert array.shape == program.values[name].shape


def test_narrow_of_a_square():
    def forward(self, a, b):
        x = self.net(torch.cat([a, b], 1))
        return (x * x)[:, 1:2]

    model = staged(forward)
    model.net = nn.Conv2d(2, 2, 1)
    pair = picture_pair((6, 8))
    with torch.no_grad():
        torch.testing.assert_close(execute(capture(model), model, pair), model(*pair))


def test_narrow_leaves_the_output_alone():
    def forward(self, a, b):
        y = self.net(a) * 2.0
        _ = y[:, :, 1:]  # unread
        return y

    model, pair = staged(forward), picture_pair((6, 8))
    with torch.no_grad():
        torch.testing.assert_close(execute(capture(model), model, pair), model(*pair))


def test_damaged_old_format(tmp_path):
    model = tiny()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer, _use_new_zipfile_serialization=False)
    content, rng = buffer.getvalue(), np.random.default_rng(0)
    path = tmp_path / "damaged.pth"
    for cut in (1, 2, 3):
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError):
            fe.load_checkpoint(model, path)
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[int(rng.integers(3000))] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            fe.load_checkpoint(model, path)
        except CheckpointError:
            continue


@pytest.mark.parametrize("source", [5, None, nn.Linear(1, 1)])
def test_source_of_another_type(source):
    with pytest.raises(CheckpointError):
        fe.load_checkpoint(tiny(), source)


@pytest.mark.parametrize("change", [{"groups": 0}, {"width": 0}, {"width": -8}, {"blocks": 0}])
def test_settings_below_one(change):
    with pytest.raises(SettingError):
        tiny(**change)


@pytest.mark.parametrize("size", [480, (480, float("nan")), "ab"])
def test_sizes_of_other_types(size):
    with pytest.raises(SettingError):
        fe.compile(tiny(), size=size)


def test_no_model():
    with pytest.raises(FuseEngineError):
        fe.compile(3, size=(24, 32))


@pytest.fixture(scope="module")
def engine():
    return fe.compile(tiny(), size=(24, 32), backend="onnxruntime", threads=1, cache=False)


def test_out_with_a_batch_is_refused(engine):
    batch = np.arange(2 * 24 * 32).reshape(2, 24, 32).astype(np.uint8)
    with pytest.raises(FuseEngineError, match="out"):
        engine(batch, batch, out=np.zeros((24, 32), np.uint8))


@pytest.mark.parametrize("bad", ["read-only", "list"])
def test_bad_out(engine, bad):
    frame = np.zeros((24, 32), np.uint8)
    out = frame.copy()
    out.flags.writeable = False
    with pytest.raises(FuseEngineError, match="out"):
        engine(frame, frame, out=out if bad == "read-only" else [1])


def test_out_of_a_frame_with_a_channel_axis(engine):
    frame = np.zeros((24, 32, 1), np.uint8)
    out = np.zeros_like(frame)
    assert engine(frame, frame, out=out) is out


def test_profile_of_no_runs(engine):
    with pytest.raises(SettingError):
        engine.profile(runs=0)


@pytest.mark.parametrize("index", ["5", "[]", '["a"]', "null", '"a"'])
def test_index_that_is_no_mapping(tmp_path, monkeypatch, index):
    monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path))
    cache_store.store("key", {"a": b"content"})
    (tmp_path / "key" / "index.json").write_text(index)
    assert cache_store.load("key") is None


@pytest.mark.parametrize("lost", ["a", "index.json"])
def test_incomplete_entry_heals(tmp_path, monkeypatch, lost):
    monkeypatch.setenv("FUSEENGINE_CACHE", str(tmp_path))
    cache_store.store("key", {"a": b"content"})
    (tmp_path / "key" / lost).unlink()
    assert cache_store.load("key") is None
    cache_store.store("key", {"a": b"new"})
    assert cache_store.load("key") == {"a": b"new"}


def test_same_name_other_settings(tmp_path):
    data = write_pairs(tmp_path / "data")
    settings = TrainSettings(steps=1, patch=16, batch=1)
    train(tiny(steps=1), data, tmp_path / "out", settings, progress=False)
    with pytest.raises(TrainingError):
        train(tiny(steps=2), data, tmp_path / "out", settings, progress=False)


@pytest.mark.parametrize("numbers", [{"patch": 16, "batch": 0}, {"patch": 15, "batch": 1}])
def test_settings_that_cannot_work(tmp_path, numbers):
    data = write_pairs(tmp_path / "data")
    with pytest.raises(TrainingError, match="expected"):
        train(tiny(steps=1), data, tmp_path / "out", TrainSettings(1, **numbers), progress=False)


def test_degradations_follow_the_device():
    from fuseengine.training.degradations import add_noise, add_stripes

    for function in (add_noise, add_stripes):
        x = torch.zeros(1, 1, 8, 8, device="meta")
        assert function(x, torch.Generator().manual_seed(0)).device.type == "meta"


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "stride": 2},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "groups": 2},
        {"padding": 1, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_space_to_depth_before_another_convolution(options):
    import onnxruntime as ort

    from fuseengine.export.onnx import UnsupportedLayerError, stage_to_onnx

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, **options)

        def forward(self, x):
            return self.conv(F.pixel_unshuffle(x, 2))

    module, x = Blocks().eval(), torch.randn(1, 1, 12, 16)
    try:
        model = stage_to_onnx(
            module, [("x", (1, 1, "H", "W"))], [("y", (1, 4, "h", "w"))], fallback=False
        )
    except UnsupportedLayerError:
        return
    (made,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(made, module(x).detach().numpy(), atol=1e-5)


def test_equal_beginnings_are_not_equal_constants():
    from fuseengine.export.onnx import OnnxWriter

    writer = OnnxWriter()
    one, two = np.arange(6, dtype=np.int64), np.arange(6, dtype=np.int64)
    two[-1] = 9
    assert writer.constant(one) != writer.constant(two)


@pytest.mark.parametrize("change", [{"values": []}, {"inputs": ["a"]}, {"inputs": ["a", "lost"]}])
def test_bad_program_text(change):
    import json

    from fuseengine.program import Program
    from tests.test_program import make

    data = {**json.loads(make().to_json()), **change}
    with pytest.raises(CaptureError):
        Program.from_json(json.dumps(data), make().constants)


def test_ddim_step_refuses_shapes_that_only_broadcast():
    from fuseengine.kernels import ddim_step

    with pytest.raises(SettingError):
        ddim_step(torch.zeros(1, 3, 4, 5), torch.zeros(1, 1, 4, 5), 0.6, 0.8, 0.8, 0.6)
