"""Stages through PyTorch: eager (the reference) and torch.compile, on the CPU or a CUDA device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fuseengine.backends.base import Backend, StageSource
from fuseengine.program import StageVariant
from fuseengine.runtime.executor import StageRunner


class TorchBackend(Backend):
    """Eager PyTorch, channels-last."""

    name = "torch"
    extra = "compile"
    package = "torch"
    needs_module = True

    def unavailable(self, device: str) -> str | None:
        """Also needs the device."""
        missing = super().unavailable(device)
        if missing or device == "cpu":
            return missing
        import torch

        return None if torch.cuda.is_available() else "PyTorch sees no CUDA device"

    def precisions(self, device: str) -> tuple[str, ...]:
        """Float32 and bfloat16; on a CUDA device also TF32 (float32 storage) and float16."""
        return ("fp32", "tf32", "bf16", "fp16") if device == "cuda" else ("fp32", "bf16")

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
        """A copy of the module in the precision; results are copied to the engine's buffers."""
        import torch

        if device == "cpu":
            torch.set_num_threads(threads)
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = dtypes.get(precision, torch.float32)
        module = copy.deepcopy(source.module(variant)).to(device, dtype).eval()
        module = module.to(memory_format=torch.channels_last)
        return _Runner(self._prepare(module, device), variant, dtype, precision == "tf32")

    def _prepare(self, module: Any, device: str) -> Any:
        return module


class InductorBackend(TorchBackend):
    """``torch.compile``; it takes minutes, so only ``effort="full"`` tries it."""

    name = "inductor"
    quick = False

    def _prepare(self, module: Any, device: str) -> Any:
        import torch

        options = {"max_autotune": True, "triton.cudagraphs": False} if device == "cuda" else {}
        return torch.compile(module, fullgraph=True, dynamic=False, options=options or None)


class _Runner:
    def __init__(self, module: Any, variant: StageVariant, dtype: Any, tf32: bool) -> None:
        self.module, self.use, self.dtype, self.tf32 = module, variant.use, dtype, tf32

    def bind(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Callable[[], object]:
        import torch

        given = [_tensor(array) for array in inputs]
        made = [_tensor(array) for array in outputs]
        module, use, dtype = self.module, self.use, self.dtype
        # PyTorch's own default lets cuDNN round float32 to TF32; here float32 means float32.
        rounding = {"enabled": True, "benchmark": True, "allow_tf32": self.tf32}

        def call() -> None:
            with torch.inference_mode(), torch.backends.cudnn.flags(**rounding):
                results = module(*(t.to(dtype) for t in given))
                if not isinstance(results, (tuple, list)):
                    results = (results,)
                for index, target in zip(use, made, strict=True):
                    target.copy_(results[index])

        return call


def _tensor(array: Any) -> Any:
    import torch

    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array
