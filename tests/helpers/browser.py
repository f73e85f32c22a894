"""A headless Chromium, and `mlflow server` over a store: for tests and for the docs' pictures."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zinfer.driver.workers import free_port

SERVER_START_S = 240.0
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium(size: tuple[int, int], **capabilities: Any) -> Any:
    """Open a window of this size; the caller quits it. Needs chromium, chromedriver, selenium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, NAMES)), "")
    for argument in ARGUMENTS:
        options.add_argument(argument)
    for name, value in capabilities.items():
        options.set_capability(name, value)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    return browser


@contextmanager
def mlflow_server(uri: str) -> Iterator[str]:
    """Run `mlflow server` over the store in this block; yield its address once it answers.

    Raises:
        RuntimeError: it ended, or did not answer in time.
    """
    port = free_port()
    words = ["mlflow", "server", "--backend-store-uri", uri, "--port", str(port), "--workers", "1"]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        env={**os.environ, **quiet},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address, deadline_s = f"http://127.0.0.1:{port}", time.monotonic() + SERVER_START_S
    try:
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError("mlflow server did not start")
            time.sleep(1)
        yield address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/health", timeout=2).close()
    except (urllib.error.URLError, OSError):
        return False
    return True
