"""GPU kernels compiled ahead of time, with no GPU present, and what the compiler made of them.

    python -m fuseengine.kernels.aot --capability 87 90
    python -m fuseengine.kernels.aot --capability 87 --out build/cubins

:func:`compile` plans an op on tensors without memory, of an example shape, and compiles each launch
of that plan for a compute capability: the same description that the op runs at run time. What the
shape decides (unit strides, multiples of 16) is compiled in and said under ``assumes``.

How to launch a cubin: ``cuModuleGetFunction(entry)``; over 48 KB of ``shared_bytes`` set
``CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES``; ``cuLaunchKernel`` with ``grid``, a block of
``threads`` x 1 x 1, ``shared_bytes``, and pointers to the values of ``parameters`` in order. Triton
adds two 64-bit pointers at the end, global_scratch and profile_scratch: pass null for both; a
kernel that would use them is refused here.

Besides the machine code for one capability each kernel has PTX for compute_80, which the driver of
any later GPU translates when it is loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuseengine.errors import (
    BackendUnavailableError,
    FuseEngineError,
    SettingError,
    UnknownNameError,
)
from fuseengine.kernels._triton import DTYPES, Launch, installed
from fuseengine.kernels.compose_priors import plan as plan_compose
from fuseengine.kernels.criss_cross_attention import plan as plan_attention
from fuseengine.kernels.ddim_step import plan as plan_ddim
from fuseengine.kernels.group_norm_silu import plan as plan_norm
from fuseengine.kernels.joint_ddim_step import plan as plan_joint

PTX_CAPABILITY = 80
PTX_VERSION = 84
"""PTX ISA 8.4, CUDA 12.4: the driver of JetPack 6 (CUDA 12.6) reads it; newer ones do too."""

HIDDEN = ("global_scratch", "profile_scratch")
"""Two pointers that Triton appends to every kernel's parameters; null."""

