"""Small folders of images, and evaluations without measuring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fuseengine.evaluation.pairing import Case
from fuseengine.evaluation.run import Evaluation

SIZE = (40, 56)
NAMES = ("a", "b", "c")


def picture(seed, size=SIZE, channels=1):
    """A smooth random picture with grain, so that every metric is defined."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7), np.uint8))
    smooth = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC), np.float64)
    planes = [np.clip(smooth + rng.normal(0, 9, size), 0, 255) for _ in range(channels)]
    stacked = np.stack(planes, axis=-1).astype(np.uint8)
    return stacked[..., 0] if channels == 1 else stacked


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def folders(tmp_path):
    """Folders ir, vis, one and two with the images a, b and c; vis holds other suffixes."""
    for index, name in enumerate(NAMES):
        ir, vis = picture(index), picture(10 + index)
        save(tmp_path / "ir" / f"{name}.png", ir)
        save(tmp_path / "vis" / f"{name}.bmp", vis)
        mean = (ir.astype(np.uint16) + vis) // 2
        save(tmp_path / "one" / f"{name}.png", np.maximum(ir, vis))
        save(tmp_path / "two" / f"{name}.png", mean.astype(np.uint8))
    return tmp_path


@pytest.fixture
def make_evaluation():
    """Builds an evaluation from values (methods, images, metrics)."""

    def make(values, metrics=("EN", "VIF"), methods=None, **changes):
        values = np.asarray(values, np.float64)
        methods = methods or tuple(f"method {index}" for index in range(len(values)))
        names = [f"{index:02}" for index in range(values.shape[1])]
        cases = tuple(
            Case(name, Path("ir"), Path("vis"), (Path("f"),) * len(methods), (30, 40))
            for name in names
        )
        return Evaluation(
            **{
                "methods": methods,
                "metrics": metrics,
                "cases": cases,
                "values": values,
                "convention": "default",
                "infrared_range": None,
                "folders": {name: Path(name) for name in ("infrared", "visible", *methods)},
                "unpaired": {},
                "left_out": (),
                "facts": {},
                **changes,
            }
        )

    return make
