"""One HTML file with everything in it: tables, box plots and the pictures; no network."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Literal

from fuseengine.evaluation.boxplots import box_plot
from fuseengine.evaluation.previews import Preview
from fuseengine.evaluation.published import NOT_RECOMPUTED, PublishedTable, printed_decimals
from fuseengine.evaluation.run import Evaluation
from fuseengine.evaluation.summary import Mean, Summary, metric_of, notes, rank, summarise
from fuseengine.evaluation.tables import decimals, number
from fuseengine.metrics.conventions import find_convention
from fuseengine.metrics.registry import Metric

_FOLDER = Path(__file__).parent
_CLASSES = {1: "best", 2: "second"}
_COLOURS = 8


def make_page(
    evaluation: Evaluation,
    published: Sequence[PublishedTable] = (),
    previews: Mapping[str, Sequence[Preview]] | None = None,
    created: datetime | None = None,
) -> str:
    """The page.

    Args:
        evaluation: what was measured.
        published: tables to put beside it.
        previews: name of a case -> its infrared, visible and fused pictures.
        created: when, for the head of the page.

    Returns:
        HTML. It refers to nothing outside, and its content security policy forbids that too.
    """
    style, script = (
        (_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    summary = summarise(evaluation)
    shown = previews or {}
    sections = [
        ("means", "Means", _means(evaluation, summary)),
        ("published", "Published numbers", _published(evaluation, summary, published)),
        ("latency", "Latency", _latency(evaluation)),
        ("plots", "Distributions", _plots(evaluation)),
        ("images", "Every image", _images(evaluation, shown)),
        ("pairs", "Pictures", _pairs(evaluation, shown)),
        ("about", "How this was measured", _about(evaluation)),
    ]
    sections = [section for section in sections if section[2]]
    methods = ", ".join(evaluation.methods)
    date = f" · {created:%Y-%m-%d %H:%M}" if created else ""
    return Template((_FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        policy="default-src 'none'; img-src data:; "
        f"style-src {_hash(style)}; script-src {_hash(script)}",
        title=escape(f"Evaluation of {methods}"),
        heading="Evaluation of fused images",
        lead=escape(
            f"{methods} · {len(evaluation.cases)} pairs · {len(evaluation.metrics)} metrics, "
            f"convention {evaluation.convention}{date}"
        ),
        links="".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in sections),
        sections="\n".join(
            f'<section id="{key}" aria-labelledby="{key}-head"><h2 id="{key}-head">{title}</h2>\n'
            f"{body}\n</section>"
            for key, title, body in sections
        ),
        style=style,
        script=script,
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _means(evaluation: Evaluation, summary: Summary) -> str:
    ranked = len(evaluation.methods) > 1
    heads = [_head("method"), *(_metric_head(evaluation, key) for key in evaluation.metrics)]
    if ranked:
        heads.append(_head("mean rank", better=False))
    rows = [
        _row(
            _method(evaluation, index),
            [
                *_mean_cells(evaluation, summary, index),
                *([_cell(summary.mean_ranks[index], 2)] if ranked else []),
            ],
        )
        for index in range(len(evaluation.methods))
    ]
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes(evaluation))
    hint = (
        "Mean over the images, below it ± the sample standard deviation (n − 1) over the images. "
        "Arrows: ↑ higher is better, ↓ lower is better."
    )
    if ranked:
        hint += " Bold: best mean; underlined: second; small number: rank."
    return (
        _table("Means of all metrics", heads, [rows])
        + f'<p class="hint">{hint}</p>'
        + (f'<ul class="notes">{listed}</ul>' if listed else "")
    )


def _published(evaluation: Evaluation, summary: Summary, tables: Sequence[PublishedTable]) -> str:
    if not tables:
        return ""
    keys = [
        key
        for key in evaluation.metrics
        if any(
            column.metric == metric_of(evaluation, key).key
            for table in tables
            for column in table.columns
        )
    ]
    parts = [f'<p class="hint">{escape(NOT_RECOMPUTED)}</p>']
    if keys:
        parts.append(_side_by_side(evaluation, summary, tables, keys))
    wholes = "".join(f"<h3>{escape(table.caption)}</h3>{_whole(table)}" for table in tables)
    parts.append(f"<details><summary>Whole tables as printed</summary>{wholes}</details>")
    return "".join(parts)


def _side_by_side(
    evaluation: Evaluation,
    summary: Summary,
    tables: Sequence[PublishedTable],
    keys: Sequence[str],
) -> str:
    """Measured rows, then each paper's, in the columns that both have."""
    heads = [_head("method"), *(_metric_head(evaluation, key) for key in keys)]
    span = len(heads)
    measured = [_group(f"Measured here: {len(evaluation.cases)} pairs", span)]
    for index in range(len(evaluation.methods)):
        cells = dict(zip(evaluation.metrics, _mean_cells(evaluation, summary, index), strict=True))
        measured.append(_row(_method(evaluation, index), [cells[key] for key in keys]))
    bodies = [measured]
    for table in tables:
        by_form = {column.metric: index for index, column in enumerate(table.columns)}
        forms = {key: metric_of(evaluation, key).key for key in keys}
        at = {key: by_form[form] for key, form in forms.items() if form in by_form}
        if not at:
            continue
        columns = list(zip(*table.rows.values(), strict=True))
        drawn = [
            _printed(columns[at[key]], table.columns[at[key]].lower_is_better)
            if key in at
            else [_cell(None, 0)] * len(table.rows)
            for key in keys
        ]
        bodies.append(
            [
                _group(table.caption, span),
                *(
                    _row(escape(method), [column[index] for column in drawn])
                    for index, method in enumerate(table.rows)
                ),
            ]
        )
    return _table("Measured means beside published ones", heads, bodies)


