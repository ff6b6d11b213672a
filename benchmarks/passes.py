"""What each pass of the compiler saves: arithmetic, time and memory with it and without it.

    python -m benchmarks.passes                              # the five small systems, 480x640
    python -m benchmarks.passes --systems dmnet-s --backend openvino --threads 2
    python -m benchmarks.passes --no-time                    # arithmetic alone, also of full sizes

A row per system and pass: the program with all passes but this one against the program with all
(for ``batch_siblings``, which is no standard pass, the program with it against the one without).
Both are first compared with the eager model, then timed in turns. A pass that leaves a system's
program as it is has a row without times.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import harness
from fuseengine.passes import PASSES, Pass, batch_siblings
from fuseengine.program import Program, StageVariant, resolve

if TYPE_CHECKING:
    from torch import nn

    from fuseengine.runtime.executor import Executor

SYSTEMS = ("drfusion-s", "dmfuse-s", "drmf-s", "dmnet-s", "mask-difuser-s")
LEAST_DB = 80.0
"""What a contender must reach against the eager model, in dB."""


def programs(model: nn.Module) -> dict[str, tuple[Program, Program]]:
    """Pass -> (program without it, program with it).

    Args:
        model: any fusion model.
    """
    from fuseengine.tracing import capture

    raw = capture(model, optimise=False)

    def passed(passes: Sequence[Pass]) -> Program:
        program = raw
        for apply in passes:
            program = apply(program, model)
        return program

    full = passed(PASSES)
    found = {
        apply.__name__: (passed([p for p in PASSES if p is not apply]), full) for apply in PASSES
    }
    found[batch_siblings.__name__] = (full, batch_siblings(full, model))
    return found


# --- arithmetic -----------------------------------------------------------------------------------


def flops(program: Program, model: nn.Module, size: tuple[int, int]) -> int:
    """Multiplications and additions of all networks' convolutions, products and attentions.

    Ops of the program and elementwise layers are not counted. Nothing is computed: the networks run
    on PyTorch's meta device.

    Args:
        program: of the model.
        model: whose networks are meant.
        size: height and width, multiples of the program's.
    """
    counted = {
        variant: len(calls) * _flops_of(variant, calls[0].inputs, program, model, size)
        for variant, calls in program.variants().items()
    }
    return sum(counted.values())


def _flops_of(
    variant: StageVariant,
    inputs: Sequence[str],
    program: Program,
    model: nn.Module,
    size: tuple[int, int],
) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    stage = copy.deepcopy(model.get_submodule(variant.stage)).to("meta")
    shapes = [resolve(program.values[name].shape, size) for name in inputs]
    network = _only(stage, variant.use, len(shapes))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*(torch.empty(shape, device="meta") for shape in shapes))
    return int(counter.get_total_flops())


def _only(stage: nn.Module, use: Sequence[int], arguments: int) -> Callable[..., Any]:
    """The stage without what its unused results alone need; itself if all are used."""
    from torch import fx

    class Tracer(fx.Tracer):
        def create_args_for_root(self, root_fn: Any, is_module: bool, given: Any = None) -> Any:
            names = [f"x{i}" for i in range(arguments)]
            return root_fn, [
                self.root,
                *(self.create_proxy("placeholder", name, (), {}) for name in names),
            ]

    try:
        graph = Tracer().trace(stage)
    except (fx.proxy.TraceError, TypeError):
        return stage  # a time stage, whose one result is used
    (end,) = (node for node in graph.nodes if node.op == "output")
    results = end.args[0]
    if isinstance(results, (tuple, list)):
        end.args = (tuple(results[i] for i in use),)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return fx.GraphModule(stage, graph)


# --- time -----------------------------------------------------------------------------------------


def executor_of(
    program: Program, model: nn.Module, size: tuple[int, int], backend: str, threads: int
) -> Executor:
    """The program with its networks lowered by a backend; time stages stay with PyTorch."""
    from fuseengine.engine import build_executor
    from fuseengine.stages import ModelStages

    choice = {}
    for variant, calls in program.variants().items():
        numbers = any(program.values[name].shape == () for name in calls[0].inputs)
        choice[variant] = ("torch" if numbers else backend, "fp32")
    return build_executor(program, ModelStages(model, program), choice, size, "cpu", threads)


def measure(result: harness.Result, name: str, args: argparse.Namespace) -> None:
    """Rows of one system.

    Raises:
        SystemExit: a contender is wrong.
    """
    import torch

    import fuseengine as fe

    torch.manual_seed(0)
    model = fe.build(name)
    size = tuple(-(-n // model.multiple) * model.multiple for n in args.size)
    rng = np.random.default_rng(0)
    planes = 3 if model.channels == "rgb" else 1
    pair = rng.random((2, 1, planes, *size), dtype=np.float32)
    ready: dict[int, Executor] = {}

    def prepared(program: Program) -> Executor:
        if id(program) not in ready:
            executor = executor_of(program, model, size, args.backend, args.threads)
            for target, picture in zip(executor.inputs, pair, strict=True):
                target[...] = picture
            executor.run()
            decibels = harness.psnr(executor.output, expected, 1.0)
            if not decibels >= LEAST_DB:
                raise SystemExit(f"{name}: {decibels:.1f} dB, expected {LEAST_DB:.0f} dB or more")
            ready[id(program)] = executor
        return ready[id(program)]

    if args.time:
        torch.set_num_threads(args.threads)
        with torch.inference_mode():
            expected = model(*map(torch.from_numpy, pair)).numpy()
    for label, (without, with_it) in programs(model).items():
        row = f"{name}: {label}"
        counts = [flops(program, model, size) / 1e9 for program in (without, with_it)]
        fields: dict[str, Any] = {"GFLOP without": counts[0], "GFLOP with": counts[1]}
        calls = [len(program.nodes) for program in (without, with_it)]
        fields |= {"calls without": calls[0], "calls with": calls[1]}
        if str(without) == str(with_it):
            result.add(row, **fields, verdict="leaves this program as it is")
            continue
        if not args.time:
            result.add(row, **fields)
            continue
        pairs = {"without": prepared(without), "with": prepared(with_it)}
        fields |= {f"buffers MB {key}": e.buffer_bytes / 1e6 for key, e in pairs.items()}
        times = harness.interleave(
            {key: executor.run for key, executor in pairs.items()},
            rounds=args.rounds,
            warmup=1,
            budget_s=args.budget_s,
            synchronize=harness.PauseBefore(),
        )
        ratio = harness.paired_ratio(times["with"], times["without"])
        fields["without p50 ms"] = times["without"].p50
        result.add(row, times["with"], ratio=str(ratio), **fields)


# --- command line ---------------------------------------------------------------------------------


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.passes", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--systems", nargs="+", default=list(SYSTEMS), metavar="NAME")
    made.add_argument("--size", type=_size, default=(480, 640), metavar="HxW")
    made.add_argument("--threads", type=int, default=2, help="default: 2")
    made.add_argument("--backend", default="openvino", help="of the networks (default: openvino)")
    made.add_argument("--rounds", type=int, default=20, help="samples per program (default: 20)")
    made.add_argument("--budget-s", type=float, default=60, help="per row (default: 60)")
    made.add_argument("--no-time", dest="time", action="store_false", help="arithmetic alone")
    made.add_argument("--out", type=Path, help="folder of results instead of benchmarks/results")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    logging.getLogger("torch").setLevel(logging.ERROR)
    settings = {
        "size": "x".join(map(str, args.size)),
        "backend": args.backend,
        "threads": args.threads,
        "weights": "random",
    }
    height, width = args.size
    title = f"What the passes save, {width}x{height}"
    result = harness.Result("passes", "cpu", title, settings)
    result.notes = [
        "p50 ms and ratio are of the program with the pass; below 1 the pass saves time.",
        "GFLOP: convolutions, matrix products and attentions of the networks, a multiply-add is "
        "two; ops between the networks are not counted.",
        "batch_siblings is off unless it is measured to pay; every other pass is always on.",
    ]
    for name in args.systems:
        measure(result, name, args)
    result.command = harness.command_line("benchmarks.passes", words)
    print(result.table())
    if args.out is not None or list(args.systems) == list(SYSTEMS):
        print(*result.write(args.out), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
