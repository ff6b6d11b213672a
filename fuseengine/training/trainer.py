"""The training loop: Adam, cosine decay, EMA, checkpoints that resume, pictures to look at."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from fuseengine.errors import TrainingError
from fuseengine.models.base import FusionModel
from fuseengine.models.checkpoint import load_checkpoint
from fuseengine.training.data import Patches, PatchSettings, Roots, find_pairs, find_pictures
from fuseengine.training.recipes import recipe_for, stages_of
from fuseengine.training.recipes.base import Recipe

_CHECKPOINT, _WEIGHTS = "checkpoint.pt", "weights.safetensors"
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
    data: Roots,
    out: str | Path,
    settings: TrainSettings | None = None,
    *,
    stage: str | None = None,
    init: str | Path | None = None,
    loss_weights: Mapping[str, float] | None = None,
    device: str = "cpu",
    fresh: bool = True,
    progress: bool = True,
    stop_after: float | None = None,
) -> dict[str, Any]:
    """Train a model, or go on with the run that the output folder holds.

    Writes into the folder: ``checkpoint.pt`` (everything to resume), ``weights.safetensors`` (the
    averaged weights of the whole model), ``log.jsonl`` (a line of losses per 50 steps) and
    ``grid_<step>.png``. Files are written beside their target and renamed, so that a stopped run
    loses nothing. A model that is trained in stages has a folder in it for each, named after the
    stage; a later stage starts from the weights in the folder of the one before.

    Args:
        model: a model with a recipe; trained in place.
        data: folder or folders with pairs, see :func:`fuseengine.training.data.find_pairs`, or with
            pictures of any kind where the stage trains on single ones.
        out: folder to write to.
        settings: how to train.
        stage: one of :func:`fuseengine.training.recipes.stages_of`; may be left out where there is
            one.
        init: weights to start from in place of new ones or those of the stage before.
        loss_weights: weights of the loss's terms that replace the recipe's.
        device: torch device.
        fresh: whether the recipe may initialise the model, and a later stage may load the weights
            of the one before; False goes on from the model's weights.
        progress: whether to show a progress bar.
        stop_after: seconds after which to save and stop, to go on later.

    Returns:
        A summary: steps done, seconds over all resumptions, last losses, number of pairs (or
        pictures), the weights' path.

    Raises:
        TrainingError: no data, no recipe, no weights of the stage before, or a folder with a run of
            another model.
        UnknownNameError: a stage or a term of the loss that does not exist.
        CheckpointError: weights to start from that do not fit.
    """
    settings = settings or TrainSettings()
    recipe = recipe_for(model, stage, loss_weights)
    _check_patch(model, recipe, settings)
    patches = _patches(model, recipe, data, settings)
    stages = stages_of(model)
    folder = Path(out) / recipe.stage if len(stages) > 1 else Path(out)
    if fresh and not (folder / _CHECKPOINT).exists():
        _start(model, recipe, stages, Path(out), init)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(device)
    parameters = _freeze_all_but(model, recipe)
    try:
        step, seconds, losses = _loop(
            model, recipe, patches, folder, settings, parameters, device, progress, stop_after
        )
    finally:
        model.requires_grad_(True).eval()
    return {
        "steps": step,
        "seconds": seconds,
        recipe.layout: len(patches),
        "losses": losses,
        "weights": folder / _WEIGHTS,
    }


def _check_patch(model: FusionModel, recipe: Recipe, settings: TrainSettings) -> None:
    if settings.patch % model.multiple or settings.patch < recipe.smallest_patch:
        least = f" and at least {recipe.smallest_patch}" * (recipe.smallest_patch > 1)
        raise TrainingError(
            f"patch={settings.patch}; expected a multiple of {model.multiple}{least} for "
            f"{model.name!r}"
        )


def _patches(model: FusionModel, recipe: Recipe, data: Roots, settings: TrainSettings) -> Patches:
    how = PatchSettings(settings.patch, settings.batch)
    if not recipe.augment:
        how = replace(how, tone_chance=0.0, grain_chance=0.0)
    files = (find_pairs if recipe.layout == "pairs" else find_pictures)(data)
    return Patches(files, how, settings.seed, channels=model.channels)


def _start(
    model: FusionModel, recipe: Recipe, stages: list[str], out: Path, init: str | Path | None
) -> None:
    """The weights that a stage begins with."""
    before = stages.index(recipe.stage) - 1
    if init is not None:
        load_checkpoint(model, init)
    elif before < 0:
        recipe.initialise(model)
    else:
        weights = out / stages[before] / _WEIGHTS
        if not weights.is_file():
            raise TrainingError(
                f"no {weights}; expected the weights of stage {stages[before]!r}, which comes "
                f"before {recipe.stage!r}: train it first into the same folder, or give init=FILE"
            )
        load_checkpoint(model, weights)


def _freeze_all_but(model: FusionModel, recipe: Recipe) -> list[nn.Parameter]:
    """The parameters that the stage trains; nothing else gets gradients or dropout."""
    model.requires_grad_(False).eval()
    trained = recipe.trained(model)
    for part in trained:
        part.requires_grad_(True)
    return [parameter for part in trained for parameter in part.parameters()]


def _train_mode(model: FusionModel, recipe: Recipe) -> None:
    model.eval()
    for part in recipe.trained(model):
        part.train()


def _loop(
    model: FusionModel,
    recipe: Recipe,
    patches: Patches,
    out: Path,
    settings: TrainSettings,
    parameters: list[nn.Parameter],
    device: str,
    progress: bool,
    stop_after: float | None,
) -> tuple[int, float, dict[str, float]]:
    """The optimiser's steps: how many are done, seconds over all resumptions, last losses."""
    _train_mode(model, recipe)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.Adam(parameters, lr=settings.rate, betas=(0.9, 0.99))
    start, spent = _resume(out, model, recipe, average, optimiser)
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
        pictures = [x.to(device) for x in patches.batch(index)]
        for group in optimiser.param_groups:
            group["lr"] = _rate(settings, index)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
        parts = recipe(model, pictures, generator)
        loss = torch.stack(list(parts.values())).sum()
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss is {float(loss.detach())} at step {index}; lower the learning rate and "
                f"resume from {out / _CHECKPOINT}"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip)
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
            seconds = spent + time.monotonic() - begin
            _save(out, model, recipe, average, optimiser, step, seconds, settings)
        if step % settings.show_every == 0 or step == settings.steps or late:
            _grid(out / f"grid_{step:06d}.png", model, recipe, average, patches, device)
        if late:
            break
    optimiser.zero_grad(set_to_none=True)
    model.load_state_dict(average)
    return step, spent + time.monotonic() - begin, losses


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
    recipe: Recipe,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    step: int,
    seconds: float,
    settings: TrainSettings,
) -> None:
    content = {
        "version": _VERSION,
        "model": model.name,
        "stage": recipe.stage,
        "weights": model.state_dict(),
        "average": average,
        "optimiser": optimiser.state_dict(),
        "step": step,
        "seconds": seconds,
        "settings": asdict(settings),
        "loss_weights": asdict(recipe.weights),
    }
    temporary = out / f".{_CHECKPOINT}.{os.getpid()}"
    torch.save(content, temporary)
    temporary.replace(out / _CHECKPOINT)
    temporary = out / f".weights.{os.getpid()}"
    save_file({name: value.contiguous().cpu() for name, value in average.items()}, temporary)
    temporary.replace(out / _WEIGHTS)


def _resume(
    out: Path,
    model: FusionModel,
    recipe: Recipe,
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
    if state.get("stage", recipe.stage) != recipe.stage:
        raise TrainingError(
            f"{path} belongs to stage {state['stage']!r}; expected {recipe.stage!r}: choose "
            "another --out folder"
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
    path: Path,
    model: FusionModel,
    recipe: Recipe,
    average: dict[str, Tensor],
    patches: Patches,
    device: str,
) -> None:
    """What the recipe shows, by the averaged weights: a row per patch, the same every time."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(average)
    model.eval()
    pictures = [x.to(device) for x in patches.batch(2**31)]
    columns = recipe.show(model, pictures, torch.Generator().manual_seed(0))
    model.load_state_dict(kept)
    _train_mode(model, recipe)
    planes = max(column.shape[1] for column in columns)
    rows = torch.cat([column.expand(-1, planes, -1, -1) for column in columns], dim=3).cpu()
    picture = rows.permute(0, 2, 3, 1).reshape(-1, rows.shape[-1], planes)
    levels = picture.mul(255).round().to(torch.uint8).numpy()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.png")
    Image.fromarray(levels[..., 0] if planes == 1 else levels).save(temporary)
    temporary.replace(path)
