"""Count what a pass multiplies: matrices, how they are stored, and the bytes of its weights."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from zinfer.config import ITEMSIZE_BYTES, DtypeConfig, RunConfig
from zinfer.model.quantisable import stored_bits
from zinfer.model.spec import ModelSpec, Parameter
from zinfer.plan.zero_layout import stored_numel

ROWS_PACKED_ON_GPU = 64
"""Up to so many rows a GPU multiplies with packed weights as they lie; beyond, it unpacks them.

GemLite's Triton kernels, which are measured, end their own for few rows there: `get_matmul_type`
in gemlite/core.py (github.com/mobiusml/gemlite).
"""


@dataclass(frozen=True)
class MatrixProducts:
    """A model's weight matrices by what multiplies them."""

    dense: Mapping[int, int]
    """Elements of one matrix -> how many such matrices every token meets."""
    head: int
    """Elements of the output head, met by one token of each row."""
    experts: Mapping[int, int]
    """Elements of one expert's matrix -> number of places (layer and role) that have it."""


class Matrix(NamedTuple):
    """One matrix as it is stored."""

    numel: int
    bits: int | None
    """Bits of a code where it is multiplied packed; None: it is multiplied in the compute type."""
    bytes: float
    is_linear: bool
    """A module of class nn.Linear multiplies it."""


@dataclass(frozen=True)
class StoredProducts:
    """The same as MatrixProducts, for the matrices as a run stores them."""

    dense: Mapping[Matrix, int]
    head: Matrix | None
    experts: Mapping[Matrix, float]


_COUNTED: dict[int, tuple[ModelSpec, MatrixProducts]] = {}
"""id of a model's parameters -> (model, products). Plans ask many times about one model."""


def matrix_products(spec: ModelSpec) -> MatrixProducts:
    """Count the weight matrices of a model, once for each model."""
    held = _COUNTED.get(id(spec.parameters))
    if held is None or held[0].parameters is not spec.parameters:
        held = _COUNTED[id(spec.parameters)] = (spec, _count_products(spec))
    return held[1]


Role = Literal["dense", "head", "expert"]


def weight_roles(spec: ModelSpec) -> Iterator[tuple[Role, Parameter]]:
    """Take every two-dimensional weight as a product, embeddings apart: they are lookups.

    Fused experts have the shape [experts, out, in].
    """
    for parameter in spec.parameters:
        dims = len(parameter.shape)
        if parameter.is_expert and spec.num_experts:
            if dims in (2, 3):
                yield "expert", parameter
        elif dims == 2 and spec.vocab_size in parameter.shape:
            if parameter.kind != "embedding" or spec.tied_embeddings:
                yield "head", parameter
        elif dims == 2 and parameter.kind != "embedding" and not _is_position_table(parameter):
            yield "dense", parameter


def is_linear(role: Role, parameter: Parameter) -> bool:
    """Tell if a module of class nn.Linear multiplies this weight; a tied embedding's is the head.

    An expert's own matrix may be one. Those in one tensor are multiplied by their module's code.
    """
    return parameter.kind == "linear" or (role == "head" and parameter.kind == "embedding")


