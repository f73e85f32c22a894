"""Comparisons -> figures. Each answers one question; where the runs do not hold the answer, the figure is the sentence that says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from multirun_analysis.best import pareto_front
from multirun_analysis.canvas import (
    COLOURS,
    LINES,
    MARKERS,
    OFFLOAD_COLOURS,
    Canvas,
    Figure,
    legend_below,
    log_if_wide,
    plain_ticks,
    powers_of_two,
)
from multirun_analysis.compare import (
    LABELS,
    LATENCY,
    Configuration,
    same_circumstances,
    shown_choices,
)
from multirun_analysis.ratios import Baseline, Ratio
from multirun_analysis.read import History, Run
from multirun_analysis.spread import format_number
from zinfer.units import GIB

MAX_PANELS = 12
MAX_BARS = 14
MAX_LINES = 8
WEIGHTS_ON = {"none": "on device", "cpu": "host memory", "nvme": "NVMe"}

Group = Sequence[Configuration]


def draw(
    canvas: Canvas,
    found: Group,
    ratios: Sequence[Ratio],
    baseline: Baseline | None,
    history: Callable[[Run, str], History],
) -> tuple[Figure, ...]:
    """Every figure of a report, in its order."""
    groups = [
        (label, group)
        for label, group in same_circumstances(found)
        if any(item.measured for item in group)
    ]
    several = [
        (label, group) for label, group in groups if sum(item.measured for item in group) > 1
    ] or groups
    return (
        throughput(canvas, several),
        pareto(canvas, several),
        ceiling(canvas, found),
        step_time(canvas, leaders(groups)),
        memory(canvas, leaders(groups)),
        speedup(canvas, ratios, baseline),
        decode_latency(canvas, leaders(groups), history),
        quality(canvas, found),
    )


def circumstances(found: Iterable[Configuration]) -> str:
    """'NVIDIA RTX A6000; dummy weights; commit a1b2c3d; method 1; 512 + 32 tokens', all that the shown runs have."""
    found = list(found)
    contexts = [item.context for item in found]
    lengths = sorted({f"{prompt} + {new}" for prompt, new in (item.workload for item in found)})
    parts = (
        ", ".join(sorted({context.device for context in contexts})),
        " and ".join(sorted({context.weights for context in contexts})) + " weights",
        "commit " + ", ".join(sorted({context.commit_label for context in contexts})),
        "method " + ", ".join(sorted({context.method_version for context in contexts})),
        f"{', '.join(lengths[:4])}{', ...' if len(lengths) > 4 else ''} prompt + new tokens",
    )
    return "; ".join(parts) + "."


def leaders(groups: Sequence[tuple[str, Group]]) -> list[tuple[str, Configuration]]:
    """The fastest configuration of each model and place of its weights, the fastest models last to be dropped."""
    chosen = []
    for label, group in groups:
        for offload in sorted(
            {item.offload for item in group if item.measured}, key=_offload_order
        ):
            fastest = max(
                (item for item in group if item.measured and item.offload == offload),
                key=lambda item: item.rate,
            )
            chosen.append(
                (
                    f"{label}\n{WEIGHTS_ON.get(offload, offload)}, {fastest.dtype}, batch {fastest.batch_size}",
                    fastest,
                )
            )
    return chosen


def _offload_order(offload: str) -> tuple[int, str]:
    order = list(WEIGHTS_ON)
    return (order.index(offload) if offload in order else len(order), offload)


def _left_out(shown: Sequence[object], limit: int, what: str) -> str:
    return f" {len(shown) - limit} more {what} are in the tables." if len(shown) > limit else ""


def _all(groups: Sequence[tuple[str, Group]]) -> list[Configuration]:
    return [item for _, group in groups for item in group]


# tokens/s


def throughput(canvas: Canvas, groups: Sequence[tuple[str, Group]]) -> Figure:
    """Tokens/s over batch size, a line for each place and type of the weights."""
    title = "Throughput over batch size"
    if not groups:
        return Figure(
            name="throughput",
            title=title,
            caption="",
            missing="No run measured generated_tokens_per_s.",
        )
    panels = tuple(_throughput_panel(canvas, label, group) for label, group in groups[:MAX_PANELS])
    caption = (
        "Generated tokens/s, median ± standard deviation. Where other choices vary too, the line joins the fastest and faint points are "
        "the others. A cross at the bottom: that batch failed or does not fit."
        f"{_left_out(groups, MAX_PANELS, 'models')} {circumstances(_all(groups))}"
    )
    return Figure(name="throughput", title=title, caption=caption, panels=panels)


def _throughput_panel(canvas: Canvas, label: str, group: Group) -> Any:
    axes = canvas.axes(1.1)
    dtypes = sorted({item.dtype for item in group})
    series = sorted(
        {(item.offload, item.dtype) for item in group},
        key=lambda key: (_offload_order(key[0]), key[1]),
    )
    crosses = 0
    for offload, dtype in series:
        mine = [
            item
            for item in group
            if (item.offload, item.dtype) == (offload, dtype) and item.batch_size
        ]
        colour, style = _colour(offload), dtypes.index(dtype)
        fastest: dict[int, Configuration] = {}
        for item in sorted((item for item in mine if item.measured), key=lambda item: item.rate):
            fastest[item.batch_size or 0] = item
        others = [item for item in mine if item.measured and item not in fastest.values()]
        axes.plot(
            [item.batch_size for item in others],
            [item.rate for item in others],
            ".",
            color=colour,
            alpha=0.35,
        )
        if fastest:
            batches = sorted(fastest)
            spreads = [
                spread for batch in batches if (spread := fastest[batch].rate_spread) is not None
            ]
            medians, errors = (
                [spread.median for spread in spreads],
                [spread.stddev or 0.0 for spread in spreads],
            )
            axes.errorbar(
                batches, medians, yerr=errors, color=colour, capsize=2, marker=MARKERS[style % len(MARKERS)],
                linestyle=LINES[style % len(LINES)], label=f"{WEIGHTS_ON.get(offload, offload)}, {dtype}",
            )  # fmt: skip
        failed = sorted(
            {item.batch_size or 0 for item in mine if item.failed_runs and not item.ok_runs}
            - set(fastest)
        )
        if failed:
            height = 0.02 + 0.03 * crosses
            axes.plot(
                failed,
                [height] * len(failed),
                "x",
                color=colour,
                transform=axes.get_xaxis_transform(),
                markersize=4,
                alpha=0.8,
            )
            crosses += 1
    powers_of_two(axes, [item.batch_size for item in group if item.batch_size])
    log_if_wide(axes, [item.rate for item in group])
    axes.set_xlabel("batch size (sequences)")
    axes.set_ylabel("generated tokens/s")
    legend_below(axes, 3)
    return canvas.panel(f"throughput-{label}", axes, label)


def _colour(offload: str) -> str:
    return OFFLOAD_COLOURS.get(offload, COLOURS[3])


def pareto(canvas: Canvas, groups: Sequence[tuple[str, Group]]) -> Figure:
    """Throughput against latency, and which configurations no other beats in both."""
    title = "Throughput against latency"
    groups = [
        (label, group)
        for label, group in groups
        if any(item.value(LATENCY) is not None for item in group)
    ]
    if not groups:
        return Figure(
            name="pareto", title=title, caption="", missing="No run measured decode_step_s."
        )
    panels = []
    for label, group in groups[:MAX_PANELS]:
        axes = canvas.axes(1.1)
        measured = [item for item in group if item.measured and item.value(LATENCY)]
        dtypes = sorted({item.dtype for item in measured})
        for offload, dtype in sorted(
            {(item.offload, item.dtype) for item in measured},
            key=lambda key: (_offload_order(key[0]), key[1]),
        ):
            mine = [item for item in measured if (item.offload, item.dtype) == (offload, dtype)]
            axes.plot(
                [item.value(LATENCY) for item in mine], [item.rate for item in mine], MARKERS[dtypes.index(dtype) % len(MARKERS)],
                color=_colour(offload), alpha=0.85, label=f"{WEIGHTS_ON.get(offload, offload)}, {dtype}",
            )  # fmt: skip
        front = pareto_front([(item.value(LATENCY) or 0.0, item.rate) for item in measured])
        axes.step(
            *zip(*front, strict=True),
            where="post",
            color=COLOURS[5],
            linewidth=1.1,
            zorder=0,
            label="Pareto front",
        )
        log_if_wide(axes, [item.value(LATENCY) or 0.0 for item in measured], "x")
        log_if_wide(axes, [item.rate for item in measured])
        axes.set_xlabel("time of one decode step (s)")
        axes.set_ylabel("generated tokens/s")
        legend_below(axes, 3)
        panels.append(canvas.panel(f"pareto-{label}", axes, label))
    caption = (
        "Each point is a configuration; up and to the left is better. No configuration beats those on the line in both."
        f"{_left_out(groups, MAX_PANELS, 'models')} {circumstances(_all(groups))}"
    )
    return Figure(name="pareto", title=title, caption=caption, panels=tuple(panels))


# Against the hardware


def ceiling(canvas: Canvas, found: Group) -> Figure:
    """Measured decode rate against what the binding resource allows."""
    title = "Measured against the ceiling"
    known = [
        item
        for item in found
        if item.measured
        and item.value("ceiling_decode_step_s")
        and item.value(LATENCY)
        and item.batch_size
    ]
    if not known:
        missing = (
            "No run logged ceiling_decode_step_s, so how far these numbers are from what the hardware allows is not known. "
            "zinfer task=calibrate, once on this machine, lets every later run log it."
        )
        return Figure(name="ceiling", title=title, caption="", missing=missing)
    axes = canvas.axes(1.15)
    resources = sorted({item.binding_resource or "not said" for item in known})
    points = [
        (
            (item.batch_size or 0) / (item.value("ceiling_decode_step_s") or 1),
            (item.batch_size or 0) / (item.value(LATENCY) or 1),
        )
        for item in known
    ]
    for number, resource in enumerate(resources):
        mine = [
            point
            for point, item in zip(points, known, strict=True)
            if (item.binding_resource or "not said") == resource
        ]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(
            *zip(*mine, strict=True),
            marker,
            color=colour,
            alpha=0.75,
            label=f"bound by {resource}",
            markersize=4.5,
        )
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    for share in (1.0, 0.5, 0.1):
        axes.plot(
            [low, high],
            [low * share, high * share],
            color=COLOURS[5],
            linewidth=1,
            linestyle=LINES[(1.0, 0.5, 0.1).index(share)],
            zorder=0,
        )
        axes.annotate(
            f"{share:.0%}",
            (high, high * share),
            textcoords="offset points",
            xytext=(3, -3),
            fontsize=8,
        )
    log_if_wide(axes, [x for x, _ in points], "x")
    log_if_wide(axes, [y for _, y in points])
    axes.set_xlabel("ceiling of the decode phase (tokens/s)")
    axes.set_ylabel("measured in the decode phase (tokens/s)")
    axes.legend(loc="upper left")
    caption = f"The ceiling is the time that the slowest resource needs for the bytes and operations of a step. {circumstances(known)}"
    return Figure(
        name="ceiling",
        title=title,
        caption=caption,
        panels=(canvas.panel("ceiling", axes, "Decode rate, all models"),),
    )


def step_time(canvas: Canvas, chosen: Sequence[tuple[str, Configuration]]) -> Figure:
    """Prefill and decode of a generation; and of a decode step what the hardware needs, what else was predicted, and the rest."""
    title = "Where the time goes"
    chosen = [
        (label, item) for label, item in chosen if item.value("prefill_s") and item.value("total_s")
    ][:MAX_BARS]
    if not chosen:
        return Figure(
            name="time", title=title, caption="", missing="No run measured prefill_s and total_s."
        )
    phases = []
    for label, item in chosen:
        prefill, total = item.value("prefill_s") or 0.0, item.value("total_s") or 0.0
        phases.append((label, (prefill, max(0.0, total - prefill))))
    panels = [_shares(canvas, "time-generation", "One generation", ("prefill", "decode"), phases)]
    steps = []
    for label, item in chosen:
        needed, predicted, measured = (
            item.value(name)
            for name in ("ceiling_decode_step_s", "predicted_decode_step_s", LATENCY)
        )
        if needed and measured:
            middle = max(0.0, (predicted or needed) - needed)
            steps.append(
                (
                    label,
                    (
                        min(needed, measured),
                        min(middle, max(0.0, measured - needed)),
                        max(0.0, measured - needed - middle),
                    ),
                )
            )
    note = ""
    if steps:
        names = ("binding resource", "predicted overhead", "not explained")
        panels.append(_shares(canvas, "time-step", "One decode step", names, steps))
    else:
        note = " What a decode step is made of is not known: no run logged a ceiling."
    caption = f"The fastest configuration of each model and place of its weights; seconds are written on the bars.{note} "
    return Figure(
        name="time",
        title=title,
        caption=caption + circumstances(item for _, item in chosen),
        panels=tuple(panels),
    )


def _shares(
    canvas: Canvas,
    name: str,
    title: str,
    parts: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float]]],
) -> Any:
    """Stacked bars of 100%, the seconds written on them."""
    axes = canvas.axes(max(0.7, 0.115 * len(rows) + 0.3))
    for index, (_, values) in enumerate(rows):
        left, total = 0.0, sum(values)
        for number, value in enumerate(values):
            share = 100 * value / total
            axes.barh(
                index,
                share,
                left=left,
                color=COLOURS[number],
                height=0.62,
                label=parts[number] if index == 0 else None,
            )
            if share > 14:
                axes.text(
                    left + share / 2,
                    index,
                    f"{format_number(value)} s",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if number != 1 else "black",
                )
            left += share
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the time (%)")
    axes.grid(axis="y", visible=False)
    legend_below(axes, len(parts))
    return canvas.panel(name, axes, title)


def memory(canvas: Canvas, chosen: Sequence[tuple[str, Configuration]]) -> Figure:
    """Memory per tier: what was planned beside what was used."""
    title = "Memory per tier, planned beside measured"
    tiers = (
        (
            "device",
            "plan_device_needed_bytes",
            "peak_device_reserved_bytes",
            "plan_device_available_bytes",
        ),
        ("host", "plan_host_needed_bytes", "peak_host_rss_bytes", "plan_host_available_bytes"),
        ("pinned", "plan_pinned_needed_bytes", "mlocked_bytes", "plan_pinned_available_bytes"),
    )
    panels = []
    for tier, plan, peak, available in tiers:
        rows = [
            (label, item)
            for label, item in chosen
            if item.value(plan) and item.value(peak) is not None
        ][:MAX_BARS]
        if not rows:
            continue
        axes = canvas.axes(max(0.7, 0.115 * len(rows) + 0.3))
        for index, (_, item) in enumerate(rows):
            axes.barh(
                index - 0.19,
                (item.value(plan) or 0) / GIB,
                height=0.36,
                color=COLOURS[4],
                label="planned" if index == 0 else None,
            )
            axes.barh(
                index + 0.19,
                (item.value(peak) or 0) / GIB,
                height=0.36,
                color=COLOURS[0],
                label="measured peak" if index == 0 else None,
            )
            if item.value(available):
                limit = (item.value(available) or 0) / GIB
                axes.plot(
                    [limit] * 2,
                    [index - 0.4, index + 0.4],
                    color=COLOURS[5],
                    linewidth=1.4,
                    label="available" if index == 0 else None,
                )
        axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"{tier} memory (GiB)")
        axes.grid(axis="y", visible=False)
        legend_below(axes, 3)
        panels.append(canvas.panel(f"memory-{tier}", axes, tier.capitalize()))
    if not panels:
        return Figure(
            name="memory",
            title=title,
            caption="",
            missing="No run has both a memory plan and a measured peak.",
        )
    caption = f"The fastest configuration of each model and place of its weights. {circumstances(item for _, item in chosen)}"
    return Figure(name="memory", title=title, caption=caption, panels=tuple(panels))


# Choices


def speedup(canvas: Canvas, ratios: Sequence[Ratio], baseline: Baseline | None) -> Figure:
    """A matrix for each model: rows are what else was chosen, columns the values of the baseline's choice."""
    title = f"Speed-up over {baseline}" if baseline else "Speed-up"
    known = [item for item in ratios if item.ratio is not None]
    if baseline is None or not known:
        missing = (
            "Nothing varies that a speed-up could be asked against."
            if baseline is None
            else f"No measured run has {baseline} and an equal to compare."
        )
        return Figure(name="speedup", title=title, caption="", missing=missing)
    groups = same_circumstances([item.candidate for item in known])
    panels = tuple(
        _matrix(canvas, label, [item for item in known if item.candidate in group], baseline)
        for label, group in groups[:MAX_PANELS]
    )
    caption = (
        f"Generated tokens/s over those of {baseline} with all else equal, ± first-order error of the quotient; 1 is the baseline. "
        f"{circumstances(item.candidate for item in known)}"
    )
    return Figure(name="speedup", title=title, caption=caption, panels=panels)


