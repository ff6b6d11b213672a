"""``fuseengine.verify``: it finds no error where there is none, and every one that is put in."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import fuseengine as fe
from fuseengine.errors import SizeMismatchError
from fuseengine.runtime import ops
from fuseengine.verify import Part, Verification, verify
from tests.helpers import psnr
from tests.saved import SIZE, frames, little_engine

EXAMPLES = [(f"pair {seed}", *frames(seed=seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "little.fuse"
    little_engine().save(path)
    return path


@pytest.fixture
def engine(saved):
    return fe.load(saved, threads=1)


def part(result, name):
    return next(part for part in result.parts if part.name == name)


def test_a_sound_engine(engine):
    before = engine(*frames())
    result = verify(engine, EXAMPLES)
    assert result.failures == []
    calls = {p.name: p.calls for p in result.parts}
    assert calls["stage net-0-1"] == 4 and calls["stage net-0"] == 2  # two pictures
    assert {n.target for n in engine.program.nodes if n.kind == "op"} <= set(calls)
    assert part(result, "stage net-0-1").snr_db == 200.0
    assert 100 < part(result, "ddim_step").snr_db < 200
    assert [name for name, *_ in result.pictures] == ["pair 0", "pair 1"]
    assert all(db > 100 for _, db, _ in result.pictures) and result.least_db == 80
    np.testing.assert_array_equal(engine(*frames()), before)


def test_an_op_that_is_wrong_is_named_and_nothing_else(saved, monkeypatch):
    whole = ops.OPS["ddim_step"]

    def wrong(inputs, output, attrs):
        call = whole.bind(inputs, output, attrs)

        def run():
            call()
            output[..., 3, 5] += 0.01

        return run

    monkeypatch.setitem(ops.OPS, "ddim_step", ops.Op(wrong, whole.in_place))
    result = verify(fe.load(saved, threads=1), EXAMPLES)
    assert [p.name for p in result.parts if p.wrong] == ["ddim_step"]
    assert part(result, "ddim_step").max_error == pytest.approx(0.01, rel=1e-2)
    # Errors do not add up in the parts; in the picture they arrive.
    assert len(result.failures) == 3 and result.failures[0].startswith("ddim_step (native)")
    assert "WRONG" in str(result)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_wrong(saved, monkeypatch, value):
    whole = ops.OPS["clamp"]

    def wrong(inputs, output, attrs):
        call = whole.bind(inputs, output, attrs)

        def run():
            call()
            output[..., 0, 0] = value

        return run

    monkeypatch.setitem(ops.OPS, "clamp", ops.Op(wrong, whole.in_place))
    engine = fe.load(saved, threads=1)
    with np.errstate(all="ignore"):
        result = verify(engine, EXAMPLES)
    assert [p.name for p in result.parts if p.wrong] == ["clamp"]
    assert math.isnan(result.worst[1]) and len(result.failures) == 3
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text)["parts"]


def test_a_stage_in_less_precision_has_no_limit_of_its_own(saved):
    from fuseengine.backends import BACKENDS

    backend = BACKENDS["openvino"]
    if backend.unavailable("cpu") or "bf16" not in backend.precisions("cpu"):
        pytest.skip("needs OpenVINO on a processor that computes in bfloat16")
    engine = fe.load(saved, backend="openvino", precision="bf16", threads=1)
    result = verify(engine, EXAMPLES)
    stage = part(result, "stage net-0-1")
    assert stage.how == "openvino/bf16" and 20 < stage.snr_db < 70
    assert not stage.wrong and result.least_db == 45


def test_the_whole_frame_and_no_padding_counts(saved):
    """22x30 is padded to 24x32; what stands in the padding is nobody's picture."""
    engine = fe.load(saved, threads=1)
    (_, worst, _) = verify(engine, EXAMPLES[:1]).worst
    a, b = frames()
    fused = engine(a, b) / 255
    assert fused.shape[:2] == SIZE and worst > 100
    assert psnr(fused, fused) == float("inf")


def test_framed_ops(tmp_path):
    """An op that looks at the whole picture must not see padding, in the reference either."""
    from tests.helpers import system

    fe.compile(
        system("drmf"), (33, 40), backend="onnxruntime", precision="fp32", threads=1, cache=False
    ).save(tmp_path / "x.fuse")
    engine = fe.load(tmp_path / "x.fuse", threads=1)
    result = verify(engine, [("pair", *frames((33, 40)))])
    assert result.failures == [] and part(result, "stretch").snr_db > 100


def test_frames_of_another_size(engine):
    with pytest.raises(SizeMismatchError):
        verify(engine, [("x", *frames((24, 30)))])


class TestPart:
    def test_the_worst_call_counts(self):
        part = Part("x", "native", least_db=80)
        one = np.ones((2, 2), np.float32)
        part.add(one, one)
        assert part.snr_db == 200.0 and not part.wrong
        part.add(one * 1.1, one)
        part.add(one * 1.01, one)
        assert part.snr_db == pytest.approx(20, abs=0.01) and part.wrong
        assert part.max_error == pytest.approx(0.1, rel=1e-4) and part.peak == 1

    def test_nan_stays(self):
        part = Part("x", "native")
        one = np.ones(1, np.float32)
        part.add(one * np.nan, one)
        part.add(one, one)
        assert math.isnan(part.snr_db) and part.wrong

    def test_zeros(self):
        part = Part("x", "native")
        part.add(np.ones(1, np.float32), np.zeros(1))
        assert part.snr_db == -math.inf
        assert Verification([part], 80, [("a", 200.0, 0.0)]).failures == []
