"""Which weights are packed, by their names and shapes, and the bytes that each takes."""

from __future__ import annotations

import pytest

from tests.helpers.composing import composed
from zinfer.model.parameters import Parameter
from zinfer.model.quantisable import packed_bytes, stored_bits, stored_numel
from zinfer.model.spec import ModelSpec, model_spec


def spec(name: str) -> ModelSpec:
    return model_spec(composed(f"model={name}").model)


PACKED = [  # model, part of a name, whether such weights are packed
    ("opt-125m", "self_attn.q_proj.weight", True),
    ("opt-125m", "fc1.weight", True),
    ("opt-125m", "embed_tokens.weight", True),
    ("opt-125m", "embed_positions.weight", False),
    ("opt-125m", "layer_norm.weight", False),
    ("opt-125m", "fc1.bias", False),
    ("opt-350m", "project_out.weight", True),
    ("bloom-560m", "word_embeddings.weight", True),
    ("bloom-560m", "query_key_value.weight", True),
    ("bloom-560m", "word_embeddings_layernorm.weight", False),
    ("mixtral-8x7b", "experts.gate_up_proj", True),
    ("mixtral-8x7b", "experts.down_proj", True),
    ("mixtral-8x7b", "mlp.gate.weight", False),
    ("mixtral-8x7b", "lm_head.weight", True),
    ("qwen3-30b-a3b", "experts.down_proj", True),
    ("qwen3-30b-a3b", "mlp.gate.weight", False),
    ("qwen3-30b-a3b", "q_norm.weight", False),
    ("gpt-oss-20b", "experts.gate_up_proj", True),
    ("gpt-oss-20b", "experts.gate_up_proj_bias", False),
    ("gpt-oss-20b", "router.weight", False),
    ("gpt-oss-20b", "self_attn.sinks", False),
    ("deepseek-v3", "kv_b_proj.weight", True),
    ("deepseek-v3", "shared_experts.up_proj.weight", True),
    ("deepseek-v3", "mlp.gate.weight", False),
    ("qwen3-8b", "mlp.gate_proj.weight", True),
]


@pytest.mark.parametrize(("model", "part", "is_packed"), PACKED)
def test_linear_expert_and_embedding_weights_are_packed(
    model: str, part: str, is_packed: bool
) -> None:
    found = [each for each in spec(model).parameters if each.name.endswith(part)]
    dtype = composed("dtype=int8").dtype
    assert found and {stored_bits(each, dtype) for each in found} == {8 if is_packed else None}


@pytest.mark.parametrize(
    ("overrides", "name", "bits"),
    [
        (("dtype=int4",), "lm_head.weight", 8),
        (("dtype=int4",), "model.embed_tokens.weight", 4),
        (("dtype=int4", "dtype.eight_bits=[embeddings]"), "model.embed_tokens.weight", 8),
        (("dtype=int4", "dtype.eight_bits=[embeddings]"), "lm_head.weight", 4),
        (("dtype=int8", "dtype.keep=[head]"), "lm_head.weight", None),
        (("dtype=int8", "dtype.keep=[head]"), "model.embed_tokens.weight", 8),
        (("dtype=int4",), "model.layers.1.self_attn.q_proj.weight", 4),
        (("dtype=int4", "dtype.eight_bits=[]"), "lm_head.weight", 4),
        (("dtype=int4", "dtype.eight_bits=[layers.1]"), "model.layers.1.mlp.up_proj.weight", 8),
        (("dtype=int4", "dtype.eight_bits=[layers.1]"), "model.layers.11.mlp.up_proj.weight", 4),
        (("dtype=int4", "dtype.keep=[embeddings]"), "model.embed_tokens.weight", None),
        (("dtype=int8", "dtype.keep=[lm_head]"), "lm_head.weight", None),
        (("dtype=int8", "dtype.keep=[lm]"), "lm_head.weight", 8),
        (("dtype=int8", "dtype.keep=[lm*]"), "lm_head.weight", None),
        (("dtype=int8", "dtype.keep=[q_proj]"), "model.layers.1.self_attn.q_proj.weight", None),
        (("dtype=bfloat16",), "lm_head.weight", None),
    ],
)  # fmt: skip
def test_patterns_match_whole_parts_of_a_name(
    overrides: tuple[str, ...], name: str, bits: int | None
) -> None:
    found = next(each for each in spec("llama-2-7b").parameters if each.name == name)
    assert stored_bits(found, composed(*overrides).dtype) == bits


HEADS = [  # model, head, is it the embedding too
    ("opt-1.3b", "model.decoder.embed_tokens.weight", True),
    ("bloom-560m", "transformer.word_embeddings.weight", True),
    ("smollm2-135m", "model.embed_tokens.weight", True),
    ("llama-2-7b", "lm_head.weight", False),
    ("mixtral-8x7b", "lm_head.weight", False),
]


@pytest.mark.parametrize(("model", "head", "is_tied"), HEADS)
def test_only_the_output_head_has_8_bits_under_int4(model: str, head: str, is_tied: bool) -> None:
    dtype = composed("dtype=int4").dtype
    weights = spec(model).parameters
    assert [each.name for each in weights if stored_bits(each, dtype) == 8] == [head]
    embeddings = [each for each in weights if each.kind == "embedding" and each.is_head]
    assert bool(embeddings) is is_tied


def test_experts_that_are_stored_transposed_have_their_groups_along_the_inputs() -> None:
    """gpt-oss has 2880 inputs: 45 groups of 64, but 22.5 of 128, whose last one is filled up."""
    first = next(
        each for each in spec("gpt-oss-20b").parameters if each.name.endswith(".gate_up_proj")
    )
    assert first.is_transposed and first.shape == (32, 2880, 5760)
    rows = 32 * 5760
    assert packed_bytes(first.numel, 2880, 4, 64) == rows * 45 * (32 + 4)
    assert packed_bytes(first.numel, 2880, 4, 128) == rows * 23 * (64 + 4)


@pytest.mark.parametrize(
    ("model", "dtype", "most"),
    [
        ("opt-1.3b", "int8", 0.535),
        ("opt-1.3b", "int4", 0.304),  # the embedding is 8 % of it, and has 8 bits
        ("llama-2-7b", "int8", 0.535),
        ("llama-2-7b", "int4", 0.295),
        ("mixtral-8x7b", "int4", 0.285),
        ("gpt-oss-20b", "int8", 0.535),
        ("gpt-oss-20b", "int4", 0.30),
    ],
)
def test_stored_bytes_are_within_their_share_of_bfloat16(
    model: str, dtype: str, most: float
) -> None:
    found, config = spec(model), composed(f"dtype={dtype}")
    stored = sum(stored_numel(each, config.dtype, 2) for each in found.parameters)
    assert stored / found.num_parameters <= most


def test_a_weight_that_would_not_get_smaller_stays_as_it_is() -> None:
    narrow = Parameter("a.weight", (64, 16), 1024, "a", "linear", None, False)
    assert stored_bits(narrow, composed("dtype=int8").dtype) is None
    assert stored_bits(narrow, composed("dtype=int4", "dtype.group_size=32").dtype) == 4
