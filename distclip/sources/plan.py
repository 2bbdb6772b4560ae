"""A plan: which tensors take part in a call, where each of them lies, and how to find its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..errors import DistclipError
from ..shards import Axis, Layout, Pending, Ranks, Rows, Shard, copies
from .arguments import Named, Parameters, named
from .dtensor import dtensor_axes, dtensor_layout, dtensor_pending, is_dtensor
from .flat import flat_layouts, refuse_bare
from .replicated import replicated_ranks
from .rows import dtensor_rows
from .split import cut_along, split_of
from .tagged import annotation_of, check_tags, tags_in_use

__all__ = ["Plan", "gradient_plan", "parameter_plan"]


@dataclass(slots=True)
class Plan:
    """Tensors of a call with their layouts.

    Args:
        entries: (name, tensor, layout). The tensors are parameters, or gradients themselves.
        axes: of `split_over=`.
        are_gradients: the tensors are gradients; otherwise gradients are their `.grad`.
        failure: the first thing found wrong with a tensor, kept so that all ranks can raise together.
        places: by name, the first slot of a parameter and which of its rows are here; all in slot 0 if there are none.
    """

    entries: list[tuple[str, Tensor, Layout]]
    axes: tuple[Axis, ...]
    are_gradients: bool = False
    failure: DistclipError | None = None
    places: Mapping[str, tuple[int, Rows | None]] = field(default_factory=dict)

    @property
    def groups(self) -> set[Ranks]:
        """The ranks of everything that some tensor of the plan spans."""
        return {ranks for _, _, layout in self.entries for ranks in layout.groups}

    @property
    def may_be_partial(self) -> bool:
        """Whether a gradient of the plan may come as unreduced summands."""
        return any(layout.may_be_partial for _, _, layout in self.entries)

    def gradient(self, tensor: Tensor) -> Tensor | None:
        """The gradient that an entry's tensor stands for: itself, `.grad`, or Megatron's fp32 `.main_grad`."""
        if self.are_gradients:
            return tensor
        return tensor.grad if tensor.grad is not None else getattr(tensor, "main_grad", None)

    def shards(self, world_size: int) -> list[Shard]:
        """This rank's pieces of the gradients that exist now.

        Args:
            world_size: ranks of the communicator.
        """
        found: list[Shard] = []
        for name, tensor, layout in self.entries:
            grad = self.gradient(tensor)
            if grad is None:
                continue
            pending = annotation_of(tensor).pending
            slot, rows = self.places.get(name, (0, None))
            if is_dtensor(grad):
                pending += dtensor_pending(grad)
                if not self.are_gradients and (not is_dtensor(tensor) or grad.placements != tensor.placements):
                    # A gradient with placements of its own: those count, split as for its parameter.
                    own = _product(dtensor_layout(grad), annotation_of(tensor).layout)
                    layout = replace(own, split=layout.split)
                    rows = rows and dtensor_rows(grad)
                grad = grad.to_local()
            found.append(Shard(name, grad, copies(world_size, layout, self.axes), pending, slot, rows))
        return found

    def weights(self, world_size: int) -> list[Shard]:
        """This rank's pieces of the parameters themselves, also of those without gradient."""
        found: list[Shard] = []
        for name, tensor, layout in self.entries:
            local = tensor.to_local() if is_dtensor(tensor) else tensor.detach()
            found.append(
                Shard(name, local, copies(world_size, layout, self.axes), (), *self.places.get(name, (0, None)))
            )
        return found

    def sums(self, name: str) -> tuple[Pending, ...]:
        """Every sum that a gradient of that name could wait for, from its parameter alone."""
        tensor, _ = self._entry(name)
        return annotation_of(tensor).pending + (dtensor_axes(tensor) if is_dtensor(tensor) else ())

    def absent(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, world_size: int) -> Shard:
        """Zeros in place of a gradient that only other ranks have."""
        tensor, layout = self._entry(name)
        zeros = torch.zeros(shape, dtype=dtype, device=tensor.device)
        return Shard(name, zeros, copies(world_size, layout, self.axes), (), *self.places.get(name, (0, None)))

    def _entry(self, name: str) -> tuple[Tensor, Layout]:
        return next((tensor, layout) for other, tensor, layout in self.entries if other == name)


def parameter_plan(parameters: Parameters, axes: tuple[Axis, ...] | None) -> Plan:
    """A plan over parameters, whose gradients are looked up at every call.

    Args:
        parameters: see `named`.
        axes: of `split_over=`; None for what needs no other rank, so that it matters not where anything lies.

    Raises:
        ArgumentError: `parameters` holds something else. What is wrong with a tensor's layout is kept in the plan.
    """
    if axes is None:
        return Plan([(name, tensor, Layout()) for name, tensor in named(parameters)], ())
    if not isinstance(parameters, nn.Module):
        return _plan(named(parameters), axes, {}, {})
    return _plan(named(parameters), axes, flat_layouts(parameters), replicated_ranks(parameters))


def gradient_plan(tensors: Parameters, axes: tuple[Axis, ...]) -> Plan:
    """A plan over gradients themselves."""
    plan = _plan(named(tensors, "tensors"), axes, {}, {})
    plan.are_gradients = True
    return plan


def _plan(tensors: Named, axes: tuple[Axis, ...], known: Mapping[int, Layout], copied: Mapping[int, Ranks]) -> Plan:
    plan = Plan([], axes)
    plain = [(name, t) for name, t in tensors if not is_dtensor(t)]
    tags = tags_in_use([t for _, t in plain])
    try:
        check_tags(plain, axes, tags)
    except DistclipError as error:
        plan.failure = error
    for name, tensor in tensors:
        try:
            layout = known.get(id(tensor)) or _layout(name, tensor, axes, tags)
        except DistclipError as error:
            plan.failure = plan.failure or error
            continue
        if len(layout.split) != len(axes):
            layout = replace(layout, split=(True,) * len(axes))
        if id(tensor) in copied:
            layout = replace(layout, groups=(*layout.groups, copied[id(tensor)]))
        if not layout.cut:
            layout = replace(layout, cut=(False,) * len(axes))
        plan.entries.append((name, tensor, layout))
    return plan


def _layout(name: str, tensor: Tensor, axes: tuple[Axis, ...], tags: frozenset[str]) -> Layout:
    noted = annotation_of(tensor).layout
    if is_dtensor(tensor):
        return _product(dtensor_layout(tensor), noted)
    refuse_bare(name, tensor)
    if noted.groups:
        return noted
    counted = not getattr(tensor, "shared", False)
    return Layout(split=split_of(tensor, axes, tags), cut=cut_along(tensor, axes, tags), counted=counted)


def _product(one: Layout, two: Layout) -> Layout:
    """A DTensor with an annotation: the axes of both."""
    return replace(
        one,
        groups=one.groups + two.groups,
        pieces=one.pieces * two.pieces,
        may_be_partial=one.may_be_partial or two.may_be_partial,
    )
