"""Stages through ONNX Runtime's CPU provider. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fuseengine.backends.base import Backend, StageSource
from fuseengine.program import StageVariant
from fuseengine.runtime.executor import StageRunner


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime in float32, with outputs written straight into the engine's buffers."""

    name = "onnxruntime"
    extra = "compile"
    library = "onnxruntime"

    def unavailable(self, device: str) -> str | None:
        """Only the CPU: stages on a GPU go through PyTorch or TensorRT."""
        if device != "cpu":
            return "it runs stages on the CPU here; use device='cpu' or another backend"
        return super().unavailable(device)

    def precisions(self, device: str) -> tuple[str, ...]:
        """Float32: its CPU kernels for half types are slower than that."""
        return ("fp32",)

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
        """One session per variant; it takes any size, so shapes only matter when binding."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Spinning threads take the cores from what runs between stages, and from everything else on
        # a busy machine, where a stage then takes twice as long.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        session = ort.InferenceSession(
            source.onnx(variant), options, providers=["CPUExecutionProvider"]
        )
        return _Runner(session)


class _Runner:
    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs = [value.name for value in session.get_inputs()]
        self.outputs = [value.name for value in session.get_outputs()]

    def bind(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Callable[[], object]:
        binding = self.session.io_binding()
        for bind, names, arrays in (
            (binding.bind_input, self.inputs, inputs),
            (binding.bind_output, self.outputs, outputs),
        ):
            for name, array in zip(names, arrays, strict=True):
                bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        session = self.session
        return lambda: session.run_with_iobinding(binding)
