"""One step of DDIM in one pass over memory.

    x0   = (x - sqrt(1 - abar_t) eps) / sqrt(abar_t)
    out  = sqrt(abar_{t-1}) x0 + sqrt(1 - abar_{t-1} - sigma^2) eps + sigma noise
    sigma = eta sqrt((1 - abar_{t-1}) / (1 - abar_t)) sqrt(1 - abar_t / abar_{t-1})

Song et al. 2021, equations 12 and 16; without noise sigma is 0. The step is linear,
``out = c_x x + c_eps eps + sigma noise`` with three numbers: two reads (three with noise) and one
write per element. Any shape; half precision is computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fuseengine import _native
from fuseengine.errors import SettingError
from fuseengine.kernels import _tuning
from fuseengine.kernels._library import NATIVE_DTYPES, native_array, needs_reference, register
from fuseengine.kernels._triton import Launch, blocks, device_capability, kernel, run, usable

if TYPE_CHECKING:
    import triton.language as tl


def ddim_sigma(
    sqrt_abar: float | Tensor,
    sqrt_one_minus_abar: float | Tensor,
    sqrt_abar_prev: float | Tensor,
    sqrt_one_minus_abar_prev: float | Tensor,
    eta: float,
) -> float | Tensor:
    """Sigma of a step: eta 0 is deterministic (DDIM), eta 1 is DDPM's ancestral sampling."""
    if not isinstance(sqrt_one_minus_abar, Tensor) and sqrt_one_minus_abar == 0.0:
        return 0.0  # x_t is clean: there is no noise to draw anew
    rest = 1.0 - (sqrt_abar / sqrt_abar_prev) ** 2
    # Equal or ascending abar (a step that goes nowhere) has no noise to add.
    rest = rest.clamp_min(0.0) if isinstance(rest, Tensor) else max(rest, 0.0)
    return eta * sqrt_one_minus_abar_prev / sqrt_one_minus_abar * rest**0.5


def ddim_step_reference(
    x: Tensor,
    eps: Tensor,
    sqrt_abar: float | Tensor,
    sqrt_one_minus_abar: float | Tensor,
    sqrt_abar_prev: float | Tensor,
    sqrt_one_minus_abar_prev: float | Tensor,
    noise: Tensor | None = None,
    eta: float = 1.0,
) -> Tensor:
    """The definition of :func:`ddim_step`, differentiable in every argument."""
    x0 = (x - sqrt_one_minus_abar * eps) / sqrt_abar
    if noise is None:
        return sqrt_abar_prev * x0 + sqrt_one_minus_abar_prev * eps
    sigma = ddim_sigma(
        sqrt_abar, sqrt_one_minus_abar, sqrt_abar_prev, sqrt_one_minus_abar_prev, eta
    )
    direction = (sqrt_one_minus_abar_prev**2 - sigma**2) ** 0.5
    return sqrt_abar_prev * x0 + direction * eps + sigma * noise


def ddim_step(
    x: Tensor,
    eps: Tensor,
    sqrt_abar: float | Tensor,
    sqrt_one_minus_abar: float | Tensor,
    sqrt_abar_prev: float | Tensor,
    sqrt_one_minus_abar_prev: float | Tensor,
    noise: Tensor | None = None,
    eta: float = 1.0,
) -> Tensor:
    """Go from x_t to x_{t-1}; see the module's docstring for the equation.

    Args:
        x: x_t, any shape, floating point.
        eps: predicted noise, x's shape and dtype.
        sqrt_abar: sqrt(abar_t) > 0. Tensor coefficients (training) take the reference's path.
        sqrt_one_minus_abar: sqrt(1 - abar_t).
        sqrt_abar_prev: sqrt(abar_{t-1}).
        sqrt_one_minus_abar_prev: sqrt(1 - abar_{t-1}).
        noise: standard normal numbers of x's shape for a stochastic step; None for none.
        eta: how much of them, from 0 (DDIM) to 1 (DDPM); not used without noise.

    Returns:
        x_{t-1}, x's shape and dtype.

    Raises:
        SettingError: shapes differ, or eta is outside 0..1.
    """
    scales = (sqrt_abar, sqrt_one_minus_abar, sqrt_abar_prev, sqrt_one_minus_abar_prev)
    tensors = (x, eps) if noise is None else (x, eps, noise)
    if has_torch_function(tensors):
        # Only what was given: a tracer that knows the short form sees the short form.
        extra = () if noise is None else (noise, eta)
        return handle_torch_function(ddim_step, tensors, x, eps, *scales, *extra)
    if x.shape != eps.shape:
        raise SettingError(
            f"x {tuple(x.shape)}, eps {tuple(eps.shape)}; expected equal shapes: expand eps"
        )
    if noise is not None and noise.shape != x.shape:
        raise SettingError(
            f"x {tuple(x.shape)}, noise {tuple(noise.shape)}; expected equal shapes: draw noise "
            "with torch.randn_like(x)"
        )
    if not 0.0 <= eta <= 1.0:
        raise SettingError(f"eta={eta}; expected 0 (deterministic) to 1 (ancestral sampling)")
    if any(isinstance(s, Tensor) for s in scales) or needs_reference(*tensors):
        return ddim_step_reference(x, eps, *scales, noise, eta)
    if noise is None:
        return torch.ops.fuse.ddim_step(x, eps, *scales)
    return torch.ops.fuse.ddim_step(x, eps, *scales, noise, ddim_sigma(*scales, eta))


