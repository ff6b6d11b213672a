"""Published numbers: complete, as in the reference data, and under the right metric."""

from __future__ import annotations

import json

import pytest

from fuseengine.errors import UnknownNameError
from fuseengine.evaluation.published import (
    printed_decimals,
    published_sets,
    published_tables,
)
from fuseengine.metrics import METRICS
from tests.helpers import shared_path

SETS = {
    "dmnet": ["TNO", "MSRS", "RoadScene", "LLVIP"],
    "mask_difuser": ["MSRS", "RoadScene", "Nirscene", "Polarization", "Harvard", "SICE"],
}


def all_tables():
    return [table for name in published_sets() for table in published_tables(name)]


@pytest.mark.parametrize("given", ["tno", "TNO", "Tno"])
def test_by_image_set(given):
    tables = published_tables(given)
    assert {table.own for table in tables} == {"DMNet", "DMFuse"}
    assert all(table.dataset == "TNO" and table.pairs == 25 for table in tables)
    assert tables[0].caption == "As printed by DMNet: TNO, 25 pairs"


def test_unknown_set():
    with pytest.raises(UnknownNameError, match="Did you mean 'roadscene'"):
        published_tables("roadscenes")


def test_tables_are_whole():
    for table in all_tables():
        assert table.paper and table.own in table.rows, table.caption
        for row in table.rows.values():
            assert len(row) == len(table.columns)


def test_columns_are_metrics_of_ours_or_explained():
    for table in all_tables():
        for column in table.columns:
            assert column.metric in METRICS or (column.metric is None and column.note)
            if column.metric in METRICS:
                assert METRICS[column.metric].higher_is_better != column.lower_is_better


def test_lower_is_better():
    (table,) = [t for t in published_tables("msrs") if t.own == "Mask-DiFuser"]
    assert [column.name for column in table.columns if column.lower_is_better] == ["PI"]


@pytest.mark.parametrize("paper", sorted(SETS))
def test_numbers_are_those_of_the_reference(paper):
    reference = json.loads(shared_path("reference", "seed_tables.json").read_text())[paper]
    for dataset in SETS[paper]:
        (table,) = [t for t in published_tables(dataset) if t.own == reference["own"]]
        assert table.paper == reference["source"]
        assert table.pairs == reference["test_sets"][dataset]
        names = [column.name for column in table.columns]
        rows = {method: dict(zip(names, row, strict=True)) for method, row in table.rows.items()}
        assert rows == reference["datasets"][dataset]


def test_number_of_published_numbers():
    reference = json.loads(shared_path("reference", "seed_tables.json").read_text())
    expected = sum(
        len(row)
        for paper in reference.values()
        if isinstance(paper, dict)
        for key in ("datasets", "datasets_practical", "datasets_challenging")
        for rows in paper.get(key, {}).values()
        for row in rows.values()
    )
    found = [v for table in all_tables() for row in table.rows.values() for v in row]
    assert sum(value is not None for value in found) == expected


@pytest.mark.parametrize(
    ("values", "places"), [([7.1, 6.327], 3), ([1.0, None], 0), ([0.9], 1), ([0.8036, 0.8], 4)]
)
def test_printed_decimals(values, places):
    assert printed_decimals(values) == places
