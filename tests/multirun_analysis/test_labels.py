"""Labels hold what differs: two configurations of one figure never have the same name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from multirun_analysis.compare import configurations, details, same_circumstances
from multirun_analysis.configuration import Configuration
from multirun_analysis.figures.canvas import Canvas, Figure
from multirun_analysis.figures.groups import series_names
from multirun_analysis.figures.plans import plans
from multirun_analysis.figures.quality import quality
from multirun_analysis.figures.throughput import throughput
from multirun_analysis.figures.tradeoff import latency_tradeoff, memory_tradeoff, quality_tradeoff
from multirun_analysis.notes import quality_notes
from multirun_analysis.runs import Run
from multirun_analysis.tables.outcomes import warnings_table
from tests.helpers.invented_runs import run

INT4 = [
    {"dtype.rounding": "nearest", "dtype.kernel": "auto"},
    {"dtype.rounding": "searched", "dtype.kernel": "auto"},
    {"dtype.rounding": "searched", "dtype.kernel": "torch"},
]


def packed(number: int, choices: dict[str, str], **numbers: float) -> Run:
    """Invent a run of quantised, pretrained weights that was scored."""
    plain = run(10.0 + number, weights="pretrained", dtype_weights="int4")
    metrics = {
        **plain.metrics,
        "quality_perplexity": 15.0 + number,
        "peak_host_rss_bytes": (3 - number) * 1e9,
        "decode_step_s": 0.1 + number,
        **numbers,
    }
    return replace(plain, params={**plain.params, **choices}, metrics=metrics)


def drawn(
    draw: Callable[[Canvas, Sequence[Configuration]], Figure], runs: Sequence[Run], folder: Path
) -> list[str]:
    """Return the texts of a figure of these runs."""
    with Canvas(folder) as canvas:
        figure = draw(canvas, configurations(runs))
    assert figure.panels, figure.missing
    texts = (re.findall(r">([^<>]+)</text>", panel.svg) for panel in figure.panels)
    return [text for found in texts for text in found]


FIGURES: dict[str, Callable[[Canvas, Sequence[Configuration]], Figure]] = {
    "quality": quality,
    "memory": lambda canvas, found: memory_tradeoff(canvas, same_circumstances(found)),
    "latency": lambda canvas, found: latency_tradeoff(canvas, same_circumstances(found)),
    "quality-tradeoff": lambda canvas, found: quality_tradeoff(canvas, same_circumstances(found)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figures_legend_tells_rounding_and_kernels_apart(name: str, tmp_path: Path) -> None:
    runs = [packed(number, choices) for number, choices in enumerate(INT4)]
    texts = drawn(FIGURES[name], runs, tmp_path)
    labels = [text for text in texts if "int4" in text]
    assert len(labels) == len(set(labels)) == 3
    for rounding in ("nearest", "searched"):
        assert any(f"rounding {rounding}" in label for label in labels)
    assert sum("kernel torch" in label for label in labels) == 1


def test_lines_over_batches_are_one_for_each_rounding(tmp_path: Path) -> None:
    runs = [
        packed(number, {**choices, "batch.batch_size": batch})
        for batch in ("1", "8")
        for number, choices in enumerate(INT4[:2])
    ]
    texts = drawn(
        lambda canvas, found: throughput(canvas, same_circumstances(found)), runs, tmp_path
    )
    assert [text for text in texts if "int4" in text] == [
        "host memory, int4, rounding nearest",
        "host memory, int4, rounding searched",
    ]


def test_plans_that_differ_in_one_setting_have_names_of_their_own(tmp_path: Path) -> None:
    planned = run(status="planned", task="plan")
    numbers = {"ceiling_generated_tokens_per_s": 9.0, "plan_fits": 1.0}
    runs = [
        replace(planned, params={**planned.params, "kv_cache.placement": where}, metrics=numbers)
        for where in ("device", "host_attention")
    ]
    texts = drawn(lambda canvas, found: plans(canvas, found, ()), runs, tmp_path)
    assert {text for text in texts if "KV on" in text} == {"KV on device", "KV on host_attention"}


def test_a_warning_names_its_configuration_by_what_differs() -> None:
    runs = [
        replace(packed(number, choices), tags={**packed(0, {}).tags, "zinfer.warnings": "slow"})
        for number, choices in enumerate(INT4[:2])
    ]
    (row,) = warnings_table(configurations(runs)).rows
    assert "rounding nearest; " in row[3].text and row[3].text.endswith("rounding searched")


def test_a_bar_is_named_by_the_choices_that_it_has_and_always_has_its_number(
    tmp_path: Path,
) -> None:
    plain = run(20.0, weights="pretrained", dtype_weights="bfloat16")
    wild = packed(0, INT4[1], generated_tokens_per_s_stddev=400.0)
    texts = drawn(
        lambda canvas, found: throughput(canvas, same_circumstances(found)), [plain, wild], tmp_path
    )
    assert "bfloat16" in texts, "it has no rounding"
    assert any("± 400" in text for text in texts), "its mark is cut, its number is not"


def test_a_verdict_is_one_row_and_says_which_runs_text_is_worse() -> None:
    tags = {
        "zinfer.stability": "disturbed",
        "zinfer.stability_reason": "others took a core\nthe pace changed",
        "zinfer.warnings": "this measurement is disturbed: others took a core; the pace changed. "
        "Run it again\nthe disk is slow",
        "zinfer.quality": "beyond_limits",
        "zinfer.quality_reason": "0.6 agree\nthe perplexity is 1.7 times",
    }
    one = replace(packed(0, INT4[1]), name="opt int4_searched", tags=tags)
    rows = [row[:2] for row in warnings_table(configurations([one])).rows]
    assert [[cell.text for cell in row] for row in rows] == [
        ["disturbed", "others took a core; the pace changed"],
        ["warning", "the disk is slow"],
    ]
    assert quality_notes([one] * 2) == [
        "2 runs beyond the limits of quality. opt int4_searched: 0.6 agree; the perplexity is 1.7 "
        "times. Their speed is shown; their text is not the unquantised model's."
    ]


def test_more_kinds_than_there_are_marks_share_them() -> None:
    runs = [packed(0, {"dtype.group_size": str(size)}) for size in range(9)]
    found = configurations(runs)
    assert details(found) == ("dtype.group_size",) and series_names(found) == ()


@pytest.mark.parametrize(
    ("dtype", "weights", "kinds"),
    [("bfloat16", "pretrained", 1), ("int4", "pretrained", 2), ("auto", "dummy", 1)],
)
def test_settings_that_a_run_does_not_read_are_no_choices(
    dtype: str, weights: str, kinds: int
) -> None:
    runs = [
        run(10.0, weights=weights, dtype_weights=dtype, dtype_rounding=rounding)
        for rounding in ("nearest", "searched")
    ]
    assert len(configurations(runs)) == kinds


@pytest.mark.parametrize(
    ("enabled", "weights", "kinds"),
    [("true", "pretrained", 2), ("auto", "pretrained", 2), ("true", "dummy", 1),
     ("false", "pretrained", 1)],
)  # fmt: skip
def test_settings_of_a_score_are_choices_of_scored_runs(
    enabled: str, weights: str, kinds: int
) -> None:
    runs = [
        run(10.0, weights=weights, quality_enabled=enabled, quality_tokens=tokens)
        for tokens in ("256", "1024")
    ]
    assert len(configurations(runs)) == kinds
