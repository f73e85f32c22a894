"""Send a model's decode attention to the host.

Most models call an attention function by name. `attached` gives them ours for a while: it computes
decode attention over host layers on the host, and leaves everything else to the function that the
model had. Other models need nothing: their operators meet host_tensor.py.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from zinfer.worker.kv_cache.host_tensor import HostKeysOrValues
from zinfer.worker.kv_cache.kernel import MASKED, Scoring

if TYPE_CHECKING:
    from zinfer.worker.kv_cache.cache import HostCache
    from zinfer.worker.kv_cache.layers import AttendedLayer

Route = Literal["interface", "operators", "none"]
NAMES = {"sdpa": "zinfer_fused", "eager": "zinfer_eager"}
"""Our function for each of transformers' own. Neither name may contain sdpa, flash or flex:
transformers looks for those words and then checks for kernels."""


def attend(
    query: torch.Tensor,
    layer: AttendedLayer,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attend on the host to everything that a layer holds.

    Args:
        query: [batch, heads, 1, head_dim] on the device.
        mask: [batch or 1, heads or 1, 1, tokens], true or 0 where a token is seen.

    Returns:
        [batch, heads, 1, value_dim] on the device.
    """
    assert layer.stored is not None
    cache, memory = layer.cache, layer.cache.memory
    on_host = memory.to_host(query)
    scoring = Scoring(
        scale=scale,
        bias=cache.bias_of(mask, layer),
        sinks=None if sinks is None else memory.to_host(sinks),
        softcap=softcap,
    )
    keys, values = (part.rows() for part in layer.stored)
    started_s = time.perf_counter()
    out = cache.attention.attend(on_host[:, :, 0], keys, values, layer.held, scoring)
    traffic = memory.traffic
    traffic.attention_s += time.perf_counter() - started_s
    traffic.attention_calls += 1
    traffic.attention_bytes += layer.held * layer.token_bytes
    return memory.to_device(out.unsqueeze(2), query.device)


def bias_from(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Turn a mask of either kind into numbers to add [batch or 1, heads or 1, tokens]."""
    last = mask[:, :, -1, -tokens:] if mask.shape[-1] >= tokens else mask[:, :, -1]
    if last.dtype == torch.bool:
        return torch.zeros(last.shape).masked_fill_(~last, MASKED)
    return last.float().clamp_min(MASKED)


def _interface(base: Callable[..., Any] | None) -> Callable[..., Any]:
    """Make an attention function that adds host layers to `base`; None: the model's eager one."""

    def zinfer_attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        if not isinstance(key, HostKeysOrValues):
            model_code = sys.modules[type(module).__module__]
            plain = base or model_code.eager_attention_forward
            answer: tuple[torch.Tensor, None] = plain(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **more
            )
            return answer
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = attend(
            query, key.layer, attention_mask, scale, more.get("s_aux"), more.get("softcap")
        )
        return out.transpose(1, 2).contiguous(), None

    return zinfer_attention


def register() -> None:
    """Make our attention functions known to transformers.

    A mask function goes with each: without one transformers passes no mask at all, and padding
    would be read as text.
    """
    for name, base, mask in (
        (NAMES["sdpa"], sdpa_attention_forward, sdpa_mask),
        (NAMES["eager"], None, eager_mask),
    ):
        AttentionInterface.register(name, _interface(base))
        AttentionMaskInterface.register(name, mask)


@contextlib.contextmanager
def attached(model: Any, cache: HostCache) -> Iterator[Route]:
    """Route the model's attention for the time of the block; yield which way it goes."""
    if not cache.attends_on_host:
        yield "none"
        return
    register()
    before = model.config._attn_implementation
    if before not in NAMES or not type(model)._can_set_attn_implementation():
        yield "operators"
        return
    model.set_attn_implementation(NAMES[before])
    try:
        yield "interface"
    finally:
        model.set_attn_implementation(before)
