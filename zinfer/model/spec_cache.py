"""Keep counted architectures: those of the catalogue come with zinfer, others go to disk.

Both are found by the same name. It covers what was asked for, the libraries' versions and the code
that counts. Where one of them differs, a model of the catalogue is counted here like any other.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.model.kv_layout import KvLayer
from zinfer.model.parameters import Parameter
from zinfer.paths import cache_dir

if TYPE_CHECKING:
    from zinfer.config import ModelConfig

CATALOGUE = Path(__file__).with_name("catalogue_specs.zip")
"""Written by `make catalogue-specs`."""
COUNTING = (
    "spec.py",
    "spec_cache.py",
    "parameters.py",
    "meta_pass.py",
    "kv_layout.py",
    "real_pass.py",
    "hf.py",
    "config_reading.py",
)
"""Modules whose code decides what is counted and how it is written down."""

Fields = dict[str, Any]
"""Fields of ModelSpec except name and dtype, and the config's own dtype as `config_dtype`."""


def cache_key(model: ModelConfig) -> tuple[str, bool]:
    """Return all that the counts depend on as a key, and True if the counts may be kept.

    They may not where something is out of sight: files on a hub, or a model's own code.
    """
    folder = Path(os.path.expanduser(model.source)) if model.source else None
    config_file = folder / "config.json" if folder else None
    config_hash = (
        hashlib.sha256(config_file.read_bytes()).hexdigest()
        if config_file and config_file.is_file()
        else None
    )
    key = [
        model.model_type,
        model.overrides,
        model.source,
        config_hash,
        model.trust_remote_code,
        model.gguf_file,
    ]
    is_stored = (
        not model.trust_remote_code
        and not model.gguf_file
        and (model.source is None or config_hash is not None)
    )
    return json.dumps(key, sort_keys=True, default=str), is_stored


@functools.cache
def _origin() -> tuple[str, str]:
    """Return the version of transformers and a digest of torch's version and our own code.

    The device that torch was built for is left out: counts do not depend on it.
    """
    versions = {
        package: importlib.metadata.version(package).split("+")[0]
        for package in ("transformers", "torch")
    }
    digest = hashlib.sha256(str(versions).encode())
    for module in COUNTING:
        digest.update(Path(__file__).with_name(module).read_bytes())
    return versions["transformers"], digest.hexdigest()


def entry_name(key: str) -> str:
    """Return the name of the file that holds the counts of this key."""
    transformers, origin = _origin()
    return f"{transformers}-{hashlib.sha256((origin + key).encode()).hexdigest()[:32]}.json"


def _cache_file(key: str) -> Path:
    return cache_dir() / "model_specs" / entry_name(key)


def is_kept(key: str) -> bool:
    """Tell if read_counted finds counts for this key."""
    return _cache_file(key).is_file() or _catalogue_entry(key) is not None


def read_counted(key: str) -> Fields | None:
    """Return the counts of this key, from this machine or the catalogue. None: there are none."""
    try:
        text: str | bytes | None = _cache_file(key).read_text()
    except OSError:
        text = _catalogue_entry(key)
    try:
        return None if text is None else from_json(text)
    except ValueError:  # cut short: count again
        return None


def _catalogue_entry(key: str) -> bytes | None:
    try:
        with zipfile.ZipFile(CATALOGUE) as catalogue:
            return catalogue.read(entry_name(key))
    except (OSError, KeyError, zipfile.BadZipFile):
        return None


def write_counted(key: str, fields: Fields) -> None:
    """Write the counts of this key, whole or not at all.

    A cache that cannot be written costs the next plan a few seconds, nothing else.
    """
    path = _cache_file(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(to_json(fields))
        os.replace(file.name, path)
    except OSError:
        return


def write_catalogue(counted: Iterable[tuple[str, Fields]], path: Path = CATALOGUE) -> None:
    """Write all (key, fields) into one archive: the same bytes for the same counts."""
    entries = {entry_name(key): to_json(fields) for key, fields in counted}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, text in sorted(entries.items()):
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)


def to_json(fields: Fields) -> str:
    """Return the fields as the text that is kept."""
    rows = fields | {
        "parameters": [dataclasses.astuple(parameter) for parameter in fields["parameters"]]
    }
    if fields["kv_layers"] is not None:
        rows["kv_layers"] = [dataclasses.asdict(layer) for layer in fields["kv_layers"]]
    return json.dumps(rows)


def from_json(text: str | bytes) -> Fields:
    """Return kept text as fields of their own types; ValueError for what is no JSON."""
    fields: Fields = json.loads(text)
    fields["parameters"] = tuple(
        Parameter(name, tuple(shape), *rest) for name, shape, *rest in fields["parameters"]
    )
    fields["layer_classes"] = tuple(fields["layer_classes"])
    if fields["kv_layers"] is not None:
        fields["kv_layers"] = tuple(KvLayer(**layer) for layer in fields["kv_layers"])
    return fields
