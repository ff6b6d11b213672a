"""The project's own operations as PyTorch functions, one file per op.

Each file holds the equation, the reference in plain PyTorch (the definition of right), the
registration under ``torch.ops.fuse`` and the public function. Importing this package needs torch;
the run side reaches the same arithmetic through ``fuseengine._native`` and numpy.
"""

from fuseengine.kernels.ddim_step import ddim_step, ddim_step_reference
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
    "ddim_step",
    "ddim_step_reference",
    "joint_ddim_step",
    "joint_ddim_step_reference",
    "kernel_spectrum",
    "wiener_deconvolution",
    "wiener_filter",
    "wiener_spectrum",
]
