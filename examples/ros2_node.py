"""A ROS 2 node: two image topics in, the fused image out. Needs rclpy and message_filters.

python examples/ros2_node.py --ros-args -p engine:=drfusion.fuse \
    -r infrared:=/thermal/image_raw -r visible:=/camera/image_raw -r fused:=/fused/image

Encodings: mono8, mono16, rgb8, bgr8. The newest pair wins: a pair that comes while one is being
fused replaces the one that waits, so that latency does not grow.
"""

import threading

import message_filters
import numpy as np
import rclpy
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image

import fuseengine as fe
from fuseengine.alignment import Alignment, Rig
from fuseengine.thermal import ThermalInput

LAYOUTS = {
    "mono8": (np.uint8, 1),
    "mono16": (np.uint16, 1),
    "rgb8": (np.uint8, 3),
    "bgr8": (np.uint8, 3),
}


def to_array(message):
    """A message as (H, W) or (H, W, 3) RGB, without a copy where that is possible."""
    if message.encoding not in LAYOUTS:
        raise ValueError(f"encoding {message.encoding!r}; expected one of {', '.join(LAYOUTS)}")
    dtype, channels = LAYOUTS[message.encoding]
    order = ">" if message.is_bigendian else "<"
    item = np.dtype(dtype).itemsize
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    pixels = rows[:, : message.width * channels * item]
    image = np.ascontiguousarray(pixels).view(np.dtype(dtype).newbyteorder(order))
    image = image.astype(dtype, copy=False).reshape(message.height, message.width, channels)
    if channels == 1:
        return image[..., 0]
    return image[..., ::-1] if message.encoding == "bgr8" else image


def to_message(image, header):
    """A fused frame as a message with the visible camera's stamp."""
    message = Image(header=header)
    message.height, message.width = image.shape[:2]
    message.encoding = "rgb8" if image.ndim == 3 else "mono8"
    message.step = image.strides[0]
    message.data = np.ascontiguousarray(image).tobytes()
    return message


class Fusion(Node):
    """Subscribes to both cameras, fuses in a thread of its own, publishes."""

    def __init__(self):
        super().__init__("fuseengine")
        path = self.declare_parameter("engine", "").value
        rig = self.declare_parameter("rig", "").value
        tolerance = self.declare_parameter("tolerance_s", 0.03).value
        self.engine = fe.load(path) if path else fe.compile("drfusion-s")
        self.alignment = Alignment(Rig.load(rig), self.engine.size) if rig else None
        self.thermal = ThermalInput()
        self.publisher = self.create_publisher(Image, "fused", qos_profile_sensor_data)
        cameras = [
            message_filters.Subscriber(self, Image, name, qos_profile=qos_profile_sensor_data)
            for name in ("infrared", "visible")
        ]
        pairs = message_filters.ApproximateTimeSynchronizer(cameras, 4, tolerance)
        pairs.registerCallback(self.take)
        self.waiting, self.dropped = None, 0
        self.changed = threading.Condition()
        threading.Thread(target=self.work, daemon=True).start()

    def take(self, infrared, visible):
        """A pair of messages: it replaces one that still waits."""
        with self.changed:
            self.dropped += self.waiting is not None
            self.waiting = infrared, visible
            self.changed.notify()

    def work(self):
        """Fuse the newest pair, for ever."""
        while rclpy.ok():
            with self.changed:
                self.changed.wait_for(lambda: self.waiting is not None)
                (infrared, visible), self.waiting = self.waiting, None
            try:
                self.publisher.publish(to_message(self.fuse(infrared, visible), visible.header))
            except (fe.FuseEngineError, ValueError) as error:
                self.get_logger().warning(str(error), throttle_duration_sec=5.0)

    def fuse(self, infrared, visible):
        """One pair of messages to the fused image."""
        warm, seen = self.thermal(to_array(infrared)), to_array(visible)
        if self.alignment is not None:
            warm, seen = self.alignment(warm, seen)
        return self.engine(warm, seen)


def main():
    rclpy.init()
    node = Fusion()
    try:
        rclpy.spin(node)
    finally:
        node.get_logger().info(f"{node.dropped} pairs dropped")
        rclpy.shutdown()


if __name__ == "__main__":
    main()
