"""Read the shards of all ranks that torch's LocalTensorMode simulates in this process.

A LocalTensor holds the local tensors of all ranks. The program runs once, as if it were the lowest rank, and every
shard of that rank stands for those of all ranks. So a call reads the shards of all ranks, adds up those of its
component, and scales all of them. No message is sent.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..comm.ranks import Ranks, shifted
from ..errors import LayoutError
from .dtensor import dtensor_rows, is_dtensor
from .shard import PartialSum, ShardInfo, ShardInfos, Shards
from .split_over import mesh_ranks

__all__ = ["has_local_tensors", "on_all_ranks", "ranks_of", "sum_on_all_ranks"]


def has_local_tensors(tensors: Iterable[Tensor]) -> bool:
    """Return whether any of the tensors is a LocalTensor."""
    module: Any = sys.modules.get("torch.distributed._local_tensor")
    return module is not None and module.LocalTensor in set(map(type, tensors))


def on_all_ranks(shards: Shards, tensors: Sequence[Tensor], component: Ranks | None) -> Shards:
    """Return the shards of all simulated ranks.

    Args:
        shards: of one rank, some of which are LocalTensors.
        tensors: the parameters or gradients that the shards belong to, in the same order.
        component: ranks of the call. The shards of all other ranks count as replicas of its shards. None if each rank
            calls alone, which measures nothing.

    Returns:
        The shards of all ranks. Those of one parameter are next to each other, in the order of the ranks.

    Raises:
        LayoutError: ranks outside of the component hold other values than the corresponding ranks within it.
    """
    infos: list[ShardInfo] = []
    locals_: list[Tensor] = []
    for shard, tensor in zip(shards, tensors, strict=True):
        by_rank = ranks_of(shard.grad)
        # This is also the key of a cache, because most parameters have the same ranks.
        ranks = tuple(by_rank)
        # In one process no replica can have changed in communication.
        info = replace(shard.info, replicas=())
        if not by_rank:
            infos.append(info)
            locals_.append(shard.grad)
            continue
        counterparts = _counterparts(component or ranks, ranks)
        for rank, local in by_rank.items():
            own, counterpart = info, counterparts[rank]
            if shard.rows is not None and is_dtensor(tensor):
                # The meshes of the other ranks are shifts of the mesh of some ranks.
                on_mesh = _counterparts(mesh_ranks(tensor.device_mesh), ranks)
                own = replace(own, rows=dtensor_rows(tensor, rank, on_mesh[rank]))
            if counterpart != rank:
                # This shard does not count in the norm, but is scaled like its counterpart.
                own = replace(own, num_replicas=inf)
                if not local.equal(by_rank[counterpart]) and not local.isnan().any():
                    raise LayoutError(
                        f"{shard.name} has different gradients on ranks {counterpart} and {rank}, which share no mesh "
                        "and so have a norm each. LocalTensorMode runs the program once for both. Use LocalTensorMode "
                        "with the ranks of one of them, or pass split_over= with the axis between them."
                    )
            infos.append(own)
            locals_.append(local)
    return Shards(ShardInfos(infos), locals_)


def sum_on_all_ranks(shards: Shards) -> Shards:
    """Return the sums of the partial gradients of all simulated ranks.

    Args:
        shards: LocalTensors, each of which needs sums.
    """
    return Shards.of(replace(shard, grad=_sum(shard.grad, shard.partial_sums), partial_sums=()) for shard in shards)


def _sum(local: Tensor, sums: Sequence[PartialSum]) -> Tensor:
    dtype = torch.promote_types(local.dtype, torch.float32)
    by_rank = {rank: summand.to(dtype) for rank, summand in ranks_of(local).items()}
    for one in sorted(sums, key=lambda one: one.axis):
        for line in shifted(one.ranks, by_rank):
            total = torch.stack([by_rank[rank] for rank in line]).sum(0)
            by_rank |= dict.fromkeys(line, total / len(line) if one.mean else total)
    # The class is not imported, because most programs do not use it.
    cls: Any = type(local)
    total_on_ranks: Tensor = cls(by_rank)
    return total_on_ranks


def ranks_of(tensor: Tensor) -> dict[int, Tensor]:
    """Return the local tensors of a LocalTensor by rank, or nothing for any other tensor."""
    if not has_local_tensors([tensor]):
        return {}
    local: Any = tensor
    return dict(sorted(local._local_tensors.items()))


@lru_cache(maxsize=64)
def _counterparts(component: Ranks, ranks: Ranks) -> dict[int, int]:
    """Return for each rank the rank of the component with the same coordinates."""
    found = {rank: rank for rank in component}
    for line in shifted(component, ranks):
        found |= dict(zip(line, component, strict=True))
    if missing := sorted(set(ranks) - found.keys()):
        raise LayoutError(
            f"ranks {missing[:8]} are simulated, and share no mesh with ranks {list(component)} or any shift of them. "
            "Use LocalTensorMode with the ranks of the meshes."
        )
    return found
