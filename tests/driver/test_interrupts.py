"""A batch system's warning ends the job in order, and only then comes to the launcher."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from zinfer.driver import run as run_module
from zinfer.driver.ending import _interrupted
from zinfer.driver.interrupts import Interrupts


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Return the signals that a launcher's own handler of SIGUSR2 got; it comes before ours."""
    got: list[int] = []
    before = {sign: signal.getsignal(sign) for sign in (*run_module.COMMON_SIGNALS,)}
    for name, value in (("received", False), ("sign", None), ("_deferred", 0), ("_launchers", {})):
        monkeypatch.setattr(Interrupts, name, value)
    signal.signal(signal.SIGUSR2, lambda sign, frame: got.append(sign))
    Interrupts.install()
    Interrupts.install()  # each job does so
    yield got
    for sign, handler in before.items():
        signal.signal(sign, handler)


def test_the_launcher_gets_its_signal_after_the_job(launcher: list[int]) -> None:
    with Interrupts.in_order():
        os.kill(os.getpid(), signal.SIGUSR2)
        assert (Interrupts.received, launcher) == (True, [])
    Interrupts.hand_on()
    assert launcher == [signal.SIGUSR2]


def test_outside_of_a_job_the_launcher_gets_its_signal_at_once(launcher: list[int]) -> None:
    os.kill(os.getpid(), signal.SIGUSR2)
    assert (Interrupts.received, launcher) == (False, [signal.SIGUSR2])


def test_another_signal_is_none_of_the_launcher_s(launcher: list[int]) -> None:
    with Interrupts.in_order():
        os.kill(os.getpid(), signal.SIGTERM)
    Interrupts.hand_on()
    assert (Interrupts.sign, launcher) == (signal.SIGTERM, [])


def test_a_signal_that_nobody_handles_keeps_its_meaning(launcher: list[int]) -> None:
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("sign", "said"),
    [
        (None, "interrupted"),
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "interrupted by SIGTERM"),
        (signal.SIGUSR2, "interrupted by the batch system's time limit or preemption (SIGUSR2)"),
    ],
)
def test_the_reason_says_who_interrupted(sign: signal.Signals | None, said: str) -> None:
    assert _interrupted(sign) == said


@pytest.mark.parametrize(
    ("returncode", "arrives", "together"),
    [
        (-signal.SIGTERM, True, True),
        (-signal.SIGTERM, False, False),
        (-signal.SIGSEGV, True, False),
        (0, True, False),
    ],
)
def test_a_worker_that_died_of_the_driver_s_own_signal_was_interrupted(
    returncode: int,
    arrives: bool,
    together: bool,
    launcher: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sleep(seconds: float) -> None:  # the driver's signal comes after the worker's end
        Interrupts.received = Interrupts.received or arrives

    clock = iter(range(100))
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(run_module, "COMMON_S", 2.0)
    worker = SimpleNamespace(returncode=returncode)
    assert run_module._signalled_together(worker) is together
