"""Numbers as people read them."""

from __future__ import annotations

import pytest

from zinfer.units import format_left, format_seconds, format_times


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (0.0, "0 s"),
        (3e-6, "3.00 µs"),
        (0.0123, "12.3 ms"),
        (0.09996, "100 ms"),
        (0.99996, "1.00 s"),
        (9.996, "10.0 s"),
        (99.4, "99.4 s"),
        (99.6, "1 min 40 s"),
        (125.0, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (90_000.0, "25 h 00 min"),
    ],
)
def test_a_duration_has_three_digits(seconds: float | None, shown: str) -> None:
    assert format_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "a few seconds left"),
        (3.4, "a few seconds left"),
        (7.6, "about 10 seconds left"),
        (43.0, "about 45 seconds left"),
        (57.4, "about 55 seconds left"),
        (58.0, "about 1 minute left"),
        (90.69, "about 2 minutes left"),
        (227.2, "about 4 minutes left"),
        (1510.0, "about 25 minutes left"),
        (3599.0, "about 1 hour left"),
        (4800.0, "about 1 hour 20 minutes left"),
        (40_000.0, "about 11 hours left"),
        (100_000.0, "about 28 hours left"),
        (300_000.0, "about 3 days left"),
    ],
)
def test_time_left_is_rounded_as_people_say_it(seconds: float, shown: str) -> None:
    assert format_left(seconds) == shown


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [(147.0, "147 times"), (9.97, "10 times"), (5.63, "5.6 times"), (1.123, "1.12 times")],
)
def test_a_ratio_has_no_digit_that_nobody_needs(ratio: float, shown: str) -> None:
    assert format_times(ratio) == shown
