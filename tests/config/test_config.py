"""conf/ composes, and what cannot run is refused with every problem and what to type."""

from __future__ import annotations

import typing
from dataclasses import fields, is_dataclass

import pytest

from tests.helpers.composing import CONF, choices, composed
from zinfer.config import ConfigError, RunConfig, config_from_tree, config_key, config_to_tree

GROUPS = (
    "model",
    "offload",
    "dtype",
    "batch",
    "kv_cache",
    "zero",
    "engine",
    "hardware",
    "tracking",
)
NEEDS = {
    ("model", "custom"): ("model.source=/tmp",),
    ("dtype", "int4_searched"): ("weights=pretrained",),
    ("tracking", "server"): ("tracking.uri=http://127.0.0.1:5000",),
}


@pytest.mark.parametrize(
    ("group", "choice"), [(group, choice) for group in GROUPS for choice in choices(group)]
)
def test_every_choice_of_every_group_composes_and_survives_a_round_trip(
    group: str, choice: str
) -> None:
    config = composed(f"{group}={choice}", *NEEDS.get((group, choice), ()))
    assert config_from_tree(config_to_tree(config)) == config


REFUSED = [  # overrides, what the sentence says, what it tells to type
    (
        ("offload=nvme", "offload.nvme_path=null"),
        "no offload.nvme_path",
        "offload.nvme_path=/local_nvme",
    ),
    (("batch.batch_size=3", "launcher.ranks=2"), "cannot be split", "batch.batch_size=4"),
    (("dtype.keep=lm_head",), "dtype.keep=lm_head is not a list", "dtype.keep=[lm_head]"),
    (("dtype.eight_bits=null",), "dtype.eight_bits=null is not a list", "dtype.eight_bits=[]"),
    (("batch.batch_size=0",), "too small", "batch.batch_size=1"),
    (("batch.new_tokens=1",), "too small", "batch.new_tokens=2"),
    (("batch.repeats=0",), "too small", "batch.repeats=1"),
    (
        ("dtype=int4", "weights=pretrained", "zero=paper"),
        "cannot load a checkpoint into weights that it quantises",
        "zero=tuned",
    ),
    (
        ("dtype=int8", "dtype.compute=float32", "zero=paper"),
        "computes in 16 bits",
        "dtype.compute=bfloat16",
    ),
    (("dtype=int8", "dtype.group_size=48"), "not one of 32, 64, 128", "dtype.group_size=32"),
    (("dtype=int4", "dtype.keep=[lm_head]", "zero=paper"), "does not read it", "zero=tuned"),
    (("dtype=int4", "dtype.symmetric=true", "zero=paper"), "does not read it", "zero=tuned"),
    (("dtype=int4", "dtype.activation_bits=8", "zero=paper"), "does not read it", "zero=tuned"),
    (
        ("dtype=int4", "dtype.activation_bits=12"),
        "not one of auto, 16, 8",
        "dtype.activation_bits=auto",
    ),
    (
        ("dtype=int4", "dtype.activation_bits=8", "dtype.kernel=torch"),
        "dtype.kernel=torch does not round activations",
        "dtype.kernel=auto",
    ),
    (
        ("dtype=int4", "dtype.rounding=searched"),
        "weights=dummy are random",
        "dtype.rounding=nearest",
    ),
    (
        ("dtype=int4", "dtype.rounding=searched", "weights=pretrained", "model.gguf_file=a.gguf"),
        "model.gguf_file=a.gguf is none",
        "dtype.rounding=nearest",
    ),
    (("dtype.weights=float32", "dtype.compute=bfloat16"), "differ", "dtype=float32"),
    (
        ("engine=resident", "offload=cpu"),
        "keeps weights on the device, but offload is cpu",
        "engine=zero",
    ),
    (
        ("offload=nvme", "zero.aio_block_size_bytes=1000000"),
        "not a power of two",
        "zero.aio_block_size_bytes=1048576",
    ),
    (("zero=paper", "zero.aio_queue_depth=8"), "exactly the published values", "zero=tuned"),
    (("offload.use_gds=true",), "reads from NVMe", "offload=nvme"),
    (("model=tiny-opt", "weights=pretrained"), "no published checkpoint", "weights=dummy"),
    (("model=custom",), "model.source is not set", "model.source=/path/to/a/folder"),
    (("tracking=server",), "has no tracking.uri", "tracking.uri=http"),
    (("tracking.uri=ftp://x",), "no store of kind ftp", "tracking=sqlite"),
    ((f"tracking.uri={__file__}",), "is a file", f"tracking.uri=sqlite:///{__file__}"),
    (("tracking.uri=box:5000",), "no store of kind box", "tracking.uri=http://box:5000"),
    (("batch.prompt=file",), "no batch.prompt_file", "batch.prompt_file=/path"),
    (
        ("batch.prompt=file", "batch.prompt_file=absent.txt"),
        "is not a file",
        "batch.prompt_file=/path",
    ),
    (("launcher.timeout_s=0",), "too small: more than 0", "launcher.timeout_s=null"),
    (("plan.headroom=1.5",), "too large: at most 0.99", "plan.headroom=0.99"),
    (("engine.name=vllm",), "is not one of zero, resident", "engine.name=zero"),
    (("model.name=''",), "model.name is empty", "model.name=my-model"),
    (("quality.enabled=maybe",), "is not one of true, false, auto", "quality.enabled=true"),
    (("quality.enabled=atuo",), "is not one of true, false, auto", "quality.enabled=auto"),
    (
        ("batch.batch_size=many",),
        "batch.batch_size=many is not a whole number",
        "batch.batch_size=",
    ),
    (("+batch.batchsize=4",), "batch.batchsize is not a setting", "Set batch.batch_size=4"),
    (("+batch.colour=red",), "batch.colour is not a setting", "zinfer --explain batch"),
]


