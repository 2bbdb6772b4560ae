"""Step fused optimizers inside a graph, where torch's own `step` breaks it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..sharding.dtensor import is_dtensor
from . import ops

__all__ = ["local_tensors", "reason_against_optimizer", "step_"]


def reason_against_optimizer(optimizer: Optimizer) -> str | None:
    """Return the reason why an optimizer cannot step inside a graph, or None."""
    if type(optimizer) not in (Adam, AdamW, SGD):
        return f"{type(optimizer).__name__} has no kernel that skips a step on the device: use AdamW, Adam or SGD"
    for group in optimizer.param_groups:
        if not group["fused"]:
            return f"{type(optimizer).__name__} is not fused, so that the host decides about a step: pass fused=True"
        key = "step" if type(optimizer) is not SGD else "momentum_buffer" if group["momentum"] else None
        for param in group["params"] if key is not None else ():
            if param.grad is not None and (param not in optimizer.state or key not in optimizer.state[param]):
                return "the optimizer has made no step, and has no state: make the first step outside of the graph"
    return None


def step_(optimizer: Optimizer, found_inf: Tensor) -> None:
    """Take a step of a fused optimizer, or none if `found_inf` is 1.

    Args:
        optimizer: one without a `reason_against_optimizer`.
        found_inf: 0-d float32.
    """
    for group in optimizer.param_groups:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            continue
        # The operators take plain tensors, because a custom operator has no rule for DTensors.
        local_params, grads = local_tensors(params), local_tensors([param.grad for param in params])
        lr = group["lr"]
        lr_tensor, lr = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
        if type(optimizer) is SGD:
            has_momentum = group["momentum"] != 0
            buffers = _states_of(optimizer, params, "momentum_buffer") if has_momentum else []
            ops.fused_sgd_(
                local_params,
                grads,
                buffers,
                found_inf,
                lr_tensor,
                lr,
                group["weight_decay"],
                group["momentum"],
                group["dampening"],
                group["nesterov"],
                group["maximize"],
            )
            continue
        beta1, beta2 = group["betas"]
        amsgrad = group["amsgrad"]
        ops.fused_adam_(
            local_params,
            grads,
            _states_of(optimizer, params, "exp_avg"),
            _states_of(optimizer, params, "exp_avg_sq"),
            _states_of(optimizer, params, "max_exp_avg_sq") if amsgrad else [],
            _states_of(optimizer, params, "step"),
            found_inf,
            lr_tensor,
            lr,
            beta1,
            beta2,
            group["weight_decay"],
            group["eps"],
            amsgrad,
            group["maximize"],
            group.get("decoupled_weight_decay", type(optimizer) is AdamW),
        )


def _states_of(optimizer: Optimizer, params: list[Any], key: str) -> list[Tensor]:
    """Return the local tensor under one key of each parameter's state."""
    return local_tensors([optimizer.state[param][key] for param in params])


def local_tensors(tensors: list[Any]) -> list[Tensor]:
    """Return the local tensors of DTensors, and all other tensors unchanged."""
    return [tensor.to_local() if is_dtensor(tensor) else tensor for tensor in tensors]
