"""``fuseengine export triton-server``: a model repository for NVIDIA's Triton Inference Server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fuseengine.cli.common import RawHelp, frame_size, positive_int

_DESCRIPTION = """\
Write a model repository that NVIDIA's Triton Inference Server takes: the whole
model as ONNX, or a TensorRT plan of your own, and its configuration. Requests
carry uint8 frames: infrared (H, W) and visible (H, W, 3), RGB; the answer is
the fused frame.

A model that this command wrote before gets a new version; nothing else that is
in DIR is touched."""

_EPILOG = """\
examples:
  fuseengine export triton-server models --size 640x480
  fuseengine export triton-server models --model drfusion-s --size 640x480 \\
      --max-batch 16 --device gpu --precision fp16
  fuseengine export triton-server models --size 640x480 --plan fuse.plan

  tritonserver --model-repository=models"""


def add_parser(formats: Any) -> None:
    """Declare the format's arguments."""
    parser = formats.add_parser(
        "triton-server",
        help="a model repository for NVIDIA's Triton Inference Server",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RawHelp,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the repository; made if missing")
    parser.add_argument(
        "--model",
        default="drfusion-s",
        metavar="NAME",
        help="see 'fuseengine models' (default: drfusion-s)",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="checkpoint to use, not the packaged weights"
    )
    parser.add_argument("--name", help="of the model in the repository (default: the model's)")
    parser.add_argument(
        "--size",
        type=frame_size,
        metavar="WxH",
        help="of the frames (default: any, which costs speed and batches)",
    )
    parser.add_argument(
        "--precision", default="fp32", metavar="NAME", help="fp32 (default), fp16 or bf16"
    )
    parser.add_argument(
        "--planes",
        action="store_true",
        help="float32 planes (C, H, W) in [0, 1] instead of frames",
    )
    parser.add_argument(
        "--max-batch",
        type=positive_int,
        default=8,
        metavar="N",
        help="largest batch that the server may make of requests (default: 8; 1: none)",
    )
    parser.add_argument(
        "--instances",
        type=positive_int,
        default=1,
        metavar="N",
        help="copies of the model that run at once (default: 1)",
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto (default), cpu or gpu"
    )
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="serve this TensorRT plan, built on the server's GPU from this model and size",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    import fuseengine as fe
    from fuseengine.export.triton_server import export_triton_server

    if args.weights is None:
        model = fe.load_model(args.model)
    else:
        model = fe.load_checkpoint(fe.build(args.model), args.weights)
    written = export_triton_server(
        model,
        args.folder,
        args.size,
        name=args.name or args.model,
        precision=args.precision,
        frames=not args.planes,
        max_batch=args.max_batch,
        instances=args.instances,
        device=args.device,
        plan=args.plan,
    )
    print(written)
    return 0
