"""Files that an ended job leaves hold no secret, whatever wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from zinfer import redact as module
from zinfer.job.left_files import BLOCK_LINES, redact_left
from zinfer.job.records import write_json
from zinfer.redact import hide, hide_named

SECRETS = {
    "tracking.uri": "http://me:Zugang-77@store/x",
    "db_pass": "correct horse battery",
    "clientSecret": "Nn5/+x=, y",
    "webhook_url": "https://hooks.slack.com/services/T0/B0/xyzzy",
    "header": "Authorization: Bearer eyJhbGciOi",
    "hub": "hf_AbCd1234efgh5678",
}
"""Names that a user gives to values -> values with a secret in each."""
HIDDEN = (
    "Zugang-77",
    "correct horse",
    "battery",
    "Nn5",
    "xyzzy",
    "eyJhb",
    "hf_AbCd",
    "team-rocket",
)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Know the secrets as a process does that has read the configuration."""
    monkeypatch.setattr(module, "_from_environment", {})
    monkeypatch.setattr(module, "_named", {})
    hide("team-rocket", "${oc.env:TEAM}")
    hide_named({"tracking": {"tags": SECRETS}, "from": [f"+tracking.tags.pw={HIDDEN[1]}"]})
    yield


def overrides() -> list[str]:
    return [f"+tracking.tags.{name}={value}" for name, value in SECRETS.items()]


CONTENT: dict[str, Any] = {
    "job.json": {"config": {"tracking": {"tags": SECRETS}, "by": "team-rocket"}, "attempt": "ab"},
    "sweep.json": {"command": " ".join(overrides()), "jobs": [{"overrides": overrides()}]},
    ".jobs/0.json": {"overrides": overrides(), "folder": "/x/0"},
    "multirun.yaml": {"hydra": {"overrides": overrides()}, "tags": SECRETS, "lr": "1e-3"},
    "worker.log": "\n".join(["Traceback", *overrides(), "by team-rocket"]),
    "events.jsonl": "\n".join(
        [json.dumps({"event": "warning", "message": text}) for text in overrides()] + ['{"half": ']
    ),
    "events.rank1.jsonl": json.dumps({"event": "failed", "tags": SECRETS}) + "\n",
}


def text_of(name: str) -> str:
    content = CONTENT[name]
    if name.endswith(".yaml"):
        return yaml.safe_dump(content, width=20)  # long values stand on several lines
    return content if isinstance(content, str) else json.dumps(content, indent=1)


@pytest.mark.parametrize("name", CONTENT)
def test_no_file_keeps_a_secret_and_all_stay_readable(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text_of(name))
    path.chmod(0o600)
    redact_left(tmp_path)
    left = path.read_text()
    assert [secret for secret in HIDDEN if secret in left] == []
    assert path.stat().st_mode & 0o777 == 0o600
    assert left.count("\n") == text_of(name).count("\n") or name.endswith(".yaml")
    if name.endswith(".json"):
        assert json.loads(left).keys() == CONTENT[name].keys()
    if name.endswith(".yaml"):
        assert OmegaConf.create(left).lr == OmegaConf.create(text_of(name)).lr


def test_a_file_without_secrets_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    path.write_bytes(b"caf\xe9 \xff\n" * 3)
    before = path.stat()
    redact_left(tmp_path)
    after = path.stat()  # but for the time when it was read
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(tmp_path.iterdir()) == [path]


def test_a_long_log_is_safe_in_every_block_of_it(tmp_path: Path) -> None:
    lines = [f"{number}\n" for number in range(2 * BLOCK_LINES)]
    lines[5] = lines[-1] = "by team-rocket\n"
    (tmp_path / "worker.log").write_text("".join(lines))
    redact_left(tmp_path)
    left = (tmp_path / "worker.log").read_text().splitlines(keepends=True)
    assert left[5] == left[-1] == "by ${oc.env:TEAM}\n"
    assert left[6:-1] == lines[6:-1]


def test_a_record_is_written_without_secrets_unless_it_is_for_its_owner(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"tags": SECRETS})
    assert [secret for secret in HIDDEN if secret in (tmp_path / "result.json").read_text()] == []
    write_json(tmp_path / "job.json", {"tags": SECRETS}, private=True)
    assert json.loads((tmp_path / "job.json").read_text()) == {"tags": SECRETS}
    assert (tmp_path / "job.json").stat().st_mode & 0o077 == 0
