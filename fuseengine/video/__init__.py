"""Video: two cameras in, one fused picture out. Imports neither torch nor PyAV nor OpenCV.

Start at :class:`~fuseengine.video.stream.Stream`; :mod:`~fuseengine.video.sources` and
:mod:`~fuseengine.video.sinks` list what can be opened.
"""

from __future__ import annotations

from fuseengine.video.events import Event
from fuseengine.video.frames import CameraFrame, Colour, FusedFrame, Picture
from fuseengine.video.shared_memory import include_dir
from fuseengine.video.sinks import Sink, open_sink
from fuseengine.video.sources import Source, open_source
from fuseengine.video.statistics import StreamStats
from fuseengine.video.stream import Stream

__all__ = [
    "CameraFrame",
    "Colour",
    "Event",
    "FusedFrame",
    "Picture",
    "Sink",
    "Source",
    "Stream",
    "StreamStats",
    "include_dir",
    "open_sink",
    "open_source",
]
