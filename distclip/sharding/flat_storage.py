"""Gradients laid out as views of few storages, so that a norm is one read however many tensors there are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .dtensor import is_dtensor
from .shard import ShardInfo, ShardInfos, Shards

__all__ = ["Flattened"]

_ALIGNMENT = 64
"""Bytes: a cache line, and more than any vector load wants."""


class Flattened:
    """One storage for all gradients of a dtype, device and number of copies that have a storage of their own each.

    Whatever lies in a storage together with others already (DDP's buckets, FSDP's units, Megatron's buffers) is left
    there: its owner would miss it.

    Args:
        tensors: parameters that have a gradient.
        shards: of these gradients, in the same order.
        find: looks the shards up again.
    """

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor], shards: Shards, find: Callable[[], Shards]) -> None:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, (tensor, shard) in enumerate(zip(tensors, shards, strict=True)):
            if tensor.grad is not None and not shard.partial_sums and _is_alone(shard.grad):
                groups.setdefault((shard.grad.device, shard.grad.dtype, shard.num_replicas), []).append(i)
        flats = [_laid_out(tensors, shards, chosen) for chosen in groups.values()]
        moved = {i for chosen in groups.values() for i in chosen}
        shards = find()
        self._places, self._views = shards.places, shards.grads
        rest = shards.where([i for i in range(len(shards)) if i not in moved])
        together = [ShardInfo(f"{len(chosen)} gradients", num_replicas=key[2]) for key, chosen in groups.items()]
        self._merged = Shards(ShardInfos((*together, *rest.places)), [*flats, *rest.grads])
        self._warned = False

    def of(self, shards: Shards) -> Shards:
        """The same shards, knowing how few they can be read as; as they are, if they do not lie here any more."""
        if shards.places is self._places and all(map(is_, shards.grads, self._views)):
            return Shards(shards.places, shards.grads, self._merged)
        if not self._warned:
            self._warned = True
            warnings.warn(
                "flat_grads=True: gradients do not lie where they were laid out, so that each of them is read for "
                "itself. Write optimizer.zero_grad(set_to_none=False), which keeps them, or leave flat_grads out.",
                stacklevel=2,
            )
        return shards


def _is_alone(grad: Tensor) -> bool:
    """Whether a dense gradient has a storage for itself."""
    dense = grad.layout is torch.strided and bool(torch.ops.aten.is_non_overlapping_and_dense(grad))
    return dense and grad.untyped_storage().nbytes() == grad.nbytes > 0


def _laid_out(tensors: Sequence[Tensor], shards: Shards, chosen: Sequence[int]) -> Tensor:
    """A new storage with copies of the chosen gradients, zeros between them, that parameters have as gradients now."""
    grads = [shards.grads[i] for i in chosen]
    step = max(1, _ALIGNMENT // grads[0].element_size())
    lengths = [-(-grad.numel() // step) * step for grad in grads]
    flat = torch.zeros(sum(lengths), dtype=grads[0].dtype, device=grads[0].device)
    for i, grad, piece in zip(chosen, grads, torch.split(flat, lengths), strict=True):
        view = piece.as_strided(grad.size(), grad.stride())
        view.copy_(grad)
        own = tensors[i].grad
        if own is not None and is_dtensor(own):
            from torch.distributed.tensor import DTensor

            view = DTensor.from_local(
                view, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
            )
        tensors[i].grad = view
    return flat
