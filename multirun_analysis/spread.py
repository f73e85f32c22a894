"""A number with how far it moved: merged over reruns, divided with its error, shown rightly."""

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

    @property
    def around_one(self) -> bool:
        """True for a ratio that its own error does not tell from 1: no difference was shown."""
        return self.stddev is not None and abs(self.median - 1) <= self.stddev


def merge(spreads: Sequence[Spread]) -> Spread | None:
    """Make reruns one number: the median of the medians, with both variances.

    Variance within runs and variance between them add up (law of total variance).
    """
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
    """Return the same in another unit: everything times `factor`."""
    stddev = None if spread.stddev is None else spread.stddev * factor
    return Spread(
        median=spread.median * factor,
        stddev=stddev,
        minimum=spread.minimum * factor,
        maximum=spread.maximum * factor,
        count=spread.count,
    )


def speedup(candidate: Spread, reference: Spread) -> Spread:
    """Divide two rates, with the first-order error of a quotient of independents.

    Relative errors add in quadrature (Taylor, An Introduction to Error Analysis, 2nd edition 1997,
    section 3.4). The error is unknown when either one is.
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
    """Write three significant digits, no exponent: '0.0123', '4.21', '1,230'; unknown is '-'."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - _magnitude(rounded))
    return f"{rounded:,.{decimals}f}"


def format_spread(spread: Spread | None) -> str:
    """Write '4.213 ± 0.052': the error with two digits, the number rounded where its error is.

    Of an error below the fourth digit of the number only that is said: '25.10 ± <0.01'.
    """
    if spread is None:
        return "-"
    if not spread.stddev:
        return format_number(spread.median)
    error = float(f"{spread.stddev:.2g}")  # first, so that 0.0996 is 0.10 and not 0.100
    decimals = 1 - _magnitude(error)
    most = 3 - _magnitude(spread.median)
    if spread.median and decimals > most + 1:
        shown = max(0, most)
        return f"{spread.median:,.{shown}f} ± <{10.0**-shown:.{shown}f}"
    shown = max(0, decimals)
    return f"{round(spread.median, decimals):,.{shown}f} ± {error:,.{shown}f}"


def _magnitude(value: float) -> int:
    """Return the power of ten of the first digit."""
    return int(f"{value:e}".partition("e")[2]) if value else 0


def format_bytes_per_s(rate: float) -> str:
    """Write a rate in decimal units, as data sheets do: '12.9 GB/s', '3.12 MB/s'."""
    return (
        f"{format_number(rate / 1e9)} GB/s" if rate >= 1e8 else f"{format_number(rate / 1e6)} MB/s"
    )
