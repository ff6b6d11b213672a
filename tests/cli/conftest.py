"""Small pairs of images, an engine that needs no compiling, and one cache for the real ones."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import fuseengine
from fuseengine.runtime.frames import prepare_pair

SIZE = (48, 64)

# Runs a command as a user would and says which heavy libraries it pulled in.
_PROBE = """
import sys
from fuseengine.cli import main
code = main(sys.argv[1:])
print("imported:", *sorted({"torch", "tqdm", "onnx", "openvino"} & set(sys.modules)))
sys.exit(code)
"""


def make_pair(seed=0, size=SIZE):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, size, np.uint8), rng.integers(0, 256, (*size, 3), np.uint8)


def save(path, array):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def pair(tmp_path):
    """Paths of an infrared and a visible file, and of an output."""
    ir, vis = make_pair()
    return (
        save(tmp_path / "ir.png", ir),
        save(tmp_path / "vis.png", vis),
        tmp_path / "fused.png",
    )


@pytest.fixture
def folders(tmp_path):
    """Two folders: three good pairs, of two sizes, and a place for the output."""
    for name, seed, size in (("a", 0, SIZE), ("b", 1, (32, 40)), ("c", 2, SIZE)):
        ir, vis = make_pair(seed, size)
        save(tmp_path / "ir" / f"{name}.png", ir)
        save(tmp_path / "vis" / f"{name}.bmp", vis)
    return tmp_path / "ir", tmp_path / "vis", tmp_path / "out"


class FakeEngine:
    """Averages the pair; checks frames and answers in kind as an engine does."""

    def __init__(self, calls):
        self.calls = calls
        self.fail = {}
        self.report = SimpleNamespace(summary=lambda: "fake engine, 99 dB")

    def __call__(self, infrared, visible, **options):
        pair = prepare_pair(infrared, visible, **options)
        self.calls.append((pair.size, options))
        if len(self.calls) in self.fail:
            raise self.fail[len(self.calls)]
        return visible // 2 + 1


@pytest.fixture
def fake(monkeypatch):
    """Replaces ``fuseengine.compile``; ``fake.asked`` is how it was called."""
    engine = FakeEngine([])
    engine.asked = []

    def compile(model, size=None, **options):
        engine.asked.append((model, size, options))
        return engine

    monkeypatch.setattr(fuseengine, "compile", compile, raising=False)
    return engine


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """Runs ``fuseengine`` in a process of its own, with one cache of engines for all tests."""
    env = {**os.environ, "FUSEENGINE_CACHE": str(tmp_path_factory.mktemp("cache"))}

    def run(*args, probe=False, **options):
        start = ["-c", _PROBE] if probe else ["-m", "fuseengine"]
        return subprocess.run(
            [sys.executable, *start, *map(str, args)],
            capture_output=True,
            text=True,
            env=env,
            timeout=300,
            **options,
        )

    return run
