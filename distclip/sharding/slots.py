"""Assign slots: determine on all ranks in which norm each parameter, or each row of it, counts.

Pipeline stages and expert ranks hold different parameters, and yet every rank adds to one vector of norms. An entry of
that vector is a slot. All ranks must number the slots equally. So every rank describes its parameters (`ParamInfo`),
the ranks exchange the descriptions once, when a clipper is made, and every rank computes the slots from all of them
(`assign_slots`). The computation is deterministic, so no further exchange is needed. Most ranks have the same
description, so each distinct description is sent once (`exchange_params`).

With a norm per tensor or row, tensors on different ranks must be matched if they are one parameter:

1. Tensors with one name are shards or replicas of one parameter, unless an axis of `split_over=` (such as "pp") splits
   them into different parameters. Then their names get the coordinate as a suffix, "weight@pp=0".
2. The shares of one parameter add up to 1. If the shares under one name add up to less, it is one replica of a tied
   parameter, whose other replicas have other names on other ranks: an embedding on the first and the last pipeline
   stage. Such names are merged.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from torch import nn
from torch.nn.parameter import is_lazy

from ..comm import Comm
from ..comm.consensus import FirstError
from ..comm.discovery import is_dry_run
from ..comm.distinct import exchange_texts
from ..comm.ranks import Axis
from ..errors import ArgumentError, LayoutError
from .annotations import annotation_of
from .layout import Layout
from .members import are_references
from .order import Order, digest_values, has_other_order, order_of
from .parameters import check_names, is_frozen, is_position
from .rows import LocalRows, local_rows
from .shard import Rows
from .source import Request, Slice
from .table import SOURCES, ShardTable

__all__ = [
    "Granularity",
    "ParamInfo",
    "SlotMap",
    "assign_slots",
    "describe_params",
    "exchange_params",
    "parent_slots",
]

_ROUNDING = 1e-6
"""Tolerance for rounding in sums of shares."""


class Granularity(Protocol):
    """Members of a `NormSpec` that determine the slots."""

    @property
    def per(self) -> str:
        """One of "model", "group", "tensor" and "row"."""
        ...

    @property
    def groups(self) -> Mapping[str, str]:
        """Pattern of parameter names for each group name, with per="group"."""
        ...

    @property
    def exclude(self) -> Sequence[str]:
        """Patterns of names of parameters that are measured but never clipped."""
        ...

    @property
    def groups_are_prefixes(self) -> bool:
        """True if the group of a parameter is its name up to the first "/"."""
        ...


@dataclass(frozen=True)
class SlotMap:
    """Slots of the vector of norms.

    Args:
        names: name of each unit that has norms: parameters, groups, or the model. Equal on every rank.
        counts: number of slots of each unit: its number of rows, or 1.
        by_name: for each parameter of this rank, its first slot, and the rows that this rank holds.
        excluded: for each unit, True if it is measured but never clipped.
        frozen: names of this rank's parameters that train on no rank.
    """

    names: tuple[str, ...] = ("model",)
    counts: tuple[int, ...] = (1,)
    by_name: Mapping[str, tuple[int, Rows | None]] = field(default_factory=dict)
    excluded: tuple[bool, ...] = (False,)
    frozen: frozenset[str] = frozenset()

    @property
    def total(self) -> int:
        """Number of slots."""
        return sum(self.counts)

    @cached_property
    def excluded_by_slot(self) -> tuple[bool, ...]:
        """`excluded` of the unit that each slot belongs to."""
        pairs = zip(self.excluded, self.counts, strict=True)
        return tuple(excluded for excluded, count in pairs for _ in range(count))


@dataclass(frozen=True, slots=True)
class ParamInfo:
    """Description of one parameter on one rank, for the other ranks.

    Args:
        name: name on this rank.
        axis_coords: (axis name, coordinates of the ranks that hold it) for every axis of `split_over=` that splits it
            from different parameters of the same name.
        shape: shape of the local tensor, or of the whole parameter for a slice. It helps to match tied parameters.
        share: fraction of the whole parameter that this rank contributes. The shares of all ranks add up to 1.
        is_whole: True if the rank holds the whole parameter.
        tied: True for an annotated replica, which can have other names on other ranks.
        cut: rows on this rank, for per="row".
        trains: False for a parameter that is frozen on this rank.
        digest: checksum of the values of a replica without a name, on this rank only. None for any other parameter.
    """

    name: str
    axis_coords: tuple[tuple[str, tuple[int, ...]], ...]
    shape: tuple[int, ...]
    share: float
    is_whole: bool = False
    tied: bool = False
    cut: LocalRows | None = None
    trains: bool = True
    digest: int | None = None

    @property
    def full_name(self) -> str:
        """Name with the coordinates, to distinguish different parameters of the same name."""
        return self.name + "".join(f"@{axis}={'+'.join(map(str, coords))}" for axis, coords in self.axis_coords)


def describe_params(table: ShardTable, rank: int, spec: Granularity, module: nn.Module | None) -> list[ParamInfo]:
    """Describe this rank's parameters to the other ranks.

    Args:
        table: parameters of this rank, with `world_size` set.
        rank: global rank of this process.
        spec: granularity of the norms.
        module: module that the table was made from, or None. FSDP1 describes its slices only through the module.

    Raises:
        ArgumentError: two parameters have one name.
        LayoutError: the rows of a parameter cannot be numbered, or a flattened parameter cannot be taken apart.

    Collectives: none. Host syncs: none.
    """
    check_names(table.names)
    if spec.per not in ("tensor", "row"):
        module = None  # Flattened parameters need not be split.
    request = Request(list(zip(table.names, table.tensors, strict=True)), module, table.axes, FirstError())
    slices: dict[int, Slice] = {}
    for source in SOURCES:
        slices.update(source.find_slices(request))
    params = []
    for i, (name, tensor, layout) in enumerate(zip(table.names, table.tensors, table.layouts, strict=True)):
        if is_lazy(tensor):
            raise LayoutError(
                f"{name} has no shape yet, because it belongs to a lazy module. Call the model before you make "
                "the clipper."
            )
        slice, annotation = slices.get(id(tensor)), annotation_of(tensor)
        cut, trains = None, not is_frozen(tensor)
        if spec.per == "row":
            try:
                cut = local_rows(name, tensor, layout, table.axes, slice, rank)
            except LayoutError:
                # The rows of a frozen parameter do not matter.
                if trains:
                    raise
        shape = tuple(tensor.shape) if annotation.slice is None else annotation.slice.shape
        if tensor.is_nested:
            # The size of a ragged dim is not a number.
            shape = ()
            if trains:
                raise LayoutError(
                    f"{name} is a {type(tensor).__name__} of layout {tensor.layout}, whose elements cannot be scaled "
                    "in place. Use a dense tensor, or freeze the parameter."
                )
        # All pieces have equal shares of the parameter, and the replicas of a piece divide its share.
        num_pieces = layout.num_pieces * _num_pieces_along(layout, table.axes)
        share = 1 / (table.num_replicas(i) * num_pieces)
        params.append(
            ParamInfo(
                name,
                _axis_coords(layout, table.axes, rank),
                shape,
                share,
                is_whole=num_pieces == 1,
                tied=bool(annotation.layout.groups) and annotation.slice is None,
                cut=cut,
                trains=trains,
            )
        )
    return params if spec.per not in ("tensor", "row") else _with_digests(params, table)


def _with_digests(params: list[ParamInfo], table: ShardTable) -> list[ParamInfo]:
    """Add digests to the descriptions of whole replicas without names."""
    at = [i for i, p in enumerate(params) if p.is_whole and p.share < 1 and p.trains and is_position(p.name)]
    # A single parameter can be in one order only.
    digests = digest_values([table.tensors[i] for i in at]) if len(at) > 1 else None
    for i, digest in zip(at, digests or (), strict=digests is not None):
        params[i] = replace(params[i], digest=digest)
    return params


def exchange_params(
    comm: Comm, error: BaseException | None, params: Sequence[ParamInfo]
) -> tuple[list[list[ParamInfo]], int]:
    """Exchange the descriptions of all ranks.

    Args:
        comm: the ranks that take part.
        error: error of this rank, or None. All ranks raise it.
        params: of this rank.

    Returns:
        The distinct descriptions in the order of the lowest ranks that have them, each with the share of all ranks that
        have it, and the index of this rank's description. The list is equal on all ranks, except that the description
        of this rank has the rows that it holds.

    Raises:
        LayoutError: replicas without names are in another order on another rank; on every rank.

    Collectives: those of `exchange_texts`, twice.
    """
    # Expert ranks differ only in their few coordinates, and not in their thousands of names.
    coords = list(dict.fromkeys(param.axis_coords for param in params))
    numbers = {one: i for i, one in enumerate(coords)}
    rows = [_encode(param, numbers[param.axis_coords]) for param in params]
    named = exchange_texts(comm, error, json.dumps(rows, separators=(",", ":")))
    order = order_of([param.digest for param in params if param.digest is not None])
    placed = exchange_texts(comm, None, json.dumps([named.own, coords, order], separators=(",", ":")))
    # Each text is parsed once, for all ranks that share it.
    decoded = list(map(json.loads, named.texts))
    # Descriptions that differ only in the values of replicas count as one.
    counts: dict[str, int] = {}
    orders: dict[str, list[Order]] = {}
    own = ""
    for i, (text, count) in enumerate(zip(placed.texts, placed.counts, strict=True)):
        *place, one = json.loads(text)
        key = json.dumps(place)
        counts[key] = counts.get(key, 0) + count
        orders.setdefault(key, []).append(tuple(one))
        own = key if i == placed.own else own
    if any(map(has_other_order, orders.values())):
        raise LayoutError(
            "parameters: they have no names, and their values are in another order on another rank, so that the norms "
            "of different parameters would be mixed. Pass model.named_parameters(), or the module."
        )
    gathered: list[list[ParamInfo]] = []
    for key, count in counts.items():
        number, coords_there = json.loads(key)
        at = [tuple((axis, tuple(along)) for axis, along in one) for one in coords_there]
        # The rows of this rank are only in its own description.
        described = params if key == own else [_decode(row, at) for row in decoded[number]]
        gathered.append([replace(param, share=param.share * count) for param in described])
    return gathered, list(counts).index(own)


def _encode(param: ParamInfo, coords: int) -> list[Any]:
    # A list instead of a mapping keeps the text for thousands of parameters short.
    cut = None if param.cut is None else (param.cut.num_rows, param.cut.piece)
    flags = param.is_whole, param.tied, param.trains
    return [param.name, coords, param.shape, param.share, *map(int, flags), cut]


def _decode(row: Sequence[Any], coords: Sequence[Any]) -> ParamInfo:
    name, number, shape, share, is_whole, tied, trains, cut = row
    # Of the rows of other ranks, only their number matters.
    rows = None if cut is None else LocalRows(Rows(0, 0), cut[0], tuple(cut[1]))
    return ParamInfo(name, coords[number], tuple(shape), share, bool(is_whole), bool(tied), rows, bool(trains))


def assign_slots(gathered: Sequence[Sequence[ParamInfo]], rank: int, spec: Granularity) -> SlotMap:
    """Compute the slots from the parameters of all ranks.

    Args:
        gathered: descriptions of every rank, or the distinct ones, see `exchange_params`.
        rank: index of this rank's description among them. Only `by_name` and `frozen` depend on it.
        spec: granularity of the norms.

    Raises:
        ArgumentError: a pattern is not a regular expression, or matches no parameter of any rank.
        LayoutError: replicas under different names cannot be matched.

    Collectives: none. Host syncs: none.
    """
    # A pattern may match only frozen parameters, because a parameter that is frozen in this run may train in the next.
    all_names = _names(gathered)
    excluded = _matching(spec.exclude, all_names, "exclude")
    own, gathered = gathered[rank], _training(gathered)
    frozen = frozenset({param.name for param in own} - {param.name for param in gathered[rank]})
    # Per model and group, the names of this rank suffice. Other ranks only matter for the check of the patterns.
    if spec.per == "model":
        slots = _slots_of_groups(own, {"model": ""}, lambda name: 0, excluded) if excluded else SlotMap()
        return replace(slots, frozen=frozen)
    if spec.per == "group":
        if spec.groups_are_prefixes:
            _check_prefixes(spec.groups, all_names)
        elif not are_references(spec.groups):
            _matching(spec.groups.values(), all_names, "groups")
        return replace(_slots_of_groups(own, _with_default(spec.groups), _group_finder(spec), excluded), frozen=frozen)

    units = _units(gathered)
    # In a dry run the descriptions of this rank stand for those of all ranks.
    if not is_dry_run():
        _check_units(units)
    units = _merge_tied(units)
    if not units:
        return SlotMap(frozen=frozen)
    # Each unit has one slot, or one per row, and the units follow each other in the vector.
    offsets = {unit: _piece_offsets(params) for unit, params in units.items()}
    counts = {unit: _num_rows(params) for unit, params in units.items()}
    begins = dict(zip(units, itertools.accumulate(counts.values(), initial=0), strict=False))
    unit_of = {id(param): unit for unit, params in units.items() for param in params}
    by_name: dict[str, tuple[int, Rows | None]] = {}
    for param in gathered[rank]:
        unit, rows = unit_of[id(param)], None
        if param.cut is not None:
            # So far, rows are counted from the first row of the piece. From here on, from the first row of the
            # parameter.
            rows = replace(param.cut.rows, first=param.cut.rows.first + offsets[unit][param.cut.piece])
        by_name[param.name] = (begins[unit], rows)
    is_excluded = tuple(any(param.name in excluded for param in params) for params in units.values())
    return SlotMap(tuple(units), tuple(counts.values()), by_name, is_excluded, frozen)


def parent_slots(gathered: Sequence[Sequence[ParamInfo]], spec: Granularity) -> tuple[int, ...]:
    """Return the slot of `spec` that each slot of per="tensor" is part of.

    Args:
        gathered: see `assign_slots`.
        spec: granularity per model or group.
    """
    excluded, num_groups = _matching(spec.exclude, _names(gathered), "exclude"), len(_with_default(spec.groups))
    find_group = _group_finder(spec)
    # Units are ordered and merged as in `assign_slots`.
    names = [params[0].name for params in _merge_tied(_units(_training(gathered))).values()]
    return tuple(num_groups if name in excluded else find_group(name) for name in names) or (0,)


def _training(gathered: Sequence[Sequence[ParamInfo]]) -> list[list[ParamInfo]]:
    """Return the parameters of every rank that train on any rank."""
    # A parameter that is frozen on only some ranks is measured on all ranks, because the others need its shards.
    trained = {param.full_name for param in itertools.chain.from_iterable(gathered) if param.trains}
    return [[param for param in params if param.full_name in trained] for params in gathered]


# ---- Slots per model and group ----


def _slots_of_groups(
    local: Sequence[ParamInfo], groups: Mapping[str, str], find_group: Callable[[str], int], excluded: set[str]
) -> SlotMap:
    """Return one slot per group, and a last one for all excluded parameters if there are any."""
    names = (*groups, "excluded") if excluded else tuple(groups)
    by_name: dict[str, tuple[int, Rows | None]] = {}
    for param in local:
        by_name[param.name] = (len(groups) if param.name in excluded else find_group(param.name), None)
    return SlotMap(names, (1,) * len(names), by_name, tuple(i >= len(groups) for i in range(len(names))))


def _with_default(groups: Mapping[str, str]) -> Mapping[str, str]:
    """Add a last group for the parameters that match no other pattern."""
    if are_references(groups):
        return groups
    return {**groups, "rest": ""} if groups else {"model": ""}


def _group_finder(spec: Granularity) -> Callable[[str], int]:
    """Return a function that returns the index of the group of a parameter, by its name."""
    groups = _with_default(spec.groups)
    if not spec.groups_are_prefixes:
        # If all groups are references, a frozen parameter may be in no group. It has no gradient that would count.
        last = len(groups) - 1
        return lambda name: next((i for i, pattern in enumerate(groups.values()) if re.search(pattern, name)), last)
    # With hundreds of groups, patterns would take hundreds of searches for each parameter.
    positions = {name: i for i, name in enumerate(groups)}
    return lambda name: positions.get(name.partition("/")[0], len(groups) - 1) if "/" in name else len(groups) - 1


def _check_prefixes(groups: Iterable[str], names: Iterable[str]) -> None:
    """Raise if a group has no parameters on any rank.

    Raises:
        ArgumentError: see above.
    """
    found = {name.partition("/")[0] for name in names if "/" in name}
    for group in groups:
        if group not in found:
            raise ArgumentError(
                f"group {group!r}: it has no parameters on any rank. Pass the parameters of the adapter that train."
            )


# ---- Slots per tensor and row ----


def _units(gathered: Sequence[Sequence[ParamInfo]]) -> dict[str, list[ParamInfo]]:
    """Return the shards and replicas of every parameter, over all ranks, by slot name."""
    coords_of: dict[str, set[object]] = {}
    for param in itertools.chain.from_iterable(gathered):
        coords_of.setdefault(param.name, set()).add(param.axis_coords)
    units: dict[str, list[ParamInfo]] = {}
    for param in itertools.chain.from_iterable(gathered):
        # The coordinates are part of the name only where they distinguish parameters. Otherwise a checkpoint would not
        # fit a run with another number of stages.
        name = param.name if len(coords_of[param.name]) == 1 else param.full_name
        units.setdefault(name, []).append(param)
    return units


def _check_units(units: Mapping[str, Sequence[ParamInfo]]) -> None:
    """Raise if ranks hold different parameters under one name.

    Raises:
        LayoutError: on every rank.
    """
    for name, params in units.items():
        # All ranks together hold a parameter once. Different shapes also show that parameters without names are not
        # replicas.
        is_twice = sum(param.share for param in params) > 1 + _ROUNDING
        shapes = {param.shape for param in params if param.is_whole}
        if is_twice or (is_position(name) and len(shapes) > 1):
            raise LayoutError(
                f"{name} is not the same parameter on all ranks, so that its norm would mix several. "
                + (
                    "Pass model.named_parameters(), or the module."
                    if is_position(name)
                    else "Pass different parameters under different names, or declare split_over=mesh[...]."
                )
            )


def _merge_tied(units: dict[str, list[ParamInfo]]) -> dict[str, list[ParamInfo]]:
    """Merge units that are replicas of one parameter under different names.

    Raises:
        LayoutError: several units could be the other replica.
    """
    share = {name: sum(param.share for param in params) for name, params in units.items()}
    for name in [name for name in units if share[name] < 1 - _ROUNDING]:
        if name not in units:
            continue  # This unit has been merged into an earlier one.
        shape = units[name][0].shape
        if share[name]:
            # Each annotated replica has a part of the share, and all replicas together have a share of 1.
            same = [
                n for n in units if 0 < share[n] < 1 - _ROUNDING and units[n][0].shape == shape and units[n][0].tied
            ]
            if name not in same or len(same) < 2:
                continue
            if sum(share[n] for n in same) > 1 + _ROUNDING:
                raise LayoutError(
                    f"{', '.join(same)} are annotated as replicas and have one shape, so that it is unclear which are "
                    "replicas of each other. Pass each pair as (name, parameter) with the same name on all ranks."
                )
        else:
            # With Megatron's `shared`, the replica has no share, and its original has all of it. A name has precedence
            # over a shape.
            bare_name = units[name][0].name
            same = [n for n in units if share[n] and units[n][0].shape == shape]
            same = [n for n in same if units[n][0].name == bare_name] or same
            if len(same) != 1:
                raise LayoutError(
                    f"{name} is marked as a replica that does not count (shared), and {len(same)} parameters could be "
                    "its original. Pass both as (name, parameter) pairs with the same name."
                )
            same = [same[0], name]
        for other in same[1:]:
            units[same[0]] += units.pop(other)
            share[same[0]] += share[other]
    return units


def _num_rows(params: Sequence[ParamInfo]) -> int:
    """Return the number of slots of a parameter: the rows of all its pieces, or 1."""
    num_rows = {param.cut.piece: param.cut.num_rows for param in params if param.cut is not None}
    return sum(num_rows.values()) if num_rows else 1


def _piece_offsets(params: Sequence[ParamInfo]) -> dict[tuple[int, ...], int]:
    """Return the index of the first row of every piece of a parameter."""
    num_rows = {param.cut.piece: param.cut.num_rows for param in params if param.cut is not None}
    pieces = sorted(num_rows)
    begins = itertools.accumulate((num_rows[piece] for piece in pieces), initial=0)
    return dict(zip(pieces, begins, strict=False))


def _axis_coords(layout: Layout, axes: Sequence[Axis], rank: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the coordinates along the axes that separate a parameter from others of the same name."""
    coords = []
    for i, (axis, split, cut) in enumerate(zip(axes, layout.split, layout.cut, strict=True)):
        # A mesh can span several coordinates of the axis, because all of its ranks hold one parameter.
        members = layout.members
        holders = tuple(i for i, other in enumerate(axis.ranks) if other in members or other == rank)
        if split and not cut and len(holders) < len(axis.ranks):
            coords.append((axis.name or f"split_over[{i}]", holders))
    return tuple(coords)


