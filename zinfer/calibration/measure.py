"""Run the jobs of a calibration, through the driver that every run uses, within its time."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.calibration.rests import Measured, calm_times_s
from zinfer.calibration.schedule import Clock, by_need, runs_left
from zinfer.config import DtypeConfig, EngineConfig, RunConfig, TrackingConfig, ZeroConfig
from zinfer.driver.terminal import Terminal
from zinfer.job.calibration import (
    ESSENTIAL,
    ROUNDS,
    Job,
    jobs,
    small_model,
    to_run_again,
)
from zinfer.job.files import KERNELS_FILE
from zinfer.job.outcome import Json, Outcome
from zinfer.tracking.deadline import never
from zinfer.units import format_left

if TYPE_CHECKING:
    from zinfer.job.events import Event

JOB_TIMEOUT_S = 180.0
"""A job takes seconds, the kernels a quarter of a minute."""
LINE_EVERY_S = 20.0
"""Between two lines of progress where there is no live one."""


class JobFailed(RuntimeError):
    """A job of the calibration did not end well. It ends the calibration as it ended itself."""

    def __init__(self, which: str, outcome: Outcome) -> None:
        super().__init__(f"{outcome.reason}, in the calibration's job {which}")
        self.outcome = outcome


class Inside(Terminal):
    """Show what goes on inside a job on the calibration's own terminal, if at all."""

    def __init__(self, outer: Terminal | None = None) -> None:
        super().__init__("text", out=io.StringIO(), err=io.StringIO())
        self._outer = outer

    def event(self, event: Event) -> None:
        """Hand the event on."""
        if self._outer is not None:
            self._outer.event(event)


def job_config(job: Job, config: RunConfig) -> RunConfig:
    """Return the job as a configuration: of the user's choices only the machine's are left."""
    resident = job.mode == "resident"
    device: Any = "none" if resident else job.mode
    dtype: Any = job.dtype
    return replace(
        config,
        task="run",
        weights="dummy",
        model=small_model(job.family, job.layers, job.hidden),
        engine=EngineConfig(name="resident" if resident else "zero"),
        offload=replace(
            config.offload,
            device=device,
            nvme_path=config.offload.nvme_path if device == "nvme" else None,
            use_gds=False,
        ),
        dtype=DtypeConfig(weights=dtype, compute=dtype),
        batch=job.batch,
        zero=_fetching(job),
        tracking=TrackingConfig(store="none"),
        launcher=replace(
            config.launcher, ranks=1, timeout_s=config.launcher.timeout_s or JOB_TIMEOUT_S
        ),
        plan=replace(config.plan, enforce=False),
    )


def _fetching(job: Job) -> ZeroConfig:
    """Let ZeRO-3 fetch weights in every job: without offload one rank would keep them gathered."""
    if job.mode != "none":
        return ZeroConfig(derivation="tuned", leaf_layers=None if job.leaf else False)
    return ZeroConfig(
        derivation="tuned", leaf_layers=job.leaf, persistence_threshold_numel=job.hidden
    )


@dataclass
class Measurement:
    """Numbers that a calibration has measured so far."""

    config: RunConfig
    folder: Path
    terminal: Terminal
    clock: Clock
    stopped: Callable[[], bool] = never
    """Asked again and again; True ends the job that is measured, as Ctrl-C does."""
    runs: list[Measured] = field(default_factory=list)
    kernels: Json | None = None
    left_out: tuple[str, ...] = ()
    """Groups of jobs that the budget had no time for."""
    _said_s: float = field(default_factory=lambda: time.monotonic())

    def everything(self, chosen: Sequence[Job]) -> None:
        """Run every job once, then the kernels, then again what does not agree yet."""
        self.run_round(chosen, chosen, 0)
        self.measure_kernels()
        self.repeat(chosen)

    def within_budget(self, dtypes: tuple[str, ...], *, cpu_offload: bool) -> None:
        """Run what matters most for this machine first, and leave out what the time is short of.

        The kernels come first: they tell in which type this machine is fast.
        """
        self.measure_kernels()
        fastest_first = tuple(sorted(dtypes, key=self._flops_per_s, reverse=True))
        chosen = jobs(fastest_first, nvme=True, cpu_offload=cpu_offload)
        taken: list[Job] = []
        left_out: list[str] = []
        for group, members in by_need(chosen, fastest_first):
            if group == ESSENTIAL or self.clock.allows(len(members)):
                self.run_round(members, members, 0)
                taken += members
            else:
                left_out.append(group)
        self.left_out = tuple(left_out)
        self.repeat(taken)

    def _flops_per_s(self, dtype: str) -> float:
        assert self.kernels is not None, "kernels are measured first"
        rates = [
            row["rows"] * row["weight_numel"] / row["seconds"]
            for row in self.kernels["kernels"]
            if row["dtype"] == dtype
        ]
        return max(rates, default=0.0)

    def repeat(self, chosen: Sequence[Job]) -> None:
        """Run again the jobs whose runs do not agree yet, as often as they may and time allows."""
        for number in range(1, ROUNDS):
            again = to_run_again(chosen, calm_times_s(self.runs))
            self.run_round(again, chosen, number)

    def run_round(self, members: Sequence[Job], chosen: Sequence[Job], number: int) -> None:
        """Run these jobs once each. From the second round on, stop when the budget is used up.

        Raises:
            JobFailed: as soon as one of them does not end well.
        """
        name = "small models" if number == 0 else "small models again"
        self.terminal.phase(name)
        for done, job in enumerate(members):
            if number > 0 and not self.clock.allows(1):
                return
            self._show(done, len(members), chosen, number)
            self.runs.append(self._run(job))

    def _run(self, job: Job) -> Measured:
        from zinfer.driver.run import run_job

        started_s, count = time.monotonic(), len(self.runs)
        config = job_config(job, self.config)
        outcome = run_job(
            config, self.folder / f"job{count}", Inside(), forked=True, stopped=self.stopped
        )
        if outcome.status != "ok":
            raise JobFailed(f"{job.family}, {job.mode}, {job.dtype}", outcome)
        if count > 0:  # the first one waits for the imports of them all
            self.clock.ran(time.monotonic() - started_s)
        return job, config, {**outcome.document(), "samples": list(outcome.samples)}

    def _show(self, done: int, total: int, chosen: Sequence[Job], number: int) -> None:
        """Show how far it is, and how long it will still take."""
        runs = runs_left(total - done, chosen, number)
        left_s = self.clock.left_s(
            runs, kernels=self.kernels is None, certain=total - done if number == 0 else 0
        )
        left = f"jobs, {format_left(left_s)}"
        self.terminal.share(done, total, left)
        if not self.terminal.live and time.monotonic() - self._said_s > LINE_EVERY_S:
            self._said_s = time.monotonic()
            self.terminal.note(f"{done} of {total} {left}")

    def measure_kernels(self) -> None:
        """Measure rates with a worker that runs kernels instead of a model.

        Raises:
            JobFailed: it did not end well.
        """
        from zinfer.driver.run import run_job

        job = Job(family="llama", mode="nvme", dtype="float32")
        config = replace(job_config(job, self.config), task="calibrate")
        folder = self.folder / "kernels"
        outcome = run_job(config, folder, Inside(self.terminal), forked=True, stopped=self.stopped)
        if outcome.status != "ok":
            raise JobFailed("that measures kernels", outcome)
        self.kernels = json.loads((folder / KERNELS_FILE).read_text())
