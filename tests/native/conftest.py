"""Instruction sets and thread counts for the native kernels; both are put back afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuseengine import _native
from tests.helpers import run_python

LEVELS = ("baseline", "avx2", "avx512")
THREADS = (1, 2, 3, 7)


@pytest.fixture(autouse=True)
def _restore():
    level, threads = _native.simd_level(), _native.num_threads()
    yield
    _native.set_simd_level(level)
    _native.set_num_threads(threads)


@pytest.fixture(params=LEVELS)
def level(request):
    """The test runs once per instruction set that this processor has."""
    try:
        _native.set_simd_level(request.param)
    except ValueError:
        pytest.skip(f"needs a processor with {request.param}")
    return request.param


@pytest.fixture
def same_bits():
    """Calls ``run(out)`` with several thread counts; all outputs must be the same bits."""

    def check(run, like):
        first = None
        for threads in THREADS:
            _native.set_num_threads(threads)
            out = like.copy()
            run(out)
            first = first if first is not None else out
            assert out.tobytes() == first.tobytes(), f"{threads} threads"

    return check


@pytest.fixture
def extra_memory():
    """``measure(setup, call)``: bytes by which a call raises the peak of a fresh process, one
    thread. The setup makes the arrays and calls once at a small size; pages of outputs are to be
    touched there."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc/self/status")

    def measure(setup, call):
        return int(
            run_python(
                "import re, pathlib, numpy as np\nfrom fuseengine import _native\n"
                "def peak():\n"
                "    text = pathlib.Path('/proc/self/status').read_text()\n"
                "    return int(re.search(r'VmHWM:\\s+(\\d+)', text)[1]) * 1024\n"
                f"_native.set_num_threads(1)\n{setup}\nbefore = peak()\n{call}\n"
                "print(peak() - before)"
            )
        )

    return measure
