"""Precisions of packaged models: time, distance from float32, and the metrics of saved pictures.

    python -m benchmarks.precision --infrared DIR --visible DIR [--calibrate IR_DIR VIS_DIR]

Every backend that runs on a CPU, in float32, bfloat16 and int8, on some pairs resampled to one
size. Int8 is quantised once per model, under the guard, on other pictures than are measured. PSNR
is that of the saved 8-bit frames' luma against float32 eager's; metrics are computed on the same.
Contenders are timed in turns in one process, whole calls from frame to frame.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import fuseengine as fe
from benchmarks.end_to_end import parse_size
from benchmarks.harness import (
    PauseBefore,
    Result,
    Samples,
    command_line,
    interleave,
    paired_ratio,
    psnr,
)
from benchmarks.quality import luma
from fuseengine.backends import BACKENDS
from fuseengine.backends.base import network_kind
from fuseengine.engine import Engine
from fuseengine.errors import FuseEngineError
from fuseengine.metrics import evaluate
from fuseengine.runtime.frames import FrameAdapter
from fuseengine.runtime.images import pair_files

KEYS = ("EN", "SF", "AG", "Qabf")
BACKEND_NAMES = ("openvino", "onnxruntime")
PRECISIONS = ("fp32", "bf16", "int8", "int8+bf16")

Frames = list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]


@dataclass
class Contender:
    """One backend at one precision.

    Attributes:
        name: backend and precision.
        engine: ready to fuse; None when it cannot be had.
        error: why not.
    """

    name: str
    engine: Engine | None
    error: str = ""


def read_frames(
    infrared: Path, visible: Path, size: tuple[int, int], count: int
) -> tuple[Frames, list[str]]:
    """Some pairs of two folders, evenly chosen by name, resampled to a size; their names."""
    found = pair_files(infrared, visible).pairs
    if not found:
        raise SystemExit(f"no pairs in {infrared} and {visible}; expected images of equal names")
    chosen = [
        found[i] for i in np.unique(np.linspace(0, len(found) - 1, count).round().astype(int))
    ]

    def fit(path: Path) -> NDArray[np.uint8]:
        frame = np.asarray(fe.read_image(path))
        return np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC))

    return [(fit(ir), fit(vis)) for ir, vis in chosen], [ir.stem for ir, _ in chosen]


def contenders(
    name: str, size: tuple[int, int], threads: int | None, calibration: Frames | None
) -> tuple[list[Contender], Engine]:
    """The engines of a model, and the one in int8 whose report says how it was quantised."""
    options: dict[str, Any] = {"size": size, "threads": threads, "cache": False}
    model = fe.load_model(name)
    quantised = fe.compile(
        model, precision="int8", backend="onnxruntime", calibration=calibration, **options
    )
    made = []
    for backend in BACKEND_NAMES:
        reason = BACKENDS[backend].unavailable("cpu")
        for precision in PRECISIONS:
            label = f"{backend} {precision}"
            if reason or precision not in BACKENDS[backend].precisions("cpu"):
                if reason:
                    made.append(Contender(label, None, reason))
                continue
            made.append(Contender(label, _engine(quantised, backend, precision)))
    return made, quantised


def _engine(quantised: Engine, backend: str, precision: str) -> Engine:
    """An engine of the same networks, lowered otherwise."""
    choice = dict.fromkeys(quantised.program.variants(), (backend, precision))
    return Engine(
        quantised.program,
        quantised._source,
        choice,
        quantised.report,
        size=quantised.size,
        device="cpu",
        threads=quantised.threads,
    )


def eager(name: str, frames: Frames, size: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """What the float32 eager model makes of frames, as saved."""
    import torch

    model = fe.load_model(name)
    adapter = FrameAdapter(size, model.channels, model.multiple, model.padding)
    saved = []
    for ir, vis in frames:
        a, b = np.empty((2, 1, adapter.planes, *adapter.padded), dtype=np.float32)
        adapter.load(ir, vis, a, b)
        with torch.inference_mode():
            fused = model(torch.from_numpy(a), torch.from_numpy(b)).numpy()
        saved.append(adapter.store(fused, vis))
    return saved


def quality(
    engine: Engine, frames: Frames, wanted: Sequence[NDArray[np.uint8]]
) -> tuple[dict[str, float], list[NDArray[np.uint8]]]:
    """PSNR against float32 and metrics of the saved pictures, and these."""
    saved = [engine(ir, vis) for ir, vis in frames]
    decibels = [min(psnr(luma(x), luma(y), 255), 99.0) for x, y in zip(saved, wanted, strict=True)]
    worst = max(
        int(np.abs(luma(x).astype(int) - luma(y)).max()) for x, y in zip(saved, wanted, strict=True)
    )
    fields = {
        "psnr_db": float(np.mean(decibels)),
        "psnr_worst_db": float(np.min(decibels)),
        "max_levels": worst,
    }
    values = [
        evaluate(luma(x), luma(ir), luma(vis), KEYS)
        for x, (ir, vis) in zip(saved, frames, strict=True)
    ]
    fields |= {key: float(np.mean([v[key] for v in values])) for key in KEYS}
    return fields, saved


def measure(args: argparse.Namespace, name: str) -> Result:
    """All rows of one model."""
    frames, names = read_frames(args.infrared, args.visible, args.size, args.pairs)
    calibration = None
    if args.calibrate:
        from fuseengine.export.calibration import read_pairs

        calibration = read_pairs(*args.calibrate)
    made, quantised = contenders(name, args.size, args.threads, calibration)
    wanted = eager(name, frames, args.size)
    fields: dict[str, dict[str, Any]] = {}
    for contender in made:
        if contender.engine is not None:
            fields[contender.name], saved = quality(contender.engine, frames, wanted)
            if args.pictures:
                _save(args.pictures / name / contender.name.replace(" ", "-"), names, saved)
    if args.pictures:
        _save(args.pictures / name / "eager-fp32", names, wanted)
    ir, vis = frames[0]
    samples = interleave(
        {c.name: lambda e=c.engine: e(ir, vis) for c in made if c.engine is not None},
        rounds=args.rounds,
        warmup=3,
        synchronize=PauseBefore(),
    )
    return _result(args, name, made, fields, samples, quantised)


def _save(folder: Path, names: Sequence[str], pictures: Sequence[NDArray[np.uint8]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, picture in zip(names, pictures, strict=True):
        fe.write_image(folder / f"{stem}.png", picture)


def _result(
    args: argparse.Namespace,
    name: str,
    made: Sequence[Contender],
    fields: dict[str, dict[str, Any]],
    samples: dict[str, Samples],
    quantised: Engine,
) -> Result:
    height, width = args.size
    record = quantised.report.quantised or {}
    floats = {k: v for k, v in record["float_layers"].items() if v}
    result = Result(
        suite=f"precision-{name}-{args.name}",
        device="cpu",
        title=f"{name} at {width}x{height} on {args.name}: precisions of the stages",
        settings={
            "size": f"{height}x{width}",
            "pairs": args.pairs,
            "threads": quantised.threads,
            "guard_db": quantised.report.guard_db,
        },
        command=args.command,
    )
    best = min(samples, key=lambda key: samples[key].p50)
    for contender in made:
        own = samples.get(contender.name)
        row = dict(fields.get(contender.name, {}))
        if own is not None:
            row["ratio"] = "1" if contender.name == best else str(paired_ratio(own, samples[best]))
        if contender.error:
            row["error"] = contender.error
        result.add(contender.name, own, **row)
    listed = "; ".join(f"{stage}: {', '.join(layers)}" for stage, layers in floats.items())
    result.notes += [
        f"ratio: time over the fastest's, {best}; median of the rounds' ratios, 95% interval.",
        "PSNR (mean and worst picture) and max levels: luma of the saved 8-bit frames against "
        "float32 eager's; 99 stands for equal pictures.",
        f"int8: ranges by {record['method']} on {record['pictures']}; "
        f"{sum(map(len, floats.values()))} of {record['layers']} layers stay float"
        + (f" ({listed})" if listed else "")
        + f"; quantised in {record['seconds']:.0f} s. int8+bf16: the rest in bfloat16.",
    ]
    slower = [
        key
        for key in samples
        if network_kind(key.split()[1]) == "int8"
        and samples[key].p50 > min(s.p50 for k, s in samples.items() if "int8" not in k)
    ]
    if slower:
        result.notes.append(f"Slower than the best without int8: {', '.join(slower)}.")
    return result


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("models", nargs="*", help="packaged models (default: all)")
    made.add_argument("--infrared", type=Path, required=True, metavar="DIR")
    made.add_argument("--visible", type=Path, required=True, metavar="DIR")
    made.add_argument("--name", default="pairs", help="name of the set in the result")
    made.add_argument("--pairs", type=int, default=4, metavar="N", help="pairs to measure (4)")
    made.add_argument("--size", type=parse_size, default=(480, 640), metavar="HxW")
    made.add_argument(
        "--calibrate",
        type=Path,
        nargs=2,
        metavar=("IR_DIR", "VIS_DIR"),
        help="pictures for int8's ranges; the demo pair and variations by default",
    )
    made.add_argument("--threads", type=int, metavar="N")
    made.add_argument("--rounds", type=int, default=30, metavar="N")
    made.add_argument("--pictures", type=Path, metavar="DIR", help="also save the fused frames")
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the result files (benchmarks/results)"
    )
    return made


def _without(words: Sequence[str], option: str) -> list[str]:
    """A command line without an option and its value."""
    kept, skip = [], False
    for word in words:
        if not skip and not word.startswith(option):
            kept.append(word)
        skip = word == option
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 unless no model could be measured."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    args.command = command_line("benchmarks.precision", _without(words, "--pictures"))
    done = 0
    for name in args.models or fe.packaged_models():
        try:
            result = measure(args, name)
        except FuseEngineError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        print(result.table())
        print(*(f"* {note}" for note in result.notes), sep="\n")
        print(*result.write(args.out), sep="\n")
        done += 1
    return 0 if done else 2


if __name__ == "__main__":
    raise SystemExit(main())
