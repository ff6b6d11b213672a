"""Criss-cross attention on the CPU: definition, blocks, native kernel, gradients."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import library as torch_library

from fuseengine import _native
from fuseengine.errors import SettingError
from fuseengine.kernels import criss_cross_attention, criss_cross_attention_reference
from tests.kernels.tolerance import within

module = sys.modules["fuseengine.kernels.criss_cross_attention"]

# batch, channels of q and k, of v, height, width
SHAPES = [
    (1, 4, 32, 5, 7),
    (2, 4, 3, 1, 9),
    (1, 3, 1, 11, 1),
    (2, 1, 2, 1, 1),
    (1, 5, 130, 7, 17),
    (2, 16, 8, 2, 31),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def drawn(shape, dtype=torch.float64, seed=0):
    n, queries, channels, h, w = shape
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn((n, c, h, w), generator=g, dtype=torch.float64).to(dtype)
        for c in (queries, queries, channels)
    ]


def by_hand(q, k, v):
    """Pixel by pixel, straight from the equation."""
    n, _, height, width = q.shape
    out = np.empty_like(v)
    for b, y, x in itertools.product(range(n), range(height), range(width)):
        seen = [(y, j) for j in range(width)] + [(i, x) for i in range(height) if i != y]
        scores = np.array([q[b, :, y, x] @ k[b, :, i, j] for i, j in seen])
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, :, y, x] = sum(p * v[b, :, i, j] for p, (i, j) in zip(weights, seen, strict=True))
    return out


class TestValues:
    @pytest.mark.parametrize("shape", SHAPES[:4])
    def test_the_reference_is_the_equation(self, shape):
        tensors = drawn(shape)
        expected = by_hand(*(t.numpy() for t in tensors))
        found = criss_cross_attention_reference(*tensors)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_op(self, shape, dtype):
        tensors = drawn(shape, dtype)
        found = criss_cross_attention(*tensors)
        assert found.dtype == dtype and found.is_contiguous()
        exact = criss_cross_attention_reference(*(t.double() for t in tensors))
        # In float64 the reference is its own judge: all that is left is the order of the sums.
        floor = 32.0 if dtype == torch.float64 else 4.0
        within(found, exact, criss_cross_attention_reference(*tensors), floor=floor)

    @given(
        st.tuples(
            st.integers(1, 2), st.integers(1, 5), st.integers(1, 5), *[st.integers(1, 9)] * 2
        ),
        st.sampled_from([torch.float32, torch.float16]),
    )
    def test_any_shape(self, shape, dtype):
        tensors = drawn(shape, dtype)
        exact = criss_cross_attention_reference(*(t.double() for t in tensors))
        found = criss_cross_attention(*tensors)
        within(found, exact, criss_cross_attention_reference(*tensors))

    @pytest.mark.parametrize("elements", [1, 40, 100])
    def test_lines_in_blocks(self, monkeypatch, elements):
        monkeypatch.setattr(module, "_MAP_ELEMENTS", elements)
        tensors = drawn((2, 3, 4, 5, 6))
        out, lse = module._by_lines(*tensors)
        torch.testing.assert_close(
            out, criss_cross_attention_reference(*tensors), rtol=0, atol=1e-14
        )
        assert lse.shape == (2, 5, 6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_strided_inputs(self, dtype):
        tensors = drawn((2, 4, 6, 10, 8), dtype)
        views = {
            "rows": lambda t: t[:, :, ::2],
            "columns": lambda t: t[..., 1:-1],
            "turned": lambda t: t.transpose(2, 3),
            "channels_last": lambda t: t.to(memory_format=torch.channels_last),
            "channels": lambda t: t[:, 1:3],
        }
        for name, view in views.items():
            given_ = [view(t) for t in tensors]
            expected = criss_cross_attention_reference(*(t.contiguous() for t in given_))
            found = criss_cross_attention(*given_)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6, msg=name)

    def test_large_scores_do_not_overflow(self):
        q, k, v = drawn((1, 4, 3, 6, 5), torch.float32)
        q, k = 200 * q, 200 * k
        exact = criss_cross_attention_reference(q.double(), k.double(), v.double())
        torch.testing.assert_close(
            criss_cross_attention(q, k, v).double(), exact, rtol=0, atol=2e-2
        )

    def test_nan_spreads_to_its_lines_only(self):
        q, k, v = drawn((1, 4, 3, 5, 6), torch.float32)
        v[0, 1, 2, 3] = float("nan")
        bad = criss_cross_attention(q, k, v).isnan()
        expected = torch.zeros_like(bad)
        expected[0, 1, 2, :] = expected[0, 1, :, 3] = True
        assert torch.equal(bad, expected)

    @pytest.mark.parametrize("shape", [(0, 4, 3, 5, 6), (1, 4, 0, 5, 6), (1, 4, 3, 0, 6)])
    def test_empty(self, shape):
        found = criss_cross_attention(*drawn(shape, torch.float32))
        assert found.shape == (shape[0], *shape[2:])

    def test_inputs_are_left_alone(self):
        tensors = drawn(SHAPES[0], torch.float32)
        kept = [t.clone() for t in tensors]
        criss_cross_attention(*tensors)
        assert all(torch.equal(t, k) for t, k in zip(tensors, kept, strict=True))

    def test_the_native_kernel_is_used_when_it_is_there(self, monkeypatch):
        def native(q, k, v, out):
            assert {a.dtype for a in (q, k, v, out)} == {np.dtype(np.float32)}
            assert all(a.flags.c_contiguous for a in (q, k, v, out))
            out[:] = 7

        monkeypatch.setattr(_native, "criss_cross_attention", native, raising=False)
        for dtype in (torch.float32, torch.float16):
            tensors = [t.transpose(2, 3) for t in drawn(SHAPES[0], dtype)]
            assert (criss_cross_attention(*tensors) == 7).all()


class TestGradients:
    @pytest.mark.parametrize("shape", [(1, 2, 3, 3, 4), (2, 1, 2, 1, 3), (1, 2, 1, 4, 1)])
    def test_gradcheck(self, shape):
        tensors = [t.requires_grad_() for t in drawn(shape)]
        assert torch.autograd.gradcheck(criss_cross_attention, tensors)

    def test_as_the_reference(self):
        kinds = (criss_cross_attention, criss_cross_attention_reference)
        grads = []
        for function in kinds:
            tensors = [t.requires_grad_() for t in drawn((2, 4, 6, 7, 9), torch.float32)]
            out = function(*tensors)
            (out * out.detach().cos()).sum().backward()
            grads.append([t.grad for t in tensors])
        for found, expected in zip(*grads, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_no_gradient_asked_for_no_graph(self):
        tensors = [t.requires_grad_() for t in drawn(SHAPES[0], torch.float32)]
        with torch.no_grad():
            assert not criss_cross_attention(*tensors).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], (0, 4, 3, 2, 2)])
@pytest.mark.parametrize("turned", [False, True])
def test_opcheck(shape, dtype, turned):
    tensors = drawn(shape, dtype)
    tensors = [t.transpose(2, 3) for t in tensors] if turned else tensors
    torch_library.opcheck(torch.ops.fuse.criss_cross_attention, tuple(tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: (4, 5, 6)}, r"q \(4, 5, 6\).*expected q and k \(N, Cq, H, W\).*x\[None\]"),
        ({1: (1, 3, 5, 6)}, r"k \(1, 3, 5, 6\).*expected q and k"),
        ({0: (1, 0, 5, 6), 1: (1, 0, 5, 6)}, r"Cq >= 1"),
        ({2: (1, 3, 5, 7)}, r"v \(1, 3, 5, 7\); expected v with q's N, H and W: resize"),
        ({2: (2, 3, 5, 6)}, r"v \(2, 3, 5, 6\)"),
    ],
)
def test_bad_shapes(change, message):
    tensors = drawn((1, 4, 3, 5, 6), torch.float32)
    for index, shape in change.items():
        tensors[index] = torch.zeros(shape)
    with pytest.raises(SettingError, match=message):
        criss_cross_attention(*tensors)


def test_bad_dtypes_and_devices():
    q, k, v = drawn((1, 4, 3, 5, 6), torch.float32)
    with pytest.raises(SettingError, match=r"v torch.float64; expected one floating-point dtype"):
        criss_cross_attention(q, k, v.double())
    with pytest.raises(SettingError, match="expected one floating-point dtype"):
        criss_cross_attention(q.int(), k.int(), v.int())
    with pytest.raises(SettingError, match="v on meta; expected one device: move"):
        criss_cross_attention(q, k, v.to("meta"))
