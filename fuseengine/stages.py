"""The networks behind a program's stages: of a live model, or the cache's ONNX files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fuseengine.backends.base import network_kind
from fuseengine.errors import CacheError, SettingError
from fuseengine.program import Program, StageVariant

if TYPE_CHECKING:
    from torch import nn


class ModelStages:
    """Stages of a model in memory; ONNX is written on demand, once per variant.

    Args:
        model: the captured model, on the CPU or a CUDA device.
        program: its program, which knows the shapes.
    """

    settled = False

    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model, self.program = model, program
        self.written: dict[StageVariant, bytes] = {}
        self.int8: dict[StageVariant, bytes] = {}

    def onnx(
        self, variant: StageVariant, precision: str = "fp32", *, fallback: bool = True
    ) -> bytes:
        """The variant as ONNX; see :func:`fuseengine.export.onnx.stage_to_onnx`.

        Args:
            variant: which.
            precision: "fp32", or "int8" once ``self.int8`` holds the networks that
                :func:`fuseengine.export.quantize.quantise_stages` made.
            fallback: see ``stage_to_onnx``.

        Raises:
            SettingError: an int8 network before there is one.
        """
        if precision == "int8":
            return _quantised(self.int8, variant)
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

    def networks(
        self, choice: Mapping[StageVariant, tuple[str, str]]
    ) -> Iterator[tuple[StageVariant, str, bytes]]:
        """Variant, "fp32" or "int8", and the network, of all that an engine so chosen may ask for.

        Float32 as far as it was written, and int8 where that was chosen.
        """
        for variant, content in self.written.items():
            yield variant, "fp32", content
        for variant, (_, precision) in choice.items():
            if network_kind(precision) == "int8":
                yield variant, "int8", self.int8[variant]

    def module(self, variant: StageVariant) -> Any:
        """The submodule itself."""
        return self.model.get_submodule(variant.stage)


class CachedStages:
    """Stages of a cache entry; PyTorch is only imported for a backend that needs the module.

    Args:
        onnx: serialised ONNX per variant, as far as it was written.
        load: makes the model, for backends that need the module.
        int8: the quantised networks of the variants that run in int8.
        settled: whether the entry is for one size, see
            :class:`StageSource <fuseengine.backends.base.StageSource>`.
    """

    def __init__(
        self,
        onnx: Mapping[StageVariant, bytes],
        load: Callable[[], nn.Module] | None,
        int8: Mapping[StageVariant, bytes] | None = None,
        settled: bool = False,
    ) -> None:
        self._onnx, self._load, self.int8 = onnx, load, dict(int8 or {})
        self.settled = settled
        self._model: nn.Module | None = None

    def onnx(self, variant: StageVariant, precision: str = "fp32") -> bytes:
        """The stored ONNX bytes.

        Raises:
            CacheError: the entry holds none for this variant.
            SettingError: it holds none in int8.
        """
        if precision == "int8":
            return _quantised(self.int8, variant)
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


def _quantised(networks: Mapping[StageVariant, bytes], variant: StageVariant) -> bytes:
    if variant not in networks:
        raise SettingError(
            f"there is no int8 network for {variant.label}; expected a model that was compiled "
            "with precision='int8', or with precision='auto' and calibration pictures"
        )
    return networks[variant]
