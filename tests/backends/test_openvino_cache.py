"""What OpenVINO made of a network, kept for the next process."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import fuseengine as fe
from fuseengine import cache
from fuseengine.backends import BACKENDS, openvino
from tests.saved import SIZE, frames, little_engine

pytestmark = pytest.mark.skipif(
    BACKENDS["openvino"].unavailable("cpu") is not None, reason="OpenVINO is not installed"
)

PAIR = frames()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("FUSEENGINE_CACHE", str(path))
    return path


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "little.fuse"
    little_engine(backend="openvino").save(path)
    return path


def kept(folder):
    return sorted(folder.glob("openvino-*"))


def no_compiling(*_):
    raise AssertionError("compiled again")


def test_a_bundle_is_compiled_once(folder, path, monkeypatch):
    assert not kept(folder)  # compile() keeps no candidates
    first = fe.load(path, threads=1)(*PAIR)
    entries = kept(folder)
    assert len(entries) == len(fe.load(path, threads=1).choice) == 3
    monkeypatch.setattr(openvino, "_compiled", no_compiling)
    np.testing.assert_array_equal(fe.load(path, threads=1)(*PAIR), first)
    assert kept(folder) == entries


def test_an_engine_from_the_cache_is_compiled_once(folder, monkeypatch):
    options = {"backend": "openvino", "cache": True}
    first = little_engine(**options)(*PAIR)
    assert not kept(folder)
    np.testing.assert_array_equal(little_engine(**options)(*PAIR), first)
    assert len(kept(folder)) == 3
    monkeypatch.setattr(openvino, "_compiled", no_compiling)
    again = little_engine(**options)
    assert again.report.from_cache
    np.testing.assert_array_equal(again(*PAIR), first)


def test_nothing_is_kept_of_an_engine_of_any_size(folder, tmp_path):
    """A folder of pictures of a hundred sizes would leave a hundred networks."""
    path = tmp_path / "any.fuse"
    little_engine(None, backend="openvino").save(path)
    fe.load(path)(*PAIR)
    little_engine(None, backend="openvino", cache=True)
    little_engine(None, backend="openvino", cache=True)(*PAIR)
    assert not kept(folder)


@pytest.mark.parametrize("damage", ["flipped", "no network"])
def test_a_damaged_entry_is_compiled_again(folder, path, damage, caplog):
    first = fe.load(path, threads=1)(*PAIR)
    for entry in kept(folder):
        if damage == "flipped":
            content = bytearray((entry / "network").read_bytes())
            content[len(content) // 2] ^= 1
            (entry / "network").write_bytes(content)
        else:  # whole, but nothing that OpenVINO made
            cache.discard(entry.name)
            cache.store(entry.name, {"network": b"not a network"})
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(fe.load(path, threads=1)(*PAIR), first)
    assert ("compiled again" in caplog.text) == (damage == "no network")
    assert all((entry / "network").stat().st_size > 100 for entry in kept(folder))


def test_without_a_place_to_write_to(path, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setenv("FUSEENGINE_CACHE", str(file / "cache"))
    assert fe.load(path, threads=1)(*PAIR).shape == (*SIZE, 3)


@pytest.mark.usefixtures("no_home")
def test_without_a_home(path):
    assert fe.load(path, threads=1)(*PAIR).shape == (*SIZE, 3)


def test_what_makes_another_entry(folder, path, monkeypatch):
    def entries(**options):
        fe.load(path, **{"threads": 1, **options})
        return set(kept(folder))

    first = entries()
    other = entries(threads=2)
    assert first < other
    if "bf16" in BACKENDS["openvino"].precisions("cpu"):
        assert other < (other := entries(backend="openvino", precision="bf16"))
    monkeypatch.setattr(cache, "processor", lambda: "another processor")
    assert len(entries()) == len(other) + 3
