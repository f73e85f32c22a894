"""report.html and MLflow's compare page in a real browser.

No request leaves the page, no console error, the table sorts and filters.

Screenshots are kept in the folder that BROWSER_SCREENSHOTS names, else in the test's own.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from multirun_analysis.report import write_report
from multirun_analysis.runs import Selection
from multirun_analysis.store import read_mlflow
from tests.helpers.browser import chromium, mlflow_server
from tests.helpers.report_gallery import STORIES, make_story
from tests.helpers.synthetic_store import make_store

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PHONE, DESKTOP = (400, 800), (1280, 900)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_store(tmp_path_factory.mktemp("store"), runs=200)


@pytest.fixture(scope="module")
def page(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    write_report(read_mlflow(store), out)
    return out / "report.html"


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("BROWSER_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def open_browser() -> Iterator[Callable[[tuple[int, int]], Any]]:
    """Open Chromium windows of a size; all are closed at the end."""
    pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    if shutil.which("chromedriver") is None:
        pytest.skip("needs chromedriver: apt-get install chromium-driver")
    opened = []

    def open_(size: tuple[int, int]) -> Any:
        logs = {"goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        opened.append(chromium(size, **logs))
        return opened[-1]

    yield open_
    for browser in opened:
        browser.quit()


def requests_of(browser: Any) -> list[str]:
    """Return every URL that the page asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]


def visible_column(browser: Any, head: str) -> list[str]:
    """Return the texts of one column of the runs table, top to bottom, hidden rows left out."""
    return browser.execute_script(  # type: ignore[no-any-return]
        """const table = document.getElementById('runs');
        const heads = [...table.tHead.rows[0].cells].map(cell => cell.textContent.trim());
        const column = heads.indexOf(arguments[0]);
        return [...table.tBodies[0].rows].filter(row => !row.hidden)
            .map(row => row.cells[column].textContent);""",
        head,
    )


def click_head(browser: Any, head: str) -> None:
    from selenium.webdriver.common.by import By

    browser.find_element(By.XPATH, f"//table[@id='runs']//th/button[text()='{head}']").click()


