"""When a result in a low precision is good enough."""

from __future__ import annotations

import torch


def within(found, exact, plain, *, floor=4.0):
    """At most twice the error of plain PyTorch in the same dtype, both against float64.

    The floor, in units of the dtype's rounding of the largest value, is for inputs that plain
    PyTorch gets right by luck, and for another order of the same sums.
    """
    assert found.shape == exact.shape, (found.shape, exact.shape)
    if found.numel() == 0:
        return
    assert torch.isfinite(found).all(), "an element was not written, or overflowed"
    scale = max(1.0, float(exact.abs().max()))
    allowed = 2 * float((plain - exact).abs().max()) + floor * torch.finfo(found.dtype).eps * scale
    error = float((found - exact).abs().max())
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
