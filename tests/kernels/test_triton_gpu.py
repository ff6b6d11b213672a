"""The public functions on a GPU, where the kernels are compiled, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from fuseengine import kernels
from fuseengine.kernels import _triton
from tests.kernels import test_criss_cross, test_group_norm, test_properties, test_triton_steps
from tests.kernels.tolerance import within

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
    pytest.mark.skipif(not _triton.installed(), reason="Triton is not installed"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALES = test_triton_steps.SCALES


def check(ours, plain, exact, tensors, *, floor=8.0):
    moved = [t.cuda() for t in tensors]
    assert _triton.usable(*moved)
    found = ours(*moved)
    assert found.is_cuda and found.dtype == tensors[0].dtype
    expected = exact(*(t.double() for t in tensors))
    within(found.cpu(), expected, plain(*moved).cpu(), floor=floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [*test_criss_cross.SHAPES, (1, 4, 32, 61, 83), (1, 64, 512, 33, 40)]
)
def test_attention(shape, dtype):
    tensors = test_criss_cross.drawn(shape, dtype)
    tensors[0] = tensors[0] / shape[1] ** 0.5
    reference = kernels.criss_cross_attention_reference
    # TF32 in three products has about 22 bits, float32 24.
    floor = 32.0 if dtype == torch.float32 else 8.0
    check(kernels.criss_cross_attention, reference, reference, tensors, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), [*test_group_norm.SHAPES, ((1, 32, 240, 321), 8)])
@pytest.mark.parametrize("last", [False, True])
def test_norm(shape, groups, dtype, last):
    x, *rest = test_group_norm.drawn(shape, dtype)
    x = x.to(memory_format=test_group_norm.FORMATS[last])

    def ours(*tensors):
        return kernels.group_norm_silu(*tensors, groups=groups)

    def plain(*tensors):
        return test_group_norm.plain(*tensors, groups=groups)

    def exact(*tensors):
        return kernels.group_norm_silu_reference(*tensors, groups=groups)

    check(ours, plain, exact, (x, *rest), floor=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*test_triton_steps.SHAPES[:4], (2, 3, 240, 320)])
def test_steps(shape, dtype):
    x, eps, other, *planes = test_triton_steps.drawn(shape, dtype)

    def check_step(name, tensors, *numbers):
        def ours(*t):
            return getattr(kernels, name)(*t, *numbers)

        def reference(*t):
            return getattr(kernels, f"{name}_reference")(*t, *numbers)

        check(ours, reference, reference, tensors)

    check_step("ddim_step", (x, eps), *SCALES)
    check_step("joint_ddim_step", (x, eps, *planes), *SCALES, 0.3)
    check_step("compose_priors", (x, eps, other, planes[0]), *SCALES)


def test_noise():
    x, eps, noise, *_ = test_triton_steps.drawn((2, 3, 31, 17), torch.float32)

    def ours(x, eps, noise):
        return kernels.ddim_step(x, eps, *SCALES, noise, 0.5)

    def reference(x, eps, noise):
        return kernels.ddim_step_reference(x, eps, *SCALES, noise, 0.5)

    check(ours, reference, reference, (x, eps, noise))


@test_properties.every_subject
@given(st.data())
@settings(max_examples=6)
def test_every_op(subject, data):
    """The properties of :mod:`tests.kernels.test_properties`, compiled."""
    dtype = data.draw(st.sampled_from(DTYPES))
    layouts = test_properties.LAYOUTS
    tensors, options = test_properties.drawn(data, subject, dtype=dtype, layouts=layouts)
    found = subject.op(*(t.cuda() for t in tensors), **options)
    assert found.is_cuda
    # TF32 in three products has about 22 bits, float32 24.
    subject.check(found.cpu(), tensors, options, slack=4.0)


@test_properties.every_subject
@given(st.data())
@settings(max_examples=3)
def test_nan_propagates(subject, data):
    tensors, options = test_properties.drawn(data, subject)
    tensors = test_properties.with_nan(data, subject, tensors)
    found = subject.op(*(t.cuda() for t in tensors), **options)
    subject.check_nan(found.cpu(), tensors, options)


@given(st.data())
@settings(max_examples=20)
def test_frames(data):
    frame, *numbers = test_properties.in_arguments(data)
    found = torch.ops.fuse.frame_in(frame.cuda(), *numbers, torch.float32)
    test_properties.check_in(found.cpu(), (frame, *numbers), torch.float32)
    fused, visible, *rest = arguments = test_properties.out_arguments(data)
    visible = None if visible is None else visible.cuda()
    found = torch.ops.fuse.frame_out(fused.cuda(), visible, *rest)
    test_properties.check_out(found.cpu(), arguments)


def test_in_a_graph():
    """The kernels run on the stream that captures."""
    tensors = [t.cuda() for t in test_criss_cross.drawn((1, 4, 8, 24, 40), torch.float16)]
    expected = kernels.criss_cross_attention(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.criss_cross_attention(*tensors)
    found.fill_(float("nan"))
    graph.replay()
    assert torch.equal(found, expected)
