"""Reading GPUs from the driver, with a driver of our own that has two."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest

from fuseengine.runtime import gpu

DRIVER = """
#include <stddef.h>
#include <string.h>
static int started = 0;
int cuInit(unsigned flags) { started = FAILS ? 0 : 1; return FAILS ? 100 : 0; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return started ? 0 : 3; }
int cuDeviceGet(int *device, int index) { *device = 7 + index; return index < 2 ? 0 : 101; }
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device == 7 ? "Orin" : "NVIDIA H100 80GB HBM3", length);
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = device == 7 ? 64023257088ULL : 85028241408ULL;
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute != 75 && attribute != 76) return 1;
    *value = attribute == 75 ? (device == 7 ? 8 : 12) : (device == 7 ? 7 : 0);
    return 0;
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A library with the driver's functions; FAILS makes it one whose start fails."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler: cc, gcc or clang")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)

    def build(fails):
        library = folder / f"libdriver{fails}.so"
        words = [compiler, "-shared", "-fPIC", f"-DFAILS={fails}", "-o", str(library)]
        subprocess.run([*words, str(folder / "driver.c")], check=True, timeout=60)
        return ctypes.CDLL(str(library))

    return build


def test_what_the_driver_says(driver):
    assert gpu.read(driver(0)) == (
        gpu.Gpu(0, "Orin", 87, 64023257088, 12060),
        gpu.Gpu(1, "NVIDIA H100 80GB HBM3", 120, 85028241408, 12060),
    )


def test_a_driver_that_does_not_start(driver):
    assert gpu.read(driver(1)) == ()


def test_no_driver(monkeypatch):
    monkeypatch.setattr(gpu, "_LIBRARY", "libno-such-driver.so")
    gpu.gpus.cache_clear()
    assert gpu.gpus() == ()
    gpu.gpus.cache_clear()
