"""Block means and their pseudo-inverse: DRFusion's low-resolution observation.

    block_mean:   out[i, j] = mean of the s x s block at (s i, s j)
    block_repeat: out[i, j] = x[i // s, j // s]

An exact Moore-Penrose pair (paper's appendix C, "PatchUpsample").
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fuseengine.errors import SettingError


def block_mean(x: Tensor, scale: int) -> Tensor:
    """Average pooling: (N, C, H, W) -> (N, C, H / scale, W / scale).

    Raises:
        SettingError: H or W is no multiple of scale.
    """
    if has_torch_function((x,)):
        return handle_torch_function(block_mean, (x,), x, scale)
    if x.shape[-2] % scale or x.shape[-1] % scale:
        raise SettingError(
            f"height and width {tuple(x.shape[-2:])}; expected multiples of {scale}: pad first"
        )
    return F.avg_pool2d(x, scale)


def block_repeat(x: Tensor, scale: int) -> Tensor:
    """Each value repeated over its cell: (N, C, H, W) -> (N, C, H * scale, W * scale)."""
    if has_torch_function((x,)):
        return handle_torch_function(block_repeat, (x,), x, scale)
    return F.interpolate(x, scale_factor=scale, mode="nearest")
