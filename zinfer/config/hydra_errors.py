"""Say in our words what Hydra could not compose, with what to type instead.

Hydra's exceptions come in, sentences with the override to set go out.
"""

from __future__ import annotations

import errno
import re
import shlex

from zinfer.config.command_line import no_choice, override_problems, overrides_in

OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Errors of a disk, which need not name a file."""
NOT_UNQUOTED = r"[^\w\s/\-\\+.$%*@?|,:=()\[\]{}'\"]|[^\x00-\x7f]"
"""A character that is of no word and no mark in Hydra's grammar: `#`, `;`, letters beyond ASCII.

Source: hydra/grammar/OverrideLexer.g4.
"""


def composition_problems(error: Exception, arguments: list[str]) -> list[str] | None:
    """Say what is wrong with these overrides; None where the error is not the user's."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, OSError) and (error.filename is not None or error.errno in OF_A_DISK):
        return [_folder_problem(error)]
    known = isinstance(error, HydraException | OmegaConfBaseException)
    if not known and not (isinstance(error, ValueError) and "override must be" in str(error)):
        return None
    if spaced := _spaces(arguments, error):
        return spaced
    found = [
        problem for override in overrides_in(arguments) for problem in override_problems(override)
    ]
    missing = getattr(error, "missing_cfg_file", None)
    if missing and not any(f"{missing}".partition("/")[2] in problem for problem in found):
        found.append(no_choice(str(missing), list(getattr(error, "options", None) or [])))
    return found or [_unreadable(error) or _misused(str(error), arguments) or _sentence(error)]


def _spaces(arguments: list[str], error: Exception) -> list[str]:
    """Answer spaces where none belong: `model = opt-125m`, and 'model=opt-125m batch=paper'."""
    found = []
    for before, mark, after in zip(arguments, arguments[1:], arguments[2:], strict=False):
        if mark == "=":
            found.append(f"{before} = {after} has spaces. Set {before}={after}")
    override = getattr(error, "override", None)
    if isinstance(override, str) and re.search(r"=\S*\s+[+~]*[a-z][\w./]*=", override):
        found.append(f"{override!r} is one word with two settings. Set {override} without quotes")
    return found


def _unreadable(error: Exception) -> str | None:
    """Answer a word that is not of Hydra's grammar: a.'b'=1, a=it's, a=[1; else None."""
    from hydra.errors import OverrideParseException

    if not isinstance(error, OverrideParseException):
        return None
    typed = error.override.lstrip("+~")
    key, equals, value = typed.partition("=")
    name = re.sub(r"[^\w./@-]", "", key).strip(".")
    if not equals or not name:
        return f"{error.override} is not setting=value. Set {name or 'SETTING'}=VALUE"
    if key != name:
        return f"{key} is not the name of a setting. Set {name}={value}"
    if marks := _only_in_quotes(value):
        words = re.fullmatch(r"\[([^][{}'\"]*)\]", value)
        items = [word.strip() for word in words[1].split(",")] if words else []
        text = f"[{','.join(map(_quoted, items))}]" if words else _quoted(value)
        return (
            f"{typed} cannot be read: {marks} must stand in quotes. "
            f"Set {shlex.quote(f'{name}={text}')}"
        )
    quoted = shlex.quote(f"{name}={_quoted(value)}")
    return (
        f"{typed} cannot be read: a quote or bracket in it has no partner. "
        f"Add the partner, or give the value as text: {quoted}"
    )


def _only_in_quotes(value: str) -> str:
    """Return the characters of a value that Hydra reads in quotes only, where it has none."""
    if "'" in value or '"' in value:
        return ""
    return " ".join(dict.fromkeys(re.findall(NOT_UNQUOTED, value)))


def _quoted(text: str) -> str:
    """Write a text in Hydra's double quotes.

    It takes a backslash for a mark only where a quote follows those that stand together.
    """
    inside = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + found[2].replace('"', '\\"'), text)
    return f'"{inside}"'


def _misused(said: str, arguments: list[str]) -> str | None:
    """Answer the marks of Hydra's (-m, +, ~, @) where they do not belong; else None."""
    if found := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.+?)'", said):
        command = " ".join(shlex.quote(word) for word in arguments)
        return f"{found[1]} has several values, which make a sweep. Try zinfer -m {command}"
    if found := re.search(r"An item is already at '([\w./-]+)'", said):
        return _needs_no_plus(found[1], arguments)
    if found := re.match(r"Multiple values for ([\w./-]+)\.", said):
        return _needs_no_plus(found[1], arguments)
    if found := re.match(r"([\w./-]+) appears more than once in the final defaults list", said):
        return _needs_no_plus(found[1], arguments)
    if found := re.search(r"Could not delete (?:from config\. )?'(.+?)'", said):
        return f"~{found[1]} takes away what is not there. Leave ~{found[1]} out"
    if found := re.match(r"Could not override '([\w./-]+)@.*\n.*\nTo append .* use \+(\S+)", said):
        return f"{found[2]} puts a choice elsewhere. Set {found[1]}={found[2].partition('=')[2]}"
    return None


def _needs_no_plus(name: str, arguments: list[str]) -> str:
    """Answer a plus before what is there already, or two that add the same."""
    typed = [word for word in arguments if word.startswith((f"+{name}=", f"+{name}@"))]
    last = (typed[-1] if typed else f"{name}=VALUE").lstrip("+")
    if len(typed) > 1:
        return f"{name} is set more than once. Set {last} alone"
    return f"{name} exists, so it needs no plus. Set {last}"


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
