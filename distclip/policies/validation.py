"""Check and convert the numbers that policies take as arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from torch import Tensor

from ..errors import ArgumentError

__all__ = [
    "FRACTION",
    "NATURAL",
    "NOT_NEGATIVE",
    "POSITIVE",
    "Range",
    "check_flags",
    "convert_fields",
    "is_count",
    "is_size",
    "to_float",
]


@dataclass(frozen=True, slots=True)
class Range:
    """Interval of allowed numbers.

    Args:
        low: lower end.
        high: upper end.
        exclude: numbers of the interval that are not allowed, such as the end of a half-open interval.
        whole: allow only whole numbers.

    >>> 1 in Range(0, 1), 1 in Range(0, 1, exclude=(1,)), 0.5 in Range(0, whole=True)
    (True, False, False)
    """

    low: float
    high: float = math.inf
    exclude: tuple[float, ...] = ()
    whole: bool = False

    def __contains__(self, number: float) -> bool:
        inside = self.low <= number <= self.high and number not in self.exclude
        return inside and (not self.whole or float(number).is_integer())

    def __str__(self) -> str:
        lower = f"{'>' if self.low in self.exclude else '≥'} {self.low}"
        upper = "" if math.isinf(self.high) else f" and {'<' if self.high in self.exclude else '≤'} {self.high}"
        return f"a {'whole ' * self.whole}number {lower}{upper}"


POSITIVE = Range(0, exclude=(0,))
NOT_NEGATIVE = Range(0)
NATURAL = Range(1, whole=True)
FRACTION = Range(0, 1, exclude=(1,))

_MAX_COUNT = 2**53
"""Largest count of steps. float64 represents every whole number up to it."""


def is_count(values: Tensor) -> Tensor:
    """Return a mask of the values that can be numbers of steps."""
    return (values >= 0) & (values <= _MAX_COUNT)


def is_size(values: Tensor) -> Tensor:
    """Return a mask of the values that can be norms, or means of norms: finite and not negative."""
    return (values >= 0) & values.isfinite()


def to_float(value: Any) -> float:
    """Convert anything that float() accepts, such as strings and 0-d tensors. Return NaN for other values.

    >>> to_float("inf"), to_float(None)
    (inf, nan)
    """
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        # torch raises RuntimeError for a meta tensor, and for one with several elements.
        return math.nan


def convert_fields(instance: Any, **allowed: Range) -> None:
    """Convert fields of a frozen dataclass to numbers, from strings of a configuration file for example.

    Args:
        instance: of a dataclass. Its fields in `allowed` have defaults.
        allowed: {field name: allowed numbers}. Fields of a `whole` range become int, others float.

    Raises:
        ArgumentError: a field that is not a number, or outside of its range.
    """
    defaults = {field.name: field.default for field in fields(instance)}
    for name, numbers in allowed.items():
        value = attrgetter(name)(instance)
        number = to_float(value)
        if number not in numbers:
            raise ArgumentError(f"{name}={value!r}: expected {numbers}. Use {name}={defaults[name]}, for example.")
        object.__setattr__(instance, name, int(number) if numbers.whole else number)


def check_flags(**flags: Any) -> None:
    """Raise if a flag is text, because any non-empty text would count as true.

    Raises:
        ArgumentError: see above.

    >>> check_flags(partial="no")
    Traceback (most recent call last):
    distclip.errors.ArgumentError: partial='no': text is not a flag. Pass True or False.
    """
    for name, flag in flags.items():
        if isinstance(flag, str | bytes):
            raise ArgumentError(f"{name}={flag!r:.40}: text is not a flag. Pass True or False.")
