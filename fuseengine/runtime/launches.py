"""What ops launch on a GPU, planned where PyTorch is and read where it is not. No torch.

Planning a launch (which kernel, how many programs, which block sizes) takes shapes and a compute
capability, and the plans' code is PyTorch's side (``fuseengine.kernels``). So the launches of a
program for one picture size are written down as data; the run side fills in addresses, asks
:func:`fuseengine.runtime.cubins.variant_of` which code they need, and launches it from the store
that lies in the same folder.

``launches.json`` beside the store's ``kernels.json``:

    {"schema": 1, "sha256": "...", "calls": [{...}, ...]}

``sha256`` is that of the list's JSON, without spaces and with sorted keys. A call is

    {"key": text of :func:`key_of`, "capability": 87, "scratch": [bytes, ...],
     "tables": [base64 of little-endian float32, ...], "launches": [{...}, ...]}

and a launch has the fields of :class:`Launch`; its arguments are pairs of a name and one of
a number, ``{"array": "in0", "type": "*fp32"}``, or ``{"number": "low"}``, a float32 that is only
known when a frame comes. Arrays are ``in0`` ..., ``out``, ``scratch0`` ..., ``table0`` ..., and
``spectrum``, which is made from a constant of the program when an engine is built.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuseengine.errors import BackendUnavailableError, KernelStoreError
from fuseengine.runtime.cubins import Constant, Entry, Pointer, Store, Value, variant_of

SCHEMA = 1
FILE = "launches.json"

_SCRATCH_LIMIT = 1 << 34
"""Bytes; more is a damaged file."""


@dataclass(frozen=True)
class Array:
    """A device array as a launch's argument.

    Attributes:
        name: which.
        type: of its elements, as Triton writes it: "*fp32".
    """

    name: str
    type: str


@dataclass(frozen=True)
class Number:
    """A float32 argument that is known when a frame comes."""

    name: str


Argument = Array | Number | int | float


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: the function's name.
        label: which of the op's launches.
        grid: programs per axis.
        arguments: run-time arguments in the kernel's order.
        constants: arguments compiled in.
        options: of the compiler.
        multiples: integer arguments that an aligned variant takes to be multiples.
    """

    kernel: str
    label: str
    grid: tuple[int, ...]
    arguments: tuple[tuple[str, Argument], ...]
    constants: Mapping[str, Constant]
    options: Mapping[str, int]
    multiples: tuple[str, ...]


@dataclass(frozen=True)
class OpCall:
    """Everything that one call of an op launches.

    Attributes:
        key: of :func:`key_of`: the op, its shapes and its attributes.
        capability: that the launches were planned for.
        launches: in order.
        scratch: bytes of each temporary array.
        tables: constant arrays, flat.
    """

    key: str
    capability: int
    launches: tuple[Launch, ...]
    scratch: tuple[int, ...] = ()
    tables: tuple[NDArray[np.float32], ...] = ()


def key_of(
    op: str, inputs: Iterable[Sequence[int]], output: Sequence[int], attrs: Mapping[str, Any]
) -> str:
    """The name of a call of an op on dense arrays of these shapes."""
    shapes = [[int(n) for n in shape] for shape in (*inputs, output)]
    return json.dumps([op, shapes, dict(attrs)], sort_keys=True, separators=(",", ":"))


def frame_key(
    way: str, typestr: str, frame: Sequence[int], planes: Sequence[int], kind: str
) -> str:
    """The key of a conversion between a frame and planes.

    Args:
        way: "frame_in" or "frame_out".
        typestr: of the frame's elements, as NumPy writes it.
        frame: its shape, (H, W) or (H, W, 3).
        planes: shape of the float32 planes.
        kind: what the planes are: "luma" or "rgb".
    """
    return key_of(way, [frame], planes, {"type": typestr, "channels": kind})


class Launches:
    """The planned calls of one folder, by key and capability.

    Args:
        calls: all of them.
    """

    def __init__(self, calls: Iterable[OpCall] = ()) -> None:
        self.calls = {(call.key, call.capability): call for call in calls}

    @classmethod
    def load(cls, folder: Path) -> Launches:
        """Read a folder's ``launches.json``.

        Raises:
            KernelStoreError: it is missing, damaged or of another schema.
        """
        path = Path(folder) / FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise KernelStoreError(
                f"{path} cannot be read ({error.strerror}); expected what compiling for a GPU "
                "target writes: compile again with --target"
            ) from error
        except ValueError as error:
            raise KernelStoreError(f"{path} is damaged ({error}); compile again") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise KernelStoreError(f"{path} has schema {schema!r}; expected {SCHEMA}")
        records = data.get("calls")
        if not isinstance(records, list) or _hash(records) != data.get("sha256"):
            raise KernelStoreError(f"{path} is damaged (its hash differs); compile again")
        try:
            return cls(_read_call(record) for record in records)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise KernelStoreError(f"{path} is damaged ({error!r}); compile again") from error

    def write(self, folder: Path) -> Path:
        """Write the folder's ``launches.json``, in place of one that is there."""
        records = [_written_call(call) for call in self.calls.values()]
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{FILE}.tmp")
        data = {"schema": SCHEMA, "sha256": _hash(records), "calls": records}
        beside.write_text(json.dumps(data), encoding="utf-8")
        beside.replace(path)
        return path

    def get(self, key: str, capability: int) -> OpCall | None:
        """The call planned for a capability, if there is one."""
        return self.calls.get((key, capability))

    def sizes(self) -> list[str]:
        """The shapes that calls were planned for, for messages."""
        found = dict.fromkeys("x".join(map(str, json.loads(key)[1][-1])) for key, _ in self.calls)
        return list(found)


