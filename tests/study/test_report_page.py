"""The report in a real browser: what a reader sees, clicks and copies."""

from __future__ import annotations

import json
import shutil

import pytest

from intrafuse.study.demo import run_demo

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
GROUPS = "section[data-kind=pruning] >> nth=0 >> table >> nth=1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, epochs=1, shares=[0.3, 0.5], points=3)
    return folder


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with driver.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def opened(browser, folder):
    """Open the page as asked; whatever the console or a request complains of fails the test."""
    contexts, complaints = [], []

    def open_page(width=1280, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        page.goto((folder / "report.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_has_a_size_and_the_page_fits(opened, width, scheme):
    page = opened(width, scheme)
    sizes = page.eval_on_selector_all(
        "figure svg", "all => all.map(x => [x.clientWidth, x.clientHeight])"
    )
    assert len(sizes) >= 10
    assert all(w > 250 and h > 60 and w <= width for w, h in sizes)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, back = page.evaluate(
        """() => ["color", "backgroundColor"].map(
            x => getComputedStyle(document.body)[x].match(/\\d+/g).map(Number)[0])"""
    )
    assert (ink > 200 and back < 60) if scheme == "dark" else (ink < 60 and back > 200)
    label = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert label == page.evaluate("getComputedStyle(document.body).color")


def test_figures_have_words(opened):
    page = opened()
    described = page.eval_on_selector_all(
        "figure [role=img]",
        """all => all.map(x => ["aria-labelledby", "aria-describedby"].map(
            a => document.getElementById(x.getAttribute(a)).textContent.length))""",
    )
    assert described and all(title > 5 and words > 20 for title, words in described)


def rows(page, selector):
    """Read a table: the value of every cell, in full precision where it is a number."""
    return page.locator(selector).evaluate(
        """table => [...table.tBodies[0].rows].map(row => [...row.cells].map(
            cell => cell.dataset.value === undefined
                ? cell.textContent : Number(cell.dataset.value)))"""
    )


def test_tables_hold_the_numbers_of_the_json(opened, folder):
    page = opened()
    told = json.loads((folder / "comparison.json").read_text())
    names = ["method", "channels_removed", "params", "params_removed"]
    names += ["macs", "macs_removed", "accuracy", "seconds"]
    found = rows(page, "section[data-kind=comparison] table")
    assert found[0][6] == told["original"]["accuracy"]
    assert found[1:] == [[row[name] for name in names] for row in told["rows"]]
    told = json.loads((folder / "cost.json").read_text())
    found = rows(page, "section[data-kind=cost] table")
    assert [row[4] for row in found] == [row["peak"] for row in told["rows"]]
    told = json.loads((folder / "sensitivity.json").read_text())
    found = rows(page, "section[data-kind=sensitivity] table")
    accuracies = [row["accuracies"] for row in told["rows"]]
    assert [row[2 : 2 + len(accuracies[0])] for row in found] == accuracies


def test_a_click_sorts_the_table_of_groups(opened):
    page = opened()
    before = rows(page, GROUPS)
    button = page.locator(GROUPS).locator("th button", has_text="before")
    button.click()
    sizes = [row[2] for row in rows(page, GROUPS)]
    assert sizes == sorted(sizes) and len(set(sizes)) > 1
    assert page.locator(GROUPS).locator("th[aria-sort=ascending]").count() == 1
    button.press("Enter")  # by the keyboard too
    sizes = [row[2] for row in rows(page, GROUPS)]
    assert sizes == sorted(sizes, reverse=True)
    assert sorted(map(str, rows(page, GROUPS))) == sorted(map(str, before))
    seconds = page.locator("section[data-kind=comparison] th button", has_text="seconds")
    for _ in range(2):  # what is unknown goes last, both ways
        seconds.click()
        assert rows(page, "section[data-kind=comparison] table")[-1][0] == "unpruned"
    page.locator(GROUPS).locator("th button", has_text="group").click()
    names = [row[1] for row in rows(page, GROUPS)]
    assert names == sorted(names)


def test_numbers_can_be_copied(opened, folder):
    page = opened()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("section[data-kind=comparison] .copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    lines = page.evaluate("navigator.clipboard.readText()").splitlines()
    told = json.loads((folder / "comparison.json").read_text())
    assert float(lines[2].split("\t")[6]) == told["rows"][0]["accuracy"]


def test_print_shows_whole_tables_and_no_buttons(opened):
    page = opened()
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible() and not page.locator(".copy").first.is_visible()
    hidden = page.eval_on_selector_all(
        ".scroll", "all => all.filter(x => x.scrollHeight > x.clientHeight + 1).length"
    )
    assert hidden == 0
    assert page.locator("section > details > pre").first.is_visible()  # the recipe
    assert not page.locator("figure summary").first.is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")
