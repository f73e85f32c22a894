"""ModelSpec against published counts; its KV bytes against tensors that transformers caches."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from zinfer.config import ModelConfig
from zinfer.model import hub
from zinfer.model.hf import (
    check_pinned,
    load_checkpoint_config,
    load_hf_config,
    model_class,
)
from zinfer.model.spec import (
    ModelSpec,
    hidden_bytes,
    kv_bytes_per_token,
    kv_cache_bytes,
    kv_cache_bytes_paper,
    model_spec,
)
from zinfer.model.spec_cache import CATALOGUE, cache_key, entry_name, from_json, read_counted
from zinfer.model.tokenizer import find_tokenizer
from zinfer.units import KIB

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf" / "model"
FACTS = json.loads((Path(__file__).parents[1] / "data" / "model_facts.json").read_text())["models"]
PUBLISHED = [
    facts
    for facts in FACTS
    if facts["published_parameters"] is not None and facts["conf"] != "deepseek-v3"
]
TINY = ["tiny-opt", "tiny-bloom", "tiny-llama", "tiny-mixtral"]
TESTED_TRANSFORMERS = dict(
    re.findall(r"^(\S+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
)["transformers"]
NAMES = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "custom")


def by_conf(rows: list[dict[str, Any]]) -> Any:
    """Make one test of each row, named for its file in conf/model."""
    return pytest.mark.parametrize("facts", rows, ids=[row["conf"] for row in rows])


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Count anew: neither zinfer's own counts nor those in the user's cache are used."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ZINFER_CACHE", str(folder))
        patch.setattr(
            "zinfer.model.spec._COUNTED", {}
        )  # what other tests of this process have counted is not in that folder
        patch.setattr("zinfer.model.spec_cache.CATALOGUE", folder / "none.zip")
        yield folder


def compose(name: str) -> dict[str, Any]:
    """Compose conf/model/<name>.yaml with its defaults list applied, as Hydra does."""
    tree = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    for base_name in tree.pop("defaults", []):
        if base_name != "_self_":
            base = compose(base_name)
            tree = {**base, **tree, "overrides": {**base["overrides"], **tree["overrides"]}}
    return tree


def catalogue(name: str) -> ModelConfig:
    return ModelConfig(**compose(name))


def spec_of(name: str, **kwargs: Any) -> ModelSpec:
    return model_spec(catalogue(name), **kwargs)


def pinned(model_type: str, **overrides: Any) -> ModelConfig:
    return ModelConfig(name=f"reduced-{model_type}", model_type=model_type, overrides=overrides)


# ---- the catalogue ----


def test_every_model_of_the_facts_has_a_file() -> None:
    assert {facts["conf"] for facts in FACTS} | {"smollm2-135m", *TINY} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_file_names_its_model_and_where_its_values_come_from(name: str) -> None:
    model = catalogue(name)
    assert model.name == name
    assert (
        model.model_type
        and model.overrides
        and not model.trust_remote_code
        and model.source is None
    )
    assert (model.config_source or "").startswith("https://") or name in TINY
    assert (CONF / f"{name}.yaml").read_text().startswith("# ")


@by_conf(FACTS)
def test_file_gives_the_hub_id_of_the_facts(facts: dict[str, Any]) -> None:
    expected = None if facts["conf"] == "opt-175b" else facts["hub_id"]
    assert catalogue(facts["conf"]).hub_id == expected


def test_opt_175b_is_opt_66b_with_five_overrides_and_its_tokenizer() -> None:
    small, big = catalogue("opt-66b"), catalogue("opt-175b")
    changed = {key: value for key, value in big.overrides.items() if small.overrides[key] != value}
    assert changed == {
        "hidden_size": 12288,
        "word_embed_proj_dim": 12288,
        "ffn_dim": 49152,
        "num_attention_heads": 96,
        "num_hidden_layers": 96,
    }
    assert small.overrides.keys() == big.overrides.keys()
    assert (big.hub_id, big.tokenizer_id, big.model_type) == (None, "facebook/opt-66b", "opt")


# ---- counts ----


@by_conf(PUBLISHED)
def test_parameter_count_matches_publication(facts: dict[str, Any]) -> None:
    assert spec_of(facts["conf"]).num_parameters == facts["published_parameters"], facts[
        "published_source"
    ]


@by_conf(FACTS)
def test_parameters_match_the_facts(facts: dict[str, Any]) -> None:
    spec = spec_of(facts["conf"], compute_dtype="float16")
    assert spec.num_parameters == facts["parameters"]
    assert sum(parameter.numel for parameter in spec.parameters) == facts["parameters"]
    assert len(spec.parameters) == facts["parameter_tensors"]
    assert spec.num_active_parameters == (facts["active_parameters"] or facts["parameters"])
    assert spec.weight_bytes == facts["weight_bytes_16bit"]
    assert spec.tied_embeddings == facts["tied_embeddings"]
    assert spec.largest_parameter.numel == facts["largest_parameter_numel"]
    assert list(spec.largest_parameter.shape) == facts["largest_parameter_shape"]
    assert spec.largest_layer_numel == facts["largest_layer_numel"]
    assert {parameter.layer for parameter in spec.parameters} == {None, *range(spec.num_layers)}


@by_conf(FACTS)
def test_kv_cache_matches_the_facts(facts: dict[str, Any]) -> None:
    spec = spec_of(facts["conf"], compute_dtype="float16")
    assert spec.kv_layers is not None
    assert kv_bytes_per_token(spec) == facts["kv_bytes_per_token_unbounded"]
    windowed = [layer for layer in spec.kv_layers if layer.window is not None]
    assert (
        2 * sum(layer.values_per_token for layer in windowed)
        == facts["kv_bytes_per_token_windowed"]
    )
    assert {layer.window for layer in windowed} == ({facts["window"]} if facts["window"] else set())
    assert kv_cache_bytes(spec, 1, 544) == facts["kv_cache_bytes_544"]
    assert kv_cache_bytes(spec, 1, 32768) == facts["kv_cache_bytes_32768"]
    assert kv_cache_bytes(spec, 8, 544) == 8 * facts["kv_cache_bytes_544"]


PUBLISHED_KV_BYTES_PER_TOKEN = [("opt-13b", 800 * KIB, "arXiv:2309.06180 section 3")]


@pytest.mark.parametrize(("name", "published", "source"), PUBLISHED_KV_BYTES_PER_TOKEN)
def test_kv_bytes_per_token_match_publication(name: str, published: int, source: str) -> None:
    assert kv_bytes_per_token(spec_of(name)) == published, source


def test_published_formula_is_kept_beside_the_true_size() -> None:
    spec = spec_of("llama-2-70b")
    assert kv_cache_bytes_paper(spec, 4, 544) == 2 * 4 * 544 * 80 * 8192 * 2
    assert kv_cache_bytes_paper(spec, 4, 544) == 8 * (
        kv_cache_bytes(spec, 4, 544) or 0
    )  # 8 query heads share a key-value head
    assert hidden_bytes(spec, 4, 544) == 4 * 544 * 8192 * 2


def test_smollm2_has_the_parameters_of_its_model_card() -> None:
    spec = spec_of("smollm2-135m")
    assert (spec.num_parameters, spec.dtype, spec.tied_embeddings) == (
        134_515_008,
        "bfloat16",
        True,
    )


def test_parameters_know_their_owner_kind_and_layer() -> None:
    by_name = {parameter.name: parameter for parameter in spec_of("opt-125m").parameters}
    fc1 = by_name["model.decoder.layers.3.fc1.weight"]
    assert (fc1.shape, fc1.module, fc1.kind, fc1.layer) == (
        (3072, 768),
        "model.decoder.layers.3.fc1",
        "linear",
        3,
    )
    assert by_name["model.decoder.layers.3.fc1.bias"].kind == "other"
    assert by_name["model.decoder.embed_tokens.weight"].kind == "embedding"
    assert (
        by_name["model.decoder.embed_positions.weight"].kind == "other"
    )  # a subclass: DeepSpeed does not quantise it
    assert by_name["model.decoder.embed_tokens.weight"].layer is None
    assert "lm_head.weight" not in by_name


def test_experts_are_marked_and_shared_experts_are_not() -> None:
    spec = spec_of("deepseek-v3")
    experts = {
        parameter.name.split(".", 3)[3] for parameter in spec.parameters if parameter.is_expert
    }
    assert experts == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert (spec.num_experts, spec.experts_per_token) == (256, 8)
    assert (spec_of("opt-125m").num_experts, spec_of("opt-125m").experts_per_token) == (None, None)


def test_compute_dtype_is_the_users_then_the_checkpoints_then_float16() -> None:
    assert spec_of("llama-3-8b", compute_dtype="float32").dtype == "float32"
    assert spec_of("llama-3-8b").dtype == "bfloat16"
    assert model_spec(pinned("opt", num_hidden_layers=2)).dtype == "float16"


# ---- KV bytes against real caches ----

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 257}
GATED = {**SMALL, "intermediate_size": 96}
GQA = {**GATED, "num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
ROUTED = {
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
GPT = {"n_embd": 64, "n_head": 4, "n_layer": 3, "vocab_size": 257}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
REDUCED: list[
    tuple[str, dict[str, Any], set[str]]
] = [  # model_type, overrides, kinds of its layers
    (
        "opt",
        {**SMALL, "word_embed_proj_dim": 64, "ffn_dim": 128, "max_position_embeddings": 256},
        {"mha"},
    ),
    ("bloom", SMALL, {"mha"}),
    ("llama", GATED, {"mha"}),
    ("llama", GQA, {"gqa"}),
    ("mixtral", {**GQA, "num_local_experts": 4}, {"gqa"}),
    ("mistral", {**GQA, "sliding_window": 8}, {"sliding"}),
    (
        "gemma3_text",
        {**GQA, "head_dim": 16, "num_hidden_layers": 7, "sliding_window": 8},
        {"sliding", "gqa"},
    ),
    (
        "gpt_oss",
        {
            **GQA,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
        },
        {"sliding", "gqa"},
    ),
    (
        "deepseek_v3",
        {**GATED, "num_key_value_heads": 4, **LATENT, **ROUTED, "first_k_dense_replace": 1},
        {"mla"},
    ),
    ("qwen3_moe", {**GQA, "head_dim": 16, **EXPERTS}, {"gqa"}),
    # families outside the catalogue
    (
        "qwen3_next",
        {**GQA, "num_hidden_layers": 4, "head_dim": 16, **EXPERTS, **DELTA},
        {"linear_state", "gqa"},
    ),
    ("falcon_h1", {**GQA, "head_dim": 16, **MAMBA}, {"hybrid"}),
    ("falcon", {**SMALL, "multi_query": True, "alibi": False}, {"gqa"}),
    (
        "falcon",
        {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
        {"mha"},
    ),  # cached repeated
    ("gpt2", GPT, {"mha"}),
    ("gptj", {**GPT, "rotary_dim": 8}, {"mha"}),
    (
        "mpt",
        {"d_model": 64, "n_heads": 4, "n_layers": 3, "vocab_size": 257, "max_seq_len": 256},
        {"mha"},
    ),
    ("phi3", {**GQA, "pad_token_id": 0}, {"gqa"}),
    # families that need values: read from a small real instance
    ("biogpt", {**SMALL, "intermediate_size": 96, "max_position_embeddings": 64}, {"mha"}),
    (
        "jetmoe",
        {**SMALL, "num_key_value_heads": 2, "kv_channels": 16, "intermediate_size": 96},
        {"gqa"},
    ),
    ("llama", {**GQA, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, {"gqa"}),
    ("gpt_bigcode", {**GPT, "multi_query": True}, {"gqa"}),
    (
        "mamba",
        {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 257, "state_size": 8},
        {"linear_state"},
    ),
]


def real_cache_bytes(
    model: ModelConfig, batch_size: int, prompt_tokens: int, new_tokens: int
) -> int:
    """Return the bytes cached after generate() on the CPU in float32: all tokens but the last."""
    import torch

    config = load_hf_config(model)
    config.eos_token_id, config.pad_token_id, config.bos_token_id = None, 0, 1
    torch.manual_seed(0)
    network = model_class(config)(config).to(torch.float32).eval()
    prompt = torch.randint(2, config.vocab_size, (batch_size, prompt_tokens))
    lengths = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "use_cache": True,
    }  # MPT's config says use_cache=False
    output = network.generate(
        prompt, attention_mask=torch.ones_like(prompt), return_dict_in_generate=True, **lengths
    )
    assert output.sequences.shape == (batch_size, prompt_tokens + new_tokens)
    cache = output.get("past_key_values") or output["cache_params"]
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in held_tensors(layer)
    )


def held_tensors(layer: Any) -> list[Any]:
    states = [
        *getattr(layer, "conv_states", {}).values(),
        *getattr(layer, "recurrent_states", {}).values(),
    ]
    tensors = [
        *states,
        *(getattr(layer, name, None) for name in ("keys", "values", "indexer_keys")),
    ]
    return [tensor for tensor in tensors if tensor is not None]


@pytest.mark.parametrize(
    ("model_type", "overrides", "kinds"),
    REDUCED,
    ids=[f"{row[0]}-{'-'.join(sorted(row[2]))}" for row in REDUCED],
)
def test_kv_cache_bytes_are_those_of_the_real_cache(
    model_type: str, overrides: dict[str, Any], kinds: set[str]
) -> None:
    model = pinned(model_type, **overrides)
    spec = model_spec(model, compute_dtype="float32")
    assert spec.kv_layers is not None, spec.kv_unknown_reason
    assert {layer.kind for layer in spec.kv_layers} == kinds
    for prompt_tokens, new_tokens in ((3, 2), (13, 6)):  # below and above the window of 8
        expected = real_cache_bytes(model, 2, prompt_tokens, new_tokens)
        assert kv_cache_bytes(spec, 2, prompt_tokens + new_tokens - 1) == expected


def test_recurrent_state_kept_in_float32_is_counted_as_such() -> None:
    import torch

    model = pinned(
        "qwen3_next", **{**GQA, "num_hidden_layers": 4, "head_dim": 16, **EXPERTS, **DELTA}
    )
    spec = model_spec(model, compute_dtype="bfloat16")
    config = load_hf_config(model)
    network = model_class(config)(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        cache = network(torch.randint(2, 257, (2, 13)), use_cache=True).past_key_values
    held = [tensor for layer in cache.layers for tensor in held_tensors(layer)]
    assert {str(tensor.dtype) for tensor in held} == {"torch.bfloat16", "torch.float32"}
    assert kv_cache_bytes(spec, 2, 13) == sum(
        tensor.numel() * tensor.element_size() for tensor in held
    )


UNKNOWN_CACHES = [  # model_type, overrides, part of the reason
    ("openai-gpt", GPT, "NoneType"),
]


@pytest.mark.parametrize(("model_type", "overrides", "reason"), UNKNOWN_CACHES)
def test_cache_that_cannot_be_read_is_unknown_with_the_reason(
    model_type: str, overrides: dict[str, Any], reason: str
) -> None:
    spec = model_spec(pinned(model_type, **overrides))
    assert spec.num_parameters > 0
    assert (spec.kv_layers, kv_bytes_per_token(spec), kv_cache_bytes(spec, 1, 8)) == (
        None,
        None,
        None,
    )
    assert reason in (spec.kv_unknown_reason or "")


def test_counting_leaves_the_configuration_as_it_was() -> None:
    model, again = catalogue("llama-3.1-8b"), catalogue("llama-3.1-8b")
    model_spec(model)
    load_hf_config(model)
    assert model == again  # rope_scaling too, to which transformers would add


# ---- sources other than the catalogue ----


@pytest.fixture
def folder_with(tmp_path: Path) -> Callable[[dict[str, Any]], ModelConfig]:
    """Make model=custom of a folder that holds nothing but this config.json."""

    def write(config: dict[str, Any], **fields: Any) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return ModelConfig(name="custom", source=str(tmp_path), **fields)

    return write


def test_a_folder_with_nothing_but_config_json_is_enough(folder_with: Any) -> None:
    spec = model_spec(folder_with({"model_type": "llama", **GQA, "torch_dtype": "bfloat16"}))
    assert (spec.architecture, spec.dtype, spec.num_layers, spec.num_kv_heads) == (
        "LlamaForCausalLM",
        "bfloat16",
        3,
        2,
    )
    shallow = model_spec(
        folder_with({"model_type": "llama", **GQA}, overrides={"num_hidden_layers": 1})
    )
    assert (shallow.num_layers, shallow.dtype) == (1, "float16")


def test_a_changed_config_json_is_counted_anew(folder_with: Any) -> None:
    assert model_spec(folder_with({"model_type": "llama", **GQA})).num_layers == 3
    assert (
        model_spec(folder_with({"model_type": "llama", **GQA, "num_hidden_layers": 2})).num_layers
        == 2
    )


def test_of_a_multimodal_model_the_text_part_is_counted(folder_with: Any) -> None:
    text = {**GQA, "head_dim": 16, "sliding_window": 8, "model_type": "gemma3_text"}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "model_type": "siglip_vision_model",
    }
    config = {
        "model_type": "gemma3",
        "torch_dtype": "bfloat16",
        "text_config": text,
        "vision_config": vision,
    }
    spec = model_spec(folder_with({**config, "architectures": ["Gemma3ForConditionalGeneration"]}))
    assert (spec.architecture, spec.dtype, spec.num_layers) == ("Gemma3ForCausalLM", "bfloat16", 3)
    assert not any("vision" in parameter.name for parameter in spec.parameters)
    assert spec.text_part_of == "gemma3"


def test_text_part_listed_under_the_whole_model_is_found() -> None:
    """AutoModelForCausalLM lists Mllama's and Emu3's text class under the multimodal config."""
    spec = model_spec(pinned("mllama"))
    assert (spec.architecture, spec.text_part_of) == ("MllamaForCausalLM", "mllama")
    assert spec.kv_layers is not None and len(spec.kv_layers) == spec.num_layers


def test_quantisation_of_the_checkpoint_is_left_out(folder_with: Any) -> None:
    config = {"model_type": "llama", **GQA, "quantization_config": {"quant_method": "fp8"}}
    assert not hasattr(load_hf_config(folder_with(config)), "quantization_config")


def test_pinned_values_are_compared_with_the_checkpoints(folder_with: Any, tmp_path: Path) -> None:
    model = catalogue("tiny-llama")
    same = {"model_type": "llama", **model.overrides, "eos_token_id": 7, "rope_theta": 10000.0}
    folder_with(same)
    assert check_pinned(model, load_checkpoint_config(model, tmp_path)) == []
    folder_with({**same, "num_key_value_heads": 4})
    assert check_pinned(model, load_checkpoint_config(model, tmp_path)) == [
        "num_key_value_heads is 2 in conf/model/tiny-llama.yaml, 4 in the checkpoint's config.json"
    ]
    folder_with({"model_type": "opt"})
    assert "model_type is llama" in check_pinned(model, load_checkpoint_config(model, tmp_path))[0]


def test_scaled_rotary_positions_are_compared_too(folder_with: Any, tmp_path: Path) -> None:
    model = catalogue("llama-3.1-8b")
    folder_with({"model_type": "llama", **model.overrides})
    assert check_pinned(model, load_checkpoint_config(model, tmp_path)) == []
    folder_with({"model_type": "llama", **model.overrides, "rope_theta": 10000.0})
    assert len(check_pinned(model, load_checkpoint_config(model, tmp_path))) == 1


def test_tokenizer_pads_on_the_left_with_the_end_of_sequence(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "Paris": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    tokenizer, reason = find_tokenizer(catalogue("tiny-llama"), tmp_path)
    assert reason is None and tokenizer is not None
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("</s>", "left")


def test_without_a_tokenizer_there_is_a_reason(
    folder_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    assert find_tokenizer(catalogue("tiny-llama")) == (None, "model=tiny-llama names no tokenizer")
    tokenizer, reason = find_tokenizer(folder_with({"model_type": "llama", **GQA}))
    assert tokenizer is None and "no tokenizer could be read from" in (reason or "")
    tokenizer, reason = find_tokenizer(ModelConfig(name="x", tokenizer_id="nobody/published-this"))
    assert tokenizer is None and "nobody/published-this" in (reason or "")


# ---- refusals ----

REFUSALS = [  # model, what the sentence says
    (pinned("optt"), r"knows no model_type=optt. Did you mean opt\b"),
    (pinned("opt", hiden_size=64), r"opt has no hiden_size.*Set model.overrides.hidden_size=64"),
    (
        pinned("opt", nope=1),
        r"opt has no nope, so model.overrides.nope=1 would change nothing. Leave nope out",
    ),
    (
        pinned("opt", hidden_size="abc"),
        r'hidden_size is "abc": it must be a whole number.*Set another model.overrides.hidden_size',
    ),
    (
        pinned("opt", dropout="abc"),
        r"dropout is \"abc\": .*'dropout' expected float.*Set another model.overrides.dropout",
    ),
    (
        pinned("llama", num_hidden_layers=0, vocab_size=-1, hidden_size=True),
        r"num_hidden_layers is 0: .*hidden_size is true: .*vocab_size is -1: ",
    ),
    (
        pinned("llama", num_attention_heads=8, num_key_value_heads=3),
        r"num_key_value_heads is 3: it must divide num_attention_heads \(8\)",
    ),
    (
        pinned("llama", num_hidden_layers=10**9),
        r"num_hidden_layers is 1000000000: it must be at most 10,000",
    ),
    (
        pinned("llama", hidden_size=10**9, num_attention_heads=10**7, intermediate_size=10**9),
        r"its sizes make .* parameters; the most that are counted are 1,000,000,000,000,000",
    ),
    (
        pinned("opt", hidden_size=100, num_attention_heads=12),
        r"hidden_size is 100.*num_attention_heads is 12.*Set another model.overrides.hidden_size",
    ),
    (pinned("bert"), r"\(bert\) is encoder-only. Choose a model of the catalogue"),
    (pinned("t5"), r"\(t5\) is an encoder-decoder"),
    (pinned("vit"), r"\(vit\) is no causal language model"),
    (
        ModelConfig(name="custom"),
        r"neither model_type nor source. Set model.source to a hub id or a local folder",
    ),
    (
        ModelConfig(name="custom", source="./absent/folder"),
        r"there is no folder ./absent/folder. Give an existing one, or a hub id",
    ),
    (
        ModelConfig(name="custom", source="nobody/published-this"),
        r"the hub cannot be reached.*model=opt-125m.*model.source=/path",
    ),
    (
        ModelConfig(name="custom", source=str(ROOT / "tests")),
        r"has no config.json. Give a folder that has one, or a hub id",
    ),
]


@pytest.mark.parametrize(
    ("model", "message"), REFUSALS, ids=[message[:40] for _, message in REFUSALS]
)
def test_refusal_says_what_to_type_instead(
    model: ModelConfig, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    with pytest.raises(ValueError, match=message) as refusal:
        model_spec(model)
    assert "\n" not in str(refusal.value)


def test_a_folder_of_an_encoder_or_of_unknown_code_is_refused(folder_with: Any) -> None:
    with pytest.raises(ValueError, match="encoder-only"):
        model_spec(folder_with({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(ValueError, match="does not recognize this architecture"):
        model_spec(folder_with({"model_type": "of-next-year"}))
    with pytest.raises(ValueError, match=r"model\.trust_remote_code=true"):
        model_spec(
            folder_with(
                {
                    "model_type": "own-code",
                    "auto_map": {"AutoConfig": "configuration_own.OwnConfig"},
                }
            )
        )


def test_counting_while_zero3_is_configured_is_our_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import deepspeed

    monkeypatch.setattr(deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(AssertionError, match="before any HfDeepSpeedConfig is alive"):
        model_spec(pinned("opt", num_hidden_layers=1))


# ---- what is kept ----

WITHOUT_TORCH = """
import sys, yaml
from zinfer.config import ModelConfig
from zinfer.model.spec import model_spec
print(model_spec(ModelConfig(**yaml.safe_load(sys.stdin))))
assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)
"""


def spec_without_torch(tree: dict[str, Any]) -> str:
    """Return what another process finds that imports neither torch nor transformers."""
    answer = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        cwd=ROOT,
        input=yaml.safe_dump(tree),
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_second_plan_of_a_model_imports_no_torch(own_cache: Path) -> None:
    tree = {
        **compose("tiny-mixtral"),
        "overrides": {**compose("tiny-mixtral")["overrides"], "num_hidden_layers": 3},
    }
    spec = model_spec(ModelConfig(**tree))
    assert spec_without_torch(tree) == str(spec)


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_with_zinfer_is_what_is_counted(name: str) -> None:
    if importlib.metadata.version("transformers") != TESTED_TRANSFORMERS:
        pytest.skip(
            f"the catalogue was counted with transformers {TESTED_TRANSFORMERS} of constraints.txt"
        )
    key, _ = cache_key(catalogue(name))
    with zipfile.ZipFile(CATALOGUE) as archive:
        assert entry_name(key) in archive.namelist(), (
            "the code that counts, or the catalogue, was changed: make catalogue-specs"
        )
        kept = from_json(archive.read(entry_name(key)))
    spec_of(name)
    assert kept == read_counted(key)


def test_first_plan_of_a_catalogue_model_imports_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path / "empty"))
    assert "ModelSpec(name='opt-175b'" in spec_without_torch(compose("opt-175b"))


def test_a_catalogue_that_is_damaged_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zinfer.model import spec as module

    damaged = tmp_path / "specs.zip"
    damaged.write_bytes(CATALOGUE.read_bytes()[:-100])
    monkeypatch.setattr(module, "_COUNTED", {})
    monkeypatch.setattr("zinfer.model.spec_cache.CATALOGUE", damaged)
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path))
    assert spec_of("tiny-opt").num_layers == 3


def test_cached_spec_is_the_counted_spec(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zinfer.model import spec as module

    counted = spec_of("gpt-oss-20b")
    monkeypatch.setattr(module, "_COUNTED", {})
    monkeypatch.setattr(module, "causal_config", lambda model: pytest.fail("counted again"))
    assert spec_of("gpt-oss-20b") == counted
    assert spec_of("gpt-oss-20b", compute_dtype="float32") == dataclasses.replace(
        counted, dtype="float32"
    )


def test_a_cache_that_cannot_be_used_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zinfer.model import spec as module

    monkeypatch.setattr(module, "_COUNTED", {})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path / "file"))  # a file where the folder should be
    assert spec_of("tiny-opt").num_layers == 3
