"""The scales on which papers and public programs print the metrics.

Two tables that say "MI" or "SSIM" may hold different things: bits or nats, a mean or a sum over
the sources, a program's slip that everybody copied. A convention names, for the keys concerned, the
form to compute instead of the default. Values are comparable only within one convention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fuseengine.errors import UnknownNameError


@dataclasses.dataclass(frozen=True)
class Convention:
    """Whose scale.

    Attributes:
        name: to ask for it.
        about: whose it is, and how sure the identification is.
        variants: metric key -> key of the form computed instead; defaults are not listed.
        prints: the metrics of the paper's table, in our keys; empty for a program.
    """

    name: str
    about: str
    variants: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prints: tuple[str, ...] = ()

    def variant(self, key: str) -> str:
        """The key that is computed where `key` is asked for."""
        return self.variants.get(key, key)


_LIST = (
    Convention("default", "the definitions of this package, nothing changed"),
    Convention(
        "matlab",
        "the MATLAB code of Evaluation-for-Image-Fusion since March 2023, as it runs: the peak of "
        "PSNR is 255 for errors on 0..1, levels 254 and 255 fall together in MI's joint "
        "histogram, SSIM takes a range of 1, Nabf gets its arguments in the wrong order",
        {
            "PSNR": "PSNR_plus48",
            "MI": "MI_joint254",
            "SSIM": "SSIM_range1",
            "Nabf": "Nabf_swapped",
        },
    ),
    Convention(
        "matlab-2022",
        "the same code before March 2023 and the spreadsheet published with it: SD and VIF in "
        "saturating 8-bit arithmetic, SF and Qabf on 0..1",
        {
            "PSNR": "PSNR_plus48",
            "MI": "MI_joint254",
            "SD": "SD_u8",
            "VIF": "VIF_u8",
            "SF": "SF_unit_range",
            "Qabf": "Qabf_unit_range",
        },
    ),
    Convention(
        "cddfuse",
        "the Python evaluator of CDDFuse: MI in nats, AG over H times W, PSNR with the peak "
        "max(F), SSIM of a uniform 7x7 window with range 2, summed",
        {
            "MI": "MI_nats",
            "AG": "AG_hw",
            "PSNR": "PSNR_peak_max",
            "SSIM": "SSIM_uniform7_R2_sum",
        },
        ("EN", "SD", "SF", "MI", "SCD", "VIF", "Qabf", "SSIM"),
    ),
    Convention(
        "dmnet",
        "DMNet's tables (90 % sure): MS-SSIM of pictures scaled by 255 twice, summed",
        {"MS_SSIM": "MS_SSIM_x255_sum"},
        ("EN", "SF", "AG", "SD", "CC", "SCD", "MI", "VIF", "Qabf", "MS_SSIM"),
    ),
    Convention(
        "dmfuse",
        "DMFuse's tables: MS-SSIM is Ma et al.'s for exposure fusion (90 %), its FMI of pixels is "
        "FMI of edges (95 %), VIF the mean of the sources (65 %); its Qe is not identified",
        {"MS_SSIM": "MEF_MS_SSIM", "FMI_none": "FMI_edge", "VIF": "VIF_mean"},
        ("EN", "SD", "Q_P", "FMI_none", "Qabf", "MS_SSIM", "VIF"),
    ),
    Convention(
        "drmf",
        "DRMF's tables: the defaults (85 % and more); VIF is the sum although it cites VIFF",
        prints=("MI", "SF", "SD", "VIF"),
    ),
    Convention(
        "mask-difuser",
        "Mask-DiFuser's tables: the defaults (95 %); its perceptual index needs trained data and "
        "is not computed here",
        prints=("EN", "AG", "SF", "SD", "SCD"),
    ),
    Convention(
        "drfusion",
        "DRFusion's tables: the defaults (95 %, the last two 85 %)",
        prints=("Q_MI", "Q_NCIE", "Q_G", "Q_P", "Q_CB", "Q_Y"),
    ),
)

CONVENTIONS: dict[str, Convention] = {convention.name: convention for convention in _LIST}
"""Every convention by name."""


def find_convention(name: str) -> Convention:
    """The convention of a name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in CONVENTIONS:
        raise UnknownNameError("convention", name, CONVENTIONS)
    return CONVENTIONS[name]
