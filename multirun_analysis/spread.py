"""A number with how far it moved: merged over reruns, divided with its error, shown with as many digits as it has."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, sqrt


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number with how far it moved."""

    median: float
    stddev: float | None
    """None: measured once."""
    minimum: float
    maximum: float
    count: int
    """Timed values behind it."""

    @property
    def relative(self) -> float | None:
        """Standard deviation over median."""
        return None if self.stddev is None or self.median == 0 else self.stddev / abs(self.median)


def merge(spreads: Sequence[Spread]) -> Spread | None:
    """Reruns as one number: the median of the medians; variance within runs and between them add up (law of total variance)."""
    if not spreads:
        return None
    medians = [spread.median for spread in spreads]
    within = [spread.stddev**2 for spread in spreads if spread.stddev is not None]
    parts = [
        *([statistics.fmean(within)] if within else []),
        *([statistics.variance(medians)] if len(medians) > 1 else []),
    ]
    return Spread(
        median=statistics.median(medians),
        stddev=sqrt(sum(parts)) if parts else None,
        minimum=min(spread.minimum for spread in spreads),
        maximum=max(spread.maximum for spread in spreads),
        count=sum(spread.count for spread in spreads),
    )


def scaled(spread: Spread, factor: float) -> Spread:
    """In another unit."""
    stddev = None if spread.stddev is None else spread.stddev * factor
    return Spread(
        median=spread.median * factor,
        stddev=stddev,
        minimum=spread.minimum * factor,
        maximum=spread.maximum * factor,
        count=spread.count,
    )


def speedup(candidate: Spread, reference: Spread) -> Spread:
    """Ratio of two rates, with the first-order error of a quotient of independents.

    Source: Taylor, An Introduction to Error Analysis, 2nd edition 1997, section 3.4: relative errors add in quadrature.
    Unknown when either error is.
    """
    ratio = candidate.median / reference.median
    relative = (
        hypot(candidate.relative, reference.relative)
        if candidate.relative is not None and reference.relative is not None
        else None
    )
    return Spread(
        median=ratio,
        stddev=None if relative is None else ratio * relative,
        minimum=candidate.minimum / reference.maximum,
        maximum=candidate.maximum / reference.minimum if reference.minimum else ratio,
        count=min(candidate.count, reference.count),
    )


# Numbers for people


def format_number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, no exponent: '0.0123', '4.21', '1,230'; unknown is '-'."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - _magnitude(rounded))
    return f"{rounded:,.{decimals}f}"


def format_spread(spread: Spread | None) -> str:
    """'4.21 ± 0.05': the error with two digits, the number with as many decimals."""
    if spread is None:
        return "-"
    if not spread.stddev:
        return format_number(spread.median)
    decimals = max(0, 1 - _magnitude(spread.stddev))
    if decimals > max(0, 4 - _magnitude(spread.median)):  # an error far below the fourth digit
        return f"{format_number(spread.median, 4)} ± {format_number(spread.stddev, 1)}"
    return f"{spread.median:,.{decimals}f} ± {spread.stddev:,.{decimals}f}"


def _magnitude(value: float) -> int:
    """Power of ten of the first digit."""
    return int(f"{value:e}".partition("e")[2]) if value else 0


def format_bytes_per_s(rate: float) -> str:
    """Decimal, as data sheets give it: '12.9 GB/s', '3.12 MB/s'."""
    return (
        f"{format_number(rate / 1e9)} GB/s" if rate >= 1e8 else f"{format_number(rate / 1e6)} MB/s"
    )


def format_seconds(seconds: float | None) -> str:
    """'76.9 ms', '4.26 s'; unknown is '-'."""
    if seconds is None:
        return "-"
    return f"{format_number(seconds * 1e3)} ms" if seconds < 1 else f"{format_number(seconds)} s"
