"""Prune: results that nobody reads are not computed.

Removes calls whose every result is unread and marks unread results of stages, so that a stage is
lowered without the layers that only they need (DRFusion's weight-map decoder in the last step).
Exact: what is left out reaches nothing.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fuseengine.program import Node, Program


def prune(program: Program, model: nn.Module) -> Program:
    """Walk backwards from the output and keep what is read."""
    needed = {program.output}
    kept: list[Node] = []
    for node in reversed(program.nodes):
        outputs = tuple(name if name in needed else None for name in node.outputs)
        if all(name is None for name in outputs):
            continue
        needed.update(node.inputs)
        kept.append(replace(node, outputs=outputs))
    return program.with_nodes(reversed(kept))
