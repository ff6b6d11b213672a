"""What the benchmarks' tests share."""

from __future__ import annotations

import pytest

from fuseengine import _native


@pytest.fixture
def threads_restored():
    """Benchmarks against OpenCV set its threads and the kernels' for their whole process."""
    import cv2

    before = cv2.getNumThreads(), _native.num_threads()
    yield
    cv2.setNumThreads(before[0])
    _native.set_num_threads(before[1])
