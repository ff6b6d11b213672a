"""The page in a real browser: sorting, the divider, colours, narrow screens, no network."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from fuseengine.evaluation.pairing import pair_folders
from fuseengine.evaluation.previews import make_previews, plan_previews
from fuseengine.evaluation.published import published_tables
from fuseengine.evaluation.report import make_page
from fuseengine.evaluation.run import Latency, measure

from .conftest import picture, save

pytestmark = pytest.mark.slow

METRICS = ("EN", "SD", "VIF", "MSE")
NAMES = ("a1", "a2", "a10", "b1")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A headless Chromium of its own profile."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("needs the programs chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "headless",
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{argument}")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = selenium.ChromeService(chromedriver)
    browser = selenium.Chrome(options=options, service=service)
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page of two methods, measured, with published numbers, latency and pictures."""
    folder = tmp_path_factory.mktemp("page")
    for index, name in enumerate(NAMES):
        ir, vis = picture(index, (120, 160)), picture(10 + index, (120, 160), 3)
        save(folder / "ir" / f"{name}.png", ir)
        save(folder / "vis" / f"{name}.png", vis)
        save(folder / "high" / f"{name}.png", np.maximum(ir, vis[..., 0]))
        save(folder / "low" / f"{name}.png", np.minimum(ir, vis[..., 0]))
    pairing = pair_folders(
        folder / "ir", folder / "vis", {name: folder / name for name in ("high", "low")}
    )
    evaluation = measure(pairing, metrics=METRICS, jobs=1)
    evaluation.values[1, 2, 2] = np.nan
    evaluation.latencies["high"] = Latency((1.0, 2.0, 4.0), "a machine", "an engine", 1)
    previews = {
        task.case.name: make_previews(task) for task in plan_previews(evaluation.cases, None, 5)
    }
    path = folder / "index.html"
    path.write_text(make_page(evaluation, published_tables("tno"), previews), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def open_page(driver, address):
    """Opens the page in a colour scheme and width; afterwards the console must be empty."""

    def open_page(scheme="light", width=1280):
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )
        driver.get(address)
        return driver

    yield open_page
    assert driver.get_log("browser") == []


def column(driver, table, title):
    """Texts and sort state of a column of the table in a section."""
    return driver.execute_script(
        """
        const table = document.querySelector(arguments[0] + " table");
        const head = [...table.tHead.rows[0].cells].find(
            (cell) => cell.querySelector("button").textContent.trim().startsWith(arguments[1]));
        return {
          values: [...table.tBodies].map((body) => [...body.rows]
            .filter((row) => !row.classList.contains("group") && !row.hidden)
            .map((row) => row.cells[head.cellIndex].innerText.trim())),
          sort: head.getAttribute("aria-sort"),
          groups: [...table.tBodies].map((body) => body.rows[0].className),
        };
        """,
        table,
        title,
    )


def button(driver, table, title):
    path = f'//section[@id="{table}"]//th/button[starts-with(normalize-space(), "{title}")]'
    return driver.find_element("xpath", path)


class TestSorting:
    def test_numbers_best_first_then_the_other_way(self, open_page):
        driver = open_page()
        before = column(driver, "#images", "SD")
        assert before["sort"] == "none"
        button(driver, "images", "SD").click()
        down = column(driver, "#images", "SD")
        values = [float(text) for text in down["values"][0]]
        assert down["sort"] == "descending"
        assert values == sorted(values, reverse=True) != [float(v) for v in before["values"][0]]
        button(driver, "images", "SD").click()
        up = column(driver, "#images", "SD")
        assert up["sort"] == "ascending" and up["values"][0] == down["values"][0][::-1]

    def test_lower_is_better_begins_at_the_least(self, open_page):
        driver = open_page()
        button(driver, "images", "MSE").click()
        found = column(driver, "#images", "MSE")
        assert found["sort"] == "ascending"
        values = [float(text) for text in found["values"][0]]
        assert values == sorted(values)
        # The others say that they do not sort any more.
        button(driver, "images", "SD").click()
        assert column(driver, "#images", "MSE")["sort"] == "none"

    @pytest.mark.parametrize("clicks", [1, 2])
    def test_undefined_values_come_last(self, open_page, clicks):
        driver = open_page()
        for _ in range(clicks):
            button(driver, "images", "VIF").click()
        assert column(driver, "#images", "VIF")["values"][0][-1] == "undefined"

    def test_names_in_natural_order_by_keyboard(self, open_page):
        driver = open_page()
        button(driver, "images", "image").send_keys("\ue007")  # Enter
        assert column(driver, "#images", "image")["values"][0][::2] == ["a1", "a2", "a10", "b1"]

    def test_groups_stay_together(self, open_page):
        driver = open_page()
        before = column(driver, "#published", "EN")
        button(driver, "published", "EN").click()
        after = column(driver, "#published", "EN")
        assert after["groups"] == before["groups"] == ["group"] * 3
        for rows, others in zip(before["values"], after["values"], strict=True):
            assert sorted(rows) == sorted(others)
        printed = [float(text) for text in after["values"][1]]
        assert printed == sorted(printed, reverse=True) and len(printed) == 14

    def test_filter_by_method(self, open_page):
        driver = open_page()
        assert len(column(driver, "#images", "method")["values"][0]) == 8
        driver.find_element("css selector", "#method option:nth-child(3)").click()
        assert column(driver, "#images", "method")["values"][0] == ["low"] * 4


