"""A program's GPU launches for one frame size, written down for machines without PyTorch.

    write(program, (480, 640), folder, capabilities=(87,))

plans every op of the program and the conversion of frames, as they would be launched on a GPU,
compiles just the kernels that these need (with no GPU present), and writes both to one folder: a
store of kernels (:mod:`fuseengine.runtime.cubins`) and the launches
(:mod:`fuseengine.runtime.launches`). With ``ptx`` a second set is planned and compiled for
compute_80, which the driver of any later GPU translates.

Ops without a kernel of ours are the run side's business: cuFFT and elementwise ones of CuPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuseengine.errors import SettingError
from fuseengine.kernels import _tuning, aot, fft
from fuseengine.kernels._triton import Launch as TritonLaunch
from fuseengine.kernels.compose_priors import coefficients as composed_coefficients
from fuseengine.kernels.compose_priors import plan as plan_compose
from fuseengine.kernels.criss_cross_attention import plan as plan_attention
from fuseengine.kernels.ddim_step import _coefficients as ddim_coefficients
from fuseengine.kernels.ddim_step import ddim_sigma
from fuseengine.kernels.ddim_step import plan as plan_ddim
from fuseengine.kernels.frames import plan_in, plan_out
from fuseengine.kernels.joint_ddim_step import plan as plan_joint
from fuseengine.kernels.wiener import plan as plan_wiener
from fuseengine.program import Node, Program, resolve
from fuseengine.runtime.cubins import PTX_CAPABILITY
from fuseengine.runtime.frames import FrameAdapter
from fuseengine.runtime.launches import (
    Argument,
    Array,
    Launch,
    Launches,
    Number,
    OpCall,
    frame_key,
    key_of,
)

FRAMES = (
    (torch.uint8, 3), (torch.uint8, 1), (torch.uint16, 1), (torch.float32, 3), (torch.float32, 1),
)  # fmt: skip
"""Kinds of frames that are converted on the GPU: element type, and 3 for colour or 1 for gray."""

Arrays = dict[str, Tensor]
Planned = tuple[OpCall, str, list[TritonLaunch]]
"""The call as data, the op that it belongs to, and its launches as they are compiled."""


def write(
    program: Program,
    frame: tuple[int, int],
    folder: Path,
    capabilities: Sequence[int] = (87,),
    *,
    ptx: bool = True,
    resumed: Program | None = None,
) -> Path:
    """Compile and write everything that a program launches for one frame size.

    Args:
        program: the captured model.
        frame: height and width of the frames.
        folder: made when absent; what it holds of an earlier set is replaced.
        capabilities: of the GPUs, two digits each, at least 80.
        ptx: whether GPUs beside these are served as well, through the driver's translation.
        resumed: the program of a frame that starts from the one before, for its ops too.

    Returns:
        The folder.

    Raises:
        BackendUnavailableError: Triton is not installed.
        SettingError: a capability without kernels.
        CaptureError: the program does not fit the size.
    """
    targets = [(capability, "cubin") for capability in dict.fromkeys(capabilities)]
    if ptx:
        targets.append((PTX_CAPABILITY, "ptx"))
    for capability, _ in targets:
        if not PTX_CAPABILITY <= capability < 130:
            raise SettingError(f"capability {capability}; expected two digits from 80: 87 for Orin")
    compiled, calls = [], []
    for capability, form in targets:
        for call, op, launches in record(program, frame, capability, resumed):
            calls.append(call)
            compiled += aot.compile_launches(op, torch.float32, capability, launches, form=form)
    folder = Path(folder)
    aot.write(compiled, folder)
    Launches(calls).write(folder)
    return folder


def record(
    program: Program,
    frame: tuple[int, int],
    capability: int,
    resumed: Program | None = None,
) -> Iterator[Planned]:
    """Plan every call of an op that has kernels, once per key; compiles nothing.

    Args:
        program: the captured model.
        frame: height and width of the frames.
        capability: two digits.
        resumed: see :func:`write`.

    Yields:
        Calls of the programs' ops, then of frames into and out of the buffers.
    """
    padded = FrameAdapter(frame, program.channels, program.multiple, program.padding).padded
    seen = set()
    programs = (program,) if resumed is None else (program, resumed)
    for values, node in ((p.values, node) for p in programs for node in p.nodes):
        planner = _PLANNERS.get(node.target) if node.kind == "op" else None
        if planner is None:
            continue
        shapes = [resolve(values[n].shape, padded) for n in (*node.inputs, *node.made())]
        key = key_of(node.target, shapes[:-1], shapes[-1], node.attrs)
        if key in seen:
            continue
        seen.add(key)
        arrays = {f"in{i}": torch.empty(shape) for i, shape in enumerate(shapes[:-1])}
        arrays["out"] = torch.empty(shapes[-1])
        launches = planner(node, arrays, capability)
        if launches:
            yield _recorded(key, capability, launches, arrays), _OP_NAMES[node.target], launches
    yield from _frames(program, frame, padded, capability)


# --- planners of ops ------------------------------------------------------------------------------

_SCALES = ("sqrt_abar", "sqrt_one_minus_abar", "sqrt_abar_prev", "sqrt_one_minus_abar_prev")


def _scales(attrs: Mapping[str, Any]) -> tuple[float, float, float, float]:
    now, rest, before, rest_before = (float(attrs[name]) for name in _SCALES)
    return now, rest, before, rest_before


def _inputs(arrays: Arrays) -> list[Tensor]:
    return [tensor for name, tensor in arrays.items() if name.startswith("in")]


def _ddim(node: Node, arrays: Arrays, capability: int) -> list[TritonLaunch]:
    x, eps, *noise = _inputs(arrays)
    scales = _scales(node.attrs)
    sigma = float(ddim_sigma(*scales, float(node.attrs["eta"]))) if noise else 0.0
    numbers = (*ddim_coefficients(*scales, sigma), sigma)
    given = noise[0] if noise else None
    return plan_ddim(x, eps, given, arrays["out"], numbers, capability=capability)


def _joint(node: Node, arrays: Arrays, capability: int) -> list[TritonLaunch]:
    x, eps, mask, y1, y2 = _inputs(arrays)
    numbers = (*_scales(node.attrs), float(node.attrs["lam"]))
    form = node.attrs["form"]
    return plan_joint(x, eps, mask, y1, y2, arrays["out"], numbers, form, capability=capability)


def _compose(node: Node, arrays: Arrays, capability: int) -> list[TritonLaunch]:
    x, eps_a, eps_b, weight = _inputs(arrays)
    numbers = composed_coefficients(*_scales(node.attrs), node.attrs["form"])
    return plan_compose(x, eps_a, eps_b, weight, arrays["out"], numbers, capability=capability)


def _attention(node: Node, arrays: Arrays, capability: int) -> list[TritonLaunch]:
    q, k, v = _inputs(arrays)
    lse = torch.empty((q.shape[0], *q.shape[2:]))
    return plan_attention(q, k, v, arrays["out"], lse, capability=capability)


def _filter(node: Node, arrays: Arrays, capability: int) -> list[TritonLaunch]:
    """None where the tuning table or a length says cuFFT."""
    x, out = arrays["in0"], arrays["out"]
    height, width = x.shape[-2:]
    settings = _tuning.choose("wiener_filter", x.dtype, capability, height * width)
    planned = fft.transform(height) is not None and fft.transform(width) is not None
    if settings["method"] != "triton" or not planned:
        return []
    arrays["spectrum"] = torch.empty(height, width // 2 + 1, dtype=torch.complex64)
    planes = (-1, height, width)
    return plan_wiener(x.view(planes), arrays["spectrum"], out.view(planes), capability=capability)


_PLANNERS: dict[str, Callable[[Node, Arrays, int], list[TritonLaunch]]] = {
    "ddim_step": _ddim,
    "joint_ddim_step": _joint,
    "compose_priors": _compose,
    "criss_cross_attention": _attention,
    "circular_convolution": _filter,
    "wiener_deconvolution": _filter,
}

_OP_NAMES = {name: name for name in _PLANNERS} | {
    "circular_convolution": "wiener_filter",
    "wiener_deconvolution": "wiener_filter",
}
"""Which op of ``kernels/`` a program's op is."""


