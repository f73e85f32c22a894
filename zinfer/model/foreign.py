"""Put an exception of transformers, torch or a model's own code into one sentence."""

from __future__ import annotations


def whole_sentence(error: BaseException) -> str:
    """Return everything that `error` says on one line, led by its type where that adds to it.

    A bare `'su'` of a KeyError says nothing without its type; an OSError's sentence stands alone.
    """
    text = " ".join(str(error).split()).rstrip(".: ")
    if not text:
        return type(error).__name__
    speaks = isinstance(error, ValueError | OSError) or type(error).__name__.startswith("Strict")
    return text if speaks else f"{type(error).__name__}: {text}"
