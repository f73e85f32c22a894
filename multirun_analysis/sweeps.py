"""The jobs of a sweep, those included that it did not run: reused ones and refused ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from multirun_analysis.folders import folder_runs, json_file
from multirun_analysis.runs import Run
from zinfer.job.files import REUSED_FILE

SWEEP_ROLE = "sweep"
JOBS_TAGS = re.compile(r"zinfer\.jobs(\.\d+)?")
"""On a sweep's run: JSON, lists of {num, run_id, state} of all its jobs."""


def reused_ids(tags: Mapping[str, str]) -> set[str]:
    """Return the ids of a sweep's runs, as its own run and its folder list them.

    Args:
        tags: of the sweep's run. Without a readable zinfer.jobs, the sweep's folder is asked,
            where it is on this machine.
    """
    lists = [text for name, text in tags.items() if JOBS_TAGS.fullmatch(name)]
    ids = {str(job["run_id"]) for text in lists for job in _listed(text) if job.get("run_id")}
    folder = sweep_folder(tags)
    if folder is not None:
        for path in sorted(folder.glob(f"*/{REUSED_FILE}")):
            earlier = json_file(path) or {}
            ids |= {str(earlier["run_id"])} if earlier.get("run_id") else set()
    return {one for one in ids if one.isalnum()}


def _listed(text: str) -> list[Mapping[str, object]]:
    """Return a list of objects out of a store's JSON; none where a tag was cut off."""
    try:
        jobs = json.loads(text)
    except ValueError:
        return []
    return [job for job in jobs if isinstance(job, dict)] if isinstance(jobs, list) else []


def sweep_folder(tags: Mapping[str, str]) -> Path | None:
    """Return the sweep's folder; None where it is not on this machine."""
    given = tags.get("zinfer.sweep_dir")
    return Path(given) if given and Path(given).is_dir() else None


def untracked_jobs(tags: Mapping[str, str], known: set[str]) -> Iterator[Run]:
    """Yield the jobs that were refused before MLflow was asked: only the sweep's folder has them.

    Args:
        tags: of the sweep's run.
        known: ids of the runs that the store has returned.
    """
    folder = sweep_folder(tags)
    for run in folder_runs(folder) if folder is not None else ():
        if run.run_id not in known and run.tags.get("zinfer.tracked") != "true":
            yield run
