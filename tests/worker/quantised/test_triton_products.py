"""The GPU's packed products against float64: in Triton's interpreter, or on a GPU where one is.

The interpreter runs a kernel program by program with NumPy. It shows that the arithmetic is right,
and nothing of speed. Compiling for a GPU needs none, so that is tested too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.composing import composed
from tests.helpers.tiny_models import padded_prompts, tiny_model
from zinfer.config import ConfigError
from zinfer.job.events import EventLog
from zinfer.model.spec import model_spec
from zinfer.plan.products import ROWS_PACKED_ON_GPU
from zinfer.worker.engines.resident import load
from zinfer.worker.kv_cache.codes import dequantise, quantise
from zinfer.worker.quantised import choice, gpu, kernel
from zinfer.worker.quantised.choice import packed_choice
from zinfer.worker.quantised.kernel import Kernel, multiply
from zinfer.worker.quantised.packing import Packing

triton = pytest.importorskip("triton", reason="needs Triton: make test-triton")

from zinfer.worker.quantised import triton_products  # noqa: E402 (it imports Triton)

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 2, 17, 70)
"""One, and some for each block; the last needs two blocks."""
SHAPES = ((7, 128), (33, 384), (20, 2176))
"""(out, in): fewer outputs than a block, groups that fill no block, several blocks."""
SCHEMES = ((32, False), (64, False), (64, True), (128, True))
"""(group size, symmetric)."""
LARGEST_ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Norm of the error over the result's. The interpreter cuts bfloat16 off instead of rounding it."""


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter's matrix products read bfloat16 as numbers, not as their bit patterns."""
    if DEVICE.type == "cuda":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return plain(self, wide(a), wide(b), *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def packed(
    out: int, inputs: int, bits: int, group: int, *, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scales, and the values that they stand for in float64."""
    values = torch.randn(out, inputs) * 0.02 + 0.01
    codes, scales = quantise(values, bits, group, symmetric=symmetric)
    held = dequantise(codes, scales, bits, group, torch.float32)
    return codes.to(DEVICE), scales.to(DEVICE), held.double().to(DEVICE)


def error_of(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("group", "symmetric"), SCHEMES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_products_equal_those_of_the_unpacked_weights(
    shape: tuple[int, int], bits: int, group: int, symmetric: bool
) -> None:
    torch.manual_seed(0)
    codes, scales, values = packed(*shape, bits, group, symmetric=symmetric)
    bias = torch.randn(shape[0], device=DEVICE)
    for rows in ROWS:
        for kind in FLOATS:
            x = torch.randn(rows, shape[1], device=DEVICE).to(kind)
            exact = x.double() @ values.T + bias.to(kind).double()
            found = triton_products.multiply(
                x, codes, scales, bits=bits, group_size=group, bias=bias
            )
            assert found.dtype == kind
            assert error_of(found, exact) < LARGEST_ERROR[kind], (rows, kind)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_may_begin_at_any_element_and_x_may_lie_apart(bits: int, rows: int) -> None:
    """An expert's matrix lies in the middle of others, and ZeRO gathers weights end to end."""
    torch.manual_seed(1)
    layout = Packing(shape=(3, 5, 96), is_transposed=False, bits=bits, group_size=32)
    codes, scales, values = packed(15, 96, bits, 32)
    raw = torch.cat([codes.flatten(), scales.view(torch.uint8).flatten()])
    gathered = torch.zeros(raw.numel() // 2 + 9, dtype=torch.bfloat16, device=DEVICE)
    stored = gathered[7 : 7 + raw.numel() // 2]
    stored.copy_(layout.stored(raw, torch.bfloat16))
    assert torch.equal(layout.split(stored)[1], scales)
    x = torch.randn(rows * 2, 120, device=DEVICE)[::2, 5:101]
    for number in range(3):
        found = triton_products.multiply(
            x, *layout.matrix(stored, number), bits=bits, group_size=32
        )
        exact = x.double() @ values[number * 5 : number * 5 + 5].T
        assert error_of(found, exact) < 1e-6


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [2, 20])
def test_what_is_not_finite_spoils_its_own_row_only(rows: int, wrong: float) -> None:
    codes, scales, _ = packed(16, 256, 4, 64)
    x = torch.randn(rows, 256, device=DEVICE)
    x[1, 200] = wrong
    found = triton_products.multiply(x, codes, scales, bits=4, group_size=64)
    assert found.isfinite().all(1).tolist() == [row != 1 for row in range(rows)]
    assert not found[1].isfinite().any()


def test_no_rows_give_no_rows() -> None:
    codes, scales, _ = packed(16, 64, 8, 32)
    x = torch.empty(0, 64, device=DEVICE)
    assert triton_products.multiply(x, codes, scales, bits=8, group_size=32).shape == (0, 16)


# the trial before a run


@pytest.fixture(autouse=True)
def trials_anew() -> None:
    """Forget what earlier tests found out of the kernel."""
    gpu.refused.cache_clear()


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("group", gpu.GROUP_SIZES)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_kernel_stands_its_trial(bits: int, group: int, kind: torch.dtype) -> None:
    assert gpu.refused(DEVICE, kind, bits, group) == ""


Product = Callable[..., torch.Tensor]


def halves_swapped(right: Product) -> Product:
    def wrong(x: torch.Tensor, codes: torch.Tensor, *others: Any, **settings: Any) -> torch.Tensor:
        return right(x, (codes >> 4) | (codes << 4), *others, **settings)

    return wrong


def without_bias(right: Product) -> Product:
    return lambda *tensors, **settings: right(*tensors, **{**settings, "bias": None})


def not_a_number(right: Product) -> Product:
    return lambda *tensors, **settings: right(*tensors, **settings) * float("nan")


def last_group_forgotten(right: Product) -> Product:
    def wrong(x: torch.Tensor, *others: Any, **settings: Any) -> torch.Tensor:
        cut = x.clone()
        cut[:, -settings["group_size"] :] = 0
        return right(cut, *others, **settings)

    return wrong


def does_not_compile(right: Product) -> Product:
    def wrong(*tensors: torch.Tensor, **settings: Any) -> torch.Tensor:
        raise RuntimeError("at 3:4\nPTXAS: out of registers")

    return wrong


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (halves_swapped, "differs from the unpacked product by"),
        (without_bias, "differs from the unpacked product by"),
        (not_a_number, "differs from the unpacked product by nan"),
        (last_group_forgotten, "differs from the unpacked product by"),
        (does_not_compile, "failed with RuntimeError: PTXAS: out of registers"),
    ],
)
def test_a_faulty_kernel_is_refused_and_the_product_unpacked(
    fault: Callable[[Product], Product], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "GPU", DEVICE.type)
    monkeypatch.setattr(triton_products, "multiply", fault(triton_products.multiply))
    codes, scales, values = packed(9, 128, 4, 64)
    x = torch.randn(2, 128, device=DEVICE)
    assert error_of(multiply(x, codes, scales, bits=4, group_size=64), x.double() @ values.T) < 1e-6
    assert said in gpu.refused(DEVICE, torch.float32, 4, 64)
    with pytest.raises(ValueError, match=r"dtype\.kernel=compiled: .*Set dtype\.kernel=auto"):
        multiply(x, codes, scales, bits=4, group_size=64, kernel="compiled")


def test_without_triton_the_product_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "GPU", DEVICE.type)
    monkeypatch.setattr(gpu, "kernel", importing_nothing)
    codes, scales, values = packed(9, 128, 8, 32)
    x = torch.randn(2, 128, device=DEVICE)
    assert error_of(multiply(x, codes, scales, bits=8, group_size=32), x.double() @ values.T) < 1e-6
    assert gpu.refused(DEVICE, torch.float32, 8, 32).startswith("Triton is not installed")