def _direction(d: float, sigma: float) -> float:
    """sqrt(1 - abar_{t-1} - sigma^2); one rounding may leave it a little below zero."""
    return math.sqrt(max(d * d - sigma * sigma, 0.0)) if sigma else d


def _coefficients(a: float, b: float, c: float, d: float, sigma: float) -> tuple[float, float]:
    """Of x and of eps."""
    return c / a, _direction(d, sigma) - c * b / a


# --- Triton --------------------------------------------------------------------------------------


@kernel
def ddim_step_kernel(
    x,
    eps,
    noise,
    out,
    count,
    scale_x,
    scale_eps,
    sigma,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK elements of out; ``noise`` may be None. ``out`` may be any of the inputs."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.cast(scale_x, tl.float32) * tl.load(x + at, mask=inside).to(tl.float32)
    value += tl.cast(scale_eps, tl.float32) * tl.load(eps + at, mask=inside).to(tl.float32)
    if noise is not None:
        value += tl.cast(sigma, tl.float32) * tl.load(noise + at, mask=inside).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def plan(
    x: Tensor,
    eps: Tensor,
    noise: Tensor | None,
    out: Tensor,
    coefficients: tuple[float, float, float],
    *,
    capability: int,
    settings: dict[str, Any] | None = None,
) -> list[Launch]:
    """The launch of the op: tensors with one dense memory order, coefficients c_x, c_eps, sigma."""
    count = x.numel()
    if settings is None:
        settings = _tuning.choose("ddim_step", x.dtype, capability, count)
    scale_x, scale_eps, sigma = coefficients
    return [
        Launch(
            kernel=ddim_step_kernel,
            label="plain" if noise is None else "noise",
            grid=(blocks(count, settings["block"]),),
            grid_rule="(ceil(count / BLOCK),)",
            arguments={
                "x": x,
                "eps": eps,
                "noise": noise,
                "out": out,
                "count": count,
                "scale_x": scale_x,
                "scale_eps": scale_eps,
                "sigma": sigma,
            },
            constants={"BLOCK": settings["block"]},
            num_warps=settings["num_warps"],
            multiples=("count",),
        )
    ]


def launch(
    x: Tensor,
    eps: Tensor,
    noise: Tensor | None,
    coefficients: tuple[float, float, float],
    **options: Any,
) -> Tensor:
    """Run the Triton kernel; ``options`` as in :func:`plan`."""
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    # The kernel walks through memory: operands in out's order and dtype are taken as they are.
    given = [
        t if t is None or (t.stride(), t.dtype) == (out.stride(), out.dtype) else _like(t, out)
        for t in (x, eps, noise)
    ]
    run(plan(*given, out, coefficients, **options), x.device)
    return out


def _like(x: Tensor, out: Tensor) -> Tensor:
    return torch.empty_like(out).copy_(x)


# --- the op --------------------------------------------------------------------------------------


def _cpu(x, eps, a, b, c, d, noise=None, sigma=0.0):
    tensors = [t for t in (x, eps, noise) if t is not None]
    plain = x.dtype in NATIVE_DTYPES and all(
        t.dtype == x.dtype and t.ndim and t.is_contiguous() for t in tensors
    )
    if plain and x.numel() and hasattr(_native, "ddim_step"):
        out = torch.empty_like(x)
        arrays = (t if t is None else native_array(t) for t in (x, eps, noise))
        _native.ddim_step(
            *arrays,
            native_array(out),
            sqrt_abar=a,
            sqrt_one_minus_abar=b,
            sqrt_abar_prev=c,
            direction=_direction(d, sigma),
            sigma=sigma,
        )
        return out
    return _general(x, eps, a, b, c, d, noise, sigma)


def _general(x, eps, a, b, c, d, noise, sigma):
    scale_x, scale_eps = _coefficients(a, b, c, d, sigma)
    out = torch.add(x * scale_x, eps, alpha=scale_eps)
    return out if noise is None else torch.add(out, noise, alpha=sigma)


def _cuda(x, eps, a, b, c, d, noise=None, sigma=0.0):
    if not usable(x, eps, noise) or eps.dtype != x.dtype:
        return _general(x, eps, a, b, c, d, noise, sigma)
    coefficients = (*_coefficients(a, b, c, d, sigma), sigma)
    return launch(x, eps, noise, coefficients, capability=device_capability(x.device))


register(
    "ddim_step(Tensor x, Tensor eps, float sqrt_abar, float sqrt_one_minus_abar, "
    "float sqrt_abar_prev, float sqrt_one_minus_abar_prev, Tensor? noise=None, "
    "float sigma=0.0) -> Tensor",
    general=_cuda,
    cpu=_cpu,
    fake=lambda x, *rest: torch.empty_like(x),
)
