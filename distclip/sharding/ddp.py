"""Read the process groups of parameters that DistributedDataParallel replicates."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..comm.ranks import Ranks
from .layout import Layout
from .replicas import replica_group
from .source import LayoutReader, Request, Source
from .split_over import group_ranks

__all__ = ["DDPSource", "ddp_modules", "is_joining"]


class DDPSource(Source):
    """Parameters that DistributedDataParallel keeps equal on the ranks of its process group."""

    title = "DDP"

    def layout_reader(self, request: Request) -> LayoutReader | None:
        """Return a reader that adds DDP's process group to a layout."""
        replicated = {} if request.module is None else _replicated_ranks(request.module)
        if not replicated:
            return None

        def read(name: str, tensor: Tensor, known: Layout | None) -> Layout | None:
            # Replicas need no sum. But with their group in the layout, all ranks decide from one total, even if the
            # gradient of one rank has changed after DDP averaged it.
            ranks = replicated.get(id(tensor))
            layout = Layout() if known is None else known
            if ranks is None:
                return known
            return replace(
                layout,
                groups=(*layout.groups, ranks),
                is_averaged=not layout.groups,
                replicas=(*layout.replicas, *replica_group(ranks)),
            )

        return read


def ddp_modules(module: nn.Module) -> list[weakref.ref[DistributedDataParallel]]:
    """Return references to every DDP module in `module`."""
    return [weakref.ref(one) for one in module.modules() if isinstance(one, DistributedDataParallel)]


def is_joining(modules: Iterable[weakref.ref[DistributedDataParallel]]) -> bool:
    """Return whether DDP trains on uneven inputs (`DDP.join`).

    Other ranks may have no inputs left then. torch does not reset this at the end of the context, so it stays True
    until the next context.

    Args:
        modules: see `ddp_modules`.
    """
    return any((module := one()) is not None and module._join_config.enable for one in modules)


def _replicated_ranks(module: nn.Module) -> dict[int, Ranks]:
    """Return the ranks that hold a replica of each parameter that DDP manages in `module`, by `id`."""
    ranks: dict[int, Ranks] = {}
    for wrapped in module.modules():
        if isinstance(wrapped, DistributedDataParallel):
            group = group_ranks(wrapped.process_group)
            ignored = wrapped.parameters_to_ignore
            managed = (param for name, param in wrapped.module.named_parameters() if name not in ignored)
            ranks |= {id(param): group for param in managed}
    return ranks
