"""A plan: which tensors take part in a call, where each of them lies, and how to find its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from .shard import PartialSum, Rows, Shard, ShardInfos, Shards
from .split_over import cut_along, split_of

__all__ = ["Plan", "ShardTable", "gradient_plan", "gradient_table", "local_table", "parameter_plan", "parameter_table"]


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
        if all(not place.partial_sums for place in found.places):
            return found
        return Shards(ShardInfos(replace(place, partial_sums=()) for place in found.places), found.grads)

    def sums(self, name: str) -> tuple[PartialSum, ...]:
        """Every sum that a gradient of that name could wait for, from its parameter alone."""
        tensor = self.tensors[self.arrangement.names.index(name)]
        return annotation_of(tensor).partial_sums + (dtensor_axes(tensor) if is_dtensor(tensor) else ())

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


class ShardTable:
    """Shards of the parameters of a call, for the number of ranks in its communicator.

    Args:
        plan: tensors and their layouts.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.world_size = 1

    @classmethod
    def empty(cls, axes: tuple[Axis, ...] = ()) -> ShardTable:
        """Return the table of a rank that passes no tensor."""
        return cls(Plan.empty(axes))

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors of this rank."""
        return self.plan.tensors

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return self.plan.arrangement.names

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Axes of `split_over=`."""
        return self.plan.axes

    @property
    def groups(self) -> frozenset[Ranks]:
        """Ranks of everything that some tensor spans."""
        return self.plan.groups

    @property
    def may_be_partial(self) -> bool:
        """Whether a gradient may be partial."""
        return self.plan.may_be_partial

    @property
    def error(self) -> DistclipError | None:
        """First error of a layout, kept so that all ranks raise it together."""
        return self.plan.failure

    @property
    def device(self) -> torch.device:
        """Device of the first tensor."""
        return self.plan.tensors[0].device if self.plan.tensors else torch.device("cpu")

    def use_flat_grads(self) -> None:
        """Move the gradients of the first step into few storages."""
        self.plan.flatten = True

    def gradients(self) -> Shards:
        """Return the shards of the gradients that exist now."""
        return self.plan.shards(self.world_size)

    def drop_gradients(self) -> None:
        """Set every `.grad` to None, and Megatron's `main_grad`, which it keeps for good, to 0."""
        for tensor in self.tensors:
            tensor.grad = None
            if (main_grad := getattr(tensor, "main_grad", None)) is not None:
                main_grad.zero_()

    def weights(self) -> Shards:
        """Return the shards of the parameters themselves."""
        return self.plan.weights(self.world_size)

    def shards_at(self, positions: Sequence[int], grads: Sequence[Tensor]) -> Shards:
        """Return shards of gradients that may be elsewhere."""
        usual = self.plan.arrangement.usual(self.world_size)
        return Shards(ShardInfos(usual[i] for i in positions), list(grads))

    def possible_sums(self, name: str) -> tuple[PartialSum, ...]:
        """Return every sum that a gradient of that name could need."""
        return self.plan.sums(name)

    def zeros_for(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Shard:
        """Return zeros in place of a gradient that only other ranks have."""
        return self.plan.absent(name, shape, dtype, self.world_size)

    def assign_slots(self, slots: Mapping[str, tuple[int, Rows | None]]) -> None:
        """Assign the first slot of each tensor by name, with the rows that this rank has."""
        self.plan.arrangement.assign(slots)


def parameter_table(parameters: Parameters, axes: tuple[Axis, ...]) -> ShardTable:
    """Return a table over parameters."""
    return ShardTable(parameter_plan(parameters, axes))


def gradient_table(tensors: Parameters, axes: tuple[Axis, ...]) -> ShardTable:
    """Return a table over gradients themselves."""
    return ShardTable(gradient_plan(tensors, axes))


def local_table(parameters: Parameters) -> ShardTable:
    """Return a table for a function that needs no other rank."""
    return ShardTable(parameter_plan(parameters, None))
