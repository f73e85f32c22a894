"""Tell one job's end by what the system did to it, and notice a killed driver by its lock."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.composing import composed
from tests.helpers.sweeping import TINY, document, environment, nothing_is_left, processes, run
from zinfer.config import config_from_stored
from zinfer.driver.ending import Circumstances, Watched, outcome_of
from zinfer.driver.interrupts import Interrupts
from zinfer.driver.run import with_store
from zinfer.driver.server import server_key
from zinfer.driver.terminal import Terminal
from zinfer.driver.workers import Worker
from zinfer.job.folder import abandoned_folders, attempt_in, is_driven, read_job, write_job

BIG = (  # 140 MB in parameters of 4 MiB, which DeepSpeed does swap
    *TINY, "model.overrides.hidden_size=1024", "model.overrides.intermediate_size=2048",
    "model.overrides.num_hidden_layers=4",
    "plan.enforce=false", "format=json",
)  # fmt: skip


class Dead:
    """A process that has ended."""

    pid = 0

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code


def ended(*codes: int, log: str = "", folder: Path, **seen: int) -> tuple[str, str]:
    """Return the status and reason of a job whose ranks ended with these codes, in this order."""
    (folder / "worker.log").write_text(log)
    worker = Worker([Dead(code) for code in codes])  # type: ignore[misc]
    worker.wait(0)
    outcome = outcome_of(
        composed("model=tiny-llama"), folder, Watched(phase="load"), worker, Circumstances(**seen)
    )  # type: ignore[arg-type]
    return outcome.status, outcome.reason or ""


@pytest.mark.parametrize(
    ("codes", "log", "seen", "status", "words"),
    [
        ((-9,), "", {}, "killed", "SIGKILL while in phase load"),
        ((-9,), "", {"oom_kills": 1}, "oom_host", "want of host memory"),
        ((-11,), "", {"oom_kills": 1}, "killed", "SIGSEGV"),
        (
            (-6,),
            "terminate called after throwing an instance of 'std::bad_alloc'",
            {},
            "oom_host",
            "aborted",
        ),
        ((-6,), "Assertion `failed'", {}, "killed", "SIGABRT"),
        ((-6,), "Assertion `failed'", {"swap_free_bytes": 4096}, "error", "is full (4.0 KiB left)"),
        (
            (-6,),
            "OSError: [Errno 28] No space left on device",
            {},
            "error",
            "a disk is full (OSError",
        ),
        (
            (-6,),
            "/x/7.swp: file_offset + buffer nbytes > file bytes 10 > 5",
            {},
            "error",
            "shorter than what was written",
        ),
        ((-7,), "", {}, "error", "cut short while the worker read it"),
        ((-7,), "", {"swap_free_bytes": 0}, "error", "is full"),
        ((-9,), "No space left on device", {}, "killed", "SIGKILL"),
        ((3,), "[Errno 5] Input/output error", {}, "error", "a disk reports an error"),
        ((3,), "", {}, "error", "exit code 3"),
        ((1, -9), "", {}, "killed", "rank 1 was ended by SIGKILL"),
        ((1, 3), "", {}, "error", "rank 1 ended with exit code 3"),
    ],
)
def test_an_end_without_words_is_told_by_the_system(
    codes: tuple[int, ...], log: str, seen: dict[str, int], status: str, words: str, tmp_path: Path
) -> None:
    told, reason = ended(*codes, log=log, folder=tmp_path, **seen)
    assert (told, words in reason) == (status, True), reason


def test_a_folder_is_driven_until_its_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "job"
    folder.mkdir()
    block = f"with attempt_in(Path({str(folder)!r})): print(1, flush=True); time.sleep(60)"
    code = (
        f"import time; from pathlib import Path; from zinfer.job.folder import attempt_in\n{block}"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert is_driven(folder)
        assert abandoned_folders() == []
        process.kill()
    assert not is_driven(folder)
    assert abandoned_folders() == [(folder, "job")]
    with attempt_in(folder):
        assert abandoned_folders() == []
    assert abandoned_folders() == []


def test_a_store_from_the_environment_is_stored_as_coming_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:geheim-wort@host:5000")
    config = with_store(composed("model=tiny-llama"), Terminal("text"))
    assert (config.tracking.store, config.tracking.uri) == (
        "server",
        "http://alice:geheim-wort@host:5000",
    )
    write_job(tmp_path, config, "0123")
    assert "geheim" not in (tmp_path / "job.json").read_text()
    job = read_job(tmp_path)
    assert job is not None and config_from_stored(job.config).tracking == config.tracking


def test_signals_wait_for_a_job_to_be_closed() -> None:
    handlers = {
        sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    Interrupts.install()
    try:
        with Interrupts.in_order():
            os.kill(os.getpid(), signal.SIGTERM)
            assert Interrupts.received
            with pytest.raises(KeyboardInterrupt), Interrupts.at_once():
                raise AssertionError("not reached")
        Interrupts.received = False
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        Interrupts.received = False
        for sign, handler in handlers.items():
            signal.signal(sign, handler)


def test_only_what_imports_read_needs_another_server() -> None:
    base = {"OMP_NUM_THREADS": "1", "RANK": "0", "MASTER_PORT": "1"}
    assert server_key(base) == server_key({**base, "MASTER_PORT": "2", "MLFLOW_TRACKING_URI": "x"})
    assert server_key(base) != server_key({**base, "OMP_NUM_THREADS": "2"})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 6 MiB."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_swap_disk_is_named(small_disk: Path, tmp_path: Path, built_ops: list[str]) -> None:
    done = run(tmp_path, *BIG, "offload=nvme", f"offload.nvme_path={small_disk}")
    assert (done.returncode, document(done)["status"]) == (1, "error")
    assert (
        f"offload.nvme_path={small_disk}" in document(done)["reason"]
        and "is full" in document(done)["reason"]
    )
    assert list(small_disk.iterdir()) == []
    nothing_is_left(tmp_path)


@pytest.mark.slow
def test_an_address_space_limit_is_host_memory(tmp_path: Path) -> None:
    limit = 3_500_000_000
    done = subprocess.run(
        [sys.executable, "-m", "zinfer", *BIG, "model.overrides.num_hidden_layers=60"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert (done.returncode, document(done)["status"]) == (1, "oom_host"), done.stdout
    nothing_is_left(tmp_path)


def memory_controller() -> tuple[Path, dict[str, str]]:
    """Return the folder of the memory controller, and what to write into a new group below it."""
    unified = Path("/sys/fs/cgroup")
    if (unified / "cgroup.controllers").is_file():
        control = unified / "cgroup.subtree_control"
        with contextlib.suppress(OSError):
            control.write_text("+memory")
        return unified, {"memory.max": "900M", "memory.swap.max": "0"}
    return unified / "memory", {
        "memory.limit_in_bytes": "900M",
        "memory.memsw.limit_in_bytes": "900M",
    }


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """Return a memory cgroup of 900 MB, of version 2 or 1, whichever this machine has."""
    root, limits = memory_controller()
    folder = root / f"zinfer-test-{os.getpid()}"
    try:
        folder.mkdir(exist_ok=True)
        for name, value in limits.items():
            if (folder / name).exists():  # without swap accounting there is no limit on it
                (folder / name).write_text(value)
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"needs root and a memory controller of cgroups: {error}")
    yield folder
    for pid in (folder / "cgroup.procs").read_text().split():
        (folder.parent / "cgroup.procs").write_text(pid)
    folder.rmdir()


@pytest.mark.slow
def test_a_worker_that_the_kernel_ended_for_want_of_memory_is_oom(
    small_cgroup: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "zinfer", *BIG, "model.overrides.num_hidden_layers=60"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
        preexec_fn=lambda: (small_cgroup / "cgroup.procs").write_text(str(os.getpid())),
    )  # fmt: skip
    assert (done.returncode, document(done)["status"]) == (1, "oom_host"), done.stderr
    assert "the kernel ended the worker" in document(done)["reason"]
    assert not processes(tmp_path)
    assert json.loads(next(tmp_path.rglob("result.json")).read_text())["status"] == "oom_host"
