"""One sampling step of DRMF: two modalities' noise estimates weighted, then the DDIM mean.

    e    = w e_a + (1 - w) e_b
    x0   = (x - sqrt(1 - abar_t) e) / sqrt(abar_t)
    out  = sqrt(abar_{t-1}) x0                                     form "code"
    out  = sqrt(abar_{t-1}) x0 + sqrt(1 - abar_{t-1}) e            form "paper"

DRMF (Tang et al., "DRMF: Degradation-Robust Multi-Modal Image Fusion via Composable Diffusion
Prior", ACM MM 2024), equation 9 with weights that add up to one and without added noise. The
public code Linfeng-Tang/DRMF drops the noise direction in every fusion sampler, training included,
so its weights belong to "code".

x, e_a, e_b and out are (N, C, H, W), w is (N, 1, H, W). Per pixel 3 C + 1 reads and C writes; half
precision is computed in float32 and rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fuseengine import _native
from fuseengine.errors import SettingError
from fuseengine.kernels import _tuning
from fuseengine.kernels._library import NATIVE_DTYPES, native_array, needs_reference, register
from fuseengine.kernels._triton import (
    Launch,
    blocks,
    device_capability,
    kernel,
    planes,
    run,
    usable,
)

if TYPE_CHECKING:
    import triton.language as tl

FORMS = ("code", "paper")


def compose_priors_reference(
    x: Tensor,
    eps_a: Tensor,
    eps_b: Tensor,
    weight: Tensor,
    sqrt_abar: float | Tensor,
    sqrt_one_minus_abar: float | Tensor,
    sqrt_abar_prev: float | Tensor,
    sqrt_one_minus_abar_prev: float | Tensor,
    *,
    form: str = "code",
) -> Tensor:
    """The definition of :func:`compose_priors`, differentiable in every argument."""
    eps = weight * eps_a + (1.0 - weight) * eps_b
    x0 = (x - sqrt_one_minus_abar * eps) / sqrt_abar
    if form == "code":
        return sqrt_abar_prev * x0
    return sqrt_abar_prev * x0 + sqrt_one_minus_abar_prev * eps


def compose_priors(
    x: Tensor,
    eps_a: Tensor,
    eps_b: Tensor,
    weight: Tensor,
    sqrt_abar: float | Tensor,
    sqrt_one_minus_abar: float | Tensor,
    sqrt_abar_prev: float | Tensor,
    sqrt_one_minus_abar_prev: float | Tensor,
    *,
    form: str = "code",
) -> Tensor:
    """Go from x_t to x_{t-1}; see the module's docstring for the equation.

    Args:
        x: x_t, (N, C, H, W), floating point.
        eps_a: noise predicted from modality A, x's shape and dtype.
        eps_b: noise predicted from modality B, x's shape and dtype.
        weight: weight of A in [0, 1], (N, 1, H, W), x's dtype.
        sqrt_abar: sqrt(abar_t) > 0. Tensor coefficients (training) take the reference's path.
        sqrt_one_minus_abar: sqrt(1 - abar_t).
        sqrt_abar_prev: sqrt(abar_{t-1}).
        sqrt_one_minus_abar_prev: sqrt(1 - abar_{t-1}); not used by "code".
        form: "code" or "paper".

    Returns:
        x_{t-1}, x's shape and dtype, contiguous.

    Raises:
        SettingError: unknown form, or shapes or dtypes that do not go together.
    """
    tensors = (x, eps_a, eps_b, weight)
    numbers = (sqrt_abar, sqrt_one_minus_abar, sqrt_abar_prev, sqrt_one_minus_abar_prev)
    if has_torch_function(tensors):
        return handle_torch_function(compose_priors, tensors, *tensors, *numbers, form=form)
    _check(x, eps_a, eps_b, weight, form)
    if any(isinstance(n, Tensor) for n in numbers) or needs_reference(*tensors):
        return compose_priors_reference(*tensors, *numbers, form=form)
    return torch.ops.fuse.compose_priors(*tensors, *numbers, form)


def _check(x: Tensor, eps_a: Tensor, eps_b: Tensor, weight: Tensor, form: str) -> None:
    if form not in FORMS:
        raise SettingError(f"form={form!r}; expected one of {FORMS}")
    if x.ndim != 4:
        raise SettingError(
            f"x {tuple(x.shape)}; expected (N, C, H, W): add dimensions with x[None]"
        )
    single = (x.shape[0], 1, *x.shape[2:])
    named = (("eps_a", eps_a, x.shape), ("eps_b", eps_b, x.shape), ("weight", weight, single))
    for name, tensor, shape in named:
        if tuple(tensor.shape) != tuple(shape):
            raise SettingError(
                f"{name} {tuple(tensor.shape)}; expected {tuple(shape)} to go with x "
                f"{tuple(x.shape)}: resize or expand it"
            )
        if tensor.dtype != x.dtype or not x.dtype.is_floating_point:
            raise SettingError(
                f"{name} {tensor.dtype}, x {x.dtype}; expected one floating-point dtype: "
                "convert with x.to(dtype)"
            )


# --- Triton --------------------------------------------------------------------------------------


@kernel
def compose_priors_kernel(
    x,
    eps_a,
    eps_b,
    weight,
    out,
    pixels,
    channels,
    x_batch,
    x_plane,
    a_batch,
    a_plane,
    b_batch,
    b_plane,
    weight_batch,
    scale_x,
    scale_eps,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK pixels of all planes of one picture: the weight is read once.

    Planes are dense; batches and planes may lie anywhere. ``out`` is contiguous.
    """
    in_picture = tl.cdiv(pixels, BLOCK)
    batch = (tl.program_id(0) // in_picture).to(tl.int64)
    at = (tl.program_id(0) % in_picture) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels
    scale_x, scale_eps = tl.cast(scale_x, tl.float32), tl.cast(scale_eps, tl.float32)
    w = tl.load(weight + batch * weight_batch + at, mask=inside).to(tl.float32)
    for channel in range(channels):
        plane = tl.cast(channel, tl.int64)
        value = tl.load(x + batch * x_batch + plane * x_plane + at, mask=inside).to(tl.float32)
        a = tl.load(eps_a + batch * a_batch + plane * a_plane + at, mask=inside).to(tl.float32)
        b = tl.load(eps_b + batch * b_batch + plane * b_plane + at, mask=inside).to(tl.float32)
        value = scale_x * value + scale_eps * (w * a + (1.0 - w) * b)
        target = out + (batch * channels + plane) * pixels + at
        tl.store(target, value.to(out.dtype.element_ty), mask=inside)


def plan(
    x: Tensor,
    eps_a: Tensor,
    eps_b: Tensor,
    weight: Tensor,
    out: Tensor,
    coefficients: tuple[float, float],
    *,
    capability: int,
    settings: dict[str, Any] | None = None,
) -> list[Launch]:
    """The launch of the op: planes dense, coefficients of x and of the weighted noise."""
    batch, channels = x.shape[:2]
    pixels = x.shape[2] * x.shape[3]
    if settings is None:
        settings = _tuning.choose("compose_priors", x.dtype, capability, batch * pixels)
    strides = {
        "x_batch": x.stride(0),
        "x_plane": x.stride(1),
        "a_batch": eps_a.stride(0),
        "a_plane": eps_a.stride(1),
        "b_batch": eps_b.stride(0),
        "b_plane": eps_b.stride(1),
        "weight_batch": weight.stride(0),
    }
    return [
        Launch(
            kernel=compose_priors_kernel,
            label="plain",
            grid=(batch * blocks(pixels, settings["block"]),),
            grid_rule="(batch * ceil(pixels / BLOCK),)",
            arguments={
                "x": x,
                "eps_a": eps_a,
                "eps_b": eps_b,
                "weight": weight,
                "out": out,
                "pixels": pixels,
                "channels": channels,
                **strides,
                "scale_x": coefficients[0],
                "scale_eps": coefficients[1],
            },
            constants={"BLOCK": settings["block"]},
            num_warps=settings["num_warps"],
            multiples=("pixels", *strides),
        )
    ]


def launch(
    x: Tensor,
    eps_a: Tensor,
    eps_b: Tensor,
    weight: Tensor,
    coefficients: tuple[float, float],
    **options: Any,
) -> Tensor:
    """Run the Triton kernel; ``options`` as in :func:`plan`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        given = (planes(t) for t in (x, eps_a, eps_b, weight))
        run(plan(*given, out, coefficients, **options), x.device)
    return out


def coefficients(a: float, b: float, c: float, d: float, form: str) -> tuple[float, float]:
    """Of x and of the weighted noise: the step is linear in both."""
    return c / a, (d if form == "paper" else 0.0) - c * b / a


# --- the op --------------------------------------------------------------------------------------


def _cpu(x, eps_a, eps_b, weight, a, b, c, d, form):
    if x.dtype not in NATIVE_DTYPES or not x.numel() or not hasattr(_native, "compose_priors"):
        return _general(x, eps_a, eps_b, weight, a, b, c, d, form)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    arrays = (native_array(t.contiguous()) for t in (x, eps_a, eps_b, weight))
    _native.compose_priors(
        *arrays,
        native_array(out),
        sqrt_abar=a,
        sqrt_one_minus_abar=b,
        sqrt_abar_prev=c,
        direction=d if form == "paper" else 0.0,
    )
    return out


def _general(x, eps_a, eps_b, weight, a, b, c, d, form):
    scale_x, scale_eps = coefficients(a, b, c, d, form)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.lerp(eps_b.to(wide), eps_a.to(wide), weight.to(wide)).mul_(scale_eps)
    return out.add_(x, alpha=scale_x).to(x.dtype).contiguous()


def _cuda(x, eps_a, eps_b, weight, a, b, c, d, form):
    if not usable(x, eps_a, eps_b, weight):
        return _general(x, eps_a, eps_b, weight, a, b, c, d, form)
    numbers, where = coefficients(a, b, c, d, form), device_capability(x.device)
    return launch(x, eps_a, eps_b, weight, numbers, capability=where)


register(
    "compose_priors(Tensor x, Tensor eps_a, Tensor eps_b, Tensor weight, float sqrt_abar, "
    "float sqrt_one_minus_abar, float sqrt_abar_prev, float sqrt_one_minus_abar_prev, "
    "str form) -> Tensor",
    general=_cuda,
    cpu=_cpu,
    fake=lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
