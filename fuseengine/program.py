"""A program: what capture yields and an engine runs. Plain data, no torch.

A program is a short list of nodes in single assignment form over named values. A node is the call
of a stage (a dense network that a backend lowers as a whole) or of an op
(``fuseengine.runtime.ops``). Shapes may hold symbolic dimensions in terms of the picture's padded
height H and width W, such as ``"H"``, ``"W/8"`` or ``"H*W/64"``, so one program serves every size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuseengine.errors import CaptureError

Dim = int | str
Shape = tuple[Dim, ...]

SCHEMA = 1

_MOST_LISTED = 8
"""Results of a stage that its label lists one by one."""


@dataclass(frozen=True)
class Value:
    """A tensor of the program: float32, with symbolic or fixed dimensions."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Node:
    """One call.

    Attributes:
        kind: "stage" or "op".
        target: name of the stage or op.
        inputs: names of values.
        outputs: names of the values it makes; None where a stage's result is not used.
        attrs: plain numbers, texts and lists of them. A stage that is called with inputs of
            different shapes has ``form``, the number of the shapes.
    """

    kind: str
    target: str
    inputs: tuple[str, ...]
    outputs: tuple[str | None, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def made(self) -> list[str]:
        """Names of the values it makes."""
        return [name for name in self.outputs if name is not None]


@dataclass(frozen=True)
class Program:
    """A captured model.

    Attributes:
        model: the model's name, for people.
        channels: "luma" or "rgb".
        multiple: height and width are multiples of this.
        inputs: names of the two sources' values; of a program that starts from the fused image
            of the frame before, a third for that.
        output: name of the fused image's value.
        values: every value by name.
        constants: arrays of the values that are known at compile time.
        nodes: calls in an order in which every input is made before it is used.
        padding: what stands right of and below a frame whose size is no multiple: "reflect" (the
            edge pixel is not repeated) or "white" (1.0).
    """

    model: str
    channels: str
    multiple: int
    inputs: tuple[str, ...]
    output: str
    values: Mapping[str, Value]
    constants: Mapping[str, NDArray[np.float32]]
    nodes: tuple[Node, ...]
    padding: str = "reflect"

    def stage_calls(self) -> list[Node]:
        """The stage calls in order."""
        return [node for node in self.nodes if node.kind == "stage"]

    def variants(self) -> dict[StageVariant, list[Node]]:
        """The distinct networks to lower: per stage and set of used results, their calls."""
        found: dict[StageVariant, list[Node]] = {}
        for node in self.stage_calls():
            found.setdefault(StageVariant.of(node), []).append(node)
        return found

    def with_nodes(self, nodes: Iterable[Node], **changes: Any) -> Program:
        """A copy with other nodes; values and constants nobody mentions are dropped."""
        nodes = tuple(nodes)
        changed = replace(self, nodes=nodes, **changes)
        named = {*changed.inputs, changed.output}
        for node in nodes:
            named.update(node.inputs, node.made())
        return replace(
            changed,
            values={n: v for n, v in changed.values.items() if n in named},
            constants={n: a for n, a in changed.constants.items() if n in named},
        )

    def renamed(self, prefix: str) -> Program:
        """The same with a prefix before every value's name, to stand beside another program."""

        def new(name: str) -> str:
            return prefix + name

        return replace(
            self,
            inputs=tuple(map(new, self.inputs)),
            output=new(self.output),
            values={new(n): Value(new(n), v.shape) for n, v in self.values.items()},
            constants={new(n): array for n, array in self.constants.items()},
            nodes=tuple(
                replace(
                    node,
                    inputs=tuple(map(new, node.inputs)),
                    outputs=tuple(None if n is None else new(n) for n in node.outputs),
                )
                for node in self.nodes
            ),
        )

    def __str__(self) -> str:
        """The program as text: one line per call."""

        def shown(name: str) -> str:
            return f"{name}: f32[{', '.join(map(str, self.values[name].shape))}]"

        lines = [f"program {self.model}({', '.join(map(shown, self.inputs))}):"]
        lines += [f"    const {shown(name)}" for name in self.constants]
        for node in self.nodes:
            made = ", ".join("_" if n is None else shown(n) for n in node.outputs)
            rest = [f"{k}={_short(v)}" for k, v in node.attrs.items()]
            mark = "stage " if node.kind == "stage" else ""
            target = node.target or "model"
            lines.append(f"    {made} = {mark}{target}({', '.join([*node.inputs, *rest])})")
        return "\n".join([*lines, f"    return {self.output}"])

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the constants' values, which are arrays and are saved beside it."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "channels": self.channels,
            "multiple": self.multiple,
            "padding": self.padding,
            "inputs": list(self.inputs),
            "output": self.output,
            "values": {name: list(value.shape) for name, value in self.values.items()},
            "constants": list(self.constants),
            "nodes": [
                {
                    "kind": node.kind,
                    "target": node.target,
                    "inputs": list(node.inputs),
                    "outputs": list(node.outputs),
                    "attrs": dict(node.attrs),
                }
                for node in self.nodes
            ],
        }

    @classmethod
    def from_json(cls, text: str, constants: Mapping[str, NDArray[np.float32]]) -> Program:
        """The inverse of :meth:`to_json`.

        Raises:
            CaptureError: not a program of this schema, or a constant is missing.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise CaptureError(f"not a program: {error!r}") from error
        return cls.from_dict(data, constants)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], constants: Mapping[str, NDArray[np.float32]]
    ) -> Program:
        """The inverse of :meth:`to_dict`.

        Raises:
            CaptureError: not a program of this schema, or a constant is missing.
        """
        try:
            schema = data["schema"]
            if schema != SCHEMA:
                raise CaptureError(f"program schema {schema!r}; expected {SCHEMA}")
            missing = [name for name in data["constants"] if name not in constants]
            if missing:
                raise CaptureError(f"constants {missing} of the program are missing")
            program = cls(
                model=data["model"],
                channels=data["channels"],
                multiple=data["multiple"],
                inputs=tuple(data["inputs"]),
                output=data["output"],
                values={name: Value(name, tuple(shape)) for name, shape in data["values"].items()},
                constants={name: constants[name] for name in data["constants"]},
                nodes=tuple(
                    Node(
                        node["kind"],
                        node["target"],
                        tuple(node["inputs"]),
                        tuple(node["outputs"]),
                        node["attrs"],
                    )
                    for node in data["nodes"]
                ),
                padding=data.get("padding", "reflect"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CaptureError(f"not a program: {error!r}") from error
        program.check()
        return program

    def check(self) -> None:
        """Raise CaptureError unless every value is made once and before it is used."""
        if len(self.inputs) not in (2, 3) or any(n not in self.values for n in self.inputs):
            raise CaptureError(
                f"inputs {self.inputs}; expected two or three of the program's values"
            )
        unshaped = [name for name in self.constants if name not in self.values]
        if unshaped:
            raise CaptureError(f"the constants {unshaped[:5]} have no shape")
        made = {*self.inputs, *self.constants}
        for node in self.nodes:
            for name in node.inputs:
                if name not in made:
                    raise CaptureError(f"{node.target} uses {name!r} before it is made")
            for name in node.made():
                if name in made or name not in self.values:
                    raise CaptureError(f"{node.target} makes {name!r} twice or without a shape")
                made.add(name)
        if self.output not in made:
            raise CaptureError(f"the output {self.output!r} is never made")


@dataclass(frozen=True)
class StageVariant:
    """A stage with the results that its callers use: what a backend lowers.

    Attributes:
        stage: dotted name of the submodule; "" is the whole model.
        use: indices of the used results.
        form: which of the shapes it is called with; 0 where there is only one.
    """

    stage: str
    use: tuple[int, ...]
    form: int = 0

    @classmethod
    def of(cls, node: Node) -> StageVariant:
        """The variant that a stage call needs."""
        use = tuple(i for i, n in enumerate(node.outputs) if n is not None)
        return cls(node.target, use, int(node.attrs.get("form", 0)))

    @property
    def label(self) -> str:
        """A name fit for files and reports, such as ``unet-0`` or ``project-0-1-2.form1``."""
        form = f".form{self.form}" if self.form else ""
        use = "-".join(map(str, self.use))
        if len(self.use) > _MOST_LISTED and self.use == tuple(range(len(self.use))):
            use = f"all{len(self.use)}"
        return f"{self.stage or 'model'}-{use}{form}"


def resolve(shape: Sequence[Dim], size: tuple[int, int]) -> tuple[int, ...]:
    """A shape for a padded picture size (H, W).

    Raises:
        CaptureError: a dimension does not come out whole.
    """
    known = {"H": size[0], "W": size[1], "H*W": size[0] * size[1]}
    resolved = []
    for dim in shape:
        if isinstance(dim, int):
            resolved.append(dim)
            continue
        symbol, _, divisor = dim.partition("/")
        factor, _, symbol = symbol.rpartition(" ")
        value = Fraction(known[symbol] * int(factor or 1), int(divisor or 1))
        if value.denominator != 1:
            raise CaptureError(f"dimension {dim} is not whole for {size[0]}x{size[1]}")
        resolved.append(int(value))
    return tuple(resolved)


def symbolic(first: Sequence[int], second: Sequence[int], sizes: tuple[Any, Any]) -> Shape:
    """The symbolic shape behind two measured ones.

    Args:
        first: shape at sizes[0].
        second: shape at sizes[1].
        sizes: two picture sizes (H, W) that differ in H, in W, in H/W and in H*W.

    Raises:
        CaptureError: a dimension is neither fixed nor a multiple of H, W or H*W.
    """
    dims: list[Dim] = []
    for one, two in zip(first, second, strict=True):
        if one == two:
            dims.append(one)
            continue
        for symbol, a, b in (
            ("H", sizes[0][0], sizes[1][0]),
            ("W", sizes[0][1], sizes[1][1]),
            ("H*W", sizes[0][0] * sizes[0][1], sizes[1][0] * sizes[1][1]),
        ):
            ratio = Fraction(one, a)
            if ratio == Fraction(two, b):
                front = f"{ratio.numerator} " if ratio.numerator > 1 else ""
                back = f"/{ratio.denominator}" if ratio.denominator > 1 else ""
                dims.append(f"{front}{symbol}{back}")
                break
        else:
            raise CaptureError(f"a dimension is {one} at {sizes[0]} and {two} at {sizes[1]}")
    return tuple(dims)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
