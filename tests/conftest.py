"""Settings shared by all tests."""

from __future__ import annotations

import contextlib
import os
import tempfile

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
