"""Attention and norm kernels under Triton's interpreter, in a process where fresh memory is NaN."""

from __future__ import annotations

import itertools

import pytest
import torch

from fuseengine.kernels import criss_cross_attention_reference, group_norm_silu_reference
from tests.kernels import test_criss_cross, test_group_norm
from tests.kernels.tolerance import within

ATTENTION = "fuseengine.kernels.criss_cross_attention:launch"
NORM = "fuseengine.kernels.group_norm_silu:launch"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ATTENTION_SHAPES = [*test_criss_cross.SHAPES, (1, 4, 3, 37, 19)]
SETTINGS = {
    "block_m": 16,
    "block_n": 16,
    "block_c": 64,
    "num_warps": 4,
    "num_stages": 2,
    "turn": True,
    "precision": "ieee",
}


class TestAttention:
    @pytest.mark.parametrize(
        ("shape", "dtype", "turn"),
        [
            *itertools.product(ATTENTION_SHAPES, [torch.float32], [False, True]),
            *itertools.product(ATTENTION_SHAPES[:3], DTYPES[1:], [True]),
        ],
    )
    def test_values(self, interpreted, shape, dtype, turn):
        """Blocks of 16 and 64: several per line and per pixel, the last one not full."""
        tensors = test_criss_cross.drawn(shape, dtype)
        settings = {**SETTINGS, "turn": turn}
        found = interpreted(ATTENTION, *tensors, capability=87, settings=settings)
        assert found.dtype == dtype
        exact = criss_cross_attention_reference(*(t.double() for t in tensors))
        # The interpreter cuts bfloat16 off instead of rounding it.
        floor = 8.0 if dtype == torch.bfloat16 else 4.0
        within(found, exact, criss_cross_attention_reference(*tensors), floor=floor)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_shipped_settings(self, interpreted, dtype):
        tensors = test_criss_cross.drawn((1, 4, 20, 5, 71), dtype)
        found = interpreted(ATTENTION, *tensors, capability=90)
        exact = criss_cross_attention_reference(*(t.double() for t in tensors))
        within(found, exact, criss_cross_attention_reference(*tensors), floor=8)

    @pytest.mark.parametrize("turn", [False, True])
    def test_strided_inputs(self, interpreted, turn):
        tensors = test_criss_cross.drawn((1, 4, 6, 12, 10), torch.float32)
        views = {
            "rows": lambda t: t[:, :, ::2],
            "columns": lambda t: t[..., 1:-1],
            "turned": lambda t: t.transpose(2, 3),
            "channels_last": lambda t: t.to(memory_format=torch.channels_last),
        }
        for name, view in views.items():
            given = [view(t) for t in tensors]
            settings = {**SETTINGS, "turn": turn}
            found = interpreted(ATTENTION, *given, capability=87, settings=settings)
            expected = criss_cross_attention_reference(*(t.contiguous() for t in given))
            torch.testing.assert_close(found, expected, rtol=0, atol=4e-6, msg=name)

    def test_large_scores_do_not_overflow(self, interpreted):
        q, k, v = test_criss_cross.drawn((1, 4, 3, 6, 18), torch.float32)
        found = interpreted(ATTENTION, 200 * q, 200 * k, v, capability=87, settings=SETTINGS)
        exact = criss_cross_attention_reference((200 * q).double(), (200 * k).double(), v.double())
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-2)

    @pytest.mark.parametrize("shape", [(0, 4, 3, 5, 6), (1, 4, 0, 5, 6), (1, 4, 3, 0, 6)])
    def test_empty(self, interpreted, shape):
        given = test_criss_cross.drawn(shape, torch.float32)
        assert interpreted(ATTENTION, *given, capability=87).shape == (shape[0], *shape[2:])


class TestNorm:
    # Small blocks and pieces: several of each per plane, the last one not full.
    @pytest.mark.parametrize(
        ("dtype", "settings"),
        [
            (torch.float32, {"block": 64, "num_warps": 4, "programs": 8}),
            *((dtype, None) for dtype in DTYPES),
        ],
    )
    @pytest.mark.parametrize(("shape", "groups"), test_group_norm.SHAPES)
    @pytest.mark.parametrize("last", [False, True])
    def test_values(self, interpreted, shape, groups, dtype, last, settings):
        x, *rest = test_group_norm.drawn(shape, dtype)
        x = x.to(memory_format=test_group_norm.FORMATS[last])
        options = {"groups": groups, "eps": 1e-5, "silu": True}
        found = interpreted(NORM, x, *rest, **options, capability=87, settings=settings)
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=test_group_norm.FORMATS[last])
        exact = test_group_norm.exactly((x, *rest), **options)
        floor = 12.0 if dtype == torch.float32 else 4.0  # the sums in another order
        within(found, exact, test_group_norm.plain(x, *rest, **options), floor=floor)

    @pytest.mark.parametrize("silu", [False, True])
    @pytest.mark.parametrize("shift", ["none", "one", "each"])
    def test_options(self, interpreted, shift, silu):
        x, weight, bias, each = test_group_norm.drawn((3, 8, 4, 5), torch.float32)
        given = x, weight, bias, {"none": None, "one": each[:1], "each": each}[shift]
        options = {"groups": 2, "eps": 0.3, "silu": silu}
        found = interpreted(NORM, *given, **options, capability=87)
        expected = group_norm_silu_reference(*given, **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=4e-6)

    @pytest.mark.parametrize("last", [False, True])
    def test_raw_thermal_counts(self, interpreted, last):
        tensors = test_group_norm.drawn((1, 8, 33, 47), torch.float32, mean=30000, deviation=20)
        if last:
            tensors[0] = tensors[0].to(memory_format=torch.channels_last)
        options = {"groups": 2, "eps": 1e-5, "silu": True}
        settings = {"block": 512, "num_warps": 4, "programs": 24}
        found = interpreted(NORM, *tensors, **options, capability=87, settings=settings)
        # The mean in two numbers: no worse than for a mean of 0.
        assert (found - test_group_norm.exactly(tensors, **options)).abs().max() < 1e-5

    def test_strided_inputs(self, interpreted):
        x, *rest = test_group_norm.drawn((2, 8, 10, 12), torch.float32)
        options = {"groups": 4, "eps": 1e-5, "silu": True}
        for view in (lambda t: t[:, :, ::2, 1:], lambda t: t.transpose(2, 3)):
            found = interpreted(NORM, view(x), *rest, **options, capability=87)
            expected = group_norm_silu_reference(view(x), *rest, **options)
            torch.testing.assert_close(found, expected, rtol=0, atol=4e-6)
