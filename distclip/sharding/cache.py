"""Arrangements of the last calls: a function that is called with the same parameters at every step plans once.

They are found again by the identity of what was passed, and forgotten with the first tensor of it that ceases to exist.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..comm.ranks import Axis
from .arrangement import Arrangement
from .parameters import Parameters
from .table import Plan, ShardTable, parameter_plan

__all__ = ["cached_table", "recent_plan"]

_noted: Callable[[Tensor], dict[str, Any]] = attrgetter("__dict__")

_LIMIT = 16

_recent: dict[Any, tuple[Arrangement, list[weakref.ref[Any]]]] = {}

_MARKS = {"tensor_model_parallel", "allreduce", "shared", "partition_dim", "_fsdp_flattened", "_distclip_annotation"}
"""Attributes that tell where a plain tensor lies; when one is set between two calls, the second plans anew."""


def recent_plan(parameters: Parameters, axes: tuple[Axis, ...]) -> Plan:
    """What `parameter_plan` returns, without planning anew if it was called like this before.

    Args:
        parameters: see `parameter_plan`.
        axes: of `split_over=`.

    Raises:
        ArgumentError: see `parameter_plan`.
    """
    module = parameters if isinstance(parameters, nn.Module) else None
    if module is not None:
        items: list[Any] = list(module.parameters())
    elif isinstance(parameters, Iterable) and not isinstance(parameters, Tensor):
        items = list(parameters)
        parameters = items
    else:
        items = [parameters]
    names: tuple[str, ...] = ()
    tensors = items
    if items and set(map(type, items)) == {tuple} and set(map(len, items)) == {2}:
        names, tensors = (list(column) for column in zip(*items, strict=True))  # type: ignore[assignment]
    if not all(issubclass(kind, Tensor) for kind in set(map(type, tensors))):
        return parameter_plan(parameters, axes)
    ids = tuple(map(id, tensors))
    marks: tuple[Any, ...] = ()
    if any(map(_noted, tensors)) and not _MARKS.isdisjoint(chain.from_iterable(map(_noted, tensors))):
        marks = tuple((i, *map(own.get, sorted(_MARKS))) for i, own in enumerate(map(_noted, tensors)) if own)
    key = (id(module), axes, tuple(names), ids, marks)
    if (known := _recent.get(key)) is not None:
        return Plan(tensors, known[0])
    plan = parameter_plan(parameters, axes)
    if plan.failure is None and len(plan.tensors) == len(tensors):

        def forget(_: Any, key: Any = key) -> None:
            _recent.pop(key, None)

        held = tensors if module is None else [*tensors, module]
        _recent[key] = plan.arrangement, [weakref.ref(one, forget) for one in held]
        while len(_recent) > _LIMIT:
            _recent.pop(next(iter(_recent)), None)
    return plan


def cached_table(parameters: Parameters, axes: tuple[Axis, ...]) -> ShardTable:
    """Return a table over parameters, from the last ones if nothing has changed."""
    return ShardTable(recent_plan(parameters, axes))
