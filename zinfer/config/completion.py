"""Complete what Hydra does not: words, options, values after a comma, and choices of a setting.

The shell's function comes from Hydra (`zinfer -sc install=bash`), and calls `zinfer -sc query=bash`
with the line so far in COMP_LINE.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from zinfer.config.command_line import OWN_FLAGS, WORDS, normalised
from zinfer.config.sentences import groups, settings
from zinfer.config.tasks import TASKS
from zinfer.paths import conf_dir

FLAGS = (*OWN_FLAGS, "--help", "--cfg", "--multirun", "--config-dir", "--resolve", "--package")
LINE, POINT = "COMP_LINE", "COMP_POINT"


def completions(line: str) -> list[str] | None:
    """Return what the last word of this command line may become; None: Hydra knows it better.

    Args:
        line: the command with the program's name, up to the cursor.
    """
    words = line.split(" ")[1:] or [""]
    *before, last = words
    before = [word for word in before if word]
    if before[-1:] == ["--explain"]:
        return _beginning(last, [*groups(), *settings()])
    if last.startswith("-"):
        return _beginning(last, FLAGS)
    key, equals, value = last.partition("=")
    if equals:
        return _values(key, value)
    found = [] if before else _beginning(last, [*WORDS, "report"])
    return found or None


def _values(key: str, value: str) -> list[str] | None:
    """Return `key=a,b` for each value that the part behind the last comma may become."""
    known = values_of(key.lstrip("+"))
    if not known:
        return None
    *there, last = value.split(",")
    free = [one for one in known if one not in there]
    return [f"{key}={','.join([*there, one])}" for one in _beginning(last, free)]


def values_of(key: str) -> list[str]:
    """Return the choices of a group, those in folders too, or the values of a setting's type."""
    folder = Path(conf_dir()) / key
    if not key.startswith("hydra") and folder.is_dir():
        files = sorted(folder.rglob("*.yaml"))
        return [str(path.relative_to(folder).with_suffix("")) for path in files]
    from zinfer.config.run_config import RunConfig

    if key == "task":
        return list(TASKS)
    group, _, field = key.rpartition(".")
    hints = get_type_hints(RunConfig)
    kind = get_type_hints(hints[group]).get(field) if group in hints else hints.get(key)
    if kind is bool:
        return ["true", "false"]
    return [str(one) for one in get_args(kind)] if get_origin(kind) is Literal else []


def _beginning(start: str, known: list[str] | tuple[str, ...]) -> list[str]:
    return [word for word in known if word.startswith(start)]


def hydra_line(line: str) -> str:
    """Return the line as Hydra can read it: without zinfer's own words and options."""
    program, *words = line.split(" ")
    *before, last = words or [""]
    kept = [word for word in normalised([word for word in before if word]) if "=" in word]
    return " ".join([program, *kept, last])


def answer() -> bool:
    """Print the completions; False where Hydra has to, with a line that it can read."""
    line = os.environ.get(LINE, "")[: int(os.environ.get(POINT) or 0) or None]
    found = completions(line)
    if found is None:
        os.environ[LINE] = readable = hydra_line(line)
        os.environ[POINT] = str(len(readable))
        return False
    print(*found)
    return True
