"""Name a job for people: its model and the settings that differ."""

from __future__ import annotations

import re
from collections.abc import Iterable

from zinfer.redact import redact

NOT_SHOWN = ("model", "task", "format", "tracking", "sweep", "hydra", "launcher.timeout_s")
"""Settings that do not tell one job from another, or that the label begins with."""


def job_label(model: str, settings: Iterable[str], task: str = "run") -> str:
    """Return 'opt-125m offload=cpu batch.batch_size=8', with the task before it if it is not run.

    Args:
        settings: overrides as they were typed.
    """
    shown = [as_typed(setting) for setting in settings if _name(setting) not in NOT_SHOWN]
    words = [*([] if task == "run" else [task]), model, *shown]
    return str(redact(" ".join(words)))


def as_typed(override: str) -> str:
    """Write an override as people type it: Hydra spells switches as Python does, and we add ++."""
    name, equals, value = override.removeprefix("++").partition("=")
    switch = re.compile(r"(?<![^,:\[{])(True|False)(?![^,\]}])")
    return name + equals + switch.sub(lambda found: found[1].lower(), value)


def _name(setting: str) -> str:
    """Return the setting's name, of a group its first part: 'tracking.uri=x' -> 'tracking'."""
    name = setting.lstrip("+~").partition("=")[0]
    group = name.partition(".")[0].partition("/")[0]
    return group if group in NOT_SHOWN and name not in ("model.source",) else name
