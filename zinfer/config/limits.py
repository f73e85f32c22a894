"""Bound the numbers of a configuration where they are declared: `Annotated[int, Limits(1, 64)]`.

pydantic takes `true` for 1 and has no opinion on 10^12 rows; these bounds refuse both, and nan and
inf. Every number that is wrong is found in one pass, together with every other mistake of type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import PydanticCustomError, core_schema

NUMBER_ERROR = "zinfer_number"
"""Type of the errors raised here; their message is a sentence without the setting's name."""


@dataclass(frozen=True)
class Limits:
    """Smallest and largest value that makes sense, both included.

    The largest is beyond what anybody can mean, so more is a typing error. It says nothing of what
    a machine can do.
    """

    least: float
    most: float
    above: bool = False
    """`least` itself is too small."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Check before pydantic converts (true is no number) and after it (the range)."""
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(
            self.before, core_schema.no_info_after_validator_function(self.check, handler(source))
        )

    def before(self, value: Any) -> Any:
        """Check what is a number already; text is converted first."""
        if isinstance(value, bool):
            raise _wrong("is not a number", None)
        return self.check(value) if isinstance(value, int | float) else value

    def check(self, value: float) -> float:
        """Return the value. Raises PydanticCustomError outside the range."""
        if not math.isfinite(value):
            raise _wrong("is not a finite number", self.nearest(value))
        if value < self.least or (self.above and value == self.least):
            bound = "more than" if self.above else "at least"
            raise _wrong(f"is too small: {bound} {shown(self.least)}", self.nearest(value))
        if value > self.most:
            raise _wrong(f"is too large: at most {shown(self.most)}", self.nearest(value))
        return value

    def nearest(self, value: float) -> float | None:
        """Return the bound to try instead; None where only what lies above it is right."""
        if value > self.most:
            return self.most
        return None if self.above else self.least


def shown(number: float) -> str:
    """Print a bound without a trailing .0 and without an exponent where it is whole."""
    return str(int(number)) if number == int(number) else f"{number:g}"


def _wrong(sentence: str, instead: float | None) -> PydanticCustomError:
    from pydantic_core import PydanticCustomError

    return PydanticCustomError(
        NUMBER_ERROR, "{sentence}", {"sentence": sentence, "instead": instead}
    )
