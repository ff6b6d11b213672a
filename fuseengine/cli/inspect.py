"""``fuseengine inspect``: what is in a bundle, and what of it is verified."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuseengine.cli.common import RawHelp

if TYPE_CHECKING:
    from fuseengine.runtime.bundle import Bundle


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "inspect",
        help="show what is in a compiled file",
        description="Show a bundle's program, stages, precisions, sizes and kernels, and what of\n"
        "it was verified. Everything in the file is checked against its hashes; no\n"
        "network is loaded.",
        epilog="examples:\n  fuseengine inspect drfusion.fuse\n"
        "  fuseengine inspect drfusion.fuse --json",
        formatter_class=RawHelp,
    )
    parser.add_argument("bundle", type=Path, metavar="FILE.fuse", help="bundle to look at")
    parser.add_argument("--json", action="store_true", help="print the whole manifest as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from fuseengine.runtime.bundle import Bundle

    with Bundle(args.bundle) as bundle:
        print(json.dumps(bundle.manifest, indent=1) if args.json else describe(bundle))
    return 0


def describe(bundle: Bundle) -> str:
    """A bundle as text."""
    manifest, description = bundle.manifest, bundle.description
    program = description.program
    size = "any size"
    if description.size is not None:
        size = f"{description.size[1]}x{description.size[0]}"
    at = manifest["buffers"]["size"]
    parts = [
        f"{bundle.path}: {bundle.size / 1e6:.2f} MB, schema {manifest['schema']}, "
        f"{manifest['made_by']}",
        f"model: {program.model}; {manifest['colour']['result']}",
        f"frames: {size}, padded to multiples of {program.multiple}",
        f"compiled for: {bundle.target.name} ({bundle.target.title}), {description.device}",
        f"buffers: at most {manifest['buffers']['bytes'] / 1e6:.1f} MB at {at[1]}x{at[0]}",
        "",
        "stages",
        _stages(bundle),
        "",
        "ops: " + _counted(node.target for node in program.nodes if node.kind == "op"),
        "kernels: " + ("; ".join(map(_kernels, manifest["kernels"])) or "none"),
        "plans: " + ("; ".join(map(_plan, manifest["plans"].values())) or "none"),
        "",
        *(f"verified: {text}" for text in manifest["verified"]),
        *(f"NOT verified: {text}" for text in manifest["not_verified"]),
        "",
        str(description.report),
        "",
        "\n\n".join(map(str, description.programs)),
    ]
    return "\n".join(parts)


def _stages(bundle: Bundle) -> str:
    from fuseengine.report import table

    rows = [["stage", "backend", "precision", "calls", "networks"]]
    calls = bundle.description.program.variants()
    for variant, (backend, precision) in bundle.description.choice.items():
        networks = [
            f"{kind} {network.size / 1e6:.2f} MB"
            for (held, kind), network in bundle.networks.items()
            if held == variant
        ]
        count = str(len(calls.get(variant, ())))
        rows.append([variant.label, backend, precision, count, ", ".join(networks)])
    return table(rows)


def _counted(names: Iterable[str]) -> str:
    counts = Counter(names).items()
    return ", ".join(f"{count} {name}" for name, count in counts) or "none"


def _kernels(entry: dict[str, Any]) -> str:
    capability = f"{entry['capability'] // 10}.{entry['capability'] % 10}"
    return (
        f"{entry['count']} {entry['form']} for compute capability {capability} "
        f"({entry['bytes'] / 1e3:.0f} kB)"
    )


def _plan(entry: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in entry["about"].items()) or entry["file"]