# --- frames ---------------------------------------------------------------------------------------


def _frames(
    program: Program, frame: tuple[int, int], padded: tuple[int, int], capability: int
) -> Iterator[Planned]:
    count = {"luma": 1, "rgb": 3}[program.channels]
    planes = torch.empty(1, count, *padded)
    for dtype, channels in FRAMES:
        shape = (*frame, 3)[: 3 if channels == 3 else 2]
        given, out = _pair(dtype, shape, 0)
        odd_given, odd_out = _pair(dtype, shape, 4)
        typestr = given.numpy().dtype.str
        into = [
            plan_in(x, planes, program.channels, 0.0, 0.5, capability=capability)
            for x in (given, odd_given)
        ]
        key = frame_key("frame_in", typestr, shape, planes.shape, program.channels)
        call = _recorded(key, capability, into[0], {"in0": given, "out": planes}, ("low", "scale"))
        yield call, "frame_in", [*into[0], *into[1]]
        back = [
            plan_out(planes, visible, made, capability=capability)
            for visible, made in ((given, out), (odd_given, odd_out))
        ]
        key = frame_key("frame_out", typestr, shape, planes.shape, program.channels)
        arrays = {"in0": planes, "in1": given, "out": out}
        yield _recorded(key, capability, back[0], arrays), "frame_out", [*back[0], *back[1]]


