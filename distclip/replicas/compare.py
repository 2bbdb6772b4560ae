"""Find the replicas that differ, from descriptions that all ranks have gathered.

The all-reduce of a step only shows that some replica differs. Descriptions, one for each replica on each rank, are
gathered only in such a step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..comm.ranks import Ranks, rank_list

__all__ = ["Comparison", "Kind", "ReplicaDifference", "ReplicaInfo", "compare_replicas"]

Kind: TypeAlias = Literal["gradient", "parameter"]

_TOLERANCE = 1e-6
"""Largest relative difference of power sums that counts as a rounding error, where each rank computes its replica."""


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """Description of one replica on one rank, for the other ranks.

    Args:
        kind: of the tensor.
        name: of the parameter on this rank.
        shape: of the local tensor.
        ranks: global ranks that hold a replica, in an order that all of them share.
        is_exact: whether all replicas must have the same bits, see `ReplicaGroup`.
        num_bytes: of the local tensor.
        checksum: of the local tensor, see `norms.kernels`.
        power: Σx² of the local tensor.
        split_along: axes of `split_over=` that contain several of `ranks`. It is a contradiction if ranks along one
            axis hold both different tensors and replicas.
    """

    kind: Kind
    name: str
    shape: tuple[int, ...]
    ranks: Ranks
    is_exact: bool
    num_bytes: int
    checksum: int
    power: float
    split_along: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaDifference:
    """A tensor whose replicas differ between ranks.

    Args:
        kind: "gradient" or "parameter".
        name: parameter name.
        ranks: global ranks whose replica differs from that of the majority. All ranks of `group` if there is no
            majority.
        group: global ranks that hold a replica.
        norm: largest relative difference between a norm on `ranks` and that of the majority. Without a majority, the
            difference from the norm on the first rank.
        bit: number of the bit that differs, if it is only one. 0 is the last bit of the significand.
        is_exact: whether the replicas must have the same bits, because one collective has written all of them.
        cause: the most likely cause, in words, and what to do.
        num_bytes: of one replica.
        names: name of the parameter on each rank of `group`. Empty where the tensor is missing.
        split_along: axes of `split_over=` that declare the replicas to be different tensors.

    >>> names = ("head.weight",) * 4
    >>> print(ReplicaDifference("gradient", "head.weight", (2,), (0, 1, 2, 3), 0.25, 30, True, "", 16, names))
    the gradient of head.weight on rank 2 differs from that on ranks 0, 1, 3 (norm by 25 %, bit 30)
    >>> print(ReplicaDifference("gradient", "bias", (1,), (0, 1), float("inf"), None, True, "", 16, ("bias",) * 2))
    the gradient of bias on rank 1 differs from that on rank 0 (a norm is not finite)
    """

    kind: Kind
    name: str
    ranks: Ranks
    group: Ranks
    norm: float
    bit: int | None
    is_exact: bool
    cause: str
    num_bytes: int
    names: tuple[str, ...]
    split_along: tuple[str, ...] = ()

    @property
    def has_majority(self) -> bool:
        """True if more than half of the replicas are equal."""
        return len(self.ranks) < len(self.group)

    def __str__(self) -> str:
        size = f"norm by {100 * self.norm:.2g} %" if math.isfinite(self.norm) else "a norm is not finite"
        if self.bit is not None:
            size += f", bit {self.bit}"
        others = [rank for rank in self.group if rank not in self.ranks]
        if not others:
            return f"the {self.kind} of {self.name} differs between {rank_list(self.group)} ({size})"
        on = f"on {rank_list(self.ranks)} {'differs' if len(self.ranks) == 1 else 'differ'}"
        return f"the {self.kind} of {self.name} {on} from that on {rank_list(others)} ({size})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of comparing all replicas.

    Args:
        differences: tensors whose replicas differ, gradients first.
        rounded: groups of ranks that have computed their replicas themselves, and whose replicas differ only by
            rounding errors.
    """

    differences: tuple[ReplicaDifference, ...]
    rounded: frozenset[Ranks]


