"""What FuseEngine will use on a machine, what is wrong with it, and what to install.

Read from files, package metadata and ``nvidia-smi`` (:mod:`fuseengine.machine`). PyTorch, CuPy and
TensorRT are imported only when asked to (``deep``): importing them takes seconds, and one that is
broken should be reported, not met.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from fuseengine.backends import BACKENDS, Backend, openvino
from fuseengine.cache import cache_folder
from fuseengine.errors import CacheError
from fuseengine.machine import Machine, version_tuple

Versions = Callable[[str], str]
"""Name of a distribution -> its installed version; "" where it is not installed."""

PACKAGES = {
    "fuseengine": ("fuseengine",),
    "numpy": ("numpy",),
    "pillow": ("pillow",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "onnx": ("onnx",),
    "torch": ("torch",),
    "triton": ("triton",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "ray": ("ray",),
}
"""What a package is called here -> the distributions that bring it, the likeliest first."""

JETSON_INDEX = "https://pypi.jetson-ai-lab.io/jp6/cu126"
"""Where wheels of PyTorch for JetPack 6 are."""

_CUDA13_DRIVER = 580
"""The first driver series that runs CUDA 13 (CUDA 13.0 release notes)."""

_LITTLE_SPACE = 2 << 30


@dataclass(frozen=True)
class BackendState:
    """Whether a backend can be used on a device.

    Attributes:
        backend: its name.
        device: "cpu" or "cuda".
        precisions: that it offers there; empty where it cannot be used.
        reason: why it cannot be used, or what is not certain; "" otherwise.
    """

    backend: str
    device: str
    precisions: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True)
class Finding:
    """Something to know.

    Attributes:
        level: "warning": it does not work, or works far below what the machine can; "note".
        text: what is so.
        remedy: what to do; a command where there is one, "" where there is nothing to do.
    """

    level: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        machine: the machine.
        python: version of Python, and where it runs.
        packages: name -> version; "" where it is not installed.
        native: instruction level of the native module, or why it cannot be imported.
        cache: folder of compiled engines, with its entries, bytes and whether it can be written.
        backends: which can be used, on the devices that are here.
        findings: warnings first.
        install: what would add something -> the command.
        deep: what importing libraries gave; empty unless asked for.
    """

    machine: Machine
    python: str
    packages: dict[str, str]
    native: str
    cache: dict[str, Any]
    backends: tuple[BackendState, ...]
    findings: tuple[Finding, ...]
    install: dict[str, str]
    deep: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def installed_version(name: str) -> str:
    """Version of a distribution; "" where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def requirements(name: str) -> list[str]:
    """What a distribution requires; none where it is not installed."""
    try:
        return list(metadata.requires(name) or [])
    except metadata.PackageNotFoundError:
        return []


def diagnose(
    machine: Machine,
    versions: Versions = installed_version,
    *,
    requires: Callable[[str], list[str]] = requirements,
    deep: bool = False,
) -> Diagnosis:
    """Look at what is installed and what will be used.

    Args:
        machine: from :func:`fuseengine.machine.inspect_machine`.
        versions: version of a distribution.
        requires: requirements of a distribution.
        deep: import PyTorch, CuPy, TensorRT and the others, and ask them.

    Returns:
        The diagnosis; nothing that is missing or broken is an error.
    """
    found = {name: _first(versions, places) for name, places in PACKAGES.items()}
    packages = {name: version for name, (_, version) in found.items()}
    from_where = {name: place for name, (place, _) in found.items()}
    findings = [
        *_jetson_findings(machine, packages, requires),
        *_tensorrt_findings(machine, packages),
        *_cuda_findings(machine, packages, from_where),
        *_package_findings(versions),
        *_processor_findings(machine),
    ]
    cache = _cache_state()
    if not cache["writable"]:
        findings.append(
            Finding(
                "warning",
                f"the cache folder {cache['folder']} cannot be written: every start compiles anew",
                "export FUSEENGINE_CACHE=FOLDER",
            )
        )
    elif cache["free_bytes"] < _LITTLE_SPACE:
        findings.append(
            Finding("note", f"{cache['free_bytes'] / 1e9:.1f} GB are free for {cache['folder']}")
        )
    native = _native_state()
    if native.startswith("not usable"):
        findings.append(
            Finding(
                "warning", f"native module: {native}", "pip install --force-reinstall fuseengine"
            )
        )
    return Diagnosis(
        machine=machine,
        python=f"{platform.python_version()} ({sys.executable})",
        packages=packages,
        native=native,
        cache=cache,
        backends=_backend_states(machine, packages, deep),
        findings=tuple(sorted(findings, key=lambda finding: finding.level != "warning")),
        install=_advice(machine, packages),
        deep=_import_all(packages) if deep else {},
    )


def _first(versions: Versions, places: tuple[str, ...]) -> tuple[str, str]:
    for place in places:
        version = versions(place)
        if version:
            return place, version
    return "", ""


# --- what will be used ----------------------------------------------------------------------------


def _backend_states(
    machine: Machine, packages: Mapping[str, str], deep: bool
) -> tuple[BackendState, ...]:
    devices = ("cpu", "cuda") if machine.gpus else ("cpu",)
    return tuple(
        _backend_state(backend, device, packages, deep)
        for device in devices
        for backend in BACKENDS.values()
    )


def _backend_state(
    backend: Backend, device: str, packages: Mapping[str, str], deep: bool
) -> BackendState:
    unasked = ""
    if backend.package == "torch" and device == "cuda" and not deep and packages["torch"]:
        # Whether PyTorch sees the device, only PyTorch knows, and importing it takes seconds.
        unasked = f"PyTorch {packages['torch']} is installed; --deep asks it for the device"
    else:
        try:
            reason = backend.unavailable(device)
        except Exception as error:  # a library that is there and broken
            reason = f"{type(error).__name__}: {error}"
        if reason:
            return BackendState(backend.name, device, (), reason)
    try:
        return BackendState(backend.name, device, backend.precisions(device), unasked)
    except Exception as error:
        return BackendState(backend.name, device, (), f"{type(error).__name__}: {error}")


def _native_state() -> str:
    try:
        from fuseengine import _native
    except ImportError as error:
        return f"not usable: {error}"
    return f"{_native.simd_level()} instructions"


def _cache_state() -> dict[str, Any]:
    try:
        folder = cache_folder()
    except CacheError:
        return {
            "folder": "~/.cache/fuseengine (there is no home)",
            "entries": 0,
            "bytes": 0,
            "writable": False,
            "free_bytes": 0,
        }
    there = folder
    while not _holds(there.exists) and there != there.parent:
        there = there.parent
    entries = [path for path in folder.iterdir() if path.is_dir()] if _holds(folder.is_dir) else []
    files = [file for entry in entries for file in entry.glob("*") if file.is_file()]
    return {
        "folder": str(folder),
        "entries": len(entries),
        "bytes": sum(file.stat().st_size for file in files),
        "writable": _holds(there.is_dir) and os.access(there, os.W_OK | os.X_OK),
        "free_bytes": shutil.disk_usage(there).free,
    }


def _holds(question: Callable[[], bool]) -> bool:
    """Whether something is so of a file; not if it may not be asked."""
    try:
        return question()
    except OSError:
        return False


_LIBRARIES = ("torch", "cupy", "tensorrt", "onnxruntime", "openvino", "triton")


def _import_all(packages: Mapping[str, str]) -> dict[str, str]:
    """What each installed library says of its device, or why it cannot be imported."""
    said = {}
    for name in _LIBRARIES:
        if not packages[name] and importlib.util.find_spec(name) is None:
            continue
        try:
            library = importlib.import_module(name)
            said[name] = _ASK.get(name, lambda _: "can be imported")(library)
        except Exception as error:  # a broken library may raise anything
            said[name] = f"cannot be used: {type(error).__name__}: {str(error).strip()}"
    return said


def _ask_torch(torch: Any) -> str:
    if not torch.cuda.is_available():
        return f"can be imported; sees no CUDA device (built for CUDA {torch.version.cuda})"
    properties = torch.cuda.get_device_properties(0)
    return (
        f"CUDA {torch.version.cuda} on {properties.name}, "
        f"compute capability {properties.major}.{properties.minor}"
    )


def _ask_cupy(cupy: Any) -> str:
    runtime = cupy.cuda.runtime
    name = runtime.getDeviceProperties(0)["name"]
    return f"CUDA {runtime.runtimeGetVersion()} on {name.decode()}"


_ASK: dict[str, Callable[[Any], str]] = {
    "torch": _ask_torch,
    "cupy": _ask_cupy,
    "onnxruntime": lambda library: f"providers {', '.join(library.get_available_providers())}",
    "openvino": lambda _: f"devices {', '.join(openvino.core().available_devices)}",
}


# --- what is wrong --------------------------------------------------------------------------------


def _jetson_findings(
    machine: Machine, packages: Mapping[str, str], requires: Callable[[str], list[str]]
) -> list[Finding]:
    jetson = machine.jetson
    if jetson is None:
        return []
    findings = []
    strongest = jetson.strongest_mode
    if jetson.mode and strongest is not None and jetson.mode != strongest[1]:
        loss = _slower(jetson.target, jetson.mode, strongest[1])
        findings.append(
            Finding(
                "warning",
                f"power mode {jetson.mode}: {loss}; measure in {strongest[1]}, with fixed clocks",
                f"sudo nvpmodel -m {strongest[0]} && sudo jetson_clocks",
            )
        )
    if not jetson.jetpack:
        findings.append(Finding("note", f"Jetson Linux {jetson.l4t or '?'} is not known here"))
    torch = version_tuple(packages["torch"])
    if jetson.jetpack_major == 6 and torch:
        from_pypi = any(name.startswith("nvidia-") for name in requires("torch"))
        if from_pypi or torch[:2] > (2, 8):
            findings.append(
                Finding(
                    "warning",
                    f"PyTorch {packages['torch']} is PyPI's, for servers: it cannot use the GPU "
                    "of JetPack 6",
                    f"pip install --index-url {JETSON_INDEX} torch==2.8.0",
                )
            )
    return findings


def _slower(target: str, mode: str, strongest: str) -> str:
    """How the rates of two modes compare, as far as the targets' files know them."""
    from fuseengine.errors import FuseEngineError
    from fuseengine.targets import get_target

    try:
        part = get_target(f"{target}:{mode}").peak("fp16") / get_target(
            f"{target}:{strongest}"
        ).peak("fp16")
    except FuseEngineError:
        return f"slower than {strongest}"
    return f"{part:.0%} of {strongest}'s arithmetic rate"


