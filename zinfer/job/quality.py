"""Score how well a model predicts a fixed text, beside the unquantised model of its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

QualityVerdict = Literal["ok", "beyond_limits"]
ReferenceFrom = Literal["kept", "made", "this run"]
QUALITY_METRICS = (
    "quality_token_agreement",
    "quality_kl_divergence",
    "quality_perplexity",
    "quality_perplexity_ratio",
    "quality_scored_tokens",
    "quality_s",
)
"""Names of the metrics that a scored run has."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The scores of one run, and the verdict on them."""

    verdict: QualityVerdict
    reasons: tuple[str, ...]
    """One sentence for each limit that was passed; none for ok."""
    token_agreement: float
    """Share of tokens for which both models' likeliest token is the same."""
    kl_divergence: float
    """Mean Kullback-Leibler divergence from the reference, in nats for each token."""
    perplexity: float
    """The exponential of the mean negative log-likelihood of the text's tokens."""
    perplexity_ratio: float
    """perplexity over the reference's."""
    scored_tokens: int
    seconds: float
    """How long scoring took, the reference's own pass included where it had to be made."""
    reference: ReferenceFrom
    """kept: read from the cache folder. made: by this run, with kv_cache=device. this run: it is
    unquantised with kv_cache=device, and so its own reference."""

    def metrics(self) -> dict[str, float]:
        """Map names to values of what is logged as a metric; what is no number is left out."""
        values = (
            self.token_agreement,
            self.kl_divergence,
            self.perplexity,
            self.perplexity_ratio,
            self.scored_tokens,
            self.seconds,
        )
        named = zip(QUALITY_METRICS, values, strict=True)
        return {name: value for name, value in named if math.isfinite(value)}

    def document(self) -> dict[str, Any]:
        """Return the JSON that the `result` event carries beside the metrics."""
        return {
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "reference": self.reference,
        }
