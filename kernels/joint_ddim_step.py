"""One DDIM step of [source 1, source 2, fused] with the joint observation correction, A = identity.

Per pixel, with m the weight map, y1, y2 the observed sources and lam the correction's scale:

    [a, b, f] = (x - sqrt(1 - abar_t) eps) / sqrt(abar_t)
    a' = a - lam (a - y1),   b' = b - lam (b - y2)
    f' = f - lam (m (a' - y1) + (1-m) (b' - y2) - m y1 - (1-m) y2 + f)          form "code"
    f' = f - lam (m (a - y1) + (1-m) (b - y2) - (m a + (1-m) b - f))            form "paper"
    out = sqrt(abar_{t-1}) [a', b', f'] + sqrt(1 - abar_{t-1}) eps

DRFusion, equations 12 to 19 for A1 = A2 = I ("paper"), and the form of the public code
YShi-cool/DRFusion ("code"); equal for lam = 1. Nine reads and three writes per pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fuseengine import _native
from fuseengine.errors import SettingError
from fuseengine.kernels._library import needs_reference, register

FORMS = ("code", "paper")


def joint_ddim_step_reference(
    x: Tensor,
    eps: Tensor,
    mask: Tensor,
    y1: Tensor,
    y2: Tensor,
    sqrt_abar: float | Tensor,
    sqrt_one_minus_abar: float | Tensor,
    sqrt_abar_prev: float | Tensor,
    sqrt_one_minus_abar_prev: float | Tensor,
    lam: float | Tensor,
    *,
    form: str = "code",
) -> Tensor:
    """The definition of :func:`joint_ddim_step`, differentiable in every argument."""
    x0 = (x - sqrt_one_minus_abar * eps) / sqrt_abar
    a, b, f = x0[:, 0:1], x0[:, 1:2], x0[:, 2:3]
    rest = 1.0 - mask
    new_a, new_b = a - lam * (a - y1), b - lam * (b - y2)
    if form == "code":
        residual = mask * (new_a - y1) + rest * (new_b - y2) - mask * y1 - rest * y2 + f
    else:
        residual = mask * (a - y1) + rest * (b - y2) - (mask * a + rest * b - f)
    corrected = torch.cat([new_a, new_b, f - lam * residual], dim=1)
    return sqrt_abar_prev * corrected + sqrt_one_minus_abar_prev * eps


def joint_ddim_step(
    x: Tensor,
    eps: Tensor,
    mask: Tensor,
    y1: Tensor,
    y2: Tensor,
    sqrt_abar: float | Tensor,
    sqrt_one_minus_abar: float | Tensor,
    sqrt_abar_prev: float | Tensor,
    sqrt_one_minus_abar_prev: float | Tensor,
    lam: float | Tensor,
    *,
    form: str = "code",
) -> Tensor:
    """Go from x_t to x_{t-1}; see the module's docstring for the equation.

    Args:
        x: x_t = [source 1, source 2, fused], (N, 3, H, W), floating point.
        eps: predicted noise, x's shape and dtype.
        mask: weights of source 1 in [0, 1], (N, 1, H, W).
        y1: observed source 1, (N, 1, H, W).
        y2: observed source 2, (N, 1, H, W).
        sqrt_abar: sqrt(abar_t) > 0. Tensor coefficients (training) take the reference's path.
        sqrt_one_minus_abar: sqrt(1 - abar_t).
        sqrt_abar_prev: sqrt(abar_{t-1}).
        sqrt_one_minus_abar_prev: sqrt(1 - abar_{t-1}).
        lam: scale of the correction, lambda_t, in [0, 1].
        form: "code" or "paper".

    Returns:
        x_{t-1}, x's shape and dtype.

    Raises:
        SettingError: unknown form, or shapes that do not go together.
    """
    numbers = (sqrt_abar, sqrt_one_minus_abar, sqrt_abar_prev, sqrt_one_minus_abar_prev, lam)
    tensors = (x, eps, mask, y1, y2)
    if has_torch_function(tensors):
        return handle_torch_function(joint_ddim_step, tensors, *tensors, *numbers, form=form)
    if form not in FORMS:
        raise SettingError(f"form={form!r}; expected one of {FORMS}")
    single = (x.shape[0], 1, *x.shape[2:])
    if x.ndim != 4 or x.shape[1] != 3 or eps.shape != x.shape:
        raise SettingError(
            f"x {tuple(x.shape)}, eps {tuple(eps.shape)}; expected both (N, 3, H, W)"
        )
    for name, tensor in (("mask", mask), ("y1", y1), ("y2", y2)):
        if tuple(tensor.shape) != single:
            raise SettingError(f"{name} {tuple(tensor.shape)}; expected {single} to go with x")
    if any(isinstance(n, Tensor) for n in numbers) or needs_reference(*tensors):
        return joint_ddim_step_reference(*tensors, *numbers, form=form)
    return torch.ops.fuse.joint_ddim_step(*tensors, *numbers, form)


def _general(x, eps, mask, y1, y2, a, b, c, d, lam, form):
    return joint_ddim_step_reference(x, eps, mask, y1, y2, a, b, c, d, lam, form=form)


def _cpu(x, eps, mask, y1, y2, a, b, c, d, lam, form):
    if any(t.dtype != torch.float32 for t in (x, eps, mask, y1, y2)):
        return _general(x, eps, mask, y1, y2, a, b, c, d, lam, form)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    arrays = (t.contiguous().numpy() for t in (x, eps, mask, y1, y2))
    _native.joint_ddim_step(
        *arrays,
        out.numpy(),
        sqrt_abar=a,
        sqrt_one_minus_abar=b,
        sqrt_abar_prev=c,
        sqrt_one_minus_abar_prev=d,
        lam=lam,
        form=FORMS.index(form),
    )
    return out


register(
    "joint_ddim_step(Tensor x, Tensor eps, Tensor mask, Tensor y1, Tensor y2, float sqrt_abar, "
    "float sqrt_one_minus_abar, float sqrt_abar_prev, float sqrt_one_minus_abar_prev, float lam, "
    "str form) -> Tensor",
    general=_general,
    cpu=_cpu,
    fake=lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
