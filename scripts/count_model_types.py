"""Write tests/data/model_types.json: how each causal language model type of transformers ends.

Each type of AutoModelForCausalLM gets one row: a small configuration of it that really runs, with
the parameters and the cache bytes of that real instance, or why there is none. Run it after a new
version of transformers; rows that change show in the diff. It takes some minutes.

    python scripts/count_model_types.py [TYPE ...]     # these types only, the rest is kept
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.helpers.real_models import ROWS, real_counts
from zinfer.config import ModelConfig
from zinfer.model.limits import TEXT_PARTS
from zinfer.model.spec import kv_cache_bytes, model_spec

DATA = Path(__file__).parent.parent / "tests" / "data" / "model_types.json"
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 199,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 32,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "state_size": 8,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "vocab_size_per_layer_input": 199,
    "hidden_size_per_layer_input": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Tried as far as a type has the field. None of its values is a multiple that hides another."""
MOST_NUMEL = 100_000_000
"""Parameters of a row's model: its real instance must be made and run in about a second."""
AT_ONCE = 16
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
PART = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "bailing_hybrid": {"num_hidden_layers": 8, "num_key_value_heads": 4},
    "kimi_linear": {"num_hidden_layers": 8, "num_key_value_heads": 4},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 8},
    "xlnet": {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "gemma3n": {"intermediate_size": 96, "laurel_rank": 8},
    "gemma3n_text": {"intermediate_size": 96, "laurel_rank": 8},
    "qwen4_exp": {"num_hidden_layers": 4, **INDEXER},
    "qwen4_exp_text": {"num_hidden_layers": 4, **INDEXER},
    "phi4_multimodal": {
        "vision_config": {**PART, "num_hidden_layers": 2},
        "audio_config": {**PART, "num_blocks": 2},
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What some types need beside the sizes."""
WITHOUT = (
    (),
    ("max_position_embeddings",),
    ("v_head_dim",),
    ("num_key_value_heads",),
    ("head_dim",),
    ("num_key_value_heads", "head_dim"),
    ("num_hidden_layers",),
    ("num_hidden_layers", "num_key_value_heads", "head_dim"),
    ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
)
"""Sizes that are left at the type's default where all of them together do not fit it."""


def candidates(model_type: str) -> Iterator[dict[str, Any]]:
    """Yield small configurations to try, the smallest first."""
    from transformers import AutoConfig

    try:
        whole = AutoConfig.for_model(model_type)
    except Exception:  # no defaults that pass their own checks
        yield {}
        return
    default = whole.get_text_config(decoder=True)
    part = next((name for name in TEXT_PARTS if getattr(whole, name, None) is default), None)
    extra = EXTRA.get(model_type, {})
    for given_only, left_out in itertools.product((True, False), WITHOUT):
        sizes = {}
        for name, size in SIZES.items():
            value = _value(default, name)
            has = hasattr(type(default), name) or name in default.attribute_map
            if name in left_out or isinstance(value, bool | list) or not has:
                continue
            if value is None and given_only:
                continue
            sizes[name] = size
        sizes |= extra
        yield sizes if part is None else {part: {"model_type": default.model_type, **sizes}}
    yield {}  # so that a type that is refused says why, and not what is wrong with small sizes


def _value(default: Any, name: str) -> Any:
    try:
        return getattr(default, name, None)
    except (RuntimeError, NotImplementedError):  # differs by layer; XLNet has no longest position
        return None


def row_of(model_type: str) -> dict[str, Any]:
    """Count one type: its first small configuration whose real instance runs, or the refusal."""
    counted: list[dict[str, Any]] = []
    refused = ""
    for overrides in candidates(model_type):
        model = ModelConfig(name=model_type, model_type=model_type, overrides=overrides)
        try:
            spec = model_spec(model, compute_dtype="float32")
        except ValueError as error:
            refused = str(error)
            continue
        row: dict[str, Any] = {"overrides": overrides, "parameters": spec.num_parameters}
        if spec.num_parameters > MOST_NUMEL:
            counted.append({**row, "not_run": "too large to be made in a test"})
            continue
        try:
            row |= real_counts(model)
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            counted.append({**row, "not_run": said})
            continue
        planned = kv_cache_bytes(spec, ROWS, row["tokens"])
        if planned == row["kv_cache_bytes"]:
            return row
        counted.append({**row, "kv_planned": planned, "kv_unknown": spec.kv_unknown_reason})
    ran = [row for row in counted if "not_run" not in row]
    return (ran or counted or [{"refused": refused}])[0]


def main(chosen: list[str]) -> None:
    """Count some types in one process after the other: each leaves gigabytes behind."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    rows = json.loads(DATA.read_text()) if DATA.is_file() else {}
    rows = {name: row for name, row in rows.items() if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    names = chosen or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for start in range(0, len(names), AT_ONCE):
        some = names[start : start + AT_ONCE]
        answer = subprocess.run(
            [sys.executable, __file__, "--some", *some], stdout=subprocess.PIPE, text=True
        )
        for line in answer.stdout.splitlines():
            if line.startswith("{"):
                rows |= json.loads(line)
        if missing := set(some) - set(rows):
            raise SystemExit(f"{answer.returncode}: no row for {', '.join(sorted(missing))}")
        print(f"{start + len(some)}/{len(names)}", flush=True)
        lines = [f" {json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows)]
        DATA.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--some"]:
        for name in sys.argv[2:]:
            print(json.dumps({name: row_of(name)}), flush=True)
    else:
        main(sys.argv[1:])
