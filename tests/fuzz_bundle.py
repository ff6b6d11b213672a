"""Mutated bundles against the reader: nothing but BundleError, no hang, bounded memory.

    python -m tests.fuzz_bundle --count 100000
    python -m tests.fuzz_bundle --count 1 --first 4711      # one case again

Cases are numbered; a number and the seed say what a case is. Most damage bytes as disks and cables
do. The others are sealed again afterwards (checksums, hashes, lengths), as somebody who means harm
would: what comes through the reader then goes on into the runtime, and fuses. Worker processes do
the cases, so that a crash is seen, and its case known.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

from fuseengine.errors import BackendUnavailableError, BundleError
from fuseengine.runtime import archive
from fuseengine.runtime.archive import Archive
from fuseengine.runtime.bundle import MANIFEST, Bundle

ALLOWANCE = 256 << 10
"""Bytes that a case may allocate beyond twice the declared sizes: Python's own objects."""

SECONDS = 5.0
"""Processor time after which a case hangs; ten times as long on the clock, for a busy machine."""

_HOSTILE = (
    None, True, False, 0, 1, -1, 2, 3, 31, 2**31, 2**32 - 1, 2**40, 2**63, 2**64, 10**30, 0.5, -0.0,
    1e308, "", "x", "..", "../../etc/passwd", "/etc/passwd", "C:\\x", "H", "W/8", "H*W", "H/0",
    "0 H", "999999999 H*W", "\x00", "é" * 50, "a" * 10_000, [], [1], [[]], {}, {"a": 1}, [0] * 2000,
    "unet", "fp32", "int8", "onnxruntime", "openvino", "torch", "cuda", "cpu", "add", "concat",
    [None, None], [[None, None], [0, 10**12]],
)  # fmt: skip
"""Values that a field of the manifest gets."""