class BoundLaunch:
    """A launch that knows its code and, unless they change, its values.

    Args:
        launch: what.
        store: where its code is.
        capability: of the GPU.
        addresses: of the arrays it names, as far as they are known now.
        device: number of the CUDA device.
    """

    def __init__(
        self,
        launch: Launch,
        store: Store,
        capability: int,
        addresses: Mapping[str, int],
        device: int = 0,
    ) -> None:
        self.launch, self.store, self.capability = launch, store, capability
        self.addresses, self.device = dict(addresses), device
        self._fixed: tuple[Entry, list[Value]] | None = None
        if self._named() <= set(self.addresses):
            self._fixed = self.prepare({}, {})

    def __call__(
        self, addresses: Mapping[str, int] | None = None, numbers: Mapping[str, float] | None = None
    ) -> None:
        """Launch on CuPy's current stream; returns without waiting.

        Args:
            addresses: of arrays that were not known before.
            numbers: values of named numbers.
        """
        entry, values = self._fixed or self.prepare(addresses or {}, numbers or {})
        self.store.launch(entry, self.launch.grid, values, device=self.device)

    def prepare(
        self, addresses: Mapping[str, int], numbers: Mapping[str, float]
    ) -> tuple[Entry, list[Value]]:
        """The code and the parameters' values.

        Raises:
            BackendUnavailableError: the store has no such code.
        """
        places = {**self.addresses, **addresses}
        values: dict[str, Value] = {}
        for name, argument in self.launch.arguments:
            if isinstance(argument, Array):
                values[name] = Pointer(places[argument.name], argument.type)
            elif isinstance(argument, Number):
                values[name] = float(numbers[argument.name])
            else:
                values[name] = argument
        launch = self.launch
        variant = variant_of(
            launch.kernel, values, launch.constants, launch.multiples, launch.options
        )
        entry = self.store.get(variant, self.capability)
        if entry is None:
            raise BackendUnavailableError(
                self.store.missing(variant, launch.label, self.capability)
            )
        return entry, list(values.values())

    def _named(self) -> set[str]:
        arguments = [argument for _, argument in self.launch.arguments]
        unknown = {"number " + a.name for a in arguments if isinstance(a, Number)}
        return unknown | {a.name for a in arguments if isinstance(a, Array)}


# --- as JSON --------------------------------------------------------------------------------------

_ARRAY = re.compile(r"(in|scratch|table)\d+|out|spectrum")


def _written_call(call: OpCall) -> dict[str, Any]:
    return {
        "key": call.key,
        "capability": call.capability,
        "scratch": list(call.scratch),
        "tables": [
            base64.b64encode(np.ascontiguousarray(t, "<f4").tobytes()).decode() for t in call.tables
        ],
        "launches": [
            {
                "kernel": launch.kernel,
                "label": launch.label,
                "grid": list(launch.grid),
                "arguments": [[name, _written(a)] for name, a in launch.arguments],
                "constants": dict(launch.constants),
                "options": dict(launch.options),
                "multiples": list(launch.multiples),
            }
            for launch in call.launches
        ],
    }


def _written(argument: Argument) -> Any:
    if isinstance(argument, Array):
        return {"array": argument.name, "type": argument.type}
    return {"number": argument.name} if isinstance(argument, Number) else argument


def _read_call(record: Any) -> OpCall:
    capability, scratch = record["capability"], record["scratch"]
    if type(capability) is not int or not all(
        type(n) is int and 0 <= n < _SCRATCH_LIMIT for n in scratch
    ):
        raise ValueError(f"capability {capability!r} or scratch {scratch!r}")
    json.loads(_text(record["key"]))
    try:
        tables = [
            np.frombuffer(base64.b64decode(t, validate=True), "<f4") for t in record["tables"]
        ]
    except binascii.Error as error:
        raise ValueError(f"tables: {error}") from error
    launches = tuple(_read_launch(entry) for entry in record["launches"])
    limits = {"scratch": len(scratch), "table": len(tables)}
    for launch in launches:
        for name in (a.name for _, a in launch.arguments if isinstance(a, Array)):
            kind = name.rstrip("0123456789")
            if kind in limits and int(name[len(kind) :]) >= limits[kind]:
                raise ValueError(f"{name} of {limits[kind]}")
    return OpCall(record["key"], capability, launches, tuple(scratch), tuple(tables))


def _read_launch(record: Any) -> Launch:
    grid = tuple(record["grid"])
    if not 1 <= len(grid) <= 3 or not all(type(n) is int and 0 < n < 2**31 for n in grid):
        raise ValueError(f"grid {grid}")
    if not isinstance(record["constants"], dict) or not isinstance(record["options"], dict):
        raise ValueError("constants or options")
    return Launch(
        _text(record["kernel"]),
        _text(record["label"]),
        grid,
        tuple((_text(name), _read_argument(value)) for name, value in record["arguments"]),
        record["constants"],
        record["options"],
        tuple(_text(name) for name in record["multiples"]),
    )


def _read_argument(value: Any) -> Argument:
    if type(value) in (int, float):
        return value
    if set(value) == {"number"}:
        return Number(_text(value["number"]))
    if set(value) == {"array", "type"} and _ARRAY.fullmatch(value["array"]):
        return Array(value["array"], _text(value["type"]))
    raise ValueError(f"argument {value!r}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} where text is expected")
    return value


def _hash(records: Any) -> str:
    canonical = json.dumps(records, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
