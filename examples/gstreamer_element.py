"""A GStreamer pipeline with fusion in the middle: two appsinks in, an appsrc out. Needs PyGObject.

python examples/gstreamer_element.py \
    "v4l2src device=/dev/video1 ! videoconvert" \
    "v4l2src device=/dev/video0 ! videoconvert" \
    "videoconvert ! x264enc tune=zerolatency ! matroskamux ! filesink location=fused.mkv"

On a Jetson: nvarguscamerasrc ! nvvidconv in front, nvvidconv ! nvv4l2h264enc behind.
"""

import sys

import gi
import numpy as np

import fuseengine as fe

gi.require_version("Gst", "1.0")
gi.require_version("GstApp", "1.0")
from gi.repository import Gst, GstApp  # noqa: E402, F401

WIDTH, HEIGHT, RATE = 640, 480, 30
CAPS = f"video/x-raw,width={WIDTH},height={HEIGHT},framerate={RATE}/1,format="
# The newest frame wins: an appsink that drops is a camera that is not waited for.
SINK = "appsink name={} max-buffers=1 drop=true sync=false"


def pixels(sample, channels):
    """A sample's picture as (H, W[, 3]); rows are padded to 4 bytes."""
    buffer = sample.get_buffer()
    ok, mapped = buffer.map(Gst.MapFlags.READ)
    if not ok:
        raise RuntimeError("a buffer cannot be mapped")
    try:
        step = -(-WIDTH * channels // 4) * 4
        rows = np.frombuffer(mapped.data, np.uint8)[: step * HEIGHT].reshape(HEIGHT, step)
        image = rows[:, : WIDTH * channels].copy()
    finally:
        buffer.unmap(mapped)
    return image if channels == 1 else image.reshape(HEIGHT, WIDTH, 3)


def main():
    infrared, visible, output = sys.argv[1:4]
    engine = fe.compile("drfusion-s", size=(HEIGHT, WIDTH))
    Gst.init(None)
    cameras = Gst.parse_launch(
        f"{infrared} ! videoscale ! {CAPS}GRAY8 ! {SINK.format('ir')} "
        f"{visible} ! videoscale ! {CAPS}RGB ! {SINK.format('vis')}"
    )
    # GStreamer's RGB rows are padded to 4 bytes; 640 and 3 * 640 are multiples already.
    result = Gst.parse_launch(
        f"appsrc name=fused is-live=true format=time caps={CAPS}RGB ! {output}"
    )
    sinks = [cameras.get_by_name(name) for name in ("ir", "vis")]
    source = result.get_by_name("fused")
    for pipeline in (result, cameras):
        pipeline.set_state(Gst.State.PLAYING)
    try:
        while True:
            samples = [sink.try_pull_sample(Gst.SECOND) for sink in sinks]
            if any(sink.is_eos() for sink in sinks):
                break
            if None in samples:
                print("a camera gave no frame for a second", file=sys.stderr)
                continue
            fused = engine(pixels(samples[0], 1), pixels(samples[1], 3))
            buffer = Gst.Buffer.new_wrapped(np.ascontiguousarray(fused).tobytes())
            buffer.pts = samples[1].get_buffer().pts  # the visible camera's time
            buffer.duration = Gst.SECOND // RATE
            source.push_buffer(buffer)
    except KeyboardInterrupt:
        pass
    finally:
        cameras.set_state(Gst.State.NULL)
        source.end_of_stream()  # so that the file is finished
        result.get_bus().timed_pop_filtered(
            5 * Gst.SECOND, Gst.MessageType.EOS | Gst.MessageType.ERROR
        )
        result.set_state(Gst.State.NULL)


if __name__ == "__main__":
    main()
