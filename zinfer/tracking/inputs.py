"""Name the texts that a run reads as datasets of its MLflow run.

Equal digests say that two runs had the same text. Synthetic prompts are no text: batch.seed, the
lengths and the vocabulary decide them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from zinfer.config import RunConfig, config_to_shown
from zinfer.paths import PACKAGE, given_file
from zinfer.redact import redact

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

QUALITY_TEXT = PACKAGE / "data" / "quality_text.txt"
GENERATION, EVALUATION = "generation", "evaluation"
"""What a text is for: prompts, or the score of quality.enabled."""
CONTEXT_TAG = "mlflow.data.context"
DIGEST_CHARACTERS = 16
"""Of SHA-256 in hexadecimal. MLflow takes 36."""
SOURCE_CHARACTERS = 2000


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text that a run reads."""

    name: str
    context: str
    digest: str
    """First digits of the SHA-256 of its bytes."""
    size_bytes: int
    source_type: str
    """As MLflow names them: local for a file, code for a setting."""
    source: dict[str, str]


def texts_of(config: RunConfig) -> list[Text]:
    """Return the texts of this run; a file that cannot be read is left to the worker to refuse."""
    found = [_prompts(config)]
    if config.quality.enabled:
        found.append(_file(QUALITY_TEXT, EVALUATION))
    return [text for text in found if text is not None]


def _prompts(config: RunConfig) -> Text | None:
    if config.batch.prompt == "file" and config.batch.prompt_file is not None:
        return _file(given_file(config.batch.prompt_file), GENERATION)
    if config.batch.prompt != "text":
        return None
    content = config.batch.prompt_text.encode()
    shown = str(config_to_shown(config)["batch"]["prompt_text"])
    return Text(
        name="batch.prompt_text",
        context=GENERATION,
        digest=_digest(content),
        size_bytes=len(content),
        source_type="code",
        source={"setting": "batch.prompt_text", "text": redact(shown)[:SOURCE_CHARACTERS]},
    )


def _file(path: Path, context: str) -> Text | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return Text(
        name=redact(path.name),
        context=context,
        digest=_digest(content),
        size_bytes=len(content),
        source_type="local",
        source={"uri": redact(str(path.absolute()))},
    )


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:DIGEST_CHARACTERS]


def dataset_inputs(config: RunConfig) -> list[DatasetInput]:
    """Return the run's texts as MLflow takes them. MLflow is imported here."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    lengths = {"rows": config.batch.batch_size, "prompt_tokens": config.batch.prompt_tokens}
    return [
        DatasetInput(
            Dataset(
                name=text.name,
                digest=text.digest,
                source_type=text.source_type,
                source=json.dumps(text.source),
                profile=json.dumps(
                    {
                        "bytes": text.size_bytes,
                        **(lengths if text.context == GENERATION else {}),
                    }
                ),
            ),
            [InputTag(CONTEXT_TAG, text.context)],
        )
        for text in texts_of(config)
    ]
