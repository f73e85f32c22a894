"""Understand what people type: rewrite words to overrides, and say what Hydra could not compose.

Hydra's exceptions come in, sentences with the override to set go out. All overrides are looked at,
so that one typing error does not hide the next.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

from zinfer.config.sentences import choices_of, default_choice, nearest, settings, unknown_setting
from zinfer.config.tasks import TASKS
from zinfer.paths import conf_dir

OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Errors of a disk, which need not name a file."""
FREE = ("tracking.tags.", "model.overrides.", "hardware.device_flops_per_s.")
"""Beginnings of settings whose rest is the user's own."""
SWEEP_FLAGS = ("-m", "--multirun")
WORDS = {"sweep": "-m", **{name: f"task={name}" for name in TASKS}}
"""First word of the command -> what it stands for."""
OWN_KEYS = ("model.overrides.", "tracking.tags.", "hardware.device_flops_per_s.")
"""Settings whose keys are the reader's own."""


def normalised(arguments: list[str]) -> list[str]:
    """Put -m first, where alone Hydra takes it, and turn `zinfer plan ...` into task=plan.

    A key of the reader's own needs no "+".
    """
    if arguments and arguments[0] in WORDS:
        arguments = [WORDS[arguments[0]], *arguments[1:]]
    flags = [argument for argument in arguments if argument in SWEEP_FLAGS]
    rest = [argument for argument in arguments if argument not in SWEEP_FLAGS]
    return flags[:1] + [with_own_key(argument) for argument in rest]


def with_own_key(override: str) -> str:
    """Let Hydra add a key that conf/ does not name, and write out the home folder: key=~/x.

    Shells leave such a `~` as it stands, and Hydra's grammar has none.
    """
    key, equals, value = override.partition("=")
    if key and re.match(r"~[\w.-]*(/|$)", value):
        override = f"{key}{equals}{os.path.expanduser(value)}"
    return f"++{override}" if override.startswith(OWN_KEYS) else override


PLUGINS = {
    "hydra/launcher/joblib": "launchers",
    "hydra/launcher/submitit_local": "launchers",
    "hydra/launcher/submitit_slurm": "launchers",
    "hydra/launcher/ray": "ray",
    "hydra/sweeper/optuna": "search",
}
"""Choices that plugins of Hydra bring -> zinfer's extra that installs the plugin."""


def wants_json(arguments: list[str]) -> bool:
    """Tell if format=json is asked for, before anything is composed."""
    return any(argument.lstrip("+") == "format=json" for argument in arguments)


def argument_problems(arguments: list[str]) -> list[str]:
    """List flags that Hydra does not have, or that are not used as it wants them."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def refuse(message: str) -> Any:
        raise ValueError(message)

    parser.error = refuse  # type: ignore[method-assign]
    try:
        given = parser.parse_args(arguments)
    except ValueError as error:
        return [f"{error}. Try zinfer --help"]
    if given.resolve and not (given.cfg or given.help):
        return ["--resolve shows nothing by itself. Try zinfer --cfg job --resolve"]
    return []


def composition_problems(error: Exception, arguments: list[str]) -> list[str] | None:
    """Say what is wrong with these overrides; None where the error is not the user's."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, OSError) and (error.filename is not None or error.errno in OF_A_DISK):
        return [_folder_problem(error)]
    known = isinstance(error, HydraException | OmegaConfBaseException)
    if not known and not (isinstance(error, ValueError) and "override must be" in str(error)):
        return None
    found = [
        problem for override in overrides_in(arguments) for problem in override_problems(override)
    ]
    missing = getattr(error, "missing_cfg_file", None)
    if missing and not any(f"{missing}".partition("/")[2] in problem for problem in found):
        found.append(_no_choice(str(missing), list(getattr(error, "options", None) or [])))
    return found or [_sentence(error)]


def overrides_in(arguments: list[str]) -> list[str]:
    """Return the overrides among arguments that Hydra can parse."""
    from hydra._internal.utils import get_args_parser

    return list(get_args_parser().parse_args(arguments).overrides)


