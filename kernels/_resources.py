"""What a kernel takes of a GPU, read from its machine code with NVIDIA's ``cuobjdump``."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

from fuseengine.errors import BackendUnavailableError


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a kernel takes, read from its machine code.

    Attributes:
        registers: per thread.
        spill_bytes: local memory per thread; 0 means that nothing was spilled.
        shared_bytes: per block, dynamic.
        occupancy: share of the multiprocessor's threads that can be resident, an estimate.
        loads_128: global loads of 128 bits.
        loads: all global loads (cp.async into shared memory included).
        stores_128: global stores of 128 bits.
        stores: all global stores.
        tensor_core: tensor-core instructions.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float
    loads_128: int
    loads: int
    stores_128: int
    stores: int
    tensor_core: int


def resources(
    cubin: bytes, entry: str, *, capability: int, threads: int, shared_bytes: int
) -> Resources:
    """Registers, spills, occupancy and instructions of a kernel.

    Args:
        cubin: machine code of one kernel.
        entry: name of the function in it.
        capability: compute capability as two digits.
        threads: per block.
        shared_bytes: per block, dynamic.

    Raises:
        BackendUnavailableError: Triton's package has no ``cuobjdump``, or one with another output.
    """
    registers, spilled = usage(cubin, entry)
    sass = _cuobjdump("-sass", cubin)
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass)

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, text)) for text in instructions)

    if not spilled and count(r"(LDL|STL)\b"):
        raise BackendUnavailableError(f"{entry}: local memory that cuobjdump does not report")
    return Resources(
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=shared_bytes,
        occupancy=occupancy(capability, threads, registers, shared_bytes),
        loads_128=count(r"(LDG\b.*|LDGSTS\b.*)\.128"),
        loads=count(r"(LDG|LDGSTS)\b"),
        stores_128=count(r"STG\b.*\.128"),
        stores=count(r"STG\b"),
        tensor_core=count(r"(HMMA|HGMMA|IMMA)\b"),
    )


def usage(cubin: bytes, entry: str) -> tuple[int, int]:
    """Registers and bytes of local memory per thread: :func:`resources` without disassembling.

    Raises:
        BackendUnavailableError: as :func:`resources`.
    """
    text = _cuobjdump("-res-usage", cubin)
    found = re.search(rf"Function {entry}:\s*(.*)", text)
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", found[1] if found else ""))
    if set(numbers) != {"REG", "STACK", "LOCAL"}:
        raise BackendUnavailableError(
            f"cuobjdump says of {entry}: {text!r}; expected REG, STACK and LOCAL"
        )
    return int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"])


_LIMITS = {
    # threads, blocks, registers, shared bytes of a multiprocessor
    80: (2048, 32, 65536, 164 << 10),
    86: (1536, 16, 65536, 100 << 10),
    87: (1536, 16, 65536, 164 << 10),
    89: (1536, 24, 65536, 100 << 10),
    90: (2048, 32, 65536, 228 << 10),
}


def occupancy(capability: int, threads: int, registers: int, shared_bytes: int) -> float:
    """Share of a multiprocessor's threads that one kernel can keep resident, 0 to 1.

    From the CUDA programming guide's limits; registers are given out per warp in steps of 256, to
    warps by fours; every block takes 1 KB of shared memory for the system. Unknown capabilities
    count as 8.0.
    """
    most, blocks, file, memory = _LIMITS.get(capability, _LIMITS[80])
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    fitting = min(
        blocks,
        most // (32 * warps),
        file // per_warp // 4 * 4 // warps,
        memory // (shared_bytes + 1024),
    )
    return fitting * 32 * warps / most


def _cuobjdump(what: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        raise BackendUnavailableError("no cuobjdump in Triton's package; expected it beside ptxas")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, what, path], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendUnavailableError(f"cuobjdump {what}: {done.stderr.strip()}")
    return done.stdout
