"""The head of a sweep: its jobs composed, looked up, planned and shown, before the first one starts."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from zinfer.config import ConfigError, RunConfig, parse_config
from zinfer.config.tasks import task_of
from zinfer.driver.orphans import close_abandoned
from zinfer.driver.refusals import refusal
from zinfer.driver.terminal import Terminal
from zinfer.driver.workers import Servers
from zinfer.job.folder import driven
from zinfer.job.outcome import Json
from zinfer.machine.disk import filesystem_of
from zinfer.machine.environment import environment
from zinfer.sweep.plan import plan_jobs
from zinfer.sweep.plan_grid import is_plan_grid, plan_grid
from zinfer.sweep.record import Sweep, SweepJob
from zinfer.sweep.resume import EarlierRun, note_reused, reusable_runs
from zinfer.tracking.job_key import job_key
from zinfer.tracking.parent import ParentRunCallback
from zinfer.tracking.store import tracking_uri

BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
ONE_PROCESS_LAUNCHERS = (BASIC_LAUNCHER, "hydra_plugins.hydra_joblib_launcher.")
REMOTE_LAUNCHERS = (
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.Slurm",
    "hydra_plugins.hydra_ray_launcher.",
)


class SweepOver(SystemExit):
    """Nothing is left to run: leaves Hydra before it composes the jobs again."""


class Started:
    """The sweep that this process started."""

    sweep: ClassVar[Sweep | None] = None
    parent: ClassVar[ParentRunCallback] = ParentRunCallback()
    held: ClassVar[ExitStack] = ExitStack()
    """The sweep's folder: until this process ends, its driver is alive."""


def start_sweep(master: DictConfig) -> None:
    """Plan the sweep, write it down, show it.

    Raises:
        SweepOver: it was only to be previewed, or all of it is there already.
    """
    _sweep_dir(master)  # ${now:...} in it is resolved once, here, and copied to every job
    if is_plan_grid(master):
        raise SweepOver(plan_grid(master))
    composed = compose_jobs(master)
    if composed is None:
        return  # Hydra composes the same and says what is wrong
    if problem := missing_plugin(str(master.hydra.launcher._target_)):
        Terminal(str(composed[0][1].format)).finish(refusal([problem]))
        raise SweepOver(2)
    sweep, configs = planned_sweep(master, composed)
    terminal = Terminal(sweep.output_format)
    close_abandoned(terminal)
    Started.sweep = sweep
    sweep.write()
    Started.held.enter_context(driven(sweep.folder, "sweep"))
    if sweep.jobs is not None:
        from zinfer.sweep.table import plan_table

        if not sweep.preview or sweep.output_format == "text":
            terminal.table(plan_table(sweep), to_out=sweep.preview)
        if sweep.preview:
            raise SweepOver
        if all(job.state == "reused" for job in sweep.jobs):
            for job in sweep.jobs:
                note_reused(sweep.reusable[str(job.key)], sweep.folder / str(job.num))
            raise SweepOver
    if sweep.tracking_uri is not None:
        Started.parent.announce(sweep.folder, list(master.hydra.overrides.task), sweep.tracking_uri)
    first = next(
        (config for config in configs if config is not None and task_of(config).loads_model), None
    )
    if sweep.forked and first is not None and first.launcher.fork_workers:
        Servers.prepare(first)  # its imports run beside Hydra's composing and MLflow's import
        if sweep.tracking_uri is not None and sweep.in_process:
            threading.Thread(target=importlib.import_module, args=("mlflow",), daemon=True).start()


def missing_plugin(launcher: str) -> str | None:
    """What to install for a launcher whose plugin is not here; Hydra would print a traceback."""
    package = ".".join(launcher.split(".")[:2])
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is not None:
        return None
    extra = "ray" if "ray" in package else "launchers"
    return f"hydra.launcher needs {package}, which is not installed. Type pip install 'zinfer[{extra}]'"


def compose_jobs(master: DictConfig) -> list[tuple[list[str], DictConfig]] | None:
    """(overrides, composed configuration) of every job, in the launcher's order; None where one cannot be composed.

    Another sweeper than Hydra's own gives one entry: what all its jobs have in common.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    loader = GlobalHydra.instance().config_loader()
    given = [f"{key}={value}" for key, value in (master.hydra.sweeper.get("params") or {}).items()]
    try:
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(
            [*given, *master.hydra.overrides.task]
        )
        if master.hydra.sweeper._target_ == BASIC_SWEEPER:
            batches = BasicSweeper.split_arguments(overrides, None)
        else:
            batches = BasicSweeper.split_arguments(
                [override for override in overrides if not override.is_sweep_override()], None
            )
        return [
            (list(job), _composed(loader, master, list(job), num))
            for num, job in enumerate(batches[0])
        ]
    except (HydraException, OmegaConfBaseException):
        return None


def _composed(loader: Any, master: DictConfig, overrides: list[str], num: int) -> DictConfig:
    """As the launcher will compose it, with the job's number and folder."""
    config = loader.load_sweep_config(master, overrides)
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.job.id = config.hydra.job.num = num
        config.hydra.runtime.output_dir = str(_sweep_dir(config) / str(num))
    return config


