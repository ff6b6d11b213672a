"""The families of models by name: build one, or load one with its packaged weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fuseengine.errors import SettingError, UnknownNameError
from fuseengine.models.base import FusionModel
from fuseengine.models.checkpoint import load_checkpoint
from fuseengine.models.dmfuse import DMFuse
from fuseengine.models.dmnet import DMNet
from fuseengine.models.drfusion import DRFusion
from fuseengine.models.drmf import DRMF
from fuseengine.models.mask_difuser import MaskDiFuser
from fuseengine.zoo import packaged_models, unpackaged_hint

_BUILDERS: dict[str, tuple[Callable[..., FusionModel], dict[str, Any]]] = {
    "drfusion": (DRFusion, {}),
    "drfusion-m": (
        DRFusion,
        {
            "width": 32,
            "blocks": 2,
            "groups": 8,
            "dropout": 0.0,
            "patch": 2,
            "correct_last": False,
        },
    ),
    "drfusion-s": (
        DRFusion,
        {
            "width": 16,
            "blocks": 1,
            "groups": 4,
            "dropout": 0.0,
            "patch": 2,
            "correct_last": False,
        },
    ),
    "dmfuse": (DMFuse, {}),
    "dmfuse-s": (
        DMFuse,
        {
            "width": 16,
            "multipliers": (1, 1.5, 2, 4),
            "blocks": 1,
            "attention": (),
            "groups": 4,
            "dropout": 0.0,
            "head_width": 16,
            "patch": 2,
            "padding": "reflect",
            "residual": True,
        },
    ),
    "drmf": (DRMF, {}),
    "drmf-s": (
        DRMF,
        {
            "update": "paper",
            "predict": "clean",
            "scaling": "clamp",
            "width": 16,
            "weight_width": 16,
            "multipliers": (1, 1.5, 2, 4),
            "blocks": 1,
            "attention": (),
            "groups": 4,
            "patch": 2,
            "weight_patch": 4,
        },
    ),
    "dmnet": (DMNet, {}),
    "dmnet-s": (
        DMNet,
        {
            "width": 32,
            "layers": (3, 2, 2),
            "heads": 4,
            "unet_width": 16,
            "multipliers": (1, 2, 3, 4),
            "blocks": 1,
            "groups": 4,
            "dropout": 0.0,
            "patch": 2,
            "unet_patch": 2,
        },
    ),
    "mask-difuser": (MaskDiFuser, {}),
    "mask-difuser-s": (
        MaskDiFuser,
        {
            "predict": "correction",
            "scaling": "clamp",
            "width": 16,
            "content_width": 16,
            "content_blocks": 2,
            "semantic_widths": (16, 32, 48, 64),
            "semantic_layers": 2,
            "attention": (3,),
            "blocks": 1,
            "groups": 4,
            "dropout": 0.0,
            "patch": 2,
        },
    ),
}


def model_names() -> list[str]:
    """Names that :func:`build` knows."""
    return list(_BUILDERS)


def build(name: str, **settings: Any) -> FusionModel:
    """A randomly initialised model.

    Args:
        name: one of :func:`model_names`; the plain family name has the official size.
        **settings: keyword arguments of the model's class that replace the named configuration's.

    Returns:
        The model, in evaluation mode.

    Raises:
        UnknownNameError: unknown name.
        SettingError: a setting that the model does not have, or with a value it refuses.
    """
    if name not in _BUILDERS:
        raise UnknownNameError("model", name, _BUILDERS)
    cls, defaults = _BUILDERS[name]
    merged = {**defaults, **settings}
    try:
        model = cls(**merged)
    except TypeError as error:
        raise SettingError(f"{name}: {error}; see the docstring of {cls.__name__}") from error
    model.name, model.settings = name, merged
    return model.eval()


def load_model(name: str, **settings: Any) -> FusionModel:
    """A model with its packaged, trained weights.

    Args:
        name: one of the names that ``fuseengine models`` marks as packaged.
        **settings: of the model's class that change no weight's shape, such as ``steps`` or
            ``seed``; the model's card says what fewer steps cost.

    Returns:
        The model on the CPU in float32, in evaluation mode.

    Raises:
        UnknownNameError: no such model, or no weights for it are packaged.
        SettingError: a setting that the model does not have, or with a value it refuses.
        CheckpointError: a setting with which the packaged weights do not fit.
    """
    packaged = packaged_models()
    if name not in packaged:
        raise UnknownNameError("packaged model", name, packaged, hint=unpackaged_hint(name))
    model = build(name, **{**packaged[name].settings, **settings})
    load_checkpoint(model, packaged[name].weights)
    return model
