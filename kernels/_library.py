"""Registration of the project's ops under ``torch.ops.fuse``.

``Library.define`` and ``impl`` cost about 1 us a call, ``custom_op`` about 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import library as torch_library

_library = torch_library.Library("fuse", "DEF")


def register(
    schema: str,
    *,
    general: Callable[..., Tensor],
    cpu: Callable[..., Tensor],
    fake: Callable[..., Tensor],
) -> None:
    """Define one op.

    Args:
        schema: the op's name and signature in torch's schema language.
        general: implementation for every device (autograd does not see through it).
        cpu: implementation for CPU tensors.
        fake: result of the right shape, dtype and device without computing, for tracing.
    """
    _library.define(schema)
    name = schema.split("(", 1)[0]
    _library.impl(name, general, "CUDA")
    _library.impl(name, cpu, "CPU")
    torch_library.register_fake(f"fuse::{name}", fake, lib=_library)


def needs_reference(*arguments: object) -> bool:
    """Whether gradients are wanted: then the differentiable reference is run instead of the op."""
    return torch.is_grad_enabled() and any(
        isinstance(a, Tensor) and a.requires_grad for a in arguments
    )


def native_array(x: Tensor) -> NDArray[Any]:
    """A CPU tensor as the native kernels take it: a view, bfloat16 as its bits in uint16."""
    x = x.detach()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What native kernels keep in memory; they compute in float32."""
