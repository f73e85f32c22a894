"""Dummy weights are the same under every engine: tokens and logits agree, and prove something."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SIZE = {
    "hidden_size": 64,
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "minimax": {
        **SIZE,
        "head_dim": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 4,
    },
    "mixtral": {**SIZE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {**SIZE, "tie_word_embeddings": True},
    "opt": {**SIZE, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "mamba": {"hidden_size": 64, "vocab_size": 512, "num_hidden_layers": 2, "state_size": 8},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 64},
}
ENGINES = {
    "resident": ("engine=resident",),
    "none": ("engine=zero", "offload=none"),
    "cpu": ("engine=zero", "offload=cpu"),
    "nvme": ("engine=zero", "offload=nvme"),
}
LOADS = """
import sys
from pathlib import Path
import torch
from tests.helpers.composing import composed
from zinfer.config.engines import engine_loader
from zinfer.job.events import EventLog
from zinfer.machine.hardware import detect_hardware
from zinfer.plan.planned import plan_run
from zinfer.plan.resolved import resolved_spec

folder, *overrides = sys.argv[1:]
config = composed("model=custom", f"model.source={folder}", "dtype=float32", *overrides)
hardware = detect_hardware(config.hardware, config.offload.nvme_folder, 1, 1)
spec = resolved_spec(config, hardware, print)
planned = plan_run(config, hardware, spec)
out = Path(folder) / "log"
out.mkdir()
engine = engine_loader(config)(config, spec, planned.deepspeed_json(), EventLog(out))
ids = torch.arange(24).view(2, 12) * 19 % 512
with torch.no_grad():
    logits = engine.model(input_ids=ids).logits
    new = engine.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16,
        eos_token_id=None, pad_token_id=0,
    )[:, 12:]
gathered = [
    each.data_ptr() == each.ds_tensor.data_ptr()
    for each in engine.model.parameters()
    if hasattr(each, "ds_tensor")
]
answer = {"logits": logits, "tokens": new, "is_partition": torch.tensor(gathered)}
torch.save(answer, Path(folder) / "answer.pt")
import os
os._exit(0)
"""


def answer(folder: Path, settings: dict[str, Any], *overrides: str) -> dict[str, torch.Tensor]:
    """Return logits [2, 12, vocabulary] and 16 greedy tokens of each row, from another process."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **rank, "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(folder), *overrides, f"offload.nvme_path={folder}/swap"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, torch.Tensor] = torch.load(folder / "answer.pt")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_engine_has_the_logits_and_tokens_of_the_resident_model(
    family: str, built_ops: list[str], tmp_path: Path
) -> None:
    settings = {"model_type": family, "dtype": "float32", **FAMILIES[family]}
    answers = {
        name: answer(tmp_path / name, settings, *overrides) for name, overrides in ENGINES.items()
    }
    resident = answers.pop("resident")
    for row in resident["tokens"].tolist():
        assert len(set(row)) >= 3, "a row that only repeats itself would prove nothing"
    assert float(resident["logits"].std()) > 0.1
    for name, found in answers.items():
        torch.testing.assert_close(found["logits"], resident["logits"], rtol=1e-4, atol=1e-4)
        assert torch.equal(found["tokens"], resident["tokens"]), name
    assert answers["none"]["is_partition"].all(), "each stays gathered, and has no second copy"
    assert not answers["cpu"]["is_partition"].all(), "layers are released after their use"
