"""Sample the load of the whole machine while a job runs, with MLflow's own monitors.

The worker computes and the driver samples: processors, memory, disk, network and GPUs are the
machine's, so they show the worker's load, and that of everything else. The samples are kept until
the run ends and logged then, as all numbers are: no store is written while generations are timed.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.entities import Metric

PREFIX = "system/"
"""MLflow shows metrics with it on a page of their own."""
INTERVAL_VARIABLE = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
INTERVAL_S = 1.0
MOST_SAMPLES = 300
"""Of more, every second one is dropped and the interval doubled: a long run logs no more."""


@dataclass(frozen=True)
class Sample:
    """The machine at one moment."""

    time_ms: int
    values: dict[str, float]


class SystemMetrics:
    """A thread that samples until it is stopped; it ends with the process that started it."""

    def __init__(self, run_id: str, uri: str) -> None:
        """Import MLflow's monitors; on GPUs they need NVML.

        Raises:
            ImportError: psutil is missing.
        """
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)  # no GPU is no news
        given = os.environ.get(INTERVAL_VARIABLE, "")
        self._interval_s = float(given) if given else INTERVAL_S
        self._monitor = SystemMetricsMonitor(run_id, tracking_uri=uri)
        self._samples: list[Sample] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._take()  # rates count from here
        self._samples.clear()
        self._thread.start()

    def stop(self) -> list[Metric]:
        """End the thread and return its samples as MLflow takes them, the oldest first."""
        from mlflow.entities import Metric

        self._over.set()
        self._thread.join(timeout=5.0)
        return [
            Metric(PREFIX + name, float(value), sample.time_ms, step)
            for step, sample in enumerate(list(self._samples))
            for name, value in sample.values.items()
        ]

    def _watch(self) -> None:
        while not self._over.wait(self._interval_s):
            self._take()
            if len(self._samples) > MOST_SAMPLES:
                self._samples, self._interval_s = self._samples[::2], 2 * self._interval_s

    def _take(self) -> None:
        self._monitor.collect_metrics()
        self._samples.append(Sample(int(time.time() * 1000), self._monitor.aggregate_metrics()))
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
