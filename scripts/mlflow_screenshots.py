"""Take the pictures of docs/mlflow_ui.md.

    python -m scripts.mlflow_screenshots sqlite:////path/to/mlflow.db docs/images

Start `mlflow server` over that store and open its pages in a headless Chromium. Needs chromium and
chromedriver.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from multirun_analysis.runs import Selection
from multirun_analysis.store import read_mlflow
from tests.helpers.browser import chromium, mlflow_server

WINDOW = (1560, 720)
PAGE_WAIT_S = 60.0
SHOWN_COLUMNS = (
    "generated_tokens_per_s",
    "decode_step_s",
    "batch.batch_size",
    "dtype.weights",
    "offload.device",
)
HIDDEN_COLUMNS = ("Dataset", "Source", "Models")
CHECKBOX = "contains(@class, 'tree-checkbox') and not(contains(@class, 'inner'))"
COLOURS = 64
"""Of the stored PNGs: enough for a page, and a fifth of the bytes."""


def main(uri: str, folder: Path) -> None:
    """Take every picture."""
    folder.mkdir(parents=True, exist_ok=True)
    selection = read_mlflow(uri)
    with mlflow_server(uri) as address:
        browser = chromium(WINDOW)
        try:
            take(browser, address, selection, folder)
        finally:
            browser.quit()


def take(browser: Any, address: str, selection: Selection, folder: Path) -> None:
    """Take the list of runs, the charts and the compare page."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    measured = [run for run in selection.runs if run.status == "ok"]
    experiment = str(measured[0].url).split("/experiments/")[1].split("/")[0]
    show(browser, f"{address}/#/experiments/{experiment}/runs", "matching runs")
    browser.find_element(By.XPATH, "//*[text()='Model training']").click()
    time.sleep(2)
    browser.find_element(By.CSS_SELECTOR, ".ag-row button").click()  # unfold the sweep
    time.sleep(2)
    browser.find_element(By.XPATH, "//button[contains(., 'Columns')]").click()
    for column in (*HIDDEN_COLUMNS, *SHOWN_COLUMNS):
        box = browser.find_element(By.CSS_SELECTOR, "input[placeholder='Search columns']")
        box.send_keys(Keys.CONTROL + "a")
        box.send_keys(column)
        time.sleep(0.7)
        named = f"//span[contains(@class, 'tree-title') and normalize-space(.)='{column}']"
        browser.find_element(
            By.XPATH, f"{named}/ancestor::div[contains(@class, 'treenode')]//span[{CHECKBOX}]"
        ).click()
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    time.sleep(2)
    save(browser, folder / "mlflow_runs.png")
    browser.execute_script(
        "document.querySelectorAll('input[type=radio]')[1].click()"
    )  # list, chart, table
    time.sleep(5)
    browser.find_element(By.CSS_SELECTOR, "input[placeholder='Search metric charts']").send_keys(
        "tokens_per_s"
    )
    time.sleep(4)
    save(browser, folder / "mlflow_charts.png")
    ids = quote(json.dumps([run.run_id for run in measured[:16]]))
    show(
        browser,
        f"{address}/#/compare-runs?runs={ids}&experiments={quote(json.dumps([experiment]))}",
        "Parallel Coordinates Plot",
    )
    save(browser, folder / "mlflow_compare.png")


def show(browser: Any, url: str, text: str) -> None:
    """Open a page and wait until it shows `text`; the assistant's panel is closed."""
    browser.get(url)
    deadline = time.monotonic() + PAGE_WAIT_S
    while (
        text not in browser.execute_script("return document.body.outerHTML")
        and time.monotonic() < deadline
    ):
        time.sleep(0.5)
    browser.execute_script("document.querySelector('[aria-label=\"Close\"]')?.click()")
    time.sleep(3)


def save(browser: Any, path: Path) -> None:
    """Save a small PNG."""
    from PIL import Image

    browser.save_screenshot(str(path))
    Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
