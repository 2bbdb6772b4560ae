"""What a recorder keeps of single steps: `Spike`, `Culprit`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .reading import Line

__all__ = ["Culprit", "Spike", "culprits_in", "number", "spike_in"]


@dataclass(frozen=True, slots=True)
class Spike:
    """A step whose norm stood out, with what the recorder kept of it.

    Args:
        step: which.
        norm: before clipping; NaN where it was not finite.
        ratio: how many times the running median before it; NaN where there was none yet or the norm is not finite.
        ids: of the samples of its batch, on all ranks; empty where none were given.
        rank: on which the largest part of the norm lay; None where all ranks have the same.
        tensor: whose gradient was the largest there; None where unknown.
        share: which part of the whole squared norm that tensor's piece was, 0 to 1; NaN where unknown.
    """

    step: int
    norm: float
    ratio: float
    ids: tuple[int | str, ...] = ()
    rank: int | None = None
    tensor: str | None = None
    share: float = float("nan")


@dataclass(frozen=True, slots=True)
class Culprit:
    """A gradient that was not finite at a step: how many NaN and infinite elements, on which ranks."""

    step: int
    name: str
    nans: int
    infs: int
    ranks: tuple[int, ...]


def spike_in(step: int, line: Line) -> Spike | None:
    """What a step's line says of it as a spike; None where it does not."""
    if not ("spike" in line or "ids" in line or "worst" in line):
        return None
    ids, worst = line.get("ids"), line.get("worst")
    if not isinstance(worst, dict):
        worst = {}
    rank, tensor = worst.get("rank"), worst.get("tensor")
    return Spike(
        step,
        number(line.get("norm")),
        number(line.get("spike")),
        tuple(each for each in ids if isinstance(each, (int, str))) if isinstance(ids, list) else (),
        rank if isinstance(rank, int) else None,
        tensor if isinstance(tensor, str) else None,
        number(worst.get("share")),
    )


def culprits_in(step: int, line: Line) -> Iterator[Culprit]:
    """The gradients that a step's line says were not finite."""
    found = line.get("culprits")
    for each in found if isinstance(found, list) else ():
        if isinstance(each, dict) and isinstance(each.get("name"), str):
            ranks = each.get("ranks")
            yield Culprit(
                step,
                each["name"],
                _count(each.get("nans")),
                _count(each.get("infs")),
                tuple(rank for rank in ranks if isinstance(rank, int)) if isinstance(ranks, list) else (),
            )


def number(value: Any) -> float:
    """A finite number, or NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        value = float(value)
    except OverflowError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
