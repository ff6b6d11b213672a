"""``fuseengine export FORMAT ...``: models for other programs to run, one module per format.

A format's module is like a command's: ``add_parser(formats)`` and ``run(args)``.
"""

from __future__ import annotations

from typing import Any

from fuseengine.cli import export_onnx, export_triton_server
from fuseengine.cli.common import RawHelp

_FORMATS = (export_onnx, export_triton_server)


def add_parser(commands: Any) -> None:
    """Declare the command and its formats."""
    parser = commands.add_parser(
        "export",
        help="write a model for other programs to run",
        description="Write a model in a format that other programs run.",
        epilog="examples:\n"
        "  fuseengine export onnx drfusion-s --size 640x480 --whole -o fuse.onnx\n"
        "  fuseengine export triton-server models --size 640x480\n\n"
        "'fuseengine export FORMAT --help' says more about a format.",
        formatter_class=RawHelp,
    )
    formats = parser.add_subparsers(dest="format", metavar="FORMAT", title="formats", required=True)
    for module in _FORMATS:
        module.add_parser(formats)
