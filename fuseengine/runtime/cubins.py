"""Kernels compiled ahead of time: a folder of them, how a launch finds its own, how it is launched.

Imports neither torch nor Triton. CuPy talks to the driver, and is imported by the first launch.

Which code a launch needs is decided here alone (:func:`variant_of`), for compiling and for running:

* Compiled in are the launch's constants, and what its warps and pipeline stages are.
* A pointer is one of its element type, an integer 32 bits wide (64 if its value needs them; nothing
  is compiled for that ahead of time), another number float32.
* The **aligned** variant takes pointers to lie on 16 bytes and the integers that the launch names
  (``multiples``) to be multiples of 8, so that the compiler uses 128-bit loads. It is chosen when
  all of that holds; else the **any** variant, which assumes nothing. A launch that names no
  integers has the second only.

So per set of constants two variants cover every shape, stride and address.

A store is a folder with ``kernels.json`` and the files that it names:

    {"schema": 2, "sha256": "...", "kernels": [{...}, ...]}

``sha256`` is that of the list's JSON, without spaces and with sorted keys; the records are those of
:class:`Entry`. Files are named by their content, and the manifest is replaced last: whoever reads
while a store is written over sees the old one or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fuseengine.errors import BackendUnavailableError, KernelStoreError

SCHEMA = 2
MANIFEST = "kernels.json"

POINTER_BYTES = 16
"""What pointers are multiples of in an aligned variant."""

MULTIPLE = 8
"""What named integers are multiples of in an aligned variant: 128 bits in half precision."""

PTX_CAPABILITY = 80
"""PTX is for compute_80: the driver of any later GPU translates it when it is loaded."""

Constant = None | bool | int | float | str


class Pointer(NamedTuple):
    """An array as a kernel sees it.

    Attributes:
        address: in device memory.
        type: of its elements, as Triton writes it: "*fp32", "*fp16", "*bf16", "*u8".
    """

    address: int
    type: str


Value = Pointer | int | float


class Variant(NamedTuple):
    """What is compiled into a kernel: launches of equal variants run the same code.

    Attributes:
        kernel: the function's name.
        parameters: run-time parameters in order: name and type ("*fp16", "i32", "fp32").
        constants: arguments compiled in, by name.
        assumes: parameter and what its value must be a multiple of, in order.
        options: of the compiler, by name.
    """

    kernel: str
    parameters: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...]
    assumes: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, int], ...]

    @property
    def wide(self) -> list[str]:
        """Parameters that take 64 bits: their values do not fit 32."""
        return [name for name, kind in self.parameters if kind == "i64"]


def variant_of(
    kernel: str,
    arguments: Mapping[str, Value],
    constants: Mapping[str, Constant],
    multiples: Sequence[str],
    options: Mapping[str, int],
    *,
    aligned: bool | None = None,
) -> Variant:
    """The variant that a launch needs, by the rule of the module's docstring.

    Args:
        kernel: name of the kernel.
        arguments: run-time values in the kernel's order.
        constants: values to compile in.
        multiples: integer arguments that an aligned variant takes to be multiples.
        options: compiler options.
        aligned: choose this variant whatever the values are; None: look at them.
    """
    if aligned is None:
        aligned = is_aligned(arguments, multiples)
    assumes = []
    if aligned and multiples:
        for name, value in arguments.items():
            if isinstance(value, Pointer):
                assumes.append((name, POINTER_BYTES))
            elif name in multiples:
                assumes.append((name, MULTIPLE))
    return Variant(
        kernel,
        tuple((name, type_of(value)) for name, value in arguments.items()),
        tuple(sorted(constants.items())),
        tuple(assumes),
        tuple(sorted(options.items())),
    )


def is_aligned(arguments: Mapping[str, Value], multiples: Sequence[str]) -> bool:
    """Whether the values fit an aligned variant."""
    return all(
        value.address % POINTER_BYTES == 0
        for value in arguments.values()
        if isinstance(value, Pointer)
    ) and all(arguments[name] % MULTIPLE == 0 for name in multiples)  # type: ignore[operator]


def type_of(value: Value) -> str:
    """The parameter's type for a value."""
    if isinstance(value, Pointer):
        return value.type
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


_ELEMENTS = {"<f4": "*fp32", "<f2": "*fp16", "|u1": "*u8", "<u2": "*u16", "<i4": "*i32"}


