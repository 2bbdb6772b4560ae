"""Scale the parameter updates of an optimizer's step, so that its moments stay those of the unscaled gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .. import devices
from ..errors import ArgumentError
from ..sharding.dtensor import local_of
from .grad_scaler import parameters_of

__all__ = ["ScaledUpdates", "scale_next_step"]


class ScaledUpdates:
    """Parameters before a step, and the coefficients that scale their updates after it.

    Weight decay within the step is part of the update, as with a smaller learning rate.

    Args:
        tensors: the parameters on this rank.
        slots: slot of each.
        coefs: (slots,) or (1,), in [0, 1].
        optimizers: optimizers that are about to step. Only their parameters move.

    Host syncs: none.
    """

    @torch.no_grad()
    def __init__(
        self, tensors: Sequence[Tensor], slots: Sequence[int], coefs: Tensor, optimizers: Iterable[Optimizer]
    ) -> None:
        stepped = set(map(id, parameters_of(optimizers)))
        known = coefs.tolist() if devices.host_reads_free(coefs.device) else None
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []
        for tensor, slot in zip(tensors, slots, strict=True):
            index = slot if len(coefs) > 1 else 0
            # A host that has not read the coefficients must keep a copy of every parameter.
            if id(tensor) in stepped and (known is None or known[index] != 1):
                local = local_of(tensor.detach())
                coef = coefs[index].to(local.device, torch.promote_types(local.dtype, torch.float32))
                self._before.append((local, local.clone(), coef))

    @torch.no_grad()
    def apply_(self) -> None:
        """Multiply the update that the step has made to each parameter by its coefficient."""
        for tensor, before, coef in self._before:
            if tensor.dtype == coef.dtype or tensor.is_complex():
                tensor.copy_(torch.lerp(before, tensor, coef.to(tensor.dtype)))
            else:
                # The dtype is that of the coefficient, because a step may be as small as the rounding of bfloat16.
                tensor.copy_(torch.lerp(before.to(coef.dtype), tensor.to(coef.dtype), coef))
        self._before = []


def scale_next_step(updates: Sequence[tuple[Optimizer, ScaledUpdates]]) -> list[RemovableHandle]:
    """Scale the parameter updates of each optimizer's next step, which the caller's program makes.

    Args:
        updates: the optimizers and the coefficients of their parameters.

    Returns:
        Handles that cancel the scaling.

    Raises:
        ArgumentError: an optimizer has no hooks.
    """
    handles: list[RemovableHandle] = []
    for optimizer, scaled in updates:
        register: Any = getattr(optimizer, "register_step_post_hook", None)
        if register is None:
            raise ArgumentError(
                f"optimizer={type(optimizer).__name__}: it has no hooks, and the policy scales its step. Pass the "
                "torch.optim.Optimizer in it, or call clipper.step(optimizer)."
            )
        handles.append(_once(register, scaled))
    return handles


def _once(register: Any, scaled: ScaledUpdates) -> RemovableHandle:
    def after_step(*_: Any) -> None:
        handle.remove()
        scaled.apply_()

    handle: RemovableHandle = register(after_step)
    return handle
