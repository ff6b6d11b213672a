"""What this machine has, read from files and ``nvidia-smi``: no PyTorch, no CUDA, no libraries.

Every file is read below a root folder, so that a test can show this module a Jetson.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Run = Callable[[Sequence[str]], str]
"""Runs a command and gives its standard output; "" where it fails or does not exist."""

_SIMD_FLAGS = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "avx512-vnni",
    "avx_vnni": "avx-vnni",
    "avx512_bf16": "avx512-bf16",
    "amx_tile": "amx",
    "asimd": "neon",
    "bf16": "neon-bf16",
    "sve": "sve",
}
"""Flags of /proc/cpuinfo that decide what a CPU backend can do -> what they are called here."""

_JETPACKS = {
    (35,): "5",
    (36, 2): "6.0 DP",
    (36, 3): "6.0",
    (36, 4, 0): "6.1",
    (36, 4, 3): "6.2",
    (36, 4): "6.2",
    (38, 2): "7.0",
    (38, 4): "7.1",
    (39, 2, 2): "7.2.2",
    (39, 2): "7.2",
    (39,): "7.2",
}
"""Leading numbers of a Jetson Linux (L4T) release -> JetPack; the longest match counts.

NVIDIA's Jetson Linux archive.
"""


@dataclass(frozen=True)
class Cpu:
    """The processor.

    Attributes:
        name: as the processor calls itself.
        architecture: "x86_64", "aarch64" and the like.
        cores: logical ones in the machine.
        usable: those this process may run on, by its affinity and its control group.
        simd: instruction sets that matter, such as "avx2" or "neon".
    """

    name: str
    architecture: str
    cores: int
    usable: int
    simd: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as its driver describes it.

    Attributes:
        name: of the product.
        capability: compute capability, such as "9.0"; "" where it is not known.
        driver: version of the driver; "" where it is not known.
        memory_bytes: its own memory; 0 where it shares the machine's or is not known.
    """

    name: str
    capability: str = ""
    driver: str = ""
    memory_bytes: int = 0


@dataclass(frozen=True)
class Jetson:
    """A Jetson module and how it is set.

    Attributes:
        board: the device tree's model.
        l4t: release of Jetson Linux, such as "36.4.3"; "" where it is not known.
        jetpack: the JetPack that belongs to it, such as "6.2"; "" where it is not known.
        mode: name of the power mode that nvpmodel set; "" where it is not known.
        modes: every mode that nvpmodel's configuration has, by its number.
        target: name of the target (``fuseengine.targets``) that describes it; "" where none does.
    """

    board: str
    l4t: str = ""
    jetpack: str = ""
    mode: str = ""
    modes: Mapping[int, str] = field(default_factory=dict)
    target: str = ""

    @property
    def jetpack_major(self) -> int:
        """6 for JetPack 6.2; 0 where it is not known."""
        return int(self.jetpack.partition(".")[0] or 0)

    @property
    def strongest_mode(self) -> tuple[int, str] | None:
        """Number and name of the mode without limits; None where the configuration has none."""
        named = [item for item in self.modes.items() if item[1].upper().startswith("MAXN")]
        return max(named, key=lambda item: "SUPER" in item[1].upper(), default=None)


@dataclass(frozen=True)
class Machine:
    """What :func:`inspect_machine` found.

    Attributes:
        system: operating system and its release.
        cpu: the processor.
        memory_bytes: that this process may use.
        gpus: NVIDIA GPUs.
        jetson: None on other machines.
        cuda: version of the CUDA toolkit in /usr/local/cuda; "" without one.
        tensorrt_library: version of the system's libnvinfer; "" without one.
    """

    system: str
    cpu: Cpu
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    jetson: Jetson | None = None
    cuda: str = ""
    tensorrt_library: str = ""


