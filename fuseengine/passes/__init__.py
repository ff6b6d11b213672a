"""Passes: functions Program -> Program that make it cheaper without changing what it computes.

One file each; every docstring says what is saved and why it is exact. They run in the order of
:data:`PASSES`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fuseengine.passes.freeze_time import freeze_time
from fuseengine.passes.narrow import narrow
from fuseengine.passes.prune import prune
from fuseengine.program import Program

PASSES: tuple[Callable[[Program, nn.Module], Program], ...] = (freeze_time, narrow, prune)


def run_passes(program: Program, model: nn.Module) -> Program:
    """Every pass in order; the program is checked after each."""
    for apply in PASSES:
        program = apply(program, model)
        program.check()
    return program


__all__ = ["PASSES", "freeze_time", "narrow", "prune", "run_passes"]
