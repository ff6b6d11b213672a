"""Metrics of image fusion: every one that the field prints, exact, on 8-bit pictures.

    from fuseengine.metrics import evaluate, qabf

    qabf(fused, infrared, visible)                              # one
    evaluate(fused, infrared, visible)                          # all, sharing what they share
    evaluate(fused, infrared, visible, ["MI", "SSIM"], convention="cddfuse")

Each is a function ``metric(fused, a, b)``; :data:`METRICS` lists them with title, direction, range
and source. None is a proof of a good picture by itself: noise raises EN, SF and AG, contrast
stretching raises SD and SCD.
"""

try:
    import scipy.fft  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "fuseengine.metrics needs SciPy, which is not installed; "
        "install it with: pip install 'fuseengine[metrics]'",
        name="scipy",
    ) from error

from fuseengine.metrics.contrast import q_cb, q_cv
from fuseengine.metrics.conventions import CONVENTIONS, Convention
from fuseengine.metrics.evaluation import evaluate
from fuseengine.metrics.features import fmi_dct, fmi_edge, fmi_gradient, fmi_none
from fuseengine.metrics.fidelity import vif, vif_mean, vif_u8, viff
from fuseengine.metrics.gradient import (
    labf,
    nabf,
    nabf_swapped,
    q_g,
    qabf,
    qabf_unit_range,
    qpv,
)
from fuseengine.metrics.images import grey_levels
from fuseengine.metrics.information import (
    entropy,
    mi_joint254,
    mi_nats,
    mutual_information,
    q_mi,
    q_ncie,
)
from fuseengine.metrics.phase_congruency import q_p
from fuseengine.metrics.registry import METRICS, Metric
from fuseengine.metrics.statistics import (
    ag_hw,
    average_gradient,
    correlation_coefficient,
    mse,
    psnr,
    psnr_peak_max,
    psnr_plus48,
    scd,
    sd_u8,
    sf_unit_range,
    spatial_frequency,
    standard_deviation,
)
from fuseengine.metrics.structural import (
    mef_ms_ssim,
    mef_ssim,
    ms_ssim,
    ms_ssim_x255_sum,
    q_c,
    q_e,
    q_s,
    q_w,
    q_y,
    ssim,
    ssim_range1,
    ssim_uniform7_r2_sum,
)

# fmt: off
_ORDER = (
    "EN", "SD", "SF", "AG", "CC", "SCD", "MI", "MSE", "PSNR", "VIF", "VIFF", "Qabf", "Nabf", "Labf",
    "Qpv", "SSIM", "MS_SSIM", "MEF_SSIM", "MEF_MS_SSIM", "FMI_edge", "FMI_none", "FMI_gradient",
    "FMI_dct", "Q_MI", "Q_NCIE", "Q_G", "Q_P", "Q_S", "Q_W", "Q_E", "Q_C", "Q_Y", "Q_CB", "Q_CV",
    # Forms for comparing with printed numbers.
    "SD_u8", "SF_unit_range", "AG_hw", "MI_nats", "MI_joint254", "PSNR_plus48", "PSNR_peak_max",
    "VIF_mean", "VIF_u8", "Qabf_unit_range", "Nabf_swapped", "SSIM_range1", "SSIM_uniform7_R2_sum",
    "MS_SSIM_x255_sum",
)
# fmt: on
for _key in _ORDER:
    METRICS[_key] = METRICS.pop(_key)

__all__ = [
    "CONVENTIONS",
    "METRICS",
    "Convention",
    "Metric",
    "ag_hw",
    "average_gradient",
    "correlation_coefficient",
    "entropy",
    "evaluate",
    "fmi_dct",
    "fmi_edge",
    "fmi_gradient",
    "fmi_none",
    "grey_levels",
    "labf",
    "mef_ms_ssim",
    "mef_ssim",
    "mi_joint254",
    "mi_nats",
    "ms_ssim",
    "ms_ssim_x255_sum",
    "mse",
    "mutual_information",
    "nabf",
    "nabf_swapped",
    "psnr",
    "psnr_peak_max",
    "psnr_plus48",
    "q_c",
    "q_cb",
    "q_cv",
    "q_e",
    "q_g",
    "q_mi",
    "q_ncie",
    "q_p",
    "q_s",
    "q_w",
    "q_y",
    "qabf",
    "qabf_unit_range",
    "qpv",
    "scd",
    "sd_u8",
    "sf_unit_range",
    "spatial_frequency",
    "ssim",
    "ssim_range1",
    "ssim_uniform7_r2_sum",
    "standard_deviation",
    "vif",
    "vif_mean",
    "vif_u8",
    "viff",
]
