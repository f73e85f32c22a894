"""Draw the Mermaid blocks of the pages as SVG files, for the site that `make docs` builds.

    npm pack mermaid@11 && tar xzf mermaid-11*.tgz
    python scripts/draw_mermaid.py package/dist/mermaid.min.js

Forges draw Mermaid themselves. The site shows these files, so that it needs no script and no
network. Each file is named for its text: after a change of a drawing a new one is needed, and
`make docs` says so. Needs chromium and chromedriver.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DRAWINGS = ROOT / "docs" / "drawings"
FENCE = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COLOURS = {  # what Mermaid is told: what the site's theme has, so that light and dark both fit
    "#fafaf1": "var(--md-code-bg-color)",
    "#101112": "var(--md-default-fg-color)",
    "#505152": "var(--md-default-fg-color--light)",
    "#f0f0e1": "var(--md-default-bg-color)",
}
THEME = {
    "primaryColor": "#fafaf1",
    "mainBkg": "#fafaf1",
    "clusterBkg": "#f0f0e1",
    "edgeLabelBackground": "#f0f0e1",
    "primaryTextColor": "#101112",
    "textColor": "#101112",
    "titleColor": "#101112",
    "nodeTextColor": "#101112",
    "primaryBorderColor": "#505152",
    "nodeBorder": "#505152",
    "clusterBorder": "#505152",
    "lineColor": "#505152",
    "defaultLinkColor": "#505152",
    "arrowheadColor": "#505152",
    "fontFamily": "sans-serif",
}


def path_of(text: str) -> Path:
    """Name the file of a drawing for its text."""
    return DRAWINGS / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.svg"


def drawing(text: str) -> str:
    """Return the SVG of a Mermaid block as one paragraph of Markdown."""
    if not path_of(text).is_file():
        raise FileNotFoundError(
            f"{path_of(text).relative_to(ROOT)} is missing: a drawing has changed. "
            "Run scripts/draw_mermaid.py, which says how."
        )
    return f'<div class="drawing">{path_of(text).read_text().strip()}</div>'


def blocks() -> list[str]:
    """Return the text of every Mermaid block of the pages."""
    return [
        text for page in sorted(ROOT.glob("docs/*.md")) for text in FENCE.findall(page.read_text())
    ]


def themed(svg: str) -> str:
    """Take the colours of the site in place of those that Mermaid was told.

    On a narrow screen a drawing shrinks to two thirds at most: its text stays readable.
    """
    for told, taken in COLOURS.items():
        red, green, blue = (int(told[at : at + 2], 16) for at in (1, 3, 5))
        svg = re.sub(rf"{told}|rgb\({red}, ?{green}, ?{blue}\)", taken, svg, flags=re.IGNORECASE)
    svg = re.sub(
        r"max-width: ([\d.]+)px",
        lambda found: f"{found[0]}; min-width: {float(found[1]) * 0.67:.0f}px",
        svg,
        count=1,
    )
    return re.sub(r"\s*\n\s*", " ", svg)  # Markdown ends a block of HTML at an empty line


def browser() -> Any:
    """Open a headless Chromium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    return webdriver.Chrome(options=options, service=service)


def main(script: Path) -> int:
    """Draw every block that has no file yet, and remove the files of none."""
    DRAWINGS.mkdir(exist_ok=True)
    wanted = {path_of(text): text for text in blocks()}
    for path in set(DRAWINGS.glob("*.svg")) - set(wanted):
        path.unlink()
    page = browser()
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".html") as start:
            source = script.resolve().as_uri()
            start.write(f'<meta charset="utf-8"><script src="{source}"></script>')
            start.flush()
            page.get(Path(start.name).as_uri())
        settings = {
            "startOnLoad": False,
            "theme": "base",
            "themeVariables": THEME,
            "htmlLabels": False,
            "flowchart": {"htmlLabels": False},
        }
        for path, text in wanted.items():
            drawn = page.execute_async_script(
                "const done = arguments[2];"
                f"mermaid.initialize({json.dumps(settings)});"
                "mermaid.render(arguments[0], arguments[1])"
                ".then(found => done(found.svg), error => done('error: ' + error));",
                f"drawing-{path.stem}",
                text,
            )
            if drawn.startswith("error"):
                raise ValueError(drawn)
            path.write_text(themed(drawn) + "\n")
            print(path.relative_to(ROOT))
    finally:
        page.quit()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
