"""``fuseengine compile``: a model as a bundle, one file for the device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuseengine.cli.common import (
    RawHelp,
    add_temporal,
    frame_size,
    note,
    positive_float,
    positive_int,
)
from fuseengine.errors import SettingError

if TYPE_CHECKING:
    from torch import nn

    from fuseengine.program import Program
    from fuseengine.targets import Target

_DESCRIPTION = """\
Compile a model into one file that the device runs without PyTorch.

For this machine, and for x86-cpu, everything installed is measured and the
fastest that is exact enough is taken. For a GPU that is not here, networks and
kernels are prepared; TensorRT builds the networks on the device at first use,
so nothing of it was run when the file is written, and the file says so."""

_EPILOG = """\
examples:
  fuseengine compile drfusion-s --size 640x480 -o drfusion.fuse
  fuseengine compile drfusion-s --size 640x480 --target orin -o drfusion.fuse
  fuseengine compile drmf-s --weights run/drmf.pt --target x86-cpu -o drmf.fuse

Then, on the device:
  fuseengine inspect drfusion.fuse
  fuseengine verify drfusion.fuse
  fuseengine fuse --engine drfusion.fuse ir.png vis.png -o fused.png"""


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "compile",
        help="compile a model into one file for a device",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RawHelp,
    )
    parser.add_argument("model", metavar="NAME", help="see 'fuseengine models'")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE.fuse", help="file to write"
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights", type=Path, metavar="FILE", help="checkpoint to use, not the packaged weights"
    )
    weights.add_argument(
        "--random-weights", action="store_true", help="untrained weights, for trying out a device"
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        metavar="N",
        help="sampling steps in place of the model's own; its card says what fewer cost",
    )
    parser.add_argument(
        "--size",
        type=frame_size,
        metavar="WxH",
        help="of the frames; by default any size, on CPUs only",
    )
    parser.add_argument(
        "--target",
        default="this",
        metavar="NAME",
        help="this (default), x86-cpu, orin, orin-nx, orin-nano, thor or cuda-sm90; with a power "
        "mode: orin:30w",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        metavar="NAME",
        help="auto (the fastest within the guard; fp16 for a GPU that is not here), fp32, tf32, "
        "bf16, fp16 or int8",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help="auto, openvino, onnxruntime or tensorrt",
    )
    parser.add_argument(
        "--guard-db",
        type=positive_float,
        default=45.0,
        metavar="DB",
        help="least PSNR against float32 (default: 45)",
    )
    parser.add_argument(
        "--effort",
        default="quick",
        metavar="NAME",
        help="quick (default), or full: also try what takes minutes to compile",
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads (default: one per core)"
    )
    add_temporal(parser)
    parser.add_argument(
        "--warm-steps", type=positive_int, metavar="K", help="how many steps (default: the model's)"
    )
    parser.add_argument(
        "--no-merge",
        action="store_true",
        help="keep the stages apart: a slow model then takes longer per frame, but loads faster "
        "and into less memory",
    )
    parser.add_argument(
        "--no-cache", action="store_true", help="compile anew; leave the cache of engines alone"
    )
    talk = parser.add_argument_group("what is printed")
    talk.add_argument(
        "--report", action="store_true", help="print what was tried, and the prediction in parts"
    )
    talk.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.output.suffix != ".fuse":
        raise SettingError(f"cannot write {args.output}: expected a name that ends in .fuse")
    if not args.output.parent.is_dir():
        raise SettingError(
            f"cannot write {args.output}: no folder {args.output.parent}; make it first"
        )
    from fuseengine.targets import get_target

    target = get_target(args.target)
    here = args.target.partition(":")[0] == "this"
    if target.kind == "gpu" and not here:
        _compile_elsewhere(args, target)
    else:
        _compile_here(args, target, here)
    from fuseengine.runtime.bundle import Bundle

    with Bundle(args.output) as written:  # reads back what was written
        note(args, *(f"not verified: {text}" for text in written.manifest["not_verified"]))
        if not args.quiet:
            print(f"{args.output}: {written.size / 1e6:.1f} MB, for {target.title}")
    return 0


def _compile_here(args: argparse.Namespace, target: Target, here: bool) -> None:
    """For this machine, or for a CPU like it."""
    import fuseengine as fe
    from fuseengine.saved_engine import save

    precision = args.precision
    if not here:
        # This machine may compute in what others of its kind do not.
        precision = "fp32" if precision == "auto" else precision
        target.peak(precision)
    engine = fe.compile(
        args.model if _packaged(args) and args.steps is None else _model(args),
        args.size,
        device="auto" if here else "cpu",
        precision=precision,
        backend=args.backend,
        effort=args.effort,
        guard_db=args.guard_db,
        threads=args.threads,
        portable=True,
        temporal=args.temporal,
        warm_steps=args.warm_steps,
        merge=not args.no_merge,
        cache=not args.no_cache,
    )
    save(args.output, engine, None if here else (target.name, target.title))
    note(args, engine.report if args.report else engine.report.summary())
    precisions = {variant: how[1] for variant, how in engine.choice.items()}
    _predict(args, engine.program, engine.source, target, precisions)


def _compile_elsewhere(args: argparse.Namespace, target: Target) -> None:
    """For a GPU that is not here."""
    if args.size is None:
        raise SettingError(
            f"--target {args.target}: its kernels are compiled for one size; give --size, such as "
            "640x480"
        )
    if args.backend not in ("auto", "tensorrt"):
        raise SettingError(
            f"--backend {args.backend}: stages on {target.name} are TensorRT's; expected tensorrt"
        )
    from fuseengine.compiler import resumed_steps
    from fuseengine.export.bundles import compile_for

    written = compile_for(
        _model(args),
        args.size,
        target,
        args.output,
        precision=args.precision,
        guard_db=args.guard_db,
        threads=args.threads,
        resumed_steps=resumed_steps(args.temporal, args.warm_steps),
    )
    note(args, *(f"verified: {text}" for text in written.verified))
    _predict(args, written.program, written.stages, target, written.precision)


def _predict(
    args: argparse.Namespace, program: Program, stages: Any, target: Target, precision: Any
) -> None:
    from fuseengine.roofline import predict

    if args.quiet:
        return
    predicted = predict(program, stages, target, precision, args.size or (480, 640))
    print(predicted if args.report else predicted.summary())


def _packaged(args: argparse.Namespace) -> bool:
    return args.weights is None and not args.random_weights


def _model(args: argparse.Namespace) -> nn.Module:
    import fuseengine as fe

    settings = {} if args.steps is None else {"steps": args.steps}
    if _packaged(args):
        return fe.load_model(args.model, **settings)
    model = fe.build(args.model, **settings)
    return model if args.weights is None else fe.load_checkpoint(model, args.weights)
