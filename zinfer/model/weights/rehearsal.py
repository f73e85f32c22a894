"""Load a checkpoint on paper: on the meta device, from the headers of its files.

transformers loads what fits and only logs the rest: a missing tensor stays random, an unknown one
is dropped, and under ZeRO-3 it does not even look for unknown ones. So before any weight is read,
transformers' own loading runs once without values, renamings and conversions included, and
everything that it reports ends the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zinfer.config import ConfigError
from zinfer.model.weights.checkpoint import SAFETENSORS_DTYPES, Checkpoint, first_names
from zinfer.model.weights.tied import Pair

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "base_model.model", "model")
"""Names that a wrapper puts before every tensor: DataParallel and DDP, torch.compile, FSDP, PEFT
and Lightning. In that order, as often as all tensors have one."""
TEXT_PARTS = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "language_model.": "",
    "text_model.": "",
    "thinker.": "",
}
"""Prefix of the text part in multimodal checkpoints -> prefix in the text model."""
OTHER_TOOLS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_shape": "compressed-tensors",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".q_weight": "EXL2",
    ".W_q": "HQQ",
    ".weight_scale_inv": "8-bit floats",
    ".weight_scale": "8-bit floats",
    "_proj_blocks": "MXFP4",
    "_proj_scales": "MXFP4",
}
"""End of a tensor's name -> the tool or scheme that leaves it beside quantised weights."""
FLOATS = ("F64", "F32", "F16", "BF16")
MASKS = ("BOOL", "U8")
"""Dtypes of masks that old checkpoints carry along; no weight is stored so."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Way from a checkpoint to the model: the renaming, and the tensors left over."""

    key_mapping: Mapping[str, str]
    """Regular expression -> replacement, as from_pretrained takes it."""
    unused: tuple[str, ...] = ()
    """Tensors that belong to other parts of a multimodal model."""
    tied: tuple[Pair, ...] = ()
    """Tensors that are stored twice, and that the model has once."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Everything that disagrees between a checkpoint and a model; all empty for a match."""

    missing: tuple[str, ...]
    """The model has it, the checkpoint does not."""
    unexpected: tuple[str, ...]
    """The checkpoint has it, the model does not."""
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """(name, shape in the checkpoint, shape in the model)."""
    not_floats: tuple[tuple[str, str], ...]
    """(name, dtype): a weight that is not stored as a floating point number."""
    doubled: tuple[tuple[str, str], ...]
    """Two names for one weight."""
    errors: tuple[str, ...]
    tied: tuple[Pair, ...] = ()
    """Two names for one weight that the model has under both; no difference by itself."""

    def __bool__(self) -> bool:
        """Tell if anything differs."""
        return bool(
            self.missing
            or self.unexpected
            or self.mismatched
            or self.not_floats
            or self.doubled
            or self.errors
        )

    @property
    def count(self) -> int:
        """Number of tensors concerned."""
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)


def rehearse(
    checkpoint: Checkpoint,
    cls: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    is_text_part: bool,
) -> Rehearsal:
    """Find how this checkpoint loads into this model, completely. Reads and allocates no weight.

    Args:
        is_text_part: the model is the text part of a multimodal checkpoint.

    Raises:
        ConfigError: it is not this model's checkpoint; says what is missing, unknown or different.
    """
    plain = differences(checkpoint, cls, config, dtype, {})
    if not plain:
        return Rehearsal(key_mapping={}, tied=plain.tied)
    best = plain
    for mapping, warning in _renamings(checkpoint, is_text_part=is_text_part):
        found = differences(checkpoint, cls, config, dtype, mapping)
        unused = _other_parts(found, checkpoint, mapping) if is_text_part else ()
        rest = _without(found, unused)
        if not rest:
            return Rehearsal(
                key_mapping=mapping,
                unused=unused,
                tied=found.tied,
                warnings=(_said(warning, unused, checkpoint),),
            )
        if rest.count < best.count:
            best = rest
    raise ConfigError(_sentences(best, checkpoint, config))


