"""csrc/selftest.cpp, every kernel without Python: on this machine, and on 64-bit ARM under qemu."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.helpers import ROOT


def build(folder, *options):
    """Configure and build the self-test; its path."""
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: pip install {tool}")
    settings = ["FUSEENGINE_SELFTEST=ON", "FUSEENGINE_WERROR=ON", *options]
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja"]
    for setting in settings:
        configure += ["-D", setting]
    for command in (configure, ["cmake", "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "fuse_selftest"


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("0 failures"), done.stdout


@pytest.mark.slow
def test_here(tmp_path):
    run(build(tmp_path))


@pytest.mark.slow
def test_aarch64(tmp_path):
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if shutil.which("aarch64-linux-gnu-g++") is None or qemu is None:
        pytest.skip(
            "no cross compiler or no emulator: apt-get install g++-aarch64-linux-gnu "
            "qemu-user-static"
        )
    toolchain = ROOT / "csrc" / "aarch64.cmake"
    run(qemu, build(tmp_path, f"CMAKE_TOOLCHAIN_FILE={toolchain}"))
