"""The end-to-end benchmark: right before fast, failures as rows, a valid result file."""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import pytest

from benchmarks import end_to_end, peers
from benchmarks.harness import Samples, validate_result
from benchmarks.peers import Case, Contender, Ready

torch = pytest.importorskip("torch")

import fuseengine as fe  # noqa: E402
from fuseengine import kernels  # noqa: E402
from fuseengine.models.sampling import standard_normal  # noqa: E402
from tests.helpers import pictures_for, system  # noqa: E402

SIZE = (32, 48)
REFERENCE = np.linspace(0, 1, SIZE[0] * SIZE[1], dtype=np.float32).reshape(1, 1, *SIZE)
FRAME = (REFERENCE[0, 0] * 255).round().astype(np.uint8)


def contender(result, precision="fp32", *, frames=False, key="some", prepare=None):
    ready = Ready(lambda: None, lambda: result)
    return Contender(key, key, precision, prepare or (lambda: ready), frames)


def noisy(decibels, base=REFERENCE, peak=1.0):
    signs = np.where(np.arange(base.size).reshape(base.shape) % 2, 1, -1)
    return base + signs * peak * 10 ** (-decibels / 20)


@pytest.mark.parametrize(
    ("precision", "frames", "decibels", "right"),
    [
        ("fp32", False, 85, True),
        ("fp32", False, 75, False),
        ("bf16", False, 45, True),
        ("auto", False, 45, True),
        ("bf16", False, 35, False),
        ("fp32", True, 60, True),
        ("fp32", True, 50, False),
        ("auto", True, 35, False),
    ],
)
def test_a_wrong_contender_is_said_and_not_timed(precision, frames, decibels, right):
    base, peak = (FRAME.astype(float), 255.0) if frames else (REFERENCE.astype(float), 1.0)
    row = end_to_end.check(
        contender(noisy(decibels, base, peak), precision, frames=frames), REFERENCE, FRAME
    )
    assert row.fields["psnr_db"] == pytest.approx(decibels, abs=0.1)
    assert (row.ready is not None) == right
    assert bool(row.error) != right
    assert right or f"wrong: {decibels:.1f} dB" in row.error
    assert set(end_to_end.measure([row], rounds=2, budget_s=None, device="cpu")) == (
        {"some"} if right else set()
    )


def test_nan_is_wrong():
    row = end_to_end.check(contender(REFERENCE * np.nan), REFERENCE, FRAME)
    assert row.ready is None and "wrong" in row.error


def test_max_error_of_frames_is_on_the_scale_of_one():
    off = FRAME.copy()
    off[0, 0] += 51
    row = end_to_end.check(contender(off, "auto", frames=True), REFERENCE, FRAME)
    assert row.fields["max_abs_error"] == pytest.approx(0.2)


def test_a_failing_contender_is_a_row_with_its_reason():
    def prepare():
        raise OSError("no such file: /home/somebody/models/x.onnx is missing\nmore")

    row = end_to_end.check(contender(None, prepare=prepare), REFERENCE, FRAME)
    assert row.error == "OSError: no such file: x.onnx is missing"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/a/b/c.so: bad", "c.so: bad"),
        (r"C:\Users\me\x.dll", "x.dll"),
        ("ratio 1/2 of a/b", "ratio 1/2 of a/b"),
        ("", ""),
    ],
)
def test_reason_drops_folders(text, shown):
    assert peers.reason(ValueError(text)) == f"ValueError: {shown}".rstrip(": ")


def test_preparing_has_a_deadline():
    begin = time.monotonic()
    row = end_to_end.check(
        contender(None, prepare=lambda: time.sleep(30)), REFERENCE, FRAME, limit_s=0.2
    )
    assert "TimeoutError" in row.error
    assert time.monotonic() - begin < 10


def test_slow_compilers_cannot_take_the_time_of_the_others():
    order = []

    def slow():
        order.append("compile")
        time.sleep(30)

    def quick():
        order.append("fuseengine")
        return Ready(lambda: None, lambda: REFERENCE)

    contenders = [
        contender(None, key="compile", prepare=slow),
        contender(None, key="compile-fp16", prepare=slow),
        contender(None, key="fuseengine-fp32", prepare=quick),
    ]
    rows = end_to_end.prepare(contenders, REFERENCE, FRAME, 0.5)
    assert order == ["fuseengine", "compile"]
    assert [row.contender.key for row in rows] == [c.key for c in contenders]
    assert "not ready after" in rows[0].error and "are spent" in rows[1].error
    assert rows[2].ready is not None


def test_missing_package_is_named():
    with pytest.raises(peers.MissingPackageError, match="no_such_runtime is not installed"):
        peers.need("no_such_runtime")


def rows_and_samples(**milliseconds):
    rows, samples = [], {}
    for key, value in milliseconds.items():
        name = key.replace("_", "-")
        precision = "bf16" if name.endswith("bf16") else "fp32"
        rows.append(end_to_end.Checked(contender(None, precision, key=name)))
        samples[name] = Samples(name, np.full(30, int(value * 1e6), np.int64))
    return rows, samples


def test_best_peer_is_the_fastest_of_its_precision_and_never_ourselves():
    rows, samples = rows_and_samples(eager=9, openvino=5, openvino_bf16=3, fuseengine_fp32=1)
    assert end_to_end.best_peer(rows, samples).key == "openvino"
    assert end_to_end.best_peer(rows, samples, None).key == "openvino-bf16"
    assert end_to_end.best_peer(rows[-1:], samples) is None


