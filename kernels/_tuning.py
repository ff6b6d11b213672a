"""Block sizes and warps per op: shipped data, looked up, never searched for at run time.

``tuning.json`` holds safe defaults per dtype and, per compute capability, entries that were
measured by ``python -m benchmarks.gpu_ops --tune``. The nearest entry in size (in octaves) of the
same capability and dtype is taken; without one, the default. Sizes are told apart by the nearest
power of two only, so that trying one size per octave finds all settings that a GPU may ask for
(:mod:`fuseengine.kernels.aot`).
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch

from fuseengine.errors import SettingError

PATH = Path(__file__).with_name("tuning.json")

_FAR = 3.0
"""An entry more than this many octaves away says nothing about a size."""


@functools.cache
def table() -> dict[str, Any]:
    """The shipped table: op -> {"defaults": {dtype: settings}, "measured": [entries]}."""
    return json.loads(PATH.read_text(encoding="utf-8"))["ops"]


@functools.lru_cache(maxsize=1024)
def choose(op: str, dtype: torch.dtype, capability: int, work: int) -> dict[str, Any]:
    """Settings for an op.

    Args:
        op: its name.
        dtype: of its tensors.
        capability: two digits, 87 for 8.7.
        work: size class: the number of pixels or elements that the op names.

    Returns:
        The default settings, with those of the nearest measured entry over them.
    """
    name = str(dtype).removeprefix("torch.")
    rows = table()[op]
    chosen = dict(rows["defaults"][name])

    octave = round(math.log2(max(work, 1)))

    def distance(entry: dict[str, Any]) -> float:
        return abs(octave - math.log2(entry["work"]))

    fitting = [
        entry
        for entry in rows["measured"]
        if (entry["capability"], entry["dtype"]) == (capability, name) and distance(entry) <= _FAR
    ]
    if fitting:
        chosen |= min(fitting, key=distance)["settings"]
    return chosen


def with_entry(
    data: dict[str, Any], op: str, capability: int, dtype: str, work: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """A copy of a whole tuning file with one measured entry added or replaced.

    Raises:
        SettingError: the op, the dtype or a setting is none that the defaults name.
    """
    data = json.loads(json.dumps(data))
    if op not in data["ops"] or dtype not in data["ops"][op]["defaults"]:
        raise SettingError(f"{op} in {dtype}; expected one of the table's ops and dtypes")
    known = data["ops"][op]["defaults"][dtype]
    if set(settings) - set(known):
        raise SettingError(f"settings {sorted(settings)} of {op}; expected {sorted(known)}")
    key = {"capability": capability, "dtype": dtype, "work": work}
    measured = [e for e in data["ops"][op]["measured"] if {k: e[k] for k in key} != key]
    measured.append({**key, "settings": settings})
    measured.sort(key=lambda e: (e["capability"], e["dtype"], e["work"]))
    data["ops"][op]["measured"] = measured
    return data
