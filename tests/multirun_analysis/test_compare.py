"""Medians, spreads, ratios and what must never be mixed, against arithmetic by hand."""

from __future__ import annotations

from math import sqrt

import pytest

from multirun_analysis.best import best_per_model, pareto_front
from multirun_analysis.compare import (
    configurations,
    constants,
    same_circumstances,
    shown_choices,
    varied,
)
from multirun_analysis.configuration import Configuration
from multirun_analysis.notes import mixtures
from multirun_analysis.ratios import Baseline, default_baseline, parse_baseline, ratios
from multirun_analysis.runs import Run
from multirun_analysis.spread import Spread, format_number, format_spread, merge, speedup
from tests.helpers.invented_runs import run


def spread(median: float, stddev: float | None = None, count: int = 3) -> Spread:
    return Spread(median=median, stddev=stddev, minimum=median, maximum=median, count=count)


# Spreads


def test_reruns_merge_to_the_median_of_medians_with_both_variances() -> None:
    merged = merge([spread(10, 1), spread(12, 2), spread(17, 3)])
    assert merged is not None
    assert merged.median == 12
    between = ((10 - 13) ** 2 + (12 - 13) ** 2 + (17 - 13) ** 2) / 2
    assert merged.stddev == pytest.approx(sqrt((1 + 4 + 9) / 3 + between))
    assert merged.count == 9
    assert merge([]) is None
    single = merge([spread(5)])
    assert single is not None and single.stddev is None


def test_a_speedup_carries_the_first_order_error_of_a_quotient() -> None:
    ratio = speedup(spread(20, 1), spread(10, 1))  # 5% and 10%
    assert ratio.median == 2
    assert ratio.stddev == pytest.approx(2 * sqrt(0.05**2 + 0.10**2))
    assert speedup(spread(20), spread(10, 1)).stddev is None


@pytest.mark.parametrize(
    ("median", "stddev", "shown"),
    [
        (4.213, 0.052, "4.213 ± 0.052"),
        (4.213, None, "4.21"),
        (105.23, 5.8, "105.2 ± 5.8"),
        (1234.6, 25.1, "1,235 ± 25"),
        (0.0123, 0.0011, "0.0123 ± 0.0011"),
        (25.1, 0.00001, "25.10 ± <0.01"),
        (0.5, 0.0996, "0.50 ± 0.10"),
        (9.97, 0.997, "10.0 ± 1.0"),
        (1234.6, 254.0, "1,230 ± 250"),
        (1234.6, 0.2, "1,235 ± <1"),
        (100.0, 99.6, "100 ± 100"),
        (0.0, 0.5, "0.00 ± 0.50"),
    ],
)
def test_a_number_is_shown_with_the_digits_that_its_error_leaves(
    median: float, stddev: float | None, shown: str
) -> None:
    assert format_spread(spread(median, stddev)) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0, "0"),
        (0.01234, "0.0123"),
        (9.996, "10.0"),
        (1234.5, "1,230"),
        (512, "512"),
        (-2.5, "-2.50"),
    ],
)
def test_numbers_have_three_significant_digits_and_no_exponent(
    value: float | None, shown: str
) -> None:
    assert format_number(value) == shown


# Configurations


def test_equal_runs_are_one_configuration_and_a_failed_attempt_stays_with_it() -> None:
    (item,) = configurations(
        [run(10.0), run(12.0), run(status="oom_device", reason="device: full")]
    )
    assert (item.status, len(item.ok_runs), len(item.failed_runs), item.reason) == (
        "ok",
        2,
        1,
        "device: full",
    )
    assert item.rate_spread is not None and item.rate_spread.median == 11.0


@pytest.mark.parametrize(
    "other",
    [
        run(10.0, weights="pretrained"),
        run(10.0, tags={"zinfer.commit": "bbbbbbb2"}),
        run(10.0, tags={"zinfer.dirty": "true"}),
        run(10.0, tags={"zinfer.hardware": "other box"}),
        run(10.0, tags={"zinfer.method_version": "0"}),
        run(10.0, offload_device="nvme"),
    ],
)
def test_different_circumstances_and_choices_are_never_averaged_or_divided(other: Run) -> None:
    found = configurations([run(20.0, batch_batch_size="8"), other])
    assert len(found) == 2
    for item in ratios(found, Baseline(name="batch.batch_size", value="8")):
        assert item.reference is item.candidate


def test_each_mixture_is_said_in_a_sentence() -> None:
    found = configurations(
        [
            run(1.0),
            run(
                1.0,
                weights="pretrained",
                tags={"zinfer.commit": "bbbbbbb2", "zinfer.dirty": "true"},
            ),
        ]
    )
    said = " ".join(mixtures(found))
    assert "2 kinds of weights are here (dummy, pretrained)" in said
    assert "2 commits are here (aaaaaaa, bbbbbbb)" in said
    assert "1 of 2 configurations ran from a changed working tree" in said
    assert "All weights are dummy" in " ".join(mixtures(configurations([run(1.0)])))


@pytest.mark.parametrize(
    ("paces_s", "threads", "said"),
    [
        ((0.010, 0.012), ("1", "1"), False),
        ((0.010, 0.016), ("1", "1"), True),
        ((0.010, 0.016), ("1", "2"), False),  # two threads are another yardstick
        ((0.010, None), ("1", "1"), False),  # runs of an older zinfer
    ],
)
def test_a_machine_that_changed_its_pace_between_runs_is_said(
    paces_s: tuple[float | None, ...], threads: tuple[str, ...], said: bool
) -> None:
    runs = [
        run(1.0, batch_batch_size=str(size), launcher_omp_threads=count)
        for size, count in enumerate(threads, start=1)
    ]
    for one, pace_s in zip(runs, paces_s, strict=True):
        if pace_s is not None:
            one.metrics["yardstick_s"] = pace_s  # type: ignore[index]
    assert ("up to 1.6 times slower" in " ".join(mixtures(configurations(runs)))) == said