def importing_nothing() -> Any:
    raise ImportError("No module named 'triton'")


@pytest.mark.parametrize(
    ("way", "rows", "taken"),
    [
        ("auto", 1, 1),
        ("auto", ROWS_PACKED_ON_GPU, 1),
        ("auto", ROWS_PACKED_ON_GPU + 1, 0),
        ("compiled", ROWS_PACKED_ON_GPU + 1, 1),
        ("torch", 1, 0),
        ("unpack", 1, 0),
    ],
)
def test_a_few_rows_are_multiplied_packed_unless_set_otherwise(
    way: Kernel, rows: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    right = triton_products.multiply

    def counting(x: torch.Tensor, *others: Any, **settings: Any) -> torch.Tensor:
        calls.append(len(x))
        return right(x, *others, **settings)

    monkeypatch.setattr(kernel, "GPU", DEVICE.type)
    monkeypatch.setattr(gpu, "refused", lambda *situation: "")
    monkeypatch.setattr(triton_products, "multiply", counting)
    codes, scales, values = packed(12, 128, 4, 32)
    x = torch.randn(rows, 128, device=DEVICE)
    found = multiply(x, codes, scales, bits=4, group_size=32, kernel=way)
    assert error_of(found, x.double() @ values.T) < 1e-6
    assert calls == [rows] * taken


def alone(value: Any) -> list[Any]:
    return [value]


@pytest.mark.parametrize(
    ("overrides", "refusals", "taken", "why"),
    [
        (("dtype=int8",), {}, "triton", "up to 64 rows"),
        (("dtype=int4", "dtype.kernel=compiled"), {}, "triton", "all rows"),
        (("dtype=int4", "dtype.kernel=torch"), {}, "torch", "dtype.kernel=torch"),
        (("dtype=int4", "dtype.kernel=unpack"), {}, "unpack", "dtype.kernel=unpack"),
        (("dtype=int4",), {4: "no Triton"}, "torch", "no Triton"),
        (("dtype=int4",), {8: "its head differs"}, "torch", "its head differs"),
        (("dtype=int8",), {4: "no Triton"}, "triton", "up to 64 rows"),
    ],
)
def test_a_run_on_a_gpu_says_what_multiplies_and_why(
    overrides: tuple[str, ...],
    refusals: dict[int, str],
    taken: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(device: Any, dtype: torch.dtype, bits: int, group_size: int) -> str:
        assert (dtype, group_size) == (torch.bfloat16, 64)
        return refusals.get(bits, "")

    monkeypatch.setattr(gpu, "refused", refused)
    config = composed("model=tiny-llama", *overrides)
    spec = model_spec(config.model, compute_dtype="bfloat16")
    found = packed_choice(config, spec, torch.device("cuda:0"), alone)
    assert found is not None and (found.kernel, why in found.why) == (taken, True), found


def test_ranks_that_differ_say_so_and_a_kernel_that_must_be_there_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "refused", lambda *situation: "")
    config = composed("model=tiny-llama", "dtype=int8")
    spec = model_spec(config.model, compute_dtype="bfloat16")

    def two(value: str) -> list[str]:
        return [value, "no Triton here"]

    found = packed_choice(config, spec, torch.device("cuda:0"), two)
    assert found is not None and (found.kernel, found.why) == ("mixed", "no Triton here")
    must = composed("model=tiny-llama", "dtype=int8", "dtype.kernel=compiled")
    with pytest.raises(ConfigError, match=r"no Triton here\. Set dtype\.kernel=auto"):
        packed_choice(must, spec, torch.device("cuda:0"), two)


@pytest.mark.parametrize(
    ("reason", "taken", "why"),
    [("", "compiled", "this processor"), ("no C++ compiler", "torch", "no C++ compiler")],
)
def test_a_run_on_a_processor_says_it_too(
    reason: str, taken: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_no_cpu_kernel", lambda: reason)
    config = composed("model=tiny-llama", "dtype=int8")
    spec = model_spec(config.model, compute_dtype="bfloat16")
    found = packed_choice(config, spec, torch.device("cpu"), alone)
    assert found is not None and found.kernel == taken and why in found.why
    plain = composed("model=tiny-llama", "dtype=bfloat16")
    assert packed_choice(plain, spec, torch.device("cpu"), alone) is None


# whole models


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_whole_models_compute_what_they_do_unpacked(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linear layers, transposed ones, and experts of one tensor, by the kernel in every product."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    tiny_model(family).save_pretrained(tmp_path / family)
    config = composed(
        "model=custom", f"model.source={tmp_path / family}", "weights=pretrained", "dtype=int4",
        "dtype.compute=float32", "dtype.group_size=32", "engine=resident",
    )  # fmt: skip
    spec = model_spec(config.model, compute_dtype="float32")
    model = load(config, spec, {}, EventLog(tmp_path, 0, "attempt")).model
    ids, mask = (each.to(model.device) for each in padded_prompts())
    calls: list[int] = []
    right = triton_products.multiply

    def counting(x: torch.Tensor, *others: Any, **settings: Any) -> torch.Tensor:
        calls.append(len(x))
        return right(x, *others, **settings)

    monkeypatch.setattr(triton_products, "multiply", counting)
    monkeypatch.setattr(Packing, "direct", None)
    monkeypatch.setattr(kernel, "GPU", DEVICE.type)
    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits
        monkeypatch.setattr(kernel, "ROWS_PACKED_ON_GPU", 0)
        many = len(calls)
        unpacked = model(ids, attention_mask=mask).logits
    assert len(calls) == many >= 2 * spec.num_layers
    torch.testing.assert_close(found, unpacked, rtol=1e-4, atol=1e-4)


# compiled for GPUs, without one

COMPILE = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from zinfer.worker.quantised import triton_products
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
for capability, kind, bits, group, rows in json.loads(sys.argv[1]):
    block = triton_products.Block.of(rows, bits, group, getattr(torch, kind))
    given = POINTERS[kind]
    types = {"x": given, "codes": "*u8", "scales": "*i32", "bias": given, "y": given}
    types |= dict.fromkeys(("rows", "out", "groups", "has_bias"), "i32")
    constants = {"BITS": bits, "GROUP": group, "ROWS": block.rows}
    constants |= {"OUTPUTS": block.outputs, "GROUPS": block.groups}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(5)}
    source = ASTSource(
        triton_products._product, types | dict.fromkeys(constants, "constexpr"), constants, aligned
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32),
        options={"num_warps": triton_products.WARPS},
    )
    assert made.asm["cubin"]
    print(json.dumps({"shared": made.metadata.shared, "units": "mma.sync" in made.asm["ptx"]}))
"""
SHARED_BYTES = {86: 99 * 1024, 90: 227 * 1024}
"""Compute capability -> shared memory that a program may have (CUDA C++ Programming Guide)."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Triton's compiler for NVIDIA GPUs")
def test_it_compiles_for_gpus_and_fits_their_shared_memory(tmp_path: Path) -> None:
    wanted = [
        (capability, kind, bits, group, rows)
        for capability in SHARED_BYTES
        for kind in ("bfloat16", "float32")
        for bits, group in ((4, 64), (8, 128))
        for rows in (1, 16, 32, 64)
        if kind == "bfloat16" or rows <= 16
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(wanted)],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        check=False, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    for (capability, kind, *_, rows), program in zip(wanted, made, strict=True):
        assert program["shared"] <= SHARED_BYTES[capability]
        assert program["units"] == (kind != "float32" and rows > 1)
