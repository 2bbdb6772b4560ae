"""Optimizers that tests step: one row each.

A new row is used by every test that is parametrized over `OPTIMIZERS`, `FUSED_KINDS` or `FUSED`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from distclip.apply.fused import supports_grad_scale

__all__ = ["FUSED", "OPTIMIZERS", "FusedOptimizer"]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda groups: SGD(groups, lr=0.01, momentum=0.9),
    "adamw": lambda groups: AdamW(groups, lr=0.01, foreach=True),
    "fused": lambda groups: AdamW(groups, lr=0.01, fused=True),
}
"""Ways to step: from gradients that were scaled in place, in one multi-tensor kernel, and in a fused kernel."""


@dataclass(frozen=True)
class FusedOptimizer:
    """A class of torch whose fused kernel multiplies gradients by `grad_scale` and skips by `found_inf`."""

    kind: type[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, params: Any, *, fused: bool = True) -> Optimizer:
        """Make the optimizer, for comparison also one without the fused kernel."""
        return self.kind(params, fused=True, **self.options) if fused else self.kind(params, **self.options)


FUSED: dict[str, FusedOptimizer] = {
    "Adam": FusedOptimizer(Adam, {"lr": 0.01}),
    "AdamW": FusedOptimizer(AdamW, {"lr": 0.01, "amsgrad": True}),
    "SGD": FusedOptimizer(SGD, {"lr": 0.01, "momentum": 0.9}),
}
# Torch 2.10 declares that this one ignores the factor.
if supports_grad_scale(Adagrad([nn.Parameter(torch.zeros(1))], fused=True)):
    FUSED["Adagrad"] = FusedOptimizer(Adagrad, {"lr": 0.01})
