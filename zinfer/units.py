"""Binary byte units and how numbers are shown to people."""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40


def format_bytes(count: float | None) -> str:
    """Write bytes for people, in binary units: '1.5 GiB'; unknown is '-'."""
    if count is None:
        return "-"
    for size, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count) >= size:
            return f"{count / size:.1f} {name}"
    return f"{count:.0f} B"


def format_rate(bytes_per_s: float | None) -> str:
    """Write bytes per second in decimal units, as data sheets do: '13.0 GB/s'; unknown is '-'."""
    return "-" if bytes_per_s is None else f"{bytes_per_s / 1e9:.2f} GB/s"


def format_times(ratio: float) -> str:
    """Format a ratio as people say it: '147 times', '5.6 times', '1.12 times'."""
    digits = 0 if ratio >= 9.95 else 1 if ratio >= 1.995 else 2
    return f"{ratio:.{digits}f} times"


def format_seconds(seconds: float | None) -> str:
    """Show a duration with three digits: '1.23 s', '45.6 ms', '2 min 05 s'; unknown is '-'."""
    if seconds is None:
        return "-"
    if round(seconds) >= 100:
        return _long_duration(round(seconds))
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if abs(seconds) >= 0.9995 * unit:
            return f"{_three_digits(seconds / unit)} {name}"
    return f"{_three_digits(seconds * 1e6)} µs" if seconds else "0 s"


def format_roughly(seconds: float) -> str:
    """Round a time that is still to come as people say it: '4 minutes', '1 hour 20 minutes'."""
    if seconds < 3.5:
        return "a few seconds"
    if seconds < 57.5:
        return f"{5 * max(1, round(seconds / 5)):d} seconds"
    minutes = max(1, round(seconds / 60))
    if minutes >= 20:
        minutes = 5 * round(minutes / 5)
    if minutes >= 60:
        minutes = 10 * round(minutes / 10) if minutes < 600 else 60 * round(minutes / 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return counted(round(hours / 24), "day")
    parts = [counted(hours, "hour")] if hours else []
    parts += [counted(minutes, "minute")] if minutes else []
    return " ".join(parts)


def format_left(seconds: float) -> str:
    """Say how long something still takes: 'about 4 minutes left', 'a few seconds left'."""
    roughly = format_roughly(seconds)
    return f"{roughly} left" if roughly.startswith("a few") else f"about {roughly} left"


def counted(number: int, noun: str) -> str:
    """Count things with a regular plural: '1 job', '3 jobs'."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _long_duration(seconds: int) -> str:
    """Format minutes and seconds, from an hour on hours and minutes."""
    if seconds >= 3600:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02d} min"
    return f"{seconds // 60} min {seconds % 60:02d} s"


def _three_digits(value: float) -> str:
    """Write three significant digits without an exponent, for values from 1 to 1000."""
    rounded = float(f"{value:.3g}")
    decimals = 2 if abs(rounded) < 10 else 1 if abs(rounded) < 100 else 0
    return f"{rounded:.{decimals}f}"
