"""Targets: the devices that an engine is compiled for, each a small data file beside this module.

    get_target("orin")         AGX Orin, every core at its highest clock
    get_target("orin:30w")     the same board in the power mode that it starts in
    get_target("this")         the machine at hand: read, or measured in some milliseconds
    get_target("board.json")   a file of your own, in the same form

A file holds what a data sheet says (multiprocessors, clock, operations per clock, bytes per
second), and two factors for what of that a good kernel reaches. ``fuseengine.roofline`` makes
times of it. Needs NumPy only.

The form, all numbers per device: ``title``, ``kind`` ("gpu" or "cpu"), ``compute_capability`` (text
or null), ``memory_gb``, ``l2_mb``, ``operations_per_clock`` (precision -> additions and
multiplications per multiprocessor or core and clock, dense), ``exponentials_per_clock`` (optional),
``kernel_us`` and ``frame_us`` (what a kernel, and a frame, take beyond their work), ``efficiency``
(``matrix`` and ``memory``, of the peaks), ``default_mode``, ``starts_in`` (the mode a new board is
in; optional), ``modes`` (name -> ``units``: multiprocessors or cores, ``ghz``, ``gb_per_s``,
``nvpmodel``: the mode's name there; anything above may be repeated for a mode), ``sources``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fuseengine.errors import SettingError, UnknownNameError
from fuseengine.machine import Machine, inspect_machine

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")

_FOLDER = Path(__file__).parent

_CPU_GAINS = {
    "amx": {"bf16": 16.0, "int8": 32.0},
    "avx512-bf16": {"bf16": 2.0},
    "avx512-vnni": {"int8": 4.0},
    "avx-vnni": {"int8": 4.0},
    "neon-bf16": {"bf16": 4.0},
}
"""Instruction set -> how many times float32's rate its own instructions have per clock."""

_CPU_EFFICIENCY = {"matrix": 0.7, "memory": 0.9}
"""Of a measured matrix product's and a measured copy's rates: see ``fuseengine.roofline``."""

_CPU_EXPONENTIALS = 0.05
"""Exponentials per operation: a vectorised one takes about 20."""


@dataclass(frozen=True)
class Target:
    """A device in one power mode.

    Attributes:
        name: as asked for, with its mode: "orin:30w".
        title: for people, with its mode.
        kind: "gpu" or "cpu".
        capability: compute capability (8, 7); None for a CPU.
        memory_bytes: of the device.
        l2_bytes: of the level-2 cache.
        bandwidth: bytes per second that memory takes or gives.
        peaks: precision -> operations per second (a multiply-add is two), dense, at most.
        exponentials: per second, at most.
        kernel_seconds: that a kernel takes beyond its work.
        frame_seconds: that a frame takes beyond its kernels.
        matrix_efficiency: part of the peak that a dense network reaches.
        memory_efficiency: part of the bandwidth that a kernel reaches.
        sources: where these numbers come from.
        hint: what to know about the mode; "" mostly.
    """

    name: str
    title: str
    kind: str
    capability: tuple[int, int] | None
    memory_bytes: int
    l2_bytes: int
    bandwidth: float
    peaks: Mapping[str, float]
    exponentials: float
    kernel_seconds: float
    frame_seconds: float
    matrix_efficiency: float
    memory_efficiency: float
    sources: tuple[str, ...]
    hint: str = ""

    @property
    def sm(self) -> str:
        """The architecture's name for compilers, such as "87"; "" for a CPU."""
        return "" if self.capability is None else f"{self.capability[0]}{self.capability[1]}"

    def peak(self, precision: str) -> float:
        """Operations per second in a precision.

        Raises:
            SettingError: the device does not compute in it.
        """
        if precision not in self.peaks:
            raise SettingError(
                f"precision {precision!r}: {self.name} ({self.title}) computes in "
                f"{', '.join(self.peaks)}; choose one of them"
            )
        return self.peaks[precision]

    def describe(self) -> str:
        """The numbers, one per line."""
        lines = [self.title]
        if self.capability is not None:
            lines.append(f"compute capability {self.capability[0]}.{self.capability[1]}")
        lines.append(
            f"memory {self.memory_bytes / 1e9:.0f} GB at {self.bandwidth / 1e9:.1f} GB/s, "
            f"level-2 cache {self.l2_bytes / 1e6:.1f} MB"
        )
        peaks = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in self.peaks.items())
        lines.append(f"tera-operations per second, dense: {peaks}")
        lines += [f"source: {source}" for source in self.sources]
        return "\n".join([*lines, *filter(None, [self.hint])])


