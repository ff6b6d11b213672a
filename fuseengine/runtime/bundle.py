"""Bundles: an engine as one ``.fuse`` file. No torch, no onnx; nothing in it is ever executed.

A bundle is an archive (:mod:`fuseengine.runtime.archive`) with these members:

=================== ================================================================================
manifest.json       all but the data, see below
constants           the program's constants, safetensors
networks/N-P.bin    network N in precision P: an ONNX file without its large weights
weights/SHA256      a weight, stored once however many networks have it
kernels/...         machine code of the project's GPU kernels, a store of
                    :mod:`fuseengine.runtime.cubins`
plans/SHA256        a network as built on a device, added there
=================== ================================================================================

The manifest's fields:

================ ===================================================================================
format, schema   "fuseengine bundle", 1; a reader refuses newer schemas
made_by          the version that wrote it, for people
engine           program, backend and precision per stage, compile()'s report, size, device
target           what it was compiled for: name, title, compute capability (87 is 8.7) or null
colour           which planes the model works on, and where the colours of the result come from
buffers          bytes of all values of the program at a picture size: the most that it allocates
networks         per network: stage variant, precision, member, length and SHA-256 as ONNX, and the
                 weights with the places in the member where they stand
kernels          per compute capability: number and bytes of kernels
plans            key -> member and what it was built for
verified         what was run and compared when it was compiled, in words
not_verified     what was not
members          name -> bytes and SHA-256 of every other member
================ ===================================================================================

Hashes find damage; they do not say who made a bundle. A network is run by its runtime: take
bundles from people whom you would take a model from.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fuseengine.description import Description, variant_from_dict, variant_to_dict
from fuseengine.errors import BundleError, CacheError, CaptureError, KernelStoreError
from fuseengine.program import Program, StageVariant, resolve
from fuseengine.report import Report
from fuseengine.runtime import archive, onnx_chunks, tensors
from fuseengine.runtime.archive import Archive, Content
from fuseengine.runtime.cubins import MANIFEST as KERNELS
from fuseengine.runtime.cubins import Store
from fuseengine.runtime.fields import Map, OneOf, expect, parse
from fuseengine.runtime.launches import FILE as LAUNCHES

FORMAT = "fuseengine bundle"
SCHEMA = 2
"""2 has a program for a frame that starts from the one before; files without one say 1."""
MANIFEST = "manifest.json"
CONSTANTS = "constants.safetensors"

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
"""Precisions that a network can be stored in."""

LARGEST_SIDE = 1 << 15
"""Pixels of a frame's height or width."""

_MOST_MANIFEST_BYTES = 32 << 20
_MOST_VALUES = 500_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIM = re.compile(r"([1-9]\d{0,8} )?(H|W|H\*W)(/[1-9]\d{0,8})?")

_CANDIDATE = {
    "backend": str,
    "precision": str,
    "milliseconds": OneOf((None, float)),
    "psnr_db": OneOf((None, float)),
    "max_error": OneOf((None, float)),
    "note": str,
}
_REPORT = {
    "model": str,
    "size": [int],
    "device": str,
    "choice": Map(str),
    "candidates": [_CANDIDATE],
    "guard_db": float,
    "psnr_db": OneOf((None, float)),
    "max_error": OneOf((None, float)),
    "seconds": float,
    "from_cache": bool,
    "threads": int,
    "quantised": OneOf((None, Map(object))),
}
_PROGRAM = {
    "schema": int,
    "model": str,
    "channels": str,
    "multiple": int,
    "padding": str,
    "inputs": [str],
    "output": str,
    "values": Map([OneOf((int, str))]),
    "constants": [str],
    "nodes": [
        {
            "kind": str,
            "target": str,
            "inputs": [str],
            "outputs": [OneOf((None, str))],
            "attrs": Map(object),
        }
    ],
}
_VARIANT = {"stage": str, "use": [int], "form": int}
_ENGINE = {
    "program": _PROGRAM,
    "choice": [{**_VARIANT, "backend": str, "precision": str}],
    "report": _REPORT,
    "size": OneOf((None, [int])),
    "device": str,
}
_FORM = {
    "format": str,
    "schema": int,
    "made_by": str,
    "engine": _ENGINE,
    "target": {"name": str, "title": str, "compute_capability": OneOf((None, int))},
    "colour": {"planes": str, "result": str},
    "buffers": {"size": [int], "bytes": int},
    "networks": [
        {
            **_VARIANT,
            "precision": str,
            "file": str,
            "bytes": int,
            "sha256": str,
            "weights": [[OneOf((int, str))]],
        }
    ],
    "kernels": [{"capability": int, "form": str, "count": int, "bytes": int}],
    "plans": Map({"file": str, "about": Map(OneOf((None, str, int, float)))}),
    "verified": [str],
    "not_verified": [str],
    "members": Map({"bytes": int, "sha256": str}),
}

