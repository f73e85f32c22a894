"""A run's numbers: few metrics to compare by, the others in one tag, all of them read back."""

from __future__ import annotations

import json
from pathlib import Path

from multirun_analysis.logged import numbers_of
from multirun_analysis.store import read_mlflow
from tests.helpers.tracked_runs import OUTCOME, config_of, opened, stored
from zinfer.tracking.names import COMPARED_METRICS
from zinfer.tracking.run import number_tags

METRICS_LOGGED = (
    "weight_stored_bytes", "prefill_s", "generated_tokens_per_s",
    "plan_device_needed_bytes", "plan_disk_needed_bytes",
)  # fmt: skip


def test_what_runs_are_compared_by_is_a_metric_the_headline_first() -> None:
    run = opened(config_of())
    run.finish(OUTCOME)
    metrics = stored(run).data.metrics
    assert metrics["prefill_s"] == 0.5
    assert metrics["weight_stored_bytes"] == 250_478_592
    assert metrics["plan_device_needed_bytes"] == 300
    assert next(iter(metrics)) == "generated_tokens_per_s", "MLflow's compare page begins with it"
    assert set(metrics) <= {*COMPARED_METRICS, "decode_step_s_by_step", "total_s_by_repeat"}
    assert "kv_cache_bytes" not in metrics, "it is unknown"


def test_all_other_numbers_are_in_one_tag_and_unknown_ones_are_absent(tmp_path: Path) -> None:
    run = opened(config_of())
    run.finish(OUTCOME)
    tags = stored(run).data.tags
    assert numbers_of(tags) == {
        "model_parameters": 125_239_296,
        "plan_fits": 1,
        "plan_disk_available_bytes": 2,
    }
    assert tags["zinfer.model_type"] == "opt"
    artifact = tmp_path / "mlartifacts" / str(run.run_id) / "artifacts" / "metrics.json"
    everything = json.loads(artifact.read_text())
    assert everything == {**numbers_of(tags), **{name: everything[name] for name in METRICS_LOGGED}}


def test_numbers_beyond_the_limit_of_a_tag_are_in_several() -> None:
    numbers = {f"rank{rank}_peak_host_rss_bytes": float(rank) for rank in range(400)}
    tags = number_tags({**numbers, "generated_tokens_per_s": 1.0})
    assert len(tags) == 2
    assert all(len(text) < 8000 for text in tags.values())
    assert numbers_of(tags) == numbers


def test_a_report_reads_the_numbers_of_new_and_of_older_runs(tmp_path: Path) -> None:
    new, old = opened(config_of()), opened(config_of(), "old")
    new.finish(OUTCOME)
    assert old.client is not None
    old.client.log_param(old.run_id, "model_parameters", "125239296")
    old.client.log_param(old.run_id, "model.model_type", "opt")
    for name, value in (("plan_fits", 1.0), ("plan_disk_available_bytes", 2.0)):
        old.client.log_metric(old.run_id, name, value)
    old.client.set_terminated(old.run_id)
    runs = read_mlflow(f"sqlite:///{tmp_path}/mlflow.db", experiment="zinfer").runs
    newer, older = sorted(runs, key=lambda run: run.run_id != new.run_id)
    assert older.metrics.items() <= newer.metrics.items()
    assert older.metrics.keys() == {"model_parameters", "plan_fits", "plan_disk_available_bytes"}
    assert older.params == newer.params, "they are one configuration"


def test_a_tag_that_was_cut_off_has_no_numbers() -> None:
    assert numbers_of({"zinfer.numbers": '{"load_s": 1, "impo'}) == {}
    assert numbers_of({"zinfer.numbers": "[1]", "zinfer.numbers.1": '{"a": 2, "b": "x"}'}) == {
        "a": 2.0
    }
