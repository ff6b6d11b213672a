"""Targets: the packaged files, names and modes, a file of one's own, and the machine at hand."""

from __future__ import annotations

import json
import time

import pytest

from fuseengine import targets
from fuseengine.errors import SettingError, UnknownNameError
from fuseengine.machine import Cpu, Gpu, Jetson, Machine
from fuseengine.targets import get_target, measure_cpu, target_names
from tests.helpers import BLOCK_TORCH, run_python

ALL = [name for name in target_names(modes=True) if name != "this"]


def machine(**fields):
    cpu = Cpu("a processor", "x86_64", 8, 2, ("avx2", "avx512", "avx512-vnni", "avx512-bf16"))
    return Machine(**{"system": "Linux 6", "cpu": cpu, "memory_bytes": 1 << 34, **fields})


def test_the_list():
    wanted = {"orin", "orin-nx", "orin-nano", "thor", "x86-cpu", "cuda-sm90", "this"}
    assert set(target_names()) == wanted
    assert {"orin:maxn", "orin:30w", "cuda-sm90:h200"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_every_mode_is_whole(name):
    target = get_target(name)
    assert target.name == (name if ":" in name else target.name)
    assert target.peaks["fp32"] > 1e11 and target.bandwidth > 1e10
    assert 0 < target.matrix_efficiency <= 1 and 0 < target.memory_efficiency <= 1
    assert target.memory_bytes > 1e9 and target.kernel_seconds > 0 and target.exponentials > 0
    assert target.sources and target.title in target.describe()
    assert (target.capability is None) == (target.kind == "cpu")
    if target.kind == "gpu":
        rates = [target.peaks[p] for p in ("fp32", "tf32", "fp16", "int8")]
        assert rates == sorted(rates) and target.peaks["bf16"] == target.peaks["fp16"]


# NVIDIA's data sheets: dense tera-operations per second and GB/s.
@pytest.mark.parametrize(
    ("name", "fp16", "int8", "bandwidth"),
    [
        ("orin:maxn", 42.6, 85, 204.8),
        ("orin-nx:maxn", 15.0, 30, 102.4),
        ("orin-nx:maxn-super", 19.2, 38, 102.4),
        ("orin-nano:maxn-super", 16.7, 33, 102.4),
        ("thor:maxn", 258, None, 273),
        ("cuda-sm90:h100", 989, 1979, 3350),
    ],
)
def test_data_sheets(name, fp16, int8, bandwidth):
    target = get_target(name)
    assert target.peak("fp16") / 1e12 == pytest.approx(fp16, rel=0.01)
    if int8 is not None:
        assert target.peak("int8") / 1e12 == pytest.approx(int8, rel=0.02)
    assert target.bandwidth / 1e9 == pytest.approx(bandwidth)


def test_orins_default_mode_has_a_quarter_of_the_rate():
    full, default = get_target("orin"), get_target("orin:30w")
    assert default.peak("fp16") / full.peak("fp16") == pytest.approx(0.235, abs=0.01)
    assert full.name == "orin:maxn" and "--target orin:30w" in full.hint
    assert default.hint == "" and "30W" in default.title
    assert (full.capability, full.sm) == ((8, 7), "87")


@pytest.mark.parametrize("given", ["ORIN:30W", "orin:MODE_30W", "Orin:mode_30w"])
def test_spellings(given):
    assert get_target(given).name == "orin:30w"
    assert get_target("orin-nx:MAXN_SUPER").name == "orin-nx:maxn-super"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("orinx", r"unknown target 'orinx'.*Did you mean 'orin"),
        ("", "unknown target ''; expected one of: cuda-sm90"),
        ("../orin", "unknown target"),
        ("orin:40w", r"unknown mode 'orin:40w'; expected one of: orin:15w.*Did you mean"),
    ],
)
def test_unknown_names(given, text):
    with pytest.raises(UnknownNameError, match=text):
        get_target(given)


def test_a_precision_it_does_not_compute_in():
    with pytest.raises(SettingError, match=r"precision 'fp16': x86-cpu:avx2 .* computes in fp32"):
        get_target("x86-cpu").peak("fp16")


class TestOwnFile:
    def test_a_good_one(self, tmp_path):
        data = json.loads((targets._FOLDER / "orin.json").read_text())
        data["title"], data["modes"]["maxn"]["ghz"] = "my board", 0.65
        path = tmp_path / "board.json"
        path.write_text(json.dumps(data))
        target = get_target(str(path))
        assert target.title.startswith("my board") and target.name == "board:maxn"
        assert target.peak("fp16") == pytest.approx(get_target("orin").peak("fp16") / 2)
        assert get_target(f"{path}:50w").name == "board:50w"

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            ("{", "field"),
            ("[]", "field"),
            ('{"modes": {"a": {}}}', "'default_mode'"),
            ('{"modes": {"a": {}}, "default_mode": "a", "title": "t"}', "'units'"),
        ],
    )
    def test_bad_ones(self, tmp_path, content, text):
        path = tmp_path / "board.json"
        path.write_text(content)
        with pytest.raises(SettingError, match=text):
            get_target(str(path))

    def test_none(self, tmp_path):
        with pytest.raises(SettingError, match="No such file"):
            get_target(str(tmp_path / "board.json"))


class TestThis:
    def test_a_jetson_is_its_board_in_its_mode(self):
        jetson = Jetson("NVIDIA Jetson AGX Orin", mode="MODE_30W", target="orin")
        assert targets._recognised(machine(jetson=jetson)) == "orin:30w"
        custom = Jetson("NVIDIA Jetson AGX Orin", mode="MODE_MINE", target="orin")
        assert targets._recognised(machine(jetson=custom)) == "orin"

    def test_a_hopper(self):
        assert targets._recognised(machine(gpus=(Gpu("NVIDIA H200", "9.0"),))) == "cuda-sm90:h200"
        assert targets._recognised(machine(gpus=(Gpu("NVIDIA H100", "9.0"),))) == "cuda-sm90:h100"

    def test_measured(self):
        begin = time.perf_counter()
        target = measure_cpu(machine(gpus=(Gpu("NVIDIA RTX 4090", "8.9"),)))
        assert time.perf_counter() - begin < 20  # a tenth of a second on a machine that is free
        assert target.kind == "cpu" and target.name == "this" and "2 of 8 cores" in target.title
        assert 1e8 < target.bandwidth < 5e12 and 1e9 < target.peak("fp32") < 1e14
        assert target.peak("bf16") == 2 * target.peak("fp32")
        assert target.peak("int8") == 4 * target.peak("fp32")
        assert "RTX 4090" in target.hint
        with pytest.raises(SettingError, match="computes in fp32"):
            target.peak("fp16")

    def test_without_avx512_there_is_float32_only(self):
        plain = machine(cpu=Cpu("old", "x86_64", 1, 1, ("avx2",)))
        assert list(measure_cpu(plain).peaks) == ["fp32"]


def test_needs_no_torch():
    script = "from fuseengine.targets import get_target; print(get_target('thor').sm)"
    assert run_python(BLOCK_TORCH + script).strip() == "110"
