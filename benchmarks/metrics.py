"""Every fusion metric on one pair, on one core: alone, all at once, and beside public evaluators.

    OMP_NUM_THREADS=1 python -m benchmarks.metrics [--size 576x768] [--only SSIM] [--rounds 20]

Peers are packages from PyPI that compute the same metric; what is not installed is left out:
pip install scikit-image scikit-learn sewar pytorch-msssim
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from benchmarks import harness
from benchmarks.peers import demo_frames
from fuseengine import _native
from fuseengine.metrics import METRICS, evaluate, grey_levels, phase_congruency

Levels = NDArray[np.uint8]
Peer = tuple[str, str, float, Callable[[Levels, Levels], float]]
"""Package, metric, tolerance, and its value for a fused image and one source."""

BUDGET_S = 60.0
"""Seconds for a row and its peers."""


def peers() -> Iterator[Peer]:
    """The peers that are installed."""
    with contextlib.suppress(ModuleNotFoundError):
        measure = importlib.import_module("skimage.measure")
        metrics = importlib.import_module("skimage.metrics")
        yield "scikit-image", "EN", 1e-9, lambda f, x: measure.shannon_entropy(f, base=2)
        yield (
            "scikit-image",
            "SSIM",
            1e-9,
            lambda f, x: metrics.structural_similarity(
                x.astype(np.float64),
                f.astype(np.float64),
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=255,
            ),
        )
        yield (
            "scikit-image",
            "SSIM_uniform7_R2_sum",
            1e-4,
            lambda f, x: metrics.structural_similarity(
                x.astype(np.float32), f.astype(np.float32), data_range=2
            ),
        )
    with contextlib.suppress(ModuleNotFoundError):
        cluster = importlib.import_module("sklearn.metrics")
        yield (
            "scikit-learn",
            "MI_nats",
            1e-9,
            lambda f, x: cluster.mutual_info_score(x.ravel(), f.ravel()),
        )
    with contextlib.suppress(ModuleNotFoundError):
        sewar = importlib.import_module("sewar")
        yield "sewar", "MSE", 1e-12, lambda f, x: sewar.mse(x, f) / 255**2
        yield "sewar", "VIF", 1e-9, lambda f, x: sewar.vifp(x, f)
    with contextlib.suppress(ModuleNotFoundError):
        import torch

        torch.set_num_threads(1)

        def tensor(x: Levels) -> torch.Tensor:
            return torch.from_numpy(x.astype(np.float64))[None, None]

        with contextlib.suppress(ModuleNotFoundError):
            msssim = importlib.import_module("pytorch_msssim")
            yield (
                "pytorch-msssim",
                "SSIM",
                1e-5,
                lambda f, x: float(msssim.ssim(tensor(x), tensor(f), data_range=255)),
            )
            yield (
                "pytorch-msssim",
                "MS_SSIM",
                1e-5,
                lambda f, x: float(msssim.ms_ssim(tensor(x), tensor(f), data_range=255)),
            )


SUMMED = {"VIF", "MI_nats", "SSIM_uniform7_R2_sum"}
"""Sums over the sources; of the others the peer's mean is ours."""


def cpu_ms(run: Callable[[], object], rounds: int = 5) -> float:
    """Least processor time of a call: what it needs of a core, however busy the machine is."""
    times = []
    for _ in range(rounds):
        start = time.process_time_ns()
        run()
        times.append(time.process_time_ns() - start)
    return min(times) / 1e6


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="576x768", help="height x width (default 576x768)")
    parser.add_argument("--only", default="", help="part of a metric's key")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        raise SystemExit("set OMP_NUM_THREADS=1: every contender is to run on one core")
    _native.set_num_threads(1)
    height, width = (int(side) for side in args.size.split("x"))
    a, b = (grey_levels(frame) for frame in demo_frames((height, width)))
    fused = ((a.astype(np.uint16) + b + 1) // 2).astype(np.uint8)
    result = harness.Result(
        suite=f"metrics-{height}x{width}",
        device="cpu",
        title=f"Fusion metrics of one {width}x{height} pair on one core",
        settings={"size": args.size, "threads": 1, "fused": "average of the demo pair"},
        command=harness.this_command(),
        notes=[
            "cpu ms: least processor time of five calls, which a busy machine lengthens little.",
            "A metric's own row: alone, from three uint8 pictures. In one call they share "
            "histograms, gradients, local moments and transforms.",
            "Rows 'X of Y': our time for X, its ratio the package's time over ours, median of the "
            "rounds' own ratios, 95% interval; max error: how far the two values are apart. "
            "float32 inside pytorch-msssim's window is the 2e-6.",
            "No package with the other metrics was found on PyPI; they are measured alone.",
            "Q_P keeps its filters for the next picture of the size; the row 'first of a size' "
            "makes them anew.",
        ],
    )

    def measure(
        name: str, contenders: dict[str, Callable[[], object]]
    ) -> dict[str, harness.Samples]:
        print(name, flush=True)
        return harness.interleave(contenders, rounds=args.rounds, warmup=1, budget_s=BUDGET_S)

    def alone(key: str) -> Callable[[], float]:
        return lambda: METRICS[key](fused, a, b)

    if not args.only:
        defaults = [key for key, metric in METRICS.items() if metric.default]
        whole = {
            f"all {len(defaults)} metrics, one call": lambda: evaluate(fused, a, b),
            f"all {len(METRICS)} with other programs' forms, one call": lambda: evaluate(
                fused, a, b, METRICS
            ),
        }
        for name, samples in measure("all", whole).items():
            result.add(name, samples, cpu_ms=cpu_ms(whole[name]))

        def first_of_a_size() -> float:
            phase_congruency.filter_bank.cache_clear()
            return METRICS["Q_P"](fused, a, b)

        samples = measure("Q_P, first of a size", {"Q_P": first_of_a_size})["Q_P"]
        result.add("Q_P, first of a size", samples, cpu_ms=cpu_ms(first_of_a_size))
    others: dict[str, list[Peer]] = {}
    for peer in peers():
        others.setdefault(peer[1], []).append(peer)
    for key in METRICS:
        if args.only not in key:
            continue
        contenders: dict[str, Callable[[], object]] = {"ours": alone(key)}
        errors = {}
        for package, _, tolerance, value in others.get(key, []):

            def run(value: Callable[[Levels, Levels], float] = value, key: str = key) -> float:
                return sum(value(fused, x) for x in (a, b)) / (1 if key in SUMMED else 2)

            errors[package] = abs(run() - METRICS[key](fused, a, b))
            if not errors[package] <= tolerance:
                raise SystemExit(f"{key} of {package} differs by {errors[package]}")
            contenders[package] = run
        times = measure(key, contenders)
        result.add(key, times["ours"], cpu_ms=cpu_ms(contenders["ours"]))
        for package, error in errors.items():
            ratio = harness.paired_ratio(times[package], times["ours"])
            result.add(
                f"{key} of {package}",
                times["ours"],
                max_abs_error=error,
                ratio=str(ratio),
                **{"peer p50 ms": times[package].p50},
            )
    print(result.table())
    if not args.only:
        print(*result.write(), sep="\n")


if __name__ == "__main__":
    main()
