"""Refuse gradients that FSDP2 has not reduced yet, which it keeps outside of the parameters' `.grad`."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import LayoutError
from .source import LayoutReader, Request, Source

__all__ = ["FSDP2Source", "before_reduction", "param_groups"]


class FSDP2Source(Source):
    """Parameters that `fully_shard` manages. They are DTensors, whose layouts another source reads."""

    def layout_reader(self, request: Request) -> LayoutReader | None:
        """Return None, because placements describe these parameters."""
        return None

    def find_checks(self, request: Request) -> Sequence[Callable[[], None]]:
        """Return a check that gradients are reduced before they are read."""
        groups = [weakref.ref(group) for group in param_groups({id(tensor) for _, tensor in request.tensors})]
        if not groups:
            return ()

        def check() -> None:
            for reference in groups:
                group = reference()
                # Both flags are true, except in a program that accumulates gradients without communication.
                if group is not None and not (group.reduce_grads and group.all_reduce_grads) and _waits(group):
                    raise LayoutError(
                        f"parameters={group._module_fqn or 'model'}: FSDP2 has accumulated gradients that are not "
                        "reduced over ranks yet, because their synchronization is switched off. Clip after a backward "
                        "with model.set_requires_gradient_sync(True) and model.set_requires_all_reduce(True)."
                    )

        return (check,)


def before_reduction(group: Any, function: Callable[[], None]) -> Callable[[], None]:
    """Call a function before FSDP2 reduces a group's gradients, while their shards do not exist yet.

    Args:
        group: one of the groups that `param_groups` returns.
        function: the function. Every backward calls it at the same point on all ranks.

    Returns:
        A function that ends this.
    """
    original = group.post_backward

    def post_backward(*arguments: Any) -> None:
        function()
        original(*arguments)

    group.post_backward = post_backward

    def restore() -> None:
        if vars(group).get("post_backward") is post_backward:
            group.post_backward = original

    return restore


def param_groups(ids: set[int]) -> list[Any]:
    """Return FSDP2's groups of parameters that contain one of these tensors."""
    # A program that has not imported FSDP2 has no such groups. torch keeps no reference from a parameter to its group.
    states: Any = sys.modules.get("torch.distributed._composable_state")
    if states is None or "torch.distributed.fsdp" not in sys.modules:
        return []
    found: dict[int, Any] = {}
    for state in [reference() for reference in list(states._module_state_mapping.values())]:
        known = vars(state) if state is not None else {}
        # Before torch 2.12 a module had one group.
        groups = known.get("_fsdp_param_groups") or [known.get("_fsdp_param_group")]
        for group in groups:
            if group is not None and any(id(param.sharded_param) in ids for param in group.fsdp_params):
                found[id(group)] = group
    return list(found.values())


def _waits(group: Any) -> bool:
    """Return whether a gradient of a group waits to be reduced."""
    if group._partial_reduce_output is not None:
        return True
    for param in group.fsdp_params:
        unsharded: Tensor | None = vars(param).get("_unsharded_param")
        if param.unsharded_accumulated_grad is not None or (unsharded is not None and unsharded.grad is not None):
            return True
    return False
