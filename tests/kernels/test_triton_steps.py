"""The sampler's steps: Triton's interpreter, the op of two priors, noise and eta."""

from __future__ import annotations

import pytest
import torch
from torch import library as torch_library

from fuseengine import kernels
from fuseengine.errors import SettingError
from fuseengine.kernels import (
    compose_priors,
    compose_priors_reference,
    ddim_step,
    ddim_step_reference,
    joint_ddim_step_reference,
)
from fuseengine.kernels.compose_priors import coefficients
from fuseengine.kernels.ddim_step import _coefficients, ddim_sigma
from tests.kernels.tolerance import within

DDIM = "fuseengine.kernels.ddim_step:launch"
JOINT = "fuseengine.kernels.joint_ddim_step:launch"
COMPOSE = "fuseengine.kernels.compose_priors:launch"
SCALES = (0.6, 0.8, 0.8, 0.6)
SHAPES = [(1, 3, 1, 1), (2, 3, 1, 7), (1, 3, 63, 1), (2, 3, 15, 17), (0, 3, 4, 4)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def drawn(shape, dtype=torch.float64, planes=3):
    """Three tensors of a shape and some of one plane."""
    g = torch.Generator().manual_seed(0)
    sizes = [shape] * 3 + [(shape[0], 1, *shape[2:])] * planes
    return [torch.rand(s, generator=g, dtype=torch.float64).to(dtype) for s in sizes]


def floor(dtype):
    return 8.0 if dtype == torch.bfloat16 else 4.0  # the interpreter cuts bfloat16 off


class TestInterpreted:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [*SHAPES, (5,), (3, 1100)])
    @pytest.mark.parametrize("eta", [None, 0.5])
    def test_ddim_step(self, interpreted, shape, dtype, eta):
        g = torch.Generator().manual_seed(0)
        x, eps, noise = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
        noise = None if eta is None else noise
        sigma = 0.0 if eta is None else ddim_sigma(*SCALES, eta)
        numbers = (*_coefficients(*SCALES, sigma), sigma)
        found = interpreted(DDIM, x, eps, noise, numbers, capability=87)
        arguments = (x, eps, *SCALES, noise, eta or 0.0)
        wide = (a.double() if isinstance(a, torch.Tensor) else a for a in arguments)
        exact, plain = ddim_step_reference(*wide), ddim_step_reference(*arguments)
        within(found, exact, plain, floor=floor(dtype))

    def test_ddim_step_strided(self, interpreted):
        x, eps, *_ = drawn((2, 3, 10, 12), torch.float32)
        numbers = (*_coefficients(*SCALES, 0.0), 0.0)
        last = {"memory_format": torch.channels_last}
        for a, b in (
            (x.to(**last), eps.to(**last)),
            (x.to(**last), eps),
            (x[..., 1:], eps[..., 1:]),
        ):
            found = interpreted(DDIM, a, b, None, numbers, capability=87)
            expected = ddim_step_reference(a, b, *SCALES)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("form", ["code", "paper"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_joint_ddim_step(self, interpreted, shape, dtype, form):
        x, eps, _, *planes = drawn(shape, dtype)
        found = interpreted(JOINT, x, eps, *planes, (*SCALES, 0.3), form, capability=87)
        given = (x, eps, *planes)
        exact = joint_ddim_step_reference(*(t.double() for t in given), *SCALES, 0.3, form=form)
        plain = joint_ddim_step_reference(*given, *SCALES, 0.3, form=form)
        within(found, exact, plain, floor=floor(dtype))

    def test_joint_ddim_step_on_slices(self, interpreted):
        """Planes of a larger tensor are read where they lie; anything else is copied."""
        x, eps, third, *_ = drawn((2, 3, 10, 12), torch.float32)
        planes = [third[:, i : i + 1] for i in range(3)]
        for view in (lambda t: t, lambda t: t[..., 2:], lambda t: t.transpose(2, 3)):
            given = [view(t) for t in (x, eps, *planes)]
            found = interpreted(JOINT, *given, (*SCALES, 0.3), "code", capability=87)
            expected = joint_ddim_step_reference(*given, *SCALES, 0.3)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("form", ["code", "paper"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [*SHAPES, (2, 1, 5, 3)])
    def test_compose_priors(self, interpreted, shape, dtype, form):
        given = drawn(shape, dtype, planes=1)
        found = interpreted(COMPOSE, *given, coefficients(*SCALES, form), capability=87)
        exact = compose_priors_reference(*(t.double() for t in given), *SCALES, form=form)
        plain = compose_priors_reference(*given, *SCALES, form=form)
        within(found, exact, plain, floor=floor(dtype))


class TestNoise:
    def test_sigma_as_in_the_paper(self):
        a, b, c, d = SCALES
        expected = 0.5 * (d**2 / b**2 * (1 - a**2 / c**2)) ** 0.5
        assert ddim_sigma(*SCALES, 0.5) == pytest.approx(expected)
        assert ddim_sigma(1.0, 0.0, 0.9, 0.43, 1.0) == 0.0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
    @pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
    def test_values(self, dtype, eta):
        x, eps, noise, *_ = drawn((2, 3, 5, 7), dtype)
        found = ddim_step(x, eps, *SCALES, noise, eta)
        wide = (t.double() for t in (x, eps))
        exact = ddim_step_reference(*wide, *SCALES, noise.double(), eta)
        within(found, exact, ddim_step_reference(x, eps, *SCALES, noise, eta))

    def test_without_eta_noise_changes_nothing(self):
        x, eps, noise, *_ = drawn((2, 3, 5, 7))
        assert torch.equal(ddim_step(x, eps, *SCALES, noise, 0.0), ddim_step(x, eps, *SCALES))

    def test_variance_is_that_of_the_step(self):
        """Of a picture's own noise the step keeps 1 - abar_{t-1} of variance, whatever eta."""
        g = torch.Generator().manual_seed(0)
        eps, noise = torch.randn((2, 400, 400), generator=g)
        for eta in (0.0, 0.5, 1.0):
            out = ddim_step(0.8 * eps, eps, *SCALES, noise, eta)
            assert out.var().item() == pytest.approx(0.36, rel=0.02)

    def test_opcheck_and_gradients(self):
        x, eps, noise, *_ = drawn((1, 3, 2, 2))
        torch_library.opcheck(torch.ops.fuse.ddim_step, (x, eps, *SCALES, noise, 0.2))
        given = [t.requires_grad_() for t in (x, eps, noise)]
        assert torch.autograd.gradcheck(lambda x, e, z: ddim_step(x, e, *SCALES, z, 0.4), given)

    def test_bad_input(self):
        x, eps, noise, *_ = drawn((1, 3, 2, 2))
        with pytest.raises(SettingError, match=r"noise \(1, 3, 2, 1\); expected equal shapes"):
            ddim_step(x, eps, *SCALES, noise[..., :1])
        for eta in (-0.1, 1.5, float("nan")):
            with pytest.raises(SettingError, match="expected 0 .deterministic. to 1"):
                ddim_step(x, eps, *SCALES, noise, eta)


class TestComposePriors:
    @pytest.mark.parametrize("form", ["code", "paper"])
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
    @pytest.mark.parametrize("shape", [*SHAPES, (2, 1, 5, 3)])
    def test_values(self, shape, dtype, form):
        given = drawn(shape, dtype, planes=1)
        found = compose_priors(*given, *SCALES, form=form)
        assert found.dtype == dtype and found.is_contiguous()
        exact = compose_priors_reference(*(t.double() for t in given), *SCALES, form=form)
        within(found, exact, compose_priors_reference(*given, *SCALES, form=form))

    def test_by_hand(self):
        x, a, b, w = (
            torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (0.5, 0.3, -0.4, 0.25)
        )
        e = 0.25 * 0.3 + 0.75 * -0.4
        x0 = (0.5 - 0.8 * e) / 0.6
        assert compose_priors(x, a, b, w, *SCALES).item() == pytest.approx(0.8 * x0)
        paper = compose_priors(x, a, b, w, *SCALES, form="paper").item()
        assert paper == pytest.approx(0.8 * x0 + 0.6 * e)

    def test_equal_priors_make_a_ddim_step(self):
        x, eps, _, w = drawn((2, 3, 5, 7), planes=1)
        found = compose_priors(x, eps, eps, w, *SCALES, form="paper")
        torch.testing.assert_close(found, ddim_step(x, eps, *SCALES), rtol=0, atol=1e-14)

    def test_strided_inputs(self):
        given = drawn((2, 3, 10, 12), torch.float32, planes=1)
        for view in (lambda t: t[:, :, ::2], lambda t: t.transpose(2, 3), lambda t: t[1:]):
            part = [view(t) for t in given]
            expected = compose_priors_reference(*part, *SCALES)
            torch.testing.assert_close(compose_priors(*part, *SCALES), expected, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("turned", [False, True])
    def test_opcheck(self, dtype, turned):
        given = drawn((2, 3, 4, 5), dtype, planes=1)
        given = [t.transpose(2, 3) for t in given] if turned else given
        torch_library.opcheck(torch.ops.fuse.compose_priors, (*given, *SCALES, "code"))

    @pytest.mark.parametrize("form", ["code", "paper"])
    def test_gradients(self, form):
        given = [t.requires_grad_() for t in drawn((1, 2, 2, 2), planes=1)]
        assert torch.autograd.gradcheck(lambda *t: compose_priors(*t, *SCALES, form=form), given)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({0: torch.zeros(3, 4, 5)}, r"x \(3, 4, 5\); expected \(N, C, H, W\)"),
            ({1: torch.zeros(1, 3, 4, 4)}, r"eps_a \(1, 3, 4, 4\); expected \(1, 3, 4, 5\)"),
            ({2: torch.zeros(1, 1, 4, 5)}, r"eps_b \(1, 1, 4, 5\); expected \(1, 3, 4, 5\)"),
            ({3: torch.zeros(1, 3, 4, 5)}, r"weight \(1, 3, 4, 5\); expected \(1, 1, 4, 5\)"),
            ({1: torch.zeros(1, 3, 4, 5, dtype=torch.float64)}, "eps_a torch.float64, x"),
        ],
    )
    def test_bad_input(self, change, message):
        given = drawn((1, 3, 4, 5), torch.float32, planes=1)
        for index, tensor in change.items():
            given[index] = tensor
        with pytest.raises(SettingError, match=message):
            compose_priors(*given, *SCALES)

    def test_unknown_form(self):
        with pytest.raises(SettingError, match="form='papers'; expected one of"):
            compose_priors(*drawn((1, 3, 4, 5), planes=1), *SCALES, form="papers")


def test_importing_the_ops_imports_no_triton():
    from tests.helpers import run_python

    run_python("import sys, fuseengine.kernels; assert 'triton' not in sys.modules")
    assert kernels.__all__ == sorted(kernels.__all__)
