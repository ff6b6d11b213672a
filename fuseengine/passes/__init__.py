"""Passes: functions Program -> Program that make it cheaper without changing what it computes.

One file each; every docstring says what is saved and why it is exact. They run in the order of
:data:`PASSES`; :func:`batch_siblings` is run where it was measured to pay.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fuseengine.passes.batch_siblings import batch_siblings
from fuseengine.passes.freeze_time import freeze_time
from fuseengine.passes.hoist import hoist
from fuseengine.passes.narrow import narrow
from fuseengine.passes.prune import prune
from fuseengine.program import Program

Pass = Callable[[Program, nn.Module], Program]

PASSES: tuple[Pass, ...] = (freeze_time, hoist, narrow, prune)


def run_passes(program: Program, model: nn.Module) -> Program:
    """Every pass in order; the program is checked after each."""
    for apply in PASSES:
        program = apply(program, model)
        program.check()
    return program


__all__ = [
    "PASSES",
    "Pass",
    "batch_siblings",
    "freeze_time",
    "hoist",
    "narrow",
    "prune",
    "run_passes",
]
