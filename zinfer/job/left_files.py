"""Take secrets out of the files that a job or a sweep leaves, when nobody needs them any more.

While a job runs, its worker needs the configuration as it was typed, and libraries print what they
like. Files that Hydra writes are made safe as soon as zinfer's own code runs.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from zinfer.job.files import (
    EVENTS_FILE,
    JOB_FILE,
    JOBS_FOLDER,
    RANK_EVENTS_FILE,
    SWEEP_FILE,
    WORKER_LOG,
)
from zinfer.redact import redact

HYDRA_SWEEP_FILE = "multirun.yaml"
BLOCK_LINES = 10_000
"""Of a long log so many lines are looked at together."""


def redact_left(folder: Path) -> None:
    """Take secrets out of what an ended job, or an ended sweep, has left in its folder.

    Raises:
        OSError: a file cannot be written.
    """
    for name in (JOB_FILE, SWEEP_FILE, f"{JOBS_FOLDER}/*.json"):
        for path in folder.glob(name):
            _rewrite(path, _redacted_json)
    for name in (EVENTS_FILE, RANK_EVENTS_FILE.format(rank="*")):
        for path in folder.glob(name):
            _rewrite(path, lambda text: "\n".join(map(_redacted_json, text.split("\n"))))
    _rewrite(folder / WORKER_LOG, redact)
    redact_hydra([folder / HYDRA_SWEEP_FILE])


def redact_hydra(paths: Iterable[Path]) -> None:
    """Take secrets out of Hydra's YAML files; those that do not exist are left out."""
    for path in paths:
        _rewrite(path, _redacted_yaml)


def _redacted_json(text: str) -> str:
    """Redact a document by its keys too; text that is no JSON as plain text."""
    try:
        found = json.loads(text)
    except ValueError:
        return redact(text)
    hidden = redact(found)
    if hidden == found:
        return text
    return json.dumps(hidden, indent=1 if "\n" in text else None)


def _redacted_yaml(text: str) -> str:
    """Redact a YAML document by its keys too: a long value may stand on several lines."""
    import yaml

    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # ten times faster where it is there
    try:
        found = yaml.load(text, Loader=loader)
        if redact(found) != found:
            text = _hidden_by_keys(text)
    except (yaml.YAMLError, ValueError):
        pass
    return redact(text)


def _hidden_by_keys(text: str) -> str:
    """Write the document anew, its values typed as Hydra types them."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        hidden = redact(OmegaConf.to_container(OmegaConf.create(text), resolve=False))
        return OmegaConf.to_yaml(OmegaConf.create(hidden))
    except (OmegaConfBaseException, ValueError):
        return text


def _rewrite(path: Path, change: Callable[[str], str]) -> None:
    """Put the changed text in the file's place, whole or not at all."""
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            blocks = [change(block) for block in _blocks(file)]
            mode = os.fstat(file.fileno()).st_mode
            file.seek(0)
            if all(now == before for now, before in zip(blocks, _blocks(file), strict=True)):
                return
    except FileNotFoundError:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text("".join(blocks), encoding="utf-8", errors="surrogateescape")
        temporary.chmod(mode & 0o777)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _blocks(file: Iterable[str]) -> Iterable[str]:
    """Yield the text in blocks of many lines: JSON and YAML documents are shorter than one."""
    block: list[str] = []
    for line in file:
        block.append(line)
        if len(block) == BLOCK_LINES:
            yield "".join(block)
            block = []
    if block:
        yield "".join(block)
