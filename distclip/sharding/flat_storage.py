"""Move gradients into few storages, so that a norm reads one long tensor instead of many."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .dtensor import is_dtensor, with_local
from .shard import ShardInfo, ShardInfos, Shards

__all__ = ["FlatStorage"]

_ALIGNMENT = 64
"""Alignment of each gradient in bytes: a cache line, and at least the width of any vector load."""


class FlatStorage:
    """One storage for all gradients of a dtype, a device and a number of replicas (`flat_grads=True`).

    Args:
        tensors: parameters that have a gradient.
        shards: shards of these gradients, in the same order.
        read_shards: function that reads the shards again.
    """

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor], shards: Shards, read_shards: Callable[[], Shards]) -> None:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, (tensor, shard) in enumerate(zip(tensors, shards, strict=True)):
            # Gradients that already share a storage (DDP's buckets, FSDP's units, Megatron's buffers) stay there,
            # because its owner relies on it.
            if tensor.grad is not None and not shard.partial_sums and _owns_storage(shard.grad):
                kind = (shard.grad.device, shard.grad.dtype, shard.num_replicas, shard.replicas)
                groups.setdefault(kind, []).append(i)
        flats = [_move_grads(tensors, shards, positions) for positions in groups.values()]
        in_flats = {i for positions in groups.values() for i in positions}
        shards = read_shards()
        self._infos, self._views = shards.infos, shards.grads
        others = shards.where([i for i in range(len(shards)) if i not in in_flats])
        infos = [
            ShardInfo(f"{len(positions)} gradients", num_replicas=kind[2], replicas=kind[3])
            for kind, positions in groups.items()
        ]
        self._merged = Shards(ShardInfos((*infos, *others.infos)), [*flats, *others.grads])
        self._warned = False

    def merge(self, shards: Shards) -> Shards:
        """Return the shards with `merged` set, unless the gradients have been replaced since."""
        if shards.infos is self._infos and all(map(is_, shards.grads, self._views)):
            return Shards(shards.infos, shards.grads, self._merged)
        if not self._warned:
            self._warned = True
            warnings.warn(
                "flat_grads=True: the gradients are no longer views of the flat storage, so that each of them is read "
                "separately. Use optimizer.zero_grad(set_to_none=False), which keeps the views, or omit flat_grads.",
                stacklevel=2,
            )
        return shards


def _owns_storage(grad: Tensor) -> bool:
    """Return whether a dense gradient is the only tensor in its storage."""
    dense = grad.layout is torch.strided and bool(torch.ops.aten.is_non_overlapping_and_dense(grad))
    return dense and grad.untyped_storage().nbytes() == grad.nbytes > 0


def _move_grads(tensors: Sequence[Tensor], shards: Shards, positions: Sequence[int]) -> Tensor:
    """Copy gradients into a new storage, and make its views the gradients of the parameters."""
    grads = [shards.grads[i] for i in positions]
    step = max(1, _ALIGNMENT // grads[0].element_size())
    lengths = [-(-grad.numel() // step) * step for grad in grads]
    # Zeros between the gradients change no norm.
    flat = torch.zeros(sum(lengths), dtype=grads[0].dtype, device=grads[0].device)
    for i, grad, piece in zip(positions, grads, torch.split(flat, lengths), strict=True):
        # The view has the strides of the gradient, because the optimizer may rely on its memory format.
        view = piece.as_strided(grad.size(), grad.stride())
        view.copy_(grad)
        old = tensors[i].grad
        tensors[i].grad = with_local(old, view) if old is not None and is_dtensor(old) else view
    return flat
