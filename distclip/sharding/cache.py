"""Cache the tables of recent functional calls, so that a call with the same parameters looks up no layouts.

A table is found by the identity of the tensors, the structure of the module around them, and the attributes that the
sources read. An entry is dropped when one of its tensors or modules ceases to exist.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..comm.ranks import Axis
from .parameters import Parameters
from .table import SOURCE_ATTRIBUTES, SOURCES, ShardTable, TableMetadata, parameter_table

__all__ = ["cached_table", "forget_all"]

_MAX_ENTRIES = 16

_entries: dict[Any, tuple[TableMetadata, list[weakref.ref[Any]]]] = {}

_DICTS = sorted(frozenset[str]().union(*(source.dict_attributes for source in SOURCES)))

_ATTRIBUTES = sorted(SOURCE_ATTRIBUTES.difference(_DICTS))

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
    modules: list[nn.Module] = []
    items: list[Any]
    structure: tuple[Any, ...] = ()
    if module is not None:
        modules, items, structure = _walk(module)
    elif isinstance(parameters, Iterable) and not isinstance(parameters, Tensor | str | bytes):
        items = list(parameters)
        parameters = items  # A generator cannot be read twice.
    else:
        items = [parameters]
    names: Iterable[Any] = ()
    tensors: list[Any] = items
    types = set(map(type, items))
    if types == {tuple} and set(map(len, items)) == {2}:
        names, tensors = map(list, zip(*items, strict=True))
        types = set(map(type, tensors))
    if not all(issubclass(cls, Tensor) for cls in types):
        return parameter_table(parameters, axes)  # It raises the error of the argument's type.
    key = (axes, structure, tuple(names), tuple(map(id, tensors)), _attribute_values(tensors))
    if (entry := _entries.get(key)) is not None:
        return ShardTable(tensors, entry[0])
    table = parameter_table(parameters, axes)
    # The table is cached only if it has exactly the tensors of the key. A tensor that was passed twice is in the table
    # once, and a module can override which parameters it has.
    if table.error is None and len(table.tensors) == len(tensors) and all(map(is_, table.tensors, tensors)):
        anchors = list(map(_anchor_of, tensors))
        # Otherwise a program could no longer convert its model.
        if not torch.__future__.get_swap_module_params_on_conversion() or not any(map(is_, anchors, tensors)):
            _add(key, table.metadata, [*anchors, *modules])
    return table


def forget_all() -> None:
    """Drop all cached tables. For tests."""
    _entries.clear()


def _walk(module: nn.Module) -> tuple[list[nn.Module], list[Tensor], tuple[Any, ...]]:
    """List the modules and parameters of a module in the order of `named_parameters`.

    Returns:
        The modules, the parameters, and a key of the structure: it changes when a submodule is wrapped in place (DDP,
        FSDP1), replaced or renamed.
    """
    # This takes half of the time of `named_parameters`, which builds the full name of every module and parameter.
    modules: dict[int, nn.Module] = {}
    params: dict[int, Tensor] = {}
    names: list[str] = []
    stack: list[nn.Module | None] = [module]
    while stack:
        one = stack.pop()
        if one is None or id(one) in modules:
            continue
        modules[id(one)] = one
        for name, param in one._parameters.items():
            if param is not None:
                params[id(param)] = param
                names.append(name)
        if children := one._modules:
            names.extend(children.keys())
            stack.extend(reversed(children.values()))
    return list(modules.values()), list(params.values()), (tuple(modules), tuple(names))


def _attribute_values(tensors: list[Tensor]) -> tuple[Any, ...]:
    """Return the values of all attributes that a source reads, of tensors that have any attributes."""
    attributes = list(map(_attributes_of, tensors))
    # Usually no tensor has one of them, and this test needs no loop over the tensors.
    if SOURCE_ATTRIBUTES.isdisjoint(chain.from_iterable(filter(None, attributes))):
        return ()
    values = tuple((i, *map(own.get, _ATTRIBUTES)) for i, own in enumerate(attributes) if own)
    dicts = tuple(
        (i, frozenset(own[name].items())) for i, own in enumerate(attributes) for name in _DICTS if name in own
    )
    return values + dicts


def _anchor_of(tensor: Tensor) -> Tensor:
    """Return an object that ceases to exist with a tensor, or when the tensor's contents are swapped.

    `Module.to` swaps the contents of parameters of classes such as DTensor with torch.utils.swap_tensors, which refuses
    a tensor that has weak references. It does not check the tensors inside of such a tensor.
    """
    while is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        tensor = attrgetter(names[0])(tensor)
    return tensor


def _add(key: Any, metadata: TableMetadata, referents: Iterable[Any]) -> None:
    """Cache metadata until one of the referents ceases to exist, or until newer entries replace it."""

    def forget(_: Any) -> None:
        _entries.pop(key, None)

    # Otherwise a new tensor or module could get the id of an old one.
    _entries[key] = metadata, [weakref.ref(one, forget) for one in referents]
    while len(_entries) > _MAX_ENTRIES:
        _entries.pop(next(iter(_entries)), None)
