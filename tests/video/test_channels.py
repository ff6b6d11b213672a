from __future__ import annotations

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


@pytest.mark.parametrize("what", ["get", "put", "wait_for_room"])
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
