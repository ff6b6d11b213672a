"""Reading weights into models: the project's own files and the official checkpoints.

Loading never runs code from a file: safetensors, or ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import argparse
import difflib
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuseengine.errors import CheckpointError
from fuseengine.models.base import FusionModel

_WRAPPERS = ("state_dict", "model", "model_state_dict", "params", "net")


def load_checkpoint(
    model: FusionModel, source: str | Path | Mapping[str, Any], *, strict: bool = True
) -> FusionModel:
    """Load weights into a model, in place.

    Args:
        model: the model to fill; its dtype and device stay.
        source: a path (``.safetensors``, ``.pth``, ``.pt``, ``.pkl``, ``.model``) or an already
            loaded name -> tensor mapping, with the project's own or the official names, with or
            without ``module.`` prefixes and a ``state_dict``-like wrapper.
        strict: refuse missing and unknown names; False ignores them, misshapen ones are refused.

    Returns:
        The model.

    Raises:
        CheckpointError: unreadable or unsafe file; missing, unknown or misshapen entries (listed).
    """
    if not isinstance(source, (str, Path, Mapping)):
        raise CheckpointError(
            f"source: got a {type(source).__name__}; expected a path, or a mapping of names to "
            "tensors"
        )
    entries = _tensors(_read(Path(source)) if isinstance(source, (str, Path)) else source)
    own = model.state_dict()
    names = _own_names(model, set(own), entries)
    renamed = {names.get(name, name): value for name, value in entries.items()}
    ignored = set(getattr(model, "official_ignored", ()))
    renamed = {name: value for name, value in renamed.items() if name not in ignored}
    problems = []
    back = {mine: official for official, mine in names.items()}
    if strict:
        missing = [back.get(name, name) for name in own if name not in renamed]
        unknown = [name for name in renamed if name not in own]
        if missing:
            problems.append(f"missing: {_listed(missing, renamed)}")
        if unknown:
            problems.append(f"unknown: {_listed(unknown, (back.get(n, n) for n in own))}")
    for name, value in renamed.items():
        if name in own and tuple(value.shape) != tuple(own[name].shape):
            problems.append(
                f"{back.get(name, name)} has shape {tuple(value.shape)}, expected "
                f"{tuple(own[name].shape)}"
            )
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise CheckpointError(
            f"the checkpoint does not fit {model.name or type(model).__name__}: {shown}. Build the "
            "model with the settings it was trained with."
        )
    model.load_state_dict({n: v for n, v in renamed.items() if n in own}, strict=False)
    return model


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a checkpoint")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(
            r"unsupported (?:global|class|operand)[^\n]*", str(error), re.IGNORECASE
        )
        if refused is None:
            raise CheckpointError(f"{path}: not a readable PyTorch checkpoint") from error
        reason = refused.group()
        raise CheckpointError(
            f"{path}: refused, because reading it would run code from the file ({reason}); "
            "expected tensors only: save its state_dict again with torch.save or as safetensors"
        ) from error
    except Exception as error:
        # A damaged file makes torch.load raise almost anything.
        raise CheckpointError(f"{path}: not a readable PyTorch checkpoint ({error})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}; expected a mapping of names to tensors"
        )
    return content


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    tensors = {str(n): torch.as_tensor(v) for n, v in content.items() if _is_array(v)}
    if not tensors:
        raise CheckpointError(
            f"no tensors in the checkpoint; it holds: {', '.join(map(str, list(content)[:8]))}"
        )
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor) or type(value).__module__ == "numpy"


def _own_names(model: FusionModel, own: set[str], entries: Mapping[str, Tensor]) -> dict[str, str]:
    """Official -> own names, when the entries look official; else empty."""
    official = getattr(model, "official_names", None)
    if official is None or own.intersection(entries) == set(entries):
        return {}
    names = {theirs: mine for mine, theirs in official().items()}
    fits_official = len(names.keys() & entries.keys())
    return names if fits_official > len(own & entries.keys()) else {}


def _listed(names: list[str], candidates: Iterable[str]) -> str:
    candidates = list(candidates)
    parts = []
    for name in names[:4]:
        close = difflib.get_close_matches(name, candidates, n=1)
        parts.append(f"{name} (closest: {close[0]})" if close else name)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(parts) + more
