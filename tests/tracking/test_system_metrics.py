"""tracking.system_metrics: the machine's load, sampled in the driver and logged at the end."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from multirun_analysis.store import read_mlflow
from tests.helpers.tracked_runs import OUTCOME, config_of, opened, stored
from zinfer.driver.terminal import Terminal
from zinfer.driver.tracking_thread import TrackingThread
from zinfer.tracking import system_metrics
from zinfer.tracking.system_metrics import SystemMetrics

LOAD = ("system/cpu_utilization_percentage", "system/system_memory_usage_megabytes")


def wait_for_samples(sampled: SystemMetrics, count: int) -> None:
    """Wait until there are so many samples."""
    deadline_s = time.monotonic() + 30
    while len(sampled._samples) < count and time.monotonic() < deadline_s:
        time.sleep(0.01)


def test_samples_are_logged_with_the_outcome_and_are_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.02")
    run = opened(config_of())
    assert run.client is not None and run.run_id is not None and run.uri is not None
    sampled = SystemMetrics(run.run_id, run.uri)
    sampled.start()
    wait_for_samples(sampled, 3)
    assert not stored(run).data.metrics, "nothing is written while a run is timed"
    run.finish(OUTCOME, sampled.stop())
    assert not sampled._thread.is_alive()
    for name in LOAD:
        points = run.client.get_metric_history(run.run_id, name)
        assert [point.step for point in points] == list(range(len(points)))
        assert len({point.timestamp for point in points}) > 1
    assert next(iter(stored(run).data.metrics)) == "generated_tokens_per_s"
    (read,) = read_mlflow(f"sqlite:///{tmp_path}/mlflow.db", experiment="zinfer").runs
    assert not [name for name in read.metrics if name.startswith("system/")]
    assert capfd.readouterr() == ("", "")


def test_a_long_run_keeps_no_more_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    monkeypatch.setattr(system_metrics, "MOST_SAMPLES", 4)
    run = opened(config_of())
    sampled = SystemMetrics(str(run.run_id), str(run.uri))
    sampled.start()
    deadline_s = time.monotonic() + 30
    while sampled._interval_s < 0.04 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    sampled.stop()
    assert sampled._interval_s >= 0.04
    assert len(sampled._samples) <= 5
    times = [sample.time_ms for sample in sampled._samples]
    assert times == sorted(times)


@pytest.mark.parametrize("wanted", ["true", "false"])
def test_the_drivers_thread_samples_where_it_is_asked_to(tmp_path: Path, wanted: str) -> None:
    config = config_of(f"tracking.system_metrics={wanted}", "tracking=sqlite", "task=plan")
    (tmp_path / "job").mkdir()
    tracked = TrackingThread(config, tmp_path / "job", "attempt", Terminal("json"))
    before = threading.active_count()
    tracked.start()
    assert tracked._thread is not None
    tracked._thread.join()
    assert threading.active_count() - before == (1 if wanted == "true" else 0)
    tracked.finish(OUTCOME)
    assert threading.active_count() == before


def test_nothing_of_it_is_imported_where_it_is_off(tmp_path: Path) -> None:
    script = (
        "import json, sys\n"
        "from tests.helpers.tracked_runs import OUTCOME, config_of, opened\n"
        "opened(config_of()).finish(OUTCOME)\n"
        "print(json.dumps([name for name in sys.modules if 'system_metrics_monitor' in name]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert json.loads(done.stdout) == []
