"""The pages as a site, as `make docs` builds it: complete, without lost links, and offline."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import draw_mermaid

ROOT = Path(__file__).parents[1]
PARTS = ("docs", "scripts", "mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
ASKED_OF_A_SERVER = re.compile(
    r"<(?:script|img|iframe|link[^>]*?rel=\"?(?:stylesheet|icon|preconnect)\"?)[^>]*?"
    r"(?:src|href)=\"?(https?://[^\"\s>]+)"
)
PHONE, DESKTOP = 400, 1280


def build(checkout: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout into a folder, as `make docs` does."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Copy what the site is made of, to be changed by a test."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tmp_path / part)
        else:
            shutil.copy(ROOT / part, tmp_path / part)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "README.md", tmp_path / "tests")
    return tmp_path


def test_every_page_of_the_checkout_is_in_the_site(site: Path) -> None:
    wanted = {path.stem for path in ROOT.glob("docs/*.md")} - {"README"}
    wanted |= {"index", "contributing", "changes", "tests"}
    assert wanted <= {path.stem for path in site.glob("*.html")}


def test_no_page_asks_a_server_for_anything(site: Path) -> None:
    asked = {
        (path.name, url)
        for path in site.glob("*.html")
        for url in ASKED_OF_A_SERVER.findall(path.read_text())
    }
    assert asked == set()


def test_drawings_are_in_the_page_and_take_the_colours_of_its_theme(site: Path) -> None:
    page = (site / "architecture.html").read_text()
    assert "<svg" in page and "calibration</tspan>" in page
    assert 'class="mermaid"' not in page
    assert "var(--md-default-fg-color)" in page


def test_every_drawing_is_current() -> None:
    wanted = {draw_mermaid.path_of(text) for text in draw_mermaid.blocks()}
    assert set(draw_mermaid.DRAWINGS.glob("*.svg")) == wanted


@pytest.mark.parametrize(
    ("page", "line", "wanted"),
    [
        ("docs/gpu.md", "[lost](no_page.md)", "no_page.md"),
        ("docs/gpu.md", "[lost](sweeps.md#no-such-part)", "no-such-part"),
        ("README.md", "![lost](docs/images/no_picture.png)", "no_picture.png"),
        ("docs/gpu.md", "```mermaid\nflowchart LR\n a --> b\n```", "a drawing has changed"),
    ],
)
def test_a_lost_link_or_a_drawing_without_its_file_ends_the_build(
    copy: Path, page: str, line: str, wanted: str
) -> None:
    (copy / page).write_text(f"{(copy / page).read_text()}\n{line}\n")
    done = build(copy, copy / "site")
    assert done.returncode != 0
    assert wanted in done.stdout + done.stderr


def test_a_page_that_the_navigation_lacks_ends_the_build(copy: Path) -> None:
    (copy / "docs" / "forgotten.md").write_text("# Forgotten\n")
    done = build(copy, copy / "site")
    assert done.returncode != 0
    assert "forgotten.md" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.browser
def test_pages_and_their_search_work_from_a_folder(site: Path, tmp_path: Path) -> None:
    """Open pages in Chromium: nothing wider than a phone, no error, and the search finds."""
    if not shutil.which("chromedriver"):
        pytest.skip("needs chromedriver: apt-get install chromium-driver")
    pictures = Path(os.environ.get("BROWSER_SCREENSHOTS") or tmp_path)
    browser = draw_mermaid.browser()
    try:
        for name in ("index", "architecture", "choosing"):
            for width in (DESKTOP, PHONE):
                size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
                browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
                browser.get((site / f"{name}.html").as_uri())
                wide = browser.execute_script("return document.documentElement.scrollWidth")
                browser.save_screenshot(str(pictures / f"site_{name}_{width}.png"))
                assert wide <= width, name
        size["width"] = DESKTOP
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_script("document.querySelector('.md-search__input').focus()")
        browser.find_element("css selector", ".md-search__input").send_keys("prefetch")
        deadline, found = time.monotonic() + 60, ""
        while "document" not in found and time.monotonic() < deadline:
            found = browser.find_element("css selector", ".md-search-result__meta").text
        assert re.match(r"\d+ matching documents", found)
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        browser.quit()
