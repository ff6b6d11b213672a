"""16-bit storage of the native kernels: float32 arithmetic, one rounding at the end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fuseengine import _native
from fuseengine.kernels._library import native_array

HALVES = [torch.float16, torch.bfloat16]
SCALES = {"sqrt_abar": 0.8, "sqrt_one_minus_abar": 0.6, "sqrt_abar_prev": 0.95}
SIZES = [(1, 1), (3, 7), (40, 61)]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(run, tensors, shape, dtype):
    """What ``run`` writes for half inputs, and for the same numbers in float32 rounded once."""
    halves = [t.to(dtype) for t in tensors]
    out = torch.full(shape, torch.nan, dtype=dtype)
    run(*map(native_array, halves), native_array(out))
    wide = torch.full(shape, torch.nan)
    run(*(t.float().numpy() for t in halves), wide.numpy())
    return out, wide.to(dtype)


KERNELS = {
    "ddim_step": (
        lambda x, e, z, out: _native.ddim_step(x, e, z, out, **SCALES, direction=0.25, sigma=0.18),
        (3, 3, 3),
    ),
    "compose_priors": (
        lambda x, a, b, w, out: _native.compose_priors(x, a, b, w, out, **SCALES, direction=0.3),
        (3, 3, 3, 1),
    ),
    "joint_ddim_step": (
        lambda x, e, m, y1, y2, out: _native.joint_ddim_step(
            x, e, m, y1, y2, out, **SCALES, sqrt_one_minus_abar_prev=0.31, lam=0.4, form=0
        ),
        (3, 3, 1, 1, 1),
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("threads", [1, 2])
def test_steps_round_once(name, size, dtype, threads):
    run, channels = KERNELS[name]
    _native.set_num_threads(threads)
    tensors = [drawn(2, c, *size, seed=i) for i, c in enumerate(channels)]
    found, expected = both(run, tensors, (2, 3, *size), dtype)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", HALVES)
def test_norm_rounds_once(size, dtype):
    weight, bias = drawn(2, 6, seed=5).numpy()

    def run(x, out):
        _native.group_norm_silu(x, weight, bias, None, out, groups=3, eps=1e-5)

    found, expected = both(run, [drawn(2, 6, *size) * 3 + 1], (2, 6, *size), dtype)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_first_prior_too(dtype):
    x, a, b = (native_array(drawn(1, 3, 9, 11, seed=i).to(dtype)) for i in range(3))
    w = native_array(drawn(1, 1, 9, 11, seed=3).to(dtype))
    out, x0 = (torch.full((1, 3, 9, 11), torch.nan, dtype=dtype) for _ in range(2))
    _native.compose_priors(x, a, b, w, native_array(out), native_array(x0), **SCALES)
    given = torch.from_numpy(x).view(dtype).float(), torch.from_numpy(a).view(dtype).float()
    expected = (given[0] - 0.6 * given[1]) * np.float32(1 / 0.8)
    torch.testing.assert_close(x0.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_in_place(dtype):
    x, e = drawn(2, 1, 3, 30, 41).to(dtype)
    apart = torch.empty_like(x)
    rest = {**SCALES, "direction": 0.25}
    _native.ddim_step(native_array(x), native_array(e), None, native_array(apart), **rest)
    _native.ddim_step(native_array(x), native_array(e), None, native_array(x), **rest)
    assert torch.equal(x, apart)


@pytest.mark.parametrize("dtype", HALVES)
def test_nan_and_infinity_stay(dtype):
    x = torch.tensor([[[[float("nan"), float("inf"), -float("inf"), 1.0]]]], dtype=dtype)
    e = torch.zeros_like(x)
    out = torch.zeros_like(x)
    _native.ddim_step(
        native_array(x), native_array(e), None, native_array(out), **SCALES, direction=0.0
    )
    assert out[0, 0, 0, 0].isnan() and out[0, 0, 0, 1] == float("inf")
    assert out[0, 0, 0, 2] == -float("inf") and out[0, 0, 0, 3].isfinite()


def test_every_number_survives():
    """A step that changes nothing, over all 65536 numbers of both types."""
    bits = np.arange(0x10000, dtype=np.uint16)
    zeros = np.zeros_like(bits)
    same = {"sqrt_abar": 1.0, "sqrt_one_minus_abar": 0.0, "sqrt_abar_prev": 1.0}
    for kind in (np.float16, np.uint16):
        out = np.zeros_like(bits).view(kind)
        _native.ddim_step(bits.view(kind), zeros.view(kind), None, out, **same, direction=0.0)
        if kind is np.float16:
            np.testing.assert_array_equal(out, bits.view(kind))
        else:
            wide, kept = ((b.astype(np.uint32) << 16).view(np.float32) for b in (bits, out))
            np.testing.assert_array_equal(kept, wide)


def test_rounding_is_numpys():
    """float32 to float16 over random numbers, tiny ones included, through a kernel."""
    rng = np.random.default_rng(0)
    exponent = rng.uniform(-26, 15.99, 100_000)
    x = (np.exp2(exponent) * rng.choice([-1, 1], exponent.size)).astype(np.float16)
    scale = float(np.float32(1.0 / 3.0))
    out = np.empty_like(x)
    _native.ddim_step(
        x,
        np.zeros_like(x),
        None,
        out,
        sqrt_abar=1.0,
        sqrt_one_minus_abar=0.0,
        sqrt_abar_prev=scale,
        direction=0.0,
    )
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(
            out, (x.astype(np.float32) * np.float32(scale)).astype(x.dtype)
        )


def test_mixed_types_are_refused():
    x = np.zeros((1, 3, 4, 4), np.float16)
    with pytest.raises(ValueError, match=r"eps: got float32.*one type of numbers"):
        _native.ddim_step(x, x.astype(np.float32), None, x.copy(), **SCALES, direction=0.0)
    with pytest.raises(ValueError, match=r"x: got float64.*float32, float16 or bfloat16"):
        _native.ddim_step(x.astype(float), x, None, x.copy(), **SCALES, direction=0.0)
