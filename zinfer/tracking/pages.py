"""Say where MLflow shows a run, or several beside each other."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from urllib.parse import quote

from zinfer.redact import redact
from zinfer.tracking.uri import is_server

LOCAL_ADDRESS = "http://127.0.0.1:5000"
"""Where `mlflow ui` serves a store by default."""

MOST_COMPARED = 20
"""More runs make a page, and an address, that nobody reads."""


def run_page(uri: str, experiment_id: str, run_id: str) -> str:
    """Return how to see one run: a server's page, or the command that serves the store first."""
    return _page(uri, f"#/experiments/{experiment_id}/runs/{run_id}")


def comparison_page(uri: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """Return how to see runs of one experiment beside each other; of many, the list of all."""
    if len(run_ids) > MOST_COMPARED:
        return _page(uri, f"#/experiments/{experiment_id}/runs")
    runs, experiments = (quote(json.dumps(list(ids))) for ids in (run_ids, [experiment_id]))
    return _page(uri, f"#/compare-runs?runs={runs}&experiments={experiments}")


def _page(uri: str, fragment: str) -> str:
    if is_server(uri):
        return redact(f"{uri.rstrip('/')}/{fragment}")
    serve = f"mlflow ui --backend-store-uri {shlex.quote(redact(uri))}"
    return f"{serve}, then {LOCAL_ADDRESS}/{fragment}"
