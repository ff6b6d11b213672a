"""A process in which Triton interprets kernels with NumPy.

``TRITON_INTERPRET`` counts when Triton is imported, and then for the whole process: compiling ahead
of time would no longer work in it. So interpreted kernels run in one process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.kernels.interpreter import pack, unpack


class Interpreter:
    """Calls functions "module:name" in the other process."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.interpreter"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, function, *arguments, **options):
        pickle.dump(pack((function, arguments, options)), self.process.stdin)
        self.process.stdin.flush()
        worked, result = unpack(pickle.load(self.process.stdout))
        assert worked, result
        return result

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def interpreted():
    """``interpreted("module:function", *arguments, **options)`` with Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install triton")
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()
