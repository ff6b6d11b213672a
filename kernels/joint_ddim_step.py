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


# --- Triton --------------------------------------------------------------------------------------


@kernel
def joint_ddim_step_kernel(
    x,
    eps,
    mask,
    y1,
    y2,
    out,
    pixels,
    x_batch,
    x_plane,
    eps_batch,
    eps_plane,
    mask_batch,
    y1_batch,
    y2_batch,
    inverse,
    noise,
    signal_prev,
    noise_prev,
    lam,
    CODE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK pixels of all three planes of one picture.

    Planes are dense; batches and planes may lie anywhere. ``out`` is contiguous.
    """
    in_picture = tl.cdiv(pixels, BLOCK)
    batch = (tl.program_id(0) // in_picture).to(tl.int64)
    at = (tl.program_id(0) % in_picture) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels
    inverse, noise = tl.cast(inverse, tl.float32), tl.cast(noise, tl.float32)
    signal_prev, noise_prev = tl.cast(signal_prev, tl.float32), tl.cast(noise_prev, tl.float32)
    lam = tl.cast(lam, tl.float32)

    x += batch * x_batch + at
    eps += batch * eps_batch + at
    eps_a = tl.load(eps, mask=inside).to(tl.float32)
    eps_b = tl.load(eps + tl.cast(eps_plane, tl.int64), mask=inside).to(tl.float32)
    eps_f = tl.load(eps + 2 * tl.cast(eps_plane, tl.int64), mask=inside).to(tl.float32)
    a = tl.load(x, mask=inside).to(tl.float32)
    b = tl.load(x + tl.cast(x_plane, tl.int64), mask=inside).to(tl.float32)
    f = tl.load(x + 2 * tl.cast(x_plane, tl.int64), mask=inside).to(tl.float32)
    m = tl.load(mask + batch * mask_batch + at, mask=inside).to(tl.float32)
    first = tl.load(y1 + batch * y1_batch + at, mask=inside).to(tl.float32)
    second = tl.load(y2 + batch * y2_batch + at, mask=inside).to(tl.float32)

    a = (a - noise * eps_a) * inverse
    b = (b - noise * eps_b) * inverse
    f = (f - noise * eps_f) * inverse
    new_a = a - lam * (a - first)
    new_b = b - lam * (b - second)
    if CODE:
        residual = m * (new_a - first - first) + (1.0 - m) * (new_b - second - second) + f
    else:
        residual = f - m * first - (1.0 - m) * second
    new_f = f - lam * residual

    out += batch * 3 * pixels + at
    plane = tl.cast(pixels, tl.int64)
    kind = out.dtype.element_ty
    tl.store(out, (signal_prev * new_a + noise_prev * eps_a).to(kind), mask=inside)
    tl.store(out + plane, (signal_prev * new_b + noise_prev * eps_b).to(kind), mask=inside)
    tl.store(out + 2 * plane, (signal_prev * new_f + noise_prev * eps_f).to(kind), mask=inside)


def plan(
    x: Tensor,
    eps: Tensor,
    mask: Tensor,
    y1: Tensor,
    y2: Tensor,
    out: Tensor,
    numbers: tuple[float, float, float, float, float],
    form: str,
    *,
    capability: int,
    settings: dict[str, Any] | None = None,
) -> list[Launch]:
    """The launch of the op: planes dense, numbers as the op takes them, out contiguous."""
    pixels = x.shape[2] * x.shape[3]
    if settings is None:
        settings = _tuning.choose("joint_ddim_step", x.dtype, capability, x.shape[0] * pixels)
    a, b, c, d, lam = numbers
    sizes = {
        "pixels": pixels,
        "x_batch": x.stride(0),
        "x_plane": x.stride(1),
        "eps_batch": eps.stride(0),
        "eps_plane": eps.stride(1),
        "mask_batch": mask.stride(0),
        "y1_batch": y1.stride(0),
        "y2_batch": y2.stride(0),
    }
    return [
        Launch(
            kernel=joint_ddim_step_kernel,
            label=form,
            grid=(x.shape[0] * blocks(pixels, settings["block"]),),
            grid_rule="(batch * ceil(pixels / BLOCK),)",
            arguments={
                "x": x,
                "eps": eps,
                "mask": mask,
                "y1": y1,
                "y2": y2,
                "out": out,
                **sizes,
                "inverse": 1.0 / a,
                "noise": b,
                "signal_prev": c,
                "noise_prev": d,
                "lam": lam,
            },
            constants={"CODE": form == "code", "BLOCK": settings["block"]},
            num_warps=settings["num_warps"],
            multiples=tuple(sizes),
        )
    ]


def launch(
    x: Tensor,
    eps: Tensor,
    mask: Tensor,
    y1: Tensor,
    y2: Tensor,
    numbers: tuple[float, float, float, float, float],
    form: str,
    **options: Any,
) -> Tensor:
    """Run the Triton kernel; ``options`` as in :func:`plan`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        given = (planes(t.to(x.dtype)) for t in (x, eps, mask, y1, y2))
        run(plan(*given, out, numbers, form, **options), x.device)
    return out


# --- the op --------------------------------------------------------------------------------------


def _general(x, eps, mask, y1, y2, a, b, c, d, lam, form):
    return joint_ddim_step_reference(x, eps, mask, y1, y2, a, b, c, d, lam, form=form)


def _cuda(x, eps, mask, y1, y2, a, b, c, d, lam, form):
    if not usable(x, eps, mask, y1, y2) or eps.dtype != x.dtype:
        return _general(x, eps, mask, y1, y2, a, b, c, d, lam, form)
    numbers, where = (a, b, c, d, lam), device_capability(x.device)
    return launch(x, eps, mask, y1, y2, numbers, form, capability=where)


def _cpu(x, eps, mask, y1, y2, a, b, c, d, lam, form):
    if x.dtype not in NATIVE_DTYPES or any(t.dtype != x.dtype for t in (eps, mask, y1, y2)):
        return _general(x, eps, mask, y1, y2, a, b, c, d, lam, form)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    arrays = (native_array(t.contiguous()) for t in (x, eps, mask, y1, y2))
    _native.joint_ddim_step(
        *arrays,
        native_array(out),
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
    general=_cuda,
    cpu=_cpu,
    fake=lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
