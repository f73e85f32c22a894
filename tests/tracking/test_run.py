"""Log runs in a real MLflow: what, under which name, by how many at once, and what never."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import socket
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tracked_runs import (
    CONF,
    ENVIRONMENT,
    OUTCOME,
    SAMPLES,
    config_of,
    opened,
    stored,
)
from zinfer.config import METHOD_VERSION, TrackingConfig, config_key
from zinfer.job.outcome import Outcome, Status
from zinfer.redact import redact
from zinfer.tracking import run as tracking
from zinfer.tracking import store as mlflow_store
from zinfer.tracking import uri as uris
from zinfer.tracking.parent import announce_parent, close_parent
from zinfer.tracking.run import open_run
from zinfer.tracking.store import TrackingUnavailable, ensure_store
from zinfer.tracking.uri import tracking_uri

# What is logged


def test_the_choices_are_parameters(tmp_path: Path) -> None:
    params = stored(
        opened(config_of("offload=cpu", "dtype=bfloat16", "batch.batch_size=4"))
    ).data.params
    assert params["model.name"] == "opt-125m"
    assert params["offload.device"] == "cpu"
    assert params["offload.pin_memory"] == "false"
    assert params["dtype.weights"] == "bfloat16"
    assert params["batch.batch_size"] == "4"
    assert params["zero.derivation"] == "tuned"
    assert params["engine.name"] == "zero"
    assert params["kv_cache.placement"] == "device"
    assert params["weights"] == "dummy"
    assert "offload.buffer_numel" not in params, "None is left out"
    assert not [
        name
        for name in params
        if name.startswith(("model.overrides", "tracking", "sweep", "hardware.source"))
    ]


def test_the_circumstances_are_tags(tmp_path: Path) -> None:
    config = config_of(
        "offload=nvme",
        "offload.nvme_path=/nvme",
        "dtype=bfloat16",
        "batch.batch_size=4",
        "+tracking.tags={box: rack7}",
    )
    tags = stored(opened(config)).data.tags
    assert tags["mlflow.runName"] == "opt-125m nvme bfloat16 b4"
    assert tags["box"] == "rack7"
    assert tags["zinfer.status"] == "running"
    assert tags["zinfer.role"] == "job"
    assert tags["zinfer.method_version"] == str(METHOD_VERSION)
    assert tags["zinfer.config_key"] == config_key(config)
    assert (tags["zinfer.commit"], tags["zinfer.dirty"]) == ("0123abcd", "true")
    assert tags["zinfer.device"] == "NVIDIA H100 80GB HBM3 x 2"
    assert re.fullmatch(r"[0-9a-f]{12}", tags["zinfer.hardware"])
    assert tags["zinfer.job_dir"] == str(tmp_path / "job")


def test_the_users_tags_cannot_replace_ours() -> None:
    assert (
        tracking.run_tags(
            config_of("+tracking.tags={zinfer.commit: forged}"), Path("job"), ENVIRONMENT
        )["zinfer.commit"]
        == "0123abcd"
    )


def test_decode_latency_is_stepped_and_leaves_the_warmup_out() -> None:
    run = opened(config_of())
    run.finish(OUTCOME)
    assert run.client is not None
    steps = run.client.get_metric_history(run.run_id, "decode_step_s_by_step")
    repeats = run.client.get_metric_history(run.run_id, "total_s_by_repeat")
    assert [(point.step, point.value) for point in sorted(steps, key=lambda point: point.step)] == [
        (0, 0.2),
        (1, 0.5),
    ]
    assert [
        (point.step, point.value) for point in sorted(repeats, key=lambda point: point.step)
    ] == [(0, 1.0), (1, 1.3), (2, 0.8)]


def test_more_metrics_than_one_request_takes_are_all_logged() -> None:
    run = opened(config_of())
    step_s = [0.001 * step for step in range(1, 2501)]
    run.finish(
        Outcome(
            status="ok",
            samples=(
                {
                    "kind": "timed",
                    "index": 0,
                    "prefill_s": 1.0,
                    "decode_step_s": step_s,
                    "total_s": 9.0,
                },
            ),
        )
    )
    assert run.client is not None
    assert len(run.client.get_metric_history(run.run_id, "decode_step_s_by_step")) == 2500


def test_the_files_are_artifacts(tmp_path: Path) -> None:
    run = opened(config_of())
    (run.job_dir / "events.jsonl").write_text('{"event": "phase"}\n')
    (run.job_dir / "worker.log").write_text("a line\n")
    (run.job_dir / "swap.bin").write_bytes(b"weights")
    run.finish(OUTCOME)
    folder = tmp_path / "mlartifacts" / str(run.run_id) / "artifacts"
    derived = {
        "config.yaml",
        "environment.json",
        "plan.json",
        "deepspeed.json",
        "metrics.json",
        "samples.json",
        "generated.json",
    }
    assert {path.name for path in folder.iterdir()} == derived | {"events.jsonl", "worker.log"}
    assert json.loads((folder / "deepspeed.json").read_text()) == OUTCOME.deepspeed
    assert json.loads((folder / "plan.json").read_text()) == OUTCOME.plan
    assert len(json.loads((folder / "samples.json").read_text())) == len(SAMPLES)
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize(
    ("status", "run_status"),
    [
        ("ok", "FINISHED"), ("planned", "FINISHED"), ("killed", "KILLED"), ("timeout", "KILLED"),
        ("does_not_fit", "FAILED"), ("oom_device", "FAILED"), ("oom_host", "FAILED"),
        ("error", "FAILED"), ("refused", "FAILED"),
    ],
)  # fmt: skip
def test_a_run_ends_with_its_truthful_status(status: Status, run_status: str) -> None:
    run = opened(config_of())
    run.finish(Outcome(status=status, reason="a reason" if status != "ok" else None))
    ended = stored(run)
    assert ended.info.status == run_status
    assert ended.info.end_time >= ended.info.start_time
    assert ended.data.tags["zinfer.status"] == status
    assert ended.data.tags.get("zinfer.reason") == (None if status == "ok" else "a reason")


def test_a_run_ends_although_its_files_cannot_be_stored(tmp_path: Path) -> None:
    run = opened(config_of())
    (tmp_path / "mlartifacts").write_text("a file where the folder should be")
    with pytest.raises(TrackingUnavailable):
        run.finish(OUTCOME)
    ended = stored(run)
    assert (ended.info.status, ended.data.tags["zinfer.status"]) == ("FINISHED", "ok")


def test_dtype_auto_is_named_after_what_it_became() -> None:
    run = opened(config_of("offload=cpu"))
    assert stored(run).info.run_name == "opt-125m cpu auto b1"
    run.finish(OUTCOME)
    assert stored(run).info.run_name == "opt-125m cpu float16 b1"


def test_searched_codes_are_named_as_their_preset_is() -> None:
    config = config_of("dtype=int4_searched", "weights=pretrained")
    assert tracking.run_name(config) == "opt-125m none int4_searched b1"
    assert tracking.run_name(config_of("dtype=int4")) == "opt-125m none int4 b1"


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    opened(config_of()).finish(OUTCOME)
    assert capfd.readouterr().out == ""


def test_without_tracking_nothing_is_stored(tmp_path: Path) -> None:
    run = opened(config_of("tracking=none"))
    run.finish(OUTCOME)
    assert run.run_id is None
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_importing_the_module_does_not_import_mlflow() -> None:
    script = (
        "import sys, zinfer.tracking.run\n"
        "heavy = ('mlflow', 'pandas', 'torch', 'sqlalchemy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


# The store


def test_the_default_store_is_in_the_working_directory() -> None:
    assert (
        tracking_uri(TrackingConfig(store="sqlite"), Path("/here")) == "sqlite:////here/mlflow.db"
    )
    assert (
        tracking_uri(TrackingConfig(store="sqlite", uri="sqlite:///runs/a.db"), Path("/here"))
        == "sqlite:////here/runs/a.db"
    )
    assert (
        tracking_uri(TrackingConfig(store="sqlite", uri="sqlite:////data/a.db"), Path("/here"))
        == "sqlite:////data/a.db"
    )
    assert (
        tracking_uri(TrackingConfig(store="server", uri="http://host:5000"), Path("/here"))
        == "http://host:5000"
    )


def test_artifacts_are_beside_the_database() -> None:
    assert (
        uris.artifact_location("sqlite:////data/a.db", Path("/here")) == "file:///data/mlartifacts"
    )
    assert (
        uris.artifact_location("postgresql+psycopg2://host/db", Path("/here"))
        == "file:///here/mlartifacts"
    )
    assert uris.artifact_location("http://host:5000", Path("/here")) is None


def test_a_new_store_is_made_without_mlflow_and_found_afterwards(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    script = (
        "import sys; from zinfer.tracking.store import ensure_store\n"
        f"ensure_store({uri!r}); print('mlflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    if mlflow_store.installed_revision() == mlflow_store.schema_file_revision(
        mlflow_store.SCHEMA_FILE.read_text()
    ):
        assert done.stdout.strip() == "False"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mlflow.db"], "no lock is left"
    before = (tmp_path / "new" / "mlflow.db").stat().st_mtime_ns
    ensure_store(uri)
    assert (tmp_path / "new" / "mlflow.db").stat().st_mtime_ns == before


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    ensure_store(f"sqlite:///{tmp_path}/mlflow.db")
    assert (
        mlflow_store.database_revision(tmp_path / "mlflow.db") == mlflow_store.installed_revision()
    )


@pytest.mark.slow
def test_the_schema_file_is_what_mlflows_migrations_make(tmp_path: Path) -> None:
    if mlflow_store.installed_revision() != mlflow_store.schema_file_revision(
        mlflow_store.SCHEMA_FILE.read_text()
    ):
        pytest.skip("needs the MLflow of constraints.txt: the installed one has another schema")
    mlflow_store._migrate(tmp_path / "migrated.db")
    mlflow_store.create_database(tmp_path / "made.db")
    assert database_content(tmp_path / "made.db") == database_content(tmp_path / "migrated.db")


def test_another_mlflow_migrates_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(mlflow_store, "installed_revision", lambda: "of-tomorrow")
    monkeypatch.setattr(mlflow_store, "_migrate", asked.append)
    mlflow_store.create_database(tmp_path / "mlflow.db")
    assert asked == [tmp_path / "mlflow.db"]


def database_content(path: Path) -> tuple[set[tuple[str, ...]], dict[str, list[Any]]]:
    """Return tables with their columns, indices and triggers, and the rows where there are any.

    Definitions are compared as bags of words: the migrations write the constraints of a table in
    an order that changes from run to run.
    """
    connection = sqlite3.connect(path)
    master = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    tables = [name for kind, name, _ in master if kind == "table"]
    schema = {
        (kind, name, *sorted(re.findall(r"[^\s\",()]+", sql or ""))) for kind, name, sql in master
    }
    schema |= {
        (name, *map(str, column))
        for name in tables
        for column in connection.execute(f'PRAGMA table_info("{name}")')
    }
    rows = {name: connection.execute(f'SELECT * FROM "{name}"').fetchall() for name in tables}
    return schema, {name: found for name, found in rows.items() if found}


def write_runs(folder: str, runs: int) -> list[str]:
    """Make the store if it is not there and log runs in it, in a process of its own."""
    os.chdir(folder)
    config = config_of()
    finished = []
    for number in range(runs):
        run = open_run(config, job_dir=Path(folder), environment=ENVIRONMENT)
        run.finish(OUTCOME if number % 2 == 0 else Outcome(status="error", reason="x"))
        finished.append(str(run.run_id))
    return finished


def test_six_processes_make_one_store_and_log_in_it_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["zinfer.tracking.run", "mlflow", "mlflow.store.tracking.sqlalchemy_store"]
    )
    with context.Pool(6) as pool:
        finished = [
            run_id
            for ids in pool.starmap(write_runs, [(str(tmp_path), 4)] * 6, chunksize=1)
            for run_id in ids
        ]
    client = tracking.connect(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.search_runs([tracking.experiment(client, "zinfer", None)], max_results=100)
    assert {run.info.run_id for run in found} == set(finished)
    assert len(finished) == 24
    assert sorted(run.info.status for run in found) == ["FAILED"] * 12 + ["FINISHED"] * 12
    assert all(
        run.data.metrics["prefill_s"] == 0.5 for run in found if run.info.status == "FINISHED"
    )


# What cannot be reached


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"this is no database, though it is long enough to have a header" * 20,
            "file is not a database",
        ),
        (None, r"Set tracking\.uri=sqlite"),
    ],
)
def test_a_store_that_cannot_be_opened_is_said_in_one_sentence(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "mlflow.db"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(TrackingUnavailable, match=said):
        opened(config_of())


def test_a_store_of_another_mlflow_is_not_touched(tmp_path: Path) -> None:
    ensure_store(f"sqlite:///{tmp_path}/mlflow.db")
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'of-yesterday'")
    with pytest.raises(
        TrackingUnavailable, match=r"of-yesterday.*then run mlflow db upgrade sqlite:///"
    ):
        opened(config_of())


def test_a_server_that_does_not_answer_is_said_at_once_and_without_its_password() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://alice:geheim-wort@127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(
            TrackingUnavailable, match=r"does not answer.*refused.*tracking=none"
        ) as raised:
            opened(config_of("tracking=server", f"tracking.uri={uri}"))
    assert "geheim" not in str(raised.value) and "alice" not in str(raised.value)


def test_a_deleted_experiment_is_said() -> None:
    run = opened(config_of())
    assert run.client is not None
    run.client.delete_experiment(stored(run).info.experiment_id)
    with pytest.raises(
        TrackingUnavailable, match=r"zinfer was deleted.*tracking\.experiment=another-name"
    ):
        opened(config_of())


# Secrets


SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567",
    "MLFLOW_TRACKING_PASSWORD": "pa$$ wörd/with@signs",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
}


def test_no_secret_reaches_the_store_or_its_artifacts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    uri = "postgresql://alice:geheim-wort@db.example.com/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    everything = " ".join(
        [*SECRETS.values(), json.dumps(list(SECRETS.values())), uri, "geheim-wort"]
    )
    config = config_of("tracking=sqlite", "+tracking.tags={note: note}", "batch.prompt=text")
    object.__setattr__(config.tracking, "tags", {"note": everything, "uri": uri})
    object.__setattr__(config.batch, "prompt_text", everything)
    run = opened(config, job_dir="elsewhere")
    for name in ("worker.log", "events.jsonl", "generated.txt"):
        (run.job_dir / name).write_text(everything)
    run.finish(
        Outcome(
            status="error",
            reason=everything,
            traceback=everything,
            warnings=(everything,),
            generated={"text": everything},
        )
    )
    escaped = json.dumps(SECRETS["MLFLOW_TRACKING_PASSWORD"])
    secrets = [
        value.encode()
        for value in (*SECRETS.values(), escaped, "geheim-wort", "alice", "hf_AbCdEf")
    ]
    files = [
        tmp_path / "mlflow.db",
        *(path for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()),
    ]
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        assert not [secret for secret in secrets if secret in content], file
        assert b"***" in content or file.name == "environment.json"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("postgresql+psycopg2://u:s3cret@h:5432/db", "postgresql+psycopg2://***@h:5432/db"),
        ("https://u:p@ss@h/x?y=1", "https://***@h/x?y=1"),
        ("https://token@github.com/a/b", "https://***@github.com/a/b"),
        ("http://127.0.0.1:5000/#/runs", "http://127.0.0.1:5000/#/runs"),
        ("write to someone@example.com", "write to someone@example.com"),
        ("http://h/x?a=b&access_token=abc123&c=d", "http://h/x?a=b&access_token=***&c=d"),
        ("token hf_abcdefghijKLMNOP1234 used", "token *** used"),
        ("hf_models.py and hf_transfer", "hf_models.py and hf_transfer"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("password: hunter2", "password: ***"),
        ('{"api_key": "xyz", "password": null}', '{"api_key": "***", "password": null}'),
        (
            "prompt_tokens: 32, pad_token: </s>, tokenizer: x",
            "prompt_tokens: 32, pad_token: </s>, tokenizer: x",
        ),
    ],
)
def test_what_looks_like_a_secret_is_removed_and_nothing_else(text: str, redacted: str) -> None:
    assert redact(text) == redacted


def test_values_of_secret_variables_are_removed_in_every_spelling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_API_KEY", "a b/c+d")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    assert (
        redact("a b/c+d a%20b%2Fc%2Bd a+b%2Fc%2Bd true falsefalse") == "*** *** *** true falsefalse"
    )


def test_json_is_redacted_inside_and_keeps_its_shape() -> None:
    given = {
        "password": "x",
        "max_tokens": 5,
        "list": ["http://u:p@h", None, 1.5],
        "tokenizer_id": "facebook/opt-125m",
        "secret": None,
    }
    assert redact(given) == given | {"password": "***", "list": ["http://***@h", None, 1.5]}


# Sweeps


def test_the_jobs_of_a_sweep_share_one_parent(tmp_path: Path) -> None:
    file = announce_parent(tmp_path / "sweep", ["model=opt-125m,bloom-560m", "offload=none,cpu"])
    config = config_of(f"sweep.parent_run_id={file}")
    first, second = stored(opened(config)), stored(opened(config))
    parent_id = first.data.tags["mlflow.parentRunId"]
    assert second.data.tags["mlflow.parentRunId"] == parent_id
    client = tracking.connect(f"sqlite:///{tmp_path}/mlflow.db")
    parent = client.get_run(parent_id)
    assert parent.info.run_name == "model=opt-125m,bloom-560m offload=none,cpu"
    assert (parent.data.tags["zinfer.role"], parent.info.status) == ("sweep", "RUNNING")
    close_parent(file, None, "ok")
    parent = client.get_run(parent_id)
    assert (parent.data.tags["zinfer.status"], parent.info.status) == ("ok", "FINISHED")


def test_a_parent_that_exists_already_is_taken_by_its_id() -> None:
    assert (
        stored(opened(config_of("sweep.parent_run_id=0123456789abcdef"))).data.tags[
            "mlflow.parentRunId"
        ]
        == "0123456789abcdef"
    )


def test_a_sweep_without_a_tracked_job_leaves_no_parent(tmp_path: Path) -> None:
    close_parent(announce_parent(tmp_path / "sweep", []), None, "error")
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("jobs", "status", "run_status"), [("1,2", "ok", "FINISHED"), ("1,13", "error", "FAILED")]
)
def test_hydra_opens_and_closes_the_parent(
    tmp_path: Path, jobs: str, status: str, run_status: str
) -> None:
    """A job that fails keeps Hydra from calling on_multirun_end; the parent is closed."""
    application = tmp_path / "application.py"
    application.write_text(
        textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            import hydra
            from hydra.core.hydra_config import HydraConfig
            from zinfer.config import parse_config
            from zinfer.job.outcome import Outcome
            from zinfer.tracking.run import open_run

            @hydra.main(version_base="1.3", config_path={str(CONF)!r}, config_name="config")
            def task(composed):
                job_dir = Path(HydraConfig.get().runtime.output_dir)
                early = "mlflow" in sys.modules
                print("mlflow imported before the first job:", early, file=sys.stderr)
                config = parse_config(composed)
                run = open_run(config, job_dir=job_dir, environment={ENVIRONMENT!r})
                failed = config.batch.seed == 13
                run.finish(Outcome(status="error" if failed else "ok", reason="unlucky"))
                if failed:
                    raise RuntimeError("unlucky")

            task()
            """
        )
    )
    callback = "++hydra.callbacks.parent_run._target_=zinfer.tracking.parent.ParentRunCallback"
    done = subprocess.run(
        [sys.executable, str(application), "-m", "~hydra.callbacks.sweep", callback,
         f"batch.seed={jobs}", "hydra.sweep.dir=sweep"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == (0 if status == "ok" else 1), done.stderr
    assert "before the first job: False" in done.stderr
    client = tracking.connect(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([tracking.experiment(client, "zinfer", None)])
    (parent,) = [run for run in runs if run.data.tags["zinfer.role"] == "sweep"]
    children = [
        run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    assert len(children) == 2
    assert (parent.data.tags["zinfer.status"], parent.info.status) == (status, run_status)
    assert parent.data.tags["zinfer.sweep_dir"] == str(tmp_path / "sweep")
