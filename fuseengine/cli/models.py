"""``fuseengine models``: what there is to fuse with and to train."""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

from fuseengine.cli.common import RawHelp
from fuseengine.errors import UnknownNameError


class _Configuration(NamedTuple):
    parameters: int
    steps: int
    channels: str
    multiple: int


# Written down, because counting them needs PyTorch; a test compares it with build().
_CONFIGURATIONS = {
    "drfusion-s": _Configuration(1_368_135, 3, "luma", 4),
    "drfusion-m": _Configuration(7_961_235, 3, "luma", 4),
    "drfusion": _Configuration(31_773_119, 3, "luma", 2),
    "dmfuse-s": _Configuration(775_917, 1, "luma", 32),
    "dmfuse": _Configuration(25_004_689, 1, "luma", 32),
    "drmf-s": _Configuration(2_107_825, 5, "rgb", 32),
    "drmf": _Configuration(170_983_816, 5, "rgb", 16),
    "dmnet-s": _Configuration(1_199_358, 1, "luma", 32),
    "dmnet": _Configuration(385_804_684, 1, "luma", 16),
    "mask-difuser-s": _Configuration(1_169_968, 5, "rgb", 16),
    "mask-difuser": _Configuration(171_278_145, 5, "rgb", 16),
}


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "models",
        help="list the models, or show a packaged model's card",
        description="List the models. Those with packaged weights are ready for\n"
        "'fuseengine fuse'; the others can be trained with 'fuseengine train', or take a\n"
        "checkpoint in Python.",
        epilog="examples:\n  fuseengine models\n  fuseengine models drfusion-s",
        formatter_class=RawHelp,
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="show the whole card of this packaged model"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from fuseengine.zoo import packaged_models

    if args.name is not None:
        packaged = packaged_models()
        if args.name not in packaged:
            raise UnknownNameError("packaged model", args.name, packaged)
        card = packaged[args.name].card
        print(json.dumps(card, indent=2) if args.json else "\n".join(_outline(card)))
        return 0
    rows = describe_models()
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    from fuseengine.report import table

    head = ["model", "parameters", "steps", "channels", "sizes", "packaged", "trained for"]
    print(
        table(
            [
                head,
                *(
                    [
                        row["name"],
                        f"{row['parameters'] / 1e6:.2f} M",
                        str(row["steps"]),
                        row["channels"],
                        f"any (padded to {row['multiple']})",
                        f"{row['megabytes']:.1f} MB" if row["packaged"] else "no",
                        row["trained_for"] or "-",
                    ]
                    for row in rows
                ),
            ]
        )
    )
    return 0


def describe_models() -> list[dict[str, Any]]:
    """Every model by name: packaged ones from their cards, then the untrained configurations.

    Returns:
        Plain data with the keys name, parameters, steps, channels, multiple, packaged, megabytes
        (of the weights' file) and trained_for; the last two are None where nothing is packaged.
    """
    from fuseengine.zoo import packaged_models

    rows: list[dict[str, Any]] = []
    packaged = packaged_models()
    for name, model in packaged.items():
        rows.append(
            {
                "name": name,
                "parameters": model.parameters,
                "steps": model.steps,
                "channels": model.channels,
                "multiple": model.multiple,
                "packaged": True,
                "megabytes": model.weights.stat().st_size / 1e6,
                "trained_for": ", ".join(model.card.get("tasks", ())),
            }
        )
    for name, known in _CONFIGURATIONS.items():
        if name not in packaged:
            rows.append(
                {
                    "name": name,
                    **known._asdict(),
                    "packaged": False,
                    "megabytes": None,
                    "trained_for": None,
                }
            )
    return rows


def _outline(data: Any, indent: str = "") -> list[str]:
    """Nested plain data as indented ``key: value`` lines."""
    lines = []
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        label = f"{indent}{key}:" if isinstance(data, dict) else f"{indent}-"
        if isinstance(value, (dict, list)) and value:
            lines += [label, *_outline(value, indent + "  ")]
        else:
            lines.append(f"{label} {value}")
    return lines
