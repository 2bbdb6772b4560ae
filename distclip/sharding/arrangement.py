"""All that is known of the tensors of a plan, save the tensors themselves, none of which it keeps alive.

Where a parameter lies does not change from one step to the next, and neither do the places of its shards. So both are
worked out once; a step looks up gradients, and compares what DTensors say of themselves by identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ..comm.ranks import Axis, Ranks
from .annotations import annotation_of
from .dtensor import dtensor_class, dtensor_layout, dtensor_pending, is_dtensor
from .layout import Layout, num_replicas
from .rows import dtensor_rows
from .shard import Rows, ShardInfo, ShardInfos, Shards

__all__ = ["Arrangement", "product"]

_PLAIN = {Tensor, torch.nn.Parameter}

_UNSEEN = object()

_gradient: Callable[[Tensor], Tensor | None] = attrgetter("grad")
_own_spec: Callable[[Tensor], Any] = attrgetter("_spec")


class Arrangement:
    """Names, layouts and places of the tensors of a plan.

    Args:
        entries: (name, tensor, layout) of each.
        axes: of `split_over=`.
    """

    def __init__(self, entries: Sequence[tuple[str, Tensor, Layout]], axes: tuple[Axis, ...]) -> None:
        self.axes = axes
        self.names = [name for name, _, _ in entries]
        self.layouts = [layout for _, _, layout in entries]
        self._pending = [annotation_of(tensor).partial_sums for _, tensor, _ in entries]
        # What a DTensor whose pieces need no sum says of itself; anything else is looked at.
        self._specs: list[Any] = [
            _UNSEEN if is_dtensor(tensor) and any(p.is_partial() for p in tensor.placements) else _spec(tensor)
            for _, tensor, _ in entries
        ]
        self._slots: Mapping[str, tuple[int, Rows | None]] = {}
        self._usual: dict[int, ShardInfos] = {}
        self._part: tuple[tuple[int, ...], Arrangement] | None = None

    @cached_property
    def groups(self) -> frozenset[Ranks]:
        """The ranks of everything that some tensor spans."""
        return frozenset(ranks for layout in self.layouts for ranks in layout.groups)

    @cached_property
    def may_be_partial(self) -> bool:
        """Whether a gradient may come as unreduced summands."""
        return any(layout.may_be_partial for layout in self.layouts)

    def assign(self, slots: Mapping[str, tuple[int, Rows | None]]) -> None:
        """Take note of the first slot of each tensor by name, and of which of its rows are here; without, all is 0."""
        self._slots = slots
        self._usual, self._part = {}, None

    def usual(self, world_size: int) -> ShardInfos:
        """The places of all tensors' gradients, each of which lies as its parameter does: the same object every time.

        Args:
            world_size: ranks of the communicator.
        """
        if world_size not in self._usual:
            self._usual[world_size] = ShardInfos(
                ShardInfo(
                    name, num_replicas(world_size, layout, self.axes), partial_sums, *self._slots.get(name, (0, None))
                )
                for name, layout, partial_sums in zip(self.names, self.layouts, self._pending, strict=True)
            )
        return self._usual[world_size]

    def gradients(self, tensors: Sequence[Tensor], world_size: int) -> Shards:
        """This rank's pieces of the gradients that parameters have now: `.grad`, or Megatron's fp32 `.main_grad`."""
        grads: list[Any] = list(map(_gradient, tensors))
        kinds = set(map(type, grads))
        if kinds <= _PLAIN:
            return Shards(self.usual(world_size), grads)
        if type(None) in kinds:
            grads = [getattr(t, "main_grad", None) if g is None else g for t, g in zip(tensors, grads, strict=True)]
            there = tuple(i for i, grad in enumerate(grads) if grad is not None)
            if len(there) < len(tensors):
                chosen = [tensors[i] for i in there]
                return self._of(there)._pieces(chosen, [grads[i] for i in there], world_size)
        return self._pieces(tensors, grads, world_size)

    def pieces(self, tensors: Sequence[Tensor], world_size: int) -> Shards:
        """This rank's pieces of the tensors themselves."""
        return self._pieces(tensors, list(tensors), world_size)

    def _pieces(self, tensors: Sequence[Tensor], grads: list[Any], world_size: int) -> Shards:
        places, kinds = self.usual(world_size), set(map(type, grads))
        if kinds <= _PLAIN:
            return Shards(places, grads)
        specs = list(map(_own_spec if kinds == {dtensor_class()} else _spec, grads))
        if not all(map(is_, specs, self._specs)):
            places = self._own(places, tensors, grads, specs, world_size)
        return Shards(places, [g if spec is None else _local(g) for g, spec in zip(grads, specs, strict=True)])

    def _own(
        self, places: ShardInfos, tensors: Sequence[Tensor], grads: list[Any], specs: list[Any], world_size: int
    ) -> ShardInfos:
        """The places of gradients of which some say of themselves something that was not seen before."""
        own: dict[int, ShardInfo] = {}
        for i, (tensor, grad, spec) in enumerate(zip(tensors, grads, specs, strict=True)):
            if spec is self._specs[i] or spec is None:
                continue
            place, partial_sums = places[i], dtensor_pending(grad)
            alike = is_dtensor(tensor) and grad.placements == tensor.placements
            if alike and not partial_sums:
                # The same in other words, which are known from now on.
                self._specs[i] = spec
                continue
            own[i] = place = replace(place, partial_sums=place.partial_sums + partial_sums)
            if not alike:
                # A gradient with placements of its own: those count, split as for its parameter.
                layout = product(dtensor_layout(grad), annotation_of(tensor).layout)
                layout = replace(layout, split=self.layouts[i].split)
                own[i] = replace(
                    place,
                    num_replicas=num_replicas(world_size, layout, self.axes),
                    rows=place.rows and dtensor_rows(grad),
                )
        return ShardInfos(own.get(i, place) for i, place in enumerate(places)) if own else places

    def _of(self, chosen: tuple[int, ...]) -> Arrangement:
        """The arrangement of some of the tensors; those that have a gradient are mostly the same as last time."""
        if self._part is None or self._part[0] != chosen:
            part = Arrangement([], self.axes)
            for own, others in (
                (self.names, part.names),
                (self.layouts, part.layouts),
                (self._pending, part._pending),
                (self._specs, part._specs),
            ):
                others += [own[i] for i in chosen]
            part._slots = self._slots
            self._part = chosen, part
        return self._part[1]


def product(one: Layout, two: Layout) -> Layout:
    """A DTensor with an annotation: the axes of both."""
    return replace(
        one,
        groups=one.groups + two.groups,
        pieces=one.pieces * two.pieces,
        may_be_partial=one.may_be_partial or two.may_be_partial,
    )


def _spec(tensor: Tensor) -> Any:
    """What a DTensor says of itself; None for any other tensor."""
    return None if type(tensor) in _PLAIN or not is_dtensor(tensor) else tensor._spec


def _local(tensor: Any) -> Tensor:
    """`to_local()` without its detour, unless the piece is still on its way."""
    local: Tensor = tensor._local_tensor
    return local if type(local) is Tensor else tensor.to_local()
