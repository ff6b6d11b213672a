"""What is read of a machine: Jetsons from faked trees, GPUs from a faked nvidia-smi."""

from __future__ import annotations

import json

import pytest

from fuseengine.machine import inspect_machine, run_command, usable_cores, version_tuple
from tests.helpers import BLOCK_TORCH, run_python

RELEASE = "# R{major} (release), REVISION: {minor}, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
MODES = """\
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
< POWER_MODEL ID=0 NAME=MAXN >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=MODE_15W >
< POWER_MODEL ID=2 NAME=MODE_30W >
< POWER_MODEL ID=3 NAME=MODE_50W >
< PM_CONFIG DEFAULT=2 >
"""
CPUINFO = """\
processor\t: 0
model name\t: ARMv8 Processor rev 1 (v8l)
Features\t: fp asimd evtstrm aes

processor\t: 1
model name\t: ARMv8 Processor rev 1 (v8l)
Features\t: fp asimd evtstrm aes
"""


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def jetson_tree(root, *, l4t="36.4.3", mode="pmode:0002", board="Jetson AGX Orin Developer Kit"):
    """The files of a Jetson below a folder."""
    major, _, minor = l4t.partition(".")
    return write(
        root,
        {
            "etc/nv_tegra_release": RELEASE.format(major=major, minor=minor),
            "proc/device-tree/model": f"NVIDIA {board}\0".encode(),
            "etc/nvpmodel.conf": MODES,
            "var/lib/nvpmodel/status": mode,
            "proc/cpuinfo": CPUINFO,
            "proc/meminfo": "MemTotal:       64349184 kB\nMemFree: 1 kB\n",
            "usr/local/cuda/version.json": json.dumps({"cuda": {"version": "12.6.11"}}),
            "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0": "",
            "usr/lib/aarch64-linux-gnu/libnvinfer.so.10": "",
        },
    )


def nothing(command):
    return ""


class TestJetson:
    def test_agx_orin(self, tmp_path):
        found = inspect_machine(jetson_tree(tmp_path), nothing)
        jetson = found.jetson
        assert jetson.board == "NVIDIA Jetson AGX Orin Developer Kit"
        assert (jetson.l4t, jetson.jetpack, jetson.jetpack_major) == ("36.4.3", "6.2", 6)
        assert jetson.mode == "MODE_30W" and jetson.strongest_mode == (0, "MAXN")
        assert jetson.target == "orin"
        assert [gpu.name for gpu in found.gpus] == ["Orin"]  # there is no nvidia-smi
        assert (found.cuda, found.tensorrt_library) == ("12.6.11", "10.3.0")
        assert found.memory_bytes == 64349184 * 1024
        assert found.cpu.cores == 2 and found.cpu.simd == ("neon",)

    @pytest.mark.parametrize(
        ("l4t", "jetpack"),
        [
            ("36.4.0", "6.1"),
            ("36.4.7", "6.2"),
            ("36.3.0", "6.0"),
            ("35.6.0", "5"),
            ("38.2.1", "7.0"),
            ("39.2", "7.2"),
            ("39.2.2", "7.2.2"),
            ("99.1", ""),
        ],
    )
    def test_jetpack(self, tmp_path, l4t, jetpack):
        assert inspect_machine(jetson_tree(tmp_path, l4t=l4t), nothing).jetson.jetpack == jetpack

    @pytest.mark.parametrize(
        ("board", "target"),
        [
            ("Jetson Orin NX Engineering Reference Developer Kit", "orin-nx"),
            ("Jetson Orin Nano Developer Kit Super", "orin-nano"),
            ("Jetson AGX Thor Developer Kit", "thor"),
            ("Jetson Xavier NX Developer Kit", ""),
        ],
    )
    def test_boards(self, tmp_path, board, target):
        assert inspect_machine(jetson_tree(tmp_path, board=board), nothing).jetson.target == target

    @pytest.mark.parametrize(
        ("status", "mode"),
        [("pmode:0000", "MAXN"), ("pmode:0009 fmode:quiet", "number 9"), ("", ""), ("junk", "")],
    )
    def test_modes(self, tmp_path, status, mode):
        assert inspect_machine(jetson_tree(tmp_path, mode=status), nothing).jetson.mode == mode

    def test_super_is_the_strongest(self, tmp_path):
        root = jetson_tree(tmp_path)
        text = "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=MAXN >\n"
        write(root, {"etc/nvpmodel.conf": text + "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"})
        assert inspect_machine(root, nothing).jetson.strongest_mode == (2, "MAXN_SUPER")

    def test_damaged_files(self, tmp_path):
        root = jetson_tree(tmp_path)
        broken = {"etc/nv_tegra_release": b"\xff\xfe", "etc/nvpmodel.conf": b"\0<<"}
        write(root, {**broken, "usr/local/cuda/version.json": "[]", "proc/cpuinfo": b"\xff"})
        found = inspect_machine(root, nothing)
        assert (found.jetson.l4t, found.jetson.jetpack_major, found.cuda) == ("", 0, "")
        assert found.jetson.strongest_mode is None and found.cpu.name


class TestGpus:
    def test_two(self, tmp_path):
        text = "NVIDIA H200, 9.0, 580.65.06, 143771\nNVIDIA L4, 8.9, 580.65.06, 23034\n"
        first, second = inspect_machine(tmp_path, lambda command: text).gpus
        assert (first.name, first.capability, first.driver) == ("NVIDIA H200", "9.0", "580.65.06")
        assert first.memory_bytes == 143771 << 20 and second.capability == "8.9"

    def test_shared_memory(self, tmp_path):
        (gpu,) = inspect_machine(tmp_path, lambda c: "NVIDIA Thor, 11.0, 580.00, [N/A]\n").gpus
        assert gpu.memory_bytes == 0 and gpu.capability == "11.0"

    @pytest.mark.parametrize("text", ["", "No devices were found\n", "garbage"])
    def test_none(self, tmp_path, text):
        assert inspect_machine(tmp_path, lambda command: text).gpus == ()


def test_an_empty_root_is_no_error(tmp_path):
    found = inspect_machine(tmp_path, nothing)
    assert found.jetson is None and found.gpus == () and found.memory_bytes == 0
    assert found.cpu.cores >= 1 and found.cpu.usable >= 1


def test_this_machine():
    found = inspect_machine()
    assert found.memory_bytes > 1e8 and 1 <= found.cpu.usable <= found.cpu.cores


@pytest.mark.parametrize(
    ("quota", "cores"), [("50000 100000", 1), ("max 100000", None), ("x", None)]
)
def test_quota(tmp_path, quota, cores):
    write(tmp_path, {"sys/fs/cgroup/cpu.max": quota})
    free = usable_cores(tmp_path / "nowhere")
    assert usable_cores(tmp_path) == (cores or free)


def test_memory_limit(tmp_path):
    write(tmp_path, {"proc/meminfo": "MemTotal: 1000 kB", "sys/fs/cgroup/memory.max": "500000"})
    assert inspect_machine(tmp_path, nothing).memory_bytes == 500_000


def test_commands():
    assert run_command(["echo", "hello"]) == "hello\n"
    assert run_command(["false"]) == "" and run_command(["no-such-command-at-all"]) == ""


def test_versions():
    assert version_tuple("10.3.0.post1") == (10, 3, 0) and version_tuple("2.8.0+cu126") == (2, 8, 0)
    assert version_tuple("unknown") == ()


def test_needs_no_torch():
    script = "from fuseengine.machine import inspect_machine; print(inspect_machine().cpu.cores)"
    assert int(run_python(BLOCK_TORCH + script)) >= 1
