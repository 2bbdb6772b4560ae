"""A plan: which tensors take part in a call, where each of them lies, and how to find its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..comm.ranks import Axis, Ranks
from ..errors import DistclipError
from .annotations import annotation_of, check_tags, tags_in_use
from .arrangement import Arrangement, product
from .ddp import replicated_ranks
from .dtensor import dtensor_axes, dtensor_layout, is_dtensor
from .flat_storage import Flattened
from .fsdp1 import flat_layouts, refuse_bare
from .layout import Layout
from .parameters import Named, Parameters, named
from .shard import PartialSum, Shard, ShardInfos, Shards
from .split_over import cut_along, split_of

__all__ = ["Plan", "gradient_plan", "parameter_plan"]


@dataclass(slots=True)
class Plan:
    """Tensors of a call, and where they lie.

    Args:
        tensors: parameters, or gradients themselves.
        arrangement: what is known of each of them.
        are_gradients: the tensors are gradients; otherwise gradients are looked up at every call.
        failure: the first thing found wrong with a tensor, kept so that all ranks can raise together.
        flatten: lay the gradients of the first step out as views of few storages.
    """

    tensors: list[Tensor]
    arrangement: Arrangement
    are_gradients: bool = False
    failure: DistclipError | None = None
    flatten: bool = False
    _flat: Flattened | None = None

    @classmethod
    def empty(cls, axes: tuple[Axis, ...] = ()) -> Plan:
        """Of a rank that passes nothing."""
        return cls([], Arrangement([], axes))

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Of `split_over=`."""
        return self.arrangement.axes

    @property
    def entries(self) -> list[tuple[str, Tensor, Layout]]:
        """(name, tensor, layout) of each tensor."""
        return list(zip(self.arrangement.names, self.tensors, self.arrangement.layouts, strict=True))

    @property
    def groups(self) -> frozenset[Ranks]:
        """The ranks of everything that some tensor of the plan spans."""
        return self.arrangement.groups

    @property
    def may_be_partial(self) -> bool:
        """Whether a gradient of the plan may come as unreduced summands."""
        return self.arrangement.may_be_partial

    def shards(self, world_size: int) -> Shards:
        """This rank's pieces of the gradients that exist now.

        Args:
            world_size: ranks of the communicator.
        """
        find = self.arrangement.pieces if self.are_gradients else self.arrangement.gradients
        found = find(self.tensors, world_size)
        if self.flatten and self._flat is None and len(found):
            there = [t for t in self.tensors if t.grad is not None or getattr(t, "main_grad", None) is not None]
            self._flat = Flattened(there, found, partial(find, self.tensors, world_size))
            found = find(self.tensors, world_size)
        return found if self._flat is None else self._flat.of(found)

    def weights(self, world_size: int) -> Shards:
        """This rank's pieces of the parameters themselves, also of those without gradient."""
        found = self.arrangement.pieces(self.tensors, world_size)
        if all(not place.pending for place in found.places):
            return found
        return Shards(ShardInfos(replace(place, pending=()) for place in found.places), found.grads)

    def sums(self, name: str) -> tuple[PartialSum, ...]:
        """Every sum that a gradient of that name could wait for, from its parameter alone."""
        tensor = self.tensors[self.arrangement.names.index(name)]
        return annotation_of(tensor).pending + (dtensor_axes(tensor) if is_dtensor(tensor) else ())

    def absent(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, world_size: int) -> Shard:
        """Zeros in place of a gradient that only other ranks have."""
        i = self.arrangement.names.index(name)
        place = self.arrangement.usual(world_size)[i]
        zeros = torch.zeros(shape, dtype=dtype, device=self.tensors[i].device)
        return Shard(name, zeros, place.num_replicas, (), place.slot, place.rows)


def parameter_plan(parameters: Parameters, axes: tuple[Axis, ...] | None) -> Plan:
    """A plan over parameters, whose gradients are looked up at every call.

    Args:
        parameters: see `named`.
        axes: of `split_over=`; None for what needs no other rank, so that it matters not where anything lies.

    Raises:
        ArgumentError: `parameters` holds something else. What is wrong with a tensor's layout is kept in the plan.
    """
    if axes is None:
        return _made([(name, tensor, Layout()) for name, tensor in named(parameters)], ())
    if not isinstance(parameters, nn.Module):
        return _plan(named(parameters), axes, {}, {})
    return _plan(named(parameters), axes, flat_layouts(parameters), replicated_ranks(parameters))


def gradient_plan(tensors: Parameters, axes: tuple[Axis, ...]) -> Plan:
    """A plan over gradients themselves."""
    plan = _plan(named(tensors, "tensors"), axes, {}, {})
    plan.are_gradients = True
    return plan


def _plan(tensors: Named, axes: tuple[Axis, ...], known: Mapping[int, Layout], copied: Mapping[int, Ranks]) -> Plan:
    failure: DistclipError | None = None
    entries: list[tuple[str, Tensor, Layout]] = []
    plain = [(name, t) for name, t in tensors if not is_dtensor(t)]
    tags = tags_in_use([t for _, t in plain])
    try:
        check_tags(plain, axes, tags)
    except DistclipError as error:
        failure = error
    for name, tensor in tensors:
        try:
            layout = known.get(id(tensor)) or _layout(name, tensor, axes, tags)
        except DistclipError as error:
            failure = failure or error
            continue
        if len(layout.split) != len(axes):
            layout = replace(layout, split=(True,) * len(axes))
        if id(tensor) in copied:
            layout = replace(layout, groups=(*layout.groups, copied[id(tensor)]))
        if not layout.cut:
            layout = replace(layout, cut=(False,) * len(axes))
        entries.append((name, tensor, layout))
    plan = _made(entries, axes)
    plan.failure = failure
    return plan


def _made(entries: list[tuple[str, Tensor, Layout]], axes: tuple[Axis, ...]) -> Plan:
    return Plan([tensor for _, tensor, _ in entries], Arrangement(entries, axes))


def _layout(name: str, tensor: Tensor, axes: tuple[Axis, ...], tags: frozenset[str]) -> Layout:
    noted = annotation_of(tensor).layout
    if is_dtensor(tensor):
        return product(dtensor_layout(tensor), noted)
    refuse_bare(name, tensor)
    if noted.groups:
        return noted
    counted = not getattr(tensor, "shared", False)
    return Layout(split=split_of(tensor, axes, tags), cut=cut_along(tensor, axes, tags), counted=counted)
