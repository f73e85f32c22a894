"""Take the picture of a report that README shows.

    python scripts/report_picture.py reports/DATE-TIME/report.html docs/images/report.png

Open the page in a headless Chromium and keep its first screens as a small PNG. Needs chromium and
chromedriver.
"""

from __future__ import annotations

import base64
import io
import sys
import time
from pathlib import Path

from draw_mermaid import browser

WIDTH, HEIGHT = 1280, 1440
COLOURS = 96
"""Colours of the stored PNG: enough for the page, and a fifth of the bytes."""


def main(page: Path, picture: Path) -> None:
    """Take the picture."""
    from PIL import Image

    chromium = browser()
    try:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        chromium.get(page.resolve().as_uri())
        chromium.execute_script("document.documentElement.style.scrollbarWidth = 'none'")
        time.sleep(2)
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1}
        taken = chromium.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip})
    finally:
        chromium.quit()
    image = Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")
    picture.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(COLOURS).save(picture, optimize=True)
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
