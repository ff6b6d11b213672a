"""Which files belong together: infrared, visible, and what each method made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fuseengine.errors import ImageFileError, SettingError
from fuseengine.runtime.images import files_by_stem, read_image

_TRANSPOSED = (5, 6, 7, 8)
"""EXIF orientations that swap height and width; ``read_image`` turns such pictures upright."""

_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Case:
    """One pair of sources and what every method made of it.

    Attributes:
        name: the files' common stem.
        infrared: infrared source.
        visible: visible source.
        fused: one file per method, in the order of the methods.
        size: (height, width) of all of them.
    """

    name: str
    infrared: Path
    visible: Path
    fused: tuple[Path, ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class Refusal:
    """A pair that cannot be measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Pairing:
    """What :func:`pair_folders` found.

    Attributes:
        folders: role or method -> folder: "infrared", "visible", then the methods.
        cases: what can be measured, sorted by name.
        unpaired: role or method -> its files that are in no case because another folder has no
            file of that stem; roles without such files are left out.
        refused: pairs that are complete and cannot be used.
    """

    folders: dict[str, Path]
    cases: tuple[Case, ...]
    unpaired: dict[str, tuple[str, ...]]
    refused: tuple[Refusal, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, in the order given."""
        return tuple(self.folders)[2:]


class UnusablePairsError(ImageFileError):
    """Pairs that cannot be measured, all of them in one message.

    Attributes:
        refused: each of them with its reason.
    """

    def __init__(self, refused: Sequence[Refusal], total: int) -> None:
        self.refused = tuple(refused)
        listed = "; ".join(f"{item.name}: {item.reason}" for item in refused)
        super().__init__(
            f"{len(refused)} of {total} pairs cannot be measured: {listed}. Nothing is resized "
            "here: mend these files, or leave their pairs out with skip=True"
        )


def name_methods(texts: Sequence[str]) -> dict[str, Path]:
    """Methods from what a user types: ``DIR``, whose last part is the name then, or ``NAME=DIR``.

    Folders whose last parts are the same are told apart by their parents.

    Raises:
        SettingError: an empty name, the name of a source, or two methods of one name.
    """
    given = [_split(text) for text in texts]
    lasts = [folder.resolve().name for name, folder in given if name is None]
    methods: dict[str, Path] = {}
    for text, (name, folder) in zip(texts, given, strict=True):
        if name is None:
            place = folder.resolve()
            name = place.name
            if lasts.count(name) > 1:
                name = f"{place.parent.name}/{name}"
        if name in ("", "infrared", "visible") or name in methods:
            raise SettingError(
                f"method {text!r}: got the name {name!r}, expected one that no other method and "
                "neither source ('infrared', 'visible') has; give one as NAME=DIR"
            )
        methods[name] = folder
    return methods


def _split(text: str) -> tuple[str | None, Path]:
    name, equals, folder = text.partition("=")
    # A folder may have '=' in its own name.
    if not equals or Path(text).is_dir():
        return None, Path(text)
    return name.strip(), Path(folder)


def pair_folders(
    infrared: Path,
    visible: Path,
    methods: Mapping[str, Path],
    refused: Sequence[Refusal] = (),
) -> Pairing:
    """Find what can be measured; images belong together that have the same name up to the suffix.

    An image that one of the methods lacks is measured for none, so that their means are over the
    same images.

    Args:
        infrared: folder of infrared images.
        visible: folder of visible images.
        methods: name -> folder of fused images.
        refused: pairs that are known to be of no use, whatever files there are.

    Returns:
        The cases, and everything that is in none.

    Raises:
        ImageFileError: a folder cannot be listed, has two images of one stem, or nothing is
            complete.
    """
    folders = {"infrared": infrared, "visible": visible, **methods}
    files = {role: files_by_stem(folder) for role, folder in folders.items()}
    hopeless = {refusal.name for refusal in refused}
    common = set.intersection(*(set(of_role) for of_role in files.values())) - hopeless
    if not common:
        counts = ", ".join(f"{role} {folders[role]} ({len(files[role])})" for role in files)
        raise ImageFileError(
            f"no image is in all folders; got {counts} images; expected names that are the same "
            "up to the suffix"
        )
    unpaired = {
        role: tuple(
            path.name
            for stem, path in sorted(of_role.items())
            if stem not in common and stem not in hopeless
        )
        for role, of_role in files.items()
    }
    cases, refusals = [], list(refused)
    for stem in sorted(common):
        paths = {role: of_role[stem] for role, of_role in files.items()}
        try:
            sizes = {role: image_size(path) for role, path in paths.items()}
        except ImageFileError as error:
            refusals.append(Refusal(stem, str(error)))
            continue
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{role} {h}x{w}" for role, (h, w) in sizes.items())
            refusals.append(Refusal(stem, f"sizes differ (height x width): {listed}"))
            continue
        ir, vis, *fused = paths.values()
        cases.append(Case(stem, ir, vis, tuple(fused), sizes["infrared"]))
    return Pairing(folders, tuple(cases), {k: v for k, v in unpaired.items() if v}, tuple(refusals))


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image by its file's header, as ``read_image`` would give it.

    Raises:
        ImageFileError: the file cannot be read, for the reason that ``read_image`` gives.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            # Of a PNG, getexif() decodes all pixels in search of data that few files have.
            known = image.format != "PNG" or "exif" in image.info
            turned = known and image.getexif().get(_ORIENTATION) in _TRANSPOSED
    except Exception:
        return read_image(path).shape[:2]
    return (width, height) if turned else (height, width)
