"""Two cameras, one window: the shortest loop that keeps a deadline.

python examples/camera_loop.py /dev/video1 /dev/video0 [rig.json]

Any sources work: v4l2 devices, rtsp://, csi://, files, folders of images, shm://NAME.
"""

import sys

import fuseengine as fe
from fuseengine.alignment import Alignment, Rig
from fuseengine.thermal import ThermalInput

infrared, visible, *rig = sys.argv[1:]
size = (480, 640)
engine = fe.compile("drfusion-s", size=size)
alignment = Alignment(Rig.load(rig[0]), size) if rig else None

with (
    fe.Stream(engine, deadline_ms=100, thermal=ThermalInput(), alignment=alignment) as stream,
    fe.open_sink("display://") as window,
):
    for frame in stream.run(infrared, visible):
        window.write(frame)
        if window.dismissed:  # q or Escape
            break
print(stream.stats)
