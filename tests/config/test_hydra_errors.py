"""Refusals of what Hydra cannot compose: in our words, with what to type, which is obeyed here."""

from __future__ import annotations

import re
import shlex

import pytest

import zinfer
from zinfer.config import ConfigError

REFUSED = [
    ("+batch=paper", "batch exists, so it needs no plus. Set batch=paper"),
    ("+model=opt-350m", "model exists, so it needs no plus. Set model=opt-350m"),
    ("+experiment=demo", "experiment exists, so it needs no plus. Set experiment=demo"),
    ("+weights=dummy", "weights exists, so it needs no plus. Set weights=dummy"),
    (
        "+model.overrides.num_hidden_layers=2",
        "model.overrides.num_hidden_layers exists, so it needs no plus. "
        "Set model.overrides.num_hidden_layers=2",
    ),
    (
        "model=gpt-oss-20b +model.overrides.rope_scaling.factor=3",
        "model.overrides.rope_scaling.factor exists, so it needs no plus. "
        "Set model.overrides.rope_scaling.factor=3",
    ),
    (
        "+tracking.tags.a-b=1 +tracking.tags.a-b=2",
        "tracking.tags.a-b is set more than once. Set tracking.tags.a-b=2 alone",
    ),
    ("~batch=paper", "~batch=paper takes away what is not there. Leave ~batch=paper out"),
    (
        "~model.overrides.foo",
        "~model.overrides.foo takes away what is not there. Leave ~model.overrides.foo out",
    ),
    ("batch@x=paper", "batch@x=paper puts a choice elsewhere. Set batch=paper"),
    (
        "tracking.tags.'a'=3",
        "tracking.tags.'a' is not the name of a setting. Set tracking.tags.a=3",
    ),
    (
        "batch.batch_size[0]=1",
        "batch.batch_size[0] is not a setting of zinfer. Did you mean this? Set batch.batch_size=1",
    ),
    (
        "batch.prompt_text=it's",
        "batch.prompt_text=it's cannot be read: a quote or bracket in it has no partner. Add the "
        "partner, or give the value as text: "
        """'batch.prompt_text="it'"'"'s"'""",
    ),
    (
        "tracking.tags.a=[1",
        "tracking.tags.a=[1 cannot be read: a quote or bracket in it has no partner. Add the "
        """partner, or give the value as text: 'tracking.tags.a="[1"'""",
    ),
    (
        "tracking.run_name=ünïon",
        "tracking.run_name=ünïon cannot be read: ü ï must stand in quotes. "
        """Set 'tracking.run_name="ünïon"'""",
    ),
    (
        "model.source=/home/jürgen/model model=custom",
        "model.source=/home/jürgen/model cannot be read: ü must stand in quotes. "
        """Set 'model.source="/home/jürgen/model"'""",
    ),
    (
        "dtype.keep=[ä,layers.0]",
        "dtype.keep=[ä,layers.0] cannot be read: ä must stand in quotes. "
        """Set 'dtype.keep=["ä","layers.0"]'""",
    ),
    (
        "tracking.tags.a=b#1;c",
        "tracking.tags.a=b#1;c cannot be read: # ; must stand in quotes. "
        """Set 'tracking.tags.a="b#1;c"'""",
    ),
    ("=3", "=3 names no setting. Try zinfer --help"),
    ("tracking.tags=3", "tracking.tags=3 is not a mapping. Set tracking.tags.KEY=3"),
    (
        "batch.batch_size=range(1,3)",
        "batch.batch_size=range(1,3) has several values, which make a sweep. "
        "Try zinfer -m 'batch.batch_size=range(1,3)'",
    ),
]


@pytest.mark.parametrize(("typed", "says"), REFUSED)
def test_each_is_answered_with_what_to_type(typed: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        zinfer.compose(overrides=typed.split(" "))
    assert refused.value.problems == [says]


@pytest.mark.parametrize(("typed", "says"), REFUSED)
def test_the_advice_composes(typed: str, says: str) -> None:
    found = re.search(r"(?:Set |as text: )(.+?)(?: alone)?$", says)
    others = [word for word in typed.split(" ") if word.startswith("model=")]
    words = [*others, *(shlex.split(found[1]) if found else [])]
    config = zinfer.compose(overrides=words)
    for word in words:
        if word.startswith("model="):
            assert config.model.name == word.removeprefix("model=")
    assert config.model.name, "a whole configuration"


@pytest.mark.parametrize(
    "text", ['it\'s a \\ "so"', "it's \\\\", '[\\"', "it's \\\\\\\" x", "a {\\b"]
)
def test_text_with_quotes_and_backslashes_arrives_as_it_was_meant(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        zinfer.compose(overrides=[f"batch.prompt_text={text}"])
    (problem,) = refused.value.problems
    (word,) = shlex.split(problem.partition("as text: ")[2])
    assert zinfer.compose(overrides=[word]).batch.prompt_text == text
