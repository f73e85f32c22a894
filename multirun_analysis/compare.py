"""Runs -> configurations, each with median and spread. Pure: the same runs give the same comparison."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from multirun_analysis.read import Run
from multirun_analysis.spread import Spread, merge
from zinfer.machine.profile import NOTICED_SLOWDOWN

RATE = "generated_tokens_per_s"
"""The metric that configurations are ranked by."""
LATENCY = "decode_step_s"
YARDSTICK = "yardstick_s"

LABELS = {
    "model.name": "model",
    "weights": "weights",
    "offload.device": "weights on",
    "dtype.weights": "dtype",
    "kv_cache.placement": "KV on",
    "batch.batch_size": "batch",
    "batch.prompt_tokens": "prompt",
    "batch.new_tokens": "new",
    "zero.derivation": "zero",
    "engine.name": "engine",
    "launcher.ranks": "ranks",
}
"""Parameter -> what a table calls it, in the order of the columns. Other parameters go by their own name."""
ALWAYS_SHOWN = ("model.name", "offload.device", "dtype.weights", "batch.batch_size")
NOT_CHOICES = frozenset(
    {"task", "batch.seed", "plan.enforce", "plan.headroom", "hardware.name", "sweep.parent_run_id"}
)
"""Parameters that do not tell configurations apart in a table. The memory plan's knobs decide whether a run starts, not how fast it is."""
RESOURCE_WORDS = {
    "device_compute": "device compute",
    "device_memory": "device memory",
    "host_device_link": "host-device link",
    "nvme": "NVMe",
    "host_memory": "host memory",
    "fixed_cost": "fixed cost of each layer",
}
CIRCUMSTANCES = {
    "weights": "kinds of weights",
    "hardware": "machines",
    "commit": "commits",
    "method_version": "method versions",
}
"""Field of Context -> what several of it are called."""


