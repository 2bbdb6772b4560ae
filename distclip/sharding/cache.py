"""Cache the tables of recent functional calls, so that a call with the same parameters looks up no layouts.

A table is found by the identity of the tensors, their names in a module, and the attributes that the sources read. An
entry is dropped with the first of its tensors that ceases to exist.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..comm.ranks import Axis
from .parameters import Parameters
from .table import SOURCES, ShardTable, TableMetadata, parameter_table

__all__ = ["cached_table", "forget_all"]

_MAX_ENTRIES = 16

_entries: dict[Any, tuple[TableMetadata, list[weakref.ref[Any]]]] = {}

_ATTRIBUTES = sorted(frozenset[str]().union(*(source.attributes for source in SOURCES)))
"""Names of the attributes from which any source reads the layout of a tensor."""

_attributes_of: Callable[[Tensor], dict[str, Any]] = attrgetter("__dict__")


def cached_table(parameters: Parameters, axes: tuple[Axis, ...]) -> ShardTable:
    """Return what `parameter_table` returns, with cached metadata if the tensors were passed before.

    Args:
        parameters: see `parameter_table`.
        axes: axes of `split_over=`.

    Raises:
        ArgumentError, LayoutError: see `parameter_table`.
    """
    module = parameters if isinstance(parameters, nn.Module) else None
    if module is not None:
        # A submodule that is wrapped in place (DDP, FSDP1) keeps its parameters, but gives them other names.
        items: list[Any] = list(module.named_parameters())
    elif isinstance(parameters, Iterable) and not isinstance(parameters, Tensor):
        items = list(parameters)
        parameters = items  # A generator cannot be read twice.
    else:
        items = [parameters]
    names, tensors = (), items
    if items and set(map(type, items)) == {tuple} and set(map(len, items)) == {2}:
        names, tensors = map(list, zip(*items, strict=True))  # type: ignore[assignment]
    if not all(issubclass(cls, Tensor) for cls in set(map(type, tensors))):
        return parameter_table(parameters, axes)  # It raises the error of the argument's type.
    key: Any = (id(module), axes, tuple(names), tuple(map(id, tensors)), _attribute_values(tensors))
    if (entry := _entries.get(key)) is not None:
        return ShardTable(tensors, entry[0])
    table = parameter_table(parameters, axes)
    # Only if the tensors of the table are the very list that the key was made of.
    if table.error is None and len(table.tensors) == len(tensors):
        _add(key, table.metadata, tensors if module is None else [*tensors, *module.modules()])
    return table


def forget_all() -> None:
    """Drop all cached tables. For tests."""
    _entries.clear()


def _attribute_values(tensors: list[Tensor]) -> tuple[Any, ...]:
    """Return the values of all attributes that a source reads, of tensors that have any attributes."""
    attributes = list(map(_attributes_of, tensors))
    # Mostly no tensor has one of them, and this is known without a look at every tensor.
    if not any(attributes) or set(_ATTRIBUTES).isdisjoint(chain.from_iterable(attributes)):
        return ()
    return tuple((i, *map(own.get, _ATTRIBUTES)) for i, own in enumerate(attributes) if own)


def _add(key: Any, metadata: TableMetadata, referents: Iterable[Any]) -> None:
    """Cache metadata until one of the referents ceases to exist, or until newer entries replace it."""

    def forget(_: Any) -> None:
        _entries.pop(key, None)

    # Otherwise a new tensor could get the id of an old one. The modules are among the referents because a wrapper that
    # is replaced by another one leaves all names as they are.
    _entries[key] = metadata, [weakref.ref(one, forget) for one in referents]
    while len(_entries) > _MAX_ENTRIES:
        _entries.pop(next(iter(_entries)), None)
