"""Slots: what has a norm of its own, agreed on by all ranks.

Different pipeline stages and experts hold different parameters; every rank nevertheless adds to the same vector. Which
place in it belongs to which parameter, or to which of its rows, is settled by one gather when a clipper is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import nn

from ..comm.ranks import Axis
from ..errors import ArgumentError, LayoutError
from . import Plan
from .annotations import annotation_of
from .fsdp1 import flat_slices, marked_slices
from .layout import Layout, num_replicas
from .rows import Cut, cut_of
from .shard import Rows
from .table import ShardTable

__all__ = ["ParamInfo", "SlotMap", "arrange", "assign_slots", "describe_params", "find", "parent_slots", "within"]


@dataclass(frozen=True, slots=True)
class Slots:
    """The places of the vector of norms.

    Args:
        names: whose they are, in order: parameters, groups, or the one model. The same on every rank.
        counts: how many places each has: its rows, or 1.
        places: by the name of a parameter of this rank, its first slot and which of its rows are here.
        spared: of `names`, which are measured and never clipped.
    """

    names: tuple[str, ...] = ("model",)
    counts: tuple[int, ...] = (1,)
    places: Mapping[str, tuple[int, Rows | None]] = field(default_factory=dict)
    excluded: tuple[bool, ...] = (False,)

    @property
    def total(self) -> int:
        """How many there are."""
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Found:
    """What one rank says of one of its parameters.

    Args:
        name: of the parameter, on this rank.
        where: along which axes of `split_over=` it is another parameter than its namesakes, as (axis, places).
        shape: of the local tensor, or of what it is a slice of, to tell copies under different names from one another.
        share: which part of the whole this rank's contribution is, of 1 in all.
        tied: whether it is a copy by `annotate_`, and may have another name elsewhere.
        cut: its rows, for per="row".
    """

    name: str
    where: tuple[tuple[str, tuple[int, ...]], ...]
    shape: tuple[int, ...]
    share: float
    tied: bool = False
    cut: Cut | None = None

    @property
    def full_name(self) -> str:
        """The name with the place on the axes, for namesakes."""
        return self.name + "".join(f"@{axis}={'+'.join(map(str, places))}" for axis, places in self.where)


def find(
    plan: Plan, world_size: int, rank: int, rows: bool, slices: Mapping[int, tuple[tuple[int, ...], int]]
) -> list[Found]:
    """What this rank has to say of its parameters.

    Args:
        plan: of this rank.
        world_size: ranks of the communicator.
        rank: this one, globally.
        rows: whether rows have norms of their own.
        slices: of FSDP1, and what says so itself: see `flat_slices`, `marked_slices`.

    Raises:
        LayoutError: a parameter of whose rows nobody can say where they lie.
    """
    found = []
    for name, tensor, layout in plan.entries:
        cut = cut_of(name, tensor, layout, plan.axes, slices, rank) if rows else None
        share = 1 / (num_replicas(world_size, layout, plan.axes) * layout.pieces * _pieces_along(layout, plan.axes))
        said = annotation_of(tensor)
        tied = bool(said.layout.groups) and said.slice is None
        shape = tuple(tensor.shape) if said.slice is None else said.slice[0]
        found.append(Found(name, _where(layout, plan.axes, rank), shape, share, tied, cut))
    return found


def arrange(
    told: Sequence[Sequence[Found]], mine: int, per: str, groups: Mapping[str, str], exclude: Sequence[str]
) -> Slots:
    """The slots that follow from what all ranks found: the same on each, `places` apart.

    Args:
        told: by every rank of the communicator, in order.
        mine: which of them is this one.
        per: see `distclip.policies.Per`.
        groups: name → pattern.
        exclude: patterns.

    Raises:
        ArgumentError: a pattern that matches no parameter of any rank, or is none.
        LayoutError: a copy that does not count (Megatron's `shared`) of nobody knows what.
    """
    every = {found.name: None for rank in told for found in rank}
    spare = _matching(exclude, every, "exclude")
    if per == "model":
        if not exclude:
            return Slots()
        return _grouped(told[mine], _patterns({}), spare)
    if per == "group":
        _matching(groups.values(), every, "groups")
        return _grouped(told[mine], _patterns(groups), spare)
    keys = _keys(told)
    if not keys:
        return Slots()
    firsts: dict[tuple[str, tuple[int, ...]], int] = {}
    counts = {key: _count(key, founds, firsts) for key, founds in keys.items()}
    names = tuple(keys)
    begin = dict(zip(names, _begins(list(counts.values())), strict=True))
    key_of = {id(found): key for key, founds in keys.items() for found in founds}
    places = {}
    for found in told[mine]:
        key, cut = key_of[id(found)], found.cut
        rows = None if cut is None else replace(cut.rows, first=cut.rows.first + firsts[key, cut.piece])
        places[found.name] = (begin[key], rows)
    excluded = tuple(any(found.name in spare for found in founds) for founds in keys.values())
    return Slots(names, tuple(counts.values()), places, excluded)


def within(told: Sequence[Sequence[Found]], groups: Mapping[str, str], exclude: Sequence[str]) -> tuple[int, ...]:
    """In which slot of a policy per model or group each slot of a policy per tensor counts.

    Args:
        told: by every rank of the communicator, in order.
        groups, exclude: see `arrange`; no groups for a policy per model.
    """
    every = {found.name: None for rank in told for found in rank}
    spare, wanted = _matching(exclude, every, "exclude"), _patterns(groups)
    names = [founds[0].name for founds in _keys(told).values()]
    return tuple(len(wanted) if name in spare else _group_of(name, wanted) for name in names) or (0,)


def _patterns(groups: Mapping[str, str]) -> Mapping[str, str]:
    """By name, with a last one for what no other takes."""
    return {**groups, "rest": ""} if groups else {"model": ""}


def _group_of(name: str, groups: Mapping[str, str]) -> int:
    return next(i for i, pattern in enumerate(groups.values()) if re.search(pattern, name))


def _grouped(mine: Sequence[Found], groups: Mapping[str, str], spare: set[str]) -> Slots:
    """One slot per group; what is never clipped has one beside."""
    names = (*groups, "excluded") if spare else tuple(groups)
    places: dict[str, tuple[int, Rows | None]] = {}
    for found in mine:
        places[found.name] = (len(groups) if found.name in spare else _group_of(found.name, groups), None)
    return Slots(names, (1,) * len(names), places, tuple(i >= len(groups) for i in range(len(names))))


def _keys(told: Sequence[Sequence[Found]]) -> dict[str, list[Found]]:
    """By slot name, all that is one parameter: under its bare name where it has no other namesake."""
    namesakes: dict[str, set[object]] = {}
    for rank in told:
        for found in rank:
            namesakes.setdefault(found.name, set()).add(found.where)
    keys: dict[str, list[Found]] = {}
    for rank in told:
        for found in rank:
            key = found.name if len(namesakes[found.name]) == 1 else found.full_name
            keys.setdefault(key, []).append(found)
    return _joined(keys)


def _joined(keys: dict[str, list[Found]]) -> dict[str, list[Found]]:
    """Copies that go by different names (tied embeddings of two stages) belong together: parts of a share make one."""
    share = {key: sum(found.share for found in founds) for key, founds in keys.items()}
    for key in [key for key in keys if share[key] < 1 - 1e-6]:
        if key not in keys:
            continue
        shape = keys[key][0].shape
        if share[key]:
            same = [k for k in keys if 0 < share[k] < 1 - 1e-6 and keys[k][0].shape == shape and keys[k][0].tied]
            if key not in same or len(same) < 2:
                continue
            if sum(share[k] for k in same) > 1 + 1e-6:
                raise LayoutError(
                    f"{', '.join(same)} are annotated as copies and have one shape: which are copies of each other? "
                    "Pass each pair as (name, parameter) with the same name on all ranks."
                )
        else:
            name = keys[key][0].name
            same = [k for k in keys if share[k] and keys[k][0].shape == shape]
            same = [k for k in same if keys[k][0].name == name] or same
            if len(same) != 1:
                raise LayoutError(
                    f"{key} is marked as a copy that does not count (shared), and {len(same)} parameters could be the "
                    "one that does: which norm is its own? Pass both as (name, parameter) pairs with the same name."
                )
            same = [same[0], key]
        for other in same[1:]:
            keys[same[0]] += keys.pop(other)
            share[same[0]] += share[other]
    return keys


def _count(key: str, founds: list[Found], firsts: dict[tuple[str, tuple[int, ...]], int]) -> int:
    """How many slots a parameter has; and in `firsts` where each of its pieces begins."""
    lengths = {found.cut.piece: found.cut.length for found in founds if found.cut is not None}
    if not lengths:
        return 1
    begins = _begins([lengths[piece] for piece in sorted(lengths)])
    firsts.update({(key, piece): begin for piece, begin in zip(sorted(lengths), begins, strict=True)})
    return sum(lengths.values())


def _begins(counts: Sequence[int]) -> list[int]:
    begins = [0]
    for count in counts:
        begins.append(begins[-1] + count)
    return begins[:-1]


def _where(layout: Layout, axes: Sequence[Axis], rank: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    where = []
    for i, (axis, split, cut) in enumerate(zip(axes, layout.split, layout.cut, strict=True)):
        places = tuple(sorted(axis.ranks.index(r) for r in {*layout.members, rank} if r in axis.ranks))
        if split and not cut and len(places) < len(axis.ranks):
            where.append((axis.name or f"split_over[{i}]", places))
    return tuple(where)


def _pieces_along(layout: Layout, axes: Sequence[Axis]) -> int:
    """Into how many pieces the axes of `split_over=` cut the parameter."""
    pieces = 1
    for axis, cut in zip(axes, layout.cut, strict=True):
        pieces *= len(axis.ranks) if cut else 1
    return pieces


def _matching(patterns: Iterable[str], names: Mapping[str, None], argument: str) -> set[str]:
    matching: set[str] = set()
    for pattern in patterns:
        try:
            hits = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise ArgumentError(f"{argument}: {pattern!r} is no regular expression: {error}.") from None
        if not hits:
            raise ArgumentError(
                f"{argument}: {pattern!r} matches none of {len(names)} parameters ({', '.join(list(names)[:3])} …). "
                "It is searched in their names, so that 'head' finds decoder.head.weight."
            )
        matching |= hits
    return matching


SlotMap = Slots
ParamInfo = Found


class Granularity(Protocol):
    """The part of a NormSpec that slots depend on."""

    @property
    def per(self) -> str:
        """Granularity of the norms."""
        ...

    @property
    def groups(self) -> Mapping[str, str]:
        """Regular expressions by group name."""
        ...

    @property
    def exclude(self) -> Sequence[str]:
        """Regular expressions of parameters that are never clipped."""
        ...


def describe_params(table: ShardTable, rank: int, spec: Granularity, module: nn.Module | None) -> list[ParamInfo]:
    """Describe the parameters of this rank for the other ranks."""
    slices = marked_slices(table.tensors)
    if spec.per in ("tensor", "row") and module is not None:
        slices |= flat_slices(module)
    return find(table.plan, table.world_size, rank, spec.per == "row", slices)


def assign_slots(by_rank: Sequence[Sequence[ParamInfo]], mine: int, spec: Granularity) -> SlotMap:
    """Assign the slots of all ranks' parameters."""
    return arrange(by_rank, mine, spec.per, spec.groups, spec.exclude)


def parent_slots(by_rank: Sequence[Sequence[ParamInfo]], spec: Granularity) -> tuple[int, ...]:
    """Return the policy's slot of every parameter."""
    return within(by_rank, spec.groups, spec.exclude)
