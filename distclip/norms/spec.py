"""`NormSpec`: the norms that a policy wants measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

__all__ = ["NormSpec", "Per"]

Per: TypeAlias = Literal["model", "group", "tensor", "row"]
"""Granularity of a norm.

The units are the whole model, each named group of parameters, each parameter, or each row (index along dim 0) of each
parameter. A parameter with a single dim counts as one row.
"""


@dataclass(frozen=True, slots=True)
class NormSpec:
    """Norms that a policy wants measured.

    The spec must be equal on every rank, because it determines the all-reduce.

    Args:
        norm_type: p of the norm, > 0; `inf` for the largest element.
        per: granularity; every unit of it has a slot in the vector of norms.
        groups: for per="group", {group name: regular expression that is searched in parameter names}.
        exclude: regular expressions; parameters with a matching name are measured and never clipped.
        needs_weights: whether the norms of the parameters are measured as well.
        limits: (low, high) of an element; gradients are then searched for elements outside of them. None for no search.

    >>> NormSpec(per="tensor").norm_type
    2.0
    """

    norm_type: float = 2.0
    per: Per = "model"
    groups: Mapping[str, str] = field(default_factory=dict)
    exclude: Sequence[str] = ()
    needs_weights: bool = False
    limits: tuple[float, float] | None = None