def target_names(*, modes: bool = False) -> list[str]:
    """The packaged targets and "this"; with ``modes``, every power mode as a name of its own."""
    names = []
    for path in sorted(_FOLDER.glob("*.json")):
        names.append(path.stem)
        if modes:
            names += [f"{path.stem}:{mode}" for mode in _read(path)["modes"]]
    return [*names, "this"]


def get_target(name: str) -> Target:
    """The target of a name.

    Args:
        name: a target, a target and a mode ("orin:30w"; case, and nvpmodel's own names such as
            MODE_30W, are understood), "this", or a JSON file of your own, with or without a mode.

    Returns:
        The device, ready for :func:`fuseengine.roofline.predict`.

    Raises:
        UnknownNameError: no such target or mode; the message lists what there is.
        SettingError: a file of your own cannot be read or misses a field.
    """
    if name == "this":
        return this_target()
    stem, _, mode = name.partition(":")
    if stem.endswith(".json"):
        path = Path(stem)
    else:
        path = _FOLDER / f"{stem.lower()}.json"
        if stem.lower() + ".json" not in {file.name for file in _FOLDER.glob("*.json")}:
            raise UnknownNameError("target", stem, target_names())
    try:
        data = _read(path)
        modes = data["modes"]
        wanted = _mode_name(mode) if mode else data["default_mode"]
        if wanted not in modes:
            known = [f"{stem}:{known}" for known in modes]
            raise UnknownNameError("mode", f"{stem}:{mode}", known)
        return _make(path.stem if stem.endswith(".json") else stem.lower(), data, wanted)
    except OSError as error:
        raise SettingError(f"target {stem}: {error.strerror or error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UnknownNameError):
            raise
        raise SettingError(
            f"target file {stem}: field {error}; the form is in fuseengine/targets/__init__.py"
        ) from error


@cache
def this_target() -> Target:
    """The machine at hand.

    A Jetson is what its board and power mode say, a Hopper GPU what its name says. Otherwise, and
    with any other GPU, it is the CPU, measured: a copy's and a matrix product's rates over all
    usable cores; its reduced precisions are float32's rate times what its instructions gain.
    """
    machine = inspect_machine()
    named = _recognised(machine)
    return get_target(named) if named else measure_cpu(machine)


def _recognised(machine: Machine) -> str:
    """Name of the packaged target that a machine is; "" for none."""
    if machine.jetson is not None and machine.jetson.target:
        target, mode = machine.jetson.target, _mode_name(machine.jetson.mode)
        known = _read(_FOLDER / f"{target}.json")["modes"]
        return f"{target}:{mode}" if mode in known else target
    for gpu in machine.gpus:
        if gpu.capability == "9.0":
            return "cuda-sm90:h200" if "H200" in gpu.name else "cuda-sm90:h100"
    return ""


def measure_cpu(machine: Machine) -> Target:
    """A CPU as a target, measured in about a tenth of a second.

    Args:
        machine: names it, and says how many cores and which instructions there are.
    """
    cores = machine.cpu.usable
    with ThreadPoolExecutor(cores) as pool:
        rate = _matrix_rate(pool, cores)
        bandwidth = _copy_rate(pool, cores)
    peaks = {"fp32": rate}
    for instructions, gains in _CPU_GAINS.items():
        if instructions in machine.cpu.simd:
            for precision, gain in gains.items():
                peaks.setdefault(precision, rate * gain)
    other = [gpu.name for gpu in machine.gpus]
    return Target(
        name="this",
        title=f"{machine.cpu.name}, {cores} of {machine.cpu.cores} cores, measured",
        kind="cpu",
        capability=None,
        memory_bytes=machine.memory_bytes,
        l2_bytes=1 << 20,
        bandwidth=bandwidth,
        peaks=MappingProxyType(peaks),
        exponentials=rate * _CPU_EXPONENTIALS,
        kernel_seconds=8e-6,
        frame_seconds=1e-4,
        matrix_efficiency=_CPU_EFFICIENCY["matrix"],
        memory_efficiency=_CPU_EFFICIENCY["memory"],
        sources=(
            "float32 and bandwidth: measured just now by NumPy's matrix product and copy",
            "other precisions: float32's rate times what the processor's instructions gain",
        ),
        hint=f"no data of {', '.join(other)}: this is the CPU" if other else "",
    )


def _matrix_rate(pool: ThreadPoolExecutor, cores: int, side: int = 512) -> float:
    """float32 operations per second of matrix products on all cores.

    One product per core at a time: whether NumPy's own library uses one thread or all, the whole
    machine is busy.
    """
    rng = np.random.default_rng(0)
    operands = [rng.random((2, side, side), dtype=np.float32) for _ in range(cores)]
    results = [np.empty((side, side), dtype=np.float32) for _ in range(cores)]

    def multiply(index: int) -> None:
        for _ in range(4):
            np.matmul(operands[index][0], operands[index][1], out=results[index])

    return 4 * cores * 2 * side**3 / _least_seconds(pool, multiply, cores)


def _copy_rate(pool: ThreadPoolExecutor, cores: int, megabytes: int = 64) -> float:
    """Bytes per second, read and written, of copies beyond every cache on all cores."""
    count = (megabytes << 20) // 4 // cores
    sources = [np.ones(count, dtype=np.float32) for _ in range(cores)]
    targets = [np.zeros(count, dtype=np.float32) for _ in range(cores)]
    seconds = _least_seconds(pool, lambda i: np.copyto(targets[i], sources[i]), cores)
    return 2 * 4 * count * cores / seconds


def _least_seconds(
    pool: ThreadPoolExecutor, function: Callable[[int], object], cores: int, rounds: int = 6
) -> float:
    """The least disturbed of some rounds, the first of which is not counted."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        list(pool.map(function, range(cores)))
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _mode_name(given: str) -> str:
    """A mode as the files name it: "30w" of "MODE_30W", "maxn-super" of "MAXN_SUPER"."""
    return given.strip().lower().removeprefix("mode_").replace("_", "-")


def _make(name: str, data: Mapping[str, Any], mode: str) -> Target:
    facts = {**data, **data["modes"][mode]}
    units, hertz = facts["units"], facts["ghz"] * 1e9
    peaks = {
        precision: float(facts["operations_per_clock"][precision] * units * hertz)
        for precision in PRECISIONS
        if precision in facts["operations_per_clock"]
    }
    exponentials = facts.get("exponentials_per_clock", 0) * units * hertz
    capability = facts["compute_capability"]
    major, _, minor = (capability or "").partition(".")
    several = len(data["modes"]) > 1 and facts["title"] == data["title"]
    hint, starts = "", data.get("starts_in", mode)
    if starts != mode:
        hint = f"A new board starts in its {starts} mode, not in {mode}"
        if starts in data["modes"]:
            hint += f": --target {name}:{starts}"
    return Target(
        name=f"{name}:{mode}",
        title=facts["title"] + (f", {facts.get('nvpmodel', mode)}" if several else ""),
        kind=facts["kind"],
        capability=(int(major), int(minor)) if capability else None,
        memory_bytes=int(facts["memory_gb"] * 1e9),
        l2_bytes=int(facts["l2_mb"] * 1e6),
        bandwidth=facts["gb_per_s"] * 1e9,
        peaks=MappingProxyType(peaks),
        exponentials=exponentials or peaks["fp32"] * _CPU_EXPONENTIALS,
        kernel_seconds=facts["kernel_us"] * 1e-6,
        frame_seconds=facts["frame_us"] * 1e-6,
        matrix_efficiency=facts["efficiency"]["matrix"],
        memory_efficiency=facts["efficiency"]["memory"],
        sources=tuple(facts["sources"]),
        hint=hint,
    )
