"""Fuse one pair of files and look at what the engine did.

python examples/fuse_pair.py infrared.png visible.png fused.png
"""

import sys

import fuseengine as fe

infrared, visible = fe.read_image(sys.argv[1]), fe.read_image(sys.argv[2])
engine = fe.compile("drfusion-s", size=visible.shape[:2])
fe.write_image(sys.argv[3], engine(infrared, visible))
print(engine.report)
print(engine.profile())
