"""Take secrets out of everything that is stored or shown: parameters, tags, logs, tracebacks.

A secret is known by the name that it stands under (a variable, a key, a setting), by its form (a
password in a URI, a hub token, a web hook), or because the configuration took it from the
environment (`hide`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus, unquote, urlsplit

HIDDEN = "***"
SHORTEST_SECRET = 6
"""Shorter values are words such as `true`: replacing them destroys text and protects nothing."""
SHORTEST_LINE = 16
"""A line of a secret with several lines is hidden alone, too, from this length on."""

SECRET_VARIABLE = re.compile(
    r"TOKEN(?!IZER)|PASSWORD|PASSWD|PASSPHRASE|(?:^|_)(?:PASS|PWD|PW|DSN)(?:_|$)"
    r"|SECRET|KEY|CREDENTIAL|WEBHOOK|COOKIE",
    re.IGNORECASE,
)
"""Names of environment variables whose whole value is a secret."""
NOT_SECRET_VARIABLE = frozenset({"PWD", "OLDPWD"})
"""The shell's working directories, which are named like passwords."""
SECRET_WORDS = (
    r"(?:pass(?:word|wd|phrase)?|pwd|secret|credential|cookie|dsn|web[-_]?hook"
    r"|(?:api|access|private|signing|encryption|account|storage)[-_]?key"
    r"|(?:access|auth|hf|hub|api|bot|refresh|session|id|bearer|secret|security)[-_]?token"
    r"|authorization)"
)
SECRET_KEY = re.compile(
    rf"(?i)(?:(?:^|[._-]|(?-i:(?<=[a-z])(?=[A-Z]))){SECRET_WORDS}s?(?:[._-](?:url|id|value|string))?|(?:^|\.)token)$"
)
"""Keys of mappings, tags and settings whose values are secrets: db_pass, clientSecret, webhook_url.

`pad_token` and other tokens of a tokenizer are none.
"""
URI_CREDENTIALS = re.compile(r"(?<=://)[^\s/@\"'<>]+(?:@[^\s/@\"'<>]+)*@")
"""user:secret@, user@, and passwords that contain an unescaped @."""
URI_QUERY_SECRET = re.compile(
    r"(?i)([?&;][^=&\s]*(?:token|password|pwd|secret|credential|signature|sig|api_?key)[^=&\s]*=)"
    r"[^&\s\"';]+"
)
WEBHOOK = re.compile(
    r"(?i)(https?://(?:hooks\.[^\s/\"'<>]+|[^\s\"'<>]*/(?:api/)?webhooks?)/)[^\s\"'<>]+"
)
"""Whoever knows the path of a web hook can post to it."""
HUB_TOKEN = re.compile(r"\bhf_(?:(?=[A-Za-z0-9]*\d)[A-Za-z0-9]{8,}|[A-Za-z0-9]{20,})")
TOKEN_FORMS = re.compile(
    r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|npm_[A-Za-z0-9]{30,}"
    r"|sk-[A-Za-z0-9_-]{20,}|xox[abeprs]-[A-Za-z0-9-]{10,}|(?:AKIA|ASIA)[0-9A-Z]{16}"
    r"|dapi[0-9a-f]{32}|eyJ[\w-]{10,}\.eyJ[\w-]{4,}\.[\w-]{6,})"
)
"""Tokens of GitHub, GitLab, npm, OpenAI, Slack, AWS, Databricks, and JSON web tokens, as issued."""
PRIVATE_KEY = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----)(?:.|\n)*?(?:(?=-----END)|\Z)")
"""A key in PEM form, also with \\n in place of its line ends, and one that is cut off."""
AUTHORIZATION = re.compile(
    r"(?i)(authorization[\"']?(?:\\?\s)*\\?[:=](?:\\?\s)*[\"']?(?:bearer|basic|token)(?:\\?\s)+)"
    r"[^\s\"']+"
)
"""Also as Hydra writes an override: `note=Authorization\\:\\ Bearer\\ abc`."""
PATH_AND_SENTENCE = (
    r"(?:^|(?<=[\s='\"(,\[]))(?:~|\.{0,2})/(?![^\s:\"']*(?i:secret))[^\s:\"'=,;&?@{}]+['\"]?:"
    r"(?= (?:[a-z]+ing\b|[A-Za-z]+ [a-z(]))"
)
"""A path and its colon in `/etc/passwd: the folder is ...`: what follows tells of that file.

Two words, or one such as `loading`, are a sentence. Where secrets are kept as files, the secret
itself may follow: `/run/secrets/password: ...`.
"""
NAMED_SECRET = re.compile(
    rf"(?P<path>{PATH_AND_SENTENCE})"
    rf"|(?i:(?P<name>(?:\b|_|(?-i:(?<=[a-z])(?=[A-Z]))){SECRET_WORDS}s?[\"']?\s*[:=]\s*[\"']?)"
    r"(?!null\b|none\b|true\b|false\b|[\d.]+\b|\*\*\*|\$\{|(?:bearer|basic|token)\s)"
    r"(?:(?<=\")[^\"\n]+(?=\")|(?<=')[^'\n]+(?=')|[^\s\"',}&;]+))"
)
"""`password: value` in YAML, `"api_key": "value"` in JSON, `pwd=value` in a connection string.

Bare JSON words and numbers stay, so JSON stays JSON. `${...}` names a secret and has none.
"""

