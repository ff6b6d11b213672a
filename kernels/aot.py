"""GPU kernels compiled ahead of time, with no GPU present, and what the compiler made of them.

    python -m fuseengine.kernels.aot --capability 87 90 --report table.md
    python -m fuseengine.kernels.aot --capability 87 --out build/cubins
    FUSEENGINE_CUBINS=build/cubins FUSEENGINE_NO_JIT=1 python ...

The first compiles each launch of each op for an example shape and prints what it takes. The second
writes a store of all kernels that the ops can launch; the third runs from it, and Triton is not
even imported. :func:`use` does in a program what FUSEENGINE_CUBINS does.

**What makes a set complete.** Planning an op on tensors without memory yields the launches that
the op runs on a GPU; :func:`fuseengine.runtime.cubins.variant_of` says what of a launch is compiled
in, and gives two variants for each set of constants: sizes that are multiples of 8 with addresses
on 16 bytes, and any. So a set is complete when it has both variants for every set of constants, and
plans see to it that there are few of those: they depend on

* dtypes, flags, layouts (rows dense or not; an op with other needs makes copies),
* the channels' block (:class:`Extent`), not on heights and widths, but for the ops of
  :data:`BY_LENGTH`, whose kernels are made for lengths of rows and columns,
* the tuning table's entry, which is found by the power of two nearest to the number of pixels.

:meth:`Extent.shapes` has an example of each; :func:`variants` plans them all. Integers beyond 32
bits (a stride past 2^31 elements) are in no set: Triton compiles them when they come, or the launch
is refused under FUSEENGINE_NO_JIT=1.

**How to launch a cubin without this package**: ``cuModuleGetFunction(entry)``; over 48 KB of
``shared_bytes`` set ``CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES``; ``cuLaunchKernel`` with
``grid_rule``'s grid, a block of ``threads`` x 1 x 1, ``shared_bytes``, and pointers to the values
of ``parameters`` in order, then ``hidden`` 64-bit nulls: Triton adds global_scratch and
profile_scratch; a kernel that would use them is refused here.

Beside machine code a store has PTX for compute_80, which the driver of any later GPU translates
when it is loaded. Neither names source files.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
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
from fuseengine.kernels._cubins import use as use
from fuseengine.kernels._resources import Resources, resources
from fuseengine.kernels._triton import DTYPES, Launch, build, installed
from fuseengine.kernels.compose_priors import plan as plan_compose
from fuseengine.kernels.criss_cross_attention import plan as plan_attention
from fuseengine.kernels.ddim_step import plan as plan_ddim
from fuseengine.kernels.frames import PLANES, plan_in, plan_out
from fuseengine.kernels.group_norm_silu import plan as plan_norm
from fuseengine.kernels.joint_ddim_step import plan as plan_joint
from fuseengine.kernels.pad_reflect import plan as plan_pad
from fuseengine.kernels.warp import BORDERS
from fuseengine.kernels.warp import plan as plan_warp
from fuseengine.kernels.wiener import plan as plan_wiener
from fuseengine.kernels.ycbcr import plan as plan_ycbcr
from fuseengine.runtime import cubins
from fuseengine.runtime.cubins import PTX_CAPABILITY, Entry, Variant

PTX_VERSION = 84
"""PTX ISA 8.4, CUDA 12.4: the driver of JetPack 6 (CUDA 12.6) reads it; newer ones do too."""

HIDDEN = ("global_scratch", "profile_scratch")
"""Two pointers that Triton appends to every kernel's parameters; null."""


@dataclasses.dataclass(frozen=True)
class Compiled(Entry):
    """One kernel of one op for one GPU: its entry in a store, and its code.

    Attributes:
        code: machine code, or the text of PTX.
    """

    code: bytes = dataclasses.field(repr=False)

    @property
    def aligned(self) -> bool:
        """Whether it assumes anything of sizes and addresses."""
        return bool(self.assumes)

    def resources(self) -> Resources:
        """What the machine code takes.

        Raises:
            BackendUnavailableError: Triton's package has no ``cuobjdump``.
            SettingError: it is PTX, which takes nothing yet.
        """
        if self.form != "cubin":
            raise SettingError(f"{self.file} is {self.form}; expected machine code: form='cubin'")
        return resources(
            self.code,
            self.entry,
            capability=self.capability,
            threads=self.threads,
            shared_bytes=self.shared_bytes,
        )


