"""Backends: each lowers one stage variant for one picture size, device and precision.

The modules import their libraries where they are used, so this package imports without any of them.
"""

from __future__ import annotations

from fuseengine.backends.base import Backend, StageSource
from fuseengine.backends.onnxruntime import OnnxRuntimeBackend
from fuseengine.backends.openvino import OpenVinoBackend
from fuseengine.backends.pytorch import InductorBackend, TorchBackend
from fuseengine.backends.tensorrt import TensorRtBackend
from fuseengine.errors import BackendUnavailableError, UnknownNameError

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        OpenVinoBackend(),
        OnnxRuntimeBackend(),
        TorchBackend(),
        InductorBackend(),
        TensorRtBackend(),
    )
}


def get_backend(name: str, device: str) -> Backend:
    """A backend that was asked for by name.

    Raises:
        UnknownNameError: no such backend.
        BackendUnavailableError: it cannot be used here; the message says what to install.
    """
    if name not in BACKENDS:
        raise UnknownNameError("backend", name, ["auto", *BACKENDS])
    reason = BACKENDS[name].unavailable(device)
    if reason:
        raise BackendUnavailableError(f"backend {name!r} cannot be used on {device}: {reason}")
    return BACKENDS[name]


__all__ = ["BACKENDS", "Backend", "StageSource", "get_backend"]