@pytest.mark.parametrize(
    "uri",
    [
        "http://box:5000",
        "sqlite:///a.db",
        "postgresql+psycopg2://box/runs",
        "databricks",
        "databricks-uc",
        "databricks://profile",
        "file:///runs",
        "runs",
    ],
)
def test_every_kind_of_store_that_mlflow_has_is_accepted(uri: str) -> None:
    assert composed(f"tracking.uri={uri}").tracking.uri == uri


@pytest.mark.parametrize(("overrides", "says", "type_this"), REFUSED)
def test_what_cannot_run_is_refused_in_a_sentence(
    overrides: tuple[str, ...], says: str, type_this: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        composed(*overrides)
    problem = str(refused.value)
    assert says in problem
    assert type_this in problem


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        composed(
            "batch.batch_size=0",
            "batch.repeats=0",
            "launcher.timeout_s=-1",
            "dtype=int4",
            "weights=pretrained",
            "zero=paper",
        )
    assert len(refused.value.problems) == 4


def test_the_key_ignores_where_a_run_is_stored_and_sees_what_it_measures() -> None:
    key = config_key(composed("offload=nvme"))
    assert key == config_key(
        composed(
            "offload=nvme", "offload.nvme_path=/elsewhere", "tracking=none", "launcher.timeout_s=60"
        )
    )
    for change in (
        "batch.batch_size=2",
        "dtype=float32",
        "zero=paper",
        "model=opt-350m",
        "weights=pretrained",
        "batch.seed=1",
    ):
        assert key != config_key(composed("offload=nvme", change)), change


def test_opt_175b_is_opt_66b_with_five_overrides() -> None:
    small, large = composed("model=opt-66b").model, composed("model=opt-175b").model
    changed = {name for name in large.overrides if large.overrides[name] != small.overrides[name]}
    assert changed == {
        "hidden_size",
        "word_embed_proj_dim",
        "ffn_dim",
        "num_attention_heads",
        "num_hidden_layers",
    }
    assert large.tokenizer_id == "facebook/opt-66b"


def test_every_setting_can_be_typed_without_a_plus_sign() -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = OmegaConf.to_container(compose("config"))
    assert isinstance(tree, dict)
    groups = {
        name: kind for name, kind in typing.get_type_hints(RunConfig).items() if is_dataclass(kind)
    }
    settings = {(group, item.name) for group, kind in groups.items() for item in fields(kind)}
    absent = {f"{group}.{name}" for group, name in settings if name not in tree[group]}
    assert not absent


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("dtype=float16",), False),
        (("dtype=int4",), False),  # computes in bfloat16
        (("dtype=int4", "dtype.compute=float16"), True),
        (("dtype=int8", "dtype.compute=auto"), True),
    ],
)
def test_quantised_weights_in_float16_need_the_kernel_that_unpacks_them(
    overrides: tuple[str, ...], expected: bool
) -> None:
    assert composed(*overrides).dtype.unpacks_to_float16 is expected


@pytest.mark.parametrize(
    ("overrides", "bits"),
    [
        (("dtype=int4",), 8),
        (("dtype=int8",), 16),
        (("dtype=int4_searched", "weights=pretrained"), 16),
        (("dtype=int4", "dtype.activation_bits=16"), 16),
        (("dtype=int8", "dtype.activation_bits=8"), 8),
    ],
)
def test_activations_have_8_bits_where_the_weights_lose_far_more(
    overrides: tuple[str, ...], bits: int
) -> None:
    assert composed("model=smollm2-135m", *overrides).dtype.product_bits == bits