def _num_pieces_along(layout: Layout, axes: Sequence[Axis]) -> int:
    """Return the number of pieces into which the axes of `split_over=` cut a parameter."""
    num_pieces = 1
    for axis, cut in zip(axes, layout.cut, strict=True):
        num_pieces *= len(axis.ranks) if cut else 1
    return num_pieces


# ---- Names and patterns ----


def _names(gathered: Sequence[Sequence[ParamInfo]]) -> dict[str, None]:
    """Return the names of all parameters of all ranks, in order and without repetition."""
    return {param.name: None for param in itertools.chain.from_iterable(gathered)}


def _matching(patterns: Iterable[str], names: Mapping[str, None], argument: str) -> set[str]:
    """Return the names that match any of the patterns.

    Raises:
        ArgumentError: a pattern is not a regular expression, or matches no name.
    """
    matching: set[str] = set()
    for pattern in patterns:
        try:
            hits = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise ArgumentError(f"{argument}: {pattern!r} is no regular expression: {error}. Use one.") from None
        if not hits:
            # The names are those of all ranks, because a pattern may match on only one pipeline stage.
            raise ArgumentError(
                f"{argument}: {pattern!r} matches none of {len(names)} parameters ({', '.join(list(names)[:3])} …). "
                "Use a pattern that is found anywhere in a name: 'head' matches decoder.head.weight."
            )
        matching |= hits
    return matching