def _whole(table: PublishedTable) -> str:
    heads = [
        _head("method"),
        *(_head(column.name, better=not column.lower_is_better) for column in table.columns),
    ]
    columns = [
        _printed(values, column.lower_is_better)
        for values, column in zip(
            zip(*table.rows.values(), strict=True), table.columns, strict=True
        )
    ]
    rows = [
        _row(escape(method), [column[index] for column in columns])
        for index, method in enumerate(table.rows)
    ]
    said = [table.paper + ".", table.note]
    said += [f"{column.name}: {column.note}." for column in table.columns if column.note]
    hint = " ".join(filter(None, said))
    return _table(table.caption, heads, [rows]) + f'<p class="hint">{escape(hint)}</p>'


def _printed(values: Sequence[float | None], lower_is_better: bool) -> list[str]:
    """The cells of a paper's column, its best and second marked."""
    places = printed_decimals(values)
    return [
        _cell(value, places, _CLASSES.get(place or 0, ""))
        for value, place in zip(values, rank(values, not lower_is_better), strict=True)
    ]


def _latency(evaluation: Evaluation) -> str:
    if not evaluation.latencies:
        return ""
    heads = [
        _head("method"),
        *(_head(f"{name} ms", better=False) for name in ("p50", "p90", "p99")),
        _head("pairs"),
        _head("sizes"),
    ]
    rows, said = [], []
    for method, latency in evaluation.latencies.items():
        cells = [_cell(value, 1) for value in latency.percentiles().values()]
        cells += [_cell(len(latency.milliseconds), 0), _cell(latency.sizes, 0)]
        rows.append(_row(_method(evaluation, evaluation.methods.index(method)), cells))
        said.append(f"{latency.engine}. Machine: {latency.machine}.")
    hint = (
        "One pair, from frames in memory to the fused frame in memory; every size was fused once "
        "before it was timed. " + " ".join(said)
    )
    return _table("Latency", heads, [rows]) + f'<p class="hint">{escape(hint)}</p>'


def _plots(evaluation: Evaluation) -> str:
    names = [case.name for case in evaluation.cases]
    figures = []
    for index, key in enumerate(evaluation.metrics):
        metric = metric_of(evaluation, key)
        plot = box_plot(key, evaluation.methods, evaluation.values[:, :, index].tolist(), names)
        figures.append(
            f'<figure id="plot-{escape(key)}"><figcaption><b>{escape(key)}</b> '
            f"{_arrow(metric.higher_is_better)} {escape(_full_title(metric))}</figcaption>"
            f"{plot}</figure>"
        )
    return (
        f'<div class="plots">{"".join(figures)}</div>'
        '<p class="hint">Box: quartiles and median; whiskers: last values within 1.5 '
        "interquartile ranges; diamond: mean; dots: images (point at one for its name).</p>"
    )


