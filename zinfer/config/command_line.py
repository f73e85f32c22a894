"""Understand what people type: rewrite words to overrides, and find names that do not exist.

All overrides are looked at, so that one typing error does not hide the next.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from zinfer.config.sentences import (
    MAIN_SETTINGS,
    choices_of,
    default_choice,
    groups,
    meant_choice,
    meant_setting,
    nearest,
    settings,
    unknown_setting,
)
from zinfer.config.tasks import TASKS
from zinfer.paths import conf_dir

FREE = ("tracking.tags.", "model.overrides.", "hardware.device_flops_per_s.")
"""Beginnings of settings whose rest is the user's own."""
OWN_FLAGS = ("--version", "--explain")
"""Options that Hydra does not have."""
ALIKE_FLAG, ALIKE_WORD = 0.75, 0.7
"""Likeness from which an option, or a bare word, is taken for a mistyped one."""
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


def may_choose_mode(arguments: list[str]) -> bool:
    """Tell if hydra.mode may be set: by name, or in a file that the user may have written."""
    files = ("experiment=", "hydra.searchpath", "hydra=", "hydra/", "--config", "-cp", "-cn", "-cd")
    if any("hydra.mode" in word or word.lstrip("+").startswith(files) for word in arguments):
        return True
    own = (Path(conf_dir()) / "config.yaml").read_text()
    return any(line.strip().startswith("mode:") for line in own.splitlines())


def is_completion(arguments: list[str]) -> bool:
    """Tell if a shell asks what the command line may go on with."""
    return arguments[:1] in (["-sc"], ["--shell-completion"]) and "query=bash" in arguments


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
        said, _, flags = str(error).partition("unrecognized arguments: ")
        if said or not flags:
            return [f"{error}. Try zinfer --help"]
        known = [*parser._option_string_actions, *OWN_FLAGS]
        return [_unknown_flag(flag, known) for flag in flags.split() if flag.startswith("-")]
    if given.resolve and not (given.cfg or given.help):
        return ["--resolve shows nothing by itself. Try zinfer --cfg job --resolve"]
    return []


def _unknown_flag(flag: str, known: list[str]) -> str:
    """Answer an option that there is not: --versoin, --batch-size, --model=opt-125m."""
    typed, equals, value = flag.partition("=")
    option = nearest(typed, [one for one in known if one.startswith("--")], alike=ALIKE_FLAG)
    if option is not None and not equals:
        return f"{flag} is no option. Try zinfer {option}"
    name = typed.lstrip("-").replace("-", "_")
    setting = name if name in groups() or name in settings() else meant_setting(name, ALIKE_FLAG)
    if setting is None:
        return f"{flag} is no option. Try zinfer --help"
    return f"{flag} is no option: settings have no dashes. Set {setting}={value or 'VALUE'}"


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
    if not name:
        return [f"{override} names no setting. Try zinfer --help"]
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
        no_choice(f"{group}/{one.strip()}", choices_of(group))
        for one in value.split(",")
        if re.fullmatch(r"[\w./:@-]+", one.strip()) and one.strip() not in choices_of(group)
    ]


def no_choice(path: str, options: list[str]) -> str:
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
    if group in MAIN_SETTINGS and re.fullmatch(r"\d+", value):
        return f"{group}={value} does not exist. Set {MAIN_SETTINGS[group]}={value}"
    options = options or choices_of(group)
    meant = meant_choice(group, value, options)
    if meant is None:
        return f"{group}={value} does not exist. {_one_of(group, options)}"
    return f"{group}={value} does not exist. Did you mean this? Set {group}={meant}"


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
    meant = nearest(word, [*WORDS, "report"], alike=ALIKE_WORD)
    if meant is not None:
        return f"{word} is neither a word of zinfer's nor setting=value. Try zinfer {meant}"
    model = nearest(word, choices_of("model"), alike=ALIKE_WORD)
    if model is not None:
        return f"{word} is not setting=value. Set model={model}"
    return f"{word} is not setting=value. Try zinfer --help"
