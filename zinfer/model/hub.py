"""Ask whether the hub can be reached, and pass transformers the settings of one model source.

A source is a local folder or a repository id of the hub.
"""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from zinfer.config import ModelConfig


def folder_of(source: str) -> Path | None:
    """Return the local folder that `source` names, or None if it is a hub id."""
    folder = Path(os.path.expanduser(source))
    return folder if folder.is_dir() else None


def from_pretrained_kwargs(source: str, model: ModelConfig) -> dict[str, Any]:
    """Return the keyword arguments that every `from_pretrained` of this source gets."""
    kwargs: dict[str, Any] = {
        "trust_remote_code": model.trust_remote_code,
        "local_files_only": folder_of(source) is None and not hub_reachable(),
    }
    if model.gguf_file and source == model.source:
        kwargs["gguf_file"] = model.gguf_file
    return kwargs


@cache
def hub_reachable() -> bool:
    """Try one connection to the hub for at most 3 s; its client would try for 23 s.

    Behind a proxy this cannot be tried; the answer is True there.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    from urllib.request import getproxies  # here: it imports the whole of http.client

    if getproxies():
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((endpoint.hostname or "", endpoint.port or 443), timeout=3).close()
    except OSError:
        return False
    return True
