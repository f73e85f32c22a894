"""One plan of a published preset gives the report that a grid of plans gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from multirun_analysis.compare import configurations
from multirun_analysis.folders import read_folder
from multirun_analysis.published.beside import Comparison, compare_published, planned_rate
from multirun_analysis.report import write_report
from multirun_analysis.store import read_mlflow
from tests.helpers.sweeping import run

PRESET = (
    "experiment=zero_inference_a6000", "model=opt-30b", "batch.batch_size=24", "hardware=a6000",
    "task=plan",
)  # fmt: skip
PUBLISHED_TOKENS_PER_S = 22.74


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plan the preset once alone, logged, and once as a grid of one point that is not logged."""
    folder = tmp_path_factory.mktemp("plans")
    for words in ((*PRESET,), ("-m", *PRESET, "tracking=none")):
        done = run(folder, *words)
        assert done.returncode == 0, done.stderr
    return folder


def beside(selection: object) -> Comparison:
    """Return the row of the published table that was planned."""
    runs = selection.runs  # type: ignore[attr-defined]
    (row,) = [item for item in compare_published(configurations(runs)) if item.planned is not None]
    return row


@pytest.mark.parametrize("where", ["store", "outputs", "multirun"])
def test_a_plan_stands_beside_what_was_published(where: str, folder: Path, tmp_path: Path) -> None:
    if where == "store":
        selection = read_mlflow(f"sqlite:///{folder / 'mlflow.db'}")
    else:
        selection = read_folder(folder / where)
    row = beside(selection)
    assert row.published.value == PUBLISHED_TOKENS_PER_S
    ceiling = planned_rate(row, "ceiling")
    assert ceiling is not None and 35 < ceiling < 37  # 25 GB/s over the 4-bit weights' 17.8 GiB
    report = write_report(selection, tmp_path)
    plans, published = report.table("plans"), report.table("published")
    assert plans is not None and published is not None
    heads = [column.head for column in plans.columns]
    assert "largest batch" in heads and len(plans.rows) == 1
    assert "22.74" in (tmp_path / "report.md").read_text()