def compare_replicas(by_rank: Mapping[int, Sequence[ReplicaInfo]]) -> Comparison:
    """Compare the replicas of all ranks.

    Args:
        by_rank: replicas of every rank, by global rank, in the order of its parameters.

    Returns:
        The same on every rank.
    """
    groups = dict.fromkeys((info.kind, info.ranks) for infos in by_rank.values() for info in infos)
    found: list[ReplicaDifference] = []
    rounded: set[Ranks] = set()
    for kind, ranks in sorted(groups, key=lambda group: group[0]):
        replicas = _Replicas.of(kind, ranks, by_rank)
        if replicas.is_exact:
            found += replicas.differences(replicas.names)
            continue
        large = [name for name in replicas.names if replicas.spread(name) > _TOLERANCE]
        small = [name for name in replicas.names if name not in large and replicas.differ(name)]
        found += replicas.differences(large)
        if len(small) == 1 and not large and replicas.flipped_bit(small[0]) is not None:
            # A single bit is not a rounding error, which would affect many elements of many tensors.
            found += replicas.differences(small)
        elif small:
            rounded.add(ranks)
    return Comparison(tuple(found), frozenset(rounded))


class _Replicas:
    """Replicas of one kind on one group of ranks.

    Args:
        kind: of the tensors.
        ranks: of the group.
        tensors: replicas by rank, of each tensor. A rank without a gradient has none.
        is_exact: see `ReplicaInfo`.
        cause: the most likely cause of a difference.
    """

    def __init__(
        self, kind: Kind, ranks: Ranks, tensors: dict[str, dict[int, ReplicaInfo]], is_exact: bool, cause: str
    ) -> None:
        self.kind, self.ranks, self.tensors, self.is_exact, self.cause = kind, ranks, tensors, is_exact, cause
        self.names = list(tensors)

    @classmethod
    def of(cls, kind: Kind, ranks: Ranks, by_rank: Mapping[int, Sequence[ReplicaInfo]]) -> _Replicas:
        """Collect the replicas of a group, and match the tensors of its ranks."""
        lists = {rank: _select(by_rank.get(rank, ()), kind, ranks) for rank in ranks}
        tensors = _match(lists)
        is_exact = all(info.is_exact for infos in lists.values() for info in infos)
        cause = "Check the memory and the network of these ranks."
        if not is_exact:
            parameters = _match({rank: _select(by_rank.get(rank, ()), "parameter", ranks) for rank in ranks})
            cause = _likely_cause(ranks, tensors, parameters)
        return cls(kind, ranks, tensors, is_exact, cause)

    def checksum(self, name: str, rank: int) -> int:
        """Return the checksum of a replica. A missing gradient counts as zeros."""
        info = self.tensors[name].get(rank)
        return 0 if info is None else info.checksum

    def differ(self, name: str) -> bool:
        """Return whether the replicas of a tensor differ."""
        return len({self.checksum(name, rank) for rank in self.ranks}) > 1

    def spread(self, name: str) -> float:
        """Return the relative difference of the largest and the smallest power sum."""
        infos = self.tensors[name]
        powers = [infos[rank].power if rank in infos else 0.0 for rank in self.ranks]
        # A comparison with NaN is false, so max and min could return any of the numbers.
        numbers = [power for power in powers if power == power]
        if not self.differ(name) or not numbers:
            return 0.0
        return _relative(max(numbers), min(numbers)) if len(numbers) == len(powers) else float("inf")

    def majority(self, name: str) -> int | None:
        """Return the checksum that more than half of the ranks have, or None."""
        ((checksum, count),) = Counter(self.checksum(name, rank) for rank in self.ranks).most_common(1)
        return checksum if 2 * count > len(self.ranks) else None

    def flipped_bit(self, name: str) -> int | None:
        """Return the only bit in which the replicas differ, or None."""
        checksums = Counter(self.checksum(name, rank) for rank in self.ranks)
        if len(checksums) != 2:
            return None
        one, two = checksums
        change = min((one - two) % 2**32, (two - one) % 2**32)
        return change.bit_length() - 1 if change & (change - 1) == 0 else None

    def differences(self, names: Iterable[str]) -> list[ReplicaDifference]:
        """Describe the tensors among `names` whose replicas differ."""
        return [self._difference(name) for name in names if self.differ(name)]

    def _difference(self, name: str) -> ReplicaDifference:
        infos, majority = self.tensors[name], self.majority(name)
        deviating = tuple(rank for rank in self.ranks if majority is None or self.checksum(name, rank) != majority)
        others = [rank for rank in self.ranks if rank not in deviating]
        powers = {rank: infos[rank].power if rank in infos else 0.0 for rank in self.ranks}
        reference = powers[others[0] if others else self.ranks[0]] ** 0.5
        split_along = tuple(dict.fromkeys(axis for info in infos.values() for axis in info.split_along))
        return ReplicaDifference(
            self.kind,
            name,
            deviating,
            self.ranks,
            max(_relative(powers[rank] ** 0.5, reference) for rank in deviating),
            self.flipped_bit(name),
            self.is_exact,
            self.cause,
            max(info.num_bytes for info in infos.values()),
            tuple(infos[rank].name if rank in infos else "" for rank in self.ranks),
            split_along,
        )


