"""Take the pictures of docs/mlflow_ui.md.

    python scripts/mlflow_screenshots.py sqlite:////path/to/mlflow.db docs/images

Start `mlflow server` over that store and open its pages in a headless Chromium. Needs chromium and
chromedriver.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

from multirun_analysis.runs import Selection
from multirun_analysis.store import read_mlflow
from zinfer.driver.workers import free_port

WINDOW = (1560, 720)
PAGE_WAIT_S = 60.0
SERVER_WAIT_S = 240.0
SHOWN_COLUMNS = (
    "generated_tokens_per_s",
    "decode_step_s",
    "model.name",
    "offload.device",
    "batch.batch_size",
)
HIDDEN_COLUMNS = ("Dataset", "Source", "Models")
CHECKBOX = "contains(@class, 'tree-checkbox') and not(contains(@class, 'inner'))"
COLOURS = 64
"""Of the stored PNGs: enough for a page, and a fifth of the bytes."""


def main(uri: str, folder: Path) -> None:
    """Take every picture."""
    folder.mkdir(parents=True, exist_ok=True)
    selection = read_mlflow(uri)
    server, address = start_server(uri)
    try:
        browser = open_browser()
        try:
            take(browser, address, selection, folder)
        finally:
            browser.quit()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


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
    metrics = browser.find_elements(By.CSS_SELECTOR, "input[role=combobox]")[1]
    metrics.send_keys(Keys.BACKSPACE + "generated_tokens_per_s")
    time.sleep(1)
    metrics.send_keys(Keys.ENTER + Keys.ESCAPE)
    time.sleep(3)
    save(browser, folder / "mlflow_compare.png")


def start_server(uri: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start a small server process; return it and its address once it answers."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    env = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    server = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SERVER_WAIT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
            return server, address
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise RuntimeError("mlflow server did not start")


def open_browser() -> Any:
    """Open a headless Chromium of one size."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ):
        options.add_argument(argument)
    browser = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )
    metrics = {"width": WINDOW[0], "height": WINDOW[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    return browser


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
