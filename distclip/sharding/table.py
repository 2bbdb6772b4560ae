"""List the tensors of a call with their layouts, and find this rank's shards of their gradients.

The layout of a parameter does not change from one step to the next, and neither does the metadata of its shard. Both
are computed once. A step only reads gradients, and compares the specs of their DTensors by identity.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import compress, repeat
from operator import attrgetter, is_, not_
from typing import Any

import torch
from torch import Tensor, nn

from ..comm.consensus import FirstError
from ..comm.ranks import Axis, Ranks
from ..devices import is_fake
from ..errors import ArgumentError, DistclipError, LayoutError, warn_user
from .annotations import AnnotationSource, annotated_sums, annotation_of, whole_shape
from .attributes import check_carried, has_carried, remember_all
from .ddp import DDPSource
from .dtensor import (
    DTensorSource,
    dtensor_class,
    dtensor_layout,
    dtensor_partial_sums,
    dtensor_rows,
    is_dtensor,
    possible_partial_sums,
    with_local,
)
from .flat_storage import FlatStorage
from .fsdp1 import FSDP1Source
from .fsdp2 import FSDP2Source
from .holders import Holders, Holding, Inventory, coords_of
from .layout import Layout, num_reached, num_replicas, product
from .megatron import MegatronSource, read_main_grad
from .parameters import Named, Parameters, is_frozen, name_tensors
from .replicas import ReplicaGroup
from .shard import PartialSum, Rows, ShardInfo, ShardInfos, Shards
from .source import Request, Source
from .spmd import SpmdTypesSource

__all__ = [
    "SOURCES",
    "SOURCE_ATTRIBUTES",
    "ShardTable",
    "TableMetadata",
    "gradient_table",
    "local_table",
    "parameter_table",
    "warn_if_nothing_trains",
]

SOURCES: tuple[Source, ...] = (
    AnnotationSource(),
    DTensorSource(),
    SpmdTypesSource(),
    FSDP1Source(),
    FSDP2Source(),
    MegatronSource(),
    DDPSource(),
)
"""Kinds of sharding. Each source adds to the layout that the sources before it have found, or replaces it."""

SOURCE_ATTRIBUTES = frozenset[str]().union(*(source.attributes for source in SOURCES))
"""Names of the attributes from which any source reads the layout of a tensor."""

_PLAIN = {Tensor, torch.nn.Parameter}

_NEVER_SEEN = object()

_NO_OVERRIDE = torch._C._disabled_torch_function_impl
"""Attribute `__torch_function__` of a class that overrides nothing."""

_grad_of: Callable[[Tensor], Tensor | None] = attrgetter("grad")
_spec_attribute: Callable[[Tensor], Any] = attrgetter("_spec")
_local_attribute: Callable[[Tensor], Tensor] = attrgetter("_local_tensor")


class ShardTable:
    """Tensors of a call and their layouts.

    Args:
        tensors: parameters, or gradients themselves.
        metadata: metadata of the tensors, in the same order.
        are_gradients: True if the tensors are gradients. Otherwise every call reads their current gradients.
        error: first error in the layout of a tensor, which all ranks must raise together. Such a tensor is not in the
            table.

    Attributes:
        holders: numbers of ranks that hold the parameters. Set `world_size` once the communicator is known, and
            `holders` once the ranks have compared their layouts.
        has_final_holders: set it to True if the ranks need not compare their layouts again.
        flat_grads: set it to True to move the gradients of the first step into few storages.
        only: ids of the tensors whose gradients are read, written and dropped. None for all.
        inspect: called with the gradients of every call, to raise if something is wrong with them. None for nothing.
    """

    def __init__(
        self,
        tensors: list[Tensor],
        metadata: TableMetadata,
        are_gradients: bool = False,
        error: BaseException | None = None,
    ) -> None:
        self.tensors, self.metadata, self.are_gradients, self.error = tensors, metadata, are_gradients, error
        self.holders = metadata.default_holders(1)
        self.has_final_holders = False
        self.flat_grads = False
        self.only: frozenset[int] | None = None
        self.inspect: Callable[[Shards], None] | None = None
        self._flat_storage: FlatStorage | None = None

    @classmethod
    def empty(cls, axes: tuple[Axis, ...] = ()) -> ShardTable:
        """Return the table of a rank without tensors."""
        return cls([], TableMetadata([], axes))

    @property
    def names(self) -> list[str]:
        """Name of each tensor."""
        return self.metadata.names

    @property
    def layouts(self) -> list[Layout]:
        """Layout of each tensor."""
        return self.metadata.layouts

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Axes of `split_over=`."""
        return self.metadata.axes

    @property
    def groups(self) -> frozenset[Ranks]:
        """Rank groups that the tensors span."""
        return self.metadata.groups

    @property
    def may_be_partial(self) -> bool:
        """True if one of the gradients can be a partial gradient."""
        return self.metadata.may_be_partial

    @property
    def num_reached(self) -> frozenset[float]:
        """Numbers of ranks that the layouts reach, together with the axes of `split_over=`."""
        return self.metadata.num_reached

    @property
    def is_complete(self) -> bool:
        """True if DDP gives this rank the whole, averaged gradient, so that it can measure alone."""
        return self.metadata.is_complete

    @property
    def world_size(self) -> int:
        """Number of ranks in the communicator of the call."""
        return self.holders.world_size

    @world_size.setter
    def world_size(self, world_size: int) -> None:
        if world_size != self.holders.world_size:
            self.holders = self.metadata.default_holders(world_size)

    @property
    def device(self) -> torch.device:
        """Device of the first tensor, or the CPU without tensors and for a tensor without elements."""
        first = self.tensors[0] if self.tensors else None
        if first is None or first.is_meta or is_fake(_local(first) if is_dtensor(first) else first):
            return torch.device("cpu")
        return first.device

    def gradients(self) -> Shards:
        """Return this rank's shards of the gradients that exist now: `.grad`, or Megatron's fp32 `.main_grad`.

        Collectives: none. Host syncs: none.
        """
        for check in self.metadata.checks:
            check()
        shards = self._read_gradients()
        if self.inspect is not None:
            self.inspect(shards)
        # In the first step with gradients, they move to a flat storage, into which later backwards accumulate.
        if self.flat_grads and self._flat_storage is None and len(shards):
            self._flat_storage = FlatStorage(self.tensors_with_gradient(), shards, self._read_gradients)
            shards = self._read_gradients()
        return shards if self._flat_storage is None else self._flat_storage.merge(shards)

    def tensors_with_gradient(self) -> list[Tensor]:
        """Return the tensors whose gradients `gradients` returns, in the same order."""
        return [t for t in self.selected() if t.grad is not None or read_main_grad(t) is not None]

    def grad_tensors(self) -> list[Tensor | None]:
        """Return the `.grad` of every selected tensor. Collectives: none. Host syncs: none."""
        return list(map(_grad_of, self.selected()))

    def replace_gradients(self, local_grads: Mapping[int, Tensor]) -> None:
        """Replace gradients of parameters by tensors of the same shape.

        Args:
            local_grads: new local tensors, by position among the shards that `gradients` returns.

        Raises:
            LayoutError: a gradient is a `main_grad`, whose memory belongs to Megatron, or torch refuses the tensor.
        """
        with_grad, names = self.tensors_with_gradient(), dict(zip(map(id, self.tensors), self.names, strict=True))
        for position, local in local_grads.items():
            tensor = with_grad[position]
            reason = "is a main_grad"
            if (old := tensor.grad) is not None:
                try:
                    tensor.grad = with_local(old, local) if is_dtensor(old) else local
                    continue
                except RuntimeError as error:
                    reason = f"cannot be replaced ({error})"
            raise LayoutError(
                f"the gradient of {names[id(tensor)]} overlaps another one in memory, or repeats an element, and "
                f"{reason}. Assign a copy: param.grad = param.grad.clone()."
            )

    def selected(self) -> list[Tensor]:
        """Return the tensors whose gradients are read, written and dropped."""
        return [tensor for tensor in self.tensors if self.only is None or id(tensor) in self.only]

    def drop_gradients(self) -> None:
        """Set every `.grad` to None, and every `main_grad` of Megatron to 0."""
        for tensor in self.selected():
            main_grad = read_main_grad(tensor)
            tensor.grad = None
            # Megatron allocates it once and keeps it.
            if main_grad is not None:
                main_grad.zero_()

    def weights(self) -> Shards:
        """Return this rank's shards of the parameters that train, including those without a gradient."""
        shards = self.metadata.shards_of_weights(self.tensors, self.holders)
        if all(not info.partial_sums for info in shards.infos):
            return shards
        # Only the gradients are partial. Parameters are replicas.
        return Shards(ShardInfos(replace(info, partial_sums=()) for info in shards.infos), shards.grads)

    def training_tensors(self) -> list[Tensor]:
        """Return the tensors that `weights` returns the shards of, in the same order."""
        return self.metadata.training_of(self.tensors)

    def local_weights(self, positions: Iterable[int]) -> list[Tensor]:
        """Return the local tensors of the parameters at some positions. Collectives: none. Host syncs: none."""
        tensors = map(self.tensors.__getitem__, positions)
        return [_local(tensor) if is_dtensor(tensor) else tensor for tensor in tensors]

    def contradictory_axes(self, name: str, group: ReplicaGroup) -> list[Axis]:
        """Return the axes of `split_over=` along which the ranks of a replica group hold different tensors.

        An annotation contradicts no axis: it declares that a tied parameter has replicas along the axis.
        """
        i = self.names.index(name)
        if group in annotation_of(self.tensors[i]).layout.replicas:
            return []
        split = self.layouts[i].split
        return [
            axis
            for axis, is_split in zip(self.axes, split, strict=True)
            if is_split and len({*axis.ranks} & {*group.ranks}) > 1
        ]

    def shards_at(self, positions: Sequence[int], grads: Sequence[Tensor]) -> Shards:
        """Return shards of gradients that an integration keeps elsewhere.

        Args:
            positions: for each gradient, the position of its parameter in the table.
            grads: local tensors.
        """
        infos = self.metadata.infos(self.holders)
        return Shards(ShardInfos(infos[i] for i in positions), list(grads))

    def num_replicas(self, position: int) -> float:
        """Return the number of ranks that hold the same shard of a parameter."""
        return self.metadata.num_replicas(position, self.layouts[position], self.holders)

    def possible_sums(self) -> dict[str, tuple[PartialSum, ...]]:
        """Return, for each parameter that has any, every sum that its gradient could need."""
        sums = {}
        for name, tensor in zip(self.names, self.tensors, strict=True):
            own = annotated_sums(tensor)
            if own or is_dtensor(tensor):
                sums[name] = own + possible_partial_sums(tensor) if is_dtensor(tensor) else own
        return sums

    def slot_of(self, name: str) -> tuple[int, torch.device]:
        """Return the slot and the device of a parameter, for a gradient that this rank does not have."""
        i = self.names.index(name)
        return self.metadata.infos(self.holders)[i].slot, self.tensors[i].device

    def fp64_anywhere(self, has_fp64: bool) -> bool | None:
        """Return whether any rank has float64 gradients, or None if the ranks must gather this first.

        Args:
            has_fp64: whether this rank has float64 gradients now.
        """
        own, anywhere = self.metadata.fp64
        return anywhere if own is has_fp64 else None

    def remember_fp64(self, has_fp64: bool, *, anywhere: bool) -> None:
        """Set what `fp64_anywhere` returns, after the ranks have gathered this."""
        self.metadata.fp64 = has_fp64, anywhere

    def assign_slots(self, by_name: Mapping[str, tuple[int, Rows | None]], frozen: Collection[str] = ()) -> None:
        """Assign a slot to every tensor. Before this call all tensors count in slot 0.

        Args:
            by_name: see `SlotMap`.
            frozen: see `SlotMap`.
        """
        self.metadata.assign_slots(by_name, frozen)

    def _read_gradients(self) -> Shards:
        if self.are_gradients:
            return self.metadata.shards_of_tensors(self.tensors, self.holders)
        return self.metadata.shards_of_gradients(self.tensors, self.holders, self.only)


