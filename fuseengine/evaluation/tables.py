"""An evaluation as text, CSV and plain data."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

from fuseengine.evaluation.published import NOT_RECOMPUTED, PublishedTable, printed_decimals
from fuseengine.evaluation.run import Evaluation
from fuseengine.evaluation.summary import metric_of, notes, summarise

SCHEMA = 1
"""Of the JSON file; it grows when a key changes its meaning or goes."""


def decimals(values: Iterable[float | None]) -> int:
    """Decimals that print these values with about five significant digits."""
    largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
    return 4 if largest < 10 else 3 if largest < 100 else 2


def number(value: float | None, places: int) -> str:
    """A value with so many decimals; "-" for None, "undefined" for NaN."""
    if value is None:
        return "-"
    if math.isnan(value):
        return "undefined"
    return f"{value:.{places}f}"


def text_tables(
    evaluation: Evaluation, published: Sequence[PublishedTable] = (), width: int = 120
) -> str:
    """Everything for a terminal: a table per method, the means, published numbers, notes.

    Args:
        evaluation: what was measured.
        published: tables to put beside it.
        width: columns of text; wider tables go on below themselves.
    """
    parts = [_image_table(evaluation, index, width) for index in range(len(evaluation.methods))]
    if len(evaluation.methods) > 1:
        parts.append(_mean_table(evaluation, width))
    if evaluation.latencies:
        parts.append(_latency_table(evaluation))
    if published:
        parts += [_published_text(evaluation, table, width) for table in published]
        parts.append(NOT_RECOMPUTED)
    parts.append("\n".join(f"note: {note}" for note in notes(evaluation)))
    return "\n\n".join(part for part in parts if part)


def csv_text(evaluation: Evaluation) -> str:
    """One row per method and image, values in full; "nan" where a metric is undefined."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "image", "height", "width", *evaluation.metrics])
    for method, of_method in zip(evaluation.methods, evaluation.values.tolist(), strict=True):
        for case, values in zip(evaluation.cases, of_method, strict=True):
            writer.writerow([method, case.name, *case.size, *map(repr, values)])
    return file.getvalue()


def json_text(evaluation: Evaluation, published: Sequence[PublishedTable] = ()) -> str:
    """Everything as JSON; null where a value is not a finite number."""
    return json.dumps(to_dict(evaluation, published), indent=2, allow_nan=False) + "\n"


def to_dict(evaluation: Evaluation, published: Sequence[PublishedTable] = ()) -> dict[str, Any]:
    """Everything as plain data; None where a value is not a finite number."""
    summary = summarise(evaluation)
    keys = evaluation.metrics
    return {
        "schema": SCHEMA,
        "fuseengine": _version(),
        "convention": evaluation.convention,
        "infrared_range": evaluation.infrared_range,
        "folders": {role: str(folder) for role, folder in evaluation.folders.items()},
        "metrics": {
            key: {
                "form": form.key,
                "title": form.title,
                "unit": form.unit,
                "formula": form.formula,
                "higher_is_better": form.higher_is_better,
                "range": [_finite(bound) for bound in form.range],
                "source": form.source,
            }
            for key in keys
            for form in [metric_of(evaluation, key)]
        },
        "methods": {
            method: {
                "metrics": {
                    key: {
                        "mean": _finite(mean.value),
                        "std": _finite(mean.std),
                        "n": mean.n,
                        "of": mean.of,
                        "rank": place,
                    }
                    for key, mean, place in zip(
                        keys, summary.means[index], summary.ranks[index], strict=True
                    )
                },
                "mean_rank": summary.mean_ranks[index],
                "latency": _latency(evaluation, method),
            }
            for index, method in enumerate(evaluation.methods)
        },
        "images": [
            {
                "name": case.name,
                "height": case.size[0],
                "width": case.size[1],
                "values": {
                    method: dict(zip(keys, map(_finite, values[row].tolist()), strict=True))
                    for method, values in zip(evaluation.methods, evaluation.values, strict=True)
                },
            }
            for row, case in enumerate(evaluation.cases)
        ],
        "unpaired": {role: list(files) for role, files in evaluation.unpaired.items()},
        "left_out": {item.name: item.reason for item in evaluation.left_out},
        "facts": [
            {"of": role, "fact": fact, "images": list(names)}
            for (role, fact), names in evaluation.facts.items()
        ],
        "notes": notes(evaluation),
        "published": [
            {
                "paper": table.paper,
                "dataset": table.dataset,
                "setting": table.setting,
                "pairs": table.pairs,
                "note": " ".join(filter(None, (table.note, NOT_RECOMPUTED))),
                "lower_is_better": [c.name for c in table.columns if c.lower_is_better],
                "rows": {
                    method: dict(zip((c.name for c in table.columns), row, strict=True))
                    for method, row in table.rows.items()
                },
            }
            for table in published
        ],
    }