_from_environment: dict[str, str] = {}
"""Values that a configuration took from the environment -> the text to show instead."""

_named: dict[str, str] = {}
"""Values that a configuration has under the names of secrets -> ***."""

T = TypeVar("T")


def hide_named(tree: Any, name: str = "") -> None:
    """Make redact hide, from now on, what stands in this tree under the name of a secret.

    Also passwords in its URIs, and what its overrides (`name.db_pass=value`) set so.
    """
    if isinstance(tree, Mapping):
        for key, item in tree.items():
            hide_named(item, f"{name}.{key}" if not SECRET_KEY.search(name) else name)
    elif isinstance(tree, list | tuple):
        for item in tree:
            hide_named(item, name)
    elif isinstance(tree, str):
        key, _, value = tree.partition("=")
        found = [tree] if SECRET_KEY.search(name) else _uri_passwords(tree)
        found += [value, *value.split(",")] if SECRET_KEY.search(key.lstrip("+~")) else []
        plain = (text.strip().strip("'\"") for text in found if "${" not in text)
        _named.update((text, HIDDEN) for text in plain if len(text) >= SHORTEST_SECRET)


def hide(value: str, shown_as: str) -> None:
    """Make redact show `shown_as` wherever this value stands, from now on.

    Paths stay: job folders begin with them, and programs read those from our output.
    """
    if len(value) >= SHORTEST_SECRET and not value.startswith(("/", "~", "./", "../")):
        _from_environment[value] = shown_as


def redact(value: T) -> T:
    """Replace every known secret in text, or in JSON values of it, by ***.

    Numbers, booleans and None stay as they are.
    """
    return _redact(value, known_secrets(os.environ))


def known_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """Map every secret of the environment to what is shown instead, the longest first.

    These are values of variables that are named like secrets, and passwords in the URIs of others,
    each as written and as quoted.
    """
    secrets = {
        value: HIDDEN
        for name, value in variables.items()
        if SECRET_VARIABLE.search(name) and name not in NOT_SECRET_VARIABLE
    }
    for value in variables.values():
        if "://" in value and "@" in value:
            secrets.update(dict.fromkeys(_uri_passwords(value), HIDDEN))
    secrets |= _named | _from_environment
    secrets |= {
        line: shown
        for secret, shown in secrets.items()
        for line in secret.splitlines()[1:-1]  # of a key in PEM form, whose ends are known words
        if len(line) >= SHORTEST_LINE
    }
    spellings = {
        spell(secret.strip()): shown
        for secret, shown in secrets.items()
        if len(secret.strip()) >= SHORTEST_SECRET
        for spell in (_quote_all, quote_plus, _json_escape, _override_escape, str)
    }
    return dict(sorted(spellings.items(), key=lambda entry: -len(entry[0])))


def redact_text(text: str, secrets: Mapping[str, str]) -> str:
    """Take these secrets, and what looks like one, out of a text."""
    for secret, shown in secrets.items():
        text = text.replace(secret, shown)
    text = URI_CREDENTIALS.sub(_hidden_credentials, text)
    text = URI_QUERY_SECRET.sub(rf"\1{HIDDEN}", text)
    text = WEBHOOK.sub(rf"\1{HIDDEN}", text)
    text = HUB_TOKEN.sub(HIDDEN, text)
    text = TOKEN_FORMS.sub(HIDDEN, text)
    text = PRIVATE_KEY.sub(rf"\1{HIDDEN}", text)
    text = AUTHORIZATION.sub(rf"\1{HIDDEN}", text)
    return NAMED_SECRET.sub(_hidden_value, text)


def _hidden_credentials(found: re.Match[str]) -> str:
    """Hide the credentials of a URL; a name such as `${oc.env:NAME}@` is none."""
    return found.group() if "${" in found.group() else f"{HIDDEN}@"


def _hidden_value(found: re.Match[str]) -> str:
    """Hide what stands behind the name of a secret; a path that is named like one names a file."""
    return found["path"] or f"{found['name']}{HIDDEN}"


def _redact(value: Any, secrets: Mapping[str, str]) -> Any:
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


def _redact_named(name: str, value: Any, secrets: Mapping[str, str]) -> Any:
    """Hide a value whose key says that it is a secret, with all that is below it."""
    return _hide_all(value) if SECRET_KEY.search(name) else _redact(value, secrets)


def _hide_all(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _hide_all(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_hide_all(item) for item in value)
    return HIDDEN if isinstance(value, str) and value and not value.startswith("${") else value


def _uri_passwords(uri: str) -> list[str]:
    """Return the password of a URI, as written and unquoted."""
    try:
        password = urlsplit(uri).password
    except ValueError:
        return []
    return [password, unquote(password)] if password else []


def _quote_all(secret: str) -> str:
    return quote(secret, safe="")


def _override_escape(secret: str) -> str:
    """Write a value as Hydra does in overrides.yaml and hydra.yaml."""
    return re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", secret)


def _json_escape(secret: str) -> str:
    return json.dumps(secret)[1:-1]
