"""What a backend is, and what it is given."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

from fuseengine.program import StageVariant
from fuseengine.runtime.executor import StageRunner


class StageSource(Protocol):
    """The networks behind a program's stages."""

    @property
    def settled(self) -> bool:
        """Whether they are a chosen engine's, for one size, rather than a search's candidates.

        What a backend made of them is then worth keeping for the next process.
        """

    def onnx(self, variant: StageVariant, precision: str = "fp32") -> bytes:
        """The variant as a serialised ONNX model, height and width open.

        Args:
            variant: which stage and which of its results.
            precision: "fp32"; or "int8": Q/DQ pairs around what is int8, float32 elsewhere.
        """

    def module(self, variant: StageVariant) -> Any:
        """The stage as a ``torch.nn.Module`` in float32; may have to import torch."""


def network_kind(precision: str) -> str:
    """Which ONNX network of a source a precision is lowered from: "fp32" or "int8".

    "int8+bf16" and the like are the int8 network with the rest in another precision.
    """
    return "int8" if precision.split("+")[0] == "int8" else "fp32"


class Backend(ABC):
    """Lowers stages. Stateless; :meth:`lower` may raise anything its library raises."""

    name: ClassVar[str]
    extra: ClassVar[str]
    """The install extra that brings its library."""
    package: ClassVar[str]
    """The import name of its library."""
    needs_module: ClassVar[bool] = False
    """Whether it lowers PyTorch modules, which no bundle holds, instead of ONNX networks."""
    quick: ClassVar[bool] = True
    """Whether lowering takes seconds; slow ones are tried with ``effort="full"`` only."""

    def unavailable(self, device: str) -> str | None:
        """Why it cannot be used on a device ("cpu", "cuda"); None when it can."""
        if importlib.util.find_spec(self.package) is None:
            return (
                f"{self.package} is not installed; install it with: "
                f"pip install 'fuseengine[{self.extra}]'"
            )
        return None

    @abstractmethod
    def precisions(self, device: str) -> tuple[str, ...]:
        """Names of the precisions it offers on a device, "fp32" first."""

    @abstractmethod
    def lower(
        self,
        source: StageSource,
        variant: StageVariant,
        shapes: tuple[tuple[int, ...], ...],
        *,
        precision: str,
        device: str,
        threads: int,
    ) -> StageRunner:
        """Lower one stage variant.

        Args:
            source: where its network comes from.
            variant: which stage and which of its results.
            shapes: shape of each of the stage's inputs.
            precision: one of :meth:`precisions`.
            device: "cpu" or "cuda".
            threads: CPU threads to use.

        Returns:
            A runner for inputs of these shapes.
        """
