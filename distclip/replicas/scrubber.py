"""Compare a part of the parameters in every step, so that a flipped bit in a parameter is found."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

import torch
from torch import Tensor, nn

from ..comm.ranks import Ranks
from ..norms.kernels import checksums
from ..norms.replica_sums import ReplicaSums, sum_by_group
from ..sharding.shard import ShardInfos
from ..sharding.table import ShardTable

__all__ = ["NUM_PARTS", "Scrubber", "scrubbed_positions"]

NUM_PARTS = 64
"""Number of steps in which all parameters are compared once."""

_PARAMETER = nn.Parameter


class Scrubber:
    """Computes checksums of one part of the replicated parameters of a rank in each step.

    Args:
        table: of this rank.
    """

    def __init__(self, table: ShardTable) -> None:
        self._table = table

    def sums(self, step: int, rounded: Collection[Ranks] = ()) -> ReplicaSums:
        """Return the checksums of the parameters that a step compares, by replica group.

        Args:
            step: 1-based index of the clipper call, the same on every rank.
            rounded: ranks of the groups whose replicas differ by rounding errors, and are left out.

        Collectives: none. Host syncs: none.
        """
        # All parts are computed in the first step, even if the part of this step is empty.
        infos, positions, ranges = self._columns[step % NUM_PARTS]
        if not infos:
            return {}
        tensors = self._table.local_weights(positions)
        return sum_by_group(checksums(tensors, tensors[0].device, ranges), infos, None, rounded)

    @cached_property
    def _parts(self) -> list[list[tuple[int, tuple[int, int]]]]:
        """Tensors of each part: index in the table, range of elements in the order of the memory."""
        positions = scrubbed_positions(self._table)
        lengths = [tensor.numel() for tensor in self._table.local_weights(positions)]
        total, begin = sum(lengths), 0
        bounds = [total * part // NUM_PARTS for part in range(NUM_PARTS + 1)]
        parts: list[list[tuple[int, tuple[int, int]]]] = [[] for _ in range(NUM_PARTS)]
        first = 0
        for i, length in zip(positions, lengths, strict=True):
            while bounds[first + 1] <= begin and first < NUM_PARTS - 1:
                first += 1
            for part in range(first, NUM_PARTS):
                if bounds[part] >= begin + length:
                    break
                start, stop = max(bounds[part], begin) - begin, min(bounds[part + 1], begin + length) - begin
                if start < stop:
                    parts[part].append((i, (start, stop)))
            begin += length
        return parts

    @cached_property
    def _columns(self) -> list[tuple[ShardInfos, list[int], list[tuple[int, int]]]]:
        """Metadata, positions and ranges of the tensors of each part."""
        infos = self._table.metadata.infos(self._table.holders)
        return [
            (ShardInfos(infos[i] for i, _ in pieces), [i for i, _ in pieces], [elements for _, elements in pieces])
            for pieces in self._parts
        ]


def scrubbed_positions(table: ShardTable) -> list[int]:
    """Return the positions of the parameters in a table that have replicas."""
    infos = table.metadata.infos(table.holders)
    held = {i for members in infos.by_replica_group.values() for i in members}
    # An integration passes tensors instead of parameters, and they may have no memory.
    local = table.local_weights(range(len(infos)))
    return [
        i
        for i, (tensor, own) in enumerate(zip(table.tensors, local, strict=True))
        if i in held
        and isinstance(tensor, _PARAMETER)
        and type(own) in (Tensor, nn.Parameter)
        and own.layout is torch.strided
        and (own.is_floating_point() or own.is_complex())
    ]
