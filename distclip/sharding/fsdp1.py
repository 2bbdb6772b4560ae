"""One-dimensional slices of flattened parameters: FSDP1, which only the wrapped module can describe, and whatever an
owner hands over as slices (`set_layout`): ZeRO."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import LayoutError
from .annotations import annotation_of
from .layout import Layout
from .split_over import group_ranks

__all__ = ["flat_layouts", "flat_slices", "marked_slices", "refuse_bare"]


def flat_layouts(module: nn.Module) -> dict[int, Layout]:
    """The layout of every parameter that FSDP1 manages in `module`, by `id`.

    FULL_SHARD and SHARD_GRAD_OP cut the flattened gradient over the process group; the hybrid strategies do so within
    a node and keep copies across nodes; NO_SHARD keeps copies, as DDP does.

    Args:
        module: the root that was wrapped.
    """
    layouts: dict[int, Layout] = {}
    for wrapped, handle in _managed(module):
        layout = Layout()
        if handle.uses_sharded_strategy:
            shards = group_ranks(wrapped.process_group)
            across = getattr(wrapped, "_inter_node_pg", None)
            groups = (shards,) if across is None else (shards, group_ranks(across))
            layout = Layout(groups, pieces=len(shards))
        flat = handle.flat_param
        for param in (flat, *(flat._params or ()), *(flat._shared_params or ())):
            layouts[id(param)] = layout
    return layouts


def flat_slices(module: nn.Module) -> dict[int, tuple[tuple[int, ...], int]]:
    """By `id`, the shape of every parameter that FSDP1 cut and where in it, counted in elements, this rank's slice is.

    Raises:
        LayoutError: the module has flattened its parameters for good, so that none of them has a norm of its own.
    """
    slices: dict[int, tuple[tuple[int, ...], int]] = {}
    for _, handle in _managed(module):
        flat = handle.flat_param
        if flat._params is None:
            raise LayoutError(
                "FullyShardedDataParallel without use_orig_params=True has made one flat parameter of many: none of "
                'them has a norm of its own. Wrap with use_orig_params=True, or write per="model".'
            )
        if handle.uses_sharded_strategy:
            for param, shape, here in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
                slices[id(param)] = (tuple(shape), here.intra_param_start_idx or 0)
    return slices


def marked_slices(tensors: Iterable[Tensor]) -> dict[int, tuple[tuple[int, ...], int]]:
    """The same of tensors that are slices by what `set_layout` was told: ZeRO's partitions."""
    marked = ((tensor, annotation_of(tensor).slice) for tensor in tensors)
    return {id(tensor): slice for tensor, slice in marked if slice is not None}


def refuse_bare(name: str, tensor: Tensor) -> None:
    """Refuse a parameter that FSDP1 flattened when the module that knows where its slices lie was not passed.

    Raises:
        LayoutError: the tensor carries FSDP1's mark.
    """
    if getattr(tensor, "_fsdp_flattened", False):
        raise LayoutError(
            f"{name} is managed by FullyShardedDataParallel (FSDP1): a bare parameter does not say which slice of it "
            "this rank holds, nor over which ranks the others lie. Pass the wrapped root module itself: "
            "parameters=model instead of model.parameters()."
        )


def _managed(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Every FSDP1 module in `module` that has parameters, with its handle; FSDP1 is not imported to find out."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for wrapped in () if fsdp is None else fsdp.FullyShardedDataParallel.fsdp_modules(module):
        if wrapped._handle is not None:
            yield wrapped, wrapped._handle
