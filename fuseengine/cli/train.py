"""``fuseengine train``: train a model on folders of pairs, or go on with a stopped run."""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any

from fuseengine.cli.common import RawHelp, positive_float, positive_int
from fuseengine.errors import BackendUnavailableError, SettingError, UnknownNameError

_DESCRIPTION = """\
Train a model on registered pairs without labels.

The data folder holds ir/ and vis/ (or infrared/ and visible/, or a/ and b/) at
any depth, with images paired by file name. The output folder gets
weights.safetensors, log.jsonl, pictures to look at, and checkpoint.pt; where it
holds a checkpoint already, the run goes on from it.

Some systems are trained in stages, each in its own folder inside the output
folder, where the next one finds its weights:
  dmfuse        diffusion (pictures of any kind), then fusion
  dmnet         reconstruction, then fusion
  drmf          restoration, then fusion (drmf-s: then refinement)
drfusion and mask-difuser (pictures of any kind, best in colour) have one."""

_EPILOG = """\
examples:
  fuseengine train drfusion-s --data DATA --out OUT --stop-after 2h30m
  fuseengine train drmf-s --stage restoration --data DATA --out OUT
  fuseengine train drmf-s --stage fusion --data DATA --out OUT

Ctrl-C stops at once (exit code 130): the last checkpoint, at most 500 steps
old, stays, and the same command goes on from there. --stop-after saves first."""

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "train",
        help="train a model on folders of pairs",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RawHelp,
    )
    parser.add_argument("name", metavar="NAME", help="configuration, see 'fuseengine models'")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        action="append",
        metavar="DIR",
        help="folder of pairs, or of pictures; may be given several times",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--stage", metavar="NAME", help="what to train, see above")
    parser.add_argument(
        "--init",
        type=Path,
        metavar="FILE",
        help="weights to start from (default: new ones, or those of the stage before)",
    )
    # The defaults are TrainSettings'; it lives beside torch, which --help shall not import.
    parser.add_argument(
        "--steps", type=positive_int, metavar="N", help="optimiser steps in all (default: 20000)"
    )
    parser.add_argument(
        "--rate", type=positive_float, metavar="R", help="learning rate (default: 0.001)"
    )
    parser.add_argument(
        "--patch", type=positive_int, metavar="PIXELS", help="side of the patches (default: 192)"
    )
    parser.add_argument(
        "--batch", type=positive_int, metavar="N", help="patches per step (default: 4)"
    )
    parser.add_argument(
        "--loss-weight",
        type=_loss_weight,
        action="append",
        default=[],
        metavar="TERM=W",
        help="weight of a term of the loss; may be given several times",
    )
    parser.add_argument(
        "--seed", type=_seed, metavar="N", help="of weights, patches, degradations (default: 0)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads")
    parser.add_argument(
        "--stop-after",
        type=_duration,
        metavar="TIME",
        help="save and stop after this long, such as 90s, 45m or 2h30m",
    )
    parser.add_argument(
        "--progress", action="store_true", help="show the progress bar even without a terminal"
    )
    parser.set_defaults(run=run, extra="train")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.device not in ("auto", "cpu", "cuda"):
        raise UnknownNameError("device", args.device, ["auto", "cpu", "cuda"])
    for folder in args.data:
        if not folder.is_dir():
            raise SettingError(f"--data: no folder {folder}; expected one with pairs, see --help")
    if args.out.exists() and not args.out.is_dir():
        raise SettingError(f"--out: {args.out} is a file, expected a folder")

    import torch

    from fuseengine.models.registry import build
    from fuseengine.training.trainer import TrainSettings, train

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "device 'cuda' cannot be used: PyTorch finds no NVIDIA GPU; use --device cpu"
        )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in ("steps", "rate", "patch", "batch", "seed")}
    settings = TrainSettings(**{name: value for name, value in given.items() if value is not None})
    torch.manual_seed(settings.seed)
    model = build(args.name)
    if settings.patch % model.multiple:
        raise SettingError(
            f"--patch: got {settings.patch}, expected a multiple of {model.multiple} for "
            f"{args.name}"
        )
    try:
        summary = train(
            model,
            args.data,
            args.out,
            settings,
            stage=args.stage,
            init=args.init,
            loss_weights=dict(args.loss_weight),
            device=device,
            progress=args.progress or sys.stderr.isatty(),
            stop_after=args.stop_after,
        )
    except KeyboardInterrupt:
        print(
            f"fuseengine: interrupted; checkpoints are written every {settings.save_every} steps: "
            f"the same command goes on from the last one in {args.out}",
            file=sys.stderr,
        )
        return 130
    done = "done" if summary["steps"] >= settings.steps else "stopped; the same command goes on"
    kind = "pairs" if "pairs" in summary else "pictures"
    print(
        f"{args.name}: {summary['steps']} of {settings.steps} steps on {summary[kind]} {kind} in "
        f"{summary['seconds'] / 60:.1f} min on {device}: {done}"
    )
    if summary["losses"]:
        print("last losses: " + ", ".join(f"{k} {v:.4f}" for k, v in summary["losses"].items()))
    print(f"weights: {summary['weights']}")
    return 0


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of 0 or more")
    return int(text)


def _loss_weight(text: str) -> tuple[str, float]:
    """Name and weight of TERM=W."""
    name, _, number = text.partition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = -1.0
    if not name or not 0.0 <= weight < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected TERM=W with a number W >= 0")
    return name, weight


def _duration(text: str) -> float:
    """Seconds of 2h30m, 45m, 90s or plain 90."""
    match = _DURATION.fullmatch(text)
    hours, minutes, seconds = (float(part or 0) for part in (match.groups() if match else "000"))
    total = 3600 * hours + 60 * minutes + seconds
    if not 0 < total < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a time such as 90s, 45m or 2h30m")
    return total
