"""Walk through README in a fresh clone: the demo's commands, the report, MLflow's page.

The environment of these tests stands in for `make setup`, and a tiny model for the demo's, so that
the walk takes half a minute. What is typed comes from README and the Makefile.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TINY = (
    "model=tiny-llama", "weights=dummy", "dtype=float32", "batch.prompt=synthetic",
    "batch.prompt_tokens=4", "batch.new_tokens=3", "batch.repeats=2", "launcher.omp_threads=1",
    "hardware.accelerator=cpu", "sweep.reuse_disturbed=true",
)  # fmt: skip
SERVER_START_S = 240.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clone the checkout, as README's reader does."""
    folder = tmp_path_factory.mktemp("newcomer") / "zinfer"
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    command = ["git", "clone", "--quiet", str(ROOT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def typed(clone: Path, command: str, *more: str) -> str:
    """Run a command in the clone, with the environment active; return what it printed."""
    done = subprocess.run(
        [*shlex.split(command), *more],
        cwd=clone,
        env=environment(clone),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def environment(clone: Path) -> dict[str, str]:
    """Return the environment after `source .venv/bin/activate`, with the clone's own code."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(clone), "COLUMNS": "120"}


@pytest.fixture(scope="module")
def demo(clone: Path) -> list[str]:
    """Return zinfer's commands that `make demo` would run."""
    installed = BIN.parent / ".installed"
    command = f"make --dry-run demo VENV={BIN.parent} --old-file={installed}"
    lines = typed(clone, command).splitlines()
    return [line.removeprefix(f"{BIN}/") for line in lines if line.startswith(f"{BIN}/zinfer")]


def readme(clone: Path, beginning: str) -> str:
    """Return README's command that begins so, without its comment."""
    text = (clone / "README.md").read_text()
    (line,) = re.findall(rf"^ {{4}}({re.escape(beginning)}.*)$", text, re.MULTILINE)
    return re.split(r"\s+#\s", line)[0]


def test_the_first_screen_ends_in_a_report_and_in_mlflow(
    clone: Path, demo: list[str], built_ops: list[str]
) -> None:
    sweep, report = demo
    assert "make demo" in (clone / "README.md").read_text()
    first = typed(clone, sweep, *TINY)
    for place in ("none", "cpu", "nvme"):
        assert re.search(rf"^ ?\d +offload={place} +ok ", first, re.MULTILINE), first
    again = typed(clone, sweep, *TINY)
    assert again.count("ok (reused)") == 3, again
    shown = typed(clone, report)
    assert len(re.findall(r"^measured +tiny-llama ", shown, re.MULTILINE)) == 3, shown
    (page,) = re.findall(r"^(\S+/report\.html)$", shown, re.MULTILINE)
    assert (clone / page).is_file()
    assert experiments_served(clone, readme(clone, "MLFLOW_SERVER")) >= {"zinfer"}


def experiments_served(clone: Path, command: str) -> set[str]:
    """Start README's `mlflow server` on a free port; return the experiments that it shows."""
    from zinfer.driver.workers import free_port

    words = shlex.split(command)
    variables = dict(word.split("=", 1) for word in words[: words.index("mlflow")])
    port = free_port()
    server = subprocess.Popen(
        [*words[words.index("mlflow") :], "--port", str(port)],
        cwd=clone,
        env={**environment(clone), **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    api = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=10"
    deadline = time.monotonic() + SERVER_START_S
    try:
        while True:
            try:
                with urllib.request.urlopen(api, timeout=10) as answer:
                    return {found["name"] for found in json.load(answer)["experiments"]}
            except (urllib.error.URLError, OSError):
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