class TableMetadata:
    """Names, layouts and shard metadata of the tensors in a table. Holds no references to the tensors.

    Args:
        entries: name, tensor and layout of each.
        axes: axes of `split_over=`.
        checks: functions that raise while gradients cannot be read, see `Source.find_checks`.
    """

    def __init__(
        self,
        entries: Sequence[tuple[str, Tensor, Layout]],
        axes: tuple[Axis, ...],
        checks: Sequence[Callable[[], None]] = (),
    ) -> None:
        self.axes, self.checks = axes, checks
        self.names = [name for name, _, _ in entries]
        self.layouts = [layout for _, _, layout in entries]
        self._partial_sums = [annotated_sums(tensor) for _, tensor, _ in entries]
        # Specs of gradients that have the layout of their parameter and need no sum; None for a plain tensor. A
        # parameter in Partial placement has no such spec, so its gradient is examined in every step.
        self._specs: list[Any] = [
            _NEVER_SEEN if is_dtensor(tensor) and any(p.is_partial() for p in tensor.placements) else _spec_of(tensor)
            for _, tensor, _ in entries
        ]
        # At every access to an attribute, torch looks up whether the tensor's class overrides it. The class of DTensors
        # does not, and without the lookup their gradients are read in half the time.
        classes = {type(tensor) for _, tensor, _ in entries} - _PLAIN
        self._overrides_access = any(cls.__torch_function__ is not _NO_OVERRIDE for cls in classes)
        # Errors to raise if a tensor that must have no gradient gets one, by position.
        self.frozen_errors: dict[int, DistclipError] = {}
        self._slots: Mapping[str, tuple[int, Rows | None]] = {}
        self._positions: Sequence[int] = range(len(entries))
        self._shapes = [whole_shape(tensor, layout) if layout.groups else () for _, tensor, layout in entries]
        self._infos: dict[Holders, ShardInfos] = {}
        self._default_holders: dict[int, Holders] = {}
        self._inventories: dict[int, Inventory] = {}
        # The last exchange of layouts from which holders were found, and these holders.
        self.exchanged: object = None
        self.exchanged_holders = Holders(1)
        self._subsets: dict[tuple[int, ...], TableMetadata] = {}
        # Whether this rank, and whether any rank, has float64 gradients, as of the last gather.
        self.fp64: tuple[bool | None, bool | None] = (None, None)
        # Positions of the tensors that train. None for all of them.
        self._training: tuple[int, ...] | None = None
        self._weights: TableMetadata | None = None
        self._assumed: Mapping[tuple[bool, ...], tuple[ReplicaGroup, ...]] = {}
        # Ranks of the last communicator that contains the groups and axes of the tensors, one object for all calls.
        self.covering_ranks: Sequence[int] | None = None
        # Ranks of the last communicator all of which the layouts reach, likewise, and what these ranks have exchanged.
        self.reached_ranks: Sequence[int] | None = None
        self.memory: Mapping[str, Any] = {}
        # Whether a rank that measures alone has compared itself with others, see `replicas.unlinked`.
        self.was_compared = False
        # Positions of the parameters whose steps are watched, see `apply.consumed`. None before the first call.
        self.sample: list[int] | None = None
        # Number of changes of all watched parameters when nothing was left to find, see `apply.consumed`.
        self.quiet_since: int | None = None

    @cached_property
    def groups(self) -> frozenset[Ranks]:
        """Rank groups that the tensors span."""
        # Distinct by identity first, because hashing a group reads all of its ranks.
        return frozenset({id(ranks): ranks for layout in self.layouts for ranks in layout.groups}.values())

    @cached_property
    def num_reached(self) -> frozenset[float]:
        """Numbers of ranks that the layouts reach, together with the axes of `split_over=`."""
        return frozenset(num_reached(layout, self.axes) for layout in self.layouts if layout.groups)

    @cached_property
    def may_be_partial(self) -> bool:
        """True if one of the gradients can be a partial gradient."""
        return any(layout.may_be_partial for layout in self.layouts)

    @cached_property
    def is_complete(self) -> bool:
        """True if DDP gives this rank the whole, averaged gradient."""
        whole = all(
            layout.num_pieces == 1 and not layout.may_be_partial and layout.is_averaged >= bool(layout.groups)
            for layout in self.layouts
        )
        return whole and not self.axes and any(layout.is_averaged for layout in self.layouts)

    def assign_slots(self, by_name: Mapping[str, tuple[int, Rows | None]], frozen: Collection[str] = ()) -> None:
        """Assign a slot to every tensor, except those that are frozen on all ranks."""
        self._slots = by_name
        self._infos, self._subsets, self._weights = {}, {}, None
        training = tuple(i for i, name in enumerate(self.names) if name not in frozen)
        self._training = None if len(training) == len(self.names) else training
        for i, name in enumerate(self.names):
            if name in frozen and name not in by_name:
                self.frozen_errors.setdefault(i, _unfrozen(name))

    def assume_replicas(self, groups: Mapping[tuple[bool, ...], tuple[ReplicaGroup, ...]]) -> None:
        """Set the ranks that are assumed to hold the same plain tensors, see `replicas.assumed_groups`."""
        if groups != self._assumed:
            self._assumed = groups
            self._infos, self._subsets, self._weights = {}, {}, None

    def replicas_of(self, layout: Layout) -> tuple[ReplicaGroup, ...]:
        """Return the groups of ranks that hold the same shard as this rank."""
        return layout.replicas if layout.groups or not layout.counted else self._assumed.get(layout.split, ())

    def infos(self, holders: Holders) -> ShardInfos:
        """Return the metadata of gradients that have the layouts of their parameters.

        All calls return one object, so that columns are computed once.

        Args:
            holders: numbers of ranks that hold the parameters.
        """
        # Tables that share this metadata can be used with several communicators, so there is one entry for each.
        if holders not in self._infos:
            self._infos[holders] = ShardInfos(
                ShardInfo(
                    name,
                    self.num_replicas(i, layout, holders),
                    self._partial_sums[i],
                    *self._slots.get(name, (0, None)),
                    self.replicas_of(layout),
                )
                for i, (name, layout) in enumerate(zip(self.names, self.layouts, strict=True))
            )
        return self._infos[holders]

    def num_replicas(self, position: int, layout: Layout, holders: Holders) -> float:
        """Return the number of ranks with the same shard.

        Args:
            position: of the parameter.
            layout: of its gradient.
            holders: numbers of ranks that hold the parameters.

        Raises:
            LayoutError: the gradient is on other ranks than its parameter, and does not reach all ranks.
        """
        num_meshes = holders.meshes_of(self._positions[position])
        own = self.layouts[position]
        if layout is not own and layout.members != own.members:
            num_meshes = None
            if own.groups and layout.groups and num_reached(layout, self.axes) != holders.world_size:
                raise LayoutError(
                    f"{self.names[position]} has a gradient on ranks {sorted(layout.members)}, and the parameter is on "
                    f"ranks {sorted(own.members)}. Redistribute the gradient to the mesh of its "
                    "parameter before clipping."
                )
        return num_replicas(holders.world_size, layout, self.axes, num_meshes)

    def default_holders(self, world_size: int) -> Holders:
        """Return the holders for layouts that all reach every rank, one object for each size."""
        if world_size not in self._default_holders:
            self._default_holders[world_size] = Holders(world_size)
        return self._default_holders[world_size]

    def inventory(self, world_size: int, rank: int) -> Inventory:
        """Describe the parameters to ranks that cannot derive their meshes.

        Args:
            world_size: number of ranks in the communicator.
            rank: global rank of this process.
        """
        if world_size not in self._inventories:
            plain = ((name, layout) for name, layout in zip(self.names, self.layouts, strict=True) if not layout.groups)
            self._inventories[world_size] = Inventory(
                tuple(self._holding(i, rank) for i in self._unreached(world_size)),
                frozenset((name, coords_of(layout, self.axes, rank)) for name, layout in plain),
            )
        return self._inventories[world_size]

    def find_holders(self, world_size: int, num_meshes: Sequence[int]) -> Holders:
        """Return the holders, from the number of meshes of each holding in the inventory."""
        if not num_meshes:
            return self.default_holders(world_size)
        found = dict(zip(self._unreached(world_size), num_meshes, strict=True))
        self._infos, self._subsets = {}, {}
        return Holders(world_size, tuple(map(found.get, range(len(self.names)))))

    def _unreached(self, world_size: int) -> list[int]:
        """Return the positions of parameters whose layout and `split_over=` do not reach every rank."""
        layouts = enumerate(self.layouts)
        return [i for i, layout in layouts if layout.groups and num_reached(layout, self.axes) != world_size]

    def _holding(self, i: int, rank: int) -> Holding:
        layout = self.layouts[i]
        members, coords = tuple(sorted(layout.members | {rank})), coords_of(layout, self.axes, rank)
        return Holding(self.names[i], self._shapes[i], members, layout.num_members, layout.num_pieces, coords)

    def shards_of_gradients(
        self, tensors: Sequence[Tensor], holders: Holders, only: frozenset[int] | None = None
    ) -> Shards:
        """Return this rank's shards of the current gradients, or only those of parameters in `only`."""
        # A step on thousands of tensors spends much of its time here, so the common case only tests sets of types.
        with nullcontext() if self._overrides_access else torch._C.DisableTorchFunctionSubclass():
            grads: list[Any] = list(map(_grad_of, tensors))
        types = set(map(type, grads))
        if types <= _PLAIN and not self.frozen_errors and only is None:
            return Shards(self.infos(holders), grads)
        if type(None) in types or only is not None:
            are_missing = list(map(is_, grads, repeat(None)))
            for i in compress(range(len(grads)), are_missing):
                grads[i] = read_main_grad(tensors[i])
            if only is not None:
                grads = [g if id(t) in only else None for t, g in zip(tensors, grads, strict=True)]
            are_missing = list(map(is_, grads, repeat(None)))
            if any(are_missing):
                are_present = list(map(not_, are_missing))
                present = tuple(compress(range(len(grads)), are_present))
                subset = list(compress(tensors, are_present))
                return self._subset_at(present)._shards(subset, list(compress(grads, are_present)), holders)
            types = set(map(type, grads))
        if self.frozen_errors:
            raise next(iter(self.frozen_errors.values()))
        return self._shards(tensors, grads, holders, types)

    def shards_of_weights(self, tensors: Sequence[Tensor], holders: Holders) -> Shards:
        """Return this rank's shards of the tensors that train."""
        if self._training is None:
            return self._shards(tensors, list(tensors), holders)
        if self._weights is None:
            self._weights = self.at(self._training)
        training = self.training_of(tensors)
        return self._weights._shards(training, list(training), holders)

    def training_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors that train."""
        return list(tensors) if self._training is None else [tensors[i] for i in self._training]

    def shards_of_tensors(self, tensors: Sequence[Tensor], holders: Holders) -> Shards:
        """Return this rank's shards of the tensors themselves."""
        return self._shards(tensors, list(tensors), holders)

    def _shards(
        self, tensors: Sequence[Tensor], grads: list[Any], holders: Holders, types: set[type] | None = None
    ) -> Shards:
        """Return shards of gradients.

        Args:
            tensors: tensors of this metadata.
            grads: gradient of each.
            holders: see `infos`.
            types: types of the gradients, if the caller has found them.
        """
        infos, types = self.infos(holders), types or set(map(type, grads))
        if types <= _PLAIN:
            return Shards(infos, grads)
        are_dtensors = types == {dtensor_class()}
        specs = list(map(_spec_attribute if are_dtensors else _spec_of, grads))
        # Autograd usually returns the same spec object as the parameter's, or one from an earlier step.
        if not all(map(is_, specs, self._specs)):
            infos = self._updated_infos(infos, tensors, grads, specs, holders)
        if are_dtensors and _PLAIN.issuperset(map(type, local := list(map(_local_attribute, grads)))):
            return Shards(infos, local)
        return Shards(infos, [g if spec is None else _local(g) for g, spec in zip(grads, specs, strict=True)])

    def _updated_infos(
        self, infos: ShardInfos, tensors: Sequence[Tensor], grads: list[Any], specs: list[Any], holders: Holders
    ) -> ShardInfos:
        """Recompute the metadata of gradients whose DTensor spec was not seen before."""
        updated: dict[int, ShardInfo] = {}
        for i, (tensor, grad, spec) in enumerate(zip(tensors, grads, specs, strict=True)):
            if spec is self._specs[i] or spec is None:
                continue
            info, partial_sums = infos[i], dtensor_partial_sums(grad)
            same_placements = is_dtensor(tensor) and grad.placements == tensor.placements
            if same_placements and not partial_sums:
                # This is an equal spec in another object, which is recognized from now on.
                self._specs[i] = spec
                continue
            updated[i] = info = replace(info, partial_sums=info.partial_sums + partial_sums)
            if not same_placements:
                # The gradient's own placements apply. Along `split_over=`, the gradient is split as its parameter is.
                layout = product(dtensor_layout(grad), annotation_of(tensor).layout)
                layout = replace(layout, split=self.layouts[i].split)
                updated[i] = replace(
                    info,
                    num_replicas=self.num_replicas(i, layout, holders),
                    rows=info.rows and dtensor_rows(grad),
                    replicas=self.replicas_of(layout),
                )
        return ShardInfos(updated.get(i, info) for i, info in enumerate(infos)) if updated else infos

    def _subset_at(self, positions: tuple[int, ...]) -> TableMetadata:
        """Return the metadata of the tensors at some positions: those with a gradient."""
        # Usually the same tensors have a gradient in every step, or a few sets of tensors take turns.
        if positions not in self._subsets:
            if unfrozen := self.frozen_errors.keys() & positions:
                raise self.frozen_errors[min(unfrozen)]
            if len(self._subsets) >= 8:
                self._subsets.clear()
            self._subsets[positions] = self.at(positions)
        return self._subsets[positions]

    def at(self, positions: Sequence[int]) -> TableMetadata:
        """Return the metadata of the tensors at some positions."""
        # The columns are copied, because recomputing them would need the tensors of the table.
        subset = TableMetadata([], self.axes)
        subset.names = [self.names[i] for i in positions]
        subset.layouts = [self.layouts[i] for i in positions]
        subset._positions = positions
        subset._partial_sums = [self._partial_sums[i] for i in positions]
        subset._specs = [self._specs[i] for i in positions]
        subset._slots, subset._assumed = self._slots, self._assumed
        return subset