# --- mutations ------------------------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes damaged as by a disk, a cable or an interrupted copy."""
    data = bytearray(content)
    kind = rng.randrange(8)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        return bytes(data) + rng.randbytes(rng.randrange(1, 200))
    if kind == 2:  # a part lost, or there twice
        begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        return bytes(data[:begin] + data[begin : rng.choice((begin, end))] + data[begin:])[
            : rng.choice((len(data), 2 * len(data)))
        ]
    if kind == 3:
        begin = rng.randrange(len(data))
        length = rng.randrange(1, 600)
        data[begin : begin + length] = bytes(len(data[begin : begin + length]))
        return bytes(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        place = rng.randrange(len(data))
        if kind == 4:
            data[place] = rng.randrange(256)
        elif kind == 5:  # the directory and the end, where structure is
            data[-1 - min(int(rng.expovariate(1 / 300)), len(data) - 1)] ^= 1 << rng.randrange(8)
        else:
            data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


def resealed(members: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """Members of a bundle that somebody has changed and hashed again."""
    members = dict(members)
    manifest = json.loads(members[MANIFEST])
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.5:
            _change_field(manifest, rng)
        else:
            _change_member(members, manifest, rng)
    if rng.random() < 0.8:
        _hash_again(members, manifest)
    text = json.dumps(manifest).encode()
    if rng.random() < 0.1:
        text = damaged(text, rng)
    return {MANIFEST: text, **{n: c for n, c in members.items() if n != MANIFEST}}


def _change_field(manifest: dict, rng: random.Random) -> None:
    """One value somewhere in the manifest becomes another, goes, or comes."""
    where = manifest["engine"] if rng.random() < 0.5 and "engine" in manifest else manifest
    while isinstance(where, (dict, list)) and where:
        keys = list(where) if isinstance(where, dict) else range(len(where))
        key = rng.choice(list(keys))
        inner = where[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.85:
            where = inner
            continue
        kind = rng.randrange(6)
        if kind == 0:
            del where[key]
        elif kind == 1 and isinstance(where, dict):
            where[str(rng.choice(_HOSTILE))] = inner
        elif kind == 2 and isinstance(inner, (int, float)) and not isinstance(inner, bool):
            where[key] = inner * rng.choice((-1, 2, 1000)) + rng.choice((-1, 0, 1))
        else:
            where[key] = copy.deepcopy(rng.choice(_HOSTILE))
        return


def _change_member(members: dict[str, bytes], manifest: dict, rng: random.Random) -> None:
    names = [name for name in members if name != MANIFEST]
    name = rng.choice(names)
    kind = rng.randrange(10)
    if kind == 0:
        del members[name]
    elif kind == 1:
        members[rng.choice((f"{name}x", "weights/0", "kernels/kernels.json", "plans/a"))] = members[
            name
        ]
    elif kind == 2:
        members[name] = members[rng.choice(names)]
    elif members[name]:
        members[name] = damaged(members[name], rng)


def _hash_again(members: dict[str, bytes], manifest: dict) -> None:
    """Make names, sizes and hashes fit what the members hold now, as far as that goes."""
    with contextlib.suppress(Exception):  # a manifest too broken to mend stays so
        for name in [n for n in members if n.startswith("weights/")]:
            fitting = f"weights/{_sha256(members[name])}"
            if fitting != name:
                members[fitting] = members.pop(name)
                for network in manifest["networks"]:
                    for pair in network["weights"]:
                        if f"weights/{pair[1]}" == name:
                            pair[1] = fitting.removeprefix("weights/")
        manifest["members"] = {
            name: {"bytes": len(content), "sha256": _sha256(content)}
            for name, content in members.items()
            if name != MANIFEST
        }
        for network in manifest["networks"]:
            joined = _joined(members, network)
            network["bytes"], network["sha256"] = len(joined), _sha256(joined)


def _joined(members: dict[str, bytes], network: dict) -> bytes:
    literal, place, parts = members[network["file"]], 0, []
    for at, sha in network["weights"]:
        parts += [literal[place:at], members[f"weights/{sha}"]]
        place = at
    return b"".join([*parts, literal[place:]])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- one case -------------------------------------------------------------------------------------


class Fuzzer:
    """Makes and judges cases.

    Args:
        original: a sound bundle.
        seed: of all cases.
        fuse: load and fuse what the reader lets through.
    """

    def __init__(self, original: Path, seed: int = 0, *, fuse: bool = True) -> None:
        self.original, self.seed, self.fuse = original, seed, fuse
        self.content = original.read_bytes()
        with Archive(original) as opened:
            self.members = {name: opened.read(name) for name in opened.members}
        self.messages: Counter[str] = Counter()

    def write(self, number: int, path: Path) -> None:
        """Write a case's file."""
        rng = random.Random(f"{self.seed}-{number}")
        if number % 5 < 3:
            path.write_bytes(damaged(self.content, rng))
            return
        members = resealed(self.members, rng)
        path.unlink(missing_ok=True)
        archive.write(path, members)

    def judge(self, path: Path) -> str:
        """Read a file as an engine would.

        Returns:
            "refused", "read" (the reader let it through, its networks are malformed), "fused", "the
            original" or "refused by the runtime".

        Raises:
            AssertionError: it took too much memory, or damage went unseen.
            BaseException: whatever the reader raises that is no BundleError.
        """
        tracemalloc.start()
        declared = path.stat().st_size
        verdict = "refused"
        try:
            with Bundle(path) as bundle:
                declared += bundle.manifest["buffers"]["bytes"]
                verdict = "read"
                for variant, precision in bundle.networks:
                    bundle.onnx(variant, precision)
            verdict = "sound"
        except BundleError as error:
            text = str(error)
            assert str(path) in text and "\n" not in text, text
            self.messages[text.removeprefix(str(path))[:40]] += 1
        finally:
            taken = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()  # it would slow the runtime down
        assert taken <= 2 * declared + ALLOWANCE, f"{taken} bytes for {declared} declared"
        if verdict != "sound":
            return verdict
        if path.read_bytes() == self.content:
            return "the original"
        return self._fused(path) if self.fuse else verdict

    def _fused(self, path: Path) -> str:
        import numpy as np

        import fuseengine as fe

        try:
            engine = fe.load(path, device="cpu", backend="onnxruntime", threads=1)
            size = engine.size or (22, 30)
            if size[0] * size[1] > 1 << 20:
                return "fused"  # loading has run it once
            with np.errstate(all="ignore"):
                engine(np.zeros(size, np.uint8), np.zeros(size, np.uint8))
        except (BundleError, BackendUnavailableError):
            return "refused by the runtime"
        return "fused"


# --- the command ----------------------------------------------------------------------------------


def _work(args: argparse.Namespace) -> int:
    """Do a range of cases; a line per hundred, and the case at hand in a file."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    fuzzer = Fuzzer(args.bundle, args.seed, fuse=not args.no_fuse)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    path, verdicts = folder / "case.fuse", Counter()
    slowest = 0.0, 0

    def hang(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    signal.signal(signal.SIGPROF, hang)
    try:
        for number in range(args.first, args.first + args.count):
            args.at.write_text(str(number))
            fuzzer.write(number, path)
            begin = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
            try:
                verdict = fuzzer.judge(path)
            except Exception as error:
                verdict = f"FAILED {number}: {type(error).__name__}: {error}"[:300]
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, (time.process_time() - begin, number))
            verdicts[verdict] += 1
            assert list(folder.iterdir()) == [path], "a reader left files behind"
    finally:
        path.unlink(missing_ok=True)
        folder.rmdir()
    result = {"verdicts": verdicts, "messages": fuzzer.messages, "slowest": slowest}
    print(base64.b64encode(json.dumps(result).encode()).decode())
    return 0


def run(args: argparse.Namespace) -> int:
    """Do all cases in worker processes; 1 if any failed or crashed."""
    verdicts: Counter[str] = Counter()
    messages: Counter[str] = Counter()
    slowest, number = (0.0, 0), args.first
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    at = folder / "at"
    begin, end = time.perf_counter(), args.first + args.count
    while number < end:
        count = min(args.chunk, end - number)
        command = [sys.executable, "-m", "tests.fuzz_bundle", "--worker", "--at", at]
        command += ["--first", number, "--count", count, "--seed", args.seed]
        command += ["--bundle", args.bundle, *(["--no-fuse"] if args.no_fuse else [])]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            last = int(at.read_text())
            verdicts[f"CRASHED {last}: code {done.returncode}: {done.stderr[-300:]}"] += 1
            number = last + 1
            continue
        result = json.loads(base64.b64decode(done.stdout.strip().splitlines()[-1]))
        verdicts.update(result["verdicts"])
        messages.update(result["messages"])
        slowest = max(slowest, tuple(result["slowest"]))
        number += count
        bad = [text for text in verdicts if text.startswith(("FAILED", "CRASHED"))]
        print(f"{number - args.first} done, {len(bad)} bad", *bad, sep="; ", file=sys.stderr)
    at.unlink(missing_ok=True)
    folder.rmdir()
    failed = [text for text in verdicts if text.startswith(("FAILED", "CRASHED"))]
    took = time.perf_counter() - begin
    print(f"{args.count} bundles in {took:.0f} s; the slowest, {slowest[1]}, {slowest[0]:.2f} s")
    for verdict, times in verdicts.most_common():
        print(f"{times:8d}  {verdict}")
    if args.messages:
        for message, times in messages.most_common(60):
            print(f"{times:8d}  ...{message}")
    return 1 if failed else 0


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=5000, help="cases per process")
    parser.add_argument("--bundle", type=Path, help="the sound one (default: tests/data's newest)")
    parser.add_argument("--no-fuse", action="store_true", help="do not load what comes through")
    parser.add_argument("--messages", action="store_true", help="count the errors' beginnings")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bundle is None:
        args.bundle = sorted((Path(__file__).parent / "data").glob("schema-*.fuse"))[-1]
    return _work(args) if args.worker else run(args)


if __name__ == "__main__":
    sys.exit(main())