def override_problems(override: str) -> list[str]:
    """List keys that are no setting, and choices that no group has."""
    key, equals, value = override.partition("=")
    if not equals:
        return [] if override.startswith("~") else [_bare_word(override)]
    name = key.lstrip("+~").partition("@")[0]
    if name.startswith("hydra") or name == "experiment":
        return _choice_problems(name, value) if name == "experiment" else []
    if choices_of(name):
        return _choice_problems(name, value)
    if name in settings() or name.startswith(FREE) or name in _extra_names():
        return []
    return [unknown_setting(tuple(name.split(".")), value)]


def _extra_names() -> set[str]:
    return {"tracking.tags", "model.overrides", "hardware.device_flops_per_s"}


def _choice_problems(group: str, value: str) -> list[str]:
    """List values of `model=a,b` that conf/ does not have, if they look like plain names."""
    if value in ("null", ""):
        if group == "experiment":
            return []
        return [f"{group}={value} chooses nothing. {_one_of(group)}"]
    return [
        _no_choice(f"{group}/{one.strip()}", choices_of(group))
        for one in value.split(",")
        if re.fullmatch(r"[\w./:@-]+", one.strip()) and one.strip() not in choices_of(group)
    ]


def _no_choice(path: str, options: list[str]) -> str:
    """Say what to set for a missing choice: a catalogue name, model=custom, or the nearest one."""
    if path in PLUGINS:
        group, _, value = path.rpartition("/")
        return f"{group}={value} is not installed. Try pip install 'zinfer[{PLUGINS[path]}]'"
    group, _, value = path.rpartition("/") if path.startswith("hydra/") else path.partition("/")
    if group == "model":
        if name := name_of_hub_id(value):
            return f"model={value} is the hub's name. Set model={name}"
        if "/" in value or Path(value).expanduser().exists():
            return f"model={value} is not in conf/model. Set model=custom model.source={value}"
    options = options or choices_of(group)
    meant = nearest(value, options)
    if meant is None:
        return f"{group}={value} does not exist. {_one_of(group, options)}"
    return f"{group}={value} does not exist. Did you mean it so? Set {group}={meant}"


def _one_of(group: str, options: list[str] | None = None) -> str:
    options = options or choices_of(group)
    if not options:
        return "Drop it; zinfer --help shows all groups"
    default = default_choice(group) if choices_of(group) else options[0]
    return f"Set {group}={default}; choices: {', '.join(options)}"


def name_of_hub_id(hub_id: str) -> str | None:
    """Return the catalogue's name of a model on the hub; None where no file names it."""
    for path in sorted((Path(conf_dir()) / "model").glob("*.yaml")):
        if re.search(
            rf"(?im)^hub_id:\s*[\"']?{re.escape(hub_id)}[\"']?\s*(#.*)?$", path.read_text()
        ):
            return path.stem
    return None


def _bare_word(word: str) -> str:
    """Answer a bare word, as in `zinfer opt-125m` or `zinfer pln`."""
    meant = nearest(word, [*WORDS, "report"])
    if meant is not None:
        return f"{word} is neither a word of zinfer's nor setting=value. Try zinfer {meant}"
    if word in choices_of("model"):
        return f"{word} is not setting=value. Set model={word}"
    return f"{word} is not setting=value. Try zinfer --help"


def _folder_problem(error: OSError) -> str:
    return (
        f"{error.filename or 'hydra.run.dir'}: the folder of this job cannot be made or written to "
        f"({error.strerror}). Set hydra.run.dir=/path/to/a/folder/that/you/own"
    )


def _sentence(error: Exception) -> str:
    """Return Hydra's own words in one line, without its links and hints on how to read a stack."""
    override = getattr(error, "override", None)
    said = [f"{override}: {error}" if isinstance(override, str) else str(error)]
    if error.__cause__ is not None and str(error.__cause__) not in said[0]:
        said.append(str(error.__cause__))
    lines = [
        line.strip()
        for text in said
        for line in text.splitlines()
        if line.strip()
        and not line.strip().startswith(
            ("See http", "Config search path", "full_key", "object_type", "^")
        )
    ]
    text = " ".join(" ".join(lines).split())
    return text if text.endswith((".", "!", "?")) else f"{text}. Try zinfer --help"
