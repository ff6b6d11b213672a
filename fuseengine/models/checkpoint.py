"""Reading weights into models: the project's own files and the official checkpoints.

Loading never runs code from a file: safetensors, or ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import argparse
import difflib
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuseengine.errors import CheckpointError
from fuseengine.models.base import FusionModel

_WRAPPERS = ("state_dict", "model", "model_state_dict", "params", "net")
_EMA = "ema_helper"
"""Where the DDIM family of codes keeps the averaged copy of the weights: a flat mapping."""


@dataclass(frozen=True)
class Official:
    """Where one of our tensors stands in an official checkpoint.

    Attributes:
        names: the official tensors; several are concatenated along their first dimension (q, k
            and v of an attention).
        inputs: (first, last + 1, all) of the second dimension where only some input channels are
            ours (the condition's part of a first convolution).
    """

    names: tuple[str, ...]
    inputs: tuple[int, int, int] | None = None

    def shape(self, own: Sequence[int]) -> tuple[int, ...]:
        """Shape of each official tensor for a shape of ours."""
        shape = [own[0] // len(self.names), *own[1:]] if own else []
        if self.inputs is not None:
            shape[1] = self.inputs[2]
        return tuple(shape)

    def assemble(self, entries: Mapping[str, Tensor]) -> Tensor:
        """Our tensor, up to 1x1 kernel dimensions."""
        parts = [entries[name] for name in self.names]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole if self.inputs is None else whole[:, self.inputs[0] : self.inputs[1]]


Names = Mapping[str, Official]
"""Own name -> where it stands in a file."""


def load_checkpoint(
    model: FusionModel,
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    strict: bool = True,
    ema: bool = True,
    **parts: str | Path | Mapping[str, Any],
) -> FusionModel:
    """Load weights into a model, in place.

    Official checkpoints of systems with several networks come in several files:
    ``load_checkpoint(dmfuse, diffusion=..., head=...)``,
    ``load_checkpoint(drmf, infrared=..., visible=..., weight=...)``. Some of them are enough; the
    other networks stay as they are.

    Args:
        model: the model to fill; its dtype and device stay.
        source: a path (``.safetensors``, ``.pth``, ``.pt``, ``.pkl``, ``.model``) or an already
            loaded name -> tensor mapping, with the project's own or the official names, with or
            without ``module.`` prefixes and a ``state_dict``-like wrapper.
        strict: refuse missing and unknown names; False ignores them, misshapen ones are refused.
        ema: take the averaged copy of the weights where the file holds one.
        **parts: instead of a source, the official files by network, each as source.

    Returns:
        The model.

    Raises:
        CheckpointError: unreadable or unsafe file; missing, unknown or misshapen entries (listed).
    """
    official = _official(model)
    if (source is None) == (not parts):
        raise CheckpointError(
            f"got {'both a source and' if parts else 'neither a source nor'} files by network; "
            f"expected one of the two{_offered(official)}"
        )
    problems: list[str] = []
    filled: dict[str, Tensor] = {}
    for part, given in parts.items() if parts else [("", source)]:
        if part and part not in official:
            raise CheckpointError(
                f"{part}=: unknown for {model.name or type(model).__name__}; expected a source"
                f"{_offered(official)}"
            )
        if not isinstance(given, (str, Path, Mapping)):
            raise CheckpointError(
                f"{part or 'source'}: got a {type(given).__name__}; expected a path, or a mapping "
                "of names to tensors"
            )
        entries = _tensors(_read(Path(given)) if not isinstance(given, Mapping) else given, ema=ema)
        names = official[part] if part else _names(model, official, entries)
        found, wrong = _assemble(model, names, entries, strict=strict)
        filled.update(found)
        problems += [f"{part}: {problem}" if part else problem for problem in wrong]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise CheckpointError(
            f"the checkpoint does not fit {model.name or type(model).__name__}: {shown}. Build the "
            "model with the settings it was trained with."
        )
    model.load_state_dict(filled, strict=False)
    return model


def _official(model: FusionModel) -> dict[str, Names]:
    """The official files of a model by network; "" is the only file of a model that has one."""
    if hasattr(model, "official_parts"):
        return model.official_parts()
    if hasattr(model, "official_names"):
        return {"": {own: Official((name,)) for own, name in model.official_names().items()}}
    return {}


def _offered(official: Mapping[str, Names]) -> str:
    parts = [f"{part}=..." for part in official if part]
    return f", or official files as {', '.join(parts)}" if parts else ""


def _names(
    model: FusionModel, official: Mapping[str, Names], entries: Mapping[str, Tensor]
) -> Names:
    """The official names when the entries of a single source look official, else our own.

    Raises:
        CheckpointError: they look like one file of a model that has several.
    """
    own = {name: Official((name,)) for name in model.state_dict()}
    fitting = len(own.keys() & entries.keys())
    for part, names in official.items():
        if len(_theirs(names).keys() & entries.keys()) > fitting:
            if not part:
                return names
            raise CheckpointError(
                f"source: has the names of an official file of {model.name}, which come one by "
                f"network; expected own names{_offered(official)}"
            )
    return own


def _theirs(names: Names) -> dict[str, None]:
    """The official names in order, each once."""
    return {name: None for entry in names.values() for name in entry.names}


def _assemble(
    model: FusionModel, names: Names, entries: Mapping[str, Tensor], *, strict: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Our tensors out of a file's, and what is wrong with them."""
    own = model.state_dict()
    expected = _theirs(names)
    problems: dict[str, None] = {}  # a tensor that stands in two of ours is misshapen once
    if strict:
        patterns = getattr(model, "official_ignored", ())
        missing = [name for name in expected if name not in entries]
        unknown = [
            name
            for name in entries
            if name not in expected and not any(fnmatchcase(name, p) for p in patterns)
        ]
        if missing:
            problems[f"missing: {_listed(missing, entries)}"] = None
        if unknown:
            problems[f"unknown: {_listed(unknown, expected)}"] = None
    filled = {}
    for mine, entry in names.items():
        if any(name not in entries for name in entry.names):
            continue
        target = tuple(own[mine].shape)
        wanted = entry.shape(target)
        wrong = [n for n in entry.names if _bare(entries[n].shape) != _bare(wanted)]
        for name in wrong:
            problems[f"{name} has shape {tuple(entries[name].shape)}, expected {wanted}"] = None
        if not wrong:
            filled[mine] = entry.assemble(entries).reshape(target)
    return filled, list(problems)


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    """A matrix's shape for a 1x1 kernel's: public codes write the same layer either way."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


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


def _tensors(content: Mapping[str, Any], *, ema: bool) -> dict[str, Tensor]:
    if ema and isinstance(content.get(_EMA), Mapping) and content[_EMA]:
        content = content[_EMA]
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    tensors = {_plain(str(n)): torch.as_tensor(v) for n, v in content.items() if _is_array(v)}
    if not tensors:
        raise CheckpointError(
            f"no tensors in the checkpoint; it holds: {', '.join(map(str, list(content)[:8]))}"
        )
    return tensors


def _plain(name: str) -> str:
    """A name without the ``module.`` that DataParallel puts before a wrapped network's names."""
    return ".".join(part for part in name.split(".") if part != "module")


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor) or type(value).__module__ == "numpy"


def _listed(names: list[str], candidates: Iterable[str]) -> str:
    candidates = list(candidates)
    parts = []
    for name in names[:4]:
        close = difflib.get_close_matches(name, candidates, n=1)
        parts.append(f"{name} (closest: {close[0]})" if close else name)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(parts) + more
