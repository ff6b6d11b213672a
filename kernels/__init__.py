"""The project's own operations as PyTorch functions, one file per op.

Each file holds the equation, the reference in plain PyTorch (the definition of right), the
Triton kernel, the registration under ``torch.ops.fuse`` and the public function. Importing this
package needs torch, and neither Triton nor a GPU; the run side reaches the same arithmetic through
``fuseengine._native`` and numpy.
"""

from fuseengine.kernels.compose_priors import compose_priors, compose_priors_reference
from fuseengine.kernels.criss_cross_attention import (
    criss_cross_attention,
    criss_cross_attention_reference,
)
from fuseengine.kernels.ddim_step import ddim_step, ddim_step_reference
from fuseengine.kernels.frames import (
    frame_in,
    frame_in_reference,
    frame_out,
    frame_out_reference,
)
from fuseengine.kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from fuseengine.kernels.joint_ddim_step import joint_ddim_step, joint_ddim_step_reference
from fuseengine.kernels.pad_reflect import crop, pad_reflect, pad_reflect_reference
from fuseengine.kernels.resample import block_mean, block_repeat
from fuseengine.kernels.warp import warp, warp_reference
from fuseengine.kernels.wiener import (
    circular_convolution,
    kernel_spectrum,
    wiener_deconvolution,
    wiener_filter,
    wiener_filter_reference,
    wiener_spectrum,
    wiener_spectrum_reference,
)
from fuseengine.kernels.ycbcr import (
    rgb_to_ycbcr,
    rgb_to_ycbcr_reference,
    ycbcr_to_rgb,
    ycbcr_to_rgb_reference,
)

__all__ = [
    "block_mean",
    "block_repeat",
    "circular_convolution",
    "compose_priors",
    "compose_priors_reference",
    "criss_cross_attention",
    "criss_cross_attention_reference",
    "crop",
    "ddim_step",
    "ddim_step_reference",
    "frame_in",
    "frame_in_reference",
    "frame_out",
    "frame_out_reference",
    "group_norm_silu",
    "group_norm_silu_reference",
    "joint_ddim_step",
    "joint_ddim_step_reference",
    "kernel_spectrum",
    "pad_reflect",
    "pad_reflect_reference",
    "rgb_to_ycbcr",
    "rgb_to_ycbcr_reference",
    "warp",
    "warp_reference",
    "wiener_deconvolution",
    "wiener_filter",
    "wiener_filter_reference",
    "wiener_spectrum",
    "wiener_spectrum_reference",
    "ycbcr_to_rgb",
    "ycbcr_to_rgb_reference",
]