def _count_products(spec: ModelSpec) -> MatrixProducts:
    """Count the matrices of each size. Experts with a module each are one place together."""
    dense: Counter[int] = Counter()
    experts: Counter[int] = Counter()
    head, separate = 0, False
    for role, parameter in weight_roles(spec):
        if role == "dense":
            dense[parameter.numel] += 1
        elif role == "head":
            head = parameter.numel
        else:
            separate |= len(parameter.shape) == 2
            experts[_of_one_expert(parameter)] += 1
    if separate and spec.num_experts:
        experts = Counter(
            {numel: -(-count // spec.num_experts) for numel, count in experts.items()}
        )
    return MatrixProducts(dense=dense, head=head, experts=experts)


def _of_one_expert(parameter: Parameter) -> int:
    """Return the elements of one expert's matrix."""
    return parameter.numel // (parameter.shape[0] if len(parameter.shape) == 3 else 1)


def stored_products(spec: ModelSpec, config: RunConfig) -> StoredProducts:
    """Count the matrices of a model as this run stores them, once for each way to store."""
    return _stored_products(
        _Counted(spec), config.dtype, config.quantiser, ITEMSIZE_BYTES[spec.dtype]
    )


class _Counted:
    """A model as a key: equal where the parameters are the same objects."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def __hash__(self) -> int:
        return id(self.spec.parameters)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Counted) and other.spec.parameters is self.spec.parameters


@lru_cache(maxsize=64)
def _stored_products(
    model: _Counted, dtype: DtypeConfig, quantiser: str | None, itemsize: int
) -> StoredProducts:
    """Count matrices by size, bits and bytes."""
    spec = model.spec
    dense: Counter[Matrix] = Counter()
    experts: defaultdict[Matrix, float] = defaultdict(float)
    head = None
    for role, parameter in weight_roles(spec):
        stored = stored_numel(parameter, dtype, itemsize, by_deepspeed=quantiser == "deepspeed")
        bits = stored_bits(parameter, dtype) if quantiser == "zinfer" else None
        linear = is_linear(role, parameter)
        whole = Matrix(parameter.numel, bits, stored * itemsize, linear)
        if role == "dense":
            dense[whole] += 1
        elif role == "head":
            head = whole
        elif len(parameter.shape) == 3:
            share = parameter.shape[0]
            experts[Matrix(parameter.numel // share, bits, whole.bytes / share, linear)] += 1
        else:
            experts[whole] += 1 / (spec.num_experts or 1)
    return StoredProducts(dense=dense, head=head, experts=experts)


def _is_position_table(parameter: Parameter) -> bool:
    """Tell if it is OPT's table of learned positions, an nn.Embedding and so a lookup too."""
    return parameter.layer is None and parameter.kind == "other" and "embed" in parameter.name


def touched_experts(spec: ModelSpec, tokens: int) -> float:
    """Return the number of distinct experts of a layer that `tokens` tokens use, on average.

    Each token chooses k of E experts evenly and independently: E * (1 - (1 - k/E)^tokens).
    """
    if not spec.num_experts or not spec.experts_per_token:
        return 0.0
    share = spec.experts_per_token / spec.num_experts
    return spec.num_experts * (1 - (1 - share) ** tokens)


def pass_flops(spec: ModelSpec, rows: int, new: int, context: float, *, on_host: int = 0) -> float:
    """Return the operations of one forward pass: `new` tokens of each of `rows` sequences.

    Each token attends to `context` tokens. Two operations for each weight and token, and
    4 * heads * head_dim for each pair of tokens and layer (queries by keys, weights by values).
    Source: Kaplan et al. 2020 (arXiv:2001.08361) section 2.1.

    Args:
        on_host: layers whose attention the host computes.
    """
    products = matrix_products(spec)
    dense = sum(numel * count for numel, count in products.dense.items())
    expert = sum(numel * count for numel, count in products.experts.items()) * (
        spec.experts_per_token or 0
    )
    layers = spec.num_layers - on_host
    attention = 4 * layers * spec.num_attention_heads * spec.head_dim * context * new * rows
    return 2.0 * (dense + expert) * rows * new + 2.0 * products.head * rows + attention


def touched_weight_bytes(spec: ModelSpec, config: RunConfig, tokens: int) -> float:
    """Return the bytes of stored weights that a pass of so many tokens reads from device memory.

    Of routed experts only those that it touches.
    """
    products = stored_products(spec, config)
    dense = sum(matrix.bytes * count for matrix, count in products.dense.items())
    head = products.head.bytes if products.head else 0.0
    experts = sum(matrix.bytes * count for matrix, count in products.experts.items())
    return dense + head + experts * touched_experts(spec, tokens)


def unpacked_weight_bytes(spec: ModelSpec, config: RunConfig, rows: int, new: int) -> float:
    """Return the bytes that a pass writes and reads again to unpack packed weights on a GPU.

    PyTorch makes a copy in the compute type at each use, of what no kernel multiplies packed
    (docs/quantised.md). It also makes temporary copies, which are not counted: what is left is a
    bound. Whether a GPU runs the kernel is not known before its trial in a run.

    Args:
        new: tokens of each row that the pass computes. The head multiplies one of them.
    """
    products, size = stored_products(spec, config), ITEMSIZE_BYTES[spec.dtype]
    most = {"auto": ROWS_PACKED_ON_GPU, "compiled": rows * new}.get(config.dtype.kernel, 0)
    touched = touched_experts(spec, rows * new)
    of_an_expert = rows * new * (spec.experts_per_token or 0) / touched if touched else 0.0

    def copied(matrices: Mapping[Matrix, float], multiplied: float) -> float:
        return sum(
            2.0 * matrix.numel * size * count
            for matrix, count in matrices.items()
            if matrix.bits is not None and multiplied > most
        )

    head = copied({products.head: 1}, rows) if products.head else 0.0
    return (
        copied(products.dense, rows * new) + head + copied(products.experts, of_an_expert) * touched
    )
