"""Say what pydantic found wrong in the user's own terms, each with the override to set instead."""

from __future__ import annotations

import difflib
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from zinfer.config.limits import NUMBER_ERROR, shown
from zinfer.paths import conf_dir

EXAMPLES = {
    "model.source": "model.source=/path/to/a/folder or model.source=HUB/ID",
    "offload.nvme_path": "offload.nvme_path=/local_nvme",
    "tracking.uri": "tracking.uri=http://127.0.0.1:5000",
}
"""Values to try for settings that people forget."""
SOME_TEXT = "x"
SHORT_NAMES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""What other programs call our choices."""
OTHER_NAMES: dict[str, dict[str, str]] = {
    "offload": {
        **dict.fromkeys(("gpu", "cuda", "device", "off", "false"), "none"),
        **dict.fromkeys(("ram", "host", "memory", "dram"), "cpu"),
        **dict.fromkeys(("disk", "ssd", "drive"), "nvme"),
    },
    "kv_cache": {
        **dict.fromkeys(("cpu", "ram", "memory", "dram"), "host"),
        **dict.fromkeys(("gpu", "cuda", "none"), "device"),
    },
    "dtype": {"4bit": "int4", "8bit": "int8", "16bit": "float16", "32bit": "float32"},
    "engine": {"deepspeed": "zero", "transformers": "resident", "hf": "resident"},
    "hardware": {"local": "detect", "auto": "detect", "this": "detect"},
    "weights": {"real": "pretrained", "random": "dummy", "true": "pretrained", "false": "dummy"},
    "task": {"benchmark": "run", "bench": "run", "generate": "run", "dryrun": "plan"},
}
"""Group or setting -> what people call its choices -> the choice."""
GROUP_BY_VALUE = {"dtype.bits": {"4": "dtype=int4", "8": "dtype=int8", "16": "dtype=bfloat16"}}
"""Setting that does not exist -> what people want of it -> the choice of a group that does it."""
MAIN_SETTINGS = {"batch": "batch.batch_size"}
"""Group -> its setting that a bare number is meant for: batch=8."""
ALIKE = 0.6
"""Likeness from which a word is taken for a mistyped one; difflib's own threshold."""
SHORTEST_BEGINNING = 2
"""Characters of a word's first part that are enough to mean it."""
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list such as [1, 2]",
    "dataclass": "a group of settings",
}
"""First word of pydantic's error types -> what was expected."""
SWITCHES = {"True": "true", "False": "false"}
"""How Python writes what YAML writes otherwise."""


def validation_problem(detail: Any, given: str) -> str:
    """Turn one of pydantic's findings into a sentence that names the override to set.

    Args:
        given: the value as it may be shown.
    """
    path = tuple(detail["loc"])
    name = ".".join(str(part) for part in path)
    context = detail.get("ctx") or {}
    match detail["type"]:
        case "literal_error":
            choices = choices_in(str(context["expected"]))
            meant = meant_choice(str(path[0]), given, choices) or choices[0]
            return f"{name}={given} is not one of {', '.join(choices)}. Set {name}={meant}"
        case "unexpected_keyword_argument":
            return unknown_setting(path, given)
        case "missing" | "missing_keyword_only_argument" | "missing_argument":
            return no_value(path)
        case "tuple_type":
            entries = "" if given == "null" else given
            return f"{name}={given} is not a list. Set {name}=[{entries}]"
        case "dict_type":
            return f"{name}={given} is not a mapping. Set {name}.KEY={given}"
        case kind if kind == NUMBER_ERROR:
            return f"{name}={given} {context['sentence']}. Set {name}={_instead(path, context)}"
    expected = KINDS.get(detail["type"].partition("_")[0])
    said = f"is not {expected}" if expected else f"is wrong: {detail['msg']}"
    return f"{name}={given} {said}. Set {name}={_instead(path, context)}"


def unknown_setting(path: tuple[Any, ...], given: str) -> str:
    """Name the setting that was probably meant: batch.batchsize -> batch.batch_size."""
    name = ".".join(str(part) for part in path)
    said, meant = f"{name} is not a setting of zinfer", meant_setting(name)
    if choices := GROUP_BY_VALUE.get(name):
        return f"{said}. Set {choices.get(given) or ' or '.join(choices.values())}"
    if meant is not None:
        return f"{said}. Did you mean this? Set {meant}={given}"
    group = name.partition(".")[0]
    if group in groups():
        return f"{said}. Drop it; zinfer --explain {group} shows the settings of {group}"
    return f"{said}. Drop it; zinfer --cfg job shows all settings"


