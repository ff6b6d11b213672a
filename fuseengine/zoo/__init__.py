"""The packaged models: weights as safetensors, a model card as JSON beside them (no torch here)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

FAMILIES = (
    "drfusion",
    "drfusion-m",
    "drfusion-s",
    "dmfuse",
    "dmfuse-s",
    "drmf",
    "drmf-s",
    "dmnet",
    "dmnet-s",
    "mask-difuser",
    "mask-difuser-s",
)
"""Every name that ``build`` knows, with or without packaged weights."""

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class PackagedModel:
    """One packaged model as its card tells.

    Attributes:
        name: what ``load_model`` takes.
        weights: path of the safetensors file.
        settings: keyword arguments of ``build`` that differ from the named configuration.
        channels: "luma" or "rgb".
        multiple: frames are padded to a multiple of this.
        steps: sampling steps.
        parameters: number of trained parameters.
        card: the whole card: data, steps, losses, results, limits.
    """

    name: str
    weights: Path
    settings: dict[str, Any]
    channels: str
    multiple: int
    steps: int
    parameters: int
    card: dict[str, Any] = field(repr=False)


def unpackaged_hint(name: str) -> str:
    """What to do about a model that can be built but has no packaged weights; else empty."""
    if name not in FAMILIES:
        return ""
    return (
        f" The weights of {name!r} are not packaged: use fe.build({name!r}) with a checkpoint "
        "(fe.load_checkpoint), or train it."
    )


@cache
def packaged_models() -> dict[str, PackagedModel]:
    """Every packaged model by name."""
    models = {}
    for path in sorted(_FOLDER.glob("*.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        models[card["name"]] = PackagedModel(
            name=card["name"],
            weights=path.with_suffix(".safetensors"),
            settings=card["settings"],
            channels=card["channels"],
            multiple=card["multiple"],
            steps=card["steps"],
            parameters=card["parameters"],
            card=card,
        )
    return models