def test_what_varies_is_a_column_and_what_follows_from_a_choice_is_not() -> None:
    runs = [
        run(1.0, dtype_weights="int4", dtype_compute="bfloat16", offload_device="cpu"),
        run(
            1.0,
            dtype_weights="float32",
            dtype_compute="float32",
            offload_device="nvme",
            offload_buffer_count="5",
        ),
    ]
    assert varied(configurations(runs)) == ("offload.device", "dtype.weights")
    runs.append(
        run(
            1.0,
            dtype_weights="int4",
            dtype_compute="bfloat16",
            offload_device="nvme",
            offload_buffer_count="9",
        )
    )
    assert "offload.buffer_count" in shown_choices(configurations(runs))
    found = configurations(runs)
    assert constants(found, shown_choices(found)) == {
        "weights": "dummy",
        "batch.prompt_tokens": "512",
        "batch.new_tokens": "32",
    }


def test_auto_is_shown_as_what_it_came_to() -> None:
    (item,) = configurations([run(1.0, dtype_weights="auto", tags={"zinfer.dtype": "float16"})])
    assert (item.dtype, item.weights_bits) == ("float16", 16)


def test_groups_are_named_by_what_tells_them_apart() -> None:
    found = configurations(
        [run(1.0), run(1.0, tags={"zinfer.commit": "bbbbbbb2"}), run(1.0, model_name="opt-66b")]
    )
    assert [name for name, _ in same_circumstances(found)] == [
        "opt-30b, commit aaaaaaa",
        "opt-30b, commit bbbbbbb",
        "opt-66b",
    ]


# Ratios


def test_a_baseline_is_equal_in_everything_but_its_own_group() -> None:
    found = configurations([
        run(40.0, offload_device="none"), run(20.0),
        run(5.0, offload_device="nvme", offload_buffer_count="5"),
        run(30.0, batch_batch_size="16"),
    ])  # fmt: skip
    by_choice = {
        (item.candidate.offload, item.candidate.batch_size): item
        for item in ratios(found, parse_baseline("offload=none"))
    }
    assert by_choice["none", 8].ratio == Spread(
        median=1.0, stddev=None, minimum=1.0, maximum=1.0, count=3
    )
    assert by_choice["nvme", 8].ratio is not None and by_choice["nvme", 8].ratio.median == 0.125
    assert (
        by_choice["cpu", 16].ratio is None
        and by_choice["cpu", 16].missing == "no run with offload.device=none and all else equal"
    )


def test_a_baseline_that_failed_is_named_as_the_reason() -> None:
    found = configurations([run(20.0), run(status="does_not_fit", offload_device="none")])
    (item,) = ratios(found, parse_baseline("offload.device=none"))
    assert item.missing == "offload.device=none: does_not_fit"


def test_the_default_baseline_is_the_one_that_most_can_be_divided_by() -> None:
    runs = [
        run(1.0, offload_device=device, batch_batch_size=batch)
        for device in ("cpu", "nvme")
        for batch in ("1", "2")
    ]
    runs.append(run(9.0, offload_device="none", batch_batch_size="1"))
    assert str(default_baseline(configurations(runs))) == "offload.device=cpu"
    assert default_baseline(configurations([run(1.0)])) is None


@pytest.mark.parametrize("text", ["offload", "=none", "offload="])
def test_a_baseline_that_is_no_choice_says_what_to_type(text: str) -> None:
    with pytest.raises(ValueError, match=r"Set --baseline offload\.device=none"):
        parse_baseline(text)


# The best


def test_the_best_says_why_and_what_limits_it() -> None:
    tags = {"zinfer.binding_resource": "host_device_link"}
    fastest = run(20.0, batch_batch_size="16", tags=tags)
    runs = [
        run(10.0, tags=tags),
        fastest,
        run(4.0, offload_device="nvme"),
        run(status="oom_device", batch_batch_size="32", tags=tags),
    ]
    (best,) = best_per_model(configurations(runs))
    assert best.label == "weights in host memory, bfloat16, batch 16"
    assert best.reason.startswith(
        "fastest of 3 measured (1 more failed or was only planned); 5.000 ± 0.071 times the best "
        "with weights on NVMe"
    )
    assert best.limit == "host-device link. Batch 32 ran out of device memory."


def test_a_best_without_a_ceiling_does_not_guess_what_binds() -> None:
    (best,) = best_per_model(configurations([run(8.0)]))
    assert (
        best.limit
        == "Moves 60.0 GB/s of weights; no ceiling was logged, so what binds is not known."
    )
    assert best_per_model(configurations([run(status="error")])) == ()


def test_speeds_of_different_lengths_have_a_best_each() -> None:
    found = configurations([run(8.0), run(80.0, batch_prompt_tokens="4")])
    assert [best.rate.median for best in best_per_model(found)] == [80.0, 8.0]


def test_nothing_on_the_pareto_front_is_beaten_in_both() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 9.0), (3.0, 9.0), (4.0, 12.0)]
    assert pareto_front(points) == [(1.0, 5.0), (2.0, 9.0), (4.0, 12.0)]


def test_a_configuration_of_planned_runs_only_is_not_measured() -> None:
    (item,) = configurations([run(status="planned")])
    assert isinstance(item, Configuration)
    assert (item.measured, item.status, item.failed_runs) == (False, "planned", ())
