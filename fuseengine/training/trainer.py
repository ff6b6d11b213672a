"""The training loop: Adam, cosine decay, EMA, checkpoints that resume, pictures to look at."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from fuseengine.errors import TrainingError
from fuseengine.models.base import FusionModel
from fuseengine.training.data import PairPatches, PatchSettings
from fuseengine.training.recipes import recipe_for

_CHECKPOINT = "checkpoint.pt"
_VERSION = 1


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps: optimiser steps in all, over all resumptions.
        rate: Adam's learning rate after the warm-up; decays to 2 % of it by a half cosine.
        warmup: steps of linear warm-up.
        ema: decay of the exponential moving average of the weights, which is what is saved.
        clip: largest gradient norm.
        patch: side of the square patches in pixels.
        batch: patches per step.
        seed: decides patches and degradations.
        save_every: steps between checkpoints.
        show_every: steps between picture grids.
    """

    steps: int = 20_000
    rate: float = 1e-3
    warmup: int = 200
    ema: float = 0.999
    clip: float = 1.0
    patch: int = 192
    batch: int = 4
    seed: int = 0
    save_every: int = 500
    show_every: int = 1_000

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work.

        Raises:
            TrainingError: a count below 1, a rate or clip not above 0, or ema outside [0, 1).
        """
        counts = ("steps", "patch", "batch", "save_every", "show_every")
        wrong = [name for name in counts if getattr(self, name) < 1]
        wrong += [name for name in ("rate", "clip") if not getattr(self, name) > 0]
        wrong += ["ema"] if not 0 <= self.ema < 1 else []
        if wrong:
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in wrong)
            raise TrainingError(f"{given}; expected counts >= 1, rate and clip > 0, 0 <= ema < 1")


def train(
    model: FusionModel,
    data: str | Path,
    out: str | Path,
    settings: TrainSettings | None = None,
    *,
    device: str = "cpu",
    fresh: bool = True,
    progress: bool = True,
    stop_after: float | None = None,
) -> dict[str, Any]:
    """Train a model, or go on with the run that the output folder holds.

    Writes into the folder: ``checkpoint.pt`` (everything to resume), ``weights.safetensors`` (the
    averaged weights), ``log.jsonl`` (a line of losses per 50 steps) and ``grid_<step>.png``. Files
    are written beside their target and renamed, so that a stopped run loses nothing.

    Args:
        model: a model with a recipe; trained in place.
        data: folder with pairs, see :func:`fuseengine.training.data.find_pair_folders`.
        out: folder to write to.
        settings: how to train.
        device: torch device.
        fresh: whether the recipe may initialise the model; False goes on from its weights.
        progress: whether to show a progress bar.
        stop_after: seconds after which to save and stop, to go on later.

    Returns:
        A summary: steps done, seconds over all resumptions, last losses, number of pairs.

    Raises:
        TrainingError: no data, no recipe, or a folder with a run of another model.
    """
    settings = settings or TrainSettings()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    patches = PairPatches(data, PatchSettings(settings.patch, settings.batch), settings.seed)
    if settings.patch % model.multiple:
        raise TrainingError(
            f"patch={settings.patch}; expected a multiple of {model.multiple} for {model.name!r}"
        )
    recipe = recipe_for(model)
    if fresh and not (out / _CHECKPOINT).exists():
        recipe.initialise(model)
    model.to(device).train()
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.rate, betas=(0.9, 0.99))
    start, spent = _resume(out, model, average, optimiser)
    begin = time.monotonic()
    losses: dict[str, float] = {}
    bar = tqdm(
        range(start, settings.steps),
        initial=start,
        total=settings.steps,
        desc=model.name or type(model).__name__,
        disable=not progress,
    )
    step = start
    for index in bar:
        a, b = (x.to(device) for x in patches.batch(index))
        for group in optimiser.param_groups:
            group["lr"] = _rate(settings, index)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
        parts = recipe(model, a, b, generator)
        loss = torch.stack(list(parts.values())).sum()
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss is {float(loss.detach())} at step {index}; lower the learning rate and "
                f"resume from {out / _CHECKPOINT}"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimiser.step()
        _average(average, model, min(settings.ema, (1 + index) / (10 + index)))
        step = index + 1
        if step % 50 == 0 or step == settings.steps:
            losses = {name: float(value.detach()) for name, value in parts.items()}
            losses["loss"] = float(loss.detach())
            bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()})
            with (out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step, **losses}) + "\n")
        late = stop_after is not None and time.monotonic() - begin > stop_after
        if step % settings.save_every == 0 or step == settings.steps or late:
            _save(out, model, average, optimiser, step, spent + time.monotonic() - begin, settings)
        if step % settings.show_every == 0 or step == settings.steps:
            _grid(out / f"grid_{step:06d}.png", model, average, patches, device)
        if late:
            break
    model.load_state_dict(average)
    model.eval()
    return {
        "steps": step,
        "seconds": spent + time.monotonic() - begin,
        "pairs": len(patches),
        "losses": losses,
    }


def _rate(settings: TrainSettings, step: int) -> float:
    warm = min(1.0, (step + 1) / max(settings.warmup, 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return settings.rate * warm * (0.02 + 0.98 * cosine)


@torch.no_grad()
def _average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def _save(
    out: Path,
    model: FusionModel,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    step: int,
    seconds: float,
    settings: TrainSettings,
) -> None:
    content = {
        "version": _VERSION,
        "model": model.name,
        "weights": model.state_dict(),
        "average": average,
        "optimiser": optimiser.state_dict(),
        "step": step,
        "seconds": seconds,
        "settings": asdict(settings),
    }
    temporary = out / f".{_CHECKPOINT}.{os.getpid()}"
    torch.save(content, temporary)
    temporary.replace(out / _CHECKPOINT)
    temporary = out / f".weights.{os.getpid()}"
    save_file({name: value.contiguous().cpu() for name, value in average.items()}, temporary)
    temporary.replace(out / "weights.safetensors")


def _resume(
    out: Path,
    model: FusionModel,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> tuple[int, float]:
    path = out / _CHECKPOINT
    if not path.exists():
        return 0, 0.0
    try:
        state: Mapping[str, Any] = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        # torch.load raises whatever its container and unpickler meet first.
        raise TrainingError(
            f"{path} is not a checkpoint of a training run ({type(error).__name__}: {error}); move "
            "it away to start anew, or choose another --out folder"
        ) from error
    if state.get("version") != _VERSION or state.get("model") != model.name:
        raise TrainingError(
            f"{path} belongs to a run of {state.get('model')!r} (version {state.get('version')}); "
            f"expected {model.name!r} (version {_VERSION}): choose another --out folder"
        )
    try:
        model.load_state_dict(state["weights"])
        for name, value in state["average"].items():
            average[name].copy_(value)
        optimiser.load_state_dict(state["optimiser"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(
            f"{path} belongs to a run of {model.name!r} with other settings "
            f"({str(error).splitlines()[0]}); choose another --out folder"
        ) from error
    return int(state["step"]), float(state["seconds"])


@torch.no_grad()
def _grid(
    path: Path, model: FusionModel, average: dict[str, Tensor], patches: PairPatches, device: str
) -> None:
    """Rows of infrared, visible, fused (averaged weights): the same four patches every time."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(average)
    model.eval()
    a, b = (x.to(device) for x in patches.batch(2**31))
    rows = torch.cat([a, b, model(a, b)], dim=3).cpu()
    model.load_state_dict(kept)
    model.train()
    picture = rows.reshape(-1, rows.shape[-1]).mul(255).round().to(torch.uint8).numpy()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.png")
    Image.fromarray(picture).save(temporary)
    temporary.replace(path)
