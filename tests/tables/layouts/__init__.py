"""Every way that a gradient can lie across ranks, as a table: `LAYOUTS[name]`, each row with the reason it is there.

A row builds its case on every rank: what to pass to distclip, and the whole gradient of the model in float64, found
without distclip (from full tensors, or known beforehand).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["LAYOUTS", "Case", "Row", "row"]


@dataclass
class Case:
    """One layout on one rank.

    Args:
        parameters: what is passed.
        whole: every gradient of the model once, the same on all ranks; any dtype.
        split_over: what is passed.
        all_reduces: how many collectives of that kind a call is to make.
        other_collectives: how many of other kinds.
        tolerance: relative, of the norm.
        idle: this rank has nothing to do with the model.
        ranks: the group of those that have, None for all.
    """

    parameters: Any
    whole: list[Tensor]
    split_over: Any = None
    all_reduces: int = 1
    other_collectives: int = 0
    tolerance: float = 1e-6
    idle: bool = False
    ranks: dist.ProcessGroup | None = None


@dataclass
class Row:
    """A line of the table."""

    name: str
    worlds: tuple[int, ...]
    why: str
    build: Callable[[], Case]
    norms: tuple[float, ...] = field(default=(2.0, 1.0, 3.0, 0.5, float("inf")))


LAYOUTS: dict[str, Row] = {}


def row(*worlds: int, why: str, norms: tuple[float, ...] | None = None) -> Callable[[Callable[[], Case]], Any]:
    """Enter a builder into the table under its own name."""

    def enter(build: Callable[[], Case]) -> Callable[[], Case]:
        made = Row(build.__name__, worlds, why, build)
        if norms is not None:
            made.norms = norms
        LAYOUTS[build.__name__] = made
        return build

    return enter


from tests.tables.layouts import data_parallel, model_parallel, numbers, pipeline, tagged  # noqa: E402, F401
