"""Numbers as people read them."""

from __future__ import annotations

import pytest

from zinfer.units import format_roughly, format_seconds, format_times


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
        (0.2, "1 s"),
        (7.6, "8 s"),
        (43.0, "40 s"),
        (90.69, "2 min"),
        (118.0, "2 min"),
        (1510.0, "25 min"),
        (7700.0, "2 h 10 min"),
        (40_000.0, "11 h"),
    ],
)
def test_time_left_is_rounded_as_people_say_it(seconds: float, shown: str) -> None:
    assert format_roughly(seconds) == shown


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [(147.0, "147 times"), (9.97, "10 times"), (5.63, "5.6 times"), (1.123, "1.12 times")],
)
def test_a_ratio_has_no_digit_that_nobody_needs(ratio: float, shown: str) -> None:
    assert format_times(ratio) == shown