# --- example shapes -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    """An example that launches are planned for.

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


@dataclasses.dataclass(frozen=True)
class Extent:
    """What a complete set of kernels is complete for.

    Attributes:
        sizes: heights and widths, for the ops of :data:`BY_LENGTH`; the others' kernels serve all.
        channels: of v and x; kernels tell 1 to 16, 17 to 32 and more apart.
        queries: channels of q and k; kernels tell 1 to 16, 17 to 32, 33 to 64, ... apart.
    """

    sizes: tuple[tuple[int, int], ...] = ((480, 640),)
    channels: tuple[int, ...] = (16, 32, 64)
    queries: tuple[int, ...] = (16, 32, 64)

    def shapes(self, op: str) -> Iterator[Shape]:
        """Examples of everything that planning an op tells apart.

        It looks at the power of two that is nearest to the number of pixels (the tuning table),
        and whether rows are whole words.
        """
        powers = [(1 << k // 2, 1 << k - k // 2) for k in range(_MOST_PIXELS + 1)]
        words = [(height, width - 1) for height, width in powers if width > 4]
        sizes = self.sizes if op in BY_LENGTH else (*powers, *words)
        told_apart = BY_CHANNELS.get(op, ())
        choices = [getattr(self, name) for name in told_apart]
        for size, *numbers in itertools.product(sizes, *choices):
            yield Shape(size=size, **dict(zip(told_apart, numbers, strict=True)))


_MOST_PIXELS = 28
"""Logarithm of more pixels than a tensor has."""


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(dtype: torch.dtype, capability: int, shape: Shape) -> list[Launch]:
    q, k = (_meta(dtype, shape.batch, shape.queries, *shape.size) for _ in range(2))
    v = _meta(dtype, shape.batch, shape.channels, *shape.size)
    lse = _meta(torch.float32, shape.batch, *shape.size)
    return plan_attention(q, k, v, torch.empty_like(v), lse, capability=capability)


def _norm(dtype: torch.dtype, capability: int, shape: Shape) -> list[Launch]:
    x = _meta(dtype, shape.batch, shape.channels, *shape.size)
    launches = []
    for memory_format, kind, shifted, silu in itertools.product(
        (torch.contiguous_format, torch.channels_last),
        dict.fromkeys((dtype, torch.float32)),
        (True, False),
        (True, False),
    ):
        x = x.to(memory_format=memory_format)
        weight, bias = (_meta(kind, shape.channels) for _ in range(2))
        shift = _meta(kind, 1, shape.channels) if shifted else None
        launches += plan_norm(
            x, weight, bias, shift, torch.empty_like(x),
            groups=shape.groups, eps=1e-5, silu=silu, capability=capability,
        )  # fmt: skip
    return launches


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


def _frames(shape: Shape) -> list[Tensor]:
    """Of the usual cameras, 8 bits colour and gray, 16 bits gray; and of programs, float32."""
    colour = [_meta(t, shape.batch, *shape.size, 3) for t in (torch.uint8, torch.float32)]
    kinds = (torch.uint8, torch.uint16, torch.float32)
    return [*colour, *(_meta(kind, shape.batch, *shape.size) for kind in kinds)]


def _frame_in(dtype: torch.dtype, capability: int, shape: Shape) -> list[Launch]:
    launches = []
    for channels, count in PLANES.items():
        out = _meta(dtype, shape.batch, count, *shape.size)
        for frame in _frames(shape):
            launches += plan_in(frame, out, channels, 0.0, 0.5, capability=capability)
    return launches


def _frame_out(dtype: torch.dtype, capability: int, shape: Shape) -> list[Launch]:
    launches = []
    for count in (1, 3):
        fused = _meta(dtype, shape.batch, count, *shape.size)
        for visible in _frames(shape):
            out = torch.empty_like(visible)
            launches += plan_out(fused, visible, out, capability=capability)
    return launches


def _pad(dtype: torch.dtype, capability: int, shape: Shape) -> list[Launch]:
    x = _meta(dtype, shape.batch, 1, *shape.size)
    return plan_pad(x, torch.empty_like(x), capability=capability)


def _ycbcr(inverse: bool) -> Callable[[torch.dtype, int, Shape], list[Launch]]:
    def launches(dtype: torch.dtype, capability: int, shape: Shape) -> list[Launch]:
        x = _meta(dtype, shape.batch, 3, *shape.size)
        return plan_ycbcr(x, torch.empty_like(x), inverse=inverse, capability=capability)

    return launches


def _warp(dtype: torch.dtype, capability: int, shape: Shape) -> list[Launch]:
    x = _meta(dtype, shape.batch, 1, *shape.size)
    sources = [_meta(torch.float32, 1, 3, 3), _meta(torch.float32, 1, *shape.size, 2)]
    return [
        plan_warp(x, coordinates, torch.empty_like(x), border, capability=capability)[0]
        for coordinates in sources
        for border in BORDERS
    ]


def _wiener(dtype: torch.dtype, capability: int, shape: Shape) -> list[Launch]:
    x = _meta(dtype, shape.batch, *shape.size)
    half = (shape.size[0], shape.size[1] // 2 + 1)
    plans = [
        plan_wiener(x, _meta(kind, *half), torch.empty_like(x), capability=capability)
        for kind in (torch.complex64, torch.float32)
    ]
    return [*plans[0], plans[1][1]]  # the passes over rows do not see the spectrum


OPS: dict[str, Callable[[torch.dtype, int, Shape], list[Launch]]] = {
    "compose_priors": _compose,
    "criss_cross_attention": _attention,
    "ddim_step": _ddim,
    "frame_in": _frame_in,
    "frame_out": _frame_out,
    "group_norm_silu": _norm,
    "joint_ddim_step": _joint,
    "pad_reflect": _pad,
    "rgb_to_ycbcr": _ycbcr(False),
    "warp": _warp,
    "wiener_filter": _wiener,
    "ycbcr_to_rgb": _ycbcr(True),
}
"""Ops that have kernels, with the plan of all their launches."""

BY_CHANNELS = {
    "criss_cross_attention": ("channels", "queries"),
    "group_norm_silu": ("channels",),
}
"""Ops whose kernels have blocks of channels, and of which."""

BY_LENGTH = ("wiener_filter",)
"""Ops whose kernels are made for the lengths of rows and columns: a transform's factors."""


# --- compiling ------------------------------------------------------------------------------------


def compile(
    op: str,
    dtype: torch.dtype,
    capability: int = 87,
    *,
    shape: Shape | None = None,
    aligned: bool = True,
) -> list[Compiled]:
    """Compile an op's launches for an example shape, with no GPU present.

    Args:
        op: one of :data:`OPS`.
        dtype: float32, float16 or bfloat16.
        capability: compute capability as two digits, at least 80: 87 for Orin, 90 for H100.
        shape: example shape.
        aligned: the aligned variants, which take addresses to lie on 16 bytes and sizes to be
            multiples of 8; False: those that assume nothing.

    Returns:
        One per label, in order; several layouts or forms of an op are all there.

    Raises:
        UnknownNameError: no such op.
        SettingError: dtype or capability without kernels, or Triton in interpreter mode.
        BackendUnavailableError: Triton is not installed, or a kernel needs scratch memory.
    """
    launches = _planned(op, dtype, capability, shape or Shape())
    by_label = {launch.label: launch for launch in reversed(launches)}
    return [
        _compile(op, dtype, capability, launch, launch.variant(aligned=aligned))
        for launch in reversed(by_label.values())
    ]


def compile_launches(
    op: str,
    dtype: torch.dtype,
    capability: int,
    launches: Sequence[Launch],
    *,
    form: str = "cubin",
) -> list[Compiled]:
    """Compile just what given launches need: an engine's of known sizes, say.

    Args:
        op: the op that planned them, for the manifest.
        dtype: of its tensors, for the manifest.
        capability: the one that they were planned for.
        launches: on tensors of any device, "meta" too: those lie on 16 bytes, as what PyTorch and
            CuPy allocate does.
        form: "cubin", machine code for the capability; "ptx", for it and every later one.

    Returns:
        One per variant, in order.

    Raises:
        As :func:`compile`.
    """
    _check_compiler()
    needed = {launch.variant(): launch for launch in reversed(launches)}
    return [
        _compile(op, dtype, capability, launch, variant, form)
        for variant, launch in reversed(needed.items())
    ]


def compile_all(
    op: str,
    dtype: torch.dtype,
    capability: int,
    *,
    form: str = "cubin",
    extent: Extent | None = None,
) -> list[Compiled]:
    """Compile everything that an op can launch; arguments as elsewhere here.

    Raises:
        As :func:`compile`.
    """
    needed = variants(op, dtype, capability, extent)
    return [
        _compile(op, dtype, capability, launch, variant, form) for variant, launch in needed.items()
    ]


def compile_example(
    op: str, dtype: torch.dtype, capability: int, shape: Shape | None = None
) -> list[Compiled]:
    """Compile both variants of an op's launches for an example shape; as :func:`compile`.

    Returns:
        Of each label the aligned kernel and, where it is another one, that for any size.
    """
    aligned = compile(op, dtype, capability, shape=shape)
    plain = compile(op, dtype, capability, shape=shape, aligned=False)
    pairs = zip(aligned, plain, strict=True)
    return [kernel for a, b in pairs for kernel in ((a,) if a.variant == b.variant else (a, b))]


def in_processes(
    tasks: Sequence[Callable[[], list[Compiled]]], jobs: int | None = None
) -> list[Compiled]:
    """Run such functions as above, each a ``functools.partial``, in so many processes."""
    jobs = min(jobs or os.cpu_count() or 1, len(tasks))
    if jobs <= 1:
        return [kernel for task in tasks for kernel in task()]
    # A forked process would share torch's and LLVM's threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(task) for task in tasks]
        return [kernel for future in futures for kernel in future.result()]


def variants(
    op: str, dtype: torch.dtype, capability: int, extent: Extent | None = None
) -> dict[Variant, Launch]:
    """Every variant that an op can launch, with a launch of it; compiles nothing.

    Raises:
        UnknownNameError: no such op.
        SettingError: dtype or capability without kernels.
    """
    found: dict[Variant, Launch] = {}
    for shape in (extent or Extent()).shapes(op):
        for launch in _planned(op, dtype, capability, shape):
            for aligned in (True, False):
                found.setdefault(launch.variant(aligned=aligned), launch)
    return {variant: launch for variant, launch in found.items() if not variant.wide}


def _planned(op: str, dtype: torch.dtype, capability: int, shape: Shape) -> list[Launch]:
    _check(op, dtype, capability)
    return OPS[op](dtype, capability, shape)


def _check(op: str, dtype: torch.dtype, capability: int) -> None:
    if op not in OPS:
        raise UnknownNameError("op", op, OPS)
    if dtype not in DTYPES:
        expected = ", ".join(str(t) for t in DTYPES)
        raise SettingError(f"{op} in {dtype}; expected one of {expected}")
    if not PTX_CAPABILITY <= capability < 130:
        raise SettingError(
            f"capability {capability}; expected two digits from {PTX_CAPABILITY}: 87 for Orin"
        )


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
    op: str,
    dtype: torch.dtype,
    capability: int,
    launch: Launch,
    variant: Variant,
    form: str = "cubin",
) -> Compiled:
    _check_compiler()
    import triton

    options = {"ptx_version": PTX_VERSION} if form == "ptx" else {}
    # Lines of source code would leave this machine with the kernels, and the paths of its files.
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        built = build(launch.kernel, variant, capability, **options)
    ptx, metadata = built.asm["ptx"], built.metadata
    code = ptx.encode() if form == "ptx" else built.asm["cubin"]
    name = str(dtype).removeprefix("torch.")
    sha256 = hashlib.sha256(code).hexdigest()
    stem = re.sub(r"\W+", "_", f"{op}.{launch.label}.{name}")
    target = f"compute_{capability}" if form == "ptx" else f"sm_{capability}"
    return Compiled(
        op=op,
        label=launch.label,
        dtype=name,
        capability=capability,
        form=form,
        file=f"{stem}.{target}.{sha256[:12]}.{form}",
        sha256=sha256,
        kernel=variant.kernel,
        entry=metadata.name,
        parameters=variant.parameters,
        hidden=_hidden_parameters(op, launch, variant, ptx, metadata),
        constants=dict(variant.constants),
        assumes=dict(variant.assumes),
        options=dict(variant.options),
        threads=32 * metadata.num_warps,
        shared_bytes=metadata.shared,
        grid_rule=launch.grid_rule,
        triton_version=triton.__version__,
        code=code,
    )


def _hidden_parameters(op: str, launch: Launch, variant: Variant, ptx: str, metadata: Any) -> int:
    """How many null pointers follow the parameters; refuses a kernel that would use them."""
    for scratch in HIDDEN:
        size = getattr(metadata, f"{scratch}_size", 0)
        if size:
            raise BackendUnavailableError(
                f"{op} ({launch.label}): {size} bytes of {scratch}; expected 0, as nobody "
                "allocates it at launch: use smaller blocks"
            )
    head = ptx.split(f".entry {metadata.name}(", 1)[1].split(")", 1)[0]
    hidden = head.count(".param") - len(variant.parameters)
    if not 0 <= hidden <= len(HIDDEN) or metadata.num_ctas != 1:
        raise BackendUnavailableError(
            f"{op} ({launch.label}): {hidden} parameters beside its own, clusters of "
            f"{metadata.num_ctas}; expected {HIDDEN} and no clusters: use a Triton that is tested"
        )
    return hidden


# --- command line ---------------------------------------------------------------------------------


def write(kernels: Sequence[Compiled], folder: Path) -> Path:
    """Write a store, in place of one that is there; :mod:`fuseengine.runtime.cubins` says its form.

    Args:
        kernels: what to write; of those that are alike the first.
        folder: made when absent.

    Returns:
        The manifest.
    """
    different = {(k.form, k.capability, k.variant): k for k in reversed(kernels)}
    return cubins.write(folder, ((k, k.code) for k in reversed(different.values())))


_COLUMNS = (
    "kernel", "dtype", "sm", "sizes", "threads", "registers", "spill B", "shared B", "occupancy",
    "128-bit loads", "128-bit stores", "tensor core",
)  # fmt: skip
_LEFT = ("kernel", "dtype", "sizes")


def rows(kernels: Sequence[Compiled]) -> list[tuple[str, ...]]:
    """What each kernel takes, under :data:`_COLUMNS`; "3/4" is three of four instructions."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # waits for cuobjdump
        all_found = list(pool.map(Compiled.resources, kernels))
    lines: list[tuple[str, ...]] = []
    for kernel, found in zip(kernels, all_found, strict=True):
        cells = (
            f"{kernel.op} ({kernel.label})",
            kernel.dtype,
            kernel.capability,
            "aligned" if kernel.aligned else "any",
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
    return lines


def table(lines: Sequence[tuple[str, ...]], *, markdown: bool = False) -> str:
    """Lines of :func:`rows` as a table, aligned with spaces or in Markdown."""
    lines = [_COLUMNS, *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [
        [
            text.ljust(width) if name in _LEFT else text.rjust(width)
            for name, text, width in zip(_COLUMNS, line, widths, strict=True)
        ]
        for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in cells)
    rule = [
        "-" * width if name in _LEFT else "-" * (width - 1) + ":"
        for name, width in zip(_COLUMNS, widths, strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:]))


def _page(lines: Sequence[tuple[str, ...]], shape: Shape, capabilities: Sequence[int]) -> str:
    import triton

    height, width = shape.size
    targets = ", ".join(f"sm_{c}" for c in capabilities)
    return (
        f"# GPU kernels as compiled for {targets}\n\n"
        f"Triton {triton.__version__}; no GPU took part: `python -m fuseengine.kernels.aot "
        f"--capability {' '.join(map(str, capabilities))} --report FILE`.\n"
        f"Example: {height}x{width} pixels, {shape.channels} channels, {shape.queries} of queries "
        "and keys. Occupancy is an estimate from registers and shared memory.\n"
        'Sizes: "aligned" kernels run when sizes are multiples of 8 and addresses of 16 bytes, '
        '"any" ones else.\n\n'
        f"{table(lines, markdown=True)}\n"
    )


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}; expected HEIGHTxWIDTH, for example 480x640")
    return int(found[1]), int(found[2])


def _parser() -> argparse.ArgumentParser:
    names = [str(t).removeprefix("torch.") for t in DTYPES]
    parser = argparse.ArgumentParser(
        prog="python -m fuseengine.kernels.aot",
        description="Compile GPU kernels with no GPU present and show what they take.",
    )
    add = parser.add_argument
    add("--capability", type=int, nargs="+", default=[87], help="e.g. 87 90")
    add("--op", nargs="+", default=list(OPS), help=", ".join(OPS))
    add("--dtype", nargs="+", default=names, choices=names)
    add(
        "--size", type=_size, nargs="+", default=[(480, 640)], metavar="HxW",
        help=f"of the table's example, the first; all of {', '.join(BY_LENGTH)}: the other ops' "
        "kernels serve every size",
    )  # fmt: skip
    add("--channels", type=int, default=32, help="of v and of the norm; --out has 1 to any number")
    add("--queries", type=int, default=4, help="channels of q and k; --out has 1 to 64, and these")
    add("--out", type=Path, help="folder for a complete set: machine code, PTX and a manifest")
    add("--no-ptx", action="store_true", help="leave out PTX, which any later GPU can run")
    add("--jobs", type=int, help="processes that compile, by default one per processor")
    add("--report", type=Path, help="file for the table as a page, Markdown")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Compile, print the table, write files; 2 on an error."""
    options = _parser().parse_args(words)
    shape = Shape(size=options.size[0], channels=options.channels, queries=options.queries)
    dtypes = [getattr(torch, name) for name in options.dtype]
    try:
        _check_compiler()
        for which in itertools.product(options.op, dtypes, options.capability):
            _check(*which)
        if options.out:
            targets = [(capability, "cubin") for capability in options.capability]
            targets += [] if options.no_ptx else [(PTX_CAPABILITY, "ptx")]
            compile_set = functools.partial(compile_all, extent=_extent(options))
            tasks = [
                [functools.partial(compile_set, op, d, capability, form=form) for d in dtypes]
                for (capability, form), op in itertools.product(targets, options.op)
            ]
            kernels = _in_groups(tasks, options.jobs)
            manifest = write(kernels, options.out)
            print(f"{len(kernels)} kernels, described in {manifest}")
        tasks = [
            [functools.partial(compile_example, op, d, capability, shape) for d in dtypes]
            for capability, op in itertools.product(options.capability, options.op)
        ]
        lines = rows(_in_groups(tasks, options.jobs))
        print(table(lines))
        if options.report:
            page = _page(lines, shape, options.capability)
            options.report.write_text(page, encoding="utf-8")
    except FuseEngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _in_groups(
    tasks: Sequence[list[Callable[[], list[Compiled]]]], jobs: int | None
) -> list[Compiled]:
    """Each group in one process, which finds what it has compiled before in Triton's cache."""
    return in_processes([functools.partial(in_processes, group, 1) for group in tasks], jobs)


def _extent(options: argparse.Namespace) -> Extent:
    usual = Extent()
    return Extent(
        sizes=tuple(options.size),
        channels=tuple(dict.fromkeys((*usual.channels, options.channels))),
        queries=tuple(dict.fromkeys((*usual.queries, options.queries))),
    )


if __name__ == "__main__":
    sys.exit(main())
