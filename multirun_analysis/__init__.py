"""Reads runs that zinfer logged, compares them, and writes tables, figures and one report.

In: an MLflow store, or job folders. Out: a report's folder, or a DataFrame (`runs_frame`).
It never measures, and never imports zinfer's worker, driver or sweep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multirun_analysis.frame import runs_frame

__all__ = ["runs_frame"]


def __getattr__(name: str) -> Any:
    """Import `runs_frame` when it is asked for: what it needs takes a second to import."""
    if name in __all__:
        from multirun_analysis import frame

        return getattr(frame, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