def stage(driver, index=1):
    """The first pair's stage: clip of the left picture, place of the line, labels."""
    return driver.execute_script(
        """
        const stage = document.querySelector(`#pair-${arguments[0]} .stage`);
        const left = stage.querySelector("img.left");
        const line = stage.querySelector(".line").getBoundingClientRect();
        const box = stage.getBoundingClientRect();
        return {
          clip: getComputedStyle(left).clipPath,
          line: (line.left + line.width / 2 - box.left) / box.width,
          labels: [...stage.querySelectorAll(".tag")].map((tag) => tag.textContent),
          name: stage.querySelector("input").getAttribute("aria-label"),
          sizes: [...stage.querySelectorAll("img")].map((image) => [image.width, image.height]),
          loaded: [...stage.querySelectorAll("img")].every((image) => image.naturalWidth === 160),
        };
        """,
        index,
    )


class TestPictures:
    @pytest.fixture
    def slider(self, open_page):
        driver = open_page()
        driver.execute_script("document.getElementById('pairs').scrollIntoView()")
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(driver, 20).until(
            lambda d: d.find_element("css selector", "#pair-1 .stage input")
        )

    def test_three_pictures_and_a_stage(self, slider, driver):
        found = stage(driver)
        assert found["labels"] == ["infrared", "high"] and found["loaded"]
        assert found["sizes"][0] == found["sizes"][1]
        texts = driver.execute_script(
            "return [...document.querySelectorAll('#pair-1 .strip img')].map((i) => i.alt)"
        )
        assert texts == [f"a1, {role}" for role in ("infrared", "visible", "high", "low")]

    def test_keyboard_moves_the_clip(self, slider, driver):
        assert stage(driver)["clip"] == "inset(0px 50% 0px 0px)"
        slider.send_keys("\ue014" * 5)  # right arrow
        moved = stage(driver)
        assert moved["clip"] == "inset(0px 45% 0px 0px)"
        assert moved["line"] == pytest.approx(0.55, abs=0.005)
        slider.send_keys("\ue011")  # Home
        assert stage(driver)["clip"] == "inset(0px 100% 0px 0px)"
        assert slider.get_attribute("aria-valuetext") == "0 %"

    @pytest.mark.parametrize("place", [0.2, 0.8])
    def test_a_click_moves_it_there(self, slider, driver, place):
        from selenium.webdriver import ActionChains

        width = slider.rect["width"]
        ActionChains(driver).move_to_element_with_offset(
            slider, int((place - 0.5) * width), 0
        ).click().perform()
        assert stage(driver)["line"] == pytest.approx(place, abs=0.02)

    def test_other_pictures_can_be_chosen(self, slider, driver):
        driver.find_element("css selector", "#left option:nth-child(4)").click()
        found = stage(driver)
        assert found["labels"] == ["low", "high"]
        assert found["name"] == "a1: divider, low left, high right"

    def test_a_name_leads_to_its_pictures(self, open_page):
        driver = open_page()
        driver.find_element("link text", "b1").click()
        place = driver.execute_script(
            "return document.getElementById('pair-4').getBoundingClientRect().top"
        )
        assert -50 < place < 900


def test_a_box_plot_per_metric(open_page):
    driver = open_page()
    found = driver.execute_script(
        """
        return [...document.querySelectorAll("#plots svg")].map((svg) => ({
          label: svg.getAttribute("aria-label"),
          boxes: svg.querySelectorAll(".box rect").length,
          points: svg.querySelectorAll("circle").length,
          width: svg.getBoundingClientRect().width,
        }));
        """
    )
    assert [plot["label"].split(".")[0] for plot in found] == [f"Box plot of {k}" for k in METRICS]
    assert all(plot["boxes"] == 2 and plot["width"] > 200 for plot in found)
    assert [plot["points"] for plot in found] == [8, 8, 7, 8]


_CONTRAST = """
const lightness = (text) => {
  const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((part) => {
    const x = part / 255;
    return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (!/^rgba\\(.*, 0\\)$/.test(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
};
const found = [];
for (const element of document.querySelectorAll("main *, header *, footer *")) {
  const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !element.checkVisibility() || element.closest(".stage, select, .hidden")) continue;
  const style = getComputedStyle(element);
  const ink = element.closest("svg") ? style.fill : style.color;
  const [x, y] = [lightness(ink), lightness(ground(element))].sort((a, b) => b - a);
  const ratio = (x + 0.05) / (y + 0.05);
  if (ratio < 4.5) found.push([element.tagName, element.textContent.slice(0, 30), ink, ratio]);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(open_page, scheme):
    driver = open_page(scheme)
    ground = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    lightest = max(int(part) for part in ground[4:-1].split(","))
    assert (lightest > 200) == (scheme == "light")
    assert driver.execute_script(_CONTRAST) == []


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_screen_overflows(open_page, width):
    driver = open_page(width=width)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    # Wide tables scroll by themselves, by keyboard too.
    scrolls = driver.execute_script(
        "return [...document.querySelectorAll('.scroll')].map((e) => [e.tabIndex, e.role])"
    )
    assert scrolls and all(found == [0, "region"] for found in scrolls)


def test_nothing_is_loaded(open_page):
    driver = open_page()
    loaded = driver.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert [name for name in loaded if not name.startswith("data:")] == []


def test_controls_have_names(open_page):
    driver = open_page()
    driver.execute_script("document.getElementById('pairs').scrollIntoView()")
    nameless = driver.execute_script(
        """
        return [...document.querySelectorAll("button, select, input, img, svg, .scroll")]
          .filter((e) => !(e.ariaLabel || e.alt || e.textContent.trim() ||
                           (e.labels && e.labels.length && e.labels[0].textContent.trim())))
          .map((e) => e.outerHTML.slice(0, 80));
        """
    )
    assert nameless == []


def test_prints_without_what_cannot_be_printed(open_page):
    driver = open_page()
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        shown = driver.execute_script(
            "return ['nav', '#method', '#means table', '.strip img'].map("
            "(s) => document.querySelector(s).checkVisibility())"
        )
        assert shown == [False, False, True, True]
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
