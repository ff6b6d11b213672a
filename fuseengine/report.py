"""What compile() tried, measured and chose; and what a profile measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Candidate:
    """One backend at one precision, tried on the whole program.

    Attributes:
        backend: its name.
        precision: its precision.
        milliseconds: median time of the program (stages and ops), None when it did not run.
        psnr_db: of the fused image against the float32 reference, None when it did not run.
        max_error: largest absolute difference, on the scale [0, 1].
        note: why it was left out, or what was chosen of it.
    """

    backend: str
    precision: str
    milliseconds: float | None = None
    psnr_db: float | None = None
    max_error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The record of a compilation; printing it gives a table.

    Attributes:
        model: the model's name.
        size: height and width it was measured at.
        device: "cpu" or "cuda".
        choice: stage variant -> "backend/precision".
        candidates: everything that was tried or skipped, in order.
        guard_db: least PSNR that was asked of a candidate below float32.
        psnr_db: of the engine as chosen; NaN where it was not run.
        max_error: likewise.
        seconds: how long compiling took.
        from_cache: whether the choice came out of the cache.
        threads: CPU threads that it was measured with.
        quantised: how int8 networks were made, None where none were: see ``Quantised.record`` in
            ``fuseengine.export.quantize``.
    """

    model: str
    size: tuple[int, int]
    device: str
    choice: dict[str, str]
    candidates: tuple[Candidate, ...]
    guard_db: float
    psnr_db: float
    max_error: float
    seconds: float
    from_cache: bool = False
    threads: int = field(default=1)
    quantised: dict[str, Any] | None = None

    def summary(self) -> str:
        """One line."""
        chosen = ", ".join(f"{stage}: {how}" for stage, how in self.choice.items())
        source = "from the cache" if self.from_cache else f"in {self.seconds:.1f} s"
        exact = f"{self.psnr_db:.1f} dB, max error {self.max_error:.2g} against float32"
        if math.isnan(self.psnr_db):
            exact = "not run yet, so not compared with float32"
        return (
            f"{self.model} {self.size[1]}x{self.size[0]} on {self.device}, {chosen}; {exact}; "
            f"compiled {source}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; a number that is none (a candidate that gave NaN) becomes null."""
        data = asdict(self)
        for row in (data, *data["candidates"]):
            for key, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    row[key] = None
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`."""
        data = dict(data)
        for key in ("psnr_db", "max_error"):
            data[key] = math.nan if data[key] is None else data[key]
        data["size"] = tuple(data["size"])
        data["candidates"] = tuple(Candidate(**item) for item in data["candidates"])
        return cls(**data)

    def __str__(self) -> str:
        rows = [["backend", "precision", "ms", "PSNR dB", "max error", ""]]
        for item in self.candidates:
            rows.append(
                [
                    item.backend,
                    item.precision,
                    "-" if item.milliseconds is None else f"{item.milliseconds:.2f}",
                    "-" if item.psnr_db is None else f"{item.psnr_db:.1f}",
                    "-" if item.max_error is None else f"{item.max_error:.2g}",
                    item.note,
                ]
            )
        lines = [self.summary(), table(rows)]
        if self.quantised is not None:
            lines.append(_int8_line(self.quantised))
        return "\n".join(lines)


@dataclass(frozen=True)
class Profile:
    """Times of an engine's parts; printing it gives a table.

    Attributes:
        parts: label -> milliseconds of each run, in the order of execution.
        frame: milliseconds of each whole call without clocks in it.
        overhead: milliseconds of each call that are in none of its parts: checks, locks, Python.
    """

    parts: tuple[tuple[str, NDArray[np.float64]], ...]
    frame: NDArray[np.float64]
    overhead: NDArray[np.float64]

    @property
    def overhead_ms(self) -> float:
        """Median of :attr:`overhead`."""
        return float(np.median(self.overhead))

    def to_dict(self) -> dict[str, Any]:
        """Percentiles per part, plain JSON data."""
        rows = [*self.parts, ("frame", self.frame), ("overhead", self.overhead)]
        return {
            "parts": [{"part": name, **_percentiles(times)} for name, times in rows],
            "overhead_ms": self.overhead_ms,
        }

    def __str__(self) -> str:
        rows = [["part", "p50 ms", "p90 ms", "p99 ms", "n"]]
        for name, times in [*self.parts, ("whole call", self.frame)]:
            p = _percentiles(times)
            rows.append([name, *(f"{p[k]:.3f}" for k in ("p50", "p90", "p99")), str(p["n"])])
        return f"{table(rows)}\noverhead beyond stages and ops: {self.overhead_ms:.3f} ms"


def _int8_line(record: dict[str, Any]) -> str:
    floats = [
        f"{stage}: {', '.join(layers)}"
        for stage, layers in record["float_layers"].items()
        if layers
    ]
    count = sum(map(len, record["float_layers"].values()))
    kept = f" ({'; '.join(floats)})" if floats else ""
    return (
        f"int8: ranges by {record['method']} on {record['pictures']}; {count} of "
        f"{record['layers']} layers stay float{kept}"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as aligned columns; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(cells: Iterable[str]) -> str:
        return "  ".join(
            cell.ljust(width) for cell, width in zip(cells, widths, strict=True)
        ).rstrip()

    return "\n".join([line(rows[0]), line("-" * w for w in widths), *map(line, rows[1:])])


def _percentiles(times: NDArray[np.float64]) -> dict[str, float]:
    p50, p90, p99 = (float(v) for v in np.percentile(times, (50, 90, 99)))
    return {"p50": p50, "p90": p90, "p99": p99, "n": len(times)}
