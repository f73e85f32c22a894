"""The end of a job: the one value that the driver prints, stores and tracks."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

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

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""
EXIT_CODES: dict[Status, int] = {"ok": 0, "planned": 0, "refused": 2, "does_not_fit": 2}
"""Exit code of a job. 0: done. 2: refused, nothing was run. 1, all others: it ran and failed."""


class EndedBy(StrEnum):
    """Who ended the job."""

    ITSELF = "itself"
    """The worker ended, well or badly, or there was none."""
    INTERRUPTED = "interrupted"
    """Ctrl-C, a signal to the driver, or the end of its sweep."""
    TIMEOUT = "timeout"
    """The driver, after launcher.timeout_s."""
    DRIVER_KILLED = "driver_killed"
    """The driver died first; a later start of zinfer closed the job."""


STOPPED_FROM_OUTSIDE = (EndedBy.INTERRUPTED, EndedBy.DRIVER_KILLED)
"""Such an end says nothing about the job: it is run again whatever sweep.retry is."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one job, whatever end it was; what a job did not reach is None or empty."""

    status: Status
    reason: str | None = None
    """One sentence; None only for ok."""
    ended_by: EndedBy = EndedBy.ITSELF
    problems: tuple[str, ...] = ()
    """For refused: every problem, each with what to type instead."""
    model: Json | None = None
    """parameters, weight_bytes, kv_cache_bytes_per_token, kv_cache_bytes, ..."""
    plan: Json | None = None
    """fits, and per tier needed_bytes and available_bytes with the items they are made of."""
    deepspeed: Json | None = None
    """The derived DeepSpeed configuration, exactly as it is handed over."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Name with unit suffix -> value. Unknown numbers are absent."""
    samples: tuple[Json, ...] = ()
    """Every timed and warm-up generation, raw: kind, index, prefill_s, decode_step_s, total_s."""
    warnings: tuple[str, ...] = ()
    environment: Json | None = None
    generated: Json | None = None
    """A sample of what the model said: prompt, text (None without a tokenizer), token ids."""
    stability: Json | None = None
    """The verdict on the measurement (zinfer.job.stability); None where nothing was measured."""
    energy: Json | None = None
    """Joules for each new token, and the reasons where they are not known."""
    quality: Json | None = None
    """The verdict on the text (zinfer.job.quality); None where it was not scored."""
    profile: list[Json] | None = None
    """With profile=true: the operations with most time of a decode step, the longest first."""
    weights: Json | None = None
    """A verified checkpoint: number of tensors and bytes used, sha256 of its headers."""
    linear: Json | None = None
    """What multiplied a few rows with 16-bit weights, and why; None: PyTorch, without a choice."""
    packed: Json | None = None
    """What multiplied packed weights, and why; None: there were none of ours."""
    traceback: str | None = None
    """The worker's last traceback."""
    run_id: str | None = None
    run_page: str | None = None
    """How to see its run in MLflow, for people."""
    job_dir: str | None = None

    @property
    def exit_code(self) -> int:
        """Return the command's exit code for this job alone."""
        if self.ended_by is EndedBy.INTERRUPTED:
            return INTERRUPTED
        return EXIT_CODES.get(self.status, 1)

    def document(self) -> Json:
        """Return the document of format=json. A refused job has only its status and problems."""
        if self.status == "refused":
            return {"status": self.status, "problems": list(self.problems), "job_dir": self.job_dir}
        from zinfer.config import METHOD_VERSION

        return {
            "status": self.status,
            "reason": self.reason,
            "ended_by": self.ended_by.value,
            "run_id": self.run_id,
            "job_dir": self.job_dir,
            "method_version": METHOD_VERSION,
            "model": self.model,
            "plan": self.plan,
            "deepspeed": self.deepspeed,
            "metrics": self.metrics,
            "stability": self.stability,
            "energy": self.energy,
            "quality": self.quality,
            "profile": self.profile,
            "weights": self.weights,
            "linear": self.linear,
            "packed": self.packed,
            "warnings": list(self.warnings),
            "generated": self.generated,
        }