def _pair(dtype: torch.dtype, shape: Sequence[int], offset: int) -> tuple[Tensor, Tensor]:
    """Two frames (1, H, W[, 3]); with an offset in bytes they do not lie on 16 bytes.

    Frames are whoever's memory: kernels are compiled for both.
    """
    count = int(torch.Size(shape).numel()) * dtype.itemsize
    made = [torch.empty(count + offset, dtype=torch.uint8)[offset:] for _ in range(2)]
    first, second = (raw.view(dtype).reshape(1, *shape) for raw in made)
    return first, second


# --- as data --------------------------------------------------------------------------------------


def _recorded(
    key: str,
    capability: int,
    launches: Sequence[TritonLaunch],
    arrays: Mapping[str, Tensor],
    numbers: Sequence[str] = (),
) -> OpCall:
    """Launches with arrays by name; what a plan made itself is a table or scratch memory."""
    names = {tensor.data_ptr(): name for name, tensor in arrays.items()}
    scratch: list[int] = []
    tables: list[Any] = []

    def argument(name: str, value: Any, kind: str) -> Argument:
        if name in numbers:
            return Number(name)
        if not isinstance(value, Tensor):
            return value
        place = value.data_ptr()
        if place not in names and name == "table":
            names[place] = f"table{len(tables)}"
            tables.append(value.numpy())
        elif place not in names:
            names[place] = f"scratch{len(scratch)}"
            scratch.append(value.untyped_storage().nbytes())
        return Array(names[place], kind)

    recorded = []
    for launch in launches:
        variant = launch.variant()
        kinds = dict(variant.parameters)
        arguments = tuple(
            (name, argument(name, launch.arguments[name], kind)) for name, kind in kinds.items()
        )
        recorded.append(
            Launch(
                launch.kernel.name,
                launch.label,
                tuple(int(n) for n in launch.grid),
                arguments,
                dict(variant.constants),
                dict(variant.options),
                tuple(launch.multiples),
            )
        )
    return OpCall(key, capability, tuple(recorded), tuple(scratch), tuple(tables))
