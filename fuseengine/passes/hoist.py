"""Hoist: what is asked for twice is computed once.

A sampling step repeats whatever it does not share with the step before; what depends on the
sources alone (encoders, the part of the first convolution that sees the condition pictures, keys
and values of cross-attention) gives the same at every step. Calls of the same stage or op on the
same values with the same numbers become one, before the first that needs it, so a model may write
such a call inside its loop or outside. The five systems write theirs outside, and their networks
take what is the same at every step as inputs, so there is nothing left to find; a user's model may
gain whole encoders.

Exact: stages and ops depend on nothing but their inputs; random numbers are ops with their seed as
a number.
"""

from __future__ import annotations

import json
from dataclasses import replace

from torch import nn

from fuseengine.program import Node, Program


def hoist(program: Program, model: nn.Module) -> Program:
    """Drop every call that equals an earlier one; its readers take the earlier result."""
    same = _equal_constants(program)
    first: dict[tuple[str, ...], Node] = {}
    kept: list[Node] = []
    for node in program.nodes:
        node = replace(node, inputs=tuple(same.get(name, name) for name in node.inputs))
        key = (node.kind, node.target, *node.inputs, json.dumps(node.attrs, sort_keys=True))
        known = first.setdefault(key, node)
        if known is node:
            kept.append(node)
            continue
        if len(known.outputs) != len(node.outputs) or None in (*known.outputs, *node.outputs):
            kept.append(node)  # pruned before: the earlier call may not make all results
            continue
        same.update(zip(node.outputs, known.outputs, strict=True))  # type: ignore[arg-type]
    output = same.get(program.output, program.output)
    return program.with_nodes(kept, output=output)


def _equal_constants(program: Program) -> dict[str, str]:
    """Constant -> the first one with the same numbers."""
    names: dict[tuple[tuple[int, ...], bytes], str] = {}
    return {
        name: names.setdefault((array.shape, array.tobytes()), name)
        for name, array in program.constants.items()
    }
