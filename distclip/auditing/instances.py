"""Join the facts of all ranks: which tensors are parts or replicas of one parameter, and how often each counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, TypeAlias

from ..comm.ranks import Ranks
from ..sharding.layout import num_replicas
from .facts import Facts, Holding
from .probe import sum_of_codes

__all__ = ["Instance", "Key", "Member", "find_instances"]

Key: TypeAlias = tuple[int, int]
"""Rank, and position among its parameters."""


@dataclass(frozen=True)
class Member:
    """Holding of one rank.

    Args:
        rank: global rank.
        position: index among the parameters of the rank.
        holding: its facts.
        component: ranks of the norm that it counts in.
        weight: factor of its power sum in that norm, 1 / replicas.
        coordinates: position along each axis of `split_over=` that separates parameters, None along other axes.
    """

    rank: int
    position: int
    holding: Holding
    component: Ranks
    weight: Fraction
    coordinates: tuple[int | None, ...] = ()

    @cached_property
    def piece(self) -> Any:
        """Identity of the piece within the parameter."""
        return self.holding.box, self.holding.cuts

    @cached_property
    def value(self) -> tuple[tuple[int, ...], str, int | None]:
        """Local shape, dtype and checksum, equal for equal replicas."""
        return self.holding.shape, self.holding.dtype, self.holding.values.checksum

    @property
    def name(self) -> str:
        """Name of the parameter."""
        return self.holding.name

    def declares(self, rank: int) -> bool:
        """Return whether the layout itself names a rank as one that holds a part or a replica."""
        return rank in self._declared_ranks

    @cached_property
    def _declared_ranks(self) -> frozenset[int]:
        return self.holding.layout.members.union(*(spread.ranks for spread in self.holding.spreads))

    def equals(self, other: Member) -> bool:
        """Return whether shape, dtype and values are equal, as far as values exist."""
        if None in (self.value[2], other.value[2]):
            return self.value[:2] == other.value[:2]
        return self.value == other.value


@dataclass
class Instance:
    """One parameter, with the ranks that hold a part or a replica of it according to its layout.

    Args:
        members: holdings, by rank.
    """

    members: list[Member] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name on the first rank."""
        return self.members[0].name

    @cached_property
    def ranks(self) -> Ranks:
        """Global ranks of the members."""
        return tuple(sorted({member.rank for member in self.members}))

    @cached_property
    def trainable(self) -> bool:
        """True if some rank computes a gradient of it."""
        return any(member.holding.trainable for member in self.members)

    @cached_property
    def pieces(self) -> dict[Any, list[Member]]:
        """Members that hold each piece. Empty pieces are left out, unless there are no others."""
        pieces: dict[Any, list[Member]] = {}
        for member in self.members:
            if member.holding.num_elements:
                pieces.setdefault(member.piece, []).append(member)
        return pieces or {self.members[0].piece: self.members}

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        shape = list(self.members[0].holding.whole)
        first = self.members[0].holding
        for dim in {dim for dim, _ in first.cuts if dim is not None}:
            # Pieces of one parameter can differ in length along the dim that was cut.
            lengths = {
                tuple(coordinate for d, coordinate in member.holding.cuts if d == dim): member.holding.whole[dim]
                for member in self.members
                if len(member.holding.whole) == len(shape)
            }
            shape[dim] = sum(lengths.values())
        return tuple(shape)

    @cached_property
    def num_elements(self) -> int:
        """Number of elements of the parameter, each once."""
        if self.members[0].holding.box is not None and not self.members[0].holding.cuts:
            return math.prod(self.members[0].holding.whole)
        return sum(members[0].holding.num_elements for members in self.pieces.values())

    @property
    def counted_elements(self) -> Fraction:
        """Number of elements that the norm counts. An element that counts twice adds 2."""
        return sum((member.weight * member.holding.num_elements for member in self.members), Fraction())

    @property
    def counted_codes(self) -> Fraction:
        """Sum of the probe over all ranks, as the norm counts it."""
        return sum((member.weight * member.holding.code_sum for member in self.members), Fraction())

    @cached_property
    def expected_codes(self) -> int:
        """Sum of the probe if every element counts once."""
        if self.members[0].holding.box is not None and not self.members[0].holding.cuts:
            return sum_of_codes(self.num_elements)
        return sum(members[0].holding.code_sum for members in self.pieces.values())

    @cached_property
    def is_assumed(self) -> bool:
        """True if ranks hold replicas that no layout describes."""
        return any(not one.declares(other.rank) for one, *others in self.pieces.values() for other in others)

    @cached_property
    def is_informative(self) -> bool:
        """True if its values are not constant, so that equal values on several ranks prove something."""
        return any(member.holding.is_informative for member in self.members)

    @cached_property
    def num_components(self) -> int:
        """Number of separate norms that the parameter counts in."""
        return len({member.component for member in self.members})


