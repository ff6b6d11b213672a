"""GroupNorm with shift and SiLU on the CPU: definition, native kernel, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import library as torch_library

from fuseengine import _native
from fuseengine.errors import SettingError
from fuseengine.kernels import group_norm_silu, group_norm_silu_reference
from tests.kernels.tolerance import within

SHAPES = [
    ((1, 32, 5, 7), 8),
    ((2, 6, 1, 1), 3),
    ((1, 1, 13, 17), 1),
    ((2, 130, 3, 1), 13),
    ((3, 4, 1, 31), 4),
]
FORMATS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def drawn(shape, dtype=torch.float64, *, mean=0.0, deviation=1.0, seed=0):
    """x, weight, bias, shift."""
    g = torch.Generator().manual_seed(seed)
    sizes = (shape, (shape[1],), (shape[1],), (shape[0], shape[1]))
    tensors = [torch.randn(s, generator=g, dtype=torch.float64) for s in sizes]
    tensors[0] = deviation * tensors[0] + mean
    return [t.to(dtype) for t in tensors]


def plain(x, weight, bias, shift, *, groups, eps=1e-5, silu=True):
    # Not F.group_norm, which refuses groups of one element.
    z = torch.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    z = z if shift is None else z + shift.to(x.dtype)[:, :, None, None]
    return F.silu(z) if silu else z


def exactly(tensors, **options):
    wide = (t if t is None else t.double() for t in tensors)
    return group_norm_silu_reference(*wide, **options)


class TestValues:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("shape", "groups"), SHAPES)
    @pytest.mark.parametrize("last", [False, True])
    def test_the_op(self, shape, groups, dtype, last):
        x, *rest = drawn(shape, dtype)
        x = x.to(memory_format=FORMATS[last])
        found = group_norm_silu(x, *rest, groups=groups)
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=FORMATS[last])
        exact = exactly((x, *rest), groups=groups)
        within(found, exact, plain(x, *rest, groups=groups))

    @pytest.mark.parametrize("silu", [False, True])
    @pytest.mark.parametrize("shift", ["none", "one", "each"])
    def test_options(self, shift, silu):
        x, weight, bias, each = drawn((3, 8, 4, 5), torch.float32)
        given_ = x, weight, bias, {"none": None, "one": each[:1], "each": each}[shift]
        options = {"groups": 2, "eps": 0.3, "silu": silu}
        found = group_norm_silu(*given_, **options)
        within(found, exactly(given_, **options), plain(*given_, **options))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_with_float32_weights(self, dtype):
        x, *rest = drawn((2, 8, 4, 5), torch.float32)
        x = x.to(dtype)
        found = group_norm_silu(x, *rest, groups=2)
        assert found.dtype == dtype
        within(found, exactly((x, *rest), groups=2), plain(x, *rest, groups=2))

    def test_raw_thermal_counts(self):
        """Mean 30,000 and deviation 20: E[x^2] - E[x]^2 would be off by tens of per cent."""
        tensors = drawn((2, 8, 33, 47), torch.float32, mean=30000, deviation=20)
        found = group_norm_silu(*tensors, groups=2)
        # float32 spaces numbers near 30,000 by 0.002, that is 1e-4 deviations; the input has that
        # already, so the result may keep much more.
        assert (found - exactly(tensors, groups=2)).abs().max() < 2e-4

    def test_a_constant_picture(self):
        x = torch.full((1, 4, 3, 5), 7.0)
        found = group_norm_silu(x, torch.ones(4), torch.full((4,), 2.0), groups=2)
        torch.testing.assert_close(found, F.silu(torch.full_like(x, 2.0)), rtol=0, atol=1e-5)

    @given(
        st.integers(1, 2),
        st.integers(1, 4),
        st.integers(1, 4),
        st.integers(1, 9),
        st.integers(1, 9),
    )
    def test_any_shape(self, batch, groups, per_group, height, width):
        tensors = drawn((batch, groups * per_group, height, width), torch.float32)
        found = group_norm_silu(*tensors, groups=groups, eps=1e-2)
        exact = exactly(tensors, groups=groups, eps=1e-2)
        within(found, exact, plain(*tensors, groups=groups, eps=1e-2), floor=16)

    def test_strided_inputs(self):
        x, *rest = drawn((2, 8, 10, 12), torch.float32)
        views = (lambda t: t[:, :, ::2, 1:], lambda t: t.transpose(2, 3), lambda t: t[1:])
        for view in views:
            found = group_norm_silu(view(x), *rest[:2], groups=4)
            assert found.is_contiguous()
            expected = group_norm_silu_reference(view(x), *rest[:2], groups=4)
            torch.testing.assert_close(found, expected, rtol=0, atol=4e-6)

    def test_nan_stays_in_its_group(self):
        x, *rest = drawn((2, 8, 4, 5), torch.float32)
        x[1, 2, 0, 0] = float("nan")
        bad = group_norm_silu(x, *rest, groups=4).isnan()
        expected = torch.zeros_like(bad)
        expected[1, 2:4] = True
        assert torch.equal(bad, expected)

    @pytest.mark.parametrize("shape", [(0, 4, 3, 5), (1, 4, 0, 5)])
    def test_empty(self, shape):
        x, *rest = drawn(shape, torch.float32)
        assert group_norm_silu(x, *rest, groups=2).shape == shape

    def test_the_native_kernel_is_used_when_it_is_there(self, monkeypatch):
        def native(x, weight, bias, shift, out, *, groups, eps, silu):
            assert all(a.flags.c_contiguous and a.dtype == np.float32 for a in (x, weight, out))
            assert (groups, eps, silu, shift) == (2, 0.5, False, None)
            out[:] = x + 1

        monkeypatch.setattr(_native, "group_norm_silu", native, raising=False)
        x, weight, bias, _ = drawn((2, 4, 3, 5), torch.float32)
        for given_ in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
            found = group_norm_silu(given_, weight, bias, groups=2, eps=0.5, silu=False)
            assert torch.equal(found, given_ + 1)


def test_gradients():
    tensors = [t.requires_grad_() for t in drawn((2, 4, 2, 3))]
    assert torch.autograd.gradcheck(lambda *t: group_norm_silu(*t, groups=2), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "groups"), [*SHAPES[:3], ((0, 4, 2, 2), 2)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "turned"])
def test_opcheck(shape, groups, dtype, layout):
    x, weight, bias, shift = drawn(shape, dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "turned":
        x, shift = x.transpose(2, 3), None
    arguments = (x, weight, bias, shift, groups, 1e-5, True)
    torch_library.opcheck(torch.ops.fuse.group_norm_silu, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4, 5, 6)}, r"x \(4, 5, 6\), torch.float32; expected \(N, C, H, W\)"),
        ({0: torch.zeros(1, 4, 5, 6, dtype=torch.int32)}, "floating point: .*convert"),
        ({1: torch.zeros(3)}, r"weight \(3,\); expected \(4,\)"),
        ({2: torch.zeros(4, 1)}, r"bias \(4, 1\); expected \(4,\)"),
        ({3: torch.zeros(3, 4)}, r"shift \(3, 4\); expected \(2, 4\) or \(1, 4\)"),
        ({1: torch.zeros(4, dtype=torch.float64)}, "expected one dtype for these"),
        ({1: torch.zeros(4, device="meta")}, "tensors on cpu, meta; expected one device"),
        ({"groups": 3}, "groups=3, C=4; expected a divisor of C"),
        ({"groups": 0}, "groups=0"),
        ({"eps": -1.0}, "eps=-1.0; expected 0 or more"),
        ({"eps": float("nan")}, "eps=nan"),
    ],
)
def test_bad_input(change, message):
    tensors = drawn((2, 4, 5, 6), torch.float32)
    options = {"groups": 2, **{k: v for k, v in change.items() if isinstance(k, str)}}
    for index, tensor in change.items():
        if isinstance(index, int):
            tensors[index] = tensor
    with pytest.raises(SettingError, match=message):
        group_norm_silu(*tensors, **options)
