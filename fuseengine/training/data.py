"""Patches of pictures and of pairs from folders; the n-th batch depends on seed and n alone.

That makes a run resumable without saving the state of a loader: after a restart batch n is drawn
again exactly as it would have been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fuseengine.errors import TrainingError
from fuseengine.runtime.images import list_images, pair_files, read_image
from fuseengine.training.degradations import gaussian_blur

_PAIR_FOLDERS = (("ir", "vis"), ("infrared", "visible"), ("a", "b"))
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
Channels = Literal["luma", "rgb"]
Roots = str | Path | Sequence[str | Path]
"""One folder, or several."""


def find_pair_folders(root: Path) -> list[tuple[Path, Path]]:
    """Folders of pairs under a root: ``ir/vis``, ``infrared/visible`` or ``a/b``, at any depth.

    A folder that has a clean version beside it (``ir_clean`` beside ``ir``) gives its place to it.

    Raises:
        TrainingError: there is none.
    """
    found = []
    for folder in [root, *sorted(p for p in root.rglob("*") if p.is_dir())]:
        for one, other in _PAIR_FOLDERS:
            first, second = _clean(folder / one), _clean(folder / other)
            if first.is_dir() and second.is_dir():
                found.append((first, second))
    if not found:
        names = ", ".join(f"{a}/ and {b}/" for a, b in _PAIR_FOLDERS)
        raise TrainingError(f"{root}: no image pairs; expected a folder that holds {names}")
    return found


def find_pairs(roots: Roots) -> list[tuple[Path, ...]]:
    """Pairs of files of one name in the pair folders under each root.

    Raises:
        TrainingError: a root has no pair folders, or they hold no pairs.
    """
    found: list[tuple[Path, ...]] = []
    for root in _listed(roots):
        pairs = [p for folders in find_pair_folders(root) for p in pair_files(*folders).pairs]
        if not pairs:
            raise TrainingError(
                f"{root}: its pair folders hold no two images of one name; expected the same file "
                "name (without suffix) in both"
            )
        found += pairs
    return found


def find_pictures(roots: Roots) -> list[tuple[Path, ...]]:
    """All images under each root, at any depth, but those that have a clean version beside them.

    Raises:
        TrainingError: a root holds none.
    """
    found: list[tuple[Path, ...]] = []
    for root in _listed(roots):
        folders = [root, *sorted(p for p in root.rglob("*") if p.is_dir())]
        kept = [folder for folder in folders if folder.is_dir() and _clean(folder) == folder]
        pictures: list[tuple[Path, ...]] = [(p,) for folder in kept for p in list_images(folder)]
        if not pictures:
            raise TrainingError(f"{root}: no images; expected a folder that holds some")
        found += pictures
    return found


def _clean(folder: Path) -> Path:
    clean = folder.with_name(f"{folder.name}_clean")
    return clean if clean.is_dir() else folder


def _listed(roots: Roots) -> list[Path]:
    return [Path(r) for r in ([roots] if isinstance(roots, (str, Path)) else roots)]


def read_luma(path: Path) -> NDArray[np.uint8]:
    """A picture's luma, (H, W) uint8 (BT.601 full range)."""
    levels = _read_8_bits(path)
    if levels.ndim == 3:
        levels = np.rint(levels.astype(np.float32) @ _LUMA).astype(np.uint8)
    return levels


def read_planes(path: Path, channels: Channels) -> Tensor:
    """A picture as (1, H, W) uint8, or (3, H, W) for a coloured one where colour is asked for."""
    if channels == "luma":
        return torch.from_numpy(read_luma(path))[None]
    levels = torch.from_numpy(_read_8_bits(path))
    return levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1).contiguous()


def _read_8_bits(path: Path) -> NDArray[np.uint8]:
    image = read_image(path)
    return (image // 257 if image.dtype == np.uint16 else image).astype(np.uint8)


def change_tone(x: Tensor, rng: np.random.Generator) -> Tensor:
    """A random tone curve ``gain x^gamma + offset`` that stays in [0, 1].

    Cameras differ in exposure and automatic gain; low-contrast pictures are the common case.
    """
    gamma, gain = float(rng.uniform(0.6, 1.6)), float(rng.uniform(0.35, 1.0))
    return gain * x.pow(gamma) + float(rng.uniform(0.0, 1.0 - gain))


def add_grain(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Fine grain, standard deviation up to 0.025: texture of the source, to be kept.

    Exact black stays: scanners put it around what they saw, and it is to be black in the result.
    """
    grain = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    if rng.random() < 0.5:
        grain = gaussian_blur(grain, float(rng.uniform(0.3, 0.8)))
        grain = grain / grain.std()
    return torch.where(x > 0, x + 0.025 * float(rng.random()) * grain, x)


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


class Patches:
    """Random patches of pictures, or the same place of both pictures of pairs, kept as uint8.

    Args:
        files: from :func:`find_pairs` or :func:`find_pictures`: the pictures of each item.
        settings: how patches are drawn.
        seed: with the step number, decides every draw.
        channels: "luma", or "rgb" (grey pictures get three equal planes).

    Raises:
        TrainingError: a pair of two sizes.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, ...]],
        settings: PatchSettings,
        seed: int = 0,
        *,
        channels: Channels = "luma",
    ) -> None:
        self.settings, self.seed = settings, seed
        self.planes = 1 if channels == "luma" else 3
        self.items: list[list[Tensor]] = []
        for paths in files:
            pictures = [read_planes(path, channels) for path in paths]
            sizes = [tuple(picture.shape[1:]) for picture in pictures]
            if len(set(sizes)) > 1:
                told = " and ".join(f"{p} is {s}" for p, s in zip(paths, sizes, strict=True))
                raise TrainingError(f"{told}; expected one size")
            self.items.append(pictures)

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """The patches of a step: (batch, planes, size, size) float32 in [0, 1] per picture."""
        rng = np.random.default_rng((self.seed, step))
        drawn = [self._patch(rng) for _ in range(self.settings.batch)]
        return tuple(torch.cat(patches) for patches in zip(*drawn, strict=True))

    def _patch(self, rng: np.random.Generator) -> list[Tensor]:
        size = self.settings.size
        pictures = self.items[int(rng.integers(len(self.items)))]
        height, width = pictures[0].shape[1:]
        # Never below the patch: a smaller picture is enlarged just enough.
        least = size / min(height, width)
        scale = rng.uniform(self.settings.smallest_scale, self.settings.largest_scale)
        scale = max(scale, least)
        extent = min(int(np.ceil(size / scale)), height, width)
        top = int(rng.integers(height - extent + 1))
        left = int(rng.integers(width - extent + 1))
        flip, turn = rng.random() < 0.5, int(rng.integers(4)) if rng.random() < 0.25 else 0
        patches = []
        for picture in pictures:
            patch = picture[:, top : top + extent, left : left + extent].float().div(255)[None]
            if extent != size:
                patch = F.interpolate(
                    patch, (size, size), mode="bilinear", antialias=True, align_corners=False
                )
            if rng.random() < self.settings.tone_chance:
                patch = change_tone(patch.clamp(0.0, 1.0), rng)
            if rng.random() < self.settings.grain_chance:
                patch = add_grain(patch, rng)
            patch = patch.clamp(0.0, 1.0).expand(-1, self.planes, -1, -1)
            patch = torch.rot90(patch, turn, (2, 3))
            patches.append(patch.flip(3) if flip else patch)
        return patches
