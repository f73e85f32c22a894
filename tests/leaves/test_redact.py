"""Secrets are known by the name they stand under, by their form, and by where they came from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from zinfer import redact as module
from zinfer.redact import hide, hide_named, redact


@pytest.fixture(autouse=True)
def _nothing_hidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_from_environment", {})
    monkeypatch.setattr(module, "_named", {})
    yield


@pytest.mark.parametrize(
    "variable",
    [
        "SMTP_PASS", "PASS", "MYSQL_PWD", "GPG_PASSPHRASE", "SLACK_WEBHOOK_URL", "SENTRY_DSN",
        "DSN",
        "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "SESSION_COOKIE",
        "db_pass", "APP_PW",
    ],
)  # fmt: skip
def test_the_value_of_a_variable_named_like_a_secret_is_hidden(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "correct horse")
    assert redact("it is correct horse, as %22correct%20horse%22") == "it is ***, as %22***%22"


@pytest.mark.parametrize(
    "variable", ["PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "COMPASS", "BYPASS_CACHE", "PATH_A"]
)
def test_other_variables_hide_nothing(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "/data/folder")
    assert redact("in /data/folder") == "in /data/folder"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"db_pass": "geheim"}, {"db_pass": "***"}),
        ({"tracking.tags.smtp_pass": "x"}, {"tracking.tags.smtp_pass": "***"}),
        ({"webhook_url": "https://h/x"}, {"webhook_url": "***"}),
        ({"clientSecret": "x"}, {"clientSecret": "***"}),
        ({"auth": {"passphrase": {"a": ["x", 3]}}}, {"auth": {"passphrase": {"a": ["***", 3]}}}),
        ({"secrets": {"a": "x", "b": {"c": "y"}}}, {"secrets": {"a": "***", "b": {"c": "***"}}}),
        ({"dsn": "host=h user=u"}, {"dsn": "***"}),
        ({"token": "abc"}, {"token": "***"}),
        ({"password": None, "api_key": ""}, {"password": None, "api_key": ""}),
        ({"password": "${oc.env:PW}"}, {"password": "${oc.env:PW}"}),
        ({"pad_token": "</s>", "new_tokens": 5}, {"pad_token": "</s>", "new_tokens": 5}),
        ({"zinfer.key": "abc.def", "keys": ["a"]}, {"zinfer.key": "abc.def", "keys": ["a"]}),
        ({"passes": "3", "compass": "north"}, {"passes": "3", "compass": "north"}),
    ],
)
def test_what_stands_under_the_name_of_a_secret_is_hidden(given: Any, shown: Any) -> None:
    assert redact(given) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://hooks.slack.com/services/T0/B0/xyz", "https://hooks.slack.com/***"),
        ("https://discord.com/api/webhooks/1/abc!", "https://discord.com/api/webhooks/***"),
        ("Server=h;Uid=u;Pwd=x;Port=1", "Server=h;Uid=u;Pwd=***;Port=1"),
        ("host=h password=x dbname=d", "host=h password=*** dbname=d"),
        ("jdbc:mysql://h/d?user=u&password=x", "jdbc:mysql://h/d?user=u&password=***"),
        ("https://abc@o1.ingest.sentry.io/2", "https://***@o1.ingest.sentry.io/2"),
        ("+tracking.tags.db_pass=hunter2", "+tracking.tags.db_pass=***"),
        ("password: ${oc.env:PW}", "password: ${oc.env:PW}"),
        ("http://u:${oc.env:PW}@h/x", "http://u:${oc.env:PW}@h/x"),
        ("password: 'correct, horse' x", "password: '***' x"),
        ('{"pwd": "it\'s; so", "a": "b"}', '{"pwd": "***", "a": "b"}'),
        ("compass: north", "compass: north"),
        ("ghp_16C7e42F292c6912E7710c838347Ae178B4a", "***"),
        ("by github_pat_11ABCDEFG0abcdefghij_klmnop!", "by ***!"),
        ("glpat-abcdefghij1234567890", "***"),
        ("sk-proj-abcdefghijklmnopqrstuvwxyz", "***"),
        ("xoxb-123456789012-abcdefGHIJ", "***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3", "***"),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nx",
            "-----BEGIN RSA PRIVATE KEY-----***-----END RSA PRIVATE KEY-----\nx",
        ),
        ("-----BEGIN PRIVATE KEY-----\\nMIIE\\nab", "-----BEGIN PRIVATE KEY-----***"),
        ("desk-of-the-secretary-in-the-hall", "desk-of-the-secretary-in-the-hall"),
        ("sk-learn, xoxb, AKIA, eyJ", "sk-learn, xoxb, AKIA, eyJ"),
        ("Authorization: Bearer eyJ.x", "Authorization: Bearer ***"),
        (r"note=Authorization\:\ Bearer\ eyJ.x", r"note=Authorization\:\ Bearer\ ***"),
    ],
)
def test_secrets_are_known_by_their_form(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "/etc/passwd: the folder of this job cannot be made",
        "offload.nvme_path=/etc/passwd: it is not a folder",
        "model.source=~/my-token: loading",
        "'/home/me/api_key': Permission denied",
        "[Errno 2] No such file (../db.password: no such file)",
    ],
)
def test_a_sentence_about_a_file_that_is_named_like_a_secret_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/etc/passwd=geheim", "/etc/passwd=***"),
        ("/etc/passwd:geheim", "/etc/passwd:***"),
        ("/etc/passwd: Geheim-7", "/etc/passwd: ***"),
        ("/etc/passwd: 'two words'", "/etc/passwd: '***'"),
        ("/run/secrets/passwd: correct horse", "/run/secrets/passwd: *** horse"),
        ("/etc/passwd: the password: geheim", "/etc/passwd: the password: ***"),
        ("password=/etc/passwd: the file", "password=*** the file"),
        ("/x?password=a/passwd: the file", "/x?password=*** the file"),
        ("https://host/passwd: the file", "https://host/passwd: *** file"),
        ("my passwd: correct horse", "my passwd: *** horse"),
        ('{"/etc/passwd": "correct horse"}', '{"/etc/passwd": "***"}'),
    ],
)
def test_a_path_hides_no_secret(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_what_stands_under_the_name_of_a_secret_is_hidden_wherever_it_stands() -> None:
    hide_named({"tracking": {"tags": {"db_pass": "correct horse", "who": "me"}}, "a": ["x"]})
    hide_named(["+tracking.tags.pin_passphrase='four, words'", "batch.batch_size=2"])
    hide_named({"uri": "http://u:Zugang-77@h/", "password": "${oc.env:PW}", "pwd": "abc"})
    said = r"correct horse, correct\ horse, correct%20horse; four, words; me; Zugang-77"
    assert redact(said) == "***, ***, ***; ***; me; ***"


def test_the_lines_of_a_key_are_hidden_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "-----BEGIN KEY-----\nMIIEowIBAAKCAQEA7x\nzq\n-----END KEY-----"
    monkeypatch.setenv("DEPLOY_KEY", key)
    assert redact("  MIIEowIBAAKCAQEA7x\n  zq") == "  ***\n  zq"
    assert redact(f"key {key}") == "key ***"


def test_what_was_taken_from_the_environment_is_shown_as_it_was_typed() -> None:
    hide("team-rocket", "${oc.env:TEAM}")
    hide("/scratch/me", "${oc.env:SCRATCH}")
    hide("true", "${oc.env:FLAG}")
    assert redact({"a": "by team-rocket in /scratch/me: true"}) == {
        "a": "by ${oc.env:TEAM} in /scratch/me: true"
    }
