"""Stages through ONNX Runtime's CPU provider. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from fuseengine.backends.base import Backend, StageSource
from fuseengine.program import StageVariant
from fuseengine.runtime.executor import StageRunner


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime, with outputs written straight into the engine's buffers."""

    name = "onnxruntime"
    extra = "compile"
    package = "onnxruntime"

    def unavailable(self, device: str) -> str | None:
        """Only the CPU: stages on a GPU go through PyTorch or TensorRT."""
        if device != "cpu":
            return "it runs stages on the CPU here; use device='cpu' or another backend"
        return super().unavailable(device)

    def precisions(self, device: str) -> tuple[str, ...]:
        """Float32 and int8: its CPU kernels for half types are slower than float32's."""
        return ("fp32", "int8")

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

        options = session_options(threads)
        _share_one_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        session = ort.InferenceSession(
            source.onnx(variant, precision), options, providers=["CPUExecutionProvider"]
        )
        # Its Python side keeps the serialised model, as large as the weights, for a change of
        # providers; there is one here.
        session._model_bytes = None
        return _Runner(session)


def session_options(threads: int) -> Any:
    """Settings for an ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        threads: that an operator may use.

    Returns:
        An ``onnxruntime.SessionOptions``.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads take the cores from what runs between stages, and from everything else on
    # a busy machine, where a stage then takes twice as long.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    # A plan of memory per input size comes on top of what the first run took, a quarter more in
    # all, and saves no time that could be measured.
    options.enable_mem_pattern = False
    # Nor a plan of which result takes whose place: of sizes that are open while it is made none
    # are seen to be equal, so it finds nothing, in time that grows with the square of the nodes:
    # 10 s for 3,000. The arena gives what is free to the next in any case.
    options.enable_mem_reuse = False
    return options


@cache
def _share_one_arena() -> None:
    """Let all sessions of the process that ask for it take their memory from one arena.

    Stages run one after the other, so what one has left is there for the next; by default each
    session keeps its own, and grows it to the next power of two.
    """
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    as_requested = ort.OrtArenaCfg({"arena_extend_strategy": 1})
    ort.create_and_register_allocator(memory, as_requested)


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