def find_instances(by_rank: Mapping[int, Facts], component_of: Mapping[int, Ranks]) -> list[Instance]:
    """Join holdings that are parts or replicas of one parameter, by the layouts that the engine counts by.

    Args:
        by_rank: facts of every rank.
        component_of: ranks whose norm each rank takes part in.

    Returns:
        The parameters, in the order of the ranks.
    """
    members = {
        (rank, i): _member(rank, i, holding, facts, component_of[rank])
        for rank, facts in by_rank.items()
        for i, holding in enumerate(facts.holdings)
    }
    root = {key: key for key in members}

    def find(key: Key) -> Key:
        while root[key] != key:
            root[key] = key = root[root[key]]
        return key

    def join(one: Key, two: Key) -> None:
        low, high = sorted((find(one), find(two)))
        root[high] = low

    # 1. Along the axes of `split_over=` ranks hold different parameters, unless the layout cuts them there. Ranks that
    # no axis separates hold the same parameters.
    buckets: dict[Any, Key] = {}
    for key, member in members.items():
        bucket = (member.component, member.holding.name, member.coordinates)
        join(buckets.setdefault(bucket, key), key)
    # 2. The ranks of a mesh hold parts of one parameter.
    positions = {rank: {h.name: i for i, h in enumerate(facts.holdings)} for rank, facts in by_rank.items()}
    for key, member in members.items():
        for group in member.holding.layout.groups:
            join(buckets.setdefault((group, member.holding.name), key), key)
    # 3. A parameter that stages share can have different names on them. Parameters without a partner of the same name
    # are paired in order.
    _join_renamed(members, positions, join)
    instances: dict[Key, Instance] = {}
    for key in sorted(members):
        instances.setdefault(find(key), Instance()).members.append(members[key])
    return list(instances.values())


def _member(rank: int, position: int, holding: Holding, facts: Facts, component: Ranks) -> Member:
    replicas = num_replicas(len(component), holding.layout, facts.axes)
    weight = Fraction() if math.isinf(replicas) else 1 / Fraction(replicas).limit_denominator(10**6)
    axes = zip(facts.axes, holding.layout.split, holding.layout.cut, strict=True)
    coordinates = (axis.ranks.index(rank) if split and not cut else None for axis, split, cut in axes)
    return Member(rank, position, holding, component, weight, tuple(coordinates))


def _join_renamed(members: Mapping[Key, Member], positions: Mapping[int, Mapping[str, int]], join: Any) -> None:
    unpaired: dict[Ranks, dict[int, list[int]]] = {}
    for (rank, i), member in members.items():
        for group in member.holding.layout.groups:
            others: Sequence[int] = [other for other in group if other != rank]
            if "annotate_" in member.holding.source and not any(
                member.holding.name in positions.get(other, {}) for other in others
            ):
                unpaired.setdefault(group, {}).setdefault(rank, []).append(i)
    for by_rank in unpaired.values():
        first, *others = by_rank
        for other in others:
            for i, j in zip(by_rank[first], by_rank[other], strict=False):
                join((first, i), (other, j))