def _matrix(canvas: Canvas, label: str, known: Sequence[Ratio], baseline: Baseline) -> Any:
    from math import log2

    import matplotlib

    others = [
        name
        for name in shown_choices([item.candidate for item in known])
        if name not in (baseline.name, "model.name")
    ]
    others = [
        name for name in others if len({item.candidate.choices.get(name) for item in known}) > 1
    ]
    rows = sorted({_row_key(item.candidate, others) for item in known})[: 2 * MAX_BARS]
    columns = sorted(
        {item.candidate.chosen(baseline.name) for item in known},
        key=lambda value: (value != baseline.value, value.zfill(9)),
    )
    axes = canvas.axes(max(0.6, 0.085 * len(rows) + 0.3))
    colours = matplotlib.colormaps["PuOr_r"]
    best: dict[tuple[int, int], Ratio] = {}
    for item in known:
        if _row_key(item.candidate, others) in rows:
            cell = (
                rows.index(_row_key(item.candidate, others)),
                columns.index(item.candidate.chosen(baseline.name)),
            )
            best[cell] = max(item, best.get(cell, item), key=_speedup)
    for (row, number), item in best.items():
        assert item.ratio is not None
        strength = (
            max(-1.0, min(1.0, log2(item.ratio.median) / 4)) if item.ratio.median > 0 else -1.0
        )
        axes.add_patch(
            matplotlib.patches.Rectangle(
                (number - 0.5, row - 0.5), 1, 1, color=colours(0.5 + 0.45 * strength), linewidth=0
            )
        )
        error = f" ± {format_number(item.ratio.stddev, 1)}" if item.ratio.stddev else ""
        axes.text(
            number,
            row,
            f"{format_number(item.ratio.median)}{error}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if abs(strength) > 0.7 else "black",
        )
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(
        range(len(rows)),
        [", ".join(value for _, value in row) or "all" for row in rows],
        fontsize=8,
    )
    axes.set_xlabel(baseline.name)
    axes.set_ylabel(", ".join(LABELS.get(name, name) for name in others))
    axes.grid(visible=False)
    return canvas.panel(f"speedup-{label}", axes, label)


