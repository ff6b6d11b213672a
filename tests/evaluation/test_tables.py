"""Text, CSV and JSON of an evaluation."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from fuseengine.evaluation.published import published_tables
from fuseengine.evaluation.run import Latency
from fuseengine.evaluation.tables import csv_text, decimals, json_text, number, text_tables

NAN = math.nan


@pytest.fixture
def evaluation(make_evaluation):
    values = [[[7.5, 0.75], [6.25, NAN]], [[7.0, 0.5], [6.0, 0.25]]]
    return make_evaluation(values, methods=("ours", "theirs"))


@pytest.mark.parametrize(
    ("values", "places"), [([0.8021], 4), ([9.99, -3], 4), ([46.7], 3), ([123.4], 2), ([NAN], 4)]
)
def test_decimals(values, places):
    assert decimals(values) == places


def test_number():
    assert [number(v, 2) for v in (1.005, None, NAN, math.inf)] == ["1.00", "-", "undefined", "inf"]


class TestText:
    def test_columns_are_aligned(self, evaluation):
        blocks = text_tables(evaluation).split("\n\n")
        assert blocks[0].splitlines() == [
            "ours",
            "image       EN        VIF",
            "------  ------  ---------",
            "00      7.5000     0.7500",
            "01      6.2500  undefined",
            "mean    6.8750     0.7500",
            "± std   0.8839  undefined",
            "images  2 of 2     1 of 2",
        ]

    def test_means_and_ranks(self, evaluation):
        text = text_tables(evaluation)
        assert "mean ± std over 2 images (rank)" in text
        lines = {line.split()[0]: line for line in text.splitlines() if line}
        assert "6.8750 ± 0.8839 (1)" in lines["EN"] and "6.5000 ± 0.7071 (2)" in lines["EN"]
        assert "[1 of 2] (1)" in lines["VIF"]
        assert text.endswith("its mean is over 1 of 2 images.")

    def test_one_method_has_no_ranks(self, make_evaluation):
        text = text_tables(make_evaluation([[[1, 2], [3, 4]]]))
        assert "rank" not in text and "note" not in text

    def test_wide_tables_go_on_below(self, make_evaluation):
        keys = ("EN", "SD", "SF", "AG", "SCD", "MI", "VIF", "Qabf")
        text = text_tables(make_evaluation([[[1] * 8, [2] * 8]], keys), width=40)
        lines = text.splitlines()
        assert max(map(len, lines)) <= 40
        assert sum(line.startswith("image ") for line in lines) == 2
        assert all(any(key in line.split() for line in lines) for key in keys)

    def test_published_rows_are_labelled(self, evaluation):
        text = text_tables(evaluation, published_tables("TNO"))
        block = text[text.index("As printed by DMNet: TNO, 25 pairs") :].split("\n\n")[0]
        rows = {line.split("  ")[0]: line.split() for line in block.splitlines() if line}
        assert rows["ours (measured)"][:3] == ["ours", "(measured)", "6.875"]
        assert rows["DenseFuse"][1] == "6.327"
        assert "not recomputed" in text

    def test_latency(self, make_evaluation):
        latency = Latency((10.0, 20.0, 30.0), "a machine", "an engine", 2)
        text = text_tables(make_evaluation([[[1, 2]]], latencies={"method 0": latency}))
        row = next(line for line in text.splitlines() if line.startswith("method 0  "))
        assert row.split()[2:] == ["20.0", "28.0", "29.8", "3", "2"]
        assert "method 0: an engine; a machine" in text


def test_csv_keeps_every_digit(evaluation):
    rows = list(csv.DictReader(io.StringIO(csv_text(evaluation))))
    assert [row["method"] for row in rows] == ["ours", "ours", "theirs", "theirs"]
    assert rows[0] == {
        "method": "ours", "image": "00", "height": "30", "width": "40", "EN": "7.5", "VIF": "0.75",
    }  # fmt: skip
    assert rows[1]["VIF"] == "nan"
    assert [float(row["EN"]) for row in rows] == evaluation.values[..., 0].ravel().tolist()


class TestJson:
    def test_is_strict(self, make_evaluation):
        def refuse(text):
            raise AssertionError(text)

        evaluation = make_evaluation([[[math.inf, NAN], [-math.inf, 1]]])
        data = json.loads(json_text(evaluation), parse_constant=refuse)
        assert data["images"][0]["values"] == {"method 0": {"EN": None, "VIF": None}}

    def test_content(self, evaluation):
        data = json.loads(json_text(evaluation, published_tables("msrs")))
        assert data["schema"] == 1
        assert data["metrics"]["VIF"]["higher_is_better"] is True
        assert data["metrics"]["VIF"]["range"] == [0, None]
        ours = data["methods"]["ours"]
        assert ours["metrics"]["VIF"] == {
            "mean": 0.75, "std": None, "n": 1, "of": 2, "rank": 1,
        }  # fmt: skip
        assert ours["mean_rank"] == 1 and ours["latency"] is None
        assert data["images"][1]["values"]["theirs"] == {"EN": 6.0, "VIF": 0.25}
        assert data["notes"]
        (table,) = [t for t in data["published"] if t["paper"].startswith("Mask-DiFuser")]
        assert table["lower_is_better"] == ["PI"] and "not recomputed" in table["note"]
        assert table["rows"]["Mask-DiFuser"]["EN"] == 6.978

    def test_says_which_form_was_computed(self, make_evaluation):
        data = json.loads(
            json_text(make_evaluation([[[1, 2]]], ("MI", "EN"), convention="cddfuse"))
        )
        assert data["convention"] == "cddfuse"
        assert data["metrics"]["MI"]["form"] == "MI_nats" and data["metrics"]["MI"]["unit"] == "nat"
        assert data["metrics"]["EN"]["form"] == "EN"