def _images(evaluation: Evaluation, previews: Mapping[str, Sequence[Preview]]) -> str:
    several = len(evaluation.methods) > 1
    heads = [_head("image"), *([_head("method", kind="text")] if several else [])]
    heads += [_metric_head(evaluation, key) for key in evaluation.metrics]
    places = [
        decimals(evaluation.values[:, :, index].ravel().tolist())
        for index in range(len(evaluation.metrics))
    ]
    rows = []
    for at, case in enumerate(evaluation.cases):
        name = escape(case.name)
        if case.name in previews:
            name = f'<a href="#pair-{at + 1}">{name}</a>'
        for index, method in enumerate(evaluation.methods):
            cells = [f'<td class="text">{_method(evaluation, index)}</td>'] if several else []
            values = evaluation.values[index, at].tolist()
            cells += [_cell(value, p) for value, p in zip(values, places, strict=True)]
            rows.append(_row(name, cells, f' data-method="{escape(method)}"'))
    controls = ""
    if several:
        options = "".join(f"<option>{escape(method)}</option>" for method in evaluation.methods)
        controls = (
            '<div class="controls"><label>Method <select id="method">'
            f'<option value="">all</option>{options}</select></label></div>'
        )
    return controls + _table("Values of every image", heads, [rows])


def _pairs(evaluation: Evaluation, previews: Mapping[str, Sequence[Preview]]) -> str:
    if not previews:
        return ""
    roles = ("infrared", "visible", *evaluation.methods)
    controls = "".join(
        f'<label>{side.capitalize()} <select id="{side}">'
        + "".join(
            f'<option value="{index}"{" selected" * (index == chosen)}>{escape(role)}</option>'
            for index, role in enumerate(roles)
        )
        + "</select></label>"
        for side, chosen in (("left", 0), ("right", 2))
    )
    articles = []
    for at, case in enumerate(evaluation.cases):
        if case.name not in previews:
            continue
        name = escape(case.name)
        figures = "".join(
            f'<figure><img src="{picture.uri}" width="{picture.width}" height="{picture.height}" '
            f'alt="{name}, {escape(role)}"><figcaption>{escape(role)}</figcaption></figure>'
            for role, picture in zip(roles, previews[case.name], strict=True)
        )
        articles.append(
            f'<article id="pair-{at + 1}" data-name="{name}"><h3>{name} '
            f"<small>{case.size[1]} × {case.size[0]}</small></h3>"
            f'<div class="viewer"><div class="strip">{figures}</div></div></article>'
        )
    return f'<div class="controls">{controls}</div>{_picture_hint(evaluation, previews)}' + "".join(
        articles
    )


def _picture_hint(evaluation: Evaluation, previews: Mapping[str, Sequence[Preview]]) -> str:
    pictures = [picture for of_case in previews.values() for picture in of_case]
    side = max(max(picture.width, picture.height) for picture in pictures)
    megabytes = sum(len(picture.uri) for picture in pictures) / 1e6
    some = ""
    if len(previews) < len(evaluation.cases):
        some = f"Shown are {len(previews)} of {len(evaluation.cases)} pairs, evenly spaced. "
    return (
        f'<p class="hint">{some}These are compressed copies, their longest side at most {side} '
        f"pixels, {megabytes:.1f} MB together; metrics were computed on the files. Move a divider "
        "with the mouse, a finger or the arrow keys.</p>"
    )


