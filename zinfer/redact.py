"""Secrets out of everything that is stored or shown: parameters, tags, artifacts, logs, tracebacks."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus, unquote, urlsplit

HIDDEN = "***"
SHORTEST_SECRET = 6
"""Values of fewer characters are words such as `true`: replacing them would destroy text and protect nothing."""

SECRET_VARIABLE = re.compile(r"TOKEN(?!IZER)|PASSWORD|PASSWD|SECRET|KEY|CREDENTIAL", re.IGNORECASE)
URI_CREDENTIALS = re.compile(r"(?<=://)[^\s/@\"'<>]+(?:@[^\s/@\"'<>]+)*@")
"""user:secret@, user@, and passwords that contain an unescaped @."""
URI_QUERY_SECRET = re.compile(
    r"(?i)([?&][^=&\s]*(?:token|password|secret|credential|signature|api_?key)[^=&\s]*=)[^&\s\"']+"
)
HUB_TOKEN = re.compile(r"\bhf_(?:(?=[A-Za-z0-9]*\d)[A-Za-z0-9]{8,}|[A-Za-z0-9]{20,})")
AUTHORIZATION = re.compile(
    r"(?i)(authorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token)\s+)[^\s\"']+"
)
NAMED_SECRET = re.compile(
    r"(?i)((?:password|passwd|secret|credential|api_?key|access_?key|(?:access|auth|hf|hub|api)_?token)s?[\"']?\s*[:=]\s*[\"']?)"
    r"(?!null\b|none\b|true\b|false\b|[\d.]+\b|\*\*\*)[^\s\"',}&]+"
)
"""`password: value` in YAML, `"api_key": "value"` in JSON. Bare JSON words and numbers stay, so JSON stays JSON."""

T = TypeVar("T")


def redact(value: T) -> T:
    """`value` (text, or JSON of it) with every known secret replaced by ***; numbers, booleans and None stay as they are."""
    return _redact(value, known_secrets(os.environ))


def known_secrets(variables: Mapping[str, str]) -> list[str]:
    """Values of variables that are named like secrets, and passwords in URIs of the others, as written and as quoted; longest first."""
    secrets = {value for name, value in variables.items() if SECRET_VARIABLE.search(name)}
    for value in variables.values():
        if "://" in value and "@" in value:
            secrets.update(_uri_passwords(value))
    long_enough = {secret.strip() for secret in secrets if len(secret.strip()) >= SHORTEST_SECRET}
    spellings = {
        spell(secret)
        for secret in long_enough
        for spell in (str, _quote_all, quote_plus, _json_escape)
    }
    return sorted(spellings, key=len, reverse=True)


def redact_text(text: str, secrets: list[str]) -> str:
    """`text` without `secrets` and without what looks like one."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = URI_CREDENTIALS.sub(f"{HIDDEN}@", text)
    text = URI_QUERY_SECRET.sub(rf"\1{HIDDEN}", text)
    text = HUB_TOKEN.sub(HIDDEN, text)
    text = AUTHORIZATION.sub(rf"\1{HIDDEN}", text)
    return NAMED_SECRET.sub(rf"\1{HIDDEN}", text)


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        return redact_text(value, secrets)
    if isinstance(value, Mapping):
        return {
            redact_text(str(key), secrets): _redact_named(str(key), item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(_redact(item, secrets) for item in value)
    return value


def _redact_named(name: str, value: Any, secrets: list[str]) -> Any:
    """A value whose key says that it is a secret: `{"api_key": "..."}`."""
    if (
        isinstance(value, str)
        and value
        and NAMED_SECRET.fullmatch(f"{name.rpartition('.')[2]}={value}")
    ):
        return HIDDEN
    return _redact(value, secrets)


def _uri_passwords(uri: str) -> list[str]:
    """The password of a URI, as written and unquoted."""
    try:
        password = urlsplit(uri).password
    except ValueError:
        return []
    return [password, unquote(password)] if password else []


def _quote_all(secret: str) -> str:
    return quote(secret, safe="")


def _json_escape(secret: str) -> str:
    return json.dumps(secret)[1:-1]
