"""Pairs by time: nearest partner, tolerance, offset, what is left over."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseengine.errors import SettingError
from fuseengine.video.frames import CameraFrame
from fuseengine.video.pairing import Pairer

IMAGE = np.zeros((2, 2), np.uint8)


def pairs_of(infrared, visible, *, patient=True, **settings):
    """Feeds both cameras in the order of time, as they would come; pairs of their times."""
    pairer = Pairer(**settings)
    offset = settings.get("offset_s", 0.0)
    arrivals = sorted([(t - offset, 0, t) for t in infrared] + [(t, 1, t) for t in visible])
    found = []

    def drain():
        while (pair := pairer.next(patient=patient)) is not None:
            found.append((pair.infrared.time_s, pair.visible.time_s))

    for _, camera, moment in arrivals:
        pairer.add(camera, CameraFrame(IMAGE, "gray8", time_s=moment))
        drain()
    for camera in (0, 1):
        pairer.end(camera)
    drain()
    assert pairer.finished()
    pairer.give_up_all()
    assert pairer.paired == len(found)
    assert pairer.unpaired == [len(infrared) - len(found), len(visible) - len(found)]
    return found


def every(interval, count, start=0.0):
    return [start + k * interval for k in range(count)]


@pytest.mark.parametrize("patient", [True, False])
def test_equal_times(patient):
    times = every(1 / 30, 20)
    assert pairs_of(times, times, patient=patient) == [(t, t) for t in times]


def test_constant_lag_within_half_an_interval():
    visible = every(0.04, 10)
    infrared = [t + 0.015 for t in visible]
    assert pairs_of(infrared, visible) == list(zip(infrared, visible, strict=True))


def test_offset():
    visible = every(0.04, 10)
    infrared = [t + 7.5 for t in visible]
    expected = list(zip(infrared, visible, strict=True))
    assert pairs_of(infrared, visible, offset_s=7.5) == expected
    assert pairs_of(infrared, visible) == []


def test_slower_camera_takes_its_nearest_frames():
    fast, slow = every(0.01, 100), every(0.11, 9, start=0.003)
    found = pairs_of(fast, slow)
    assert len(found) == 9
    assert all(abs(a - b) <= 0.0051 for a, b in found)


def test_tolerance_by_default_is_half_the_slower_interval():
    slow = every(0.1, 10)
    # 0.045 off is near enough for ten frames a second, 0.055 would be another frame's.
    assert len(pairs_of([t + 0.045 for t in slow], slow)) == 10
    assert Pairer(rates=(9.0, 30.0)).tolerance_s == pytest.approx(1 / 18)


def test_lost_frame_costs_one_pair():
    times = every(1 / 30, 20)
    assert len(pairs_of(times[:7] + times[8:], times)) == 19


def test_variable_rate():
    visible = np.cumsum([0.033, 0.033, 0.1, 0.2, 0.033, 0.033, 0.066, 0.033]).tolist()
    infrared = [t + 0.004 for t in visible]
    assert len(pairs_of(infrared, visible)) == 8


@pytest.mark.parametrize("bad", [-1e-3, float("nan")])
def test_bad_tolerance(bad):
    with pytest.raises(SettingError, match="expected 0 or more"):
        Pairer(bad)


times = st.lists(st.integers(0, 400), max_size=25, unique=True).map(sorted)


@given(times, times, st.integers(0, 30), st.booleans())
def test_rules(infrared, visible, tolerance, patient):
    a, b = [t / 1e3 for t in infrared], [t / 1e3 for t in visible]
    found = pairs_of(a, b, tolerance_s=tolerance / 1e3, patient=patient)
    for column in zip(*found, strict=True):  # each once, in order
        assert list(column) == sorted(set(column))
    assert all(abs(x - y) <= tolerance / 1e3 + 1e-3 for x, y in found)


@given(times, times, st.integers(1, 30))
def test_patient_pairs_do_not_depend_on_who_comes_first(infrared, visible, tolerance):
    settings = {"tolerance_s": tolerance / 1e3}
    a, b = [t / 1e3 for t in infrared], [t / 1e3 for t in visible]
    pairer, found = Pairer(**settings), []
    for camera, moments in ((1, b), (0, a)):  # one camera is read to its end first
        for moment in moments:
            pairer.add(camera, CameraFrame(IMAGE, "gray8", time_s=moment))
        pairer.end(camera)
    while (pair := pairer.next(patient=True)) is not None:
        found.append((pair.infrared.time_s, pair.visible.time_s))
    assert found == pairs_of(a, b, **settings)