@dataclass(frozen=True, kw_only=True, order=True)
class Context:
    """The circumstances of a run. Numbers of different contexts are never averaged and never divided by each other."""

    weights: str
    """dummy or pretrained."""
    hardware: str
    """Fingerprint of the machine."""
    device: str
    commit: str
    dirty: str
    method_version: str

    @property
    def commit_label(self) -> str:
        """'a1b2c3d', '*' behind it for a changed working tree."""
        return self.commit[:7] + ("*" if self.dirty == "true" else "")


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in nothing but when they ran."""

    choices: Mapping[str, str]
    """Every parameter that was set."""
    context: Context
    runs: tuple[Run, ...]
    """Oldest first; failed ones included."""

    @cached_property
    def ok_runs(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.status == "ok")

    @cached_property
    def failed_runs(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.status not in ("ok", "planned"))

    @cached_property
    def status(self) -> str:
        """ok once one run of it ended well, otherwise what the newest came to."""
        return "ok" if self.ok_runs else self.runs[-1].status

    @cached_property
    def reason(self) -> str | None:
        """Why the newest failed run failed."""
        return next((run.reason for run in reversed(self.failed_runs) if run.reason), None)

    @cached_property
    def rate_spread(self) -> Spread | None:
        """Generated tokens/s; None where no run measured them."""
        return self.spread(RATE)

    @property
    def measured(self) -> bool:
        return self.rate_spread is not None

    @property
    def rate(self) -> float:
        """Median of the generated tokens/s, 0 for sorting where none were measured."""
        return self.rate_spread.median if self.rate_spread else 0.0

    @property
    def newest(self) -> Run:
        return (self.ok_runs or self.runs)[-1]

    @property
    def model(self) -> str:
        return self.choices.get("model.name", "unknown")

    @property
    def offload(self) -> str:
        return self.choices.get("offload.device", "unknown")

    @cached_property
    def dtype(self) -> str:
        """How weights are stored; what `auto` came to."""
        wanted = self.choices.get("dtype.weights", "unknown")
        return self.newest.tags.get("zinfer.dtype", wanted) if wanted == "auto" else wanted

    @property
    def weights_bits(self) -> int | None:
        """Bits of a stored weight; None when the type is not known."""
        return {"int4": 4, "int8": 8, "float16": 16, "bfloat16": 16, "float32": 32}.get(self.dtype)

    @property
    def workload(self) -> tuple[int | None, int | None]:
        """(prompt tokens, new tokens): speeds of different workloads are different quantities."""
        return self.number("batch.prompt_tokens"), self.number("batch.new_tokens")

    @property
    def batch_size(self) -> int | None:
        return self.number("batch.batch_size")

    def chosen(self, choice: str) -> str:
        """The value of a choice; of dtype.weights what `auto` came to."""
        return self.dtype if choice == "dtype.weights" else self.choices.get(choice, "-")

    def number(self, choice: str) -> int | None:
        """A choice that is a whole number."""
        text = self.choices.get(choice, "")
        return int(text) if text.isdecimal() else None

    def value(self, metric: str) -> float | None:
        """Median over the runs that ended well; over all runs for what is known before a run starts."""
        runs = self.ok_runs or self.runs
        values = [run.metrics[metric] for run in runs if metric in run.metrics]
        return statistics.median(values) if values else None

    def tag(self, name: str) -> str | None:
        """Of the newest run that has it."""
        return next(
            (run.tags[name] for run in reversed(self.ok_runs or self.runs) if name in run.tags),
            None,
        )

    @property
    def binding_resource(self) -> str | None:
        """What a decode step waits for, in words; None where no ceiling was logged."""
        resource = self.tag("zinfer.binding_resource")
        return None if resource is None else RESOURCE_WORDS.get(resource, resource)

    def spread(self, metric: str) -> Spread | None:
        """Median and spread over repeats and reruns; None if no run that ended well measured it."""
        return merge(
            [spread for run in self.ok_runs if (spread := run_spread(run, metric)) is not None]
        )

    def label(self, choices: Iterable[str]) -> str:
        """'nvme, bfloat16, batch 8'."""
        return ", ".join(filter(None, (self._part(choice) for choice in choices)))

    def _part(self, choice: str) -> str:
        if choice == "dtype.weights":
            return self.dtype
        value = self.choices.get(choice, "")
        if not value:
            return ""
        if choice in ("model.name", "weights"):
            return value
        if choice == "offload.device":
            return {
                "none": "all on device",
                "cpu": "weights in host memory",
                "nvme": "weights on NVMe",
            }.get(value, value)
        return f"{LABELS.get(choice, choice)} {value}"


def run_spread(run: Run, metric: str) -> Spread | None:
    """What one run says of a metric: its median, and the spread of its timed repeats where it logged one."""
    if metric not in run.metrics:
        return None
    median = run.metrics[metric]
    return Spread(
        median=median,
        stddev=run.metrics.get(f"{metric}_stddev"),
        minimum=run.metrics.get(f"{metric}_min", median),
        maximum=run.metrics.get(f"{metric}_max", median),
        count=int(run.metrics.get("timed_runs", 1)),
    )


# Grouping


def configurations(runs: Iterable[Run]) -> tuple[Configuration, ...]:
    """Runs of the same choices under the same circumstances, together; in the order in which they first ran."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        choices = tuple(sorted(_choices(run).items()))
        groups.setdefault((run.params.get("task"), choices, context(run)), []).append(run)
    return tuple(
        Configuration(_choices(group[0]), context(group[0]), tuple(group))
        for group in groups.values()
    )


def context(run: Run) -> Context:
    """The circumstances of a run, `unknown` where it does not say."""
    tag = run.tags.get
    return Context(
        weights=run.params.get("weights", "unknown"),
        hardware=tag("zinfer.hardware", "unknown"),
        device=tag("zinfer.device", "unknown"),
        commit=tag("zinfer.commit", "unknown"),
        dirty=tag("zinfer.dirty", "unknown"),
        method_version=run.method_version,
    )


def _choices(run: Run) -> dict[str, str]:
    return {name: value for name, value in run.params.items() if name not in NOT_CHOICES}


def varied(found: Sequence[Configuration]) -> tuple[str, ...]:
    """Choices that differ among these, in the order of LABELS; what only follows from the model's name is left out."""
    names = {
        name
        for item in found
        for name in item.choices
        if not (name.startswith("model.") and name != "model.name")
    }
    differing = {name for name in names if len({item.choices.get(name) for item in found}) > 1}
    follows = {
        name for name in differing if name not in LABELS and _follows_from_group(name, found)
    }
    return tuple(sorted(differing - follows, key=column_order))


def _follows_from_group(name: str, found: Sequence[Configuration]) -> bool:
    """A setting that has one value for each choice of its own group (dtype.compute of dtype.weights): no choice of its own."""
    main = next((label for label in LABELS if label.split(".")[0] == name.split(".")[0]), None)
    if main is None:
        return False
    seen: dict[str | None, set[str | None]] = {}
    for item in found:
        seen.setdefault(item.choices.get(main), set()).add(item.choices.get(name))
    return all(len(values) == 1 for values in seen.values())


