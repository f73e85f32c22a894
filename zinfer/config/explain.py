"""Explain one setting, one group or one choice of a group: `zinfer --explain batch.batch_size`.

The words are those of the dataclasses' docstrings and of the comments in conf/.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from zinfer.config.limits import Limits, shown
from zinfer.config.run_config import RunConfig
from zinfer.config.sentences import choices_of, meant_setting, settings
from zinfer.config.tasks import TASKS
from zinfer.paths import conf_dir


def explain(name: str) -> str:
    """Describe a setting or a group in a few lines.

    Raises:
        ValueError: there is none of this name; the sentence says which was probably meant.
    """
    if name in settings():
        return "\n".join(_setting(name))
    if name in get_type_hints(RunConfig) or choices_of(name):
        return "\n".join(_group(name))
    group, _, choice = name.replace("=", "/").partition("/")
    if choice in choices_of(group):
        return (Path(conf_dir()) / group / f"{choice}.yaml").read_text().rstrip()
    if "=" in name and choice not in choices_of(group):
        return explain(name.partition("=")[0])  # a value: its setting is what is asked about
    meant = meant_setting(name)
    instead = f"Try zinfer --explain {meant}" if meant else "zinfer --cfg job shows all settings"
    raise ValueError(f"{name} is not a setting of zinfer. {instead}")


def overview() -> str:
    """List every group and every setting that stands alone, a line each."""
    lines = list(_setting("task"))
    for name, kind in get_type_hints(RunConfig).items():
        if is_dataclass(kind):
            words = (inspect.getdoc(kind) or "").splitlines()
        else:
            words = (attribute_docstrings(RunConfig).get(name) or "").splitlines()
        if name not in ("task", "from_environment"):
            lines.append(f"{name:<12} {words[0] if words else _type(kind)}")
    return "\n".join([*lines, "", "Try zinfer --explain batch, or zinfer --explain dtype=int4"])


def _setting(name: str) -> Iterator[str]:
    group, _, field = name.rpartition(".")
    kind: Any = get_type_hints(RunConfig)[group] if group else RunConfig
    yield f"{name}: {_type(get_type_hints(kind, include_extras=True)[field or name])}"
    default = next(item.default for item in fields(kind) if item.name == (field or name))
    if default is not MISSING:
        yield f"default: {_yaml(default)}"
    if words := attribute_docstrings(kind).get(field or name):
        yield words
    if name == "task":
        yield from (f"  {task.name:<10} {task.summary}" for task in TASKS.values())


def _group(name: str) -> Iterator[str]:
    kind: Any = get_type_hints(RunConfig).get(name)
    if is_dataclass(kind):
        yield f"{name}: {inspect.getdoc(kind)}"
    for choice in choices_of(name):
        text = (Path(conf_dir()) / name / f"{choice}.yaml").read_text()
        comments = (line for line in text.splitlines() if line.startswith("# "))
        comment = next((line for line in comments if not line.startswith("# @package")), "#")
        yield f"  {name}={choice:<14} {comment.removeprefix('#').strip()}".rstrip()
    if is_dataclass(kind):
        yield "settings:"
        for item in fields(kind):
            words = (attribute_docstrings(kind).get(item.name) or "").splitlines()  # type: ignore[arg-type]
            yield f"  {name}.{item.name:<28} {words[0] if words else ''}".rstrip()


def attribute_docstrings(kind: type) -> dict[str, str]:
    """Return the text under each field of a class; Python itself does not keep it."""
    tree = ast.parse(inspect.getsource(sys.modules[kind.__module__]))
    body = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__
    )
    found = {}
    for field, text in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = inspect.cleandoc(str(text.value.value))
    return found


def _type(kind: Any) -> str:
    """Describe a setting's type: 'int from 1 to 64, or null'."""
    if get_origin(kind) is Literal:
        return ", ".join(str(choice) for choice in get_args(kind))
    arguments = get_args(kind)
    limits = next(
        (item for item in getattr(kind, "__metadata__", ()) if isinstance(item, Limits)), None
    )
    if limits is not None:
        least = (
            f"more than {shown(limits.least)}" if limits.above else f"from {shown(limits.least)}"
        )
        return f"{arguments[0].__name__} {least} to {shown(limits.most)}"
    if hasattr(kind, "__metadata__"):
        return _type(arguments[0])
    if type(None) in arguments:
        return f"{_type(next(one for one in arguments if one is not type(None)))}, or null"
    return getattr(kind, "__name__", str(kind)) if not arguments else str(kind)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
