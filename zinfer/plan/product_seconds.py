"""Predict what a pass's products with weights take, and DeepSpeed's unpacking before them."""

from __future__ import annotations

from collections.abc import Iterator
from math import comb

from zinfer.config import RunConfig
from zinfer.machine.profile import CalibrationProfile
from zinfer.model.spec import ModelSpec
from zinfer.plan.own_products import is_worth_it, own_rows
from zinfer.plan.products import Matrix, stored_products, touched_experts

FEW_TOKENS = 64
"""Tokens of a pass up to which it matters how they are spread over the experts."""


def products_seconds(
    spec: ModelSpec, config: RunConfig, profile: CalibrationProfile, rows: int, new: int
) -> float | None:
    """Return the seconds of all products with weights.

    None: this dtype, or the kernel of packed weights, was not calibrated.
    """
    products, tokens = stored_products(spec, config), rows * new
    times: list[float | None] = [
        _scaled(count, product_seconds(spec, config, profile, matrix, tokens))
        for matrix, count in products.dense.items()
    ]
    if products.head:
        times.append(product_seconds(spec, config, profile, products.head, rows, wide=True))
    for each, experts in tokens_of_experts(spec, tokens):
        times += [
            _scaled(experts * count, product_seconds(spec, config, profile, matrix, each))
            for matrix, count in products.experts.items()
        ]
    known = [seconds for seconds in times if seconds is not None]
    return sum(known) if len(known) == len(times) else None


def product_seconds(
    spec: ModelSpec,
    config: RunConfig,
    profile: CalibrationProfile,
    matrix: Matrix,
    rows: float,
    *,
    wide: bool = False,
) -> float | None:
    """Return the seconds of one product, by the kernel that multiplies the matrix as it is stored.

    None where that was not calibrated: profiles hold the packed product that dtype.kernel=auto
    chooses.
    """
    if matrix.bits is None:
        return plain_seconds(spec, config, profile, matrix, rows, wide=wide)
    if config.dtype.kernel != "auto":
        return None
    return profile.packed_s(matrix.bits, spec.dtype, rows, matrix.numel, config.dtype.product_bits)


def plain_seconds(
    spec: ModelSpec,
    config: RunConfig,
    profile: CalibrationProfile,
    matrix: Matrix,
    rows: float,
    *,
    wide: bool,
) -> float | None:
    """Return the seconds of a product with an unpacked matrix, by the faster way that there is.

    Profiles of before our kernel was timed know PyTorch's products only.
    """
    torch_s = profile.kernel_s(spec.dtype, rows, matrix.numel, wide=wide)
    if torch_s is None or not matrix.is_linear or rows > own_rows(config, spec.dtype):
        return torch_s
    own_s = profile.own_kernel_s(spec.dtype, rows, matrix.numel, wide=wide)
    if own_s is None:
        return torch_s
    takes_ours = config.dtype.kernel == "compiled" or is_worth_it(own_s, torch_s)
    return own_s if takes_ours else torch_s


def _scaled(count: float, seconds: float | None) -> float | None:
    """Multiply what is known."""
    return None if seconds is None else count * seconds


def tokens_of_experts(spec: ModelSpec, tokens: int) -> Iterator[tuple[float, float]]:
    """Spread tokens over the experts of a layer: (tokens of an expert, number of such experts).

    A product of three rows can take longer than one of four, so a few tokens are spread
    binomially, as in touched_experts. Many are spread evenly over the experts that they touch.
    """
    if not spec.num_experts or not spec.experts_per_token:
        return
    share = spec.experts_per_token / spec.num_experts
    if tokens > FEW_TOKENS:
        touched = touched_experts(spec, tokens)
        yield tokens * spec.experts_per_token / touched, touched
        return
    for each in range(1, tokens + 1):
        yield (
            each,
            spec.num_experts * comb(tokens, each) * share**each * (1 - share) ** (tokens - each),
        )


def dequantise_seconds(
    spec: ModelSpec, config: RunConfig, profile: CalibrationProfile, tokens: int
) -> float | None:
    """Return the seconds to unpack every matrix that DeepSpeed quantised, at each use.

    Embeddings are unpacked whole. None where that was not calibrated. Our own packed weights are
    multiplied as they are.
    """
    if config.quantiser != "deepspeed" or config.dtype.bits is None:
        return 0.0
    used = touched_experts(spec, tokens) / spec.num_experts if spec.num_experts else 1.0
    total = 0.0
    for numel, (outside, of_experts) in quantised_matrices(spec).items():
        seconds = profile.dequantise_s(config.dtype.bits, spec.dtype, numel)
        if seconds is None:
            return None
        total += (outside + of_experts * used) * seconds
    return total


def quantised_matrices(spec: ModelSpec) -> dict[int, tuple[int, int]]:
    """Count the uses in a pass of the matrices that DeepSpeed quantises, by their elements.

    Each value is (uses by all tokens, matrices of routed experts).
    """
    uses: dict[int, tuple[int, int]] = {}
    for parameter in spec.parameters:
        if parameter.kind in ("linear", "embedding"):
            outside, of_experts = uses.get(parameter.numel, (0, 0))
            times = (
                2
                if parameter.kind == "embedding"
                and spec.tied_embeddings
                and spec.vocab_size in parameter.shape
                else 1
            )
            uses[parameter.numel] = (
                (outside, of_experts + 1) if parameter.is_expert else (outside + times, of_experts)
            )
    return uses
