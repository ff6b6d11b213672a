"""From a captured model to int8 networks: calibrate, choose the layers, write Q/DQ.

:func:`quantise_stages` gives a Q/DQ network per stage variant, for ONNX Runtime, OpenVINO and
TensorRT alike, and the record of what stayed float and why.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from fuseengine.backends import BACKENDS, StageSource
from fuseengine.errors import CompileError
from fuseengine.export.calibration import Statistics, evenly, observe, record_calls
from fuseengine.export.qdq import Layer, layers_of, multiplications, quantise, worthwhile
from fuseengine.export.sensitivity import Emulation, Judge, fewest_floats
from fuseengine.pairs import Pair
from fuseengine.program import Program, StageVariant
from fuseengine.runtime.executor import StageRunner

log = logging.getLogger("fuseengine")

METHODS = ("percentile", "mse")
"""Ways to choose a tensor's range that are tried; the better one is kept."""

_JUDGED = 8
"""Calibration pictures that the search for layers looks at."""

_MARGIN_DB = 0.5
"""Kernels round ties and sums otherwise than the emulation does."""


@dataclass(frozen=True)
class Quantised:
    """Int8 networks of a program.

    Attributes:
        networks: serialised Q/DQ ONNX per variant; float32 as it was where no layer is int8.
        record: JSON data: method, pictures, layers that stayed float, errors, seconds.
    """

    networks: Mapping[StageVariant, bytes]
    record: Mapping[str, Any]


def quantise_stages(
    program: Program,
    source: StageSource,
    pairs: Sequence[Pair],
    *,
    guard_db: float = 45.0,
    max_error: float = 0.1,
    check: Sequence[Pair] = (),
    references: Sequence[NDArray[np.float32]] = (),
    method: str = "auto",
    percentile: float = 99.99,
    seconds: float = 60.0,
    threads: int = 1,
) -> Quantised:
    """Quantise a program's networks as far as the guard allows.

    Args:
        program: the captured model.
        source: its networks in float32.
        pairs: model inputs to calibrate on, see ``export.calibration.calibration_pairs``.
        guard_db: least PSNR of the fused picture against float32, in dB (peak 1).
        max_error: largest absolute error allowed, on the scale [0, 1].
        check: more model inputs that must meet the guard, such as whole pictures.
        references: what float32 makes of them.
        method: "max", "percentile", "mse", or "auto": the better of the last two.
        percentile: share of the values inside the range for "percentile".
        seconds: time for the search, about (calibration comes on top).
        threads: CPU threads.

    Returns:
        Networks and record.

    Raises:
        SettingError: an unknown method, a percentile out of its range.
        FrameError: NaN or infinity inside a network.
        CompileError: no layer at all can be int8.
    """
    begin = time.perf_counter()
    seen = _look(program, source, pairs, threads)
    if not any(seen.layers.values()):
        raise CompileError(
            f"int8: {program.model} has no convolution or product with constant weights; "
            "use another precision"
        )
    methods = METHODS if method == "auto" else (method,)
    way = _best_way(seen, methods, percentile, guard_db + _MARGIN_DB, max_error, threads)
    way.judge.pairs += check
    way.judge.references += references
    found = fewest_floats(
        way.judge, guard_db=guard_db + _MARGIN_DB, max_error=max_error, seconds=seconds
    )
    kept = {
        v: [x for x in some if (v, x.node) not in found.floats] for v, some in seen.layers.items()
    }
    if not any(kept.values()):
        raise CompileError(
            f"int8: no layer of {program.model} can be int8 within {guard_db:g} dB and an error "
            f"of {max_error:g}; use another precision, or lower guard_db if that is meant"
        )
    networks = {
        v: quantise(network, way.ranges[v], kept[v], outputs=way.outputs).SerializeToString()
        if kept[v]
        else source.onnx(v)
        for v, network in seen.networks.items()
    }
    record = {
        "method": f"percentile {percentile:g}" if way.method == "percentile" else way.method,
        "rounded_outputs": way.outputs,
        "layers": sum(map(len, seen.layers.values())),
        "int8_layers": {v.label: len(some) for v, some in kept.items()},
        "float_layers": {
            v.label: [x.label for x in some if (v, x.node) in found.floats]
            for v, some in seen.layers.items()
        },
        "all_int8_psnr_db": round(way.psnr_db, 2),
        "emulated_psnr_db": round(found.psnr_db, 2),
        "emulated_max_error": round(found.max_error, 5),
        "pictures_fused": found.evaluations,
        "seconds": round(time.perf_counter() - begin, 2),
    }
    log.debug("quantised %s: %s", program.model, record)
    return Quantised(networks, record)


@dataclass(frozen=True)
class _Seen:
    """A program in float32 on the calibration pictures.

    Attributes:
        program: the program.
        networks: its networks.
        layers: those that can be int8 and matter, per network.
        statistics: magnitudes of their tensors, per network.
        pairs: some of the pictures.
        fused: what became of them.
    """

    program: Program
    networks: Mapping[StageVariant, onnx.ModelProto]
    layers: Mapping[StageVariant, list[Layer]]
    statistics: Mapping[StageVariant, Statistics]
    pairs: list[Pair]
    fused: list[NDArray[np.float32]]


def _look(program: Program, source: StageSource, pairs: Sequence[Pair], threads: int) -> _Seen:
    networks = {v: onnx.load_from_string(source.onnx(v)) for v in program.variants()}
    runners = {v: _runner(source, v, threads) for v in networks}
    calls, fused = record_calls(program, runners, pairs)
    layers, statistics = {}, {}
    for variant, network in networks.items():
        found = layers_of(network)
        tensors = [name for layer in found for name in (layer.input, layer.output)]
        statistics[variant] = observe(network, tensors, calls.pop(variant), threads=threads)
        costs = multiplications(network, found, statistics[variant].elements)
        layers[variant] = worthwhile(found, costs)
    some = evenly(len(pairs), _JUDGED)
    return _Seen(
        program, networks, layers, statistics, [pairs[i] for i in some], [fused[i] for i in some]
    )


@dataclass(frozen=True)
class _Way:
    """A way to choose ranges, with what the fused pictures lose when every layer is int8."""

    method: str
    outputs: bool
    ranges: Mapping[StageVariant, Mapping[str, float]]
    judge: Judge
    psnr_db: float
    max_error: float


def _best_way(
    seen: _Seen,
    methods: Sequence[str],
    percentile: float,
    least_db: float,
    most_error: float,
    threads: int,
) -> _Way:
    """The most exact method; results are left unrounded only where rounding them is too much."""
    ways = []
    for outputs in (True, False):
        for method in methods:
            ranges = {v: s.ranges(method, percentile) for v, s in seen.statistics.items()}
            emulation = Emulation(
                seen.program, seen.networks, seen.layers, ranges, outputs=outputs, threads=threads
            )
            judge = Judge(emulation, seen.pairs, seen.fused)
            ways.append(_Way(method, outputs, ranges, judge, *judge.worst(set())))
        best = max(ways, key=lambda way: way.psnr_db)
        if best.psnr_db >= least_db and best.max_error <= most_error:
            break
    return best


def _runner(source: StageSource, variant: StageVariant, threads: int) -> StageRunner:
    """The float32 network on the CPU, for inputs of any size."""
    return BACKENDS["onnxruntime"].lower(
        source, variant, (), precision="fp32", device="cpu", threads=threads
    )
