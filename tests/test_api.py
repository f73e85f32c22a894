"""The Python door: light to import, typed, and its documented examples run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zinfer

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "deepspeed", "hydra", "pandas", "mlflow", "pydantic", "omegaconf")
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_importing_zinfer_imports_nothing_heavy(tmp_path: Path) -> None:
    done = python(
        f"import zinfer, sys; print([name for name in {HEAVY} if name in sys.modules])", tmp_path
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_composing_and_planning_import_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, zinfer;"
        "c = zinfer.compose(model='opt-175b', offload='nvme', hardware='a6000');"
        "p = zinfer.plan(c); assert p.needed_bytes['disk'] > 300e9, p.needed_bytes;"
        "print([name for name in ('torch', 'pandas', 'mlflow') if name in sys.modules])"
    )
    done = python(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_name_of_the_door_is_there_and_documented() -> None:
    words = (ROOT / "docs" / "python.md").read_text()
    for name in zinfer.__all__:
        value = getattr(zinfer, name)
        assert name.startswith("__") or value.__doc__, name
        if callable(value) and name.islower():
            assert f"zinfer.{name}(" in words, name
    assert set(dir(zinfer)) == set(zinfer.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = zinfer.nope


@pytest.mark.parametrize(
    ("choices", "overrides", "says"),
    [
        ({"model": "opt-125"}, [], "Set model=opt-125m"),
        ({"model": "opt-125m"}, ["batch.batchsize=4"], "Set batch.batch_size=4"),
        ({"dtype": "int4", "weights": "pretrained"}, ["batch.repeats=0"], "batch.repeats=0 is too"),
        ({"model": "opt-125m"}, ["tracking.run_name=${oc.env:NOPE}"], "export NOPE"),
    ],
)
def test_what_cannot_run_raises_with_every_problem(
    choices: dict[str, str], overrides: list[str], says: str
) -> None:
    with pytest.raises(zinfer.ConfigError) as refused:
        zinfer.compose(overrides=overrides, **choices)
    assert says in str(refused.value)


def test_composing_leaves_another_hydra_alone(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    (tmp_path / "mine.yaml").write_text("a: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert zinfer.compose(model="opt-350m").model.name == "opt-350m"
        assert compose("mine").a == 1


def test_the_model_of_a_configuration_or_of_a_name_is_counted() -> None:
    assert zinfer.model_spec("opt-175b").num_parameters == 174_604_468_224
    assert zinfer.model_spec(zinfer.compose(model="opt-125m")) == zinfer.model_spec("opt-125m")


@pytest.mark.slow
def test_the_examples_of_the_documentation_run_as_they_stand(tmp_path: Path) -> None:
    runnable = [example for example in EXAMPLES if "# needs the hub" not in example]
    assert len(runnable) == len(EXAMPLES) - 1 >= 5
    done = python("\n".join(runnable), tmp_path)
    assert done.returncode == 0, done.stderr
    promised = re.findall(r"# prints: (.*)$", "\n".join(runnable), re.MULTILINE)
    assert len(promised) >= 7
    assert [line for line in promised if line not in done.stdout.splitlines()] == []


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = "needs pip install nbformat nbclient ipykernel"
    nbformat, nbclient = (
        pytest.importorskip(name, reason=needs) for name in ("nbformat", "nbclient")
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows figures in the page
    path = ROOT / "examples" / "first_sweep.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 50_000
    nbclient.NotebookClient(
        notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = str([cell.get("outputs") for cell in notebook.cells])
    assert shown.count("ok") >= 3 and "'text/plain': '3'" in shown and "image/png" in shown
    assert (tmp_path / "mlflow.db").is_file()
