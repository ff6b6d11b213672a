"""Agreement in phase against complex arithmetic in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from fuseengine import _native

SIZES = [(1, 1), (1, 3), (2, 2), (3, 5), (7, 9), (5, 64), (63, 111)]
TINY = 1e-4


def answers(scales, size, seed=0):
    return np.random.default_rng(seed).normal(size=(2, scales, *size))


def native(real, imaginary):
    maps = np.full((4, *real.shape[1:]), np.nan)
    _native.phase_energy(real, imaginary, *maps, tiny=TINY)
    return maps


def plain(real, imaginary):
    e = real + 1j * imaginary
    unit = e.sum(0) / (abs(e.sum(0)) + TINY)
    turned = e * unit.conj()
    amplitude = abs(e).sum(0)
    spread = amplitude / (abs(e).max(0) + TINY)
    return (turned.real - abs(turned.imag)).sum(0), spread, amplitude, abs(e[0]) ** 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scales", [1, 2, 4, 5])
def test_values(scales, size):
    given = answers(scales, size)
    for ours, expected in zip(native(*given), plain(*given), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)


def test_in_phase_and_out_of_it():
    """All scales in one direction: the energy is the amplitude; in opposite ones: its negative."""
    real = np.full((4, 1, 3), 5.0)
    energy, spread, amplitude, power = native(real, real * 0)
    np.testing.assert_allclose(energy, amplitude, rtol=1e-4)
    assert (amplitude == 20).all() and (power == 25).all()
    np.testing.assert_allclose(spread, 4, rtol=1e-4)
    real[2:] *= -1
    energy, *_ = native(real, real * 0)
    assert (energy == 0).all()  # no sum, so no direction
    energy, *_ = native(np.zeros((4, 1, 3)), np.zeros((4, 1, 3)))
    assert (energy == 0).all()


def test_the_same_bits_on_every_instruction_set_and_number_of_threads():
    given = answers(4, (131, 97))
    level, threads = _native.simd_level(), _native.num_threads()
    found = []
    try:
        for name in ("baseline", "avx2", "avx512"):
            try:
                _native.set_simd_level(name)
            except ValueError:
                continue
            for count in (1, 3):
                _native.set_num_threads(count)
                found.append(native(*given))
    finally:
        _native.set_simd_level(level)
        _native.set_num_threads(threads)
    for maps in found:
        np.testing.assert_array_equal(maps, found[0])


def test_neighbours_are_left_alone():
    real, imaginary = answers(4, (3, 5))
    stack = np.full((6, 3, 5), 42.0)
    _native.phase_energy(real, imaginary, *stack[1:5], tiny=TINY)
    assert (stack[0] == 42).all() and (stack[5] == 42).all()
    assert (stack[1:5] != 42).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"real": np.zeros((4, 3, 5), np.float32)}, "real: got float32"),
        ({"real": np.zeros((4, 3, 10))[:, :, ::2]}, "real: got .*expected C-contiguous"),
        ({"real": np.zeros((3, 5))}, r"real: got .*expected shape \(scales, H, W\)"),
        ({"real": np.zeros((0, 3, 5))}, r"real: got .*expected shape \(scales, H, W\)"),
        ({"imaginary": np.zeros((3, 3, 5))}, "imaginary: got .*expected the shape of real"),
        ({"energy": np.zeros((5, 3))}, "energy: got .*expected a map of real"),
        ({"spread": np.zeros((3, 5), np.float32)}, "spread: got float32"),
        ({"power": np.zeros(15)}, r"power: got float64\(15,\)"),
        ({"tiny": 0.0}, "tiny: got 0.*expected > 0"),
        ({"tiny": float("nan")}, "tiny: got -?nan.*expected > 0"),
    ],
)
def test_refused(change, message):
    given = {"real": np.zeros((4, 3, 5)), "imaginary": np.zeros((4, 3, 5)), "tiny": TINY}
    given |= {name: np.zeros((3, 5)) for name in ("energy", "spread", "amplitude", "power")}
    with pytest.raises(ValueError, match=message):
        _native.phase_energy(**{**given, **change})


def test_overlapping():
    real, imaginary = answers(4, (3, 5))
    maps = np.zeros((4, 3, 5))
    with pytest.raises(ValueError, match="spread overlaps energy"):
        _native.phase_energy(real, imaginary, maps[0], maps[0], maps[2], maps[3], tiny=TINY)
    with pytest.raises(ValueError, match="energy overlaps real"):
        _native.phase_energy(real, imaginary, real[0], maps[1], maps[2], maps[3], tiny=TINY)