def pointer(array: Any) -> Pointer:
    """A device array (CuPy's, or any with ``__cuda_array_interface__``) as a kernel's argument.

    Raises:
        BackendUnavailableError: elements of a type that no kernel takes.
    """
    interface = array.__cuda_array_interface__
    kind = interface["typestr"]
    if kind not in _ELEMENTS:
        raise BackendUnavailableError(
            f"device array of {kind}; expected one of {', '.join(_ELEMENTS)}: convert it"
        )
    return Pointer(int(interface["data"][0]), _ELEMENTS[kind])


# --- what a store says of a kernel ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """One compiled kernel, as the manifest describes it.

    Attributes:
        op: the op that launches it.
        label: which of the op's launches.
        dtype: of the op's tensors, "float16".
        capability: of the GPU it is for, two digits: machine code runs on that one alone, PTX on
            that one and all later ones.
        form: "cubin" (machine code) or "ptx".
        file: its code's name in the store.
        sha256: of the code.
        kernel: the function's name.
        entry: name of the function in the code.
        parameters: run-time parameters in order: name and type.
        hidden: how many 64-bit null pointers follow them.
        constants: arguments compiled in.
        assumes: parameter -> what its value must be a multiple of (pointers: bytes).
        options: of the compiler.
        threads: per block, in one dimension.
        shared_bytes: dynamic shared memory per block.
        grid_rule: programs per axis, in terms of parameters and constants.
        triton_version: compiler.
    """

    op: str
    label: str
    dtype: str
    capability: int
    form: str
    file: str
    sha256: str
    kernel: str
    entry: str
    parameters: tuple[tuple[str, str], ...]
    hidden: int
    constants: Mapping[str, Constant]
    assumes: Mapping[str, int]
    options: Mapping[str, int]
    threads: int
    shared_bytes: int
    grid_rule: str
    triton_version: str

    @functools.cached_property
    def variant(self) -> Variant:
        """What is compiled in."""
        return Variant(
            self.kernel,
            self.parameters,
            tuple(sorted(self.constants.items())),
            tuple(
                (name, self.assumes[name]) for name, _ in self.parameters if name in self.assumes
            ),
            tuple(sorted(self.options.items())),
        )

    def record(self) -> dict[str, Any]:
        """The entry as JSON values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Entry)}


_FIELDS: dict[str, type] = {
    "op": str, "label": str, "dtype": str, "capability": int, "form": str, "file": str,
    "sha256": str, "kernel": str, "entry": str, "parameters": list, "hidden": int,
    "constants": dict, "assumes": dict, "options": dict, "threads": int, "shared_bytes": int,
    "grid_rule": str, "triton_version": str,
}  # fmt: skip


