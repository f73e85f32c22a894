"""A run's verdict and its checkpoint's hash are tags in the store."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from zinfer.job.outcome import Outcome
from zinfer.tracking.run import log_outcome


def tags_of(outcome: Outcome) -> dict[str, str]:
    logged: dict[str, str] = {}

    def log_batch(run_id: str, *, tags: Any = (), **others: Any) -> None:
        logged.update({tag.key: tag.value for tag in tags})

    log_outcome(SimpleNamespace(log_batch=log_batch), "run", outcome)  # type: ignore[arg-type]
    return logged


def test_a_verdict_and_a_hash_are_tags() -> None:
    verdict = {"verdict": "noisy", "reasons": ["one", "two"], "repeats_needed": 7}
    outcome = Outcome(status="ok", stability=verdict, weights={"sha256": "ab" * 32})
    tags = tags_of(outcome)
    assert tags["zinfer.stability"] == "noisy"
    assert tags["zinfer.stability_reason"] == "one\ntwo"
    assert tags["zinfer.weights_sha256"] == "ab" * 32


def test_what_measured_nothing_has_no_verdict() -> None:
    assert not {"zinfer.stability", "zinfer.stability_reason", "zinfer.weights_sha256"} & set(
        tags_of(Outcome(status="planned"))
    )
