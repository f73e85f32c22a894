"""A person at a terminal sees one table that moves; a log and a script see plain lines."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers.pseudo_terminal import ZINFER, Screen, Seen, watch
from tests.helpers.sweeping import TINY, environment, run

pytestmark = pytest.mark.slow
CURSOR_HIDDEN = "\x1b[?25l"
COLOUR = re.compile(r"\x1b\[(\d+;)*(3|4|9|10)[0-7]m")


def frames_with(seen: Seen, *words: str) -> list[str]:
    """Return the frames that show all these words."""
    return [frame for frame in seen.frames if all(word in frame for word in words)]


@pytest.fixture(scope="module")
def narrow_sweep(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Run three jobs, one of them refused, on a terminal of 40 columns without colour."""
    folder = tmp_path_factory.mktemp("narrow")
    sweep = ("-m", *TINY, "batch.batch_size=1,2,1000000000", "tracking=none")
    return watch([*ZINFER, *sweep], folder, columns=40, NO_COLOR="1", **quiet())


def quiet() -> dict[str, str]:
    names = ("PYTHONPATH", "OMP_NUM_THREADS")
    return {name: environment()[name] for name in names}


def test_a_sweep_fits_a_terminal_of_40_columns(narrow_sweep: Seen) -> None:
    assert narrow_sweep.code == 1
    assert frames_with(narrow_sweep, "tiny-llama batch.batch_size=1", "start worker")
    assert frames_with(narrow_sweep, "tiny-llama batch.batch_size=2", "load weights", " jobs don")
    drawn = [line for frame in narrow_sweep.frames for line in frame.splitlines()]
    assert max(map(len, drawn)) <= 40
    assert not COLOUR.search(narrow_sweep.raw) and CURSOR_HIDDEN not in narrow_sweep.raw


def test_a_sweep_says_at_once_what_it_does(narrow_sweep: Seen) -> None:
    said = narrow_sweep.last.replace("\n", " ")
    told = ("composing the jobs", "planning", "2 of 3 jobs will run", "1 will be", "importing")
    places = [said.find(words) for words in told]
    assert -1 not in places and places == sorted(places), said
    assert "composing" in narrow_sweep.frames[0]


def test_what_moved_is_gone_at_the_end(narrow_sweep: Seen) -> None:
    assert "start worker" not in narrow_sweep.last.replace(": start worker", "")
    assert "jobs done," not in narrow_sweep.last
    assert "ended with 1 of 3 jobs not done" in narrow_sweep.last


def test_ctrl_c_leaves_the_terminal_clean(tmp_path: Path) -> None:
    interrupted: list[int] = []

    def press(process: subprocess.Popen[bytes], screen: str) -> None:
        if not interrupted and "generate" in screen and " tokens" in screen:
            interrupted.append(process.pid)
            process.send_signal(signal.SIGINT)

    long = ("batch.new_tokens=60", "batch.repeats=2000", "tracking=none")
    seen = watch([*ZINFER, *TINY, *long], tmp_path, act=press, **quiet())
    assert interrupted and seen.code == 130
    assert "start worker" not in seen.last and "killed: interrupted" in seen.last
    assert CURSOR_HIDDEN not in seen.raw
    assert seen.raw.endswith("\r\n")


def test_a_script_reads_one_document_while_a_person_watches(tmp_path: Path) -> None:
    job = (*TINY, "tracking=none", "format=json")
    seen = watch([*ZINFER, *job], tmp_path, stdout_is_pipe=True, **quiet())
    assert json.loads(seen.stdout)["status"] == "ok"
    assert frames_with(seen, "tiny-llama", "  import")
    assert seen.last.strip() == "" or "warning" in seen.last


def test_a_log_gets_one_line_for_each_phase(tmp_path: Path) -> None:
    done = run(tmp_path, *TINY, "batch.warmup=1", "offload=cpu", "tracking=none")
    assert "\r" not in done.stderr and "\x1b" not in done.stderr
    label = "tiny-llama dtype=float32"
    phases = [line for line in done.stderr.splitlines() if line.startswith(label)]
    said = [line.partition("offload=cpu: ")[2].partition(",")[0] for line in phases]
    assert said == [
        "start worker", "plan", "import", "load weights", "warm up", "generate",
    ]  # fmt: skip


def test_the_screen_of_these_tests_knows_the_moves_that_rich_makes() -> None:
    screen = Screen(10)
    screen.feed("one\r\ntwo\r\x1b[2K\x1b[1A\x1b[2Kdone\r\n0123456789ab")
    assert screen.text == "done\n0123456789\nab"