def _tensorrt_findings(machine: Machine, packages: Mapping[str, str]) -> list[Finding]:
    shown = packages["tensorrt"] or machine.tensorrt_library
    version = version_tuple(shown)
    if not version:
        return []
    findings = []
    jetpack = version_tuple(machine.jetson.jetpack) if machine.jetson is not None else ()
    if version[:2] == (10, 14):
        findings.append(
            Finding(
                "warning",
                f"TensorRT {shown}: kernels inside plans are broken in 10.14",
                "pip install 'tensorrt>=10.16,<10.17'",
            )
        )
    if machine.jetson is not None and version[0] >= 11:
        if machine.jetson.jetpack_major <= 6:
            findings.append(
                Finding(
                    "warning",
                    f"TensorRT {shown} does not run on JetPack {machine.jetson.jetpack or 6}, "
                    "which stays on TensorRT 10",
                    "pip uninstall tensorrt && sudo apt install python3-libnvinfer",
                )
            )
        elif version < (11, 4, 1) or jetpack < (7, 2, 2):
            findings.append(
                Finding(
                    "warning",
                    f"TensorRT {shown} on JetPack {machine.jetson.jetpack}: TensorRT 11 runs on a "
                    "Jetson from 11.4.1 and JetPack 7.2.2 on",
                    "pip uninstall tensorrt && sudo apt install python3-libnvinfer",
                )
            )
    onnxruntime = version_tuple(packages["onnxruntime"])
    if version[0] >= 11 and onnxruntime and onnxruntime < (1, 27):
        findings.append(
            Finding(
                "note",
                f"ONNX Runtime {packages['onnxruntime']} cannot use TensorRT {shown}",
                "pip install 'onnxruntime>=1.27'",
            )
        )
    if machine.tensorrt_library and not packages["tensorrt"]:
        findings.append(
            Finding(
                "note",
                f"TensorRT {machine.tensorrt_library} is in the system and not visible to this "
                "Python",
                "sudo apt install python3-libnvinfer; in a virtual environment, make it with "
                "python3 -m venv --system-site-packages",
            )
        )
    return findings


