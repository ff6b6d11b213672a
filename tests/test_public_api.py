"""The public surface is a list, and the run side does without PyTorch."""

from __future__ import annotations

import json

import pytest

import fuseengine as fe
from tests.helpers import BLOCK_TORCH, run_python

PUBLIC = [
    "Engine",
    "FuseEngineError",
    "FusionModel",
    "Program",
    "build",
    "capture",
    "compile",
    "demo_pair",
    "load",
    "load_checkpoint",
    "load_model",
    "model_names",
    "packaged_models",
    "read_image",
    "write_image",
]

NEEDS_TORCH = ["FusionModel", "build", "capture", "load_checkpoint", "load_model", "model_names"]


def test_the_list():
    assert set(fe.__all__) >= set(PUBLIC)
    assert fe.__all__ == sorted(fe.__all__)


@pytest.mark.parametrize("name", fe.__all__)
def test_every_name_is_there_and_documented(name):
    value = getattr(fe, name)
    assert value.__doc__
    assert name in dir(fe)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'compil'"):
        _ = fe.compil


@pytest.fixture(scope="module")
def bare():
    """What a bare interpreter without PyTorch can do."""
    script = """
import importlib, json, pkgutil, sys
import fuseengine as fe
import fuseengine.runtime
heavy = [m for m in ("onnxruntime", "openvino", "onnx", "scipy", "numpy") if m in sys.modules]
modules = ["program", "engine", "compiler", "report", "cache", "errors", "zoo", "stages",
           "backends", "cli"]
modules += [m.name.partition(".")[2] for m in
            pkgutil.walk_packages(fuseengine.runtime.__path__, "fuseengine.runtime.")]
failed = {}
for name in modules:
    try:
        importlib.import_module(f"fuseengine.{name}")
    except BaseException as error:
        failed[name] = repr(error)
missing = {}
for name in fe.__all__:
    try:
        getattr(fe, name)
    except ImportError as error:
        missing[name] = str(error)
print(json.dumps({"heavy": heavy, "modules": modules, "failed": failed, "missing": missing,
                  "models": list(fe.packaged_models()), "pair": [x.shape for x in fe.demo_pair()]}))
"""
    return json.loads(run_python(BLOCK_TORCH + script))


class TestWithoutTorch:
    def test_importing_the_package_imports_nothing_heavy(self, bare):
        assert bare["heavy"] == []

    def test_run_side(self, bare):
        assert bare["failed"] == {}
        assert {"runtime.executor", "runtime.frames", "runtime.ops"} <= set(bare["modules"])

    def test_what_needs_it_says_how_to_get_it(self, bare):
        assert sorted(bare["missing"]) == NEEDS_TORCH
        for name, message in bare["missing"].items():
            assert f"fuseengine.{name} needs PyTorch" in message
            assert "pip install 'fuseengine[compile]'" in message

    def test_what_does_not_need_it_works(self, bare):
        assert "drfusion-s" in bare["models"]
        assert bare["pair"][0][:2] == bare["pair"][1][:2]


def test_run_side_does_not_import_torch_where_it_is_installed():
    script = (
        "import sys, fuseengine, fuseengine.engine, fuseengine.program, fuseengine.compiler\n"
        "import fuseengine.runtime.executor, fuseengine.runtime.frames, fuseengine.backends\n"
        "assert 'torch' not in sys.modules"
    )
    run_python(script)