def _about(evaluation: Evaluation) -> str:
    convention = find_convention(evaluation.convention)
    rows = [(role, str(folder)) for role, folder in evaluation.folders.items()]
    rows.append(("convention", f"{convention.name}: {convention.about}"))
    for key in evaluation.metrics:
        metric = metric_of(evaluation, key)
        form = "" if metric.key == key else f" (computed as {metric.key})"
        low, high = (_bound(bound) for bound in metric.range)
        better = "higher" if metric.higher_is_better else "lower"
        unit = f" {metric.unit}" if metric.unit else ""
        rows.append(
            (
                key,
                f"{metric.title}{form}: {metric.formula} {low} to {high}{unit}, {better} is "
                f"better. {metric.source}.",
            )
        )
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in rows)
    return (
        f"<dl>{items}</dl>"
        '<p class="hint">Metrics see the saved files as 8-bit grey levels; nothing is resized. '
        "None of them is a proof of a good picture: noise raises EN, SD, SF and AG, contrast "
        "stretching raises SD and SCD.</p>"
    )


def _bound(bound: float) -> str:
    return f"{bound:g}".replace("inf", "∞")


def _method(evaluation: Evaluation, index: int) -> str:
    colour = f'<span class="swatch m{index % _COLOURS}"></span>'
    return colour + escape(evaluation.methods[index])


def _mean_cells(evaluation: Evaluation, summary: Summary, method: int) -> list[str]:
    cells = []
    for index, mean in enumerate(summary.means[method]):
        places = decimals(of_method[index].value for of_method in summary.means)
        cells.append(_mean_cell(mean, places, summary.ranks[method][index]))
    return cells


def _mean_cell(mean: Mean, places: int, place: int | None) -> str:
    value = "" if math.isnan(mean.value) else repr(mean.value)
    rank_text = ""
    if place is not None:
        rank_text = f'<span class="rank"><span class="hidden">rank </span>{place}</span>'
    std = "" if math.isnan(mean.std) else f'<span class="std">± {number(mean.std, places)}</span>'
    over = f'<span class="over">over {mean.n} of {mean.of}</span>' if mean.n < mean.of else ""
    return (
        f'<td class="{_CLASSES.get(place or 0, "")}" data-value="{value}">'
        f'{rank_text}<span class="value">{number(mean.value, places)}</span>{std}{over}</td>'
    )


def _cell(value: float | None, places: int, kind: str = "") -> str:
    key = "" if value is None or math.isnan(value) else repr(value).replace("inf", "Infinity")
    text = number(value, places).replace("inf", "∞")
    return f'<td class="{kind}" data-value="{key}"><span class="value">{text}</span></td>'


def _row(name: str, cells: Sequence[str], attributes: str = "") -> str:
    return f'<tr{attributes}><th scope="row">{name}</th>{"".join(cells)}</tr>'


def _group(text: str, span: int) -> str:
    return f'<tr class="group"><th scope="rowgroup" colspan="{span}">{escape(text)}</th></tr>'


def _metric_head(evaluation: Evaluation, key: str) -> str:
    metric = metric_of(evaluation, key)
    return _head(key, title=_full_title(metric), better=metric.higher_is_better)


def _full_title(metric: Metric) -> str:
    return f"{metric.title}, {metric.unit}" if metric.unit else metric.title


def _head(
    text: str, *, title: str = "", better: bool | None = None, kind: Literal["", "text"] = ""
) -> str:
    """A head cell whose button sorts; `better` says whether higher is, and sorts that way first."""
    arrow = "" if better is None else _arrow(better)
    return (
        f'<th scope="col" class="{kind}" aria-sort="none" title="{escape(title)}" '
        f'data-first="{"descending" if better else "ascending"}">'
        f'<button type="button">{escape(text)} {arrow}</button></th>'
    )


def _arrow(higher_is_better: bool) -> str:
    sign, word = ("↑", "higher") if higher_is_better else ("↓", "lower")
    return (
        f'<span class="arrow" aria-hidden="true">{sign}</span>'
        f'<span class="hidden">({word} is better)</span>'
    )


def _table(caption: str, heads: Sequence[str], bodies: Sequence[Sequence[str]]) -> str:
    text = escape(caption)
    inside = "\n".join(f"<tbody>{chr(10).join(rows)}</tbody>" for rows in bodies)
    return (
        f'<div class="scroll" role="region" aria-label="{text}" tabindex="0"><table>'
        f'<caption class="hidden">{text}</caption>'
        f"<thead><tr>{''.join(heads)}</tr></thead>\n{inside}</table></div>"
    )
