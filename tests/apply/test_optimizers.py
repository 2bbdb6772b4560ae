"""Optimizers that come and go: none of them is kept alive, and none of them leaves an entry behind."""

from __future__ import annotations

import gc

import torch

from distclip import GradClipper, global_norm


def test_optimizers_that_are_gone_leave_nothing_behind() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    clipper = GradClipper([("weight", weight)], global_norm(1.0))
    # On a CPU the ranks compare no optimizers.
    clipper._engine.optimizers._on_host = lambda: False
    known = clipper._engine.optimizers._known
    for _ in range(50):
        optimizer = torch.optim.SGD([weight], lr=0.1)
        weight.grad = torch.ones(2)
        clipper.step(optimizer)
    gc.collect()
    assert len(known) == 1, "the last one is still alive"
    del optimizer
    gc.collect()
    assert not known
