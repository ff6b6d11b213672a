"""Two frames under way on a GPU: the pictures of single calls, and copies that really overlap."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

import fuseengine as fe
from fuseengine.errors import FrameError

torch = pytest.importorskip("torch")

SIZE = (96, 128)


@pytest.fixture(scope="module")
def engine(model, make):
    return make(model, SIZE)


@pytest.fixture
def pipeline(engine):
    with engine.pipelined() as made:
        yield made


@pytest.fixture
def pairs(pictures):
    return [pictures(SIZE, seed) for seed in range(24)]


def check(found, engine, pairs):
    for fused, pair in zip(found, pairs, strict=True):
        np.testing.assert_array_equal(fused, engine(*pair))


def sleep_on_the_device():
    torch.cuda._sleep(1_000_000_000)  # cycles: at least 0.3 s on any GPU


def test_pictures_in_order(engine, pipeline, pairs):
    found = list(pipeline.map(pairs))
    check(found, engine, pairs)
    assert len({fused.tobytes() for fused in found}) == len(pairs)


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_other_precisions(model, make, pairs, precision):
    engine = make(model, SIZE, precision, guard_db=20.0, max_error=1.0)
    with engine.pipelined() as pipeline:
        check(list(pipeline.map(pairs)), engine, pairs)


def test_sizes_change(model, make, pictures):
    engine = make(model, None)
    sizes = [(96, 128), (96, 128), (63, 95), (64, 96), (480, 640), (480, 640), (96, 128)]
    pairs = [pictures(size, seed) for seed, size in enumerate(sizes)]
    with engine.pipelined() as pipeline:
        check(list(pipeline.map(pairs)), engine, pairs)


def test_queueing_waits_for_nothing(engine, pipeline, pairs):
    list(pipeline.map(pairs[:4]))
    torch.cuda.synchronize()
    sleep_on_the_device()
    begin = time.perf_counter()
    tickets = [pipeline.submit(*pair) for pair in pairs[:2]]
    elapsed = time.perf_counter() - begin
    done = [ticket._slot._done.query() for ticket in tickets]
    assert elapsed < 0.1 and done == [False, False]
    check([ticket.result() for ticket in tickets], engine, pairs[:2])


def test_copies_to_the_device_do_not_wait_for_what_it_computes(engine, pipeline, pairs):
    list(pipeline.map(pairs[:4]))
    torch.cuda.synchronize()
    sleep_on_the_device()
    ticket = pipeline.submit(*pairs[0])
    ticket._slot._loaded.synchronize()
    assert not ticket._slot._computed.query()
    check([ticket.result()], engine, pairs[:1])


def test_a_result_does_not_wait_for_the_frame_behind(engine, pipeline, pairs):
    list(pipeline.map(pairs[:4]))
    first = pipeline.submit(*pairs[0])
    with torch.cuda.stream(torch.cuda.default_stream()):
        sleep_on_the_device()
    second = pipeline.submit(*pairs[1])
    found = [first.result()]
    assert not second._slot._computed.query()
    check([*found, second.result()], engine, pairs[:2])


def test_no_allocation_inside_a_frame(pipeline, pairs):
    list(pipeline.map(pairs))
    torch.cuda.synchronize()

    def counts():
        stats = torch.cuda.memory_stats()
        return stats["allocation.all.allocated"], torch.cuda.memory_allocated()

    before = counts()
    list(pipeline.map(pairs))
    assert counts() == before


def test_frames_go_through_page_locked_memory(pipeline, pairs):
    list(pipeline.map(pairs[:2]))
    for slot in pipeline._free:
        assert all(host.is_pinned() for host in (*slot._hosts, slot._fused_host))


@pytest.mark.parametrize("own_stream", [False, True])
def test_the_engine_is_called_meanwhile(engine, pipeline, pairs, own_stream):
    expected = [engine(*pair) for pair in pairs]
    wrong = []

    def call():
        with torch.cuda.stream(torch.cuda.Stream() if own_stream else None):
            for k in range(len(pairs)):
                if (engine(*pairs[-k]) != expected[-k]).any():
                    wrong.append(k)

    thread = threading.Thread(target=call)
    thread.start()
    found = list(pipeline.map(pairs))
    thread.join(60)
    assert not wrong
    for fused, picture in zip(found, expected, strict=True):
        np.testing.assert_array_equal(fused, picture)


def test_a_bad_frame_between_good_ones(engine, pipeline, pairs):
    bad = (pairs[1][0] / 255).astype(np.float32)
    bad[3, 4] = np.nan
    first = pipeline.submit(*pairs[0])
    with pytest.raises(FrameError):
        pipeline.submit(bad, pairs[1][1])
    second = pipeline.submit(*pairs[2])
    check([first.result(), second.result()], engine, pairs[0:3:2])


def test_closing_with_frames_under_way(engine, pairs):
    with engine.pipelined() as pipeline:
        list(pipeline.map(pairs[:4]))
        sleep_on_the_device()
        ticket = pipeline.submit(*pairs[0])
    assert ticket._slot._done.query()
    check([ticket.result()], engine, pairs[:1])


def test_a_stream(engine, pairs):
    infrared, visible = zip(*pairs, strict=True)
    with fe.Stream(engine) as stream:
        found = [frame.image for frame in stream.run(iter(infrared), iter(visible))]
    check(found, engine, pairs)
