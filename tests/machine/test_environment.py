"""What is recorded of the machine and the installation, and what must not be."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import zinfer
from zinfer.config import HardwareConfig, RunConfig
from zinfer.machine.environment import (
    GitState,
    container_kind,
    environment,
    git_states,
    gpu_facts,
    hardware_fingerprint,
    parse_git_status,
)
from zinfer.machine.gpu import parse_nvidia_smi

H100 = (
    "0, GPU-8932f937, NVIDIA H100 80GB HBM3, 81559, 81076, 9.0, 700.00, 570.86.15, 1980, 2619, "
    "Disabled\n"
)
CONFIG = cast(RunConfig, SimpleNamespace(hardware=HardwareConfig(name="detect", accelerator="cpu")))
"""The only part of a configuration that the environment depends on."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return environment(CONFIG, tmp_path_factory.mktemp("nvme") / "swap")


def git(folder: Path, *arguments: str) -> str:
    identity = [
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@example.com",
        "-c",
        "init.defaultBranch=main",
    ]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a committed checkout of something that looks like zinfer."""
    folder = tmp_path / "checkout"
    (folder / "zinfer").mkdir(parents=True)
    (folder / "pyproject.toml").write_text("")
    (folder / "zinfer" / "__init__.py").write_text("")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "x")
    return folder


def test_the_record_is_json_and_names_what_moves_a_number(here: dict[str, Any]) -> None:
    json.dumps(here)
    assert here["zinfer"]["version"] == zinfer.__version__
    assert {"torch", "deepspeed", "transformers", "mlflow", "hydra-core"} <= set(here["packages"])
    assert here["cpu"]["usable_cores"] >= 1
    assert here["host_total_bytes"] > here["host_available_bytes"] > 0
    assert here["disk"]["filesystem"] and here["disk"]["free_bytes"] > 0
    assert set(here["ulimits"]) == {"memlock_bytes", "open_files", "address_space_bytes"}
    assert here["python"] and here["kernel"] and here["os"]


def test_the_hosts_name_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-box-of-alice")
    found = environment(CONFIG, None)
    assert len(found["host_hash"]) == 12
    assert "alice" not in json.dumps(found)


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import sys; from types import SimpleNamespace\n"
        "from zinfer.config import HardwareConfig\n"
        "from zinfer.machine.environment import environment\n"
        "hardware = HardwareConfig(name='detect', accelerator='cpu')\n"
        "environment(SimpleNamespace(hardware=hardware), None)\n"
        "heavy = ('torch', 'transformers', 'deepspeed', 'mlflow', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_secrets_in_recorded_variables_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setenv("MALLOC_CONF", "prof_prefix:hf_abcdefghijklmnop")
    assert environment(CONFIG, None)["variables"]["MALLOC_CONF"] == "prof_prefix:***"


def test_the_gpus_power_limit_and_driver_are_recorded() -> None:
    (gpu,) = parse_nvidia_smi(H100)
    facts = gpu_facts(gpu)
    assert (facts["power_limit_watts"], facts["driver_version"], facts["compute_capability"]) == (
        700.0,
        "570.86.15",
        "9.0",
    )
    assert environment(CONFIG, None, gpus=[gpu])["gpus"] == [facts]


def test_the_fingerprint_is_of_the_machine_not_of_the_moment(here: dict[str, Any]) -> None:
    later = deepcopy(here)
    later["host_available_bytes"] //= 2
    later["host_total_bytes"] += 4096
    later["packages"]["torch"] = "3.0"
    later["disk"] = None
    assert hardware_fingerprint(later) == hardware_fingerprint(here)


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("cpu", "model", "another"),
        ("cpu", "usable_cores", 999),
        ("cpu", "instruction_sets", "avx2 only"),
    ],
)
def test_another_machine_has_another_fingerprint(
    here: dict[str, Any], group: str, key: str, value: Any
) -> None:
    other = deepcopy(here)
    other[group][key] = value
    assert hardware_fingerprint(other) != hardware_fingerprint(here)


def test_a_clean_checkout_is_clean(checkout: Path, tmp_path: Path) -> None:
    state, elsewhere = git_states(checkout, checkout / "zinfer")
    assert state == GitState(commit=git(checkout, "rev-parse", "HEAD"), dirty=False)
    assert elsewhere == GitState(), "the user stands in the same repository"


@pytest.mark.parametrize(
    ("file", "dirty"),
    [
        ("zinfer/__init__.py", True),
        ("zinfer/new.py", True),
        ("conf/new file.yaml", True),
        ("outputs/notes.txt", False),
    ],
)
def test_changed_and_unknown_sources_make_it_dirty(checkout: Path, file: str, dirty: bool) -> None:
    (checkout / file).parent.mkdir(exist_ok=True)
    (checkout / file).write_text("changed")
    assert git_states(checkout, checkout)[0].dirty is dirty


def test_an_installed_package_has_no_commit_of_its_own(checkout: Path) -> None:
    """site-packages may lie inside somebody's repository: that commit says nothing about zinfer."""
    site_packages = checkout / ".venv" / "lib"
    site_packages.mkdir(parents=True)
    state, elsewhere = git_states(site_packages, checkout)
    assert state == GitState(commit=None, dirty=None)
    assert elsewhere.commit == git(checkout, "rev-parse", "HEAD")


def test_a_repository_without_commits_has_none() -> None:
    assert parse_git_status("# branch.oid (initial)\n# branch.head main\n? a.py\n") == GitState(
        commit=None, dirty=True
    )


@pytest.mark.parametrize(
    ("files", "variables", "kind"),
    [
        ([], {}, None),
        ([".dockerenv"], {}, "docker"),
        (["run/.containerenv"], {}, "podman"),
        ([".dockerenv"], {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubernetes"),
        ([], {"SLURM_JOB_ID": "7"}, "slurm"),
    ],
)
def test_the_kind_of_container_is_told(
    tmp_path: Path, files: list[str], variables: dict[str, str], kind: str | None
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert container_kind(variables, tmp_path) == kind
