"""Plans of a grid (`zinfer -m task=plan`): its one run holds all points, in plans.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from multirun_analysis.runs import Json, Run
from zinfer.job.files import PLANS_JSON_FILE

GRID_ROLE = "plan_grid"


def grid_runs(grid: Run, artifact: Callable[[Run, str], Json | None]) -> Iterator[Run]:
    """Yield one planned run for each point of a grid; nothing for a grid without plans.json."""
    points = (artifact(grid, PLANS_JSON_FILE) or {}).get("plans")
    for number, point in enumerate(points if isinstance(points, list) else []):
        if isinstance(point, dict):
            yield plan_run(grid, number, point)


def plan_run(grid: Run, number: int, point: Json) -> Run:
    """Return one point of a grid as a run of its own, under the grid's circumstances."""
    params, metrics = point.get("params") or {}, point.get("metrics") or {}
    said = {"zinfer.binding_resource": "binding_resource", "zinfer.dtype": "dtype"}
    return replace(
        grid,
        run_id=f"{grid.run_id}#{number}",
        name=f"{grid.name}, {number}",
        status=str(point.get("status", "planned")),
        reason=point.get("reason"),
        params={str(name): str(value) for name, value in params.items()},
        metrics={
            str(name): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float)
        },
        tags={
            **grid.tags,
            "zinfer.grid": grid.run_id,
            **{tag: str(point[name]) for tag, name in said.items() if point.get(name)},
        },
    )