def differences(
    checkpoint: Checkpoint,
    cls: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
    key_mapping: Mapping[str, str],
) -> Differences:
    """Run transformers' loading on the meta device and return what it reports."""
    import torch
    from transformers.utils import logging

    kinds = {kind: getattr(torch, name) for name, kind in SAFETENSORS_DTYPES.items()}
    values = {
        name: torch.empty(stored.shape, dtype=kinds.get(stored.dtype, torch.uint8), device="meta")
        for name, stored in checkpoint.tensors.items()
    }
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=values,
            dtype=dtype,
            device_map={"": "meta"},
            key_mapping=dict(key_mapping) or None,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # conversions of a file that is not the model's fail in any way
        said = " ".join(str(error).split()) or type(error).__name__
        return Differences(
            missing=(), unexpected=(), mismatched=(), not_floats=(), doubled=(), errors=(said,)
        )
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    return Differences(
        missing=tuple(sorted(info["missing_keys"])),
        unexpected=tuple(sorted(info["unexpected_keys"])),
        mismatched=tuple(
            (name, tuple(theirs), tuple(ours))
            for name, theirs, ours in sorted(info["mismatched_keys"])
        ),
        not_floats=tuple(_not_floats(checkpoint, model, set(info["unexpected_keys"]))),
        doubled=tuple(_doubled(checkpoint, model)),
        errors=tuple(info["error_msgs"]),
        tied=tuple(_tied(checkpoint, model, key_mapping)),
    )


def _tied(
    checkpoint: Checkpoint, model: PreTrainedModel, key_mapping: Mapping[str, str]
) -> Iterator[Pair]:
    """Find tensors of the checkpoint that become one weight of the model."""
    stored: dict[str, str] = {}
    for name in checkpoint.tensors:
        ours = name
        for theirs, replacement in key_mapping.items():
            ours = re.sub(theirs, replacement, ours)
        stored[ours] = stored[f"{model.base_model_prefix}.{ours}"] = name
    for target, source in model.all_tied_weights_keys.items():
        if target in stored and source in stored and stored[target] != stored[source]:
            yield stored[source], stored[target]


def _not_floats(
    checkpoint: Checkpoint, model: PreTrainedModel, unexpected: set[str]
) -> Iterator[tuple[str, str]]:
    """Find weights that are stored as integers or in 8 bits: their scales are somewhere else."""
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    for name, stored in checkpoint.tensors.items():
        is_buffer = name.rpartition(".")[2] in buffers or name.endswith("position_ids")
        if stored.dtype not in (*FLOATS, *MASKS) and not is_buffer and name not in unexpected:
            yield name, stored.dtype


