"""``fuseengine export onnx``: a model as ONNX, whole or network by network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuseengine.cli.common import RawHelp, frame_size, positive_int
from fuseengine.errors import SettingError

if TYPE_CHECKING:
    from torch import nn

_DESCRIPTION = """\
Write a model as ONNX (opset 18; 22 in bf16), checked with onnx.checker and run
in ONNX Runtime against the float32 model.

Without --whole, OUT is a folder: a file per network, the program that calls
them (program.json) and its constants. With --whole, OUT is one file that takes
the pair and gives the fused picture.

fp16 and bf16 are written into the graph as types (Casts, half weights); norms,
softmax and the sampler's arithmetic stay in float32."""

_EPILOG = """\
examples:
  fuseengine export onnx drfusion-s --size 640x480 --whole -o fuse.onnx
  fuseengine export onnx drfusion-s --dynamic --precision fp16 -o NETWORKS_DIR
  fuseengine export onnx drfusion-s --size 640x480 --whole --frames -o cam.onnx
  fuseengine export onnx dmfuse-s --weights run/fusion.pt --dynamic -o DIR"""


def add_parser(formats: Any) -> None:
    """Declare the format's arguments."""
    parser = formats.add_parser(
        "onnx",
        help="ONNX, in float32, fp16 or bf16",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RawHelp,
    )
    parser.add_argument("model", metavar="NAME", help="see 'fuseengine models'")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="folder (made if missing), or the file with --whole",
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights", type=Path, metavar="FILE", help="checkpoint to use, not the packaged weights"
    )
    weights.add_argument(
        "--random-weights",
        action="store_true",
        help="untrained weights, for trying out what runs the model",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--size",
        type=frame_size,
        metavar="WxH",
        help="of the frames; rounded up to the model's multiple",
    )
    size.add_argument(
        "--dynamic", action="store_true", help="leave width and height open (default)"
    )
    parser.add_argument("--whole", action="store_true", help="everything in one model")
    parser.add_argument(
        "--frames",
        action="store_true",
        help="with --whole: uint8 frames in and out; colour, padding and cropping inside",
    )
    parser.add_argument(
        "--precision", default="fp32", metavar="NAME", help="fp32 (default), fp16 or bf16"
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="NAME",
        help="operator (Softmax), node or pattern ('unet_0/*') that stays in float32; repeatable",
    )
    parser.add_argument(
        "--attention-mb",
        type=positive_int,
        metavar="N",
        help="with --size: cut self-attention into parts whose maps are no larger",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not run what was written; saves its time"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.frames and not args.whole:
        raise SettingError("--frames: it is for one whole model; give --whole too")
    if args.attention_mb and not args.size:
        raise SettingError("--attention-mb: it needs a known size; give --size too")
    from fuseengine.export.files import export_onnx

    written = export_onnx(
        _model(args),
        args.output,
        args.size,
        whole=args.whole,
        precision=args.precision,
        keep=args.keep,
        frames=args.frames,
        attention_limit=args.attention_mb and args.attention_mb * 2**20,
        check=not args.no_check,
    )
    print(written)
    return 0


def _model(args: argparse.Namespace) -> nn.Module:
    import fuseengine as fe

    if args.weights is None and not args.random_weights:
        return fe.load_model(args.model)
    model = fe.build(args.model)
    return model if args.weights is None else fe.load_checkpoint(model, args.weights)
