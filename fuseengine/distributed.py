"""Folders of any size over a Ray cluster, resuming where a run stopped.

Pairs are the rows of a Ray dataset; actors, each with an engine of its own, read a pair, fuse it
and write the output, so that only names travel. All nodes must see the folders under the same paths
and have this package. Outputs are written whole or not at all. What is done, files say:

* an output that is younger than both its sources and than the record is finished,
* ``fuseengine-run.json`` in the output folder: the record of the settings that made the outputs; a
  run with others is refused rather than mixed in,
* ``.fuseengine-working/STEM`` while a pair is being fused: a pair during which an actor died is
  tried by no second one in the same run, whereas the actor's other pairs are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuseengine.errors import FuseEngineError, SettingError

if TYPE_CHECKING:
    from fuseengine.engine import Engine

RECORD = "fuseengine-run.json"
_WORKING = ".fuseengine-working"

_BATCH = 8
"""Pairs that an actor takes at a time: few enough to share a small folder out evenly."""

_OBJECT_STORE = 128 << 20
"""Bytes that a local cluster keeps for what travels: names only."""

Row = dict[str, str]


@dataclass(frozen=True)
class Job:
    """What every actor must know.

    Attributes:
        options: arguments of ``fuseengine.compile``, ``model`` among them (an engine in the cache
            is loaded from it); with a bundle, of ``fuseengine.load``.
        bundle: path of a saved engine, or "".
        frames: ``resize`` and ``infrared_range`` of the engine's call.
        suffix: of the outputs, such as ".png".
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    bundle: str = ""
    frames: Mapping[str, Any] = field(default_factory=dict)
    suffix: str = ".png"

    def engine(self) -> Engine:
        """Load or compile the engine; for any size, unless a bundle is for one."""
        import fuseengine as fe

        options = dict(self.options)
        if self.bundle:
            return fe.load(self.bundle, **options)
        return fe.compile(options.pop("model"), None, **options)

    def record(self) -> dict[str, Any]:
        """What decides the outputs; threads and the cache do not."""
        data = json.loads(json.dumps(asdict(self)))  # tuples become lists, as they do in the file
        if self.bundle:  # what it is, not where
            data["bundle"] = _sha256(Path(self.bundle))
        for name in ("threads", "cache"):
            data["options"].pop(name, None)
        return data


@dataclass
class Outcome:
    """What became of the pairs.

    Attributes:
        pairs: how many there are.
        finished: those that were finished before this run.
        made: those that this run fused.
        failures: (name, reason).
        seconds: that the run took.
    """

    pairs: int
    finished: int = 0
    made: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def lines(self, output: Path) -> str:
        """The summary as text."""
        head = f"fused {self.made} of {self.pairs} pairs into {output} in {self.seconds:.1f} s"
        lines = [head + (f"; {self.finished} were finished before" if self.finished else "")]
        if self.failures:
            lines.append(f"failed: {len(self.failures)}")
            lines += [f"  {name}: {reason}" for name, reason in sorted(self.failures)]
        return "\n".join(lines)


def fuse_over_ray(
    pairs: Sequence[tuple[Path, Path]],
    output: Path,
    job: Job,
    outcome: Outcome,
    *,
    address: str | None = None,
    threads: int | None = None,
    gpu: bool = False,
    restart: bool = False,
    progress: Callable[[Iterable[Row], int], Iterable[Row]] | None = None,
) -> None:
    """Fuse pairs of files with the actors of a Ray cluster.

    Args:
        pairs: infrared and visible files, with one stem per pair.
        output: an existing folder that all nodes see.
        job: what the actors do.
        outcome: takes what becomes of the pairs, while the run goes on.
        address: of the cluster's head, such as "ray://host:10001" or "auto"; by default what
            RAY_ADDRESS says, else a cluster on this machine, for this call.
        threads: CPU threads of each actor; by default four, or as many as there are.
        gpu: whether each actor takes a GPU.
        restart: make finished outputs again, and with other settings than before.
        progress: (results, their number) -> the results, showing how far they are.

    Raises:
        SettingError: the folder holds outputs of other settings, or the cluster cannot be reached.
        ModuleNotFoundError: Ray is not installed.
    """
    begin = time.perf_counter()
    record = _open_record(output, job, restart)
    rows = [
        {"infrared": str(a.resolve()), "visible": str(b.resolve()), "target": str(target)}
        for a, b in pairs
        for target in [(output / (b.stem + job.suffix)).resolve()]
    ]
    left = [row for row in rows if not _is_finished(row, record)]
    outcome.finished = len(rows) - len(left)
    working = output.resolve() / _WORKING
    try:
        if left:
            working.mkdir(exist_ok=True)
            with _cluster(address):
                done = _results(left, job, record.resolve(), threads, gpu)
                shown = progress(done, len(left)) if progress is not None else done
                _collect(shown, left, record, outcome)
    finally:
        outcome.seconds = time.perf_counter() - begin
        shutil.rmtree(working, ignore_errors=True)


