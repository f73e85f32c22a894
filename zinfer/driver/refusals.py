"""What this machine cannot do is refused before anything is loaded, with every problem and what to type instead."""

from __future__ import annotations

import os
from pathlib import Path

from zinfer.config import ConfigError, RunConfig
from zinfer.config.tasks import task_of
from zinfer.driver.terminal import Terminal
from zinfer.job.outcome import Outcome
from zinfer.machine import native_ops
from zinfer.machine.hardware import Hardware


def refusal(problems: list[str], job_dir: Path | None = None) -> Outcome:
    """What becomes of a configuration that cannot run."""
    return Outcome(
        status="refused",
        reason="; ".join(problems),
        problems=tuple(problems),
        job_dir=str(job_dir) if job_dir else None,
    )


def require_possible(config: RunConfig, hardware: Hardware, terminal: Terminal) -> None:
    """Refuse what this machine cannot do.

    Raises:
        ConfigError: with every problem and what to type.
    """
    problems = []
    wanted = [
        kind
        for kind in (config.dtype.compute,)
        if kind != "auto" and kind not in hardware.device_dtypes
    ]
    problems += [
        f"dtype={kind}: {hardware.device_name} does not compute in it. Type dtype={'bfloat16' if kind != 'bfloat16' else 'float32'}"
        for kind in wanted
    ]
    if hardware.device_kind == "cuda" and config.launcher.ranks > hardware.device_count:
        problems.append(
            f"launcher.ranks={config.launcher.ranks}, but there are {hardware.device_count} devices. "
            f"Type launcher.ranks={hardware.device_count}"
        )
    if config.offload.use_gds and hardware.device_kind != "cuda":
        problems.append(
            "offload.use_gds=true reads straight into GPU memory, and there is no GPU. Type offload.use_gds=false"
        )
    if not config.plan.enforce:
        for problem in problems:
            terminal.warning(problem)
        problems = []
    if task_of(config).loads_ops:
        problems += native_ops.missing_requirements(native_ops.ops_of(config))
    if task_of(config).uses_swap and config.offload.device == "nvme" and not problems:
        problems += _unwritable(config)
    if problems:
        raise ConfigError(problems)


def _unwritable(config: RunConfig) -> list[str]:
    """nvme_path that cannot be made or written to."""
    path = Path(str(config.offload.nvme_path)).expanduser().absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir():
        return [
            f"offload.nvme_path={path}: {existing} is not a folder. Type offload.nvme_path=/path/to/a/folder/on/a/local/disk"
        ]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [
            f"offload.nvme_path={path}: {existing} is not writable. Type offload.nvme_path=/path/to/a/folder/that/you/own"
        ]
    return []
