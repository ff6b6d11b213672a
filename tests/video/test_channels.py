from __future__ import annotations

import contextlib
import threading
import time

import pytest

from fuseengine.video.channels import Channel, Finished


def test_newest_wins_and_the_rest_is_counted():
    channel = Channel(2, newest=True)
    for item in range(7):
        channel.put(item)
    assert (channel.get(), channel.get(), channel.dropped) == (5, 6, 5)


def test_skip_leaves_the_last():
    channel = Channel(4, newest=False)
    for item in range(4):
        channel.put(item)
    assert channel.get(skip=lambda item: item < 2) == 2
    assert channel.get(skip=lambda item: True) == 3
    assert channel.dropped == 2


def test_put_waits_for_room():
    channel = Channel(1, newest=False)
    channel.put(0)
    thread = threading.Thread(target=channel.put, args=(1,))
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()
    assert channel.get() == 0
    thread.join(2)
    assert channel.get() == 1


def test_finish_lets_what_waits_through():
    channel = Channel(2, newest=False)
    channel.put("last")
    channel.finish()
    assert channel.get() == "last"
    for call in (channel.get, channel.wait_for_room, lambda: channel.put(1)):
        with pytest.raises(Finished):
            call()


class Waiting(threading.Thread):
    """Calls something, and tells whether it waits."""

    def __init__(self, call):
        super().__init__(daemon=True)
        self.call = call
        self.start()

    def run(self):
        with contextlib.suppress(Finished):
            self.call()

    def waits(self):
        self.join(0.05)
        return self.is_alive()


def test_promised_items_take_room():
    channel = Channel(2, newest=False)
    channel.reserve()
    channel.put(0)
    third = Waiting(channel.reserve)
    assert third.waits()
    channel.forgo()
    assert not third.waits()
    channel.put(1, promised=True)
    fourth = Waiting(channel.reserve)
    assert fourth.waits()
    assert channel.get() == 0
    assert not fourth.waits()


def test_who_waits_for_an_item_is_room_for_one():
    channel = Channel(1, newest=False)
    channel.reserve()
    second = Waiting(channel.reserve)
    assert second.waits()
    got = []
    taker = Waiting(lambda: got.append(channel.get()))
    assert taker.waits()
    assert not second.waits()
    channel.put("first", promised=True)
    assert not taker.waits() and got == ["first"]
    third = Waiting(channel.reserve)
    assert third.waits()
    channel.put("second", promised=True)
    assert third.waits()
    channel.close()
    assert not third.waits()
    with pytest.raises(Finished):
        channel.reserve()


@pytest.mark.parametrize("what", ["get", "put", "wait_for_room", "reserve"])
def test_close_wakes_who_waits(what):
    channel = Channel(1, newest=False)
    if what != "get":
        channel.put(0)
    woken = threading.Event()

    def wait():
        try:
            channel.put(1) if what == "put" else getattr(channel, what)()
        except Finished:
            woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.02)
    channel.close()
    assert woken.wait(2)
    thread.join()
