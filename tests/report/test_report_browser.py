"""The report's page in headless Chromium, loaded from disk. Skipped if no Chromium is installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_samples import SPEC, config, make_record
from report_samples import write_page

from parallax_gen.codegen.render import render
from parallax_gen.memory.store import Store
from parallax_gen.problem.hardware import gpu_by_name

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'")

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))),
    None,
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

# Figures that must exist, and selectors of their content.
FIGURES = {
    "#overview .card": ".bar rect",
    "#overview .versus": "rect",
    "#tuned .tile": ".bar rect",
    "#tuned .matrix": ".cell",
    "#speed .matrix": ".cell",
    "#roofline .chart": ".mark",
    "#trials .chart": ".dots",
    "#knobs .chart": ".weight",
    "#failures tbody": ".bar rect",
    "#kernels details": "tbody tr",
}
PAPER = {"light": "rgb(251, 251, 249)", "dark": "rgb(14, 17, 22)"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # No sandbox: tests in containers run as root, and the page is our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def report(store: Store, tmp_path: Path) -> Path:
    store.save(make_record(150.0))
    return write_page(store, tmp_path)


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The page at a laptop's size. Any other request, console message or error of the page fails the test."""
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: request.url == report.as_uri() or complaints.append(request.url))
    page.goto(report.as_uri())
    yield page
    page.close()
    assert complaints == []


def visible(page: Any, selector: str) -> int:
    return sum(element.is_visible() for element in page.query_selector_all(selector))


def background(page: Any) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def choose(page: Any, name: str, value: str) -> None:
    page.locator(f"input[name={name}][value='{value}'] + span").click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_exists_in_both_colour_schemes(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    assert background(page) == PAPER[scheme]
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    for figures, content in FIGURES.items():
        found = page.query_selector_all(figures)
        assert found, figures
        for figure in found:
            box = figure.bounding_box()
            assert figure.is_visible(), figures
            assert box["width"] > 50, figures
            assert box["height"] > 20, figures
            assert figure.query_selector(content), figures


def test_text_has_enough_contrast_in_both_colour_schemes(page: Any) -> None:
    """A contrast of 4.5 between text and background (WCAG 2) in every class of cell."""
    ratio = """(element) => {
        const light = (color) => {
            const [r, g, b] = color.match(/[\\d.]+/g).map((part) => part / 255)
                .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const style = getComputedStyle(element);
        const [low, high] = [light(style.color), light(style.backgroundColor)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    }"""
    for scheme in PAPER:
        page.emulate_media(color_scheme=scheme)
        cells = page.query_selector_all(".scale .cell")
        assert len(cells) == 7 + 8
        for cell in cells:
            assert cell.evaluate(ratio) >= 4.5, (scheme, cell.get_attribute("class"))


@pytest.mark.parametrize("width", [1280, 1440, 390])
def test_nothing_is_wider_than_the_window(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_filters_change_what_is_shown(page: Any) -> None:
    def shown() -> dict[str, int]:
        return {s: visible(page, s) for s in (".tile", "#tuned .matrix", "svg.roofline .mark", "#kernels details")}

    everything = shown()
    assert all(everything.values())
    choose(page, "gpu", "h100")
    h100 = shown()
    assert all(0 < h100[s] < everything[s] for s in everything)
    assert page.locator("#tuned h4:visible").all_inner_texts() == ["h100"] * visible(page, "#tuned .op")
    assert page.locator("#trials .nothing").is_visible()  # this card has no trials
    choose(page, "gpu", "")
    choose(page, "op", "dkdv")
    assert page.locator("#tuned h3:visible").count() == 1
    assert visible(page, "#kernels details") == 1
    choose(page, "op", "")
    page.fill("input[name=text]", "GQA 4:1  decode")
    assert 0 < shown()["#tuned .matrix"] < everything["#tuned .matrix"]
    page.fill("input[name=text]", "no such kernel")
    assert set(shown().values()) == {0}
    assert visible(page, ".nothing") == 7
    page.fill("input[name=text]", "")
    assert shown() == everything


def test_the_default_theme_is_the_systems(page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    button = page.locator("#theme")
    assert button.inner_text() == "Theme: system"
    for theme, paper in (("light", "light"), ("dark", "dark"), ("system", "dark")):
        button.click()
        assert button.inner_text() == f"Theme: {theme}"
        assert background(page) == PAPER[paper]
    button.click()
    page.reload()
    assert background(page) == PAPER["light"]  # the chosen theme persists


def test_a_cell_links_to_its_kernel_and_source(page: Any) -> None:
    cell = page.locator("#tuned a.cell[data-tip*='150.0 µs']")
    cell.hover()
    assert "N32 H8 S2 last w1 s4" in page.locator("#tip").inner_text()
    page.fill("input[name=text]", "head_dim 128")
    cell.click()
    row = page.locator(f"tr{cell.get_attribute('href')}")
    assert row.is_visible()
    assert "150.0" in row.inner_text()
    row.locator("button.source").click()
    source = page.locator(".code-row pre")
    source.wait_for()
    assert source.evaluate("(pre) => pre.textContent") == render(SPEC, config(2), gpu_by_name("h200")).text
    row.locator("button.source").click()
    assert source.count() == 0