def test_a_loss_is_called_slower():
    rows, samples = rows_and_samples(
        eager=9, openvino=5, openvino_bf16=3, fuseengine_fp32=6, fuseengine_bf16=4
    )
    exact, reduced, any_precision = end_to_end.reading(rows, samples)
    assert "openvino: slower, 1.200" in exact
    assert "openvino: faster, 0.800" in reduced
    assert "openvino-bf16: slower, 1.333" in any_precision


@pytest.mark.parametrize("text", ["480", "480x", "0x640", "480x640x3", "ax b", "1x64"])
def test_bad_sizes_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected HEIGHTxWIDTH"):
        end_to_end.parse_size(text)


def test_unknown_peers_are_refused(capsys):
    with pytest.raises(SystemExit):
        end_to_end.main(["drfusion-s", "--peers", "eager,graph"])
    assert "graph on cpu" in capsys.readouterr().err


def test_model_without_weights_asks_for_untrained(capsys):
    with pytest.raises(SystemExit) as stopped:
        end_to_end.main(["drfusion", "--peers", "none", "--no-memory"])
    assert stopped.value.code == 2
    assert "untrained" in capsys.readouterr().err


def test_a_missing_gpu_is_said(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(SystemExit) as stopped:
        end_to_end.main(["drfusion-s", "--untrained", "--device", "cuda"])
    assert stopped.value.code == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return fe.build("drfusion-s", steps=2)


@pytest.fixture(scope="module")
def inputs():
    return np.random.default_rng(0).random((2, 1, 1, *SIZE), dtype=np.float32)


@pytest.fixture(scope="module")
def expected(model, inputs):
    with torch.inference_mode():
        return model(*map(torch.from_numpy, inputs)).numpy()


def test_the_plain_form_is_the_model_in_standard_operators(model, inputs, expected):
    plain = peers.plain(model, *inputs)
    with torch.inference_mode():
        found = plain(*map(torch.from_numpy, inputs)).numpy()
    # The references' order of operations, not the ops'.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    targets = {node.target for node in plain.graph.nodes}
    assert not targets & {kernels.ddim_step, kernels.joint_ddim_step}
    assert kernels.joint_ddim_step_reference in targets
    assert plain.unet is not model.unet


@pytest.mark.parametrize("name", ["dmfuse", "drmf", "drmf-s", "dmnet-s", "mask-difuser-s"])
def test_the_plain_form_of_every_system(name):
    """Random numbers are made beforehand; what is left are standard operators."""
    model = system(name)
    pair = pictures_for(model, (2 * model.multiple, 2 * model.multiple))
    plain = peers.plain(model, *(x.numpy() for x in pair))
    with torch.inference_mode():
        # The samplers divide rounding by sqrt(abar), 0.04 at their first step.
        torch.testing.assert_close(plain(*pair), model(*pair), rtol=0, atol=5e-5)
    ours = {kernels.ddim_step, kernels.compose_priors, kernels.criss_cross_attention}
    assert not {standard_normal, *ours} & {node.target for node in plain.graph.nodes}
    assert [n.name for n in plain.graph.nodes if n.op == "placeholder"] == ["a", "b"]


def test_torch_peers_compute_the_model(model, inputs, expected):
    case = Case("drfusion-s", SIZE, threads=torch.get_num_threads())
    for key, least in (("eager", 1e-7), ("eager-nhwc", 1e-5), ("eager-bf16", 0.1)):
        ready = peers.torch_peer(model, *inputs, case, **peers.TORCH_PEERS[key][2])
        ready.run()
        error = abs(ready.result() - expected).max()
        assert error <= least
        assert (error > 1e-5) == (key == "eager-bf16"), "bf16 rounds, fp32 does not"


@pytest.mark.slow
def test_runtime_peers_compute_the_model(model, inputs, expected, tmp_path):
    path = peers.export_onnx(model, *inputs, tmp_path / "model.onnx")
    stamp = path.stat().st_mtime_ns
    assert peers.export_onnx(model, *inputs, path).stat().st_mtime_ns == stamp
    for make in (peers.onnxruntime_peer, peers.openvino_peer):
        ready = make(path, *inputs, 1)
        ready.run()
        np.testing.assert_allclose(ready.result(), expected, rtol=0, atol=1e-5)


def test_a_whole_run(tmp_path, capsys):
    words = ["drfusion-s", "--untrained", "--size", "30x46", "--rounds", "2", "--threads", "1"]
    words += ["--peers", "eager", "--precision-rows", "fp32", "--no-memory"]
    assert end_to_end.main([*words, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("*.json")
    result = json.loads(path.read_text())
    validate_result(result)
    assert result["settings"]["size"] == "30x46"
    assert result["command"].endswith(" ".join(words))
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["torch eager fp32", "FuseEngine fp32", "FuseEngine fp32, frames"]
    assert all(row["n"] == 2 and row["p50_ms"] > 0 for row in rows.values())
    assert rows["torch eager fp32"]["ratio"] == "1"
    assert rows["FuseEngine fp32"]["psnr_db"] >= 80
    assert "[" in rows["FuseEngine fp32"]["ratio"]
    assert any("random" in note for note in result["notes"])
    assert "FuseEngine fp32, frames" in capsys.readouterr().out
