"""The examples run, or where their libraries are not here, are at least what those would take."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fuseengine.video import include_dir, open_source

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_every_example_says_how_to_run_it(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert f"python examples/{path.name}" in ast.get_docstring(tree)


def test_a_network_of_your_own(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_model.py")],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "/usr/bin:/bin", "FUSEENGINE_CACHE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("program ") == 2


def test_messages_of_ros(monkeypatch):
    """The node's conversions, on messages made by hand; rclpy itself is not needed for them."""
    source = (EXAMPLES / "ros2_node.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    names = {"to_array", "to_message", "LAYOUTS"}
    kept = [
        node
        for node in tree.body
        if getattr(node, "name", None) in names
        or (isinstance(node, ast.Assign) and node.targets[0].id in names)
    ]

    class Message:
        def __init__(self, header=None):
            self.header = header

    space = {"np": np, "Image": Message}
    exec(compile(ast.Module(kept, []), "ros2_node.py", "exec"), space)
    counts = np.arange(12, dtype=">u2").reshape(3, 4)
    message = Message()
    message.encoding, message.height, message.width, message.is_bigendian = "mono16", 3, 4, 1
    message.step = 10  # rows are padded by two bytes
    rows = np.zeros((3, 10), np.uint8)
    rows[:, :8] = counts.view(np.uint8).reshape(3, 8)
    message.data = rows.tobytes()
    np.testing.assert_array_equal(space["to_array"](message), counts.astype(np.uint16))
    colour = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    sent = space["to_message"](colour, "header")
    sent.is_bigendian = 0
    np.testing.assert_array_equal(space["to_array"](sent), colour)
    sent.encoding = "bgr8"
    np.testing.assert_array_equal(space["to_array"](sent), colour[..., ::-1])
    sent.encoding = "yuv422"
    with pytest.raises(ValueError, match="expected one of mono8"):
        space["to_array"](sent)


@pytest.mark.skipif(sys.platform != "linux", reason="POSIX shared memory of Linux")
def test_a_camera_written_in_c(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    program, name = tmp_path / "thermal_camera", f"fuse-example-{tmp_path.name}"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-O2", "-I", str(include_dir())]
    code = str(EXAMPLES / "thermal_camera.c")
    subprocess.run([compiler, *flags, code, "-o", str(program), "-lm", "-lrt"], check=True)
    camera = subprocess.Popen([str(program), name, "300"])
    try:
        ring = Path(f"/dev/shm/{name}")
        while not ring.exists() and camera.poll() is None:
            time.sleep(0.01)
        time.sleep(0.1)
        source = open_source(f"shm://{name}")
        seen = [source.read() for _ in range(5)]
        source.close()
    finally:
        camera.kill()
        camera.wait()
        ring.unlink(missing_ok=True)
    assert all(frame.format == "gray16" and frame.size == (512, 640) for frame in seen)
    places = [np.unravel_index(frame.image.argmax(), frame.size) for frame in seen]
    assert all(frame.image.max() > 22_850 for frame in seen)
    assert places[0] != places[-1]  # the warm spot moves
