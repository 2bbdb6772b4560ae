"""Put whole parameters and gradients together from the pieces of all ranks, and compute norms in float64."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from distclip import NormPolicy, reference
from distclip.sharding import name_tensors


@dataclass
class Piece:
    """The part of one parameter that this rank holds.

    Args:
        name: name of the parameter in the clipper.
        param: the parameter, with or without a gradient.
        key: equal on two ranks exactly if both hold parts of the same parameter.
        shape: shape of the whole parameter.
        at: for each local element of the parameter, its index in the flattened whole.
        grad_at: indices of the gradient's elements if they differ from `at`.
        part: coordinates along the axes on which the gradient is Partial.
        mean: factor of Partial gradients.
    """

    name: str
    param: Tensor
    key: Any
    shape: tuple[int, ...]
    at: Tensor
    grad_at: Tensor | None = None
    part: tuple[int, ...] = ()
    mean: float = 1.0


def whole_piece(name: str, param: Tensor, key: Any = None, part: tuple[int, ...] = ()) -> Piece:
    """Return the piece of a parameter that this rank holds entirely."""
    return Piece(name, param, key or name, tuple(param.shape), torch.arange(param.numel()), part=part)


def chunk_piece(name: str, param: Tensor, key: Any, dim: int, index: int, num_chunks: int) -> Piece:
    """Return the piece of a parameter that is one of `num_chunks` equal parts along a dim."""
    shape = list(param.shape)
    shape[dim] *= num_chunks
    at = torch.arange(math.prod(shape)).view(shape).chunk(num_chunks, dim)[index]
    return Piece(name, param, key, tuple(shape), at.reshape(-1))


def indices_of(local: Tensor, mesh: DeviceMesh, placements: Sequence[Any], shape: torch.Size) -> Tensor:
    """Return the index in the flattened whole of each local element of a DTensor."""
    placements = [Replicate() if p.is_partial() else p for p in placements]
    if all(p.is_replicate() or type(p) is Shard for p in placements):
        # This needs no communication: ranks that hold nothing do not call it.
        ids = torch.arange(shape.numel()).view(shape)
        return distribute_tensor(ids, mesh, placements, src_data_rank=None).to_local().reshape(-1)
    # Strided shards: label the local elements, let torch put the whole together, and find the labels in it.
    ids = torch.arange(local.numel()).view(local.shape) + (dist.get_rank() << 32)
    stride = torch.empty(shape, device="meta").stride()
    sharded = DTensor.from_local(ids, mesh, placements, run_check=False, shape=shape, stride=stride)
    labels = sharded.full_tensor().reshape(-1)
    at = (labels >> 32 == dist.get_rank()).nonzero().view(-1)
    return at[torch.argsort(labels[at])]


def dtensor_piece(name: str, param: DTensor, key: Any) -> Piece:
    """Return the piece of a DTensor, whose gradient may have other placements."""
    at = indices_of(param.to_local(), param.device_mesh, param.placements, param.shape)
    piece = Piece(name, param, key, tuple(param.shape), at)
    grad = param.grad
    if isinstance(grad, DTensor) and grad.placements != param.placements:
        mesh = grad.device_mesh
        piece.grad_at = indices_of(grad.to_local(), mesh, grad.placements, grad.shape)
        partial = [i for i, p in enumerate(grad.placements) if p.is_partial()]
        piece.part = tuple(mesh.get_local_rank(i) for i in partial)
        piece.mean = 1 / math.prod(mesh.size(i) for i in partial if grad.placements[i].reduce_op == "avg")
    return piece


def fsdp1_pieces(model: Any, names: dict[int, tuple[str, Any]]) -> dict[int, Piece]:
    """Return the slices of FSDP1 by the `id` of the parameter."""
    pieces = {}
    for wrapped in FullyShardedDataParallel.fsdp_modules(model):
        handle = wrapped._handle
        if handle is None or not handle.uses_sharded_strategy:
            continue
        flat, group = handle.flat_param, wrapped.process_group
        for i, param in enumerate(flat._params or (flat,)):
            lengths: list[int] = [0] * dist.get_world_size(group)
            dist.all_gather_object(lengths, param.numel(), group=group)
            shape = (sum(lengths),) if flat._params is None else tuple(flat._shapes[i])
            # A slice begins where that of the previous rank ends.
            begin = sum(lengths[: dist.get_rank(group)])
            name, key = names[id(param)]
            pieces[id(param)] = Piece(name, param, key, shape, torch.arange(begin, begin + param.numel()))
    return pieces


def ranks_by_axis(split_over: Any) -> Iterator[list[int]]:
    """Yield the ranks along each axis of `split_over=` that goes through this rank."""
    if isinstance(split_over, DeviceMesh):
        for i in range(split_over.ndim):
            yield dist.get_process_group_ranks(split_over.get_group(i))
    elif isinstance(split_over, dist.ProcessGroup):
        yield dist.get_process_group_ranks(split_over)
    elif split_over is not None:
        for one in split_over.values() if isinstance(split_over, dict) else split_over:
            yield from ranks_by_axis(one)


def pieces_of(parameters: Any, split_over: Any = None) -> list[Piece]:
    """Return the pieces of parameters without annotations and tags."""
    pieces, names = {}, {}
    entries = name_tensors(parameters)
    for name, param in entries:
        members = {dist.get_rank()}
        if isinstance(param, DTensor):
            members |= set(param.device_mesh.mesh.flatten().tolist())
        # Along such an axis ranks hold different parameters of the same name.
        coordinates = (
            min(ranks.index(rank) for rank in members if rank in ranks) for ranks in ranks_by_axis(split_over)
        )
        names[id(param)] = (name, (name, *coordinates))
    if isinstance(parameters, torch.nn.Module):
        pieces = fsdp1_pieces(parameters, names)
    for name, param in entries:
        if id(param) not in pieces:
            key = names[id(param)][1]
            is_dtensor = isinstance(param, DTensor)
            pieces[id(param)] = dtensor_piece(name, param, key) if is_dtensor else whole_piece(name, param, key)
    return [pieces[id(param)] for _, param in entries]


def local_dense(tensor: Tensor) -> Tensor:
    """Return all elements on this rank, dense."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float64 or complex128."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


