"""Metrics of a packaged model's saved pictures, beside the pixelwise maximum and the average.

    python -m benchmarks.quality drfusion-s --infrared DIR --visible DIR [--precision auto]

Metrics are computed on what is saved: the luma of the 8-bit output, as written and read again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

import fuseengine as fe
from benchmarks.harness import Result, this_command
from fuseengine.metrics import evaluate
from fuseengine.runtime.images import pair_files

KEYS = ("EN", "SD", "SF", "AG", "SCD", "MI", "VIF", "Qabf")
"""What papers on infrared and visible images print; higher is better for all of them."""


def luma(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey levels (H, W) of an RGB or grey frame, as the metrics' definitions take them."""
    return np.asarray(Image.fromarray(frame).convert("L"))


def measure(
    model: str, infrared: Path, visible: Path, precision: str
) -> dict[str, dict[str, float]]:
    """Mean of every metric over the pairs, per method."""
    engine = fe.compile(model, precision=precision)
    values: dict[str, dict[str, list[float]]] = {}
    for ir_path, vis_path in tqdm(pair_files(infrared, visible).pairs):
        ir, vis = fe.read_image(ir_path), fe.read_image(vis_path)
        a, b = luma(ir), luma(vis)
        fused = {
            f"{model} {precision}": luma(engine(ir, vis)),
            "pixelwise maximum": np.maximum(a, b),
            "average": ((a.astype(np.uint16) + b + 1) // 2).astype(np.uint8),
        }
        for method, picture in fused.items():
            for key, value in evaluate(picture, a, b, KEYS).items():
                values.setdefault(method, {}).setdefault(key, []).append(value)
    return {
        method: {key: float(np.mean(seen)) for key, seen in metrics.items()}
        for method, metrics in values.items()
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--infrared", type=Path, required=True)
    parser.add_argument("--visible", type=Path, required=True)
    parser.add_argument("--name", default="pairs", help="name of the set in the result")
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    result = Result(
        suite=f"quality-{args.model}-{args.name}",
        device="cpu",
        title=f"{args.model} on {args.name}: means over the pairs, higher is better",
        settings={"precision": args.precision},
        command=this_command(),
    )
    for method, row in measure(args.model, args.infrared, args.visible, args.precision).items():
        result.add(method, **row)
    print(result.table())
    print(*result.write(), sep="\n")


if __name__ == "__main__":
    main()
