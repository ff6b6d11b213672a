"""The command line: ``fuseengine COMMAND ...``, one module per command.

A command module has ``add_parser(commands)``, which declares its arguments and imports nothing
heavy, and ``run(args) -> exit code``. Exit codes: 0 all went well, 2 an error, 130 interrupted, 141
the reader of a pipe went away.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from fuseengine.cli import (
    calibrate,
    compile,
    demo,
    doctor,
    evaluate,
    export,
    fuse,
    inspect,
    latency,
    models,
    train,
    verify,
    video,
)
from fuseengine.cli.common import RawHelp, one_line
from fuseengine.errors import FuseEngineError

_EXTRAS = {
    "av": "video",
    "cupy": "gpu",
    "cv2": "video",
    "hdrh": "video",
    "onnx": "compile",
    "onnxscript": "compile",
    "openvino": "openvino",
    "ray": "ray",
    "safetensors": "compile",
    "scipy": "evaluate",
    "tensorrt": "tensorrt",
    "torch": "compile",
    "triton": "gpu",
}
"""Import name of an optional library -> the extra that installs it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Returns:
        The exit code.
    """
    args = argparse.Namespace(traceback=False)
    try:
        code = _run(argv, args)
        sys.stdout.flush()  # here, so that a closed pipe is met inside this try
        return code
    except KeyboardInterrupt:
        print("fuseengine: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What is still buffered has nowhere to go; without this, Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except FuseEngineError as error:
        return _fail(args, one_line(error))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        extra = getattr(args, "extra", extra)
        return _fail(
            args,
            f"'fuseengine {args.command}' needs {error.name} here, which is not installed; "
            f"install it with: pip install 'fuseengine[{extra}]'",
        )
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(args, f"{place}{error.strerror or error}")


def _run(argv: Sequence[str] | None, args: argparse.Namespace) -> int:
    parser = _make_parser()
    try:
        parser.parse_args(argv, args)
    except SystemExit as stop:  # --help, --version, a wrong argument
        return stop.code if isinstance(stop.code, int) else 2
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    return int(args.run(args))


def _fail(args: argparse.Namespace, message: str) -> int:
    if args.traceback:
        traceback.print_exc()
    print(f"fuseengine: error: {message}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += " (a value that begins with '-' needs '=', as in --option=-1,2)"
        self.exit(2, f"fuseengine: error: {message}; see '{self.prog} --help'\n")


class _Version(argparse.Action):
    """Looks the version up when it is asked for: reading the metadata takes a while."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"fuseengine {version('fuseengine')}")
        except PackageNotFoundError:
            print("fuseengine (not installed: run from its sources)")
        parser.exit(0)


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fuseengine",
        description="Fuse infrared and visible images with compiled diffusion models.",
        epilog="examples:\n"
        "  fuseengine demo\n"
        "  fuseengine fuse ir.png vis.png -o fused.png\n"
        "  fuseengine fuse IR_DIR VIS_DIR -o OUT_DIR\n\n"
        "'fuseengine COMMAND --help' says more about a command.",
        formatter_class=RawHelp,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument(
        "--traceback", action="store_true", help="on an error, show where it came from"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    modules = (
        fuse,
        video,
        calibrate,
        demo,
        compile,
        inspect,
        verify,
        latency,
        evaluate,
        models,
        train,
        export,
        doctor,
    )
    for module in modules:
        module.add_parser(commands)
    return parser
