"""The project's ops on a CUDA device against their float64 references on the CPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from fuseengine import kernels  # noqa: E402

SHAPES = [(1, 3, 1, 1), (2, 3, 7, 5), (1, 3, 64, 111)]
NUMBERS = (0.8, 0.6, 0.96, 0.28)
# Rounding of a handful of operations on numbers near 1, in units of the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 8e-3, torch.bfloat16: 6e-2}


def drawn(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    wide = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    return wide.double(), wide.cuda()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_ddim_step(shape, dtype):
    x, x_cuda = drawn(shape, dtype)
    found = kernels.ddim_step(x_cuda, x_cuda.flip(-1), *NUMBERS)
    expected = kernels.ddim_step_reference(x, x.flip(-1), *NUMBERS)
    assert found.dtype == dtype and found.is_cuda
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_joint_ddim_step(shape, dtype, form):
    x, x_cuda = drawn(shape, dtype)

    def arguments(t):
        return t, t.flip(1), t[:, 0:1], t[:, 1:2], t[:, 2:3], *NUMBERS, 0.7

    found = kernels.joint_ddim_step(*arguments(x_cuda), form=form)
    expected = kernels.joint_ddim_step_reference(*arguments(x), form=form)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("size", [(4, 4), (33, 47), (64, 80)])
def test_blur_and_its_inverse(size):
    x, x_cuda = drawn((1, 1, *size), torch.float32)
    kernel, kernel_cuda = drawn((3, 5), torch.float32)
    kernel, kernel_cuda = kernel / kernel.sum(), kernel_cuda / kernel.sum().item()
    blurred = kernels.circular_convolution(x_cuda, kernel_cuda)
    expected = kernels.circular_convolution(x, kernel)
    torch.testing.assert_close(blurred.double().cpu(), expected, rtol=0, atol=1e-5)
    found = kernels.wiener_deconvolution(x_cuda, kernel_cuda, 1e-2)
    expected = kernels.wiener_deconvolution(x, kernel, 1e-2)
    # The inverse amplifies what the blur removes, up to 1 / (2 sqrt(1e-2)) = 5 times.
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_blocks(scale):
    x, x_cuda = drawn((2, 1, 6 * scale, 4 * scale), torch.float32)
    mean = kernels.block_mean(x_cuda, scale)
    torch.testing.assert_close(mean.double().cpu(), kernels.block_mean(x, scale), rtol=0, atol=1e-6)
    again = kernels.block_mean(kernels.block_repeat(mean, scale), scale)
    torch.testing.assert_close(again, mean, rtol=0, atol=1e-6)
