"""The networks behind a program's stages: of a live model, or the cache's ONNX files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fuseengine.errors import CacheError
from fuseengine.program import Program, StageVariant

if TYPE_CHECKING:
    from torch import nn


class ModelStages:
    """Stages of a model in memory; ONNX is written on demand, once per variant.

    Args:
        model: the captured model, on the CPU or a CUDA device.
        program: its program, which knows the shapes.
    """

    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model, self.program = model, program
        self.written: dict[StageVariant, bytes] = {}

    def onnx(self, variant: StageVariant, *, fallback: bool = True) -> bytes:
        """The variant as ONNX, float32; see :func:`fuseengine.export.onnx.stage_to_onnx`."""
        if variant not in self.written:
            from fuseengine.export.onnx import stage_to_onnx

            call = self.program.variants()[variant][0]
            values = self.program.values
            self.written[variant] = stage_to_onnx(
                self.module(variant),
                [(f"in{i}", values[name].shape) for i, name in enumerate(call.inputs)],
                [(f"out{i}", values[call.outputs[i] or ""].shape) for i in variant.use],
                name=variant.label,
                use=variant.use,
                fallback=fallback,
            ).SerializeToString()
        return self.written[variant]

    def module(self, variant: StageVariant) -> Any:
        """The submodule itself."""
        return self.model.get_submodule(variant.stage)


class CachedStages:
    """Stages of a cache entry; PyTorch is only imported for a backend that needs the module.

    Args:
        onnx: serialised ONNX per variant, as far as it was written.
        load: makes the model, for backends that need the module.
    """

    def __init__(
        self, onnx: Mapping[StageVariant, bytes], load: Callable[[], nn.Module] | None
    ) -> None:
        self._onnx, self._load = onnx, load
        self._model: nn.Module | None = None

    def onnx(self, variant: StageVariant) -> bytes:
        """The stored ONNX bytes.

        Raises:
            CacheError: the entry holds none for this variant.
        """
        if variant not in self._onnx:
            raise CacheError(
                f"the cache entry holds no network for {variant.label}; clear the cache"
            )
        return self._onnx[variant]

    def module(self, variant: StageVariant) -> Any:
        """The submodule of the freshly loaded model."""
        if self._load is None:
            raise CacheError(f"the cache entry holds no module for {variant.label}")
        if self._model is None:
            self._model = self._load()
        return self._model.get_submodule(variant.stage)
