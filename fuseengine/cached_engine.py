"""Compiled engines in the cache: their keys, and what an entry holds.

An entry holds the engine's description, the program's constants, and the networks as ONNX where a
chosen backend takes that; so an engine of a packaged model loads without PyTorch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fuseengine import cache
from fuseengine.description import Description, variant_from_dict, variant_to_dict
from fuseengine.engine import Engine
from fuseengine.errors import BundleError, CacheError, CaptureError, UnknownNameError
from fuseengine.program import Program
from fuseengine.runtime import tensors
from fuseengine.search import Settings
from fuseengine.stages import CachedStages, ModelStages
from fuseengine.zoo import packaged_models, unpackaged_hint

if TYPE_CHECKING:
    from torch import nn

    from fuseengine.export.merged import MergedStages

log = logging.getLogger("fuseengine")


def named_key(name: str, settings: Settings) -> str:
    """Key of a packaged model's engine, made without PyTorch.

    Raises:
        UnknownNameError: no such packaged model.
    """
    packaged = packaged_models()
    if name not in packaged:
        raise UnknownNameError("packaged model", name, packaged, hint=unpackaged_hint(name))
    model = packaged[name]
    weights = np.frombuffer(model.weights.read_bytes(), dtype=np.uint8)
    card = json.dumps(model.settings, sort_keys=True)
    content = cache.fingerprint([("weights", weights)], name, card)
    return cache.key_of({"model": content, **vars(settings)})


def content_key(program: Program, stages: ModelStages, settings: Settings) -> str:
    """Key of what was really captured; empty where the networks cannot be written quickly."""
    from fuseengine.export.onnx import UnsupportedLayerError

    try:
        networks = [(v.label, stages.onnx(v, fallback=False)) for v in program.variants()]
    except UnsupportedLayerError:
        return ""
    arrays = [(label, np.frombuffer(content, dtype=np.uint8)) for label, content in networks]
    content = cache.fingerprint([*arrays, *program.constants.items()], program.to_json())
    return cache.key_of({"content": content, **vars(settings)})


def store(key: str, description: Description, stages: ModelStages | MergedStages) -> None:
    """Write an entry; a cache that cannot be written is a warning, not an error."""
    networks = []
    files = {"constants.safetensors": tensors.pack(description.constants)}
    for index, (variant, kind, content) in enumerate(stages.networks(description.choice)):
        files[f"{index}.onnx"] = content
        networks.append({**variant_to_dict(variant), "kind": kind, "file": f"{index}.onnx"})
    files["engine.json"] = json.dumps({**description.to_dict(), "networks": networks}).encode()
    try:
        cache.store(key, files)
    except CacheError as error:
        log.warning("%s", error)


def load(key: str, settings: Settings, make: Callable[[], nn.Module]) -> Engine | None:
    """The engine of an entry.

    Args:
        key: from :func:`named_key` or :func:`content_key`.
        settings: what was asked for.
        make: gives the model, for a backend that needs its module.

    Returns:
        The engine, or None when there is no entry or it cannot be read.
    """
    files = cache.load(key)
    if files is None:
        return None
    try:
        data = json.loads(files["engine.json"])
        constants = tensors.unpack(files["constants.safetensors"])
        description = Description.from_dict(data, constants)
        networks = {
            kind: {
                variant_from_dict(entry): files[entry["file"]]
                for entry in data["networks"]
                if entry["kind"] == kind
            }
            for kind in ("fp32", "int8")
        }
    except (KeyError, ValueError, TypeError, CaptureError, BundleError) as error:
        log.warning("cache entry %s is unreadable (%r) and compiled again", key, error)
        cache.discard(key)
        return None
    return Engine(
        description.program,
        CachedStages(networks["fp32"], make, networks["int8"], settled=settings.size is not None),
        description.choice,
        replace(description.report, from_cache=True),
        size=settings.size,
        device=settings.device,
        threads=settings.threads,
        resumed=description.resumed,
    )