def _cuda_findings(
    machine: Machine, packages: Mapping[str, str], from_where: Mapping[str, str]
) -> list[Finding]:
    findings = []
    cupy, major = from_where["cupy"], _cuda_major(machine)
    built_for = int(cupy[9:11]) if cupy.startswith("cupy-cuda") else 0
    if machine.gpus and built_for and major and built_for > major:
        findings.append(
            Finding(
                "warning",
                f"{cupy} {packages['cupy']} is for CUDA {built_for}, this machine runs CUDA "
                f"{major}",
                f"pip uninstall {cupy} && pip install cupy-cuda{major}x",
            )
        )
    return findings


def _cuda_major(machine: Machine) -> int:
    """The newest CUDA that the driver runs; 0 where it is not known."""
    if machine.jetson is not None and machine.jetson.jetpack_major:
        return 12 if machine.jetson.jetpack_major == 6 else 13
    driver = version_tuple(machine.gpus[0].driver if machine.gpus else "")
    if driver:
        return 13 if driver[0] >= _CUDA13_DRIVER else 12
    return version_tuple(machine.cuda)[0] if machine.cuda else 0


def _package_findings(versions: Versions) -> list[Finding]:
    if versions("onnxruntime") and versions("onnxruntime-gpu"):
        return [
            Finding(
                "warning",
                "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
                "pip uninstall onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
            )
        ]
    return []