def median(text: str) -> float:
    """Read '1,235 ± 25' as 1235.0."""
    return float(text.split(" ")[0].replace(",", ""))


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_opens_without_network_or_console_error(
    size: tuple[int, int], page: Path, open_browser: Callable[..., Any], screenshots: Path
) -> None:
    browser = open_browser(size)
    browser.get(page.as_uri())
    asked = [url for url in requests_of(browser) if not url.startswith("data:")]
    assert asked == [page.as_uri()]
    assert browser.get_log("browser") == []
    assert (
        browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    )  # nothing sticks out sideways
    browser.save_screenshot(str(screenshots / f"report-{size[0]}.png"))


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_figures_are_visible(
    size: tuple[int, int], page: Path, open_browser: Callable[..., Any], screenshots: Path
) -> None:
    browser = open_browser(size)
    browser.get(page.as_uri())
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('.panels svg')].map(svg => { "
        "const box = svg.getBoundingClientRect(); "
        "return [box.width, box.height, box.right, svg.querySelectorAll('path').length]; })"
    )
    assert len(boxes) >= 10
    for width, height, right, paths in boxes:
        assert width >= 300 and height >= 100 and paths > 5
        assert right <= size[0]
    browser.execute_script("document.getElementById('figures').scrollIntoView()")
    browser.save_screenshot(str(screenshots / f"figures-{size[0]}.png"))


def test_the_table_sorts_both_ways_with_unknown_values_last(
    page: Path, open_browser: Callable[..., Any]
) -> None:
    browser = open_browser(DESKTOP)
    browser.get(page.as_uri())
    click_head(browser, "tokens/s")  # numbers: the largest first
    rates = visible_column(browser, "tokens/s")
    known = [median(text) for text in rates if text != "-"]
    assert known == sorted(known, reverse=True) and len(known) > 50
    assert set(rates[len(known) :]) == {"-"}
    click_head(browser, "tokens/s")
    assert visible_column(browser, "tokens/s")[: len(known)] == [
        text for text in reversed(rates) if text != "-"
    ]
    click_head(browser, "batch")
    batches = [int(text) for text in visible_column(browser, "batch")]
    assert batches == sorted(batches, reverse=True)
    click_head(browser, "model")
    models = visible_column(browser, "model")
    assert models == sorted(models)


def test_the_table_filters_by_words_and_by_how_runs_ended(
    page: Path, open_browser: Callable[..., Any], screenshots: Path
) -> None:
    from selenium.webdriver.common.by import By

    browser = open_browser(DESKTOP)
    browser.get(page.as_uri())
    everything = len(visible_column(browser, "model"))
    browser.find_element(By.CSS_SELECTOR, "[data-filter=runs]").send_keys("opt-66b nvme")
    assert set(visible_column(browser, "model")) == {"opt-66b"}
    assert set(visible_column(browser, "weights on")) == {"nvme"}
    shown = len(visible_column(browser, "model"))
    assert (
        browser.find_element(By.CSS_SELECTOR, "[data-count=runs]").text
        == f"{shown} of {everything} rows"
    )
    browser.find_element(
        By.XPATH, "//button[@class='chip' and @data-status='does not fit']"
    ).click()
    assert set(visible_column(browser, "status")) <= {"does not fit"}
    browser.save_screenshot(str(screenshots / "filtered.png"))
    browser.find_element(
        By.XPATH, "//button[@class='chip' and @data-status='does not fit']"
    ).click()
    browser.find_element(By.CSS_SELECTOR, "[data-filter=runs]").clear()
    browser.execute_script(
        "document.querySelector('[data-filter=runs]').dispatchEvent(new Event('input'))"
    )
    assert len(visible_column(browser, "model")) == everything


def test_dark_and_light_are_both_readable(
    page: Path, open_browser: Callable[..., Any], screenshots: Path
) -> None:
    from selenium.webdriver.common.by import By

    browser = open_browser(DESKTOP)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    browser.get(page.as_uri())

    def colours() -> list[list[int]]:
        script = """const style = getComputedStyle(document.body);
        const text = document.querySelector('.panels svg text');
        const rgb = colour => colour.match(/\\d+/g).slice(0, 3).map(Number);
        return [style.backgroundColor, style.color, getComputedStyle(text).fill].map(rgb);"""
        return browser.execute_script(script)  # type: ignore[no-any-return]

    paper, ink, figure_text = colours()
    assert sum(paper) < 100 and sum(ink) > 600 and figure_text == ink
    browser.save_screenshot(str(screenshots / "report-dark.png"))
    browser.find_element(By.ID, "theme").click()
    paper, ink, figure_text = colours()
    assert sum(paper) > 700 and sum(ink) < 150 and figure_text == ink


@pytest.mark.parametrize("story", [*STORIES, "many"])
def test_every_kind_of_report_is_laid_out(
    story: str, open_browser: Callable[..., Any], screenshots: Path, tmp_path: Path
) -> None:
    """One run, one batch, many, failures, plans only: wide and narrow, light and dark."""
    write_report(read_mlflow(make_story(story, tmp_path / "store")), tmp_path / "out")
    for size in (DESKTOP, PHONE):
        browser = open_browser(size)
        for mode in ("light", "dark"):
            media = {"features": [{"name": "prefers-color-scheme", "value": mode}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            browser.get((tmp_path / "out" / "report.html").as_uri())
            width = browser.execute_script("return document.documentElement.scrollWidth")
            assert width <= size[0]
            browser.save_screenshot(str(screenshots / f"{story}-{size[0]}-{mode}.png"))
        assert browser.get_log("browser") == []


# MLflow's own pages


@pytest.fixture(scope="module")
def server(store: str) -> Iterator[str]:
    """Start `mlflow server` over the store; return its address."""
    with mlflow_server(store) as address:
        yield address


def test_mlflow_compares_our_runs_side_by_side(
    server: str, open_browser: Callable[..., Any], screenshots: Path
) -> None:
    selection: Selection = read_mlflow(server)
    chosen = [
        run
        for run in selection.runs
        if run.params.get("model.name") == "llama-3-70b" and run.status == "ok"
    ][:6]
    assert len(chosen) == 6
    ids = quote(json.dumps([run.run_id for run in chosen]))
    experiment = chosen[0].url.split("/experiments/")[1].split("/")[0] if chosen[0].url else "1"
    browser = open_browser(DESKTOP)
    browser.get(f"{server}/#/compare-runs?runs={ids}&experiments={quote(json.dumps([experiment]))}")
    deadline = time.monotonic() + 120
    text = ""
    while time.monotonic() < deadline and not all(
        part in text for part in ("offload.device", "generated_tokens_per_s")
    ):
        time.sleep(1)
        text = browser.execute_script("return document.body.innerText")
    for part in (
        "offload.device",
        "dtype.weights",
        "batch.batch_size",
        "generated_tokens_per_s",
        "decode_step_s",
    ):
        assert part in text
    assert not [
        url for url in requests_of(browser) if url.startswith("http") and not url.startswith(server)
    ]
    browser.save_screenshot(str(screenshots / "mlflow-compare.png"))
