"""Verdict → optimizer: a factor that a fused optimizer applies itself, and a step that it leaves out itself.

torch's fused optimizers divide gradients by their attribute `grad_scale` and do nothing at all where `found_inf` is
exactly 1.0, both without the host knowing. That saves a pass over the gradients wherever they have to be multiplied
anyway (a loss scale), and the host's wait wherever a step may have to be skipped.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["fused_step", "supports_grad_scale"]


def supports_grad_scale(optimizer: Optimizer) -> bool:
    """Whether an optimizer divides by `grad_scale` without losing precision over it.

    On CPU the kernels round `grad_scale` to the parameters' dtype: 0.4 % off for bfloat16.

    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> supports_grad_scale(torch.optim.AdamW([weight], fused=True)), supports_grad_scale(torch.optim.AdamW([weight]))
    (True, False)
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    if "grad_scaler" in inspect.signature(optimizer.step).parameters:
        return False
    narrow = (torch.float16, torch.bfloat16)
    return all(
        group.get("fused") and not any(p.device.type == "cpu" and p.dtype in narrow for p in group["params"])
        for group in optimizer.param_groups
    )


@contextmanager
def fused_step(optimizers: Sequence[Optimizer], divisor: Tensor | None, found_inf: Tensor) -> Iterator[None]:
    """For the length of a step, let fused optimizers divide gradients and leave the step out.

    Args:
        optimizers: for which `supports_grad_scale`.
        divisor: 0-d float32; None to divide by nothing.
        found_inf: 0-d float32, exactly 1.0 to leave the step out.

    The attributes are removed again whatever happens.
    """
    for optimizer in optimizers:
        optimizer.grad_scale, optimizer.found_inf = divisor, found_inf  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for optimizer in optimizers:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
