"""Compiling ahead of time with no GPU, the tuning table, and the switch that forbids compiling."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from fuseengine.errors import BackendUnavailableError, SettingError, UnknownNameError
from fuseengine.kernels import _triton, _tuning, aot
from fuseengine.kernels.ddim_step import plan as plan_ddim
from tests.helpers import ROOT

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Triton's own cache stays out of the home folder, and old results out of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture(scope="module")
def attention():
    """Both passes for Orin in float16."""
    return {k.label: k for k in aot.compile("criss_cross_attention", torch.float16, 87)}


@pytest.fixture(scope="module")
def steps():
    return {
        (k.op, k.label): k
        for op in ("ddim_step", "joint_ddim_step", "compose_priors")
        for k in aot.compile(op, torch.float32, 87)
    }


@needs_triton
class TestCode:
    def test_attention_for_orin(self, attention):
        assert list(attention) == ["turn q, k", "turn v", "columns", "turn back", "rows"]
        for label in ("columns", "rows"):
            found = attention[label].resources()
            assert found.tensor_core > 0, label
            assert found.spill_bytes == 0, label
            assert found.loads_128 > 0, label
            assert 0 < found.occupancy <= 1
        assert attention["turn v"].resources().loads_128 == attention["turn v"].resources().loads

    def test_attention_for_hopper(self):
        for kernel in aot.compile("criss_cross_attention", torch.bfloat16, 90):
            found = kernel.resources()
            assert found.spill_bytes == 0
            assert bool(found.tensor_core) == (not kernel.label.startswith("turn"))

    @pytest.mark.parametrize("capability", [87, 90])
    def test_float32_attention_does_not_spill(self, capability):
        kernels = aot.compile("criss_cross_attention", torch.float32, capability)
        assert all(k.resources().spill_bytes == 0 for k in kernels)

    def test_steps(self, steps):
        for name, kernel in steps.items():
            found = kernel.resources()
            assert found.spill_bytes == 0, name
            assert found.loads_128 == found.loads > 0, name
            assert found.stores_128 == found.stores > 0, name

    def test_norm(self):
        kernels = aot.compile("group_norm_silu", torch.float16, 87)
        found = {k.label: k.resources() for k in kernels}
        assert all(r.spill_bytes == 0 for r in found.values())
        for layout in ("planes", "channels_last"):
            assert found[f"moments, {layout}"].loads_128 == found[f"moments, {layout}"].loads
            assert found[f"apply, {layout}"].stores_128 == found[f"apply, {layout}"].stores

    def test_nothing_assumed_about_sizes(self, steps):
        (kernel,) = aot.compile("compose_priors", torch.float32, 87, aligned=False)
        assert set(kernel.assumes) == {"x", "eps_a", "eps_b", "weight", "out"}
        assert kernel.resources().loads_128 < kernel.resources().loads
        assert steps["compose_priors", "plain"].assumes["pixels"] == 16


@needs_triton
class TestDescription:
    def test_parameters(self, steps):
        kernel = steps["ddim_step", "plain"]
        pointers = [("x", "*fp32"), ("eps", "*fp32"), ("out", "*fp32")]
        numbers = [("count", "i32"), *((n, "fp32") for n in ("scale_x", "scale_eps", "sigma"))]
        hidden = [("global_scratch", "*i8"), ("profile_scratch", "*i8")]
        assert list(kernel.parameters) == pointers + numbers + hidden
        assert kernel.constants["noise"] is None
        assert kernel.grid == (3 * 480 * 640 // kernel.constants["BLOCK"],)
        assert (kernel.threads, kernel.num_ctas, kernel.shared_bytes) == (128, 1, 0)
        assert kernel.enable_fp_fusion is True

    def test_code_agrees_with_it(self, steps, attention):
        """PTX names its target and as many parameters as the description."""
        for kernel in (steps["ddim_step", "noise"], attention["rows"]):
            assert ".target sm_80" in kernel.ptx and ".version 8.4" in kernel.ptx
            head = kernel.ptx.split(f".entry {kernel.entry}(", 1)[1].split("{", 1)[0]
            assert head.count(".param") == len(kernel.parameters)
            assert f".reqntid {kernel.ptx_threads}" in kernel.ptx
            assert kernel.cubin[:4] == b"\x7fELF"
            assert kernel.cubin_sha256 == hashlib.sha256(kernel.cubin).hexdigest()
            assert kernel.ptx_sha256 == hashlib.sha256(kernel.ptx.encode()).hexdigest()

    def test_command_writes_a_manifest(self, tmp_path):
        words = ["--capability", "87", "--op", "compose_priors", "--dtype", "float16"]
        done = subprocess.run(
            [sys.executable, "-m", "fuseengine.kernels.aot", *words, "--out", tmp_path],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ},
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert "registers" in lines[0] and "compose_priors (plain)" in lines[1]
        (entry,) = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
        assert entry["dtype"] == "float16" and entry["capability"] == 87
        code = (tmp_path / f"{entry['name']}.cubin").read_bytes()
        assert entry["cubin_sha256"] == hashlib.sha256(code).hexdigest()
        assert str(ROOT) not in (tmp_path / "kernels.json").read_text()

    def test_scratch_memory_is_refused(self, monkeypatch):
        plain = aot._build

        def with_scratch(*arguments):
            built = plain(*arguments)
            built.metadata = built.metadata._replace(global_scratch_size=64)
            return built

        monkeypatch.setattr(aot, "_build", with_scratch)
        with pytest.raises(BackendUnavailableError, match="64 bytes of global_scratch; expected 0"):
            aot.compile("compose_priors", torch.float32, 87)

    @pytest.mark.parametrize(
        ("op", "dtype", "capability", "kind", "message"),
        [
            ("ddim", torch.float32, 87, UnknownNameError, "Did you mean 'ddim_step'"),
            (
                "ddim_step",
                torch.float64,
                87,
                SettingError,
                "float64; expected one of torch.float32",
            ),
            ("ddim_step", torch.float32, 75, SettingError, "capability 75; expected two digits"),
        ],
    )
    def test_bad_input(self, op, dtype, capability, kind, message):
        with pytest.raises(kind, match=message):
            aot.compile(op, dtype, capability)


def test_command_says_what_is_wrong(capsys):
    assert aot.main(["--op", "wiener"]) == 2
    assert "unknown op 'wiener'" in capsys.readouterr().err


def test_occupancy_by_hand():
    # 128 threads at 40 registers: 65536 / (40 * 128) = 12.8 blocks of 4 warps of 48.
    assert aot.occupancy(87, 128, 40, 0) == pytest.approx(12 * 128 / 1536)
    # 164 KB over 14 + 1 KB: 10 blocks.
    assert aot.occupancy(87, 128, 32, 14 << 10) == pytest.approx(10 * 128 / 1536)
    # 2048 threads are 16 blocks of 128.
    assert aot.occupancy(90, 128, 16, 0) == 1.0


class TestNoJit:
    def launches(self):
        x = torch.zeros(8)
        return plan_ddim(x, x, None, torch.empty(8), (1.0, 0.0, 0.0), capability=87)

    @needs_triton
    def test_a_launch_that_would_compile_raises(self, monkeypatch):
        monkeypatch.setenv("FUSEENGINE_NO_JIT", "1")
        expected = "ddim_step_kernel .plain. would be compiled now, and FUSEENGINE_NO_JIT=1 forbids"
        with pytest.raises(BackendUnavailableError, match=expected):
            _triton.run(self.launches(), torch.device("cpu"))

    def test_without_triton_the_error_says_so(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        launch = self.launches()[0]
        monkeypatch.delitem(launch.kernel.__dict__, "jit", raising=False)
        with pytest.raises(BackendUnavailableError, match="needs Triton.*pip install"):
            _ = launch.kernel.jit


class TestTuning:
    def test_every_op_has_defaults_for_every_dtype(self):
        names = {str(t).removeprefix("torch.") for t in _triton.DTYPES}
        assert set(_tuning.table()) == set(aot.OPS)
        assert all(set(rows["defaults"]) == names for rows in _tuning.table().values())

    def test_nearest_entry(self, monkeypatch):
        data = json.loads(_tuning.PATH.read_text())
        for capability, work, block in ((87, 1 << 16, 111), (87, 1 << 20, 222), (90, 1 << 20, 333)):
            given = ("ddim_step", capability, "float16", work, {"block": block})
            data = _tuning.with_entry(data, *given)
        monkeypatch.setattr(_tuning, "table", lambda: data["ops"])
        choose = _tuning.choose.__wrapped__
        default = data["ops"]["ddim_step"]["defaults"]["float16"]
        assert choose("ddim_step", torch.float16, 87, 1 << 17) == {**default, "block": 111}
        assert choose("ddim_step", torch.float16, 87, 1 << 19) == {**default, "block": 222}
        assert choose("ddim_step", torch.float16, 90, 1 << 19) == {**default, "block": 333}
        # Another dtype, another chip, a size far away: the default.
        assert choose("ddim_step", torch.float32, 87, 1 << 20)["block"] not in (111, 222, 333)
        assert choose("ddim_step", torch.float16, 89, 1 << 20) == default
        assert choose("ddim_step", torch.float16, 87, 1 << 26) == default

    def test_an_entry_replaces_its_like(self):
        data = json.loads(_tuning.PATH.read_text())
        for block in (1, 2):
            data = _tuning.with_entry(data, "ddim_step", 87, "float16", 64, {"block": block})
        assert [e["settings"] for e in data["ops"]["ddim_step"]["measured"]] == [{"block": 2}]

    def test_bad_entries(self):
        data = json.loads(_tuning.PATH.read_text())
        with pytest.raises(SettingError, match="expected one of the table's ops"):
            _tuning.with_entry(data, "ddim", 87, "float16", 64, {})
        with pytest.raises(SettingError, match="blok.*expected"):
            _tuning.with_entry(data, "ddim_step", 87, "float16", 64, {"blok": 2})
