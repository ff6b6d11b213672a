"""The cache of compiled engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fuseengine as fe
from fuseengine import cache as cache_store
from fuseengine.errors import CacheError
from tests.helpers import BLOCK_TORCH, run_python, tiny

SIZE = (24, 32)
IR = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
VIS = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder of the test's own, not made yet."""
    path = tmp_path / "of" / "mine"
    monkeypatch.setenv("FUSEENGINE_CACHE", str(path))
    return path


def small(**settings):
    """Two steps are enough: one with the weight map, one without."""
    return tiny(**{"steps": 2, **settings})


def compiled(model=None, **options):
    given = {"size": SIZE, "backend": "onnxruntime", "threads": 1, **options}
    return fe.compile(model or small(), **given)


def entries(folder):
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


class TestEngines:
    def test_second_time_from_the_cache(self, folder):
        first = compiled()
        assert not first.report.from_cache
        assert len(entries(folder)) == 1 and not entries(folder)[0].startswith(".")
        second = compiled()
        assert second.report.from_cache and "from the cache" in second.report.summary()
        assert second.report.choice == first.report.choice
        assert second.report.candidates == first.report.candidates
        assert str(second.program) == str(first.program)
        np.testing.assert_array_equal(second(IR, VIS), first(IR, VIS))
        assert entries(folder) == entries(folder)

    def test_what_makes_another_entry(self, folder):
        compiled()
        changed = small()
        changed.unet.stem.weight.data[0, 0, 0, 0] += 1e-3
        others = [
            {"model": changed},
            {"model": small(steps=1)},
            {"size": (24, 36)},
            {"precision": "fp32"},
        ]
        for count, options in enumerate(others, 2):
            assert not compiled(**options).report.from_cache, options
            assert len(entries(folder)) == count
        alpha = small()
        alpha.alpha.data[0] += 1e-3  # a number of the program, in no network
        assert not compiled(alpha).report.from_cache

    def test_not_used_when_not_wanted(self, folder):
        compiled(cache=False)
        compiled(examples=[(IR, VIS)])
        assert not folder.exists()

    def test_an_engine_of_any_size_too(self, folder):
        first, second = compiled(size=None), compiled(size=None)
        assert second.report.from_cache and second.size is None
        for size in (SIZE, (30, 18)):
            ir, vis = np.resize(IR, size), np.resize(VIS, (*size, 3))
            np.testing.assert_array_equal(second(ir, vis), first(ir, vis))

    def test_torch_stages_come_from_the_model_at_hand(self, folder):
        first, second = (compiled(backend="torch", precision="fp32") for _ in range(2))
        assert second.report.from_cache
        np.testing.assert_array_equal(second(IR, VIS), first(IR, VIS))

    @pytest.mark.parametrize("name", ["engine.json", "constants.safetensors", "0.onnx"])
    def test_damaged_entry_is_compiled_again(self, folder, name):
        first = compiled()
        (entry,) = folder.iterdir()
        content = bytearray((entry / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (entry / name).write_bytes(content)
        second = compiled()
        assert not second.report.from_cache
        np.testing.assert_array_equal(second(IR, VIS), first(IR, VIS))
        assert compiled().report.from_cache  # and the entry is whole again

    @pytest.mark.parametrize("name", ["engine.json", "index.json", "1.onnx"])
    def test_incomplete_entry_is_compiled_again(self, folder, name):
        first = compiled()
        (entry,) = folder.iterdir()
        (entry / name).unlink()
        second = compiled()
        assert not second.report.from_cache
        np.testing.assert_array_equal(second(IR, VIS), first(IR, VIS))

    def test_a_folder_that_cannot_be_written(self, tmp_path, monkeypatch, caplog):
        file = tmp_path / "file"
        file.write_text("in the way")
        monkeypatch.setenv("FUSEENGINE_CACHE", str(file / "cache"))
        assert compiled()(IR, VIS).shape == VIS.shape
        assert "set FUSEENGINE_CACHE" in caplog.text


NAMED = f"""
import numpy as np, sys
import fuseengine as fe
engine = fe.compile("drfusion-s", size={SIZE}, backend="onnxruntime", threads=1)
ir = np.random.default_rng(0).integers(0, 256, {SIZE}, np.uint8)
fused = engine(ir, ir[::-1].copy())
print(engine.report.from_cache, "torch" in sys.modules, int(fused.astype(int).sum()))
"""


class TestProcesses:
    def test_at_once_then_warm_without_torch(self, tmp_path):
        environment = {**os.environ, "FUSEENGINE_CACHE": str(tmp_path)}
        running = [
            subprocess.Popen(
                [sys.executable, "-c", NAMED],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        results = [process.communicate(timeout=300) for process in running]
        assert [p.returncode for p in running] == [0, 0], results
        sums = {out.split()[2] for out, _ in results}
        assert len(sums) == 1
        assert len(entries(tmp_path)) == 1  # one entry, nothing left half-written
        # A device without PyTorch runs the same name from the cache.
        out = run_python(BLOCK_TORCH + NAMED, FUSEENGINE_CACHE=str(tmp_path))
        from_cache, _, total = out.split()
        assert from_cache == "True" and total in sums
        # And where PyTorch is installed, it is not even imported.
        out = run_python(NAMED, FUSEENGINE_CACHE=str(tmp_path))
        assert out.split()[:2] == ["True", "False"]

    def test_cold_without_torch_says_what_to_install(self, tmp_path):
        script = BLOCK_TORCH + (
            "import fuseengine as fe\n"
            "try:\n    fe.compile('drfusion-s', size=(24, 32), backend='onnxruntime')\n"
            "except fe.FuseEngineError as error:\n    print(type(error).__name__, error)"
        )
        out = run_python(script, FUSEENGINE_CACHE=str(tmp_path))
        assert out.startswith("BackendUnavailableError")
        assert "pip install 'fuseengine[compile]'" in out


class TestStore:
    def test_round_trip(self, folder):
        files = {"a.bin": bytes(range(256)), "empty": b""}
        assert cache_store.load("key") is None
        cache_store.store("key", files)
        assert cache_store.load("key") == files
        assert entries(folder) == ["key"]

    def test_first_writer_wins(self, folder):
        cache_store.store("key", {"a": b"first"})
        cache_store.store("key", {"a": b"second"})
        assert cache_store.load("key") == {"a": b"first"}
        assert entries(folder) == ["key"]

    def test_default_place(self, monkeypatch, tmp_path):
        monkeypatch.delenv("FUSEENGINE_CACHE", raising=False)
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        assert cache_store.cache_folder() == tmp_path / ".cache" / "fuseengine"
        assert entries(tmp_path) == []  # asking does not create it

    def test_a_folder_that_may_not_be_looked_into(self, folder, request):
        cache_store.store("key", {"a": b""})
        request.getfixturevalue("closed_folders")
        assert cache_store.load("key") is None

    @pytest.mark.usefixtures("no_home")
    def test_no_home(self):
        assert cache_store.load("key") is None
        with pytest.raises(CacheError, match="set FUSEENGINE_CACHE to a folder"):
            cache_store.store("key", {"a": b""})

    def test_unwritable(self, tmp_path, monkeypatch):
        file = tmp_path / "file"
        file.touch()
        monkeypatch.setenv("FUSEENGINE_CACHE", str(file))
        with pytest.raises(CacheError, match="set FUSEENGINE_CACHE to a folder"):
            cache_store.store("key", {"a": b""})

    def test_changed_content_is_removed(self, folder):
        cache_store.store("key", {"a": b"content"})
        (folder / "key" / "a").write_bytes(b"Content")
        assert cache_store.load("key") is None
        assert entries(folder) == []
        cache_store.store("key", {"a": b"new"})
        assert cache_store.load("key") == {"a": b"new"}

    @pytest.mark.parametrize("index", ["", "{", '{"a": 3}', '{"b": "0"}'])
    def test_bad_index(self, folder, index):
        cache_store.store("key", {"a": b"content"})
        (folder / "key" / "index.json").write_text(index)
        assert cache_store.load("key") is None


class TestKeys:
    def test_fingerprint(self):
        x, y = np.arange(6, dtype=np.float32), np.arange(6, dtype=np.float32) + 1
        base = cache_store.fingerprint([("x", x), ("y", y)], "text")
        assert base == cache_store.fingerprint([("y", y), ("x", x)], "text")
        others = [
            ([("x", y), ("y", x)], "text"),
            ([("x", x.reshape(2, 3)), ("y", y)], "text"),
            ([("x", x.view(np.int32)), ("y", y)], "text"),
            ([("x", x)], "text"),
            ([("x", x), ("y", y)], "other"),
        ]
        keys = {cache_store.fingerprint(arrays, text) for arrays, text in others}
        assert len(keys) == len(others) and base not in keys

    def test_library_versions_and_code_count(self, monkeypatch):
        settings = {"model": "m", "size": [24, 32]}
        base = cache_store.key_of(settings)
        assert base == cache_store.key_of(json.loads(json.dumps(settings)))
        assert base != cache_store.key_of({**settings, "size": None})
        monkeypatch.setattr(cache_store.metadata, "version", lambda name: "0.0.1")
        cache_store.environment_key.cache_clear()
        try:
            assert cache_store.key_of(settings) != base
        finally:
            cache_store.environment_key.cache_clear()
