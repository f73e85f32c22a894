"""Read a folder's config.json ourselves first, so that a file that is no JSON is called that.

transformers says "not a valid JSON file" of everything and gives no line.
"""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs"


def read_config_json(folder: Path) -> dict[str, Any]:
    """Return the object in `folder`/config.json.

    Raises:
        ValueError: names the file and says why it is not a model's configuration.
    """
    path = folder / "config.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if data.startswith(LFS_POINTER):
        raise ValueError(
            f"{path} is a Git LFS pointer and not the file. Run `git lfs pull` in its repository"
        )
    if not data.strip():
        raise ValueError(f"{path} is empty: {len(data)} bytes. Download it again")
    try:
        tree = json.loads(_utf8(data, path), object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        line = data.decode(errors="replace").splitlines()[error.lineno - 1 :][:1]
        raise ValueError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
            f"{f' ({line[0].strip()[:80]})' if line else ''}. Correct that line"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path} is not a model's configuration: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds {shown(tree)}, not an object {{...}}. Download it again")
    if nan := [name for name, value in tree.items() if isinstance(value, float) and isnan(value)]:
        raise ValueError(f"{path}: {', '.join(nan)} is NaN, which is no number. Correct it there")
    return tree


def _utf8(data: bytes, path: Path) -> str:
    if data.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it begins with a byte order mark (BOM). Save it as UTF-8 without BOM")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"it is not valid JSON: byte {data[error.start]:#04x} at line {line} is not UTF-8. "
            "Save it as UTF-8"
        ) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key with two different values: JSON's readers keep the last without a word."""
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree and tree[key] != value:
            raise ValueError(
                f"{key} stands there twice, with {shown(tree[key])} and {shown(value)}. Keep one"
            )
        tree[key] = value
    return tree


def shown(value: Any) -> str:
    """Return a value as it stands in the file, cut after 120 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
