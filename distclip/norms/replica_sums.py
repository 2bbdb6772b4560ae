"""Add up the checksums of replicas so that their weighted sum over ranks is 0 if all replicas are equal.

Every rank adds up the checksums of the tensors that a replica group holds, modulo 2^32, and multiplies the sum by the
weight of its replica (`replica_weight`). The weights of a group add up to 0. So the one all-reduce of a step shows,
in one more number, that all replicas are equal. If the number is not 0, a gather finds the tensor and the rank.

Replicas that each rank has computed itself may differ by rounding errors. Once they do, their checksums are replaced by
the logarithm of their power sums, rounded down to steps of 5e-6.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Collection, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from .. import devices
from ..comm import Comm, global_ranks
from ..comm.ranks import Ranks
from ..devices import device_constant
from ..sharding.replicas import ReplicaGroup, replica_weight
from ..sharding.shard import ShardInfos

__all__ = ["ReplicaSums", "add_sums", "any_differ", "sum_by_group", "to_host", "weighted_sum"]

ReplicaSums: TypeAlias = dict[ReplicaGroup, Tensor | int]
"""Sum of checksums by replica group, a number or 0-d int64, and not reduced modulo 2^32 yet."""

_FEW = 256
"""Number of checksums up to which the host adds faster than an operator."""

_MASK = 2**32 - 1

_STEPS_PER_DOUBLING = 1 << 17
"""Number of steps of a rounded logarithm for a factor of 2 in the power sum."""


def sum_by_group(
    checksums: Tensor, infos: ShardInfos, powers: Tensor | None = None, rounded: Collection[Ranks] = ()
) -> ReplicaSums:
    """Add up checksums by replica group.

    Args:
        checksums: (n,) int64.
        infos: metadata of the n tensors.
        powers: (n,) power sums of the tensors. None leaves the groups in `rounded` out.
        rounded: ranks of the groups whose replicas differ by rounding errors.

    Host syncs: none.
    """
    sums: ReplicaSums = {}
    by_host = len(checksums) <= _FEW and devices.host_reads_free(checksums.device)
    numbers = checksums.tolist() if by_host else []
    for group, positions in infos.by_replica_group.items():
        if not group.is_exact and group.ranks in rounded:
            if powers is not None:
                total = _select(powers, positions).sum()
                steps = (total.log2() * _STEPS_PER_DOUBLING).floor()
                # A power sum of 0 or infinity has no finite logarithm, and is not compared.
                sums[group] = torch.where(steps.isfinite(), steps, 0.0).to(torch.int64)
        elif by_host:
            has_all = len(positions) == len(numbers)
            sums[group] = sum(numbers if has_all else map(numbers.__getitem__, positions))
        else:
            sums[group] = _select(checksums, positions).sum()
    return sums


def _select(values: Tensor, positions: tuple[int, ...]) -> Tensor:
    if len(positions) == len(values):
        return values
    return values[device_constant(positions, values.device, torch.int64)]


def add_sums(one: ReplicaSums, two: ReplicaSums) -> ReplicaSums:
    """Add the sums of further tensors, on any device, to those of the same groups."""
    if not two:
        return one
    sums = dict(one)
    for group, value in two.items():
        sums[group] = _add(sums[group], value) if group in sums else value
    return sums


def _add(one: Tensor | int, two: Tensor | int) -> Tensor | int:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one + two.to(one.device)
    return one + two


def weighted_sum(sums: ReplicaSums, comm: Comm) -> Tensor | int:
    """Return this rank's summand. Those of all ranks add up to 0 if their replicas are equal.

    Args:
        sums: of this rank.
        comm: the ranks that add up their summands.

    Returns:
        An integer. Every sum of summands of some ranks is below 2^51 in absolute value.

    Host syncs: none on an accelerator.
    """
    total: Tensor | int = 0
    rank = global_ranks(comm)[comm.rank]
    for group, value in sums.items():
        weight, factor = _weight(group.ranks, rank, comm.size), _factor(group)
        on_host = not isinstance(value, Tensor) or devices.host_reads_free(value.device)
        # An overflow of int64 does not change the low bits.
        total = total + weight * (((int(value) if on_host else value) & _MASK) * factor & _MASK)
    return total


def to_host(sums: ReplicaSums) -> dict[ReplicaGroup, int]:
    """Return the sums as numbers, modulo 2^32. Host syncs: one for each group."""
    return {group: int(value) & _MASK for group, value in sums.items()}


def any_differ(by_rank: Mapping[int, Mapping[ReplicaGroup, int]]) -> bool:
    """Return whether the sums of some group differ between its ranks.

    Args:
        by_rank: sums of every rank on the host, by global rank.
    """
    groups = {group for sums in by_rank.values() for group in sums}
    # A rank without the gradients of a group has added 0.
    return any(len({by_rank.get(rank, {}).get(group, 0) for rank in group.ranks}) > 1 for group in groups)


@functools.lru_cache(maxsize=256)
def _factor(group: ReplicaGroup) -> int:
    """Return an odd number of the group, so that equal differences in two groups do not cancel."""
    return zlib.crc32(repr(group).encode()) | 1


@functools.lru_cache(maxsize=256)
def _weight(ranks: Ranks, rank: int, world_size: int) -> int:
    return replica_weight(ranks.index(rank), len(ranks), world_size)
