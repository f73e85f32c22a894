"""Small checkpoints, whole ones and ones with the faults that real ones have."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 128,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mixtral": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "deepseek_v3": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 512,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
LAST = "model.layers.1."


@cache
def base(family: str) -> tuple[dict[str, Any], Tensors]:
    """Return the configuration and tensors of a small model of this family, as published."""
    import tempfile

    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SETTINGS[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() > 1:
                tensor.normal_(0.0, 0.15)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # writes the names that the hub has
        tensors = load_file(Path(folder) / "model.safetensors")
        settings = json.loads((Path(folder) / "config.json").read_text())
    return settings, {name: tensor.clone() for name, tensor in tensors.items()}


def write(
    folder: Path,
    tensors: Tensors | None = None,
    *,
    family: str = "llama",
    file: str = "model.safetensors",
    **changes: Any,
) -> Path:
    """Write config.json with these changes, and the tensors (the family's own unless given)."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, whole = base(family)
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    held = whole if tensors is None else tensors
    if held:
        save_file({name: each.contiguous() for name, each in held.items()}, folder / file)
    return folder


def _index(folder: Path, shard_of: Callable[[str], str], family: str = "llama") -> None:
    names = base(family)[1]
    index = {"metadata": {}, "weight_map": {name: shard_of(name) for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _without(*parts: str, family: str = "llama") -> Tensors:
    held = base(family)[1]
    return {name: each for name, each in held.items() if not any(part in name for part in parts)}


def _renamed(rename: Callable[[str], str]) -> Tensors:
    return {rename(name): each for name, each in base("llama")[1].items()}


def _with(**tensors: torch.Tensor) -> Tensors:
    return {**base("llama")[1], **tensors}


def _changed(name: str, change: Callable[[torch.Tensor], torch.Tensor], family: str) -> Tensors:
    held = dict(base(family)[1])
    held[name] = change(held[name])
    return held


def _poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def poison(tensor: torch.Tensor) -> torch.Tensor:
        poisoned = tensor.clone()
        poisoned.view(-1)[-1] = value
        return poisoned

    return poison


def _quantised(replace: Callable[[str, torch.Tensor], Tensors]) -> Tensors:
    held: Tensors = {}
    for name, each in base("llama")[1].items():
        held |= replace(name, each) if name.endswith("proj.weight") else {name: each}
    return held


def _gptq(name: str, tensor: torch.Tensor) -> Tensors:
    rows, columns = tensor.shape
    stem = name.removesuffix(".weight")
    return {
        f"{stem}.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        f"{stem}.qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
        f"{stem}.scales": torch.ones(1, rows, dtype=torch.float16),
    }


def _fp8(name: str, tensor: torch.Tensor) -> Tensors:
    return {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}


def _compressed(name: str, tensor: torch.Tensor) -> Tensors:
    rows, columns = tensor.shape
    return {
        f"{name}_packed": torch.zeros(rows, columns // 8, dtype=torch.int32),
        f"{name}_scale": torch.ones(rows, 1, dtype=torch.bfloat16),
        f"{name}_shape": torch.tensor([rows, columns]),
    }


def _bitsandbytes(name: str, tensor: torch.Tensor) -> Tensors:
    return {
        name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.ones(tensor.numel() // 64),
        f"{name}.quant_map": torch.ones(16),
        f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8),
    }


def _int8_rows(name: str, tensor: torch.Tensor) -> Tensors:
    return {name: tensor.to(torch.int8), f"{name}_scale": torch.ones(len(tensor), 1)}


def _header(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the header of the file; its length stays right."""

    def changed(held: bytes) -> bytes:
        size = int.from_bytes(held[:8], "little")
        header = json.loads(held[8 : 8 + size])
        change(header)
        raw = json.dumps(header).encode()
        return len(raw).to_bytes(8, "little") + raw + held[8 + size :]

    return _bytes(folder, changed)


NORM = "model.norm.weight"


def _half_shape(header: dict[str, Any]) -> None:
    header[NORM]["shape"] = [16]


def _shifted(header: dict[str, Any]) -> None:
    header[NORM]["data_offsets"] = [each - 4 for each in header[NORM]["data_offsets"]]


def _described(**fields: Any) -> Callable[[Path], Path]:
    """Change fields of one tensor in the header; None takes one away."""

    def change(header: dict[str, Any]) -> None:
        header[NORM].update(fields)
        header[NORM] = {name: value for name, value in header[NORM].items() if value is not None}

    return lambda to: _header(to, change)


def _no_fields(header: dict[str, Any]) -> None:
    header[NORM] = 128


def _training(folder: Path) -> Path:
    write(folder, {})
    torch.save({"model": base("llama")[1], "epoch": 3}, folder / "pytorch_model.bin")
    return folder


def _shards(folder: Path, first: Tensors, second: Tensors | None, shard_of: Any) -> Path:
    write(folder, first, file="model-00001-of-00002.safetensors")
    if second is not None:
        write(folder, second, file="model-00002-of-00002.safetensors")
    _index(folder, shard_of)
    return folder


def _second_if_last(name: str) -> str:
    return f"model-0000{2 if LAST in name else 1}-of-00002.safetensors"


def _only_last() -> Tensors:
    return {name: each for name, each in base("llama")[1].items() if LAST in name}


def _bytes(folder: Path, content: Callable[[bytes], bytes]) -> Path:
    file = write(folder) / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    return folder


def _pickled(folder: Path) -> Path:
    write(folder, {})
    torch.save(base("llama")[1], folder / "pytorch_model.bin")
    return folder


def _multimodal(folder: Path, prefix: str, head: str) -> Path:
    """Return a LLaVA folder: the text model under `prefix`, a vision tower beside it."""
    settings, whole = base("llama")
    held: Tensors = {}
    for name, each in whole.items():
        renamed = name.replace("model.", prefix, 1) if name.startswith("model.") else head
        held[renamed] = each
    held["vision_tower.embeddings.weight"] = torch.ones(4, 4)
    held["multi_modal_projector.linear_1.weight"] = torch.ones(4, 4)
    write(folder, held)
    text = {**settings, "architectures": None}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "num_attention_heads": 2}
    config = {"model_type": "llava", "text_config": text, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


WHOLE: dict[str, Callable[[Path], Path]] = {
    "base": write,
    "without_base_prefix": lambda to: write(to, _renamed(lambda name: name.removeprefix("model."))),
    "sharded": lambda to: _shards(to, _without(LAST), _only_last(), _second_if_last),
    "ddp_prefix": lambda to: write(to, _renamed(lambda name: f"module.{name}")),
    "compiled_prefix": lambda to: write(to, _renamed(lambda name: f"_orig_mod.{name}")),
    "two_prefixes": lambda to: write(to, _renamed(lambda name: f"module._orig_mod.{name}")),
    "fsdp_prefix": lambda to: write(to, _renamed(lambda name: f"_fsdp_wrapped_module.{name}")),
    "peft_prefix": lambda to: write(to, _renamed(lambda name: f"base_model.model.{name}")),
    "index_with_places_mixed_up": lambda to: _shards(
        to,
        _without(LAST),
        _only_last(),
        lambda name: f"model-0000{1 if LAST in name else 2}-of-00002.safetensors",
    ),
    "tied_weights_stored_twice": lambda to: write(
        to,
        _with(**{"lm_head.weight": base("llama")[1]["model.embed_tokens.weight"].clone()}),
        tie_word_embeddings=True,
    ),
    "old_inv_freq": lambda to: write(
        to, _with(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    ),
    "tied_head_absent": lambda to: write(to, _without("lm_head"), tie_word_embeddings=True),
    "older_llava": lambda to: _multimodal(
        to, "language_model.model.", "language_model.lm_head.weight"
    ),
    "newer_llava": lambda to: _multimodal(to, "model.language_model.", "lm_head.weight"),
    "experts": lambda to: write(to, family="mixtral"),
    "buffers": lambda to: write(to, family="deepseek_v3"),
}
"""Name -> writer of a checkpoint that is the model's, however it is named."""

FAULTY: dict[str, tuple[Callable[[Path], Path], str]] = {
    "one_layer_missing": (
        lambda to: write(to, _without(LAST)),
        r"lacks 13 tensors of llama \(model\.layers\.1\.input_layernorm\.weight, .* and 10 more\)",
    ),
    "bias_missing": (
        lambda to: write(to, _without("layers.0.self_attn.k_proj.bias")),
        r"lacks 1 tensors of llama \(model\.layers\.0\.self_attn\.k_proj\.bias\)",
    ),
    "expert_missing": (
        lambda to: write(to, _without("experts.3.", family="mixtral"), family="mixtral"),
        r"cannot be loaded|lacks|by config\.json",
    ),
    "untied_head_missing": (
        lambda to: write(to, _without("lm_head")),
        r"lacks 1 .*lm_head\.weight",
    ),
    "index_stale": (
        lambda to: _shards(to, _without(LAST), {"other": torch.ones(2)}, _second_if_last),
        r"model-00002-of-00002\.safetensors lacks 13 tensors .*input_layernorm",
    ),
    "shard_missing": (
        lambda to: _shards(to, _without(LAST), None, _second_if_last),
        r"model-00002-of-00002\.safetensors is missing: 13 tensors are in it \(model\.layers\.1\.",
    ),
    "same_tensor_in_two_shards": (
        lambda to: _shards(to, base("llama")[1], _only_last(), _second_if_last),
        r"both hold 13 of the same tensors \(model\.layers\.1\.",
    ),
    "index_of_no_json": (
        lambda to: _broken_index(to),
        r"model\.safetensors\.index\.json is no index of a checkpoint",
    ),
    "no_index": (
        lambda to: write(to, file="model-00001-of-00001.safetensors"),
        r"model-00001-of-00001\.safetensors but no model\.safetensors\.index\.json",
    ),
    "all_wrong_names": (
        lambda to: write(to, _renamed(lambda name: f"transformer.{name}")),
        r"lacks 29 tensors of llama[\s\S]*has 29 tensors, of 29, that llama does not know",
    ),
    "some_prefixed": (
        lambda to: write(to, _renamed(lambda name: f"module.{name}" if LAST in name else name)),
        r"lacks 13 tensors[\s\S]*has 13 tensors, of 29, that llama does not know \(module\.",
    ),
    "two_names": (
        lambda to: write(to, _with(**{"norm.weight": torch.ones(32)})),
        r"1 tensors under two names \(norm\.weight and model\.norm\.weight\)",
    ),
    "fewer_layers_in_config": (
        lambda to: write(to, num_hidden_layers=1),
        r"has 13 tensors.*Set model\.overrides\.num_hidden_layers=2",
    ),
    "more_layers_in_config": (
        lambda to: write(to, num_hidden_layers=3),
        r"lacks 13 tensors of llama \(model\.layers\.2\.",
    ),
    "extra_tensor": (
        lambda to: write(to, _with(**{"model.adapter.weight": torch.ones(4, 4)})),
        r"has 1 tensors, of 30, that llama does not know \(model\.adapter\.weight\)",
    ),
    "lora_left_in": (
        lambda to: write(
            to, _with(**{"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)})
        ),
        r"lora_A.*merge it into its base model",
    ),
    "vocab_mismatch": (
        lambda to: write(to, vocab_size=514),
        r"is \[512, 32\] in model\.safetensors and \[514, 32\] by config\.json, and 1 more",
    ),
    "integers": (
        lambda to: write(
            to, _changed("model.norm.weight", lambda each: each.to(torch.int32), "llama")
        ),
        r"1 weights of .* are stored as I32 \(model\.norm\.weight\)",
    ),
    "gptq": (
        lambda to: write(
            to, _quantised(_gptq), quantization_config={"quant_method": "gptq", "bits": 4}
        ),
        r"was quantised by another tool \(gptq: quantization_config",
    ),
    "gptq_without_config": (
        lambda to: write(to, _quantised(_gptq)),
        r"lacks 14 tensors.*do not take[\s\S]*has 42 tensors.*quantised weights \(GPTQ or AWQ\)",
    ),
    "fp8": (
        lambda to: write(to, _quantised(_fp8), quantization_config={"quant_method": "fp8"}),
        r"was quantised by another tool \(fp8: quantization_config",
    ),
    "fp8_without_config": (
        lambda to: write(to, _quantised(_fp8)),
        r"has 14 tensors.*weight_scale_inv[\s\S]*14 weights of .* are stored as F8_E4M3"
        r".*quantised by another tool\. Take the unquantised checkpoint: dtype=int8 and dtype=int4",
    ),
    "awq": (
        lambda to: write(
            to, _quantised(_gptq), quantization_config={"quant_method": "awq", "bits": 4}
        ),
        r"was quantised by another tool \(awq: quantization_config",
    ),
    "compressed_tensors_of_old": (
        lambda to: write(
            to, _quantised(_compressed), compression_config={"quant_method": "compressed-tensors"}
        ),
        r"was quantised by another tool \(compressed-tensors: compression_config",
    ),
    "compressed_tensors_without_config": (
        lambda to: write(to, _quantised(_compressed)),
        r"has 42 tensors.*quantised weights \(compressed-tensors\)",
    ),
    "bitsandbytes": (
        lambda to: write(to, _quantised(_bitsandbytes), quantization_config={"load_in_4bit": True}),
        r"was quantised by another tool \(an unnamed method: quantization_config",
    ),
    "bitsandbytes_without_config": (
        lambda to: write(to, _quantised(_bitsandbytes)),
        r"has 42 tensors.*quantised weights \(bitsandbytes\)",
    ),
    "integers_with_scales_without_config": (
        lambda to: write(to, _quantised(_int8_rows)),
        r"has 14 tensors.*quantised weights[\s\S]*14 weights of .* are stored as I8",
    ),
    "tied_weights_that_differ": (
        lambda to: write(to, tie_word_embeddings=True),
        r"embed_tokens\.weight and lm_head\.weight with different values.*"
        r"Set model\.overrides\.tie_word_embeddings=false",
    ),
    "shape_of_other_bytes": (
        lambda to: _header(to, _half_shape),
        r"damaged: tensor model\.norm\.weight is F32 \[16\], which takes 64 bytes, .* has 128",
    ),
    "places_that_overlap": (
        lambda to: _header(to, _shifted),
        r"damaged: tensor \S+ lies at bytes \d+ to \d+, and should begin at \d+",
    ),
    "header_without_a_shape": (
        _described(shape=None),
        r"damaged: tensor model\.norm\.weight has no shape in the header\. Download it again",
    ),
    "header_without_places": (
        _described(data_offsets=None, dtype=None),
        r"damaged: tensor model\.norm\.weight has no dtype and no data_offsets in the header",
    ),
    "header_with_one_place": (
        _described(data_offsets=[128]),
        r"weight has data_offsets \[128\], which are no two places, in the header",
    ),
    "header_with_a_broken_shape": (
        _described(shape=[-32]),
        r"weight has shape \[-32\], which are no sizes, in the header",
    ),
    "header_with_a_numbered_dtype": (
        _described(dtype=3),
        r"weight has dtype 3, which is no name, in the header",
    ),
    "header_without_fields": (
        lambda to: _header(to, _no_fields),
        r"damaged: tensor model\.norm\.weight has no fields but 128 in the header",
    ),
    "header_that_is_a_list": (
        lambda to: _bytes(to, lambda _: (8).to_bytes(8, "little") + b"[1, 2]  "),
        r"is not a safetensors file: its header is no JSON object",
    ),
    "header_that_is_no_json": (
        lambda to: _bytes(to, lambda _: (8).to_bytes(8, "little") + b"{1, 2]  "),
        r"is not a safetensors file: its header is no JSON$",
    ),
    "llava_without_a_layer": (lambda to: _llava_cut(to), r"lacks 13 tensors of llama"),
    "truncated": (
        lambda to: _bytes(to, lambda held: held[: len(held) // 2]),
        r"model\.safetensors is cut short: \d+ of \d+ bytes, from tensor \S+ on",
    ),
    "truncated_header": (
        lambda to: _bytes(to, lambda held: held[:100]),
        r"model\.safetensors is cut short.*its header alone",
    ),
    "lfs_pointer": (
        lambda to: _bytes(
            to, lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"
        ),
        r"is a Git LFS pointer.*git lfs pull",
    ),
    "web_page": (
        lambda to: _bytes(to, lambda _: b"<!DOCTYPE html><html>Not found</html>"),
        r"model\.safetensors is not a safetensors file: it begins with b'<!DOCTYPE",
    ),
    "empty_file": (lambda to: _bytes(to, lambda _: b""), r"model\.safetensors is empty"),
    "no_weights": (lambda to: write(to, {}), r"has no weights: neither model\.safetensors nor"),
    "adapter_only": (
        lambda to: write(to, {"lora_A": torch.ones(1)}, file="adapter_model.safetensors"),
        r"holds a PEFT adapter",
    ),
    "pickle_of_a_training": (_training, r"only pickles \(pytorch_model\.bin\)"),
    "pickle_only": (_pickled, r"only pickles \(pytorch_model\.bin\).*model\.allow_pickle=true"),
}
"""Name -> writer of a checkpoint that is not the model's, and what its refusal says."""

NOT_NUMBERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nan": (
        lambda to: write(to, _changed("model.norm.weight", _poisoned(float("nan")), "llama")),
        r"1 tensors hold NaN or infinity \(model\.norm\.weight\)",
    ),
    "infinity_in_an_embedding": (
        lambda to: write(
            to, _changed("model.embed_tokens.weight", _poisoned(float("inf")), "llama")
        ),
        r"1 tensors hold NaN or infinity \(model\.embed_tokens\.weight\)",
    ),
    "infinity_in_a_buffer": (
        lambda to: write(
            to,
            _changed(
                "model.layers.1.mlp.gate.e_score_correction_bias",
                _poisoned(float("-inf")),
                "deepseek_v3",
            ),
            family="deepseek_v3",
        ),
        r"1 tensors hold NaN or infinity \(model\.layers\.1\.mlp\.gate\.e_score_correction_bias\)",
    ),
}
"""Name -> writer of a checkpoint with a value that is no number, and what the run's end says."""


def _broken_index(folder: Path) -> Path:
    write(folder, file="model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("{")
    return folder


def _llava_cut(folder: Path) -> Path:
    from safetensors.torch import load_file

    _multimodal(folder, "model.language_model.", "lm_head.weight")
    held = load_file(folder / "model.safetensors")
    kept = {name: each for name, each in held.items() if "layers.1." not in name}
    save_file(kept, folder / "model.safetensors")
    return folder
