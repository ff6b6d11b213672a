"""What a stream tells while it runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "deadline", "stall", "resume", "lost", "reconnect", "end", "size", "refused", "broken"
]

_LOG = logging.getLogger("fuseengine.video")


@dataclass(frozen=True)
class Event:
    """Something happened to a stream or to one of its cameras, and the stream goes on.

    Attributes:
        kind: "deadline": the engine cannot keep it; "stall" and "resume": no frames for a while,
            and frames again; "lost" and "reconnect": a live source broke off, and is there again;
            "end": a camera has no more frames; "size": its frames have another size from now on;
            "refused": a frame could not be prepared or fused and was dropped; "broken": damaged
            frames were skipped.
        camera: "infrared", "visible" or "" when it is about the whole stream.
        message: one line for people.
        time_s: seconds of ``time.monotonic()``.
    """

    kind: Kind
    camera: str
    message: str
    time_s: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"{self.camera}: {self.message}" if self.camera else self.message


Listener = Callable[[Event], None]
"""Called from the stream's threads, one call at a time; what it raises ends the stream."""


def log_event(event: Event) -> None:
    """The listener by default: a line of the logger "fuseengine.video"."""
    quiet = event.kind in ("resume", "reconnect", "end")
    _LOG.log(logging.INFO if quiet else logging.WARNING, "%s", event)