def parameter_table(parameters: Parameters, axes: tuple[Axis, ...], named: Named | None = None) -> ShardTable:
    """Make a table of parameters, whose gradients are read at every call.

    Args:
        parameters: see `name_tensors`.
        axes: axes of `split_over=`.
        named: the parameters under other names. None for the names in `parameters`.

    Returns:
        The table. Its `error` is set if the layout of a tensor cannot be determined.

    Raises:
        ArgumentError: `parameters` has another type.
        LayoutError: a wrapped module has a process group without this rank.
    """
    named = name_tensors(parameters) if named is None else named
    return _table(named, parameters if isinstance(parameters, nn.Module) else None, axes)


def gradient_table(tensors: Parameters, axes: tuple[Axis, ...]) -> ShardTable:
    """Make a table of gradients themselves. See `parameter_table` for the arguments."""
    table = _table(name_tensors(tensors, "tensors"), None, axes)
    table.are_gradients = True
    return table


def local_table(parameters: Parameters) -> ShardTable:
    """Make a table of parameters for local operations, which do not need layouts."""
    entries = [(name, tensor, Layout()) for name, tensor in name_tensors(parameters)]
    return ShardTable([tensor for _, tensor, _ in entries], TableMetadata(entries, ()))


def _table(tensors: Named, module: nn.Module | None, axes: tuple[Axis, ...]) -> ShardTable:
    errors = FirstError()
    if any(map(has_carried, tensors_of := [tensor for _, tensor in tensors])):
        remember_all(tensors_of, module)
    errors.add(check_carried(tensors_of))
    # A source that recognizes none of the tensors costs nothing per tensor.
    request = Request(tensors, module, axes, errors)
    readers = [read for source in SOURCES if (read := source.layout_reader(request)) is not None]
    entries: list[tuple[str, Tensor, Layout]] = []
    frozen_errors: dict[int, DistclipError] = {}
    for name, tensor in tensors:
        layout: Layout | None = None
        try:
            for read in readers:
                layout = read(name, tensor, layout)
        except DistclipError as error:
            # The other tensors stay in the table: their groups determine which ranks must raise together.
            if not is_frozen(tensor):
                errors.add(error)
                continue
            # The layout of a frozen parameter does not matter until it gets a gradient.
            frozen_errors[len(entries)] = error
        layout = layout or Layout()
        # If the source of a tensor does not describe the axes of `split_over=`, the tensor is split along each of them.
        if len(layout.split) != len(axes):
            layout = replace(layout, split=(True,) * len(axes))
        if not layout.cut:
            layout = replace(layout, cut=(False,) * len(axes))
        entries.append((name, tensor, layout))
    checks = [check for source in SOURCES for check in source.find_checks(request)]
    metadata = TableMetadata(entries, axes, checks)
    metadata.frozen_errors = frozen_errors
    return ShardTable([tensor for _, tensor, _ in entries], metadata, error=errors.error)


