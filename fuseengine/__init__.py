"""FuseEngine: a compiled inference engine for diffusion-based image fusion.

    import fuseengine as fe

    model = fe.load_model("drfusion-s")
    engine = fe.compile(model, size=(480, 640))
    fused = engine(infrared, visible)

Importing this imports neither PyTorch nor an inference runtime; each name loads what it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fuseengine.errors import FuseEngineError

if TYPE_CHECKING:
    from fuseengine.compiler import compile
    from fuseengine.demo import demo_pair
    from fuseengine.engine import Engine
    from fuseengine.models.base import FusionModel
    from fuseengine.models.checkpoint import load_checkpoint
    from fuseengine.models.registry import build, load_model, model_names
    from fuseengine.program import Program
    from fuseengine.runtime.images import read_image, write_image
    from fuseengine.saved_engine import load
    from fuseengine.temporal import Memory
    from fuseengine.tracing import capture
    from fuseengine.video.sinks import open_sink
    from fuseengine.video.sources import open_source
    from fuseengine.video.stream import Stream
    from fuseengine.zoo import packaged_models

__version__ = "0.1.0"

_HOMES = {
    "Engine": "engine",
    "FusionModel": "models.base",
    "Memory": "temporal",
    "Program": "program",
    "Stream": "video.stream",
    "build": "models.registry",
    "capture": "tracing",
    "compile": "compiler",
    "demo_pair": "demo",
    "load": "saved_engine",
    "load_checkpoint": "models.checkpoint",
    "load_model": "models.registry",
    "model_names": "models.registry",
    "open_sink": "video.sinks",
    "open_source": "video.sources",
    "packaged_models": "zoo",
    "read_image": "runtime.images",
    "write_image": "runtime.images",
}

__all__ = [
    "Engine",
    "FuseEngineError",
    "FusionModel",
    "Memory",
    "Program",
    "Stream",
    "build",
    "capture",
    "compile",
    "demo_pair",
    "load",
    "load_checkpoint",
    "load_model",
    "model_names",
    "open_sink",
    "open_source",
    "packaged_models",
    "read_image",
    "write_image",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'fuseengine' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"fuseengine.{home}"), name)
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise ImportError(
                f"fuseengine.{name} needs PyTorch; install it with: "
                "pip install 'fuseengine[compile]'"
            ) from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
