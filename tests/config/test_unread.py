"""A setting that was typed and is not read is said, with what reads it; what is read is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.composing import composed
from zinfer.config.unread import READ, unread_settings

UNREAD = [  # a setting, and with what it is read
    ("batch.prompt_file=tests/README.md", "batch.prompt=file"),
    ("batch.prompt_text=Once", "batch.prompt=text"),
    ("batch.target_relative_error=0.01", "batch.max_repeats=100"),
    ("quality.tokens=512", "quality.enabled=true weights=pretrained"),
    ("quality.min_agreement=0.99", "quality.enabled=auto"),
    ("quality.max_perplexity_ratio=1.01", "quality.enabled=auto"),
    ("offload.nvme_path=/local_nvme", "offload=nvme"),
    ("offload.buffer_numel=100000", "offload=nvme"),
    ("offload.buffer_count=7", "offload=nvme"),
    ("offload.huge_pages=false", "offload=nvme"),
    ("zero.aio_block_size_bytes=4096", "offload=nvme"),
    ("zero.aio_queue_depth=8", "offload=nvme"),
    ("zero.aio_intra_op_parallelism=2", "offload=nvme"),
    ("offload.pin_memory=true", "offload=cpu"),
    ("dtype.group_size=32", "dtype=int8"),
    ("dtype.symmetric=true", "dtype=int4"),
    ("dtype.keep=[head]", "dtype=int8"),
    ("dtype.rounding=searched", "dtype=int4 weights=pretrained"),
    ("dtype.activation_bits=8", "dtype=int8"),
    ("dtype.eight_bits=[]", "dtype=int4"),
    ("kv_cache.group_size=32", "kv_cache=host kv_cache.value_bits=4"),
    ("kv_cache.kernel=torch", "kv_cache=host kv_cache.bits=8"),
    ("kv_cache.kernel=torch", "kv_cache=host_attention"),
    ("model.gguf_file=a.gguf", "model=custom model.source=/models/one"),
    ("sweep.search_max_batch=8", "sweep.search=best_batch"),
    ("sweep.search_trials=4", "sweep.search=best_batch"),
]


@pytest.mark.parametrize(("setting", "readers"), UNREAD)
def test_it_is_said_exactly_where_nothing_reads_it(setting: str, readers: str) -> None:
    name = setting.partition("=")[0]
    others = ["kv_cache=host"] if name.startswith("kv_cache") else []
    (said,) = unread_settings(composed(setting, *others), [setting, "batch.seed=1"])
    assert said.startswith(f"{name} is set and not read: it is of ")
    assert said.endswith(f", or drop {name}")
    assert unread_settings(composed(setting, *readers.split()), [setting]) == []


def test_every_setting_of_the_table_is_tried() -> None:
    tried = {setting.partition("=")[0] for setting, _ in UNREAD}
    assert tried == {name for row in READ for name in row.names}


@pytest.mark.parametrize("row", READ, ids=lambda row: row.names[0])
def test_the_advice_is_obeyed(row) -> None:  # type: ignore[no-untyped-def]
    """Whoever sets what the sentence says is not told the same again."""
    others = ["weights=pretrained"] if row.instead == "quality.enabled=true" else []
    if row.names[0].startswith("kv_cache"):
        others.append("kv_cache=host")
    setting = next(each for each, _ in UNREAD if each.startswith(f"{row.names[0]}="))
    config = composed(*others, setting, *row.instead.split())
    assert unread_settings(config, [f"{name}=1" for name in row.names]) == []


def test_what_a_preset_sets_and_other_tasks_are_not_told() -> None:
    assert unread_settings(composed("batch.prompt_text=Once"), []) == []
    upload = composed("task=upload", "dtype.keep=[head]")
    assert unread_settings(upload, ["dtype.keep=[head]"]) == []


def test_the_command_says_it_before_anything_else(tmp_path: Path) -> None:
    words = ["model=tiny-llama", "task=plan", "tracking=none", "batch.prompt_file=my.txt"]
    command = [sys.executable, "-m", "zinfer", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "warning: batch.prompt_file is set and not read: it is of batch.prompt=file. Set " in (
        done.stderr
    )
