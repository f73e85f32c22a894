"""Refuse architectures that nothing can run, before anything is built from them.

transformers builds a model of 0 layers, or of 10^9 of them if one waits long enough. The caps here
are far above any real model; they keep a typo from filling the memory.
"""

from __future__ import annotations

import contextlib
import difflib
import time
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

from zinfer.model.config_file import shown

MAX_LAYERS = 10_000
"""The deepest published transformer has 1,000 layers (DeepNet, arXiv:2203.00555)."""
MAX_SIZE = 10**9
"""For every other width and count; the widest vocabularies have some 10^6 tokens."""
MAX_POSITIONS = 10**12
MAX_PARAMETERS = 10**15
"""The largest published models have about 10^12."""
COUNTING_BUDGET_S = 120.0
"""DeepSeek-V3, the slowest of the catalogue, takes about 3 s."""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
WIDTHS = ("hidden_size", "d_model", "n_embd", "vocab_size")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim")
POSITIONS = ("max_position_embeddings", "n_positions")
SPELLINGS = (
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
TEXT_PARTS = ("text_config", "llm_config", "language_config", "decoder", "thinker_config")
"""Keys under which multimodal configurations keep their language model."""


def impossible_sizes(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return field -> what is wrong with it, for the sizes that every model must have.

    Lists are left to the model: some families give heads for each layer. A null is too: many
    fields have a default.
    """
    problems = {}
    for name in (*LAYERS, *WIDTHS, *HEADS, *POSITIONS):
        value = values.get(name)
        if value is None or (isinstance(value, list) and name in HEADS):
            continue
        most = MAX_LAYERS if name in LAYERS else MAX_POSITIONS if name in POSITIONS else MAX_SIZE
        if isinstance(value, bool) or not isinstance(value, int):
            problems[prefix + name] = "it must be a whole number, without quotes or a point"
        elif value < 1:
            problems[prefix + name] = "it must be at least 1"
        elif value > most:
            problems[prefix + name] = f"it must be at most {most:,}"
    for part in TEXT_PARTS:
        if isinstance(values.get(part), dict):
            problems |= impossible_sizes(values[part], f"{prefix}{part}.")
    return problems


def misspelt_sizes(values: Mapping[str, Any], known: Container[str]) -> dict[str, str]:
    """Return field -> the right name, for a size under a name that no configuration class reads.

    transformers would keep such a field, ignore it, and build the family's default size instead.
    Only near misses of a size that the file lacks count: files hold many names of other tools.
    """
    problems = {}
    for name in values:
        if name in known:
            continue
        close = difflib.get_close_matches(name, SPELLINGS, n=1, cutoff=0.85)
        if close and close[0] not in values:
            problems[name] = close[0]
    return problems


def impossible_together(get: Callable[[str], Any]) -> dict[str, str]:
    """Return field -> what is wrong, for values that exclude each other.

    Args:
        get: the value of a field, None where there is none or where layers differ in it.
    """
    problems = {}
    heads, kv_heads = get("num_attention_heads"), get("num_key_value_heads")
    if _counts(heads, kv_heads) and heads % kv_heads:
        problems["num_key_value_heads"] = f"it must divide num_attention_heads ({heads})"
    experts: int = next(
        (found for name in EXPERTS if isinstance(found := get(name), int) and found > 0), 0
    )
    chosen = get("num_experts_per_tok")
    if experts and isinstance(chosen, int) and not 1 <= chosen <= experts:
        problems["num_experts_per_tok"] = f"it must be from 1 to the number of experts, {experts}"
    layer_types, window = get("layer_types"), get("sliding_window")
    if isinstance(window, int) and window < 1 and get("use_sliding_window") is not False:
        problems["sliding_window"] = "it must be a number of tokens, or null"
    elif not isinstance(window, int) and "sliding_attention" in (layer_types or ()):
        problems["sliding_window"] = (
            "layer_types has sliding_attention, so it must be a number of tokens"
        )
    return problems


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _counts(*values: Any) -> bool:
    return all(isinstance(value, int) and value > 0 for value in values)


def sentences(problems: Mapping[str, str], get: Callable[[str], Any]) -> str:
    """Join problems: 'num_hidden_layers is 0: it must be at least 1; ...'."""
    return "; ".join(f"{name} is {shown(get(name))}: {why}" for name, why in problems.items())


class CountingTakesTooLong(BaseException):
    """The budget of time for counting one model is spent.

    No Exception, so that no `except Exception` of the code that is being run can hold it up.
    """


@contextlib.contextmanager
def counting_budget(seconds: float = COUNTING_BUDGET_S) -> Iterator[None]:
    """Stop building or running a model once this thread has worked `seconds` on it.

    Checked at every module that is built and at every module that is called, so a model of millions
    of modules ends too. CPU time of this thread counts, so a busy machine changes nothing.

    Raises:
        CountingTakesTooLong: from inside the code that builds or runs the model.
    """
    from torch.nn.modules import module as torch_module

    end_s = time.thread_time() + seconds

    def check(*_: Any) -> None:
        if time.thread_time() > end_s:
            raise CountingTakesTooLong(f"counting it took more than {seconds:.0f} s")

    built = torch_module.register_module_module_registration_hook(check)
    called = torch_module.register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        built.remove()
        called.remove()


def refuse_uncountable(parameters: Mapping[str, int], name: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a model with an empty weight, or with more weights than any machine has.

    Args:
        parameters: the number of elements of each weight, by its name.
        name: how the model is called.
        config: its configuration, to name the sizes that are 0.
    """
    empty = [weight for weight, numel in parameters.items() if numel == 0]
    if empty:
        zeros = [key for key, value in config.items() if value == 0 and type(value) is int]
        sizes = [key for key in zeros if key.startswith(("num_", "n_")) or key in SPELLINGS]
        raise ValueError(
            f"{name}: {len(empty)} of its {len(parameters)} weights have no elements (the first is "
            f"{empty[0]}), because a size is 0: {', '.join(f'{key} is 0' for key in sizes)}. "
            f"Set {' or '.join(f'model.overrides.{key}' for key in sizes)} to at least 1"
        )
    total = sum(parameters.values())
    if total > MAX_PARAMETERS:
        raise ValueError(
            f"{name}: its sizes make {total:,} parameters; the most that are counted are "
            f"{MAX_PARAMETERS:,}. Set a smaller model.overrides.hidden_size or num_hidden_layers"
        )
