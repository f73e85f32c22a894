"""Fill templates to make pages. User text is escaped here, once for each kind of page."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from multirun_analysis.formats import to_markdown
from zinfer.escape import for_markdown

if TYPE_CHECKING:
    from multirun_analysis.report import Report

MAX_MARKDOWN_ROWS = 200


def render(template: str, report: Report) -> str:
    """Fill a page. HTML is escaped by itself; the figures' SVG is ours."""
    return str(
        _templates().get_template(template).render(report=report, max_rows=MAX_MARKDOWN_ROWS)
    )


@cache
def _templates() -> Any:
    import jinja2

    loader = jinja2.FunctionLoader(
        lambda name: resources.files("multirun_analysis").joinpath("templates", name).read_text()
    )
    escape = jinja2.select_autoescape(enabled_extensions=("html.j2",), default=False)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["markdown_table"] = to_markdown
    environment.filters["md"] = for_markdown
    return environment