def _doubled(checkpoint: Checkpoint, model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Find weights that are there twice, with and without the name of the base model."""
    prefix = f"{model.base_model_prefix}."
    for name in checkpoint.tensors:
        if prefix != "." and prefix + name in checkpoint.tensors:
            yield name, prefix + name


def _renamings(
    checkpoint: Checkpoint, *, is_text_part: bool
) -> Iterator[tuple[dict[str, str], str]]:
    """Yield the renamings that are worth a try, and how each is said."""
    wrapped = _uniform_prefix(list(checkpoint.tensors))
    if wrapped:
        yield (
            {f"^{re.escape(wrapped)}": ""},
            f"every tensor of {checkpoint.folder} is named {wrapped}*: the prefix was taken off",
        )
    if is_text_part:
        for theirs, ours in TEXT_PARTS.items():
            mapping = {f"^{re.escape(theirs)}": ours}
            if theirs.startswith("language_model.model"):
                mapping[r"^language_model\.lm_head\."] = "lm_head."
            if any(name.startswith(theirs) for name in checkpoint.tensors):
                yield mapping, f"{checkpoint.folder} is multimodal: only its text part was read"
        yield {}, f"{checkpoint.folder} is multimodal: only its text part was read"


def _uniform_prefix(names: list[str]) -> str:
    """Return the wrappers' names that every tensor begins with, '' for none."""
    prefix = ""
    while True:
        wrapper = next(
            (
                f"{wrapper}."
                for wrapper in WRAPPERS
                if names and all(name.startswith(f"{prefix}{wrapper}.") for name in names)
            ),
            None,
        )
        if wrapper is None:
            return prefix
        prefix += wrapper


def _other_parts(
    found: Differences, checkpoint: Checkpoint, mapping: Mapping[str, str]
) -> tuple[str, ...]:
    """Return unexpected tensors that lie outside the text part, by their place in the names."""
    text = [key.removeprefix("^").replace("\\", "") for key in mapping]
    inside = tuple(text or ["model.layers.", "lm_head."])
    return tuple(name for name in found.unexpected if not name.startswith(inside))


def _without(found: Differences, unused: tuple[str, ...]) -> Differences:
    """Return the differences that remain when these tensors need not be used."""
    return Differences(
        missing=found.missing,
        unexpected=tuple(name for name in found.unexpected if name not in set(unused)),
        mismatched=found.mismatched,
        not_floats=tuple(row for row in found.not_floats if row[0] not in set(unused)),
        doubled=found.doubled,
        errors=found.errors,
        tied=found.tied,
    )


def _said(warning: str, unused: tuple[str, ...], checkpoint: Checkpoint) -> str:
    if not unused:
        return warning
    return (
        f"{warning}; {len(unused)} of its {len(checkpoint.tensors)} tensors are of other parts "
        f"and not used ({first_names(unused)})"
    )


def _sentences(found: Differences, checkpoint: Checkpoint, config: PretrainedConfig) -> list[str]:
    """Say each kind of difference in one sentence, and what to do."""
    where, held = checkpoint.folder, len(checkpoint.tensors)
    problems = []
    if found.missing:
        problems.append(
            f"{where} lacks {len(found.missing)} tensors of {config.model_type} "
            f"({first_names(found.missing)}): they would stay random. {_missing_hint(found)}"
        )
    if found.unexpected:
        problems.append(
            f"{where} has {len(found.unexpected)} tensors, of {held}, that {config.model_type} "
            f"does not know ({first_names(found.unexpected)}): they would be dropped. "
            f"{_unexpected_hint(found, config)}"
        )
    if found.mismatched:
        name, theirs, ours = found.mismatched[0]
        more = f", and {len(found.mismatched) - 1} more" if len(found.mismatched) > 1 else ""
        file = checkpoint.tensors[name].file if name in checkpoint.tensors else where
        problems.append(
            f"{name} is {list(theirs)} in {file} and {list(ours)} by config.json{more}. "
            "Correct config.json, or set model.overrides"
        )
    if found.not_floats:
        name, dtype = found.not_floats[0]
        problems.append(
            f"{len(found.not_floats)} weights of {where} are stored as {dtype} ({name}), not as "
            "floating point numbers: they were quantised by another tool. Take the unquantised "
            "checkpoint: dtype=int8 and dtype=int4 pack its weights while they are read"
        )
    for first, second in found.doubled[:1]:
        problems.append(
            f"{where} has {len(found.doubled)} tensors under two names ({first} and {second}): "
            "which of them counts is not known. Remove one"
        )
    problems += [f"{where} cannot be loaded: {error}" for error in found.errors[:3]]
    return problems


def quantised_by(names: Iterable[str]) -> str | None:
    """Return the tool or scheme whose tensors these are; None: no tool that is known."""
    tools = (tool for name in names for end, tool in OTHER_TOOLS.items() if name.endswith(end))
    return next(tools, None)


def _missing_hint(found: Differences) -> str:
    if quantised_by(found.unexpected) is not None:
        return "The quantised ones beside them do not take their place"
    if found.unexpected:
        return "Is it another model's checkpoint? Correct model.source"
    return "Download the checkpoint again, or correct num_hidden_layers and the like"


def _unexpected_hint(found: Differences, config: PretrainedConfig) -> str:
    """Say which layers are too many, or which leftovers they are."""
    layers = getattr(config, "num_hidden_layers", None)
    numbers = [int(part) for name in found.unexpected for part in name.split(".") if part.isdigit()]
    if any(".lora_" in name for name in found.unexpected):
        return "They are of a PEFT adapter: merge it into its base model"
    tool = quantised_by(found.unexpected)
    if tool is not None:
        return f"They belong to quantised weights ({tool}): take the unquantised checkpoint"
    if isinstance(layers, int) and not found.missing and numbers and min(numbers) >= layers:
        return (
            f"config.json says num_hidden_layers={layers}. "
            f"Set model.overrides.num_hidden_layers={max(numbers) + 1}"
        )
    return "Correct model.source, or remove them from the file"