def _select(infos: Sequence[ReplicaInfo], kind: Kind, ranks: Ranks) -> list[ReplicaInfo]:
    return [info for info in infos if info.kind == kind and info.ranks == ranks]


def _match(lists: Mapping[int, Sequence[ReplicaInfo]]) -> dict[str, dict[int, ReplicaInfo]]:
    """Match the tensors of several ranks: by name, or by order where tied parameters have other names."""
    names = {rank: [info.name for info in infos] for rank, infos in lists.items()}
    shapes = {tuple(info.shape for info in infos) for infos in lists.values()}
    by_order = len(shapes) == 1 and len({frozenset(own) for own in names.values()}) > 1
    first = next(iter(names.values()), [])
    matched: dict[str, dict[int, ReplicaInfo]] = {}
    for rank, infos in lists.items():
        for i, info in enumerate(infos):
            matched.setdefault(first[i] if by_order else info.name, {})[rank] = info
    return matched


def _likely_cause(
    ranks: Ranks,
    gradients: Mapping[str, Mapping[int, ReplicaInfo]],
    parameters: Mapping[str, Mapping[int, ReplicaInfo]],
) -> str:
    """Return why tensors that are only assumed to be replicas differ, and what to do."""
    on = rank_list(ranks)
    for by_rank in parameters.values():
        if len({(info.shape, info.checksum) for info in by_rank.values()}) > 1 or len(by_rank) < len(ranks):
            return (
                f"The parameters differ between {on} too, so these are probably different parameters. Pass the axis "
                "along these ranks as split_over=, or annotate_ the parameters. If they are replicas, give all ranks "
                "the same initial values."
            )
    equal = [
        name
        for name, by_rank in gradients.items()
        if len({info.checksum for info in by_rank.values()}) == 1 and len(by_rank) == len(ranks)
    ]
    if equal:
        return (
            f"The parameters are equal on {on}, and so are other gradients, for example that of {equal[0]}. Probably "
            "an all-reduce of these gradients is missing. Sum them over these ranks before clipping."
        )
    return (
        f"The parameters are equal on {on}, and all gradients differ. Probably these ranks have seen different data, "
        "and their gradients were not reduced. Reduce them over these ranks before clipping (DistributedDataParallel "
        "does, except under no_sync), or pass the same data to these ranks."
    )


def _relative(one: float, two: float) -> float:
    """Return |one − two| / |two|, or infinity where this is not a number."""
    if one == two:
        return 0.0
    ratio = abs(one - two) / abs(two) if two else float("inf")
    return ratio if ratio == ratio else float("inf")
