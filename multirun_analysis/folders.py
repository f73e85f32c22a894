"""Read runs from job folders, where there is no store."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from multirun_analysis.notes import run_notes
from multirun_analysis.plans import grid_runs
from multirun_analysis.progress import READING, Progress, silent
from multirun_analysis.runs import History, Json, ReportError, Run, Selection, started_s
from zinfer.job.files import (
    EARLIER_FOLDER,
    ENVIRONMENT_FILE,
    EVENTS_FILE,
    JOB_FILE,
    PLANS_JSON_FILE,
    RESULT_FILE,
)
from zinfer.tracking.names import LARGEST_BATCH, PLAN_FITS, STORED_BYTES
from zinfer.tracking.run import flat_params
from zinfer.units import counted

STEP_HISTORY = "decode_step_s_by_step"


def read_folder(folder: Path, progress: Progress = silent) -> Selection:
    """Read result.json, and job.json or .hydra/config.yaml beside it, at any depth.

    Raises:
        ReportError: no such folder, or no job in it.
    """
    if not folder.is_dir():
        raise ReportError(
            f"{folder} is not a folder. Set --from-dir outputs, or --uri for an MLflow store"
        )
    runs = tuple(sorted(folder_runs(folder, progress), key=started_s))
    if not runs:
        raise ReportError(
            f"no job folder (with a {RESULT_FILE}) is in {folder}. Set --from-dir outputs or "
            "--from-dir multirun"
        )
    unread = [str(path.parent) for path in folder.rglob(RESULT_FILE) if json_file(path) is None]
    notes = []
    if unread:
        named = ", ".join(unread[:5])
        notes.append(
            f"{counted(len(unread), 'job folder')} left out, {RESULT_FILE} cannot be read: {named}."
        )
    folders = {run.run_id: Path(run.tags["zinfer.job_dir"]) for run in runs}
    return Selection(
        title=f"jobs in {folder}",
        where=str(folder),
        runs=runs,
        notes=(*notes, *run_notes(runs)),
        history=lambda run, metric: _history(folders[run.run_id], metric),
        environment=lambda run: json_file(folders[run.run_id] / ENVIRONMENT_FILE),
    )


def folder_runs(folder: Path, progress: Progress = silent) -> Iterator[Run]:
    """Yield the run of every readable result.json below `folder`, earlier attempts left out.

    Each point of a grid of plans (plans.json) is a run too.
    """
    results = sorted(folder.rglob(RESULT_FILE))
    for number, path in enumerate(results):
        progress(READING, number + 1, len(results))
        if EARLIER_FOLDER in path.relative_to(folder).parts:
            continue
        result = json_file(path)
        if result is not None and "status" in result:
            yield _run(path.parent, result)
    for path in sorted(folder.rglob(PLANS_JSON_FILE)):
        if EARLIER_FOLDER not in path.relative_to(folder).parts:
            yield from grid_runs(_grid(path), file_of)


def _grid(path: Path) -> Run:
    """Return the run that a grid of plans would be in a store."""
    return Run(
        run_id=str(path.parent),
        name=path.parent.name,
        experiment="",
        started=datetime.fromtimestamp(path.stat().st_mtime, UTC),
        status="planned",
        reason=None,
        params={},
        metrics={},
        tags={"zinfer.job_dir": str(path.parent)},
    )


def file_of(run: Run, name: str) -> Json | None:
    """Return a JSON file of the run's folder; None where it is missing or broken."""
    return json_file(Path(run.tags["zinfer.job_dir"]) / name)


def _run(job_dir: Path, result: Json) -> Run:
    config = (json_file(job_dir / JOB_FILE) or {}).get("config") or _hydra_config(job_dir)
    tags = _tags(job_dir, result)
    metrics = _metrics(result)
    return Run(
        run_id=result.get("run_id") or str(job_dir),
        name=job_dir.name,
        experiment=str((config.get("tracking") or {}).get("experiment", "")),
        started=datetime.fromtimestamp((job_dir / RESULT_FILE).stat().st_mtime, UTC),
        status=result["status"],
        reason=result.get("reason") or "; ".join(result.get("problems") or []) or None,
        params=flat_params(config),
        metrics={name: float(value) for name, value in metrics.items() if value is not None},
        tags={name: str(value) for name, value in tags.items() if value},
    )


def _metrics(result: Json) -> dict[str, Any]:
    model, plan = result.get("model") or {}, result.get("plan") or {}
    metrics = {
        "model_parameters": model.get("parameters"),
        STORED_BYTES: plan.get("weight_stored_bytes"),
        PLAN_FITS: int(plan["fits"]) if "fits" in plan else None,
        LARGEST_BATCH: (plan.get("advice") or {}).get("largest_batch_size"),
    }
    for tier, needs in (plan.get("tiers") or {}).items():
        metrics |= {
            f"plan_{tier}_needed_bytes": needs.get("needed_bytes"),
            f"plan_{tier}_available_bytes": needs.get("available_bytes"),
        }
    metrics |= {
        name: value
        for name, value in (plan.get("prediction") or {}).items()
        if name.startswith(("predicted_", "ceiling_")) and isinstance(value, int | float)
    }
    return metrics | (result.get("metrics") or {})


def _tags(job_dir: Path, result: Json) -> dict[str, Any]:
    environment = json_file(job_dir / ENVIRONMENT_FILE) or {}
    stability, quality = result.get("stability") or {}, result.get("quality") or {}
    return {
        "zinfer.status": result["status"],
        "zinfer.dtype": (result.get("model") or {}).get("dtype"),
        "zinfer.commit": (environment.get("zinfer") or {}).get("commit"),
        "zinfer.method_version": result.get("method_version"),
        "zinfer.binding_resource": ((result.get("plan") or {}).get("prediction") or {}).get(
            "binding_resource"
        ),
        "zinfer.warnings": "\n".join(result.get("warnings") or []),
        "zinfer.stability": stability.get("verdict"),
        "zinfer.stability_reason": "; ".join(stability.get("reasons") or []),
        "zinfer.quality": quality.get("verdict"),
        "zinfer.quality_reason": "\n".join(quality.get("reasons") or []),
        "zinfer.job_dir": str(job_dir),
        "zinfer.tracked": "true" if result.get("run_id") else None,
    }


def _hydra_config(job_dir: Path) -> Json:
    """Read what Hydra composed, for a job that was refused before its configuration was checked."""
    import yaml

    try:
        tree = yaml.safe_load((job_dir / ".hydra" / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _history(job_dir: Path, metric: str) -> History:
    """Return the median of each decode step over the timed generations, from the events."""
    if metric != STEP_HISTORY or not (job_dir / EVENTS_FILE).is_file():
        return ()
    lines = (job_dir / EVENTS_FILE).read_text(errors="replace").splitlines()
    samples = [
        json.loads(line) for line in lines if '"event": "sample"' in line and line.endswith("}")
    ]
    repeats = [sample["decode_step_s"] for sample in samples if sample.get("kind") == "timed"]
    return tuple(
        (step, statistics.median(values)) for step, values in enumerate(zip(*repeats, strict=False))
    )


def json_file(path: Path) -> Json | None:
    """Return the content of a JSON file; None where it is missing, broken, or no object."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
