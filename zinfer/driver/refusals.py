"""Refuse what this machine cannot do before anything is loaded: every problem, and what to set."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from zinfer.config.tasks import task_of
from zinfer.job.outcome import Outcome

if TYPE_CHECKING:
    from zinfer.config import RunConfig
    from zinfer.driver.terminal import Terminal
    from zinfer.machine.hardware import Hardware


def refusal(problems: list[str], job_dir: Path | None = None) -> Outcome:
    """Return the outcome of a configuration that cannot run."""
    return Outcome(
        status="refused",
        reason="; ".join(problems),
        problems=tuple(problems),
        job_dir=str(job_dir) if job_dir else None,
    )


def require_possible(
    config: RunConfig, hardware: Hardware, terminal: Terminal, job_dir: Path | None = None
) -> None:
    """Refuse what this machine cannot do.

    Args:
        job_dir: the job's folder, where it has one: the default swap folder is made inside it.

    Raises:
        ConfigError: with every problem and what to set.
    """
    from zinfer.config import ConfigError
    from zinfer.machine import native_ops

    problems = []
    wanted = [
        kind
        for kind in (config.dtype.compute,)
        if kind != "auto" and kind not in hardware.device_dtypes
    ]
    problems += [
        f"dtype={kind}: {hardware.device_name} does not compute in it. "
        f"Set dtype={'bfloat16' if kind != 'bfloat16' else 'float32'}"
        for kind in wanted
    ]
    if hardware.device_kind == "cuda" and config.launcher.ranks > hardware.device_count:
        problems.append(
            f"launcher.ranks={config.launcher.ranks}, "
            f"but there are {hardware.device_count} devices. "
            f"Set launcher.ranks={hardware.device_count}"
        )
    if config.offload.use_gds and hardware.device_kind != "cuda":
        problems.append(
            "offload.use_gds=true reads straight into GPU memory, and there is no GPU. "
            "Set offload.use_gds=false"
        )
    if not config.plan.enforce:
        for problem in problems:
            terminal.warning(problem)
        problems = []
    if task_of(config).loads_ops:
        problems += native_ops.missing_requirements(native_ops.ops_of(config))
    if task_of(config).uses_swap and config.offload.device == "nvme" and not problems:
        problems += unusable_nvme_path(config, job_dir)
    if problems:
        raise ConfigError(problems)


def unusable_nvme_path(config: RunConfig, job_dir: Path | None) -> list[str]:
    """Refuse an nvme_path that is not there and whose parent is not there either, or read-only.

    A mistyped path would else become a folder on the root disk, and that disk would be measured.
    Permissions do not tell all: in /proc, or on a full disk, no folder can be made either.
    """
    from zinfer.job.swap import CLAIM_PREFIX, DEFAULT_FOLDER

    path = Path(str(config.offload.nvme_path)).expanduser().absolute()
    if path.name == DEFAULT_FOLDER and (job_dir is None or path.parent == job_dir.absolute()):
        return []  # the default, inside the job's own folder
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir():
        is_none = "is" if existing == path else f"is in {existing}, which is"
        return [
            f"offload.nvme_path={path} {is_none} not a folder. "
            "Set offload.nvme_path=/path/to/a/folder/on/a/local/disk"
        ]
    if existing not in (path, path.parent):
        return [
            f"offload.nvme_path={path}: {path.parent} does not exist. Check the spelling and the "
            f"mount, or make it first: mkdir -p {shlex.quote(str(path))}"
        ]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [
            f"offload.nvme_path={path}: {existing} is not writable. "
            "Set offload.nvme_path=/path/to/a/folder/that/you/own"
        ]
    try:
        os.rmdir(tempfile.mkdtemp(prefix=CLAIM_PREFIX, dir=existing))
    except OSError as error:
        return [
            f"offload.nvme_path={path}: no folder can be made in {existing} ({error.strerror}). "
            "Set offload.nvme_path=/path/to/a/folder/on/a/local/disk"
        ]
    return []
