"""Neighbouring stages and ops as one network.

A stage on its own brings its results into the layout that ops take, and the next one brings them
back; and a runtime cannot fuse across it. Where the ops between stages are cheap arithmetic they
can go into the network: a program of fewer, larger stages. What it costs: that arithmetic is in the
network's precision then. Attention over rows and columns and filters stay ops: the project's
kernels are much faster than their forms in standard operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fuseengine.errors import CompileError, SettingError
from fuseengine.export.whole import part_to_onnx
from fuseengine.program import Node, Program, StageVariant
from fuseengine.stages import ModelStages

_ARITHMETIC = ("add", "sub", "mul", "div", "concat", "slice", "clamp")
INSIDE = frozenset((*_ARITHMETIC, "ddim_step", "joint_ddim_step", "compose_priors"))
"""Ops that may go into a network."""


@dataclass(frozen=True)
class Part:
    """Nodes that became one stage.

    Attributes:
        nodes: in order.
        inputs: values from outside, constants left out.
        outputs: values that others read.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class MergedStages:
    """The networks of a merged program: those of its parts, and those that stayed.

    Args:
        program: the program before.
        stages: its networks.
        parts: by the name of the stage that each became.
    """

    settled = False

    def __init__(self, program: Program, stages: ModelStages, parts: Mapping[str, Part]) -> None:
        self.program, self.stages, self.parts = program, stages, dict(parts)
        self._written: dict[str, bytes] = {}

    def onnx(self, variant: StageVariant, precision: str = "fp32") -> bytes:
        """The network of a part, or of a stage that stayed.

        Raises:
            SettingError: a part's in another precision than "fp32".
        """
        part = self.parts.get(variant.stage)
        if part is None:
            return self.stages.onnx(variant, precision)
        if precision != "fp32":
            raise SettingError(
                f"{variant.label} in {precision}: merged stages are there in fp32 alone; expected "
                "a program whose stages were not merged"
            )
        if variant.stage not in self._written:
            model = part_to_onnx(self.program, self.stages, part.nodes, part.inputs, part.outputs)
            self._written[variant.stage] = model.SerializeToString()
        return self._written[variant.stage]

    def networks(
        self, choice: Mapping[StageVariant, tuple[str, str]]
    ) -> Iterator[tuple[StageVariant, str, bytes]]:
        """See :meth:`fuseengine.stages.ModelStages.networks`."""
        for variant in choice:
            yield variant, "fp32", self.onnx(variant)

    def module(self, variant: StageVariant) -> Any:
        """The submodule of a stage that stayed.

        Raises:
            CompileError: of a part, there is none.
        """
        if variant.stage in self.parts:
            raise CompileError(f"{variant.label} is several stages and ops; no backend of modules")
        return self.stages.module(variant)


def merge(program: Program, stages: ModelStages) -> tuple[Program, MergedStages] | None:
    """A program with as few stages as possible, or None where there is nothing to merge.

    What stands between two ops that stay ops becomes one stage. Exact but for the order of sums
    that a runtime chooses.
    """
    nodes: list[Node] = []
    parts: dict[str, Part] = {}
    groups = _groups(program)
    for group in groups:
        members = [program.nodes[i] for i in group]
        if not _worth_it(members):
            nodes += members
            continue
        rest = set(range(len(program.nodes))).difference(group)
        read = {name for i in rest for name in program.nodes[i].inputs} | {program.output}
        part = _part(members, program, read)
        name = f"merged.{len(parts)}"
        parts[name] = part
        nodes.append(Node("stage", name, part.inputs, part.outputs))
    if not parts:
        return None
    merged = program.with_nodes(nodes)
    merged.check()
    return merged, MergedStages(program, stages, parts)


def _inside(node: Node) -> bool:
    return node.kind == "stage" or node.target in INSIDE


def _worth_it(members: Sequence[Node]) -> bool:
    return len(members) > 1 and any(node.kind == "stage" for node in members)


def _groups(program: Program) -> list[list[int]]:
    """Indices of nodes in an order of execution; those of a group may be one stage.

    A value's depth is the number of outside ops behind it; what is inside and of one depth makes a
    group. No path leaves a group and comes back, because depth never falls along it.
    """
    depth = dict.fromkeys((*program.inputs, *program.constants), 0)
    layers: dict[int, tuple[list[int], list[list[int]]]] = {}
    for index, node in enumerate(program.nodes):
        at = max((depth[name] for name in node.inputs), default=0)
        inside, outside = layers.setdefault(at, ([], []))
        if _inside(node):
            inside.append(index)
        else:
            outside.append([index])
        for name in node.made():
            # What is made once per size, such as noise, is there from the start.
            depth[name] = at + (not _inside(node) and bool(node.inputs))
    ordered: list[list[int]] = []
    for at in sorted(layers):
        inside, outside = layers[at]
        once = [group for group in outside if not program.nodes[group[0]].inputs]
        rest = [group for group in outside if program.nodes[group[0]].inputs]
        ordered += [*once, *([inside] if inside else []), *rest]
    return ordered


def _part(members: Sequence[Node], program: Program, read: set[str]) -> Part:
    made = {name for node in members for name in node.made()}
    used = dict.fromkeys(name for node in members for name in node.inputs)
    inputs = tuple(n for n in used if n not in made and n not in program.constants)
    outputs = tuple(n for node in members for n in node.made() if n in read)
    return Part(tuple(members), inputs, outputs)