def _version() -> str | None:
    try:
        return metadata.version("fuseengine")
    except metadata.PackageNotFoundError:  # run from its sources
        return None


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _latency(evaluation: Evaluation, method: str) -> dict[str, Any] | None:
    latency = evaluation.latencies.get(method)
    if latency is None:
        return None
    return {
        **{f"{name}_ms": value for name, value in latency.percentiles().items()},
        "n": len(latency.milliseconds),
        "sizes": latency.sizes,
        "machine": latency.machine,
        "engine": latency.engine,
        "milliseconds": list(latency.milliseconds),
    }


def _align(rows: Sequence[Sequence[str]], width: int) -> str:
    """Rows as columns, the first to the left, numbers to the right; the first row is the head."""
    first, *rest = zip(*rows, strict=True)
    blocks: list[list[Sequence[str]]] = [[]]
    left = _widest(first)
    used = left
    for column in rest:
        used += 2 + _widest(column)
        if used > width and blocks[-1]:
            blocks.append([])
            used = left + 2 + _widest(column)
        blocks[-1].append(column)
    return "\n\n".join(_block([first, *block]) for block in blocks)


def _block(columns: Sequence[Sequence[str]]) -> str:
    widths = [_widest(column) for column in columns]
    rows = list(zip(*columns, strict=True))

    def line(cells: Sequence[str]) -> str:
        first, *rest = cells
        numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        return "  ".join([first.ljust(widths[0]), *numbers]).rstrip()

    return "\n".join([line(rows[0]), line(["-" * width for width in widths]), *map(line, rows[1:])])


def _widest(cells: Iterable[str]) -> int:
    return max(map(len, cells))


def _image_table(evaluation: Evaluation, method: int, width: int) -> str:
    values = evaluation.values[method]
    means = summarise(evaluation).means[method]
    places = [decimals(column) for column in values.T.tolist()]
    rows = [["image", *evaluation.metrics]]
    for case, row in zip(evaluation.cases, values.tolist(), strict=True):
        rows.append([case.name, *map(number, row, places)])
    rows.append(["mean", *(number(m.value, p) for m, p in zip(means, places, strict=True))])
    rows.append(["± std", *(number(m.std, p) for m, p in zip(means, places, strict=True))])
    if any(mean.n < mean.of for mean in means):
        rows.append(["images", *(f"{mean.n} of {mean.of}" for mean in means)])
    return f"{evaluation.methods[method]}\n{_align(rows, width)}"


def _mean_table(evaluation: Evaluation, width: int) -> str:
    """Means and ranks of several methods, a row per metric."""
    summary = summarise(evaluation)
    rows = [["metric", "better", *evaluation.methods]]
    for index, key in enumerate(evaluation.metrics):
        means = [of_method[index] for of_method in summary.means]
        places = decimals(mean.value for mean in means)
        cells = []
        for mean, ranks in zip(means, summary.ranks, strict=True):
            place = f" ({ranks[index]})" if ranks[index] else ""
            some = f" [{mean.n} of {mean.of}]" if mean.n < mean.of else ""
            cells.append(f"{number(mean.value, places)} ± {number(mean.std, places)}{some}{place}")
        rows.append(
            [key, "higher" if metric_of(evaluation, key).higher_is_better else "lower", *cells]
        )
    rows.append(["mean rank", "lower", *(f"{r:.2f}" if r else "-" for r in summary.mean_ranks)])
    return f"mean ± std over {len(evaluation.cases)} images (rank)\n{_align(rows, width)}"


def _latency_table(evaluation: Evaluation) -> str:
    rows = [["latency, ms", "p50", "p90", "p99", "pairs", "sizes"]]
    lines = []
    for method, latency in evaluation.latencies.items():
        times = [f"{value:.1f}" for value in latency.percentiles().values()]
        rows.append([method, *times, str(len(latency.milliseconds)), str(latency.sizes)])
        lines.append(f"{method}: {latency.engine}; {latency.machine}")
    return "\n".join([_block(list(zip(*rows, strict=True))), *lines])


def _published_text(evaluation: Evaluation, table: PublishedTable, width: int) -> str:
    """A paper's table with the measured means on top, in its own columns and order."""
    summary = summarise(evaluation)
    columns = list(zip(*table.rows.values(), strict=True))
    places = [printed_decimals(column) for column in columns]
    heads = [c.name + (" (lower)" if c.lower_is_better else "") for c in table.columns]
    rows = [["method", *heads]]
    for method, means in zip(evaluation.methods, summary.means, strict=True):
        forms = (metric_of(evaluation, key).key for key in evaluation.metrics)
        here = dict(zip(forms, means, strict=True))
        rows.append(
            [
                f"{method} (measured)",
                *(
                    number(here[c.metric].value if c.metric in here else None, max(p, 3))
                    for c, p in zip(table.columns, places, strict=True)
                ),
            ]
        )
    rows += [[method, *map(number, row, places)] for method, row in table.rows.items()]
    return f"{table.caption}\n{_align(rows, width)}"
