"""Numbers that papers print, as package data (``published.json``)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fuseengine.errors import UnknownNameError

_PUBLISHED = Path(__file__).with_name("published.json")

NOT_RECOMPUTED = (
    "Numbers as printed by the paper, not recomputed. Each paper has its own list of pairs, its "
    "own fused files and its own code for the metrics, and metrics of one name are implemented "
    "differently: compare them with the measured rows with care."
)


@dataclass(frozen=True)
class PublishedColumn:
    """A column of a paper's table.

    Attributes:
        name: as printed.
        metric: the key of :data:`fuseengine.metrics.METRICS` with this definition and scale.
        lower_is_better: whether the least value is the best one.
        note: what to know about it.
    """

    name: str
    metric: str | None
    lower_is_better: bool = False
    note: str = ""


@dataclass(frozen=True)
class PublishedTable:
    """A table of a paper.

    Attributes:
        paper: the paper's title.
        own: the paper's own method.
        note: what to know about its numbers.
        dataset: name of the image set.
        setting: what else tells it apart; may be empty.
        pairs: number of pairs, where the paper says it.
        columns: its columns.
        rows: method -> a number per column.
    """

    paper: str
    own: str
    note: str
    dataset: str
    setting: str
    pairs: int | None
    columns: tuple[PublishedColumn, ...]
    rows: dict[str, tuple[float | None, ...]]

    @property
    def caption(self) -> str:
        """Whose numbers these are, in a few words."""
        setting = f", {self.setting}" if self.setting else ""
        pairs = f", {self.pairs} pairs" if self.pairs else ""
        return f"As printed by {self.own}: {self.dataset}{setting}{pairs}"


def published_tables(dataset: str) -> list[PublishedTable]:
    """The published tables of an image set, upper and lower case alike.

    Raises:
        UnknownNameError: there are none.
    """
    tables = [table for table in _published() if table.dataset.lower() == dataset.lower()]
    if not tables:
        known = {table.dataset.lower() for table in _published()}
        raise UnknownNameError("published image set", dataset, known)
    return tables


def published_sets() -> list[str]:
    """Names of the image sets that published numbers exist for."""
    return sorted({table.dataset.lower() for table in _published()})


def printed_decimals(values: Iterable[float | None]) -> int:
    """Decimals that a paper printed a column with."""
    known = [value for value in values if value is not None]
    return next((d for d in range(5) if all(round(v, d) == v for v in known)), 5)


@cache
def _published() -> tuple[PublishedTable, ...]:
    data = json.loads(_PUBLISHED.read_text(encoding="utf-8"))
    tables = []
    for table in data["tables"]:
        paper = data["papers"][table["paper"]]
        tables.append(
            PublishedTable(
                paper=paper["title"],
                own=paper["method"],
                note=paper.get("note", ""),
                dataset=table["dataset"],
                setting=table["setting"],
                pairs=table["pairs"],
                columns=tuple(PublishedColumn(**column) for column in paper["columns"]),
                rows={method: tuple(row) for method, row in table["rows"].items()},
            )
        )
    return tuple(tables)
