"""The page as text: whole, closed to the outside, and safe against what names may hold."""

from __future__ import annotations

import base64
import hashlib
import re
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fuseengine.evaluation.pairing import Case
from fuseengine.evaluation.previews import Preview
from fuseengine.evaluation.published import published_tables
from fuseengine.evaluation.report import make_page
from fuseengine.evaluation.run import Latency

_VOID = {"meta", "link", "img", "input", "br"}
PIXEL = Preview("data:image/png;base64,AAAA", 4, 3)


class Outline(HTMLParser):
    """Elements in order, attributes that name something to load, and whether tags match."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.loads, self.ids = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "data", "action", "srcset", "poster", "xlink:href"):
                self.loads.append(value)
            if name == "id":
                self.ids.append(value)
            assert not name.startswith("on"), (tag, name)
            assert name != "style", (tag, value)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(make_evaluation):
    rng = np.random.default_rng(0)
    evaluation = make_evaluation(
        rng.random((2, 4, 3)),
        ("EN", "MSE", "VIF"),
        ("ours", "theirs"),
        latencies={"ours": Latency((1.0, 2.0), "a machine", "an engine", 1)},
    )
    previews = {case.name: [PIXEL] * 4 for case in evaluation.cases}
    created = datetime(2026, 5, 4, 12, 30, tzinfo=timezone.utc)
    return make_page(evaluation, published_tables("tno"), previews, created)


class TestPage:
    def test_well_formed_and_whole(self, page):
        outline = Outline(page)
        assert outline.ids.count("means") == 1 and len(set(outline.ids)) == len(outline.ids)
        sections = ["means", "published", "latency", "plots", "images", "pairs", "about"]
        assert [name for name in outline.ids if name in sections] == sections
        assert outline.tags.count("svg") == 3
        assert outline.tags.count("article") == 4
        assert "2026-05-04 12:30" in page

    def test_loads_nothing(self, page):
        for place in Outline(page).loads:
            assert place.startswith(("data:", "#")), place
        for word in ("http:", "https:", "@import", "url(", "fetch(", "XMLHttpRequest"):
            assert word not in page, word

    def test_policy_allows_exactly_what_is_there(self, page):
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
        assert policy.startswith("default-src 'none'; img-src data:;")
        for tag in ("style", "script"):
            (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy

    def test_directions(self, page):
        assert re.search(r'data-first="ascending"><button type="button">MSE <span', page)
        assert re.search(r'data-first="descending"><button type="button">VIF <span', page)

    def test_published_rows_are_labelled(self, page):
        assert "Measured here: 4 pairs" in page
        assert "As printed by DMNet: TNO, 25 pairs" in page
        assert "not recomputed" in page
        # EN of DenseFuse, with the decimals of the paper
        assert '<span class="value">6.327</span>' in page

    def test_best_and_second(self, make_evaluation):
        values = [[[1, 5]], [[2, 4]], [[3, 3]]]
        page = make_page(make_evaluation(values, ("EN", "MSE"), ("x", "y", "z")))
        means = page[page.index('id="means"') : page.index('id="plots"')]
        rows = re.findall(r'<tr><th scope="row".*?</tr>', means, re.DOTALL)
        kinds = [re.findall(r'<td class="(\w*)"', row)[:2] for row in rows]
        assert kinds == [["", ""], ["second", "second"], ["best", "best"]]

    def test_undefined_values(self, make_evaluation):
        page = make_page(make_evaluation([[[1, np.nan], [2, 3]], [[np.inf, 1], [1, 1]]]))
        assert "over 1 of 2" in page and '<span class="value">undefined</span>' in page
        assert 'data-value="Infinity"><span class="value">∞</span>' in page
        assert "nan" not in page[page.index("</style>") : page.index("<script>")].lower()

    def test_nothing_beside_the_measured(self, make_evaluation):
        ids = Outline(make_page(make_evaluation([[[1, 2], [2, 3]]]))).ids
        assert not {"published", "latency", "pairs", "method"} & set(ids)

    def test_pictures_that_are_left_out_are_told(self, make_evaluation):
        evaluation = make_evaluation(np.ones((1, 3, 2)))
        page = make_page(evaluation, previews={"01": [PIXEL] * 3})
        assert "Shown are 1 of 3 pairs" in page
        assert page.count("<article") == 1 and 'href="#pair-2"' in page
        assert 'href="#pair-1"' not in page


def test_names_are_text(make_evaluation):
    """File and folder names come from anywhere; a page may be passed on."""
    evil = "<img src=x onerror=alert(1)>\"'&</script>"
    evaluation = make_evaluation(
        [[[1, 2]], [[2, 3]]],
        methods=(evil, "b"),
        cases=(Case(evil, Path("a"), Path("b"), (Path("c"), Path("d")), (3, 4)),),
        folders={"infrared": Path(evil), "visible": Path("v"), evil: Path(evil), "b": Path("b")},
        unpaired={"visible": (evil,)},
        latencies={evil: Latency((1.0,), evil, evil, 1)},
    )
    page = make_page(evaluation, previews={evil: [PIXEL] * 4})
    assert "<img src=x" not in page
    outline = Outline(page)
    assert outline.tags.count("script") == 1
    assert all(place.startswith(("data:", "#")) for place in outline.loads)