def warn_if_nothing_trains(parameters: Parameters, table: ShardTable) -> None:
    """Warn if an iterator was exhausted, or if gradients were passed instead of parameters.

    Args:
        parameters: argument of the caller.
        table: made from it, without a gradient.
    """
    # A rank that passes `split_over=` may have no parameters, such as a pipeline stage whose layers have none.
    if not table.tensors and not table.axes and isinstance(parameters, Iterator):
        warn_user("`parameters` is an empty generator, no gradient clipping will occur.", UserWarning)
    # Integrations annotate the tensors that stand for parameters, and attach their gradients later.
    if not table.tensors or table.are_gradients or any(map(_may_train, table.tensors)):
        return
    warn_user(
        f"parameters: none of {len(table.tensors)} tensors is a parameter, requires a gradient or has one, so that "
        "nothing is clipped. Pass the parameters themselves, and not their gradients.",
        UserWarning,
    )


def _may_train(tensor: Tensor) -> bool:
    # A gradient with create_graph=True requires a gradient itself. FSDP1's parameters are views after forward.
    trains = tensor.requires_grad and (tensor.is_leaf or tensor.retains_grad or tensor._is_view())
    if trains or is_frozen(tensor) or not SOURCE_ATTRIBUTES.isdisjoint(tensor.__dict__):
        return True
    return tensor.grad is not None or read_main_grad(tensor) is not None


def _unfrozen(name: str) -> ArgumentError:
    return ArgumentError(
        f"{name} has a gradient, and was frozen (requires_grad=False) on all ranks when the clipper was made, so that "
        "it has no slot. Call clipper.rebind(model) after unfreezing parameters."
    )


def _spec_of(tensor: Tensor) -> Any:
    """Return the spec of a DTensor, or None for any other tensor."""
    return None if type(tensor) in _PLAIN or not is_dtensor(tensor) else tensor._spec


def _local(tensor: Any) -> Tensor:
    """Return the local tensor of a DTensor."""
    # `to_local()` goes through autograd. It is needed only to wait for an asynchronous collective.
    local: Tensor = tensor._local_tensor
    return local if type(local) is Tensor else tensor.to_local()
