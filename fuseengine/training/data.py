"""Image pairs from folders, cut into random patches; the n-th batch depends on seed and n alone.

That makes a run resumable without saving the state of a loader: after a restart batch n is drawn
again exactly as it would have been.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fuseengine.errors import TrainingError
from fuseengine.runtime.images import pair_files, read_image
from fuseengine.training.degradations import gaussian_blur

_PAIR_FOLDERS = (("ir", "vis"), ("infrared", "visible"), ("a", "b"))
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def find_pair_folders(root: Path) -> list[tuple[Path, Path]]:
    """Folders of pairs under a root: ``ir/vis``, ``infrared/visible`` or ``a/b``, at any depth.

    Raises:
        TrainingError: there is none.
    """
    found = []
    for folder in [root, *sorted(p for p in root.rglob("*") if p.is_dir())]:
        for first, second in _PAIR_FOLDERS:
            if (folder / first).is_dir() and (folder / second).is_dir():
                found.append((folder / first, folder / second))
    if not found:
        names = ", ".join(f"{a}/ and {b}/" for a, b in _PAIR_FOLDERS)
        raise TrainingError(f"{root}: no image pairs; expected a folder that holds {names}")
    return found


def read_luma(path: Path) -> NDArray[np.uint8]:
    """A picture's luma, (H, W) uint8 (BT.601 full range)."""
    image = read_image(path)
    levels = image // 257 if image.dtype == np.uint16 else image
    if levels.ndim == 3:
        levels = np.rint(levels.astype(np.float32) @ _LUMA)
    return levels.astype(np.uint8)


def change_tone(x: Tensor, rng: np.random.Generator) -> Tensor:
    """A random tone curve ``gain x^gamma + offset`` that stays in [0, 1].

    Cameras differ in exposure and automatic gain; low-contrast pictures are the common case.
    """
    gamma, gain = float(rng.uniform(0.6, 1.6)), float(rng.uniform(0.35, 1.0))
    return gain * x.pow(gamma) + float(rng.uniform(0.0, 1.0 - gain))


def add_grain(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Fine grain, standard deviation up to 0.025: texture of the source, to be kept."""
    grain = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    if rng.random() < 0.5:
        grain = gaussian_blur(grain, float(rng.uniform(0.3, 0.8)))
        grain = grain / grain.std()
    return x + 0.025 * float(rng.random()) * grain


@dataclass(frozen=True)
class PatchSettings:
    """How patches are drawn.

    Attributes:
        size: height and width of a patch in pixels.
        batch: patches per step.
        smallest_scale: pictures are scaled by a random factor from here ...
        largest_scale: ... to here: shrunk ones show large structures in one patch, enlarged ones
            are soft as many thermal pictures are.
        tone_chance: probability that a source's tone curve is changed, see :func:`change_tone`.
        grain_chance: probability that a source gets fine grain, see :func:`add_grain`.
    """

    size: int = 192
    batch: int = 4
    smallest_scale: float = 0.5
    largest_scale: float = 1.4
    tone_chance: float = 0.6
    grain_chance: float = 0.5


class PairPatches:
    """Random registered patches of luma pairs, kept in memory as uint8.

    Args:
        root: folder searched with :func:`find_pair_folders`.
        settings: how patches are drawn.
        seed: with the step number, decides every draw.

    Raises:
        TrainingError: no pairs, or a pair of two sizes.
    """

    def __init__(self, root: str | Path, settings: PatchSettings, seed: int = 0) -> None:
        self.settings, self.seed = settings, seed
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for first, second in find_pair_folders(Path(root)):
            for a, b in pair_files(first, second)[0]:
                pair = read_luma(a), read_luma(b)
                if pair[0].shape != pair[1].shape:
                    raise TrainingError(
                        f"{a} is {pair[0].shape} and {b} is {pair[1].shape}; expected one size"
                    )
                self.pairs.append((torch.from_numpy(pair[0]), torch.from_numpy(pair[1])))
        if not self.pairs:
            raise TrainingError(
                f"{root}: its pair folders hold no two images of one name; expected the same file "
                "name (without suffix) in both"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The patches of a step: two (batch, 1, size, size) float32 tensors in [0, 1]."""
        rng = np.random.default_rng((self.seed, step))
        drawn = [self._patch(rng) for _ in range(self.settings.batch)]
        first, second = zip(*drawn, strict=True)
        return torch.cat(first), torch.cat(second)

    def _patch(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        size = self.settings.size
        pair = self.pairs[int(rng.integers(len(self.pairs)))]
        height, width = pair[0].shape
        # Never below the patch: a smaller picture is enlarged just enough.
        least = size / min(height, width)
        scale = rng.uniform(self.settings.smallest_scale, self.settings.largest_scale)
        scale = max(scale, least)
        extent = min(int(np.ceil(size / scale)), height, width)
        top = int(rng.integers(height - extent + 1))
        left = int(rng.integers(width - extent + 1))
        flip, turn = rng.random() < 0.5, int(rng.integers(4)) if rng.random() < 0.25 else 0
        patches = []
        for image in pair:
            patch = image[top : top + extent, left : left + extent].float().div(255)[None, None]
            if extent != size:
                patch = F.interpolate(
                    patch, (size, size), mode="bilinear", antialias=True, align_corners=False
                )
            if rng.random() < self.settings.tone_chance:
                patch = change_tone(patch.clamp(0.0, 1.0), rng)
            if rng.random() < self.settings.grain_chance:
                patch = add_grain(patch, rng)
            patch = patch.clamp(0.0, 1.0)
            patch = torch.rot90(patch, turn, (2, 3))
            patches.append(patch.flip(3) if flip else patch)
        return patches[0], patches[1]