def run_command(command: Sequence[str]) -> str:
    """Standard output of a command; "" where it does not exist, fails or takes ten seconds."""
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=10, check=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def inspect_machine(root: Path = Path("/"), run: Run = run_command) -> Machine:
    """Look at this machine.

    Args:
        root: the folder that stands for "/".
        run: runs a command.

    Returns:
        What was found; what cannot be read is empty, never an error.
    """
    jetson = _jetson(root)
    gpus = _gpus(run)
    if jetson is not None and not gpus:
        # Orin's driver has no nvidia-smi before JetPack 7.
        gpus = (Gpu("Orin" if "Orin" in jetson.board else jetson.board),)
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        cpu=_cpu(root),
        memory_bytes=_memory(root),
        gpus=gpus,
        jetson=jetson,
        cuda=_cuda(root),
        tensorrt_library=_tensorrt_library(root),
    )


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may run on, by its affinity and its control group's quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (10, 3, 0) of "10.3.0.post1"; () of none."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def _cpu(root: Path) -> Cpu:
    text = _read(root / "proc/cpuinfo")
    name = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    cores = len(re.findall(r"^processor\s*:", text, re.MULTILINE)) or os.cpu_count() or 1
    return Cpu(
        name=name.group(1).strip() if name else platform.processor() or "unknown",
        architecture=platform.machine(),
        cores=cores,
        usable=usable_cores(root),
        simd=tuple(called for flag, called in _SIMD_FLAGS.items() if flag in present),
    )


def _memory(root: Path) -> int:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    total = int(found.group(1)) * 1024 if found else 0
    limit = _read(root / "sys/fs/cgroup/memory.max")
    return min(total, int(limit)) if limit.isdigit() and total else total


def _gpus(run: Run) -> tuple[Gpu, ...]:
    query = "name,compute_cap,driver_version,memory.total"
    text = run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"])
    gpus = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 4:  # "No devices were found" and the like
            continue
        name, capability, driver, mebibytes = (
            "" if value.startswith("[") or value == "N/A" else value for value in fields
        )
        memory = int(mebibytes) << 20 if mebibytes.isdigit() else 0
        gpus.append(Gpu(name, capability, driver, memory))
    return tuple(gpus)


def _jetson(root: Path) -> Jetson | None:
    board = _read(root / "proc/device-tree/model").strip("\0 \n")
    release = _read(root / "etc/nv_tegra_release")
    if not release and "Jetson" not in board:
        return None
    found = re.search(r"R(\d+)\D+REVISION:\s*([\d.]+)", release)
    l4t = f"{found.group(1)}.{found.group(2)}" if found else ""
    modes = {
        int(number): name
        for number, name in re.findall(
            r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", _read(root / "etc/nvpmodel.conf")
        )
    }
    status = re.search(r"pmode:(\d+)", _read(root / "var/lib/nvpmodel/status"))
    mode = modes.get(int(status.group(1)), f"number {int(status.group(1))}") if status else ""
    return Jetson(
        board=board or "Jetson",
        l4t=l4t,
        jetpack=_jetpack(l4t),
        mode=mode,
        modes=modes,
        target=_jetson_target(board),
    )


def _jetpack(l4t: str) -> str:
    numbers = version_tuple(l4t)
    for length in (3, 2, 1):
        if numbers[:length] in _JETPACKS:
            return _JETPACKS[numbers[:length]]
    return ""


def _jetson_target(board: str) -> str:
    for words, target in (
        ("AGX Orin", "orin"),
        ("Orin NX", "orin-nx"),
        ("Orin Nano", "orin-nano"),
        ("Thor", "thor"),
    ):
        if words in board:
            return target
    return ""


def _cuda(root: Path) -> str:
    try:
        found = json.loads(_read(root / "usr/local/cuda/version.json"))["cuda"]["version"]
    except (ValueError, KeyError, TypeError):
        return ""
    return str(found)


def _tensorrt_library(root: Path) -> str:
    versions = [
        version_tuple(path.name.partition(".so.")[2])
        for folder in ("usr/lib", "usr/local/lib")
        for path in (root / folder).glob("*-linux-gnu/libnvinfer.so.*.*")
    ]
    return ".".join(map(str, max(versions, default=())))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
