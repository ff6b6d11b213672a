"""The CUDA graph of an engine: right, without allocations, without waiting for the device."""

from __future__ import annotations

import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")

SIZE = (96, 128)


@pytest.fixture(scope="module")
def engine(model, make):
    return make(model, SIZE)


@pytest.fixture
def executor(engine, pictures):
    _, executor = engine._plan(SIZE)
    for target, frame in zip(executor.inputs, pictures(SIZE), strict=True):
        plane = frame if frame.ndim == 2 else frame[..., 1]
        target[...] = executor.device.constant((plane / 255).astype(np.float32)[None, None])
    executor.run()
    torch.cuda.synchronize()
    return executor


def test_the_frame_is_one_graph(executor):
    assert isinstance(executor._run.__self__, torch.cuda.CUDAGraph)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_replay_equals_direct_run(model, make, pictures, precision):
    engine = make(model, SIZE, precision, guard_db=20.0, max_error=1.0)
    _, executor = engine._plan(SIZE)
    for seed in range(3):
        planes = (pictures(SIZE, seed)[0], pictures(SIZE, seed)[1][..., 1])
        for target, plane in zip(executor.inputs, planes, strict=True):
            target[...] = executor.device.constant((plane / 255).astype(np.float32)[None, None])
        executor.output.fill_(float("nan"))
        executor.run()
        torch.cuda.synchronize()
        replayed = executor.output.clone()
        executor.output.fill_(float("nan"))
        for _, call in executor._calls:
            call()
        torch.cuda.synchronize()
        # The same kernels on the same data; another algorithm would differ by rounding only.
        tolerance = {"fp32": 1e-6, "fp16": 2e-3}[precision]
        torch.testing.assert_close(replayed, executor.output, rtol=0, atol=tolerance)


def test_no_allocation_inside_a_frame(engine, pictures):
    ir, vis = pictures(SIZE)
    out = np.empty_like(vis)
    for _ in range(3):
        engine(ir, vis, out=out)
    torch.cuda.synchronize()

    def counts():
        stats = torch.cuda.memory_stats()
        return stats["allocation.all.allocated"], torch.cuda.memory_allocated()

    before = counts()
    for _ in range(50):
        engine(ir, vis, out=out)
    assert counts() == before


def test_counting_allocations_works():
    # The test above is worth something only if this counter moves.
    before = torch.cuda.memory_stats().get("allocation.all.allocated", 0)
    kept = torch.empty(1024, device="cuda")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
    del kept


def test_the_program_does_not_wait_for_the_device(executor):
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # cycles: at least 0.3 s on any GPU
    begin = time.perf_counter()
    executor.run()
    done = torch.cuda.Event()
    done.record()
    elapsed, finished = time.perf_counter() - begin, done.query()
    torch.cuda.synchronize()
    assert elapsed < 0.1
    assert not finished


def test_no_call_of_the_program_synchronises(executor):
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        executor.run()
        for _, call in executor._calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_frames_go_through_page_locked_memory(executor):
    for host in executor.device.staging([*executor.inputs, executor.output]):
        assert host.is_pinned()


def test_a_new_frame_changes_the_replayed_result(executor):
    first = executor.output.clone()
    executor.inputs[0].copy_(1 - executor.inputs[0])
    executor.run()
    torch.cuda.synchronize()
    assert (executor.output - first).abs().max() > 1e-2