def _collect(done: Iterable[Row], left: Sequence[Row], record: Path, outcome: Outcome) -> None:
    """Count results as they come; what nobody reported is looked for at the end."""
    reported = set()
    for result in done:
        reported.add(result["target"])
        if result["reason"]:
            outcome.failures.append((Path(result["target"]).stem, result["reason"]))
        else:
            outcome.made += 1
    for row in left:
        if row["target"] in reported:
            continue
        if _is_finished(row, record):
            outcome.made += 1
        else:
            reason = "the worker that had it was lost; see Ray's logs"
            outcome.failures.append((Path(row["target"]).stem, reason))


# --- what is finished -----------------------------------------------------------------------------


def _open_record(output: Path, job: Job, restart: bool) -> Path:
    """Check the folder's record against the job, or write it; the record's path."""
    path = output / RECORD
    wanted = job.record()
    if path.exists() and not restart:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != wanted:
            raise SettingError(
                f"{output} holds outputs of other settings ({_difference(found, wanted)}); choose "
                "another output folder, or pass restart=True to make all of them again"
            )
        return path
    part = path.with_name(f".{RECORD}.{uuid.uuid4().hex[:12]}.part")
    part.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    part.replace(path)
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise SettingError(f"engine {path}: {error.strerror or error}") from None
    return digest.hexdigest()


def _difference(found: Any, wanted: Mapping[str, Any]) -> str:
    """The first setting that differs, for people."""
    if not isinstance(found, dict):
        return "its record cannot be read"
    for name in wanted:
        before, now = found.get(name), wanted[name]
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            for key in sorted({*before, *now}):
                if before.get(key) != now.get(key):
                    return f"{key}: {before.get(key)!r} before, now {now.get(key)!r}"
        return f"{name}: {before!r} before, now {now!r}"
    return "its record has other fields"


def _is_finished(row: Row, record: Path) -> bool:
    """Whether an output is there that is younger than its sources and the record."""
    try:
        written = Path(row["target"]).stat()
        newest = max(Path(row[name]).stat().st_mtime_ns for name in ("infrared", "visible"))
        begun = record.stat().st_mtime_ns
    except OSError:  # no output, or a source that is gone: reading it will say why
        return False
    return written.st_size > 0 and written.st_mtime_ns >= max(newest, begun)


# --- the cluster ----------------------------------------------------------------------------------


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Join a cluster, or run one on this machine; one that was joined before stays."""
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if not address and not os.environ.get("RAY_ADDRESS"):
        from fuseengine.machine import usable_cores

        # Below "fatal", the cluster's own processes write notes for its developers into the output.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        options |= {"num_cpus": usable_cores(), "object_store_memory": _OBJECT_STORE}
        options |= {"include_dashboard": False}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SettingError(
            f"Ray cluster {address or os.environ.get('RAY_ADDRESS') or 'on this machine'}: "
            f"{error}; start one with 'ray start --head', or leave the address away"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _results(
    rows: Sequence[Row], job: Job, record: Path, threads: int | None, gpu: bool
) -> Iterator[Row]:
    """The dataset: rows with a reason, "" where the pair was fused, as they become ready."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a lost worker's pairs are failures, not the end of the run
    there = ray.cluster_resources()
    threads = threads or max(1, min(4, int(there.get("CPU", 1))))
    places = there.get("GPU", 0) if gpu else there.get("CPU", 1) / threads
    blocks = -(-len(rows) // _BATCH)
    actors = max(1, min(int(places), blocks))
    job = replace(job, options={**job.options, "threads": threads})
    job.engine()  # here first: errors come at once, and one compilation fills the cache for all
    dataset = ray.data.from_items(list(rows), override_num_blocks=blocks).map_batches(
        _Fuser,
        fn_constructor_args=(job, str(record), uuid.uuid4().hex),
        batch_size=None,
        compute=ActorPoolStrategy(size=actors),
        num_cpus=threads,
        num_gpus=1 if gpu else None,
    )
    yield from dataset.iter_rows()


class _Fuser:
    """An actor: an engine, and what it does with a batch of pairs."""

    def __init__(self, job: Job, record: str, run: str) -> None:
        self.job, self.record, self.run = job, Path(record), run
        self.engine = job.engine()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        names = ("infrared", "visible", "target")
        pairs = sorted(zip(*(map(str, batch[name]) for name in names), strict=True))
        reasons = [self._try(dict(zip(names, pair, strict=True))) for pair in pairs]
        return {"target": [pair[2] for pair in pairs], "reason": reasons}

    def _try(self, row: Row) -> str:
        """Fuse a pair; the reason where that fails."""
        target = Path(row["target"])
        if _is_finished(row, self.record):
            return ""  # by an actor that died later, in the same batch
        mark = self.record.with_name(_WORKING) / target.stem
        if mark.exists() and mark.read_text(encoding="utf-8") == self.run:
            return "a worker died while fusing it (out of memory, or a fault in a library)"
        try:
            mark.write_text(self.run, encoding="utf-8")
            self._fuse(row["infrared"], row["visible"], target)
            mark.unlink()
        except Exception as error:  # one pair's fault is no other's
            mark.unlink(missing_ok=True)
            kind = "" if isinstance(error, FuseEngineError) else f"{type(error).__name__}: "
            return kind + " ".join(str(error).split())
        return ""

    def _fuse(self, infrared: str, visible: str, target: Path) -> None:
        from fuseengine.runtime.images import read_image, write_image

        frames = read_image(infrared), read_image(visible)
        write_image(target, self.engine(*frames, **self.job.frames))