def meant_setting(name: str, alike: float = ALIKE) -> str | None:
    """Return the setting or group that a mistyped name is for; None where none is alike.

    Below a group that exists only its own settings count, and there one word of a setting's name is
    enough: batch.size is batch.batch_size.
    """
    group, dot, rest = name.partition(".")
    if not dot or group not in groups():
        return nearest(name, [*groups(), *settings()], alike=alike)
    own = [known for known in settings() if known.startswith(f"{group}.")]
    words = set(rest.lower().replace("-", "_").split("_"))
    for known in own:
        if words <= set(known.rpartition(".")[2].split("_")):
            return known
    return nearest(rest, [known.rpartition(".")[2] for known in own], prefix=f"{group}.")


def meant_choice(group: str, value: str, choices: list[str]) -> str | None:
    """Return the choice that a word is for, by its other names or by its letters; or None."""
    called = OTHER_NAMES.get(group, {}).get(re.sub("[-_ ]", "", value.lower()))
    return called if called in choices else nearest(value, choices)


def no_value(path: tuple[Any, ...]) -> str:
    """Name a setting or a group that nothing was chosen for, with its choices."""
    name = ".".join(str(part) for part in path)
    choices = choices_of(str(path[0]))
    if choices:
        usual = default_choice(str(path[0]))
        return f"{name} has no value. Set {path[0]}={usual}; choices: {', '.join(choices)}"
    example = f", e.g. {EXAMPLES[name]}" if name in EXAMPLES else ""
    return f"{name} has no value. Set {name}=VALUE{example}"


def nearest(text: str, known: list[str], *, prefix: str = "", alike: float = ALIKE) -> str | None:
    """Return the known word that is most like this one; None when none is.

    Of a dotted name its last part counts too: people type `batchsize` for batch.batch_size.
    A word that goes on where the text ends is nearer than any other: h100 is h100_2nvme.

    Args:
        prefix: put before the word that is found.
        alike: least likeness, from 0 to 1.
    """
    text = SHORT_NAMES.get(text.lower(), text.lower())

    def likeness(word: str) -> float:
        if len(text) >= SHORTEST_BEGINNING and re.match(rf"{re.escape(text)}[^a-z0-9]", word):
            return 1.0
        parts = ((text, word), (text.rpartition(".")[2], word.rpartition(".")[2]))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in parts)

    best = max(known, key=likeness, default=None)
    return prefix + best if best is not None and likeness(best) >= alike else None


def settings() -> list[str]:
    """Return all settings by their dotted names."""
    from zinfer.config.run_config import RunConfig

    found = []
    for name, kind in get_type_hints(RunConfig).items():
        if is_dataclass(kind):
            found += [f"{name}.{item.name}" for item in fields(kind)]
        elif name != "from_environment":
            found.append(name)
    return found


def default_choice(group: str) -> str:
    """Return the choice of a group that conf/config.yaml makes; else the first one."""
    text = (Path(conf_dir()) / "config.yaml").read_text()
    found = re.search(rf"(?m)^  - {re.escape(group)}: ([\w.-]+)", text)
    return found.group(1) if found and found.group(1) != "null" else choices_of(group)[0]


def groups() -> list[str]:
    """Return the names of conf/'s groups."""
    return sorted(
        path.name for path in Path(conf_dir()).iterdir() if path.is_dir() and path.name != "hydra"
    )


def choices_of(group: str) -> list[str]:
    """Return the choices of a group of conf/, in alphabetical order; empty where it is no group."""
    return sorted(path.stem for path in (Path(conf_dir()) / group).glob("*.yaml"))


def choices_in(expected: str) -> list[str]:
    """Read choices from pydantic's text, "'a', True or 'c'", as people type them."""
    listed = expected.replace(" or ", ", ").split(", ")
    return [SWITCHES.get(choice, choice.strip("'")) for choice in listed]


def _instead(path: tuple[Any, ...], context: dict[str, Any]) -> str:
    """Return a value to set: the bound that was crossed, else the default."""
    if context.get("instead") is not None:
        return shown(context["instead"])
    value = usable_value(path)
    if value is MISSING or value == SOME_TEXT:
        return "VALUE"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shown(value) if isinstance(value, int | float) else str(value)


def default_of(path: tuple[Any, ...]) -> Any:
    """Return the default of a setting; dataclasses.MISSING where it has none."""
    from zinfer.config.run_config import RunConfig

    kind = get_type_hints(RunConfig).get(str(path[0]))
    if len(path) < 2 or not is_dataclass(kind):
        return MISSING
    found = next((item for item in fields(kind) if item.name == path[1]), None)
    return MISSING if found is None else found.default


def usable_value(path: tuple[Any, ...]) -> Any:
    """Return some value that this setting takes; dataclasses.MISSING where none is known."""
    from zinfer.config.run_config import RunConfig

    default = default_of(path)
    kind = get_type_hints(RunConfig).get(str(path[0]))
    if default is not MISSING or len(path) != 2 or not is_dataclass(kind):
        return default
    wanted = get_type_hints(kind).get(str(path[1]))
    if get_origin(wanted) is Literal:
        return get_args(wanted)[0]
    return {int: 2, str: SOME_TEXT}.get(wanted, MISSING) if isinstance(wanted, type) else MISSING