@dataclass
class Oracle:
    """The whole parameters and gradients of a model, which is given random weights.

    Args:
        pieces: the pieces of this rank.
        ranks: process group of the ranks that hold pieces, None for all.
    """

    pieces: list[Piece]
    ranks: dist.ProcessGroup | None = None
    names: dict[Any, set[str]] = field(default_factory=dict)
    weights: dict[Any, Tensor] = field(default_factory=dict)
    partial_grads: dict[Any, dict[tuple[int, ...], tuple[Tensor, float]]] = field(default_factory=dict)
    whole_grads: dict[float, dict[Any, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        local = []
        for p in self.pieces:
            grad = None if p.param.grad is None else local_dense(p.param.grad).reshape(-1)
            at = p.at if p.grad_at is None else p.grad_at
            local.append((p.key, p.name, p.shape, p.param.dtype, at, grad, p.part, p.mean))
        by_rank: list[Any] = [None] * dist.get_world_size(self.ranks)
        dist.all_gather_object(by_rank, local, group=self.ranks)
        for key, name, shape, dtype, at, grad, part, mean in (piece for rank in by_rank for piece in rank):
            self.names.setdefault(key, set()).add(name)
            if key not in self.weights:
                seed = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
                self.weights[key] = torch.randn(shape, generator=seed).to(dtype)
                # A row of zeros, whose bound relative to the weight is the smallest one.
                if len(shape) > 1 and shape[0] > 1:
                    self.weights[key][0] = 0
            if grad is not None:
                empty = (torch.zeros(math.prod(shape), dtype=grad.dtype), mean)
                self.partial_grads.setdefault(key, {}).setdefault(part, empty)[0][at] = grad
        with torch.no_grad():
            for p in self.pieces:
                param = local_dense(p.param)
                param.copy_(self.weights[p.key].reshape(-1)[p.at].view(param.shape))

    @property
    def has_partial_grads(self) -> bool:
        """Return whether a gradient is Partial over some axis."""
        return any(part for parts in self.partial_grads.values() for part in parts)

    def grads(self, scale: float) -> dict[Any, Tensor]:
        """Return the whole gradients after each rank has multiplied its own. Missing ones are zeros."""
        if scale not in self.whole_grads:
            self.whole_grads[scale] = {
                key: sum(
                    (widened(grad * scale) * mean for grad, mean in self.partial_grads.get(key, {}).values()),
                    torch.zeros(weight.numel(), dtype=torch.float64),
                ).view(weight.shape)
                for key, weight in self.weights.items()
            }
        return self.whole_grads[scale]

    def slot(self, key: Any, policy: Any) -> Any:
        """Return the slot of a parameter."""
        if policy.per in ("tensor", "row"):
            return key
        hits = [group for group, pattern in policy.groups.items() for n in self.names[key] if re.search(pattern, n)]
        return hits[0] if hits else "rest"

    def norms(self, tensors: dict[Any, Tensor], policy: Any) -> dict[Any, Tensor]:
        """Return the norms of each slot, 1-D."""
        by_slot: dict[Any, list[Tensor]] = {}
        for key, tensor in tensors.items():
            rows = policy.per == "row" and tensor.ndim > 1
            by_slot.setdefault(self.slot(key, policy), []).extend(tensor if rows else [tensor])
        if policy.per == "row":
            return {
                slot: torch.stack([reference.total_norm([row], policy.norm_type) for row in rows])
                for slot, rows in by_slot.items()
            }
        return {slot: reference.total_norm(some, policy.norm_type).view(1) for slot, some in by_slot.items()}

    def typical(self, per: str, norm_type: float = 2.0) -> float:
        """Return about the median norm of the slots, so that some are clipped and others are not."""
        norms = self.norms(self.grads(0.09), NormPolicy(norm_type=norm_type, per=per))
        return _median(torch.cat([*norms.values(), torch.zeros(0)]))

    def typical_ratio(self) -> float:
        """Return about the median ratio of a row's gradient to its weight."""
        rows = NormPolicy(per="row")
        grads, weights = self.norms(self.grads(0.09), rows), self.norms(self.weights, rows)
        return _median(torch.cat([*(grads[key] / weights[key].clamp(min=0.01) for key in grads), torch.zeros(0)]))

    def first_pattern(self) -> str:
        """Return a regular expression that matches the first of all names."""
        return "^" + re.escape(min((name for names in self.names.values() for name in names), default="none"))


def _median(norms: Tensor) -> float:
    """Return about the median of the positive norms, in few digits."""
    norms = norms[norms > 0]
    # A bound between two norms, so that rounding does not decide which one is clipped.
    return float(f"{float(norms.median()):.2g}") * 1.03 if len(norms) else 1.0
