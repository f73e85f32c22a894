"""DeepSpeed's ops: what lacks is named, a killed build is noticed, one builder works at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from zinfer.machine import native_ops
from zinfer.machine.native_ops import __main__ as command_line
from zinfer.machine.native_ops import building, missing, requirements
from zinfer.machine.native_ops import lock as build_lock

# offload.device, accelerator, and the ops that DeepSpeed 0.19.8 loads
# (torch.py build_shm_op, async_io.py)
OPS_BY_OFFLOAD = [
    ("none", "cpu", ["deepspeed_shm_comm"]),
    ("cpu", "cpu", ["deepspeed_shm_comm"]),
    ("nvme", "cpu", ["deepspeed_shm_comm", "pin_memory", "async_io"]),
    ("none", "cuda", []),
    ("cpu", "cuda", []),
    ("nvme", "cuda", ["pin_memory", "async_io"]),
]


@pytest.mark.parametrize(("offload", "accelerator", "ops"), OPS_BY_OFFLOAD)
def test_each_offload_target_names_the_ops_it_loads(
    offload: str, accelerator: str, ops: list[str]
) -> None:
    assert native_ops.ops_needed(offload, accelerator) == ops


def test_the_driver_may_ask_without_importing_torch_or_deepspeed() -> None:
    program = """
        import sys
        from zinfer.machine import native_ops
        native_ops.missing_requirements(native_ops.ops_needed("nvme")), native_ops.built("async_io")
        native_ops.stale_lock("async_io"), native_ops.worker_environment()
        print([name for name in ("torch", "deepspeed", "transformers") if name in sys.modules])
    """
    assert run_python(program) == "[]"


# What is missing


def test_without_a_compiler_the_command_that_installs_one_is_said(
    empty_ops_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(requirements, "scripts_folder", lambda: "")
    problems = native_ops.missing_requirements(
        native_ops.ops_needed("cpu" if native_ops.accelerator_name() == "cpu" else "nvme")
    )
    assert any(
        "no C++ compiler" in problem and "apt-get install -y g++" in problem for problem in problems
    ), problems
    assert any("ninja" in problem and "-m pip install ninja" in problem for problem in problems), (
        problems
    )


def test_without_libaio_only_nvme_is_refused(
    empty_ops_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "_holds", lambda name, folders: False)
    monkeypatch.setattr(requirements, "_compiler_links_libaio", lambda: False)
    (problem,) = native_ops.missing_requirements(native_ops.ops_needed("nvme"))
    assert "libaio.h and libaio.so was not found" in problem
    assert "install -y libaio-dev" in problem and "export CFLAGS=-I" in problem
    assert native_ops.missing_requirements(native_ops.ops_needed("cpu")) == []


@pytest.mark.parametrize("variable", ["ZINFER_CACHE", "TORCH_EXTENSIONS_DIR"])
@pytest.mark.parametrize("folder", ["/proc/none", "{}/file", "{}/file/below"])
def test_a_folder_in_which_nothing_can_be_compiled_is_named_with_its_variable(
    folder: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv(variable, folder.format(tmp_path))
    problems = native_ops.missing_requirements(native_ops.ops_needed("nvme"))
    assert f"{folder.format(tmp_path)}" in problems[0] and "cannot be written (" in problems[0]
    assert problems[0].endswith(f"Set the environment variable {variable} to a folder of yours")


def test_libaio_unpacked_elsewhere_is_found_and_passed_on(
    empty_ops_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, name in (("include", "libaio.h"), ("lib", "libaio.so")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    is_system = ("/usr", "/lib")
    monkeypatch.setattr(
        requirements,
        "_holds",
        lambda name, folders: any(
            os.path.exists(f"{folder}/{name}")
            for folder in folders
            if not folder.startswith(is_system)
        ),
    )
    monkeypatch.setenv("CFLAGS", f"-O2 -I{tmp_path}/include")
    monkeypatch.setenv("LDFLAGS", f"-L {tmp_path}/lib -Wl,--as-needed")
    monkeypatch.setenv("LIBRARY_PATH", "/elsewhere")
    assert requirements.missing_of_libaio() == []
    passed_on = native_ops.worker_environment()
    assert passed_on["CPATH"].split(":")[0] == f"{tmp_path}/include"
    assert passed_on["LIBRARY_PATH"] == f"{tmp_path}/lib:/elsewhere"
    assert passed_on["LD_LIBRARY_PATH"].split(":")[0] == f"{tmp_path}/lib"


def test_ops_that_are_built_need_no_compiler(
    empty_ops_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for op in native_ops.all_ops():
        pretend_built(op)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(missing, "has_libaio_runtime", lambda: True)
    assert native_ops.missing_requirements(native_ops.ops_needed("nvme")) == []


# What is there


def test_a_library_that_a_killed_linker_left_does_not_count_as_built(
    empty_ops_folder: Path,
) -> None:
    pretend_built("async_io")
    assert native_ops.built("async_io")
    library = empty_ops_folder / "async_io" / "async_io.so"
    library.write_bytes(library.read_bytes()[:-1])
    assert not native_ops.built("async_io")
    (empty_ops_folder / "async_io" / "zinfer_built.json").unlink()
    assert not native_ops.built("async_io")


def test_the_lock_of_a_killed_build_is_stale_and_of_a_running_one_is_not(
    empty_ops_folder: Path,
) -> None:
    with building_process("async_io") as builder:
        lock = empty_ops_folder / "async_io" / "lock"
        assert build_lock.lock_holders(lock) == [builder.pid]
        assert native_ops.stale_lock("async_io") is None
        assert native_ops.remove_stale_locks(["async_io"]) == []
        builder.kill()
        builder.wait()
        assert native_ops.stale_lock("async_io") == lock
        (said,) = native_ops.remove_stale_locks(["async_io", "pin_memory"])
        assert "async_io" in said and str(lock) in said
        assert not lock.exists()


def test_a_compiler_at_work_in_the_folder_keeps_the_lock_alive(empty_ops_folder: Path) -> None:
    folder = empty_ops_folder / "async_io"
    folder.mkdir()
    (folder / "lock").touch()
    compiler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=folder)
    try:
        assert native_ops.stale_lock("async_io") is None
    finally:
        compiler.kill()
        compiler.wait()
    assert native_ops.stale_lock("async_io") == folder / "lock"


def test_a_lock_on_a_network_file_system_is_given_half_an_hour(
    empty_ops_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_lock, "filesystem_type", lambda path: "nfs4")
    folder = empty_ops_folder / "async_io"
    folder.mkdir()
    (folder / "lock").touch()
    assert native_ops.stale_lock("async_io") is None
    long_ago_s = time.time() - build_lock.UNSEEN_HOLDER_S - 1
    for path in (folder / "lock", folder):
        os.utime(path, (long_ago_s, long_ago_s))
    assert native_ops.stale_lock("async_io") == folder / "lock"


# Building


def test_a_second_builder_waits_says_for_whom_and_builds_nothing(
    empty_ops_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_is_building, may_finish = threading.Event(), threading.Event()
    builds: list[str] = []

    def slow_build(ops: list[str], echo: native_ops.Echo) -> dict[str, float]:
        builds.extend(ops)
        first_is_building.set()
        may_finish.wait(30)
        pretend_built(*ops)
        return dict.fromkeys(ops, 1.0)

    def said_by_second(line: str) -> None:
        said.append(line)
        may_finish.set()

    said: list[str] = []
    monkeypatch.setattr(building, "_build_together", slow_build)
    first = threading.Thread(target=native_ops.build, args=(["async_io"],))
    first.start()
    assert first_is_building.wait(30)
    assert native_ops.build(["async_io"], echo=said_by_second) == {}
    first.join()
    assert builds == ["async_io"]
    assert said[0].startswith(f"waiting for process {os.getpid()} (async_io)")


def test_what_is_built_is_not_built_again(empty_ops_folder: Path) -> None:
    pretend_built("async_io")
    assert native_ops.build(["async_io"], echo=pytest.fail) == {}


SETUPS = [  # arguments, the groups that are compiled side by side on a CPU
    ([], [["deepspeed_shm_comm"]]),
    (["--offload", "none"], [["deepspeed_shm_comm"]]),
    (["--offload", "nvme"], [["deepspeed_shm_comm", "pin_memory"], ["async_io"]]),
    (["pin_memory"], [["pin_memory"]]),
]


@pytest.mark.parametrize(("arguments", "groups"), SETUPS)
def test_setup_compiles_only_what_the_offload_target_needs(
    arguments: list[str],
    groups: list[list[str]],
    empty_ops_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[list[str]] = []

    def note(ops: list[str], echo: native_ops.Echo) -> dict[str, float]:
        compiled.append(ops)
        return {}

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(building, "_build_together", note)
    monkeypatch.setattr(command_line, "missing_requirements", lambda ops: [])
    assert command_line.main(["build", *arguments]) == 0
    assert compiled == groups


def test_the_compiler_leaves_out_debug_information_and_asks_ccache_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ccache", "c++"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "op").mkdir()
    wrapper = building._fast_compiler(tmp_path / "op")
    assert wrapper is not None
    said = subprocess.run([wrapper, "-O3", "-g", "a b.cpp"], capture_output=True, text=True)
    assert said.stdout == f"ccache {tmp_path}/c++ -O3 -g a b.cpp -g0\n"


@pytest.mark.slow
def test_a_build_that_fails_says_why_and_where_the_log_is(
    empty_ops_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(
        RuntimeError, match=r"quantizer could not be built: .*accelerator cpu.*build\.log"
    ):
        native_ops.build(["quantizer"], echo=lambda line: None)


@pytest.mark.slow
def test_deepspeed_takes_the_built_ops_without_compiler_and_ninja(
    built_ops: list[str], tmp_path: Path
) -> None:
    program = f"""
        import os
        os.environ["PATH"] = ""
        from zinfer.machine import native_ops
        import torch
        assert native_ops.adopt({built_ops}) == {built_ops}
        from deepspeed.accelerator import get_accelerator
        aio = get_accelerator().create_op_builder("AsyncIOBuilder").load()
        handle = aio.aio_handle(1 << 20, 16, False, True, 1)
        written = torch.arange(1 << 18, dtype=torch.int32)
        read = torch.zeros(1 << 18, dtype=torch.int32)
        handle.sync_pwrite(written, {str(tmp_path / "swap")!r}, 0)
        handle.sync_pread(read, {str(tmp_path / "swap")!r}, 0)
        library = native_ops.extensions_dir() / "async_io" / "async_io.so"
        print(aio.__file__ == str(library), torch.equal(written, read))
    """
    assert run_python(program).splitlines()[-1] == "True True"


# Helpers


def run_python(program: str) -> str:
    """Run a program in a process of its own. Its output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def pretend_built(*ops: str) -> None:
    """Leave what a finished build leaves."""
    for op in ops:
        folder = native_ops.extensions_dir() / op
        folder.mkdir(exist_ok=True)
        (folder / f"{op}.so").write_bytes(b"\x7fELF")
        (folder / "zinfer_built.json").write_text(json.dumps({"library_bytes": 4}))


@contextmanager
def building_process(op: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the op's lock as torch's builds do.

    Source: torch.utils.file_baton opens it with O_EXCL and keeps it open.
    """
    folder = native_ops.extensions_dir() / op
    folder.mkdir()
    program = (
        "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL);"
        "print('locked', flush=True); time.sleep(60)"
    )
    builder = subprocess.Popen(
        [sys.executable, "-c", program, str(folder / "lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert builder.stdout is not None and builder.stdout.readline() == "locked\n"
        yield builder
    finally:
        builder.kill()
        builder.wait()