def _speedup(item: Ratio) -> float:
    return item.ratio.median if item.ratio else 0.0


def _row_key(item: Configuration, names: Sequence[str]) -> tuple[tuple[int, str], ...]:
    """Sorts batches as numbers."""
    values = (item.chosen(name) for name in names)
    return tuple((int(value) if value.isdecimal() else 0, value) for value in values)


def decode_latency(
    canvas: Canvas,
    chosen: Sequence[tuple[str, Configuration]],
    history: Callable[[Run, str], History],
) -> Figure:
    """Whether a step gets slower as the KV cache grows."""
    title = "Decode latency over tokens"
    lines = [
        (label, item, points)
        for label, item in chosen[:MAX_LINES]
        if len(points := history(item.newest, "decode_step_s_by_step")) > 1
    ]
    if not lines:
        return Figure(
            name="latency", title=title, caption="", missing="No run logged decode_step_s_by_step."
        )
    axes = canvas.axes(1.25)
    for number, (label, _, points) in enumerate(lines):
        colour, line = COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)]
        axes.plot(
            [step + 2 for step, _ in points],
            [value * 1e3 for _, value in points],
            line,
            color=colour,
            label=label.replace("\n", ", "),
        )
    log_if_wide(axes, [value * 1e3 for _, _, points in lines for _, value in points])
    axes.set_xlabel("new token (the first comes from the prefill)")
    axes.set_ylabel("time of its decode step (ms)")
    legend_below(axes, 1)
    caption = (
        "Median over the timed generations of the newest run of the fastest configuration of each model and place of its weights."
        f"{_left_out(chosen, MAX_LINES, 'configurations')} {circumstances(item for _, item, _ in lines)}"
    )
    return Figure(
        name="latency",
        title=title,
        caption=caption,
        panels=(canvas.panel("latency", axes, "Decode steps"),),
    )