_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


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


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel of one op for one GPU.

    Attributes:
        op: the op.
        label: which of its launches.
        dtype: of its tensors, "float16".
        capability: compute capability as two digits.
        cubin: machine code.
        ptx: for compute_80, translated by the driver of another GPU.
        entry: name of the function in both.
        parameters: run-time parameters in order: name and type ("*fp16" pointer, "i32", "fp32").
        constants: arguments compiled in.
        assumes: parameter -> what its value must be a multiple of; pointers: bytes of alignment.
        grid: programs per axis for the example shape.
        grid_rule: the same in terms of parameters and constants.
        threads: per block.
        num_ctas: blocks per cluster, 1.
        shared_bytes: dynamic shared memory, cubin.
        ptx_threads: per block, PTX.
        ptx_shared_bytes: dynamic shared memory, PTX.
        enable_fp_fusion: whether a * b + c was contracted.
        triton_version: compiler.
        cubin_sha256: of the machine code.
        ptx_sha256: of the PTX.
    """

    op: str
    label: str
    dtype: str
    capability: int
    cubin: bytes = dataclasses.field(repr=False)
    ptx: str = dataclasses.field(repr=False)
    entry: str
    parameters: tuple[tuple[str, str], ...]
    constants: Mapping[str, Any]
    assumes: Mapping[str, int]
    grid: tuple[int, ...]
    grid_rule: str
    threads: int
    num_ctas: int
    shared_bytes: int
    ptx_threads: int
    ptx_shared_bytes: int
    enable_fp_fusion: bool
    triton_version: str
    cubin_sha256: str
    ptx_sha256: str

    @property
    def name(self) -> str:
        """File name without ending: op, label, dtype and capability."""
        label = re.sub(r"\W+", "_", self.label)
        return f"{self.op}.{label}.{self.dtype}.sm_{self.capability}"

    def description(self) -> dict[str, Any]:
        """Everything but the code, as JSON values."""
        skipped = ("cubin", "ptx")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"name": self.name, **{k: v for k, v in fields.items() if k not in skipped}}

    def resources(self) -> Resources:
        """Registers, spills, shared memory, occupancy and instructions of the cubin.

        Raises:
            BackendUnavailableError: Triton's package has no ``cuobjdump``.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(self.cubin)
            usage = _tool("cuobjdump", "-res-usage", str(path))
            sass = _tool("cuobjdump", "-sass", str(path))
        found = re.search(rf"Function {self.entry}:\s*(.*)", usage)
        numbers = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", found[1] if found else ""))
        registers = int(numbers["REG"])
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass)

        def count(pattern: str) -> int:
            return sum(bool(re.match(pattern, text)) for text in instructions)

        spilled = int(numbers["STACK"]) + int(numbers["LOCAL"])
        if not spilled and count(r"(LDL|STL)\b"):
            raise BackendUnavailableError(f"{self.name}: local memory that the report does not say")
        return Resources(
            registers=registers,
            spill_bytes=spilled,
            shared_bytes=self.shared_bytes,
            occupancy=occupancy(self.capability, self.threads, registers, self.shared_bytes),
            loads_128=count(r"(LDG\b.*|LDGSTS\b.*)\.128"),
            loads=count(r"(LDG|LDGSTS)\b"),
            stores_128=count(r"STG\b.*\.128"),
            stores=count(r"STG\b"),
            tensor_core=count(r"(HMMA|HGMMA|IMMA)\b"),
        )


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

    From the CUDA programming guide's limits; registers are given out per warp in steps of 256,
    every block takes 1 KB of shared memory for the system. Unknown capabilities count as 8.0.
    """
    most, blocks, file, memory = _LIMITS.get(capability, _LIMITS[80])
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    fitting = min(
        blocks,
        most // (32 * warps),
        file // per_warp // warps,
        memory // (shared_bytes + 1024),
    )
    return fitting * 32 * warps / most


# --- example shapes -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    """The example that a kernel is compiled for.

    Attributes:
        batch: pictures.
        size: height, width.
        channels: of v (attention) and x (norm).
        queries: channels of q and k.
        groups: of the norm.
    """

    batch: int = 1
    size: tuple[int, int] = (480, 640)
    channels: int = 32
    queries: int = 4
    groups: int = 8


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _distinct(launches: Sequence[Launch]) -> list[Launch]:
    """The first of each label: launches of one label are compiled alike."""
    return list({launch.label: launch for launch in reversed(launches)}.values())[::-1]


def _attention(dtype: torch.dtype, capability: int, shape: Shape) -> list[Launch]:
    q, k = (_meta(dtype, shape.batch, shape.queries, *shape.size) for _ in range(2))
    v = _meta(dtype, shape.batch, shape.channels, *shape.size)
    lse = _meta(torch.float32, shape.batch, *shape.size)
    return _distinct(plan_attention(q, k, v, torch.empty_like(v), lse, capability=capability))


def _norm(dtype: torch.dtype, capability: int, shape: Shape) -> list[Launch]:
    x = _meta(dtype, shape.batch, shape.channels, *shape.size)
    weight, bias = (_meta(dtype, shape.channels) for _ in range(2))
    shift = _meta(dtype, 1, shape.channels)
    options: dict[str, Any] = {"groups": shape.groups, "eps": 1e-5, "silu": True}
    launches = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = x.to(memory_format=memory_format)
        given = (x, weight, bias, shift, torch.empty_like(x))
        launches += plan_norm(*given, capability=capability, **options)
    return _distinct(launches)


def _ddim(dtype: torch.dtype, capability: int, shape: Shape) -> list[Launch]:
    x, eps, noise, out = (_meta(dtype, shape.batch, 3, *shape.size) for _ in range(4))
    given = (None, noise)
    return [plan_ddim(x, eps, n, out, (0.5, 0.5, 0.5), capability=capability)[0] for n in given]


def _joint(dtype: torch.dtype, capability: int, shape: Shape) -> list[Launch]:
    x, eps, out = (_meta(dtype, shape.batch, 3, *shape.size) for _ in range(3))
    mask, y1, y2 = (_meta(dtype, shape.batch, 1, *shape.size) for _ in range(3))
    numbers = (0.6, 0.8, 0.8, 0.6, 0.3)
    return [
        plan_joint(x, eps, mask, y1, y2, out, numbers, form, capability=capability)[0]
        for form in ("code", "paper")
    ]


def _compose(dtype: torch.dtype, capability: int, shape: Shape) -> list[Launch]:
    x, eps_a, eps_b, out = (_meta(dtype, shape.batch, 3, *shape.size) for _ in range(4))
    weight = _meta(dtype, shape.batch, 1, *shape.size)
    return plan_compose(x, eps_a, eps_b, weight, out, (0.5, 0.5), capability=capability)


OPS: dict[str, Callable[[torch.dtype, int, Shape], list[Launch]]] = {
    "compose_priors": _compose,
    "criss_cross_attention": _attention,
    "ddim_step": _ddim,
    "group_norm_silu": _norm,
    "joint_ddim_step": _joint,
}
"""Ops that have kernels, with the plan of all their launches."""


# --- compiling ------------------------------------------------------------------------------------


def compile(
    op: str,
    dtype: torch.dtype,
    capability: int = 87,
    *,
    shape: Shape | None = None,
    aligned: bool = True,
) -> list[Compiled]:
    """Compile every launch of an op, with no GPU present.

    Args:
        op: one of :data:`OPS`.
        dtype: float32, float16 or bfloat16.
        capability: compute capability as two digits, at least 80: 87 for Orin, 90 for H100.
        shape: example shape; its unit strides and block sizes are compiled in.
        aligned: also compile in that sizes and strides which are multiples of 16 in the example
            stay so, which gives 128-bit loads. False assumes nothing about sizes. Pointers are
            taken to lie on 16 bytes in both.

    Returns:
        One per launch, in order; several layouts or forms of an op are all there.

    Raises:
        UnknownNameError: no such op.
        SettingError: dtype or capability without kernels, or Triton in interpreter mode.
        BackendUnavailableError: Triton is not installed, or a kernel needs scratch memory.
    """
    if op not in OPS:
        raise UnknownNameError("op", op, OPS)
    if dtype not in DTYPES:
        expected = ", ".join(str(t) for t in DTYPES)
        raise SettingError(f"{op} in {dtype}; expected one of {expected}")
    if not PTX_CAPABILITY <= capability < 130:
        raise SettingError(
            f"capability {capability}; expected two digits from {PTX_CAPABILITY}: 87 for Orin"
        )
    _check_compiler()
    launches = OPS[op](dtype, capability, shape or Shape())
    return [_compile(op, dtype, capability, launch, aligned) for launch in launches]


def _check_compiler() -> None:
    if not installed():
        raise BackendUnavailableError(
            "compiling GPU kernels needs Triton, which is not installed here: "
            "pip install 'fuseengine[gpu]'"
        )
    import triton

    if triton.knobs.runtime.interpret:
        raise SettingError("TRITON_INTERPRET=1; expected it unset: the interpreter cannot compile")


def _compile(
    op: str, dtype: torch.dtype, capability: int, launch: Launch, aligned: bool
) -> Compiled:
    import triton

    signature, constants, assumes = _specialise(launch, aligned)
    native = _build(launch, signature, constants, assumes, capability)
    portable = _build(launch, signature, constants, assumes, PTX_CAPABILITY, PTX_VERSION)
    for built in (native, portable):
        for scratch in HIDDEN:
            size = getattr(built.metadata, f"{scratch}_size", 0)
            if size:
                raise BackendUnavailableError(
                    f"{op} ({launch.label}): {size} bytes of {scratch}; expected 0, as nobody "
                    "allocates it at launch: use smaller blocks"
                )
    types = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
    cubin, ptx = native.asm["cubin"], portable.asm["ptx"]
    return Compiled(
        op=op,
        label=launch.label,
        dtype=str(dtype).removeprefix("torch."),
        capability=capability,
        cubin=cubin,
        ptx=ptx,
        entry=native.metadata.name,
        parameters=(*types, *((name, "*i8") for name in HIDDEN)),
        constants=constants,
        assumes=assumes,
        grid=launch.grid,
        grid_rule=launch.grid_rule,
        threads=32 * native.metadata.num_warps,
        num_ctas=native.metadata.num_ctas,
        shared_bytes=native.metadata.shared,
        ptx_threads=32 * portable.metadata.num_warps,
        ptx_shared_bytes=portable.metadata.shared,
        enable_fp_fusion=native.metadata.enable_fp_fusion,
        triton_version=triton.__version__,
        cubin_sha256=hashlib.sha256(cubin).hexdigest(),
        ptx_sha256=hashlib.sha256(ptx.encode()).hexdigest(),
    )


def _specialise(
    launch: Launch, aligned: bool
) -> tuple[dict[str, str], dict[str, Any], dict[str, int]]:
    """Types, compile-time values and divisibility, by the rules of Triton's own launcher."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    assumes: dict[str, int] = {}
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            assumes[name] = 16
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if aligned and value % 16 == 0:
                assumes[name] = 16
    for name, value in launch.constants.items():
        signature[name], constants[name] = "constexpr", value
    return signature, constants, assumes


