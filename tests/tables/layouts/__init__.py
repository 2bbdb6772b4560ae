"""List every way that a gradient can be spread over ranks: `LAYOUTS[name]`, each row with the reason why it is there.

A row builds its case on every rank: arguments for distclip, and the whole gradient of the model in float64, computed
without distclip (from full tensors, or known beforehand). To add a layout, add a builder with `@row` to a module here.
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
        parameters: argument of the clipping functions.
        whole: every gradient of the model once, the same on all ranks, of any dtype.
        split_over: argument of the clipping functions.
        all_reduces: number of all-reduces of one call.
        all_reduces_of_clipper: number of all-reduces of one call of a clipper, None for `all_reduces`.
        other_collectives: number of other collectives of one call.
        gathers_once: whether the first call has other collectives, and later calls have none.
        tolerance: relative error of the norm that is allowed.
        idle: whether this rank holds nothing of the model and makes no call.
        ranks: process group of the ranks that make the call, None for all.
        exchanges: whether the ranks exchange their layouts in the first call, because no rank knows all meshes.
    """

    parameters: Any
    whole: list[Tensor]
    split_over: Any = None
    all_reduces: int = 1
    all_reduces_of_clipper: int | None = None
    other_collectives: int = 0
    gathers_once: bool = False
    tolerance: float = 1e-6
    idle: bool = False
    ranks: dist.ProcessGroup | None = None
    exchanges: bool = False


@dataclass
class Row:
    """A row of the table.

    Args:
        name: name of the builder.
        worlds: numbers of ranks that the layout is tested on.
        why: reason for this row.
        build: makes the case on each rank.
        norms: orders of the norm.
    """

    name: str
    worlds: tuple[int, ...]
    why: str
    build: Callable[[], Case]
    norms: tuple[float, ...] = field(default=(2.0, 1.0, 3.0, 0.5, float("inf")))


LAYOUTS: dict[str, Row] = {}


def row(*worlds: int, why: str, norms: tuple[float, ...] | None = None) -> Callable[[Callable[[], Case]], Any]:
    """Enter a builder into the table under its name."""

    def enter(build: Callable[[], Case]) -> Callable[[], Case]:
        entry = Row(build.__name__, worlds, why, build)
        if norms is not None:
            entry.norms = norms
        LAYOUTS[build.__name__] = entry
        return build

    return enter


from tests.tables.layouts import data_parallel, model_parallel, numbers, pipeline, tagged  # noqa: E402, F401
