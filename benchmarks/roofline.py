"""How far the predictions of ``fuseengine.roofline`` are from this machine's CPU.

    python -m benchmarks.roofline                          # the five small systems, 480x640, fp32
    python -m benchmarks.roofline --systems drfusion-s --backends openvino --rounds 20

A row per system and backend: the predicted and the measured time of the program, and of the
networks alone. The machine's rates (a copy's, a matrix product's) are measured in every round, in
turns with the programs; the best rates and the least times are taken, since everything else on the
machine only slows them down. "predicted / measured" below 1 promises too much.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import harness
from benchmarks.passes import SYSTEMS, executor_of
from fuseengine.machine import inspect_machine
from fuseengine.roofline import predict
from fuseengine.targets import Target, measure_cpu

if TYPE_CHECKING:
    from fuseengine.program import Program
    from fuseengine.runtime.executor import Executor
    from fuseengine.stages import ModelStages


class Contender:
    """A system on a backend: what it should take, and the least that it took so far."""

    def __init__(self, program: Program, stages: ModelStages, executor: Executor) -> None:
        self.program, self.stages, self.executor = program, stages, executor
        self.whole = self.networks = float("inf")
        self.runs = 0

    def run(self) -> None:
        times = self.executor.profile(1)
        stages = [t for t in times if t.variant is not None]
        self.whole = min(self.whole, sum(float(t.samples[0]) for t in times))
        self.networks = min(self.networks, sum(float(t.samples[0]) for t in stages))
        self.runs += 1

    def row(self, target: Target, size: tuple[int, int]) -> dict[str, float]:
        """Predicted, measured and their ratio, for the whole program and for the networks."""
        prediction = predict(self.program, self.stages, target, "fp32", size)
        # Frames are not part of an executor's run.
        whole = sum(row.milliseconds for row in prediction.rows if row.kind != "frame")
        networks = sum(row.milliseconds for row in prediction.rows if row.kind == "stage")
        return {
            "GFLOP": prediction.operations / 1e9,
            "predicted ms": whole,
            "measured ms": self.whole,
            "predicted / measured": whole / self.whole,
            "networks: predicted / measured": networks / self.networks,
            "networks: part of the peak": prediction.operations
            / target.peak("fp32")
            / (self.networks / 1e3),
        }


def best(a: Target, b: Target) -> Target:
    """The higher of two measurements' rates."""
    rate = max(a.peak("fp32"), b.peak("fp32"))
    return replace(
        a,
        bandwidth=max(a.bandwidth, b.bandwidth),
        peaks={"fp32": rate},
        exponentials=max(a.exponentials, b.exponentials),
    )


def contenders(args: argparse.Namespace) -> dict[str, Contender]:
    """Every system on every backend, ready."""
    import torch

    import fuseengine as fe
    from fuseengine.stages import ModelStages

    made = {}
    for name in args.systems:
        torch.manual_seed(0)
        model = fe.build(name).eval()
        program = fe.capture(model)
        size = tuple(-(-n // model.multiple) * model.multiple for n in args.size)
        for backend in args.backends:
            executor = executor_of(program, model, size, backend, args.threads)
            for target in executor.inputs:
                target[...] = np.random.default_rng(0).random(target.shape, dtype=np.float32)
            made[f"{name}, {backend}"] = Contender(program, ModelStages(model, program), executor)
    return made


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--systems", nargs="+", default=list(SYSTEMS), metavar="NAME")
    made.add_argument("--backends", nargs="+", default=["openvino", "onnxruntime"], metavar="NAME")
    made.add_argument("--size", type=_size, default=(480, 640), metavar="HxW")
    made.add_argument("--threads", type=int, default=2, help="default: 2")
    made.add_argument("--rounds", type=int, default=10, help="default: 10")
    made.add_argument("--out", type=Path, help="folder of results instead of benchmarks/results")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    logging.getLogger("torch").setLevel(logging.ERROR)
    machine = inspect_machine()
    found = contenders(args)
    target = measure_cpu(machine)
    for _ in range(args.rounds):
        target = best(target, measure_cpu(machine))
        for contender in found.values():
            contender.run()
    settings = {
        "size": "x".join(map(str, args.size)),
        "threads": args.threads,
        "rounds": args.rounds,
        "weights": "random",
        "matrix product GFLOP/s": target.peak("fp32") / 1e9,
        "copy GB/s": target.bandwidth / 1e9,
    }
    height, width = args.size
    title = f"Predicted and measured times, float32, {width}x{height}"
    result = harness.Result("roofline", "cpu", title, settings)
    result.notes = [
        f"Predicted with {target.matrix_efficiency:.0%} of the matrix product's rate and "
        f"{target.memory_efficiency:.0%} of the copy's: the first lies in the middle of what four "
        "of these systems reached on one core of an AMD EPYC.",
        "Measured: the least of the rounds, since a busy machine only adds to it.",
    ]
    for name, contender in found.items():
        result.add(name, **contender.row(target, args.size))
    result.command = harness.command_line("benchmarks.roofline", words)
    print(result.table())
    print({k: v for k, v in settings.items() if "/s" in k})
    if args.out is not None or list(args.systems) == list(SYSTEMS):
        print(*result.write(args.out), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
