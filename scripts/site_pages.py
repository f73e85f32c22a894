"""Fit the checkout's pages into the site that `make docs` builds: a hook of mkdocs.

Pages outside docs/ come in, links are turned to where pages are in the site, and Mermaid drawings
become the SVG files of docs/drawings, so that a page asks nothing of the network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from draw_mermaid import FENCE, drawing

ROOT = Path(__file__).parents[1]
OUTSIDE = {  # the page in the site: its file in the checkout
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "tests.md": "tests/README.md",
    "changes.md": "CHANGELOG.md",
}
IN_SITE = {source: page for page, source in OUTSIDE.items()} | {"docs/README.md": "index.md"}
SHIM = "https://unpkg.com/iframe-worker/shim"
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside docs/."""
    from mkdocs.structure.files import File

    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links and drawings of one page into the site's."""
    from mkdocs.exceptions import PluginError

    source = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    try:
        return FENCE.sub(lambda found: drawing(found[1]), relinked(markdown, source))
    except FileNotFoundError as missing:
        raise PluginError(str(missing)) from missing


def relinked(markdown: str, source: str) -> str:
    """Turn links between files of the checkout into links between pages of the site.

    `source` is the page's own file, relative to the checkout. A link to a file that is no page is
    left as it is: strict mode then names it.
    """

    def turned(found: re.Match[str]) -> str:
        before, target, anchor, after = found.groups(default="")
        if re.match(r"\w+:", target):
            return found[0]
        path = (ROOT / source).parent.joinpath(target).resolve()
        if not path.is_relative_to(ROOT):
            return found[0]
        name = path.relative_to(ROOT).as_posix()
        return f"{before}{IN_SITE.get(name, name.removeprefix('docs/'))}{anchor}{after}"

    return LINK.sub(turned, markdown)


def on_post_page(output: str, **_: Any) -> str:
    """Take the search's only script from the site in place of a server's."""
    return output.replace(SHIM, "javascripts/iframe_worker.js")


def on_post_template(output_content: str, **_: Any) -> str:
    """Do the same in the page that says "not found"."""
    return output_content.replace(SHIM, "javascripts/iframe_worker.js")
