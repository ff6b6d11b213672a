"""What an engine is, as plain data: what the cache's entries and bundles hold. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    """

    program: Program
    choice: Choice
    report: Report
    size: tuple[int, int] | None
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, all but the constants' values."""
        return {
            "program": self.program.to_dict(),
            "choice": [
                {**variant_to_dict(variant), "backend": backend, "precision": precision}
                for variant, (backend, precision) in self.choice.items()
            ],
            "report": self.report.to_dict(),
            "size": None if self.size is None else list(self.size),
            "device": self.device,
        }

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
        )


def variant_to_dict(variant: StageVariant) -> dict[str, Any]:
    """A stage variant as plain JSON data."""
    return {"stage": variant.stage, "use": list(variant.use), "form": variant.form}


def variant_from_dict(data: Mapping[str, Any]) -> StageVariant:
    """The inverse of :func:`variant_to_dict`; other keys are left alone."""
    return StageVariant(str(data["stage"]), tuple(map(int, data["use"])), int(data["form"]))
