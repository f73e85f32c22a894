"""Ask an MLflow store for the runs that a report is about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from multirun_analysis.plans import GRID_ROLE
from multirun_analysis.progress import READING, Progress
from multirun_analysis.runs import MEASURE, ReportError
from multirun_analysis.sweeps import SWEEP_ROLE, reused_ids
from zinfer.redact import redact
from zinfer.tracking.names import COMMIT_TAG
from zinfer.tracking.reading import open_to_read
from zinfer.tracking.uri import sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

PAGE = 250
"""Runs per request, so that a person sees that it goes on. MLflow allows 50,000."""
IDS_PER_REQUEST = 100
NEWEST_FIRST = ["attributes.start_time DESC"]
Found = Any
"""A run as MLflow's client returns it."""


class Queries:
    """The queries that a report makes."""

    def __init__(self, client: MlflowClient, uri: str, progress: Progress) -> None:
        self._client, self._uri, self._progress = client, uri, progress
        self._read = 0
        self._total: int | None = None
        self.experiments: dict[str, str] = {
            item.experiment_id: item.name for item in self.pages(client.search_experiments)
        }
        """Id -> name of each active experiment."""

    def experiment_ids(self, name: str | None) -> list[str]:
        """Return the ids of all experiments, or of the one that has this name.

        Raises:
            ReportError: there is none of this name.
        """
        if name is None:
            return list(self.experiments)
        ids = [key for key, known in self.experiments.items() if known == name]
        if not ids:
            known_names = ", ".join(sorted(self.experiments.values())) or "none"
            raise ReportError(
                f"there is no experiment {name} in {redact(self._uri)}. Its experiments: "
                f"{known_names}"
            )
        return ids

    def newest(self, ids: list[str]) -> tuple[str, list[Found]]:
        """Return the newest sweep or grid of plans; else the newest run's experiment."""
        for wanted in (
            f"tags.`zinfer.role` = '{SWEEP_ROLE}'",
            f"tags.`zinfer.role` = '{GRID_ROLE}'",
            "tags.`zinfer.method_version` != ''",
        ):
            newest = self._client.search_runs(ids, wanted, max_results=1, order_by=NEWEST_FIRST)
            if newest and wanted.endswith("''"):
                experiment_id = newest[0].info.experiment_id
                title = f"experiment {self.experiments[experiment_id]} (no sweep yet)"
                return title, self.search([experiment_id], None)
            if newest:
                return self.family(newest[0].info.run_id, None)
        raise ReportError(f"no run of zinfer is in {redact(self._uri)} yet. {MEASURE}")

    def family(self, run_id: str, where: str | None) -> tuple[str, list[Found]]:
        """Return a sweep's parent with all its jobs, reused ones too; a run without jobs alone."""
        from mlflow.exceptions import MlflowException

        try:
            parent = self._client.get_run(run_id)
        except MlflowException:
            raise ReportError(
                f"there is no run {run_id} in {redact(self._uri)}. Set --run to the id of a "
                "sweep's parent run, or --experiment NAME"
            ) from None
        self._total = len(reused_ids(parent.data.tags)) or None
        child = f"tags.`mlflow.parentRunId` = '{run_id}'"
        jobs = self.search([parent.info.experiment_id], " and ".join(filter(None, [child, where])))
        if role_of(parent) == SWEEP_ROLE:
            here = {job.info.run_id for job in jobs}
            jobs += self.by_id(sorted(reused_ids(parent.data.tags) - here), where)
        name = parent.info.run_name or run_id
        if jobs or role_of(parent) == SWEEP_ROLE:
            return f"sweep {name}", [parent, *jobs]
        return f"run {name}", [parent]

    def by_id(self, run_ids: list[str], where: str | None) -> list[Found]:
        """Return runs by their ids, from whatever experiment; ids that are gone are left out."""
        found = []
        for start in range(0, len(run_ids), IDS_PER_REQUEST):
            quoted = ", ".join(f"'{one}'" for one in run_ids[start : start + IDS_PER_REQUEST])
            wanted = " and ".join(filter(None, [f"attributes.run_id IN ({quoted})", where]))
            found += self.search(list(self.experiments), wanted)
        return found

    def search(self, ids: list[str], where: str | None) -> list[Found]:
        """Return every run of these experiments, or those that a filter of MLflow matches.

        Raises:
            ReportError: MLflow does not take the filter.
        """
        from mlflow.exceptions import MlflowException

        if where is None:
            self._total = run_count(self._uri, ids)
        try:
            return list(
                self._counted(
                    self.pages(
                        lambda page_token: self._client.search_runs(
                            ids, where or "", max_results=PAGE, page_token=page_token
                        )
                    )
                )
            )
        except MlflowException as error:
            if where is None or error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            said = str(error).strip().splitlines()[0]
            raise ReportError(
                f"MLflow does not take this filter: {where}. {said}. An example: --filter "
                "\"params.`offload.device` = 'nvme'\""
            ) from None

    def newest_commits(self, most: int) -> list[str]:
        """Return the different commits of the newest PAGE runs of zinfer, the newest first."""
        ours = "tags.`zinfer.method_version` != ''"
        ids = list(self.experiments)
        newest = self._client.search_runs(ids, ours, max_results=PAGE, order_by=NEWEST_FIRST)
        commits = (found.data.tags.get(COMMIT_TAG) for found in newest)
        return list(dict.fromkeys(filter(None, commits)))[:most]

    def _counted(self, found: Iterator[Found]) -> Iterator[Found]:
        """Count the runs as they come, for those who wait."""
        for run in found:
            yield run
            self._read += 1
            if self._read % PAGE == 0:
                self._progress(READING, self._read, self._total)

    def pages(self, request: Callable[..., Any]) -> Iterator[Any]:
        """Yield what all pages of a request hold."""
        token = None
        while True:
            page = request(page_token=token)
            yield from page
            token = page.token
            if not token:
                return


def run_count(uri: str, experiment_ids: list[str]) -> int | None:
    """Return how many runs these experiments have; None where only MLflow could tell."""
    path = sqlite_path(uri)
    if path is None:
        return None
    marks = ", ".join("?" * len(experiment_ids))
    wanted = f"lifecycle_stage = 'active' AND experiment_id IN ({marks})"
    with open_to_read(path) as store:
        query = f"SELECT count(*) FROM runs WHERE {wanted}"
        (count,) = store.execute(query, experiment_ids).fetchone()
    return int(count)


def role_of(found: Found) -> str:
    """Return what a run is of zinfer's: a job, a sweep, a grid of plans; empty for others."""
    return str(found.data.tags.get("zinfer.role", ""))
