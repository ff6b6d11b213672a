"""The cache of compiled engines: content-keyed folders, safe when two processes write one.

An entry is written into a temporary folder beside its place and renamed, so a reader sees a whole
entry or none. The place is ``~/.cache/fuseengine``, or what ``FUSEENGINE_CACHE`` says.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuseengine.errors import CacheError

_UNRELATED = ("cli", "training", "metrics", "evaluation")
"""Parts of the package whose code does not decide what an engine is."""

_LIBRARIES = ("torch", "onnxruntime", "openvino", "numpy")


def cache_folder() -> Path:
    """Where entries live (not created here).

    Raises:
        CacheError: the user has no home folder, and FUSEENGINE_CACHE names no other.
    """
    chosen = os.environ.get("FUSEENGINE_CACHE")
    try:
        return Path(chosen) if chosen else Path.home() / ".cache" / "fuseengine"
    except RuntimeError as error:
        raise CacheError(
            f"no place for the cache ({error}); set FUSEENGINE_CACHE to a folder that can be "
            "written, or compile with cache=False"
        ) from error


def fingerprint(arrays: Iterable[tuple[str, NDArray[Any]]], *texts: str) -> str:
    """Hash of named arrays and texts, independent of the arrays' order."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays, key=lambda item: item[0]):
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    for text in texts:
        digest.update(b"\0" + text.encode())
    return digest.hexdigest()


@cache
def environment_key() -> str:
    """Hash of what else decides a compiled engine: this package's code, libraries, processor."""
    digest = hashlib.sha256()
    for folder in _source_folders():
        for path in sorted(folder.rglob("*.py")):
            if path.relative_to(folder).parts[0] in _UNRELATED:
                continue
            digest.update(path.name.encode() + path.read_bytes())
    for library in _LIBRARIES:
        try:
            digest.update(f"{library}={metadata.version(library)};".encode())
        except metadata.PackageNotFoundError:
            digest.update(f"{library}=none;".encode())
    digest.update(processor().encode())
    return digest.hexdigest()


def key_of(settings: Mapping[str, Any]) -> str:
    """The entry's name for settings (plain JSON data, the model's fingerprint among them)."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256((environment_key() + text).encode()).hexdigest()[:40]


def load(key: str) -> dict[str, bytes] | None:
    """The files of an entry by name, or None when there is none.

    A damaged entry (a file lost, a hash that does not fit) is removed and counts as none, as does
    a folder that this process may not look into.
    """
    try:
        folder = cache_folder() / key
        if not folder.is_dir():
            return None
    except (CacheError, OSError):
        return None
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        files = {name: (folder / name).read_bytes() for name in index}
        whole = files and all(
            hashlib.sha256(content).hexdigest() == index[name] for name, content in files.items()
        )
    except (OSError, ValueError, TypeError):
        whole = False
    if not whole:
        discard(key)
        return None
    return files


def discard(key: str) -> None:
    """Remove an entry, so that the next one can take its place."""
    shutil.rmtree(cache_folder() / key, ignore_errors=True)


def store(key: str, files: Mapping[str, bytes]) -> None:
    """Write an entry; if another process was first, theirs stays.

    Raises:
        CacheError: there is no folder, or it cannot be written.
    """
    root = cache_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=root))
    except OSError as error:
        raise CacheError(
            f"cannot write the cache folder {root} ({error}); set FUSEENGINE_CACHE to a folder "
            "that can be written, or compile with cache=False"
        ) from error
    try:
        index = {}
        for name, content in files.items():
            (temporary / name).write_bytes(content)
            index[name] = hashlib.sha256(content).hexdigest()
        (temporary / "index.json").write_text(json.dumps(index), encoding="utf-8")
        temporary.replace(root / key)
    except OSError:
        # The entry exists already (a folder with files cannot be replaced), or the disk is full:
        # either way the engine at hand works.
        shutil.rmtree(temporary, ignore_errors=True)


def _source_folders() -> list[Path]:
    folders = [Path(__file__).parent]
    for part in ("kernels", "export"):
        spec = importlib.util.find_spec(f"fuseengine.{part}")
        if spec is not None and spec.submodule_search_locations:
            folders += [Path(place) for place in spec.submodule_search_locations]
    return folders


@cache
def processor() -> str:
    """What the processor is and can do, as text."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        wanted = ("model name", "flags", "Features", "CPU part")
        lines = [line for line in text.splitlines() if line.startswith(wanted)]
        return "\n".join(sorted(set(lines)))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
