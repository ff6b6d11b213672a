"""Batch siblings: calls of one network that do not wait for each other become one call.

Infrared and visible through the same encoder, the noise levels of a diffusion feature extractor:
the sources stand side by side as a batch, and the results are taken apart again. Saves launches and
the reading of the weights, and fills a processor that one picture at a coarse resolution leaves
half empty; costs copies into and out of the batch and the memory of all pictures at once. Exact for
networks that treat the pictures of a batch on their own, as those in evaluation mode do: the same
sums, though a backend may order them differently for another batch size.

It is not one of :data:`~fuseengine.passes.PASSES`: whether it pays is measured
(``benchmarks/passes.py``). For dmnet-s on two CPU cores no gain was seen, at 1.5 times the buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from fuseengine.passes.prune import prune
from fuseengine.program import Node, Program, Shape, StageVariant, Value


def batch_siblings(program: Program, model: nn.Module) -> Program:
    """Merge independent calls of the same stage variant, as many at once as there are."""
    program = program.with_nodes(program.nodes)
    for variant in list(program.variants()):
        group = _independent(program, variant)
        while len(group) > 1:
            program = _merged(program, group)
            group = _independent(program, variant)
    return prune(program, model)


def _independent(program: Program, variant: StageVariant) -> list[int]:
    """Positions of calls of a variant of which none needs another; the first such set.

    Only calls on single pictures: a batch is not batched again.
    """
    needs = _ancestors(program.nodes)
    group: list[int] = []
    for index, node in enumerate(program.nodes):
        if node.kind != "stage" or StageVariant.of(node) != variant:
            continue
        shapes = [program.values[name].shape for name in (*node.inputs, *node.made())]
        if all(shape[:1] == (1,) for shape in shapes) and not needs[index].intersection(group):
            group.append(index)
    return group


def _ancestors(nodes: Sequence[Node]) -> list[set[int]]:
    """For every call the positions of all calls that it needs, directly or not."""
    maker: dict[str, int] = {}
    needs: list[set[int]] = []
    for index, node in enumerate(nodes):
        direct = {maker[name] for name in node.inputs if name in maker}
        needs.append(direct.union(*(needs[i] for i in direct)))
        maker.update(dict.fromkeys(node.made(), index))
    return needs


def _merged(program: Program, group: Sequence[int]) -> Program:
    """The program with the calls of a group as one."""
    calls = [program.nodes[index] for index in group]
    values, constants = dict(program.values), dict(program.constants)
    name = f"batch{sum(n.startswith('batch') for n in values)}"
    count = len(calls)

    def value(suffix: str, shape: Shape) -> str:
        made = f"{name}_{suffix}"
        values[made] = Value(made, shape)
        return made

    taken = {n.made()[0]: n for n in program.nodes if n.target == "slice" and n.kind == "op"}
    before: list[Node] = []
    inputs = []
    for k, parts in enumerate(zip(*(call.inputs for call in calls), strict=True)):
        whole = _taken_apart([taken.get(part) for part in parts], values)
        if whole:
            inputs.append(whole)
            continue
        together = value(f"in{k}", (count, *values[parts[0]].shape[1:]))
        inputs.append(together)
        if all(part in constants for part in parts):
            constants[together] = np.concatenate([constants[part] for part in parts])
        else:
            before.append(Node("op", "concat", parts, (together,), {"axis": 0}))
    outputs: list[str | None] = []
    after: list[Node] = []
    for k, parts in enumerate(zip(*(call.outputs for call in calls), strict=True)):
        if parts[0] is None:  # calls of one variant leave out the same results
            outputs.append(None)
            continue
        together = value(f"out{k}", (count, *values[parts[0]].shape[1:]))
        outputs.append(together)
        after += [
            Node("op", "slice", (together,), (part,), {"bounds": [[i, i + 1]]})
            for i, part in enumerate(parts)
        ]
    form = _next_form(program, calls[0].target)
    batched = replace(calls[0], inputs=tuple(inputs), outputs=tuple(outputs), attrs={"form": form})
    # All that the calls need goes before them, in its order; the rest, which may need them, after.
    needs = _ancestors(program.nodes)
    early = set().union(*(needs[index] for index in group))
    first = [node for i, node in enumerate(program.nodes) if i in early]
    last = [n for i, n in enumerate(program.nodes) if i not in early and i not in group]
    nodes = [*first, *before, batched, *after, *last]
    return program.with_nodes(nodes, values=values, constants=constants)


def _taken_apart(slices: Sequence[Node | None], values: Mapping[str, Value]) -> str | None:
    """The batch of which these are all the pictures, in order; None if they are not."""
    source = slices[0].inputs[0] if slices[0] else None
    if source is None or values[source].shape[0] != len(slices):
        return None
    for i, node in enumerate(slices):
        if node is None or node.inputs[0] != source or node.attrs["bounds"] != [[i, i + 1]]:
            return None
    return source


def _next_form(program: Program, stage: str) -> int:
    return 1 + max(
        call.attrs.get("form", 0) for call in program.stage_calls() if call.target == stage
    )
