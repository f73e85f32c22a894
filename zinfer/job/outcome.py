"""What became of a job: the one value that the driver prints, stores and tracks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from zinfer.config import METHOD_VERSION

Status = Literal[
    "ok",
    "planned",
    "refused",
    "does_not_fit",
    "oom_device",
    "oom_host",
    "killed",
    "timeout",
    "error",
]
Json = dict[str, Any]

EXIT_CODES: dict[Status, int] = {"ok": 0, "planned": 0, "refused": 2, "does_not_fit": 2}
"""0: done; 2: the configuration or the machine does not allow it, nothing was run; 1: it was run and failed; 130: interrupted."""


INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one job, whatever end it was; what a job did not reach is None or empty."""

    status: Status
    reason: str | None = None
    """One sentence; None only for ok."""
    problems: tuple[str, ...] = ()
    """For refused: every problem, each with what to type instead."""
    model: Json | None = None
    """parameters, weight_bytes, kv_cache_bytes_per_token, kv_cache_bytes, kv_cache_bytes_paper, ..."""
    plan: Json | None = None
    """fits, and per tier needed_bytes and available_bytes with the items they are made of."""
    deepspeed: Json | None = None
    """The derived DeepSpeed configuration, exactly as it is handed over."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Name with unit suffix -> value. Unknown numbers are absent."""
    samples: tuple[Json, ...] = ()
    """Every timed and warm-up generation, raw: kind, index, prefill_s, decode_step_s (list), total_s."""
    warnings: tuple[str, ...] = ()
    environment: Json | None = None
    generated: Json | None = None
    """A sample of what the model said: prompt, text (None without a tokenizer), token ids."""
    stability: Json | None = None
    """The verdict on the measurement (zinfer.job.stability); None where nothing was measured."""
    weights: Json | None = None
    """Of a verified checkpoint: how many tensors and bytes were used, and the sha256 of its headers."""
    traceback: str | None = None
    """The worker's last traceback."""
    run_id: str | None = None
    job_dir: str | None = None

    @property
    def exit_code(self) -> int:
        """The command's exit code for this job alone."""
        if self.status == "killed" and self.reason and self.reason.startswith("interrupted"):
            return INTERRUPTED
        return EXIT_CODES.get(self.status, 1)

    def document(self) -> Json:
        """The JSON document that format=json prints. A refused configuration has only status and problems."""
        if self.status == "refused":
            return {"status": self.status, "problems": list(self.problems), "job_dir": self.job_dir}
        return {
            "status": self.status,
            "reason": self.reason,
            "run_id": self.run_id,
            "job_dir": self.job_dir,
            "method_version": METHOD_VERSION,
            "model": self.model,
            "plan": self.plan,
            "deepspeed": self.deepspeed,
            "metrics": self.metrics,
            "stability": self.stability,
            "weights": self.weights,
            "warnings": list(self.warnings),
            "generated": self.generated,
        }
