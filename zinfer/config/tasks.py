"""Say once what each task needs; configuration checks, driver, worker and sweep ask this table.

A new task is a function with the signature of `TaskFunction` and one row here.
Functions are named by text, `module:function`, so that this room imports none of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from zinfer.config.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Task:
    """One value of the setting `task`, and what a job of it needs."""

    name: str
    summary: str
    """One line for people who choose a task."""
    command: str
    """Driver's side: `module:function`, which zinfer.driver.finishing.do_task calls with
    (config, job_dir, terminal, forked=..., stopped=...) -> Outcome."""
    worker: str | None = None
    """Worker's side: `module:function`, called with (config, job_dir, events); None: no worker."""
    reads_model: bool = False
    """It is of one model, whose settings it reads."""
    loads_model: bool = False
    """A model's weights are loaded and its generations timed."""
    uses_swap: bool = False
    """With offload=nvme, or by its nature, it writes into a swap folder of its own."""
    loads_ops: bool = False
    """The worker loads DeepSpeed's compiled ops, so they are built before it starts."""
    takes_search: bool = False
    """sweep.search turns a job of it into a search."""


TASKS = {
    task.name: task
    for task in (
        Task(
            name="run",
            summary="load the model, time its generations, log the result",
            command="zinfer.driver.run:run_job",
            worker="zinfer.worker.run:run_task",
            reads_model=True,
            loads_model=True,
            uses_swap=True,
            loads_ops=True,
            takes_search=True,
        ),
        Task(
            name="plan",
            summary="show memory, ceiling and DeepSpeed JSON; no weights, no accelerator",
            command="zinfer.driver.run:run_job",
            worker="zinfer.worker.run:run_task",
            reads_model=True,
        ),
        Task(
            name="calibrate",
            summary="measure this machine, so that later plans predict times",
            command="zinfer.calibration.task:calibrate_job",
            worker="zinfer.worker.calibrate_kernels:kernels_task",
            uses_swap=True,
            loads_ops=True,
        ),
        Task(
            name="upload",
            summary="send runs whose store could not be reached when they ended",
            command="zinfer.driver.upload:upload_job",
        ),
    )
}


def task_of(config: RunConfig) -> Task:
    """Look up the row of this configuration's task; configurations hold only tasks that exist."""
    return TASKS[config.task]


def function_named(reference: str) -> Callable[..., Any]:
    """Import `module:function`. The module is imported only now: worker modules import torch."""
    module, _, name = reference.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
