"""One deterministic step of DDIM in one pass over memory.

    x0   = (x - sqrt(1 - abar_t) eps) / sqrt(abar_t)
    out  = sqrt(abar_{t-1}) x0 + sqrt(1 - abar_{t-1}) eps

Song et al. 2021, equation 12 with sigma = 0. The two lines are linear in x and eps, so
``out = c_x x + c_eps eps`` with two scalars: two reads and one write per element.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fuseengine.errors import SettingError
from fuseengine.kernels._library import needs_reference, register


def ddim_step_reference(
    x: Tensor,
    eps: Tensor,
    sqrt_abar: float | Tensor,
    sqrt_one_minus_abar: float | Tensor,
    sqrt_abar_prev: float | Tensor,
    sqrt_one_minus_abar_prev: float | Tensor,
) -> Tensor:
    """The definition of :func:`ddim_step`, differentiable in every argument."""
    x0 = (x - sqrt_one_minus_abar * eps) / sqrt_abar
    return sqrt_abar_prev * x0 + sqrt_one_minus_abar_prev * eps


def ddim_step(
    x: Tensor,
    eps: Tensor,
    sqrt_abar: float | Tensor,
    sqrt_one_minus_abar: float | Tensor,
    sqrt_abar_prev: float | Tensor,
    sqrt_one_minus_abar_prev: float | Tensor,
) -> Tensor:
    """Go from x_t to x_{t-1}; see the module's docstring for the equation.

    Args:
        x: x_t, any shape, floating point.
        eps: predicted noise, x's shape and dtype.
        sqrt_abar: sqrt(abar_t) > 0. Tensor coefficients (training) take the reference's path.
        sqrt_one_minus_abar: sqrt(1 - abar_t).
        sqrt_abar_prev: sqrt(abar_{t-1}).
        sqrt_one_minus_abar_prev: sqrt(1 - abar_{t-1}).

    Returns:
        x_{t-1}, x's shape and dtype.

    Raises:
        SettingError: x and eps differ in shape.
    """
    scales = (sqrt_abar, sqrt_one_minus_abar, sqrt_abar_prev, sqrt_one_minus_abar_prev)
    if has_torch_function((x, eps)):
        return handle_torch_function(ddim_step, (x, eps), x, eps, *scales)
    if x.shape != eps.shape:
        raise SettingError(
            f"x {tuple(x.shape)}, eps {tuple(eps.shape)}; expected equal shapes: expand eps"
        )
    if any(isinstance(s, Tensor) for s in scales) or needs_reference(x, eps):
        return ddim_step_reference(x, eps, *scales)
    return torch.ops.fuse.ddim_step(x, eps, *scales)


def _run(x: Tensor, eps: Tensor, a: float, b: float, c: float, d: float) -> Tensor:
    scale_x, scale_eps = c / a, d - c * b / a
    return torch.add(x * scale_x, eps, alpha=scale_eps)


register(
    "ddim_step(Tensor x, Tensor eps, float sqrt_abar, float sqrt_one_minus_abar, "
    "float sqrt_abar_prev, float sqrt_one_minus_abar_prev) -> Tensor",
    general=_run,
    cpu=_run,
    fake=lambda x, eps, *scales: torch.empty_like(x),
)
