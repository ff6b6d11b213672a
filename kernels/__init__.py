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
from fuseengine.kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from fuseengine.kernels.joint_ddim_step import joint_ddim_step, joint_ddim_step_reference
from fuseengine.kernels.resample import block_mean, block_repeat
from fuseengine.kernels.wiener import (
    circular_convolution,
    kernel_spectrum,
    wiener_deconvolution,
    wiener_filter,
    wiener_spectrum,
)

__all__ = [
    "block_mean",
    "block_repeat",
    "circular_convolution",
    "compose_priors",
    "compose_priors_reference",
    "criss_cross_attention",
    "criss_cross_attention_reference",
    "ddim_step",
    "ddim_step_reference",
    "group_norm_silu",
    "group_norm_silu_reference",
    "joint_ddim_step",
    "joint_ddim_step_reference",
    "kernel_spectrum",
    "wiener_deconvolution",
    "wiener_filter",
    "wiener_spectrum",
]
