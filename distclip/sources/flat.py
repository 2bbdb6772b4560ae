"""One-dimensional slices of a flattened module: FSDP1, which only the wrapped module can describe."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from ..errors import LayoutError
from ..shards import Layout
from .split import group_ranks

__all__ = ["flat_layouts", "refuse_bare"]


def flat_layouts(module: nn.Module) -> dict[int, Layout]:
    """The layout of every parameter that FSDP1 manages in `module`, by `id`.

    FULL_SHARD and SHARD_GRAD_OP cut the flattened gradient over the process group; the hybrid strategies do so within
    a node and keep copies across nodes; NO_SHARD keeps copies, as DDP does.

    Args:
        module: the root that was wrapped.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return {}
    layouts: dict[int, Layout] = {}
    for wrapped in fsdp.FullyShardedDataParallel.fsdp_modules(module):
        handle = wrapped._handle
        if handle is None:
            continue
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
