"""Block means and filters on the spectrum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuseengine.errors import SettingError
from fuseengine.kernels import (
    block_mean,
    block_repeat,
    circular_convolution,
    kernel_spectrum,
    wiener_deconvolution,
    wiener_filter,
    wiener_spectrum,
)


def noise(shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


class TestBlocks:
    @given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2))
    def test_definition(self, scale, rows, columns, batch):
        x = noise((batch, 2, rows * scale, columns * scale))
        expected = x.numpy().reshape(batch, 2, rows, scale, columns, scale).mean(axis=(3, 5))
        np.testing.assert_allclose(block_mean(x, scale).numpy(), expected, rtol=0, atol=1e-14)
        y = noise((batch, 2, rows, columns))
        expected = y.numpy().repeat(scale, axis=2).repeat(scale, axis=3)
        np.testing.assert_array_equal(block_repeat(y, scale).numpy(), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_dtype_stays(self, dtype):
        x = noise((1, 1, 6, 4), dtype=dtype)
        assert block_mean(x, 2).dtype == block_repeat(x, 2).dtype == dtype
        assert torch.equal(block_mean(block_repeat(x, 2), 2), x)  # a mean of equal values

    def test_strided(self):
        x = noise((1, 2, 8, 12))
        torch.testing.assert_close(
            block_mean(x.transpose(2, 3), 2), block_mean(x, 2).transpose(2, 3)
        )

    @pytest.mark.parametrize("size", [(5, 4), (4, 5), (1, 2)])
    def test_refused(self, size):
        with pytest.raises(
            SettingError, match=rf"\({size[0]}, {size[1]}\); expected multiples of 2"
        ):
            block_mean(torch.zeros(1, 1, *size), 2)

    def test_gradients(self):
        x = noise((1, 1, 4, 6)).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: block_repeat(block_mean(x, 2), 3), (x,))


SIZES = [(1, 1), (1, 8), (7, 1), (5, 6), (6, 5), (16, 9)]


class TestFilter:
    @pytest.mark.parametrize("size", SIZES)
    def test_a_flat_spectrum_changes_nothing(self, size):
        x = noise((2, 1, *size))
        flat = torch.ones(size[0], size[1] // 2 + 1)
        torch.testing.assert_close(wiener_filter(x, flat), x, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("size", SIZES)
    def test_spectrum_is_that_of_a_delta(self, size):
        delta = torch.zeros(3, 3, dtype=torch.float64)
        delta[1, 1] = 2.0
        spectrum = kernel_spectrum(delta, size)
        assert spectrum.shape == (size[0], size[1] // 2 + 1)
        torch.testing.assert_close(spectrum, torch.full_like(spectrum, 2.0))

    @pytest.mark.parametrize("size", SIZES)
    def test_shift(self, size):
        """A tap one row below the centre moves the picture down by one row, around the edge."""
        kernel = torch.zeros(3, 1, dtype=torch.float64)
        kernel[2, 0] = 1.0
        x = noise((1, 1, *size))
        torch.testing.assert_close(
            circular_convolution(x, kernel), torch.roll(x, 1, 2), rtol=0, atol=1e-13
        )

    def test_inverse_spectrum(self):
        kernel = noise((3, 5), seed=2)
        k = kernel_spectrum(kernel, (6, 9))
        torch.testing.assert_close(
            wiener_spectrum(kernel, (6, 9), 0.1), k.conj() / (k.abs() ** 2 + 0.1)
        )
        x = noise((1, 1, 6, 9))
        undone = wiener_deconvolution(circular_convolution(x, kernel), kernel, 0.1)
        gain = k.abs() ** 2 / (k.abs() ** 2 + 0.1)
        torch.testing.assert_close(undone, wiener_filter(x, gain), rtol=0, atol=1e-13)

    @pytest.mark.parametrize(
        ("dtype", "tolerance"),
        # Half types are computed in float32 and rounded once at the end.
        [
            (torch.float64, 1e-13),
            (torch.float32, 4e-6),
            (torch.bfloat16, 2e-2),
            (torch.float16, 3e-3),
        ],
    )
    def test_dtypes(self, dtype, tolerance):
        kernel, x = noise((3, 3), seed=1), noise((2, 3, 7, 10)).to(dtype)
        exact = circular_convolution(x.double(), kernel)
        result = circular_convolution(x, kernel.to(dtype).to(torch.float64))
        assert result.dtype == dtype and circular_convolution(x, kernel.to(dtype)).dtype == dtype
        scale = float(exact.abs().max())
        assert (result - exact).abs().max() <= 2 * scale * tolerance

    def test_strided_and_unbatched(self):
        kernel, x = noise((3, 3), seed=1), noise((8, 12))
        whole = circular_convolution(x, kernel)
        assert whole.shape == (8, 12)
        torch.testing.assert_close(circular_convolution(x.T, kernel.T), whole.T)
        torch.testing.assert_close(circular_convolution(x[None, None], kernel)[0, 0], whole)

    @pytest.mark.parametrize("width", [4, 5])
    def test_wrong_spectrum(self, width):
        with pytest.raises(SettingError, match=rf"expected \(6, {width // 2 + 1}\)"):
            wiener_filter(torch.zeros(1, 1, 6, width), torch.ones(6, width))

    def test_gradients(self):
        x, kernel = noise((1, 1, 4, 5)).requires_grad_(), noise((3, 3), seed=1).requires_grad_()
        assert torch.autograd.gradcheck(circular_convolution, (x, kernel))
        assert torch.autograd.gradcheck(lambda x, k: wiener_deconvolution(x, k, 0.3), (x, kernel))
