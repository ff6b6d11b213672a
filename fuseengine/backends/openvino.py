"""Stages through OpenVINO's CPU plugin. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from fuseengine.backends.base import Backend, StageSource, network_kind
from fuseengine.program import StageVariant
from fuseengine.runtime.executor import StageRunner

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32", "int8+bf16": "bf16"}
"""Precision of what is not int8; OpenVINO reads Q/DQ pairs out of the network."""


class OpenVinoBackend(Backend):
    """OpenVINO; the precision is always said, because its default on many CPUs is bfloat16."""

    name = "openvino"
    extra = "openvino"
    package = "openvino"

    def unavailable(self, device: str) -> str | None:
        """Only the CPU."""
        if device != "cpu":
            return "it runs stages on the CPU here; use device='cpu' or another backend"
        return super().unavailable(device)

    def precisions(self, device: str) -> tuple[str, ...]:
        """Float32 and int8, and with bfloat16 or float16 where the processor computes in them."""
        needs = {"bf16": "BF16", "fp16": "FP16", "int8+bf16": "BF16"}
        found = _capabilities()
        return tuple(name for name in _HINTS if name not in needs or needs[name] in found)

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
        """Compile the ONNX model for fixed shapes."""
        from openvino import properties

        model = core().read_model(source.onnx(variant, network_kind(precision)))
        model.reshape(
            {value.any_name: list(s) for value, s in zip(model.inputs, shapes, strict=True)}
        )
        compiled = core().compile_model(
            model,
            "CPU",
            {
                properties.hint.performance_mode: properties.hint.PerformanceMode.LATENCY,
                properties.hint.inference_precision: _HINTS[precision],
                properties.inference_num_threads: threads,
                properties.num_streams: 1,
                properties.hint.enable_cpu_pinning: False,
            },
        )
        return _Runner(compiled)


class _Runner:
    def __init__(self, compiled: Any) -> None:
        # One request for all calls of the stage: its intermediate memory exists once.
        self.request = compiled.create_infer_request()

    def bind(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Callable[[], object]:
        from openvino import Tensor

        given = [Tensor(array, shared_memory=True) for array in inputs]
        made = [Tensor(array, shared_memory=True) for array in outputs]
        request = self.request

        def call() -> None:
            for index, tensor in enumerate(given):
                request.set_input_tensor(index, tensor)
            for index, tensor in enumerate(made):
                request.set_output_tensor(index, tensor)
            request.infer()

        return call


@cache
def core() -> Any:
    """The process's one ``openvino.Core``.

    The CPU plugin of each gives the thread an alternate signal stack, and puts back the one before
    when it goes. Of two that overlap the second puts back the first's, which is gone by then: the
    next signal that Python handles, such as Ctrl-C, ends the process (seen with 2026.4).
    """
    import openvino

    return openvino.Core()


@cache
def _capabilities() -> tuple[str, ...]:
    return tuple(core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