def _build(
    launch: Launch,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    assumes: Mapping[str, int],
    capability: int,
    ptx_version: int | None = None,
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = list(signature)
    source = ASTSource(
        fn=launch.kernel.jit,
        signature=dict(signature),
        constexprs=dict(constants),
        attrs={(order.index(name),): [["tt.divisibility", by]] for name, by in assumes.items()},
    )
    options = dict(launch.options)
    if ptx_version is not None:
        options["ptx_version"] = ptx_version
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _tool(name: str, *words: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise BackendUnavailableError(f"{name} is not in Triton's package, expected beside ptxas")
    done = subprocess.run([path, *words], capture_output=True, text=True, check=True)
    return done.stdout


# --- command line ---------------------------------------------------------------------------------


def write(kernels: Sequence[Compiled], folder: Path) -> Path:
    """Write machine code, PTX and a manifest.

    Args:
        kernels: what to write.
        folder: made when absent; files of the same name are replaced.

    Returns:
        The manifest: JSON, a list of descriptions; ``name`` + ".cubin" and ".ptx" beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kernel in kernels:
        (folder / f"{kernel.name}.cubin").write_bytes(kernel.cubin)
        (folder / f"{kernel.name}.ptx").write_text(kernel.ptx, encoding="utf-8")
    manifest = folder / "kernels.json"
    entries = [kernel.description() for kernel in kernels]
    text = json.dumps({"schema": 1, "kernels": entries}, indent=2)
    manifest.write_text(text + "\n", encoding="utf-8")
    return manifest


_COLUMNS = (
    "kernel", "dtype", "sm", "threads", "registers", "spill B", "shared B", "occupancy",
    "128-bit loads", "128-bit stores", "tensor core",
)  # fmt: skip


def table(kernels: Sequence[Compiled]) -> str:
    """The kernels' resources as an aligned text table; "3/4" is three of four instructions."""
    lines: list[tuple[str, ...]] = [_COLUMNS]
    for kernel in kernels:
        found = kernel.resources()
        cells = (
            f"{kernel.op} ({kernel.label})",
            kernel.dtype,
            kernel.capability,
            kernel.threads,
            found.registers,
            found.spill_bytes,
            found.shared_bytes,
            f"{found.occupancy:.0%}",
            f"{found.loads_128}/{found.loads}",
            f"{found.stores_128}/{found.stores}",
            found.tensor_core,
        )
        lines.append(tuple(map(str, cells)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = 2
    return "\n".join(
        "  ".join(
            text.ljust(width) if k < left else text.rjust(width)
            for k, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def main(words: Sequence[str] | None = None) -> int:
    """Compile, print the table, write files; 2 on an error."""
    names = {str(t).removeprefix("torch."): t for t in DTYPES}
    parser = argparse.ArgumentParser(
        prog="python -m fuseengine.kernels.aot",
        description="Compile GPU kernels with no GPU present and show what they take.",
    )
    parser.add_argument("--capability", type=int, nargs="+", default=[87], help="e.g. 87 90")
    parser.add_argument("--op", nargs="+", default=list(OPS), help=", ".join(OPS))
    parser.add_argument("--dtype", nargs="+", default=list(names), choices=list(names))
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], metavar=("H", "W"))
    parser.add_argument("--channels", type=int, default=32, help="of v and of the norm")
    parser.add_argument("--queries", type=int, default=4, help="channels of q and k")
    parser.add_argument("--any-size", action="store_true", help="assume nothing about sizes")
    parser.add_argument("--out", type=Path, help="folder for cubins, PTX and manifest")
    options = parser.parse_args(words)
    shape = Shape(size=tuple(options.size), channels=options.channels, queries=options.queries)
    try:
        kernels = [
            kernel
            for capability in options.capability
            for op in options.op
            for dtype in options.dtype
            for kernel in compile(
                op, names[dtype], capability, shape=shape, aligned=not options.any_size
            )
        ]
        print(table(kernels))
        if options.out:
            print(f"{len(kernels)} kernels, described in {write(kernels, options.out)}")
    except FuseEngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