QUALITY_METRICS = (
    ("perplexity", "perplexity (lower is better)"),
    ("token_agreement", "tokens equal to the reference (share)"),
)


def quality(canvas: Canvas, found: Group) -> Figure:
    """What fewer bytes cost in quality."""
    title = "Quality against bytes"
    panels, shown = [], []
    for ending, label in QUALITY_METRICS:
        name = next(
            (
                name
                for item in found
                for run in item.ok_runs
                for name in run.metrics
                if name.endswith(ending)
            ),
            None,
        )
        known = [
            item
            for item in found
            if name and item.value(name) is not None and item.value("weight_bytes")
        ]
        if name is None or not known:
            continue
        axes = canvas.axes()
        for number, model in enumerate(sorted({item.model for item in known})[: len(COLOURS)]):
            for style, dtype in enumerate(sorted({item.dtype for item in known})):
                mine = [item for item in known if (item.model, item.dtype) == (model, dtype)]
                points = sorted(
                    {
                        ((item.value("weight_bytes") or 0) / GIB, item.value(name) or 0.0)
                        for item in mine
                    }
                )
                if points:
                    marker = MARKERS[style % len(MARKERS)]
                    axes.plot(
                        *zip(*points, strict=True),
                        marker,
                        color=COLOURS[number],
                        label=f"{model}, {dtype}",
                    )
        axes.set_xlabel("bytes of the stored weights (GiB)")
        axes.set_ylabel(label)
        plain_ticks(axes.yaxis)
        axes.legend(loc="best")
        panels.append(canvas.panel(f"quality-{ending}", axes, label))
        shown += known
    if not panels:
        missing = "No run logged perplexity or token_agreement, so what a smaller type does to the text is not known."
        return Figure(name="quality", title=title, caption="", missing=missing)
    return Figure(name="quality", title=title, caption=circumstances(shown), panels=tuple(panels))