def _sweep_dir(config: DictConfig) -> Path:
    return Path(str(config.hydra.sweep.dir)).absolute()


@contextmanager
def _as_hydra_config(composed: DictConfig) -> Iterator[DictConfig]:
    """The job's own part of the configuration, while ${hydra:...} in it resolves to this job."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(composed)
    try:
        own = composed.copy()
        with read_write(own), open_dict(own):
            del own["hydra"]
        yield own
    finally:
        HydraConfig.instance().cfg = before


def planned_sweep(
    master: DictConfig, composed: list[tuple[list[str], DictConfig]]
) -> tuple[Sweep, list[RunConfig | None]]:
    """The sweep with what is known of each job; None for the configuration of a refused one."""
    known = master.hydra.sweeper._target_ == BASIC_SWEEPER
    jobs: list[SweepJob] = []
    configs: list[RunConfig | None] = []
    for num, (overrides, tree) in enumerate(composed):
        job = SweepJob(
            num=num,
            overrides=[override for override in overrides if not override.startswith("hydra.")],
        )
        try:
            with _as_hydra_config(tree) as own:
                configs.append(parse_config(own))
        except ConfigError as error:
            configs.append(None)
            job = replace(job, state="refused", verdict="refused", reason="; ".join(error.problems))
        jobs.append(job)
    _, tree = composed[0]
    launcher = str(master.hydra.launcher._target_)
    settings = tree.sweep
    uri = None
    if tree.tracking.store != "none" and not OmegaConf.is_missing(tree.tracking, "uri"):
        first = next((config for config in configs if config is not None), None)
        uri = tracking_uri(first.tracking, Path.cwd()) if first is not None else None
    sweep = Sweep(
        folder=_sweep_dir(tree),
        command=shlex.join(["zinfer", *sys.argv[1:]]),
        output_format=str(tree.format),
        tracking_uri=uri,
        fail_fast=bool(settings.fail_fast),
        preview=bool(settings.preview),
        local=not launcher.startswith(REMOTE_LAUNCHERS),
        in_process=launcher == BASIC_LAUNCHER,
        forked=launcher.startswith(ONE_PROCESS_LAUNCHERS) and (not known or len(jobs) > 1),
        started_s=time.time(),
        pid=os.getpid(),
        jobs=jobs if known else None,
    )
    if uri is not None and settings.resume:
        reusable = reusable_runs(uri, str(tree.tracking.experiment), str(settings.retry))
        searched = settings.search != "none"  # a search's trials are looked up one by one
        sweep = (
            replace(sweep, reusable=reusable) if searched else with_reused(sweep, configs, reusable)
        )
    return (with_plans(sweep, configs) if known else sweep), configs


def with_reused(
    sweep: Sweep, configs: list[RunConfig | None], reusable: dict[str, EarlierRun]
) -> Sweep:
    """Mark the jobs that an earlier run stands for; keep the runs that any machine's job of this sweep may find."""
    if sweep.jobs is None:
        return replace(sweep, reusable=reusable)
    facts = _EnvironmentOnce()
    jobs, heads = [], set()
    for job, config in zip(sweep.jobs, configs, strict=True):
        if config is not None:
            key = job_key(config, facts.of(config))
            heads.add(key.rpartition(".")[0])
            job = replace(
                job, key=key, state="reused" if sweep.local and key in reusable else job.state
            )
        jobs.append(job)
    kept = {key: run for key, run in reusable.items() if key.rpartition(".")[0] in heads}
    return replace(sweep, jobs=jobs, reusable=kept)


class _EnvironmentOnce:
    """The environment's facts, asked once for each set of devices and file system."""

    def __init__(self) -> None:
        self._known: dict[str, Json] = {}

    def of(self, config: RunConfig) -> Json:
        """For this job."""
        nvme_path = config.offload.nvme_folder
        which = f"{config.hardware} {filesystem_of(nvme_path) if nvme_path else None}"
        if which not in self._known:
            self._known[which] = environment(config, nvme_path)
        return self._known[which]


def with_plans(sweep: Sweep, configs: list[RunConfig | None]) -> Sweep:
    """The memory plan's verdict on every job that will run."""
    assert sweep.jobs is not None
    wanted = [
        index
        for index, job in enumerate(sweep.jobs)
        if job.state == "run" and configs[index] is not None
    ]
    terminal = Terminal(sweep.output_format)
    plans = dict(
        zip(
            wanted,
            plan_jobs([config for index in wanted if (config := configs[index])], terminal),
            strict=True,
        )
    )
    jobs = [
        replace(
            job,
            verdict=plans[job.num].verdict,
            reason=plans[job.num].reason,
            needed_bytes=plans[job.num].needed_bytes,
        )
        if job.num in plans
        else job
        for job in sweep.jobs
    ]
    return replace(sweep, jobs=jobs)
