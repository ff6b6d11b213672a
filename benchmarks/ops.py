"""Native CPU kernels against the PyTorch formulation of the same equation, in turns.

python -m benchmarks.ops [--threads N] [--only NAME] [--level avx512]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import harness
from fuseengine import _native

Case = tuple[str, int, float, Callable[[], np.ndarray], Callable[[], torch.Tensor]]


def ccnet(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Both attention maps in memory, as CCNet's code does it."""
    n, _, h, w = q.shape
    by_column = [t.permute(0, 3, 1, 2).reshape(n * w, -1, h) for t in (q, k, v)]
    by_row = [t.permute(0, 2, 1, 3).reshape(n * h, -1, w) for t in (q, k, v)]
    itself = torch.diag(torch.full((h,), -torch.inf))
    column = torch.bmm(by_column[0].transpose(1, 2), by_column[1]) + itself
    row = torch.bmm(by_row[0].transpose(1, 2), by_row[1])
    scores = torch.cat([column.view(n, w, h, h).transpose(1, 2), row.view(n, h, w, w)], 3)
    p = torch.softmax(scores, 3)
    p_column = p[..., :h].transpose(1, 2).reshape(n * w, h, h)
    p_row = p[..., h:].reshape(n * h, w, w)
    down = torch.bmm(by_column[2], p_column.transpose(1, 2)).view(n, w, -1, h)
    across = torch.bmm(by_row[2], p_row.transpose(1, 2)).view(n, h, -1, w)
    return down.permute(0, 2, 3, 1) + across.permute(0, 2, 1, 3)


def cases(only: str) -> Iterator[Case]:
    """Name, rounds, tolerance, ours, the peer."""
    k = {"sqrt_abar": 0.8, "sqrt_one_minus_abar": 0.6, "sqrt_abar_prev": 0.95}

    def into(out: np.ndarray, run: Callable[[], None]) -> Callable[[], np.ndarray]:
        def call() -> np.ndarray:
            run()
            return out

        return call

    for h, w in ((240, 320), (480, 640)):
        name = f"criss_cross_attention {h}x{w}"
        if only in name:
            q, key = torch.randn(2, 1, 4, h, w)
            v = torch.randn(1, 32, h, w)
            a = [t.numpy() for t in (q, key, v)]
            out = np.empty_like(a[2])
            run = into(out, lambda a=a, out=out: _native.criss_cross_attention(*a, out))
            yield name, 6, 1e-4, run, lambda q=q, key=key, v=v: ccnet(q, key, v)
    if only in "wiener_filter 2x480x640":
        x, g = torch.randn(2, 480, 640), torch.fft.rfft2(torch.randn(480, 640) / 500)
        out, arrays = np.empty((2, 480, 640), np.float32), (x.numpy(), g.numpy())
        run = into(out, lambda: _native.wiener_filter(*arrays, out))
        yield (
            "wiener_filter 2x480x640",
            60,
            1e-4,
            run,
            lambda: torch.fft.irfft2(torch.fft.rfft2(x) * g, s=(480, 640)),
        )
    if only in "group_norm_silu 32x480x640":
        big, (gamma, beta) = torch.randn(1, 32, 480, 640), torch.randn(2, 32)
        arrays3 = (big.numpy(), gamma.numpy(), beta.numpy())
        normed = np.empty_like(arrays3[0])
        run = into(
            normed, lambda: _native.group_norm_silu(*arrays3, None, normed, groups=8, eps=1e-5)
        )
        yield (
            "group_norm_silu 32x480x640",
            30,
            1e-5,
            run,
            lambda: F.silu(F.group_norm(big, 8, gamma, beta, 1e-5)),
        )
    x3, e, z = torch.randn(3, 1, 3, 480, 640)
    m, y1, y2 = torch.rand(3, 1, 1, 480, 640)
    out3 = np.empty(x3.shape, np.float32)
    nx, ne, nz, nm, n1, n2 = (t.numpy() for t in (x3, e, z, m, y1, y2))
    if only in "ddim_step 3x480x640":
        run = into(out3, lambda: _native.ddim_step(nx, ne, None, out3, **k, direction=0.3))
        yield "ddim_step 3x480x640", 100, 1e-5, run, lambda: 0.95 * ((x3 - 0.6 * e) / 0.8) + 0.3 * e
    if only in "compose_priors 3x480x640":

        def composed() -> torch.Tensor:
            eps = m * e + (1 - m) * z
            return 0.95 * ((x3 - 0.6 * eps) / 0.8)

        run = into(out3, lambda: _native.compose_priors(nx, ne, nz, nm, out3, **k))
        yield "compose_priors 3x480x640", 100, 1e-5, run, composed
    if only in "joint_ddim_step 3x480x640":

        def joint() -> torch.Tensor:
            a, b, f = ((x3 - 0.6 * e) / 0.8).split(1, 1)
            a2, b2 = a - 0.4 * (a - y1), b - 0.4 * (b - y2)
            rest = m * (a2 - y1) + (1 - m) * (b2 - y2) - m * y1 - (1 - m) * y2 + f
            return 0.95 * torch.cat([a2, b2, f - 0.4 * rest], 1) + 0.31 * e

        last = {"sqrt_one_minus_abar_prev": 0.31, "lam": 0.4, "form": 0}
        run = into(out3, lambda: _native.joint_ddim_step(nx, ne, nm, n1, n2, out3, **k, **last))
        yield "joint_ddim_step 3x480x640", 100, 1e-5, run, joint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="part of an operator's name")
    parser.add_argument("--level", help="baseline, avx2 or avx512; default: the best there is")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    _native.set_num_threads(args.threads)
    if args.level:
        _native.set_simd_level(args.level)
    threads = f"{args.threads}-thread{'s' * (args.threads > 1)}"
    result = harness.Result(
        suite=f"ops-{_native.simd_level()}-{threads}",
        device="cpu",
        title=f"Native ops against PyTorch, {_native.simd_level()}, {args.threads} thread(s)",
        settings={"threads": args.threads, "level": _native.simd_level()},
        command=harness.this_command(),
        notes=["ratio: the peer's time over ours, median of the rounds' own ratios, 95% interval."],
    )
    with torch.inference_mode():
        for name, rounds, tolerance, ours, peer in cases(args.only):
            error = harness.max_abs_error(ours(), peer().numpy())
            if not error <= tolerance:
                raise SystemExit(f"{name}: differs by {error}, expected at most {tolerance}")
            times = harness.interleave({"ours": ours, "peer": peer}, rounds=rounds, warmup=2)
            ratio = harness.paired_ratio(times["peer"], times["ours"])
            result.add(
                name,
                times["ours"],
                max_abs_error=error,
                ratio=str(ratio),
                **{"peer p50 ms": times["peer"].p50},
            )
    print(result.table())
    if not args.only:
        print(*result.write(), sep="\n")


if __name__ == "__main__":
    main()