def _entry(record: Any, where: str) -> Entry:
    if not isinstance(record, dict) or set(record) != set(_FIELDS):
        given = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise KernelStoreError(f"{where} has {given}; expected the fields {sorted(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if type(record[name]) is not kind:
            raise KernelStoreError(f"{where}.{name} = {record[name]!r}; expected {kind.__name__}")
    pairs = record["parameters"]
    if not all(isinstance(p, list) and [type(x) for x in p] == [str, str] for p in pairs):
        raise KernelStoreError(f"{where}.parameters = {pairs!r}; expected pairs of name and type")
    unknown = {kind for _, kind in pairs if not kind.startswith("*") and kind not in _SCALARS}
    if unknown:
        raise KernelStoreError(f"{where}.parameters has {unknown}; expected {set(_SCALARS)} or *")
    if record["form"] not in ("cubin", "ptx"):
        raise KernelStoreError(f"{where}.form = {record['form']!r}; expected 'cubin' or 'ptx'")
    if not re.fullmatch(r"[\w.-]*\w", record["file"]):
        raise KernelStoreError(f"{where}.file = {record['file']!r}; expected a plain file name")
    return Entry(**{**record, "parameters": tuple((name, kind) for name, kind in pairs)})


# --- stores ---------------------------------------------------------------------------------------


class Store:
    """Compiled kernels in a folder. Make one with :meth:`load`.

    Attributes:
        folder: where.
        entries: all of them.
        capabilities: compute capabilities with machine code, two digits each.
    """

    def __init__(self, folder: Path, entries: Iterable[Entry]) -> None:
        self.folder = folder
        self.entries = tuple(entries)
        self.capabilities = sorted({e.capability for e in self.entries if e.form == "cubin"})
        self._portable = sorted({e.capability for e in self.entries if e.form == "ptx"})
        self._codes = {(e.form, e.capability, e.variant): e for e in self.entries}
        self._functions: dict[tuple[str, int], Any] = {}

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Store:
        """Read a store and check every file against its hash.

        Raises:
            KernelStoreError: no store there, another schema, a damaged manifest or file.
        """
        folder = Path(folder)
        entries = [
            _entry(record, f"{MANIFEST} of {folder}: kernels[{k}]")
            for k, record in enumerate(_manifest(folder))
        ]
        for entry in entries:
            _check(folder / entry.file, entry.sha256)
        return cls(folder, entries)

    def target(self, capability: int) -> int:
        """The capability whose settings launches on a device must be planned with.

        Its own, if the store has machine code for it; else that of the PTX, which the driver
        translates.

        Raises:
            BackendUnavailableError: the store has neither.
        """
        if capability in self.capabilities:
            return capability
        portable = [c for c in self._portable if c <= capability]
        if portable:
            return portable[-1]
        have = [f"sm_{c}" for c in self.capabilities]
        have += [f"PTX for compute_{c}" for c in self._portable]
        raise BackendUnavailableError(
            f"the kernels in {self.folder} do not run on compute capability {capability}: they "
            f"are {' and '.join(have) or 'none'}; {_remedy(capability, self.folder)}"
        )

    def get(self, variant: Variant, capability: int) -> Entry | None:
        """The code of a variant for a device, machine code before PTX; None if there is none."""
        form = "cubin" if capability in self.capabilities else "ptx"
        return self._codes.get((form, self.target(capability), variant))

    def missing(self, variant: Variant, label: str, capability: int) -> str:
        """What to say where :meth:`get` finds nothing."""
        target = self.target(capability)
        near = sorted(
            (e for e in self.entries if e.kernel == variant.kernel and e.capability == target),
            key=lambda e: len(_differences(e.variant, variant)),
        )
        lines = [
            f"{variant.kernel} ({label}) is not among the kernels in {self.folder}",
            f"looked for, for compute capability {target}: {describe(variant)}",
        ]
        for entry in near[:3]:
            differing = "; ".join(_differences(entry.variant, variant))
            lines.append(f"nearest: {entry.op} ({entry.label}, {entry.dtype}): {differing}")
        if not near:
            lines.append(f"nearest: none, the store has no {variant.kernel} for it")
        if variant.wide:
            lines.append(f"{', '.join(variant.wide)} beyond 32 bits: split the tensors by batch")
        else:
            lines.append(_remedy(target, self.folder))
        return "\n  ".join(lines)

    def launch(
        self,
        entry: Entry,
        grid: Sequence[int],
        values: Iterable[Value],
        *,
        device: int = 0,
        stream: int | None = None,
    ) -> None:
        """Launch a kernel; returns without waiting for it.

        Args:
            entry: which.
            grid: programs per axis, one to three.
            values: one per parameter of the entry, in order; alignment is not looked at again.
            device: number of the CUDA device.
            stream: address of a CUDA stream; None: CuPy's current one.

        Raises:
            BackendUnavailableError: CuPy is not installed, or the driver refuses the code.
        """
        cupy = _cupy()
        words = [
            _word(kind, value) for (_, kind), value in zip(entry.parameters, values, strict=True)
        ]
        words += [np.uint64(0)] * entry.hidden
        with cupy.cuda.Device(device):
            function = self._function(entry, device)
            with contextlib.nullcontext() if stream is None else _stream(stream, device):
                function(
                    (*grid, 1, 1)[:3],
                    (entry.threads, 1, 1),
                    tuple(words),
                    shared_mem=entry.shared_bytes,
                )

    def _function(self, entry: Entry, device: int) -> Any:
        """CuPy's kernel; loaded once for each device, which must be current."""
        if (entry.file, device) not in self._functions:
            path = self.folder / entry.file
            try:
                function = _cupy().RawModule(path=str(path)).get_function(entry.entry)
                if entry.shared_bytes > _SHARED_BY_DEFAULT:
                    function.max_dynamic_shared_size_bytes = entry.shared_bytes
            except RuntimeError as error:  # the driver's own errors, and the runtime's
                raise BackendUnavailableError(
                    f"the CUDA driver refuses {path} ({error}); expected a GPU of compute "
                    f"capability {entry.capability} ({entry.form}) and a driver that reads it"
                ) from error
            self._functions[entry.file, device] = function
        return self._functions[entry.file, device]


def write(folder: str | os.PathLike[str], kernels: Iterable[tuple[Entry, bytes]]) -> Path:
    """Write a store; one that is there already is replaced.

    Args:
        folder: made when absent.
        kernels: entries and their code.

    Returns:
        The manifest.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for entry, code in kernels:
        if not (folder / entry.file).exists() or _hash_of(folder / entry.file) != entry.sha256:
            _replace(folder / entry.file, code)
        records.append(entry.record())
    head = json.dumps({"schema": SCHEMA, "sha256": _sha256(_canonical(records))})
    lines = ",\n".join(json.dumps(record) for record in records)
    _replace(folder / MANIFEST, f'{head[:-1]}, "kernels": [\n{lines}\n]}}\n'.encode())
    kept = {record["file"] for record in records}
    for pattern in ("*.cubin", "*.ptx"):
        for path in folder.glob(pattern):
            if path.name not in kept:
                path.unlink()
    return folder / MANIFEST


def describe(variant: Variant) -> str:
    """A variant in one line."""
    types = ", ".join(f"{name} {kind}" for name, kind in variant.parameters)
    given = (*variant.constants, *variant.options)
    constants = ", ".join(f"{name}={value}" for name, value in given)
    return f"({types}) with {constants}; {_assumed(variant)}"


def _assumed(variant: Variant) -> str:
    names = [name for name, multiple in variant.assumes if multiple == MULTIPLE]
    return f"aligned ({', '.join(names)} multiples of {MULTIPLE})" if names else "any alignment"


def _differences(have: Variant, want: Variant) -> list[str]:
    """What keeps one variant from being the other, for people."""
    found = []
    for which in ("parameters", "constants", "options"):
        mine, theirs = dict(getattr(have, which)), dict(getattr(want, which))
        for name in {**mine, **theirs}:
            a, b = mine.get(name, "absent"), theirs.get(name, "absent")
            if a != b:
                found.append(f"{name} {a}, wanted {b}")
    if _assumed(have) != _assumed(want):
        found.append(f"{_assumed(have)}, wanted {_assumed(want)}")
    return found


def _remedy(capability: int, folder: Path) -> str:
    return (
        "compile the kernels where Triton is installed, no GPU needed: "
        f"python -m fuseengine.kernels.aot --capability {capability} --out {folder} "
        "(--help names the options for further channels)"
    )


def _manifest(folder: Path) -> list[Any]:
    path = folder / MANIFEST
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KernelStoreError(
            f"{path} cannot be read ({error.strerror}); expected a folder written by "
            "python -m fuseengine.kernels.aot --out FOLDER"
        ) from error
    except ValueError as error:
        raise KernelStoreError(f"{path} is damaged ({error}); write the folder again") from error
    schema = text.get("schema") if isinstance(text, dict) else None
    if schema != SCHEMA:
        raise KernelStoreError(
            f"{path} has schema {schema!r}; expected {SCHEMA}: write the folder with this version "
            "of FuseEngine"
        )
    records = text.get("kernels")
    if not isinstance(records, list) or _sha256(_canonical(records)) != text.get("sha256"):
        raise KernelStoreError(f"{path} is damaged (its hash differs); write the folder again")
    return records


def _check(path: Path, sha256: str) -> None:
    try:
        found = _hash_of(path)
    except OSError as error:
        raise KernelStoreError(
            f"{path} cannot be read ({error.strerror}); write the folder again"
        ) from error
    if found != sha256:
        raise KernelStoreError(
            f"{path} is damaged: sha256 {found[:12]}..., expected {sha256[:12]}...; write the "
            "folder again"
        )


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hash_of(path: Path) -> str:
    return _sha256(path.read_bytes())


def _replace(path: Path, content: bytes) -> None:
    """Write beside, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --- CuPy -----------------------------------------------------------------------------------------

_SHARED_BY_DEFAULT = 48 << 10
"""Dynamic shared memory that every kernel may take; more must be asked for."""

_SCALARS: dict[str, Any] = {"i32": np.int32, "i64": np.int64, "fp32": np.float32}


def _word(kind: str, value: Value) -> Any:
    """A value as the driver takes it: CuPy passes NumPy scalars on as they are."""
    if isinstance(value, Pointer):
        return np.uint64(value.address)
    return _SCALARS[kind](value)


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise BackendUnavailableError(
            f"launching compiled kernels needs CuPy, which cannot be imported here ({error}): "
            "pip install cupy-cuda13x, or cupy-cuda12x for CUDA 12 (JetPack 6)"
        ) from error
    return cupy


class _Stream:
    """A stream's address in the protocol that CuPy 14 and CUDA's Python packages share."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


@functools.lru_cache(maxsize=64)
def _stream(address: int, device: int) -> Any:
    streams = _cupy().cuda
    if hasattr(streams.Stream, "from_external"):
        return streams.Stream.from_external(_Stream(address))
    return streams.ExternalStream(address, device)
