"""The step ops: reference, registered op, fake, gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import library as torch_library

from fuseengine.errors import SettingError
from fuseengine.kernels import (
    ddim_step,
    ddim_step_reference,
    joint_ddim_step,
    joint_ddim_step_reference,
)

SCALES = (0.6, 0.8, 0.8, 0.6)
SHAPES = [(1, 3, 1, 1), (2, 3, 1, 7), (1, 3, 63, 1), (2, 3, 15, 17), (0, 3, 4, 4), (1, 3, 0, 5)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def tensors(shape, dtype=torch.float64, seed=0):
    """x, eps, mask, y1, y2."""
    g = torch.Generator().manual_seed(seed)
    n, _, h, w = shape
    x, eps = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    rest = [torch.rand((n, 1, h, w), generator=g, dtype=torch.float64) for _ in range(3)]
    return [t.to(dtype) for t in (x, eps, *rest)]


def within(result, given_, reference, *arguments, **options):
    """At most twice the error of the reference in the same dtype, both against float64.

    The floor is for float64, where the reference has no error and another order of terms has some.
    """
    exact = reference(*(t.double() for t in given_), *arguments, **options)
    plain = reference(*given_, *arguments, **options)
    assert result.shape == exact.shape and result.dtype == given_[0].dtype
    if result.numel() == 0:
        return
    scale = max(1.0, float(exact.abs().max()))
    floor = 4 * torch.finfo(result.dtype).eps * scale
    assert (result - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor


class TestDdim:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [*SHAPES, (), (5,)])
    def test_values(self, shape, dtype):
        x, eps = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
        given_ = [x.to(dtype), eps.to(dtype)]
        within(ddim_step(*given_, *SCALES), given_, ddim_step_reference, *SCALES)

    def test_identity_when_nothing_changes(self):
        x, eps, *_ = tensors((1, 3, 5, 4))
        torch.testing.assert_close(ddim_step(x, eps, 0.6, 0.8, 0.6, 0.8), x, rtol=0, atol=1e-15)

    def test_recovers_the_picture(self):
        """x_t made of a picture and its own noise goes back to the picture in one step."""
        picture, noise, *_ = tensors((1, 3, 5, 4))
        restored = ddim_step(0.6 * picture + 0.8 * noise, noise, 0.6, 0.8, 1.0, 0.0)
        torch.testing.assert_close(restored, picture, rtol=0, atol=1e-14)

    def test_strided_inputs(self):
        x, eps, *_ = tensors((2, 3, 10, 12))
        for view in (lambda t: t[:, :, ::2, 1:], lambda t: t.transpose(2, 3), lambda t: t[:, 1:2]):
            torch.testing.assert_close(
                ddim_step(view(x), view(eps), *SCALES),
                view(ddim_step_reference(x, eps, *SCALES)),
                rtol=0,
                atol=1e-14,
            )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(), (7,), (1, 3, 4, 5), (0, 3)])
    def test_opcheck(self, shape, dtype):
        x, eps = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        torch_library.opcheck(torch.ops.fuse.ddim_step, (x, eps, *SCALES))

    def test_gradients(self):
        x, eps, *_ = (t.requires_grad_() for t in tensors((1, 3, 2, 2)))
        scales = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in SCALES]
        assert torch.autograd.gradcheck(ddim_step, (x, eps, *scales))
        assert torch.autograd.gradcheck(lambda x, e: ddim_step(x, e, *SCALES), (x, eps))


class TestJoint:
    @pytest.mark.parametrize("form", ["code", "paper"])
    @pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_values(self, shape, dtype, lam, form):
        given_ = tensors(shape, dtype)
        result = joint_ddim_step(*given_, *SCALES, lam, form=form)
        within(result, given_, joint_ddim_step_reference, *SCALES, lam, form=form)

    def test_by_hand(self):
        """One pixel, worked out from the module's equations."""
        x = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64).reshape(1, 3, 1, 1)
        eps = torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64).reshape(1, 3, 1, 1)
        m, y1, y2 = (torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (0.25, 0.9, 0.4))
        a, b, f = (0.5 - 0.24) / 0.6, (0.2 + 0.32) / 0.6, (0.1 - 0.16) / 0.6
        na, nb = a - 0.3 * (a - 0.9), b - 0.3 * (b - 0.4)
        code = f - 0.3 * (0.25 * (na - 0.9) + 0.75 * (nb - 0.4) - 0.25 * 0.9 - 0.75 * 0.4 + f)
        paper = f - 0.3 * (0.25 * (a - 0.9) + 0.75 * (b - 0.4) - (0.25 * a + 0.75 * b - f))
        for form, fused in (("code", code), ("paper", paper)):
            out = joint_ddim_step(x, eps, m, y1, y2, 0.6, 0.8, 0.8, 0.6, 0.3, form=form).flatten()
            corrected = zip((na, nb, fused), eps.flatten().tolist(), strict=True)
            expected = [0.8 * v + 0.6 * e for v, e in corrected]
            assert out.tolist() == pytest.approx(expected, abs=1e-14)

    def test_forms_agree_for_a_full_correction_only(self):
        given_ = tensors((2, 3, 5, 4))
        for lam, equal in ((1.0, True), (0.0, True), (0.5, False)):
            code = joint_ddim_step(*given_, *SCALES, lam, form="code")
            paper = joint_ddim_step(*given_, *SCALES, lam, form="paper")
            assert torch.allclose(code, paper, rtol=0, atol=1e-13) == equal
        # facts.md: f' differs by lam (1 - lam) [m (a - y1) + (1 - m) (b - y2)].
        x, eps, m, y1, y2 = given_
        x0 = (x - 0.8 * eps) / 0.6
        gap = 0.25 * (m * (x0[:, :1] - y1) + (1 - m) * (x0[:, 1:2] - y2))
        torch.testing.assert_close((paper - code)[:, 2:], -0.8 * -gap, rtol=0, atol=1e-13)

    def test_without_correction_it_is_the_plain_step(self):
        given_ = tensors((2, 3, 5, 4))
        torch.testing.assert_close(
            joint_ddim_step(*given_, *SCALES, 0.0), ddim_step(*given_[:2], *SCALES)
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_strided_inputs(self, dtype):
        given_ = tensors((2, 3, 10, 12), dtype)
        expected = joint_ddim_step_reference(*given_, *SCALES, 0.3)
        views = {
            "rows": lambda t: t[:, :, ::2],
            "columns": lambda t: t[:, :, :, 1:-1],
            "turned": lambda t: t.transpose(2, 3),
            "flipped batch": lambda t: t[1:],
        }
        for name, view in views.items():
            out = joint_ddim_step(*map(view, given_), *SCALES, 0.3)
            torch.testing.assert_close(out, view(expected), rtol=0, atol=2e-6, msg=name)
        last = [t.to(memory_format=torch.channels_last) for t in given_]
        torch.testing.assert_close(
            joint_ddim_step(*last, *SCALES, 0.3), expected, rtol=0, atol=2e-6
        )

    def test_inputs_are_left_alone(self):
        given_ = tensors((1, 3, 5, 4), torch.float32)
        kept = [t.clone() for t in given_]
        joint_ddim_step(*given_, *SCALES, 0.3)
        assert all(torch.equal(t, k) for t, k in zip(given_, kept, strict=True))

    @pytest.mark.parametrize(
        ("shape", "dtype", "form"),
        list(
            itertools.product(
                [(1, 3, 4, 5), (2, 3, 1, 1), (0, 3, 4, 4)],
                [torch.float32, torch.float64, torch.bfloat16],
                ["code", "paper"],
            )
        ),
    )
    def test_opcheck(self, shape, dtype, form):
        arguments = (*tensors(shape, dtype), *SCALES, 0.3, form)
        torch_library.opcheck(torch.ops.fuse.joint_ddim_step, arguments)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_opcheck_strided(self, dtype):
        given_ = [t.transpose(2, 3) for t in tensors((1, 3, 4, 5), dtype)]
        torch_library.opcheck(torch.ops.fuse.joint_ddim_step, (*given_, *SCALES, 0.3, "code"))

    @pytest.mark.parametrize("form", ["code", "paper"])
    def test_gradients(self, form):
        given_ = [t.requires_grad_() for t in tensors((1, 3, 2, 2))]
        numbers = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in (*SCALES, 0.3)]
        assert torch.autograd.gradcheck(
            lambda *args: joint_ddim_step(*args, form=form), (*given_, *numbers)
        )

    def test_gradient_with_plain_numbers(self):
        given_ = tensors((1, 3, 2, 2), torch.float32)
        given_[2].requires_grad_()
        joint_ddim_step(*given_, *SCALES, 1.0)[:, 2].sum().backward()
        torch.testing.assert_close(given_[2].grad, 0.8 * (given_[3] - given_[4]))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({0: (1, 2, 4, 5)}, r"x \(1, 2, 4, 5\).*expected both \(N, 3, H, W\)"),
            ({1: (1, 3, 4, 4)}, r"eps \(1, 3, 4, 4\)"),
            ({2: (1, 3, 4, 5)}, r"mask \(1, 3, 4, 5\); expected \(1, 1, 4, 5\)"),
            ({3: (1, 1, 4, 1)}, r"y1 \(1, 1, 4, 1\)"),
            ({4: (2, 1, 4, 5)}, r"y2 \(2, 1, 4, 5\)"),
        ],
    )
    def test_bad_shapes(self, change, message):
        given_ = tensors((1, 3, 4, 5), torch.float32)
        for index, shape in change.items():
            given_[index] = torch.zeros(shape)
        with pytest.raises(SettingError, match=message):
            joint_ddim_step(*given_, *SCALES, 1.0)

    def test_unknown_form(self):
        with pytest.raises(SettingError, match="form='papers'; expected one of"):
            joint_ddim_step(*tensors((1, 3, 4, 5)), *SCALES, 1.0, form="papers")
