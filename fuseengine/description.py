"""What an engine is, as plain data: what the cache's entries and bundles hold. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuseengine.errors import CaptureError
from fuseengine.program import Program, StageVariant
from fuseengine.report import Report

Choice = Mapping[StageVariant, tuple[str, str]]
"""Stage variant -> (backend, precision)."""


@dataclass(frozen=True)
class Description:
    """An engine without its networks.

    Attributes:
        program: the captured model.
        choice: backend and precision per stage variant.
        report: what compile() tried and chose.
        size: (height, width) of the frames it takes, or None for any.
        device: "cpu" or "cuda".
        resumed: the program for a frame that starts from the one before; its values have names of
            their own, its stages are the other program's.
    """

    program: Program
    choice: Choice
    report: Report
    size: tuple[int, int] | None
    device: str
    resumed: Program | None = None

    @property
    def programs(self) -> tuple[Program, ...]:
        """The program, and the resumed one where there is one."""
        return (self.program,) if self.resumed is None else (self.program, self.resumed)

    @property
    def constants(self) -> dict[str, NDArray[np.float32]]:
        """All programs' constants by name."""
        return {name: a for program in self.programs for name, a in program.constants.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, all but the constants' values."""
        data = {
            "program": self.program.to_dict(),
            "choice": [
                {**variant_to_dict(variant), "backend": backend, "precision": precision}
                for variant, (backend, precision) in self.choice.items()
            ],
            "report": self.report.to_dict(),
            "size": None if self.size is None else list(self.size),
            "device": self.device,
        }
        if self.resumed is not None:
            data["resumed"] = self.resumed.to_dict()
        return data

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], constants: Mapping[str, NDArray[np.float32]]
    ) -> Description:
        """The inverse of :meth:`to_dict`.

        Raises:
            CaptureError: not a program of this schema.
            KeyError, TypeError, ValueError: other data than :meth:`to_dict` gives.
        """
        program = Program.from_dict(data["program"], constants)
        resumed = None
        if "resumed" in data:
            resumed = Program.from_dict(data["resumed"], constants)
            check_resumed(program, resumed)
        choice = {
            variant_from_dict(entry): (str(entry["backend"]), str(entry["precision"]))
            for entry in data["choice"]
        }
        missing = [variant.label for variant in program.variants() if variant not in choice]
        if missing:
            raise ValueError(f"no backend is chosen for the stages {missing}")
        size = data["size"]
        return cls(
            program,
            choice,
            Report.from_dict(data["report"]),
            None if size is None else (int(size[0]), int(size[1])),
            str(data["device"]),
            resumed,
        )


def check_resumed(program: Program, resumed: Program) -> None:
    """Raise CaptureError unless a program can go on from what the other one made."""
    if len(program.inputs) != 2 or len(resumed.inputs) != 3:
        raise CaptureError(
            f"programs of {len(program.inputs)} and {len(resumed.inputs)} inputs; expected 2 and 3"
        )
    shapes = {resumed.values[name].shape for name in (*resumed.inputs, resumed.output)}
    shapes |= {program.values[name].shape for name in (*program.inputs, program.output)}
    if len(shapes) > 1:
        raise CaptureError(f"the pictures of both programs have the shapes {shapes}; expected one")
    own, borrowed = program.variants(), resumed.variants()
    for variant, calls in borrowed.items():
        wanted = [resumed.values[name].shape for name in calls[0].inputs]
        found = own.get(variant)
        if not found or [program.values[name].shape for name in found[0].inputs] != wanted:
            raise CaptureError(f"the stage {variant.label} of shapes {wanted} is only resumed")


def variant_to_dict(variant: StageVariant) -> dict[str, Any]:
    """A stage variant as plain JSON data."""
    return {"stage": variant.stage, "use": list(variant.use), "form": variant.form}


def variant_from_dict(data: Mapping[str, Any]) -> StageVariant:
    """The inverse of :func:`variant_to_dict`; other keys are left alone."""
    return StageVariant(str(data["stage"]), tuple(map(int, data["use"])), int(data["form"]))
