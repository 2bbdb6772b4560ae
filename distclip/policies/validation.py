"""Which numbers a rule can be given."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ArgumentError
from .policy import as_number

__all__ = ["FRACTION", "NATURAL", "NOT_NEGATIVE", "POSITIVE", "Range", "take"]


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers from `low` to `high`, without those named in `but`; only whole ones if `whole`.

    >>> 1 in Range(0, 1), 1 in Range(0, 1, but=(1,)), 0.5 in Range(0, whole=True)
    (True, False, False)
    """

    low: float
    high: float = math.inf
    but: tuple[float, ...] = ()
    whole: bool = False

    def __contains__(self, number: float) -> bool:
        inside = self.low <= number <= self.high and number not in self.but
        return inside and (not self.whole or float(number).is_integer())

    def __str__(self) -> str:
        lower = f"{'>' if self.low in self.but else '≥'} {self.low}"
        upper = "" if math.isinf(self.high) else f" and {'<' if self.high in self.but else '≤'} {self.high}"
        return f"a {'whole ' * self.whole}number {lower}{upper}"


POSITIVE = Range(0, but=(0,))
NOT_NEGATIVE = Range(0)
NATURAL = Range(1, whole=True)
FRACTION = Range(0, 1, but=(1,))


def take(rule: Any, **allowed: Range) -> None:
    """Make numbers of a frozen dataclass' fields, whatever they were given as.

    Raises:
        ArgumentError: a field that is no number, or none of those allowed for it.
    """
    usual = {field.name: field.default for field in fields(rule)}
    for name, numbers in allowed.items():
        seen = getattr(rule, name)
        number = as_number(seen)
        if number not in numbers:
            raise ArgumentError(f"{name}={seen!r}: expected {numbers}. Write {name}={usual[name]}, for example.")
        object.__setattr__(rule, name, int(number) if numbers.whole else number)
