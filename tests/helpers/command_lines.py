"""Run many command lines of zinfer in a few seconds: one process imports, each command is forked.

    python -m tests.helpers.command_lines < commands.json

Reads a JSON list of {"arguments", "folder"}; prints a list of {"code", "stdout", "stderr"}.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORTED = (
    "hydra.main",
    "mlflow.tracking",
    "zinfer.api",
    "zinfer.driver.run",
    "zinfer.plan.page",
    "zinfer.sweep.plan",
)


@dataclass(frozen=True)
class Ran:
    """Hold how a command ended and what it printed."""

    code: int
    stdout: str
    stderr: str


def run_all(commands: list[tuple[list[str], Path]], most_s: float = 300) -> list[Ran]:
    """Run commands of zinfer, given as arguments and folder, in one process that forks each."""
    wanted = [{"arguments": words, "folder": str(folder)} for words, folder in commands]
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.command_lines"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)},
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        timeout=most_s,
    )
    assert done.returncode == 0, done.stderr
    return [Ran(**found) for found in json.loads(done.stdout)]


def forked(arguments: list[str], folder: Path) -> dict[str, object]:
    """Run one command in a child process, in its own folder."""
    files = {name: folder / f".{name}" for name in ("stdout", "stderr")}
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            for number, path in enumerate(files.values(), 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv = ["zinfer", *arguments]
            code = ended()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    texts = {name: path.read_text() for name, path in files.items()}
    for path in files.values():
        path.unlink()
    return {"code": os.waitstatus_to_exitcode(status), **texts}


def ended() -> int:
    """Run zinfer's command; return its exit code."""
    from zinfer.__main__ import main

    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def main() -> None:
    """Import once what every command imports, then run each."""
    for name in IMPORTED:
        importlib.import_module(name)
    wanted = json.load(sys.stdin)
    ran = [forked(found["arguments"], Path(found["folder"])) for found in wanted]
    json.dump(ran, sys.stdout)


if __name__ == "__main__":
    main()