def _processor_findings(machine: Machine) -> list[Finding]:
    cpu, findings = machine.cpu, []
    if cpu.usable < cpu.cores:
        findings.append(
            Finding("note", f"this process may use {cpu.usable} of {cpu.cores} logical cores")
        )
    if cpu.architecture in ("x86_64", "AMD64") and cpu.simd and "avx2" not in cpu.simd:
        findings.append(
            Finding("warning", "the processor has no AVX2: expect a fifth of the speed")
        )
    return findings


# --- what to install ------------------------------------------------------------------------------


def _advice(machine: Machine, packages: Mapping[str, str]) -> dict[str, str]:
    """What is missing and would add something -> the command that installs it."""
    advice = {}
    x86 = machine.cpu.architecture in ("x86_64", "AMD64")
    jetpack = machine.jetson.jetpack_major if machine.jetson is not None else 0
    if x86 and not packages["openvino"]:
        advice["bfloat16 and int8 stages on the CPU"] = "pip install 'fuseengine[openvino]'"
    if machine.gpus and not packages["cupy"]:
        major = _cuda_major(machine) or 13
        advice["the GPU without PyTorch"] = f"pip install cupy-cuda{major}x"
    if machine.gpus and not packages["tensorrt"]:
        if machine.jetson is not None:
            advice["TensorRT"] = "sudo apt install nvidia-jetpack python3-libnvinfer"
        else:
            advice["TensorRT"] = "pip install 'fuseengine[tensorrt]'"
    if not packages["torch"]:
        if jetpack == 6:
            advice["compiling and training on the device"] = (
                f"pip install --index-url {JETSON_INDEX} torch==2.8.0 && "
                "pip install 'fuseengine[compile]'"
            )
        else:
            advice["compiling and training"] = "pip install 'fuseengine[compile]'"
    elif not packages["onnx"]:
        advice["compiling"] = "pip install 'fuseengine[compile]'"
    return advice
