"""Metrics of a packaged model's saved pictures, beside the pixelwise maximum and the average.

    python -m benchmarks.quality drfusion-s --infrared DIR --visible DIR [--precision auto]
    python -m benchmarks.quality mask-difuser-s --infrared mef/a --visible mef/b --name mef --all

Metrics are computed on what is saved: the luma of the 8-bit output, as written and read again. With
``--all`` every default metric is, and the notes say which of them either baseline wins.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

import fuseengine as fe
from benchmarks.harness import Result, slug, this_command
from fuseengine.metrics import METRICS, evaluate
from fuseengine.runtime.images import pair_files

KEYS = ("EN", "SD", "SF", "AG", "SCD", "MI", "VIF", "Qabf")
"""What papers on infrared and visible images print; higher is better for all of them."""
DEFAULTS = tuple(key for key, metric in METRICS.items() if metric.default)
MAXIMUM, AVERAGE = "pixelwise maximum", "average"


def luma(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey levels (H, W) of an RGB or grey frame, as the metrics' definitions take them."""
    return np.asarray(Image.fromarray(frame).convert("L"))


def measure(
    model: str,
    infrared: Path,
    visible: Path,
    precision: str,
    *,
    keys: Sequence[str] = KEYS,
    most: int | None = None,
) -> dict[str, dict[str, float]]:
    """Mean of every metric over the first pairs, per method."""
    engine = fe.compile(model, precision=precision)
    values: dict[str, dict[str, list[float]]] = {}
    for ir_path, vis_path in tqdm(pair_files(infrared, visible).pairs[:most]):
        ir, vis = fe.read_image(ir_path), fe.read_image(vis_path)
        a, b = luma(ir), luma(vis)
        fused = {
            f"{model} {precision}": luma(engine(ir, vis)),
            MAXIMUM: np.maximum(a, b),
            AVERAGE: ((a.astype(np.uint16) + b + 1) // 2).astype(np.uint8),
        }
        for method, picture in fused.items():
            for key, value in evaluate(picture, a, b, keys).items():
                values.setdefault(method, {}).setdefault(key, []).append(value)
    return {
        method: {key: float(np.mean(seen)) for key, seen in metrics.items()}
        for method, metrics in values.items()
    }


def lost(means: dict[str, dict[str, float]], model: str, baseline: str) -> list[str]:
    """Metrics on which the model is not better than a baseline."""
    signs = {key: 1.0 if METRICS[key].higher_is_better else -1.0 for key in means[model]}
    return [k for k, sign in signs.items() if not sign * (means[model][k] - means[baseline][k]) > 0]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--infrared", type=Path, required=True)
    parser.add_argument("--visible", type=Path, required=True)
    parser.add_argument("--name", default="pairs", help="name of the set in the result")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--all", action="store_true", help="every default metric")
    parser.add_argument("--pairs", type=int, metavar="N", help="the first N pairs only")
    args = parser.parse_args()
    keys = DEFAULTS if args.all else KEYS
    result = Result(
        suite=f"quality-{args.model}-{slug(args.name)}",
        device="cpu",
        title=f"{args.model} on {args.name}: means over the pairs",
        settings={"precision": args.precision},
        command=this_command(),
    )
    means = measure(
        args.model, args.infrared, args.visible, args.precision, keys=keys, most=args.pairs
    )
    for method, row in means.items():
        result.add(method, **row)
    model = next(iter(means))
    for baseline in (MAXIMUM, AVERAGE):
        worse = lost(means, model, baseline)
        told = f"; not on {', '.join(worse)}" if worse else ""
        result.notes.append(
            f"better than the {baseline} on {len(keys) - len(worse)} of {len(keys)}{told}"
        )
    print(result.table())
    print(*result.write(), sep="\n")


if __name__ == "__main__":
    main()
