"""Stages through OpenVINO's CPU plugin. No torch."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fuseengine import cache
from fuseengine.backends.base import Backend, StageSource, network_kind
from fuseengine.errors import CacheError
from fuseengine.program import StageVariant
from fuseengine.runtime.executor import StageRunner

log = logging.getLogger("fuseengine")

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
        """Compile the ONNX model for fixed shapes, or take what an earlier process made of it."""
        from openvino import properties

        network = source.onnx(variant, network_kind(precision))
        settings = {
            properties.hint.performance_mode: properties.hint.PerformanceMode.LATENCY,
            properties.hint.inference_precision: _HINTS[precision],
            properties.inference_num_threads: threads,
            properties.num_streams: 1,
            properties.hint.enable_cpu_pinning: False,
        }
        if not source.settled:
            return _Runner(_compiled(network, shapes, settings))
        key = _key(network, shapes, precision, threads)
        kept = _kept(key, settings)
        if kept is None:
            kept = _compiled(network, shapes, settings)
            _keep(key, kept)
        return _Runner(kept)


def _compiled(
    network: bytes, shapes: tuple[tuple[int, ...], ...], settings: Mapping[str, Any]
) -> Any:
    model = core().read_model(network)
    model.reshape({value.any_name: list(s) for value, s in zip(model.inputs, shapes, strict=True)})
    return core().compile_model(model, "CPU", dict(settings))


# --- compiled networks in the cache: opening one takes a third of compiling it --------------------


def _key(network: bytes, shapes: tuple[tuple[int, ...], ...], precision: str, threads: int) -> str:
    import openvino

    library = openvino.get_version()
    texts = (str(shapes), precision, str(threads), library, cache.processor())
    return f"openvino-{cache.fingerprint([], hashlib.sha256(network).hexdigest(), *texts)[:40]}"


def _kept(key: str, settings: Mapping[str, Any]) -> Any:
    """The compiled network of an entry, or None."""
    files = cache.load(key)
    if files is None:
        return None
    try:
        return core().import_model(files["network"], "CPU", dict(settings))
    except (KeyError, RuntimeError) as error:
        log.warning("cache entry %s is unreadable (%r) and compiled again", key, error)
        cache.discard(key)
        return None


def _keep(key: str, compiled: Any) -> None:
    made = io.BytesIO()
    try:
        compiled.export_model(made)
        cache.store(key, {"network": made.getvalue()})
    except (CacheError, RuntimeError) as error:
        # A device may well have no place to write to; it compiles each time.
        log.info("%s", error)


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


@functools.cache
def core() -> Any:
    """The process's one ``openvino.Core``.

    The CPU plugin of each gives the thread an alternate signal stack, and puts back the one before
    when it goes. Of two that overlap the second puts back the first's, which is gone by then: the
    next signal that Python handles, such as Ctrl-C, ends the process (seen with 2026.4).
    """
    import openvino

    return openvino.Core()


@functools.cache
def _capabilities() -> tuple[str, ...]:
    return tuple(core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
