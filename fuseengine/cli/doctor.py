"""``fuseengine doctor``: what this machine has, what will be used, what to install."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from fuseengine.cli.common import RawHelp

if TYPE_CHECKING:
    from fuseengine.doctor import Diagnosis
    from fuseengine.machine import Machine

_DESCRIPTION = """\
Say what this machine has (processor, GPU, drivers, libraries), which backends
and precisions FuseEngine will use on it, what does not fit together, and what
to install. Nothing is changed, and PyTorch is not imported unless --deep."""

_EPILOG = """\
examples:
  fuseengine doctor
  fuseengine doctor --deep            # import the libraries and ask them
  fuseengine doctor --json

exit code: 0, whatever is found."""


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "doctor",
        help="say what this machine has, what will be used and what to install",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RawHelp,
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="also import PyTorch, CuPy, TensorRT and the others: some seconds",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from fuseengine.doctor import diagnose
    from fuseengine.machine import inspect_machine

    diagnosis = diagnose(inspect_machine(), deep=args.deep)
    print(json.dumps(diagnosis.to_dict(), indent=2) if args.json else describe(diagnosis))
    return 0


def describe(diagnosis: Diagnosis) -> str:
    """A diagnosis as text."""
    sections = {
        "machine": _machine_lines(diagnosis.machine),
        "software": _software_lines(diagnosis),
        "what will be used": _backend_lines(diagnosis),
        "findings": [
            f"{finding.level}: {finding.text}"
            + (f"\n    do: {finding.remedy}" if finding.remedy else "")
            for finding in diagnosis.findings
        ],
        "what to install": [f"{gain}: {command}" for gain, command in diagnosis.install.items()],
    }
    if diagnosis.deep:
        sections["asked"] = [f"{name}: {said}" for name, said in diagnosis.deep.items()]
    lines = []
    for title, content in sections.items():
        lines.append(f"{title}:" if content else f"{title}: nothing")
        lines += [f"  {line}" for line in content]
    return "\n".join(lines)


def _machine_lines(machine: Machine) -> list[str]:
    cpu = machine.cpu
    lines = [
        machine.system,
        f"{cpu.name}, {cpu.architecture}, {cpu.usable} of {cpu.cores} cores usable",
        f"instructions: {', '.join(cpu.simd) or 'baseline'}",
        f"memory: {machine.memory_bytes / 1e9:.1f} GB",
    ]
    jetson = machine.jetson
    if jetson is not None:
        lines.append(
            f"{jetson.board}, JetPack {jetson.jetpack or '?'} (Jetson Linux {jetson.l4t or '?'}), "
            f"power mode {jetson.mode or '?'}"
        )
    for gpu in machine.gpus:
        details = [
            f"compute capability {gpu.capability}" if gpu.capability else "",
            f"{gpu.memory_bytes / 1e9:.0f} GB" if gpu.memory_bytes else "",
            f"driver {gpu.driver}" if gpu.driver else "",
        ]
        lines.append(", ".join([f"GPU: {gpu.name}", *filter(None, details)]))
    if not machine.gpus:
        lines.append("no NVIDIA GPU")
    if machine.cuda:
        lines.append(f"CUDA {machine.cuda}")
    if machine.tensorrt_library:
        lines.append(f"TensorRT {machine.tensorrt_library} in the system")
    return lines


def _software_lines(diagnosis: Diagnosis) -> list[str]:
    there = [f"{name} {version}" for name, version in diagnosis.packages.items() if version]
    missing = [name for name, version in diagnosis.packages.items() if not version]
    cache = diagnosis.cache
    lines = [f"Python {diagnosis.python}", f"installed: {', '.join(there)}"]
    if missing:
        lines.append(f"not installed: {', '.join(missing)}")
    return [
        *lines,
        f"native module: {diagnosis.native}",
        f"cache: {cache['folder']}, {cache['entries']} entries, {cache['bytes'] / 1e6:.0f} MB"
        + ("" if cache["writable"] else ", cannot be written"),
    ]


def _backend_lines(diagnosis: Diagnosis) -> list[str]:
    lines = []
    for state in diagnosis.backends:
        text = f"{state.backend} on {state.device}: "
        if not state.precisions:
            lines.append(f"{text}no: {state.reason}")
            continue
        text += ", ".join(state.precisions)
        lines.append(f"{text} ({state.reason})" if state.reason else text)
    return lines
