"""Settings shared by all tests."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import pytest

# Before anything asks for it; what tests compile is nothing that a user's cache should keep.
_cache = tempfile.TemporaryDirectory(prefix="fuseengine-tests-")
os.environ.setdefault("FUSEENGINE_CACHE", _cache.name)

with contextlib.suppress(ImportError):  # the GPU suite runs on machines without it
    import hypothesis

    # Same examples everywhere, and no deadline: a shared machine's pauses are not our failures.
    hypothesis.settings.register_profile(
        "fuseengine", deadline=None, derandomize=True, database=None, max_examples=60
    )
    hypothesis.settings.load_profile("fuseengine")


@pytest.fixture
def no_home(monkeypatch):
    """As for a container's user without an entry in its list of users."""

    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FUSEENGINE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", none)


@pytest.fixture
def closed_folders(monkeypatch):
    """As for a service that may not look into any folder."""

    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", closed)
    monkeypatch.setattr(Path, "exists", closed)
