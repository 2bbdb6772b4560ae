"""Read the layouts of FSDP1 parameters: one-dimensional slices that only the wrapped module can describe."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import LayoutError
from .annotations import annotation_of
from .dtensor import is_dtensor
from .layout import Layout, product
from .parameters import is_frozen
from .replicas import replica_group
from .source import LayoutReader, Request, Slice, Source
from .split_over import group_ranks

__all__ = ["FSDP1Source", "is_flattened"]

_FLATTENED = "_fsdp_flattened"
"""Attribute that FSDP1 sets on every parameter that it manages."""


def is_flattened(tensor: Tensor) -> bool:
    """Return whether FSDP1 manages a tensor."""
    return bool(getattr(tensor, _FLATTENED, False)) and not is_dtensor(tensor)


class FSDP1Source(Source):
    """Parameters that FullyShardedDataParallel manages."""

    title = "FSDP1"
    attributes = frozenset({_FLATTENED})

    def layout_reader(self, request: Request) -> LayoutReader | None:
        """Return a reader that looks parameters up in the wrapped modules."""
        managed = {} if request.module is None else _layouts(request.module)

        def read(name: str, tensor: Tensor, known: Layout | None) -> Layout | None:
            # FSDP1 describes a parameter completely, except for axes that an annotation adds.
            if (layout := managed.get(id(tensor))) is not None:
                annotated = annotation_of(tensor).layout
                return product(layout, annotated) if annotated.groups else layout
            if is_flattened(tensor):
                raise LayoutError(
                    f"{name} is managed by FullyShardedDataParallel (FSDP1), and a bare parameter does not show which "
                    "slice of it this rank holds, nor which ranks hold the other slices. Pass the wrapped root module "
                    "itself: parameters=model instead of model.parameters()."
                )
            return known

        return read

    def find_checks(self, request: Request) -> Sequence[Callable[[], None]]:
        """Return a check that parameters and gradients are slices, as their layouts assume."""
        modules = [] if request.module is None else _managed(request.module)
        sharded = [weakref.ref(wrapped) for wrapped, handle in modules if handle.uses_sharded_strategy]
        if not sharded:
            return ()

        def check() -> None:
            for reference in sharded:
                wrapped = reference()
                if wrapped is not None and _is_gathered(wrapped._handle.flat_param):
                    raise LayoutError(
                        "parameters=model: FullyShardedDataParallel (FSDP1) shows whole parameters or gradients now in "
                        "place of this rank's slices, within summon_full_params or after a backward under no_sync. "
                        "Clip outside of summon_full_params, after a backward outside of no_sync."
                    )

        return (check,)

    def find_slices(self, request: Request) -> Mapping[int, Slice]:
        """Return the position of every slice in its parameter.

        Raises:
            LayoutError: the module was wrapped without use_orig_params=True.
        """
        slices: dict[int, Slice] = {}
        for _, handle in () if request.module is None else _managed(request.module):
            flat = handle.flat_param
            if flat._params is None and is_frozen(flat):
                continue
            if flat._params is None:
                raise LayoutError(
                    "FullyShardedDataParallel without use_orig_params=True has made one flat parameter of many, so "
                    'that they have no separate norms. Wrap with use_orig_params=True, or use per="model".'
                )
            if handle.uses_sharded_strategy:
                for param, shape, shard in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
                    # The start is None for a parameter of which this rank holds no element.
                    slices[id(param)] = Slice(tuple(shape), shard.intra_param_start_idx or 0)
        return slices


def _layouts(module: nn.Module) -> dict[int, Layout]:
    """Return the layout of every parameter that FSDP1 manages in `module`, by `id`."""
    layouts: dict[int, Layout] = {}
    for wrapped, handle in _managed(module):
        # NO_SHARD keeps replicas, as DDP does.
        layout = Layout()
        if handle.uses_sharded_strategy:
            shards = group_ranks(wrapped.process_group)
            # FULL_SHARD and SHARD_GRAD_OP cut the flattened gradient over the process group. The hybrid strategies do
            # so within a node, and keep replicas across nodes.
            across = getattr(wrapped, "_inter_node_pg", None)
            replicas = () if across is None else (group_ranks(across),)
            layout = Layout(
                (shards, *replicas),
                num_pieces=len(shards),
                replicas=tuple(group for ranks in replicas for group in replica_group(ranks)),
            )
        flat = handle.flat_param
        for param in (flat, *(flat._params or ()), *(flat._shared_params or ())):
            layouts[id(param)] = layout
    return layouts


def _is_gathered(flat: Any) -> bool:
    """Return whether a flat parameter, or one of its gradients, is whole instead of this rank's slice."""
    sharded_size, grad = flat._sharded_size, flat.grad
    return bool(flat.size() != sharded_size or (grad is not None and grad.size() != sharded_size))


def _managed(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield every FSDP1 module in `module` that has parameters, with its handle."""
    # A program that has not imported FSDP1 has no such modules.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for wrapped in () if fsdp is None else fsdp.FullyShardedDataParallel.fsdp_modules(module):
        if wrapped._handle is not None:
            yield wrapped, wrapped._handle
