"""Describe this rank's replicas to the other ranks, on a step whose all-reduce shows that some replica differs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..comm import Comm, global_ranks
from ..norms.kernels import power_sums
from ..norms.per_tensor import PerTensorChecksums
from ..sharding.shard import ShardInfo, ShardInfos, Shards
from ..sharding.table import ShardTable
from .compare import Comparison, Kind, ReplicaInfo, compare_replicas
from .scrubber import scrubbed_positions

__all__ = ["describe_checksums", "describe_replicas", "gather_differences"]


def gather_differences(infos: Sequence[ReplicaInfo], comm: Comm) -> Comparison:
    """Gather the descriptions of all ranks and compare them.

    Collectives: one gather over `comm`. Host syncs: none.
    """
    return compare_replicas(dict(zip(global_ranks(comm), comm.gather_objects(list(infos)), strict=True)))


def describe_replicas(table: ShardTable, gradients: Shards) -> list[ReplicaInfo]:
    """Describe the replicas of this rank: its gradients, and all parameters.

    Args:
        table: of this rank.
        gradients: of this rank.

    Collectives: none. Host syncs: one for the gradients and one for the parameters.
    """
    positions = sorted({i for members in gradients.infos.by_replica_group.values() for i in members})
    return _measure("gradient", gradients.where(positions), table) + _describe_parameters(table)


def describe_checksums(table: ShardTable, checksums: Sequence[PerTensorChecksums]) -> list[ReplicaInfo]:
    """Describe the replicas of this rank like `describe_replicas`, from the checksums of gradients.

    Args:
        table: of this rank.
        checksums: of its gradients.
    """
    described = []
    for infos, powers, words in checksums:
        for info, power, checksum in zip(infos, powers.tolist(), words.tolist(), strict=True):
            described += _describe("gradient", info, (), 0, checksum, power, table)
    return described + _describe_parameters(table)


def _describe_parameters(table: ShardTable) -> list[ReplicaInfo]:
    if table.are_gradients:
        return []
    positions, infos = scrubbed_positions(table), table.metadata.infos(table.holders)
    shards = Shards(ShardInfos(infos[i] for i in positions), table.local_weights(positions))
    return _measure("parameter", shards, table)


def _measure(kind: Kind, shards: Shards, table: ShardTable) -> list[ReplicaInfo]:
    if not shards:
        return []
    powers, _, words = power_sums(shards.grads, 2.0, torch.device("cpu"), with_checksums=True)
    assert words is not None
    described = []
    for shard, power, checksum in zip(shards, powers.tolist(), words.tolist(), strict=True):
        num_bytes = shard.grad.numel() * shard.grad.element_size()
        described += _describe(kind, shard.info, tuple(shard.grad.shape), num_bytes, checksum, power, table)
    return described


def _describe(
    kind: Kind,
    info: ShardInfo,
    shape: tuple[int, ...],
    num_bytes: int,
    checksum: int,
    power: float,
    table: ShardTable,
) -> list[ReplicaInfo]:
    described = []
    for group in info.replicas:
        split_along = tuple(map(str, table.contradictory_axes(info.name, group)))
        described.append(
            ReplicaInfo(kind, info.name, shape, group.ranks, group.is_exact, num_bytes, checksum, power, split_along)
        )
    return described