_COLOURS = {
    "luma": "luma is fused; chroma of the visible frame; BT.601, full range",
    "rgb": "red, green and blue are fused",
}


class BuiltFor(NamedTuple):
    """What a bundle was compiled for.

    Attributes:
        name: "this", or one of the targets' names.
        title: in words.
        compute_capability: of the GPU (87 is 8.7), None for a CPU.
    """

    name: str
    title: str
    compute_capability: int | None


class Network(NamedTuple):
    """A network in a bundle.

    Attributes:
        file: the member without large weights.
        size: bytes as an ONNX file.
        sha256: of the ONNX file.
        weights: places in the member, and hashes of the weights that stand there.
    """

    file: str
    size: int
    sha256: str
    weights: tuple[tuple[int, str], ...]


# --- reading --------------------------------------------------------------------------------------


class Bundle:
    """A bundle opened for reading: what an engine is, and the source of its networks.

    Opening checks everything: the layout, every member's hash, every field's form, the program,
    and that what the program allocates is what the manifest says. Networks are looked at when they
    are asked for.

    Attributes:
        path: of the file.
        size: of the file in bytes.
        manifest: its fields, all checked.
        description: the engine without its networks.
        target: what it was compiled for.
        networks: per stage variant and precision.
        built: plans that the file does not hold yet, see :meth:`keep_plan`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a bundle.

        Raises:
            BundleError: it cannot be read, is damaged, of a newer schema, or is refused.
        """
        self._archive = Archive(path)
        self.path, self.size = self._archive.path, self._archive.size
        self.built: dict[str, tuple[bytes, Mapping[str, Any]]] = {}
        try:
            self.manifest = self._read_manifest()
            self._archive.check_layout()
            self._check_members()
            expect(self.manifest, _form(self.manifest["schema"]), "")
            self.description = self._describe()
            self.target = BuiltFor(**self.manifest["target"])
            self.networks = dict(self._list_networks())
        except BundleError as error:
            self._archive.close()
            if str(self.path) in str(error):
                raise
            raise self._archive.error(f"is refused: {error}") from error
        except BaseException:
            self._archive.close()
            raise

    @property
    def settled(self) -> bool:
        """See :class:`StageSource <fuseengine.backends.base.StageSource>`."""
        return self.description.size is not None

    def onnx(self, variant: StageVariant, precision: str = "fp32") -> bytes:
        """A network as a serialised ONNX model, put together and checked.

        Raises:
            BundleError: the bundle holds no such network, or it is malformed.
        """
        if (variant, precision) not in self.networks:
            held = sorted(p for v, p in self.networks if v == variant)
            raise self._archive.error(
                f"holds no {precision} network of the stage {variant.label}; it holds "
                f"{', '.join(held) or 'none'}: compile one with the precision that you need"
            )
        network = self.networks[variant, precision]
        literal = self._archive.read(network.file)
        sizes = self.manifest["members"]
        total = len(literal) + sum(sizes[_weight(sha)]["bytes"] for _, sha in network.weights)
        if total != network.size:
            raise self._archive.error(
                f"is refused: the {precision} network of {variant.label} has {total} bytes; "
                f"expected {network.size}"
            )
        cuts = [(at, self._archive.read(_weight(sha))) for at, sha in network.weights]
        try:
            content = onnx_chunks.join(literal, cuts)
            if hashlib.sha256(content).hexdigest() != network.sha256:
                raise BundleError("its hash differs")
            onnx_chunks.check(content)
        except BundleError as error:
            raise self._archive.error(
                f"is refused: the {precision} network of {variant.label}: {error}"
            ) from error
        return content

    def typed(self, variant: StageVariant, precision: str) -> bytes:
        """The network that TensorRT builds a precision from; TF32 is float32 in storage."""
        return self.onnx(variant, "fp32" if precision == "tf32" else precision)

    def module(self, variant: StageVariant) -> NoReturn:
        """A bundle holds no PyTorch modules.

        Raises:
            BundleError: always.
        """
        raise self._archive.error(
            f"holds no PyTorch module of {variant.label}; expected backend 'onnxruntime', "
            "'openvino' or 'tensorrt'"
        )

    @property
    def has_kernels(self) -> bool:
        """Whether compiled GPU kernels are in it."""
        return f"kernels/{KERNELS}" in self._archive.members

    def kernels(self) -> Store:
        """The compiled GPU kernels, unpacked into the cache folder: drivers load files.

        Raises:
            BundleError: the bundle holds none, or the cache folder cannot be written.
        """
        from fuseengine import cache

        names = [name for name in self._archive.members if name.startswith("kernels/")]
        if not names:
            raise self._archive.error(
                "holds no compiled GPU kernels; compile it with --target of a GPU"
            )
        hashes = "".join(self.manifest["members"][name]["sha256"] for name in sorted(names))
        key = f"kernels-{hashlib.sha256(hashes.encode()).hexdigest()[:40]}"
        folder = cache.cache_folder() / key
        try:
            if cache.load(key) is None:
                files = {n.removeprefix("kernels/"): self._archive.read(n) for n in names}
                cache.store(key, files)
            return Store.load(folder)
        except (CacheError, KernelStoreError) as error:
            raise self._archive.error(f"has kernels that cannot be used: {error}") from error

    def plan(self, key: str) -> bytes | None:
        """A plan that :func:`add_plans` added under a key, or None."""
        entry = self.manifest["plans"].get(key)
        return None if entry is None else self._archive.read(entry["file"])

    def keep_plan(self, key: str, content: bytes, about: Mapping[str, Any]) -> None:
        """Remember a plan that was built for one of the networks, for :meth:`copy`.

        Args:
            key: says the network, the builder and the device.
            content: the plan.
            about: what it was built for and by, in texts and numbers.
        """
        if key not in self.manifest["plans"]:
            self.built[key] = (content, about)

    def copy(self, path: str | os.PathLike[str]) -> None:
        """Write the same bundle, and the plans that were built since, to this or another place.

        Raises:
            BundleError: the file cannot be written.
        """
        archive.write(path, {name: (self._archive, name) for name in self._archive.members})
        if self.built:
            add_plans(path, self.built)

    def close(self) -> None:
        """Close the file; networks can no longer be asked for."""
        self._archive.close()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_manifest(self) -> dict[str, Any]:
        members = self._archive.members
        if MANIFEST not in members:
            raise self._archive.error(f"is no bundle: it is a zip without {MANIFEST}")
        if members[MANIFEST].size > _MOST_MANIFEST_BYTES:
            raise self._archive.error(
                f"is refused: {MANIFEST} of {members[MANIFEST].size} bytes; expected at most "
                f"{_MOST_MANIFEST_BYTES}"
            )
        manifest = parse(self._archive.read(MANIFEST), _MOST_VALUES, MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise self._archive.error(f"is no bundle: {MANIFEST} does not say {FORMAT!r}")
        schema = manifest.get("schema")
        if type(schema) is not int or not 1 <= schema <= SCHEMA:
            newer = type(schema) is int and schema > SCHEMA
            remedy = "install a newer fuseengine" if newer else "compile it again"
            raise self._archive.error(
                f"has schema {str(schema)[:20]}, written by {str(manifest.get('made_by'))[:40]!r}; "
                f"this version reads 1 to {SCHEMA}: {remedy}"
            )
        return manifest

    def _check_members(self) -> None:
        """Compare names, sizes and hashes with the manifest's."""
        expect(self.manifest.get("members"), _FORM["members"], "members")
        listed: dict[str, dict[str, Any]] = self.manifest["members"]
        found = {name: m.size for name, m in self._archive.members.items() if name != MANIFEST}
        if {name: entry["bytes"] for name, entry in listed.items()} != found:
            odd = sorted(found.keys() ^ listed.keys()) or sorted(
                name for name in found if listed[name]["bytes"] != found[name]
            )
            raise BundleError(f"members differ from those that the manifest lists: {odd[:5]}")
        for name, entry in listed.items():
            digest = hashlib.sha256()
            for block in self._archive.blocks(name):
                digest.update(block)
            if digest.hexdigest() != entry["sha256"]:
                raise BundleError(f"the hash of {name} differs; get the file again")
            if name.startswith("weights/") and name != _weight(entry["sha256"]):
                raise BundleError(f"{name} is not named by its hash")

    def _describe(self) -> Description:
        engine = self.manifest["engine"]
        if CONSTANTS not in self._archive.members:
            raise BundleError(f"{CONSTANTS} is missing")
        for key in ("program", "resumed"):
            if key in engine:
                _check_program(engine[key], f"engine.{key}")
        for where, size in (
            ("engine.size", engine["size"]),
            ("engine.report.size", engine["report"]["size"]),
            ("buffers.size", self.manifest["buffers"]["size"]),
        ):
            if size is not None:
                _check_size(size, where)
        try:
            description = Description.from_dict(
                engine, tensors.unpack(self._archive.read(CONSTANTS))
            )
            str(description.report)  # what can be printed is of the right form
        except (CaptureError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise BundleError(f"engine: {error}") from error
        if description.device not in ("cpu", "cuda"):
            raise BundleError(f"engine.device = {description.device[:20]!r}; expected cpu or cuda")
        _check_values(description, self.manifest["buffers"])
        return description

    def _list_networks(self) -> Iterator[tuple[tuple[StageVariant, str], Network]]:
        members = self._archive.members
        for index, entry in enumerate(self.manifest["networks"]):
            where = f"networks[{index}]"
            if entry["precision"] not in PRECISIONS or entry["file"] not in members:
                raise BundleError(
                    f"{where} is {entry['precision'][:20]!r} in {entry['file'][:60]!r}; expected "
                    f"one of {PRECISIONS} in a member"
                )
            weights = []
            for pair in entry["weights"]:
                if [type(x) for x in pair] != [int, str] or _weight(pair[1]) not in members:
                    raise BundleError(f"{where}.weights: {str(pair)[:80]}; expected place and hash")
                weights.append((pair[0], pair[1]))
            variant = variant_from_dict(entry)
            network = Network(entry["file"], entry["bytes"], entry["sha256"], tuple(weights))
            yield (variant, entry["precision"]), network
        for key, entry in self.manifest["plans"].items():
            if entry["file"] not in members:
                raise BundleError(f"plans.{key[:60]}: {entry['file'][:60]!r} is no member")


def _form(schema: int) -> Mapping[str, Any]:
    """What a manifest of a schema has."""
    return _FORM if schema == 1 else {**_FORM, "engine": {**_ENGINE, "resumed": _PROGRAM}}


def _check_size(size: Sequence[int], where: str) -> None:
    if len(size) != 2 or not all(2 <= n <= LARGEST_SIDE for n in size):
        raise BundleError(
            f"{where} = {str(size)[:60]}; expected height and width of 2 to {LARGEST_SIDE}"
        )


def _check_program(program: Mapping[str, Any], where: str) -> None:
    """What must hold before a program is looked at: dimensions that can be resolved."""
    if not 1 <= program["multiple"] <= LARGEST_SIDE:
        raise BundleError(f"{where}.multiple = {program['multiple']}; expected 1 or more")
    if program["channels"] not in _COLOURS or program["padding"] not in ("reflect", "white"):
        raise BundleError(
            f"{where} has channels {program['channels'][:20]!r} and padding "
            f"{program['padding'][:20]!r}; expected one of {sorted(_COLOURS)}, and reflect or white"
        )
    for name, shape in program["values"].items():
        for dim in shape:
            fits = 1 <= dim < 1 << 40 if isinstance(dim, int) else _DIM.fullmatch(dim)
            if not fits or len(shape) > 8:
                raise BundleError(
                    f"{where}.values.{name[:60]} = {str(shape)[:60]}; expected up to 8 "
                    "numbers above 0, or multiples of H, W or H*W"
                )
    for index, node in enumerate(program["nodes"]):
        if node["kind"] not in ("stage", "op"):
            raise BundleError(f"{where}.nodes[{index}].kind = {node['kind'][:20]!r}")


def _check_values(description: Description, buffers: Mapping[str, Any]) -> None:
    """What the programs allocate is what the manifest says, and this machine has it."""
    for program in description.programs:
        for name, array in program.constants.items():
            if program.values[name].shape != array.shape:
                raise BundleError(
                    f"constant {name[:60]} has shape {array.shape}; expected "
                    f"{program.values[name].shape}"
                )
    height, width = buffers["size"]
    try:
        total = values_bytes(description.programs, (height, width))
    except CaptureError as error:
        raise BundleError(f"engine.program: {error}") from error
    if total != buffers["bytes"]:
        raise BundleError(
            f"the program's values take {total} bytes at {width}x{height}; expected "
            f"{buffers['bytes']}, as the manifest says"
        )
    memory = _memory_bytes()
    if memory is not None and total > memory:
        raise BundleError(
            f"the program's values take {total / 1e9:.1f} GB at {width}x{height}; this machine "
            f"has {memory / 1e9:.1f} GB"
        )


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return None


def values_bytes(programs: Iterable[Program], size: tuple[int, int]) -> int:
    """Bytes of all values of programs: the most that their buffers take.

    Args:
        programs: of one engine.
        size: of the frame, height and width; padded here.

    Raises:
        CaptureError: a dimension does not come out whole.
    """
    total = 0
    for program in programs:
        height, width = (-(-n // program.multiple) * program.multiple for n in size)
        shapes = (resolve(value.shape, (height, width)) for value in program.values.values())
        total += 4 * sum(map(math.prod, shapes))
    return total


# --- writing --------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike[str],
    description: Description,
    networks: Mapping[tuple[StageVariant, str], bytes],
    *,
    target: BuiltFor,
    kernels: Store | None = None,
    verified: Sequence[str] = (),
    not_verified: Sequence[str] = (),
) -> None:
    """Write a bundle, whole or not at all; the same engine gives the same bytes.

    Args:
        path: file to write; by custom it ends in ``.fuse``.
        description: the engine.
        networks: serialised ONNX per stage variant and precision, float32 ones among them.
        target: what it was compiled for.
        kernels: compiled GPU kernels to put in.
        verified: what was run and compared, in words.
        not_verified: what was not.

    Raises:
        BundleError: a network is no ONNX file, or the file cannot be written.
    """
    program = description.program
    size = description.size or description.report.size
    members: dict[str, Content] = {CONSTANTS: tensors.pack(description.constants)}
    listed = list(_add_networks(members, networks))
    from fuseengine import __version__

    manifest = {
        "format": FORMAT,
        "schema": 1 if description.resumed is None else 2,
        "made_by": f"fuseengine {__version__}",
        "engine": _portable(description).to_dict(),
        "target": target._asdict(),
        "colour": {"planes": program.channels, "result": _COLOURS[program.channels]},
        "buffers": {"size": list(size), "bytes": values_bytes(description.programs, size)},
        "networks": listed,
        "kernels": [] if kernels is None else _add_kernels(members, kernels),
        "plans": {},
        "verified": list(verified),
        "not_verified": list(not_verified),
    }
    _write(path, manifest, members, {})


def add_plans(
    path: str | os.PathLike[str], plans: Mapping[str, tuple[bytes, Mapping[str, Any]]]
) -> None:
    """Add what was built on a device; the bundle is replaced by a new one, whole or not at all.

    Of two processes that do this at once, the later one's plans stay.

    Args:
        path: an existing bundle.
        plans: by key: the plan, and what it was built for and by, in texts and numbers.

    Raises:
        BundleError: the bundle cannot be read, or not be written.
    """
    with Bundle(path) as bundle:
        manifest = dict(bundle.manifest)
        kept: dict[str, Content] = {
            name: (bundle._archive, name) for name in bundle.manifest["members"]
        }
        added: dict[str, Content] = {}
        manifest["plans"] = dict(manifest["plans"])
        for key, (content, about) in plans.items():
            name = f"plans/{hashlib.sha256(content).hexdigest()}"
            manifest["plans"][key] = {"file": name, "about": dict(about)}
            added[name] = content
        used = {entry["file"] for entry in manifest["plans"].values()}
        kept = {n: c for n, c in kept.items() if not n.startswith("plans/") or n in used}
        listed = {name: bundle.manifest["members"][name] for name in kept if name not in added}
        _write(path, manifest, {**kept, **added}, listed)


def _portable(description: Description) -> Description:
    """The description without what only concerned the compilation at hand."""
    from dataclasses import replace

    report: Report = replace(description.report, from_cache=False)
    return replace(description, report=report)


def _add_networks(
    members: dict[str, Content], networks: Mapping[tuple[StageVariant, str], bytes]
) -> Iterator[dict[str, Any]]:
    for index, ((variant, precision), content) in enumerate(networks.items()):
        literal, cuts = onnx_chunks.split(content)
        file = f"networks/{index}-{precision}.bin"
        members[file] = literal
        weights = []
        for place, weight in cuts:
            sha = hashlib.sha256(weight).hexdigest()
            members[_weight(sha)] = weight
            weights.append([place, sha])
        yield {
            **variant_to_dict(variant),
            "precision": precision,
            "file": file,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "weights": weights,
        }


def _add_kernels(members: dict[str, Content], kernels: Store) -> list[dict[str, Any]]:
    for name in (KERNELS, LAUNCHES):
        if (kernels.folder / name).exists():
            members[f"kernels/{name}"] = (kernels.folder / name).read_bytes()
    groups: dict[tuple[int, str], dict[str, Any]] = {}
    for entry in kernels.entries:
        code = (kernels.folder / entry.file).read_bytes()
        members[f"kernels/{entry.file}"] = code
        group = groups.setdefault(
            (entry.capability, entry.form),
            {"capability": entry.capability, "form": entry.form, "count": 0, "bytes": 0},
        )
        group["count"] += 1
        group["bytes"] += len(code)
    return [groups[key] for key in sorted(groups)]


def _write(
    path: str | os.PathLike[str],
    manifest: dict[str, Any],
    members: Mapping[str, Content],
    listed: Mapping[str, dict[str, Any]],
) -> None:
    """Write the archive; ``listed`` are the entries of members that are copied."""
    entries = dict(listed)
    for name, content in members.items():
        if name not in entries:
            assert isinstance(content, bytes)
            entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["members"] = {name: entries[name] for name in members}
    text = json.dumps(manifest, indent=1, allow_nan=False).encode()
    archive.write(Path(path), {MANIFEST: text, **members})


def _weight(sha256: str) -> str:
    return f"weights/{sha256}"


__all__ = ["SCHEMA", "BuiltFor", "Bundle", "Network", "add_plans", "values_bytes", "write"]