def shown_choices(found: Sequence[Configuration]) -> tuple[str, ...]:
    """Columns of a table: what varies, and what a reader asks for first."""
    return tuple(sorted({*varied(found), *ALWAYS_SHOWN}, key=column_order))


def constants(found: Sequence[Configuration]) -> dict[str, str]:
    """What was the same everywhere, of the choices that have a label and no column."""
    shown = shown_choices(found)
    values = {
        name: {item.choices.get(name) for item in found} for name in LABELS if name not in shown
    }
    return {
        name: str(value)
        for name, (value, *others) in values.items()
        if value is not None and not others
    }


def column_order(name: str) -> tuple[int, str]:
    order = list(LABELS)
    return (order.index(name) if name in LABELS else len(order), name)


def mixtures(found: Sequence[Configuration]) -> list[str]:
    """One sentence for each circumstance that differs among these runs."""
    sentences = []
    contexts = {item.context for item in found}
    rule = "kept apart: never averaged together, never divided by each other."
    for field_name, noun in CIRCUMSTANCES.items():
        values = sorted({getattr(item, field_name) for item in contexts})
        if len(values) > 1:
            named = [value[:7] if field_name == "commit" else value for value in values]
            if field_name == "hardware":
                named = sorted({item.device for item in contexts})
            shown = ", ".join(named[:6]) + (", ..." if len(named) > 6 else "")
            sentences.append(f"Runs of {len(values)} {noun} are here ({shown}), {rule}")
    dirty = [item for item in found if item.context.dirty == "true"]
    if dirty:
        sentences.append(
            f"{len(dirty)} of {len(found)} configurations ran from a changed working tree (marked *): their commit alone does not "
            "reproduce them."
        )
    dummy = sum(item.context.weights == "dummy" for item in found)
    if dummy == len(found):
        sentences.append(
            "All weights are dummy (random): speed and memory are those of the architecture, the text means nothing."
        )
    if (apart := slowest_over_fastest(found)) > NOTICED_SLOWDOWN:
        sentences.append(
            f"The machine itself was up to {apart:.1f} times slower in some of these runs than in others (yardstick_s: neighbours, heat, "
            "power saving): smaller differences may be its own. Run those again that matter."
        )
    return sentences


def slowest_over_fastest(found: Iterable[Configuration]) -> float:
    """What the processor took for the same work, between configurations of one machine and number of threads; 1 where nobody timed it."""
    paces: defaultdict[tuple[str | None, ...], list[float]] = defaultdict(list)
    for item in found:
        seconds = [run.metrics[YARDSTICK] for run in item.ok_runs if run.metrics.get(YARDSTICK)]
        if seconds:
            threads = [
                item.choices.get(name) for name in ("launcher.omp_threads", "launcher.ranks")
            ]
            paces[item.context.hardware, *threads].append(statistics.median(seconds))
    return max((max(seconds) / min(seconds) for seconds in paces.values()), default=1.0)


def same_circumstances(found: Sequence[Configuration]) -> list[tuple[str, list[Configuration]]]:
    """Configurations that may be compared: of one model, workload and context, with a name that tells them from the others."""
    groups: dict[tuple[object, ...], list[Configuration]] = {}
    for item in found:
        groups.setdefault((item.model, item.workload, item.context), []).append(item)
    ordered = sorted(groups.items(), key=lambda entry: str(entry[0]))
    named = []
    for (model, _, _), group in ordered:
        rivals = [other for other in groups if other[0] == model]
        parts = [
            str(model),
            *_circumstance_names(
                group[0], {other[1] for other in rivals}, [other[2] for other in rivals]
            ),
        ]
        named.append((", ".join(parts), group))
    return named


def _circumstance_names(
    item: Configuration, workloads: set[object], contexts: Sequence[object]
) -> Iterator[str]:
    """What tells a group from others of the same model."""
    names = {
        "weights": f"{item.context.weights} weights",
        "hardware": item.context.device,
        "commit": f"commit {item.context.commit_label}",
        "method_version": f"method {item.context.method_version}",
    }
    if len(workloads) > 1:
        yield f"{item.workload[0]} + {item.workload[1]} tokens"
    for field_name, text in names.items():
        if len({getattr(context_, field_name) for context_ in contexts}) > 1:
            yield text
