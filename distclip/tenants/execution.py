"""Carry out the decisions about isolated groups, each of which makes or skips its step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..apply.grad_scaler import ScalerState, parameters_of
from ..apply.step_gate import hold_still
from ..engine.execution import Execution
from ..outcome import Outcome
from ..sharding.slots import SlotMap

__all__ = ["IsolatedExecution"]


class IsolatedExecution(Execution):
    """Carry out decisions in which some groups may skip the step.

    Args:
        args: see `Execution`.
        slots: slots of the groups.
        raise_too_many: raises if a group has skipped too many steps.
    """

    def __init__(self, *args: Any, slots: SlotMap, raise_too_many: Callable[[], None]) -> None:
        super().__init__(*args)
        self._ids_by_slot = self._find_ids(slots)
        self._raise_too_many = raise_too_many

    def _find_ids(self, slots: SlotMap) -> list[set[int]]:
        """Return the ids of this rank's parameters in each slot."""
        ids: list[set[int]] = [set() for _ in slots.names]
        for name, tensor in zip(self.table.names, self.table.tensors, strict=True):
            slot, _ = slots.by_name.get(name, (0, None))
            ids[slot].add(id(tensor))
        return ids

    def step(
        self,
        outcome: Outcome,
        optimizers: list[Optimizer],
        state: ScalerState | None,
        *,
        is_scaled: bool,
        was_scaled: bool,
    ) -> bool:
        if not outcome.skip.host:
            self.write_(outcome, outcome.shards)
        # A skipped group keeps gradients that no optimizer has stepped.
        watched = None if outcome.skip.host or self.skipped_ids(outcome) else self.coverage.watch(optimizers)
        self._make_step(optimizers, outcome, state, watched, fuse=False, was_scaled=was_scaled)
        # The other groups have made their step.
        self._raise_too_many()
        return False

    def write_or_drop(self, outcome: Outcome, state: ScalerState | None) -> None:
        if state is not None:
            # The caller's `scaler.step` makes the step of the groups that are finite.
            overflow = outcome.overflow.on(outcome.coefs.device).to(torch.float32)
            state.set_found_inf(overflow * outcome.skip.read(), elsewhere=overflow)
        if not outcome.skip.host:
            self.write_(outcome, outcome.shards)
        if skipped := self.skipped_ids(outcome):
            # An optimizer's step must not move skipped parameters, not even by momentum from earlier gradients.
            selected = skipped if self.table.only is None else skipped & self.table.only
            self.table.only = frozenset(selected)
            self.table.drop_gradients()
            hold_still(self, self.table.selected())

    def skipped_ids(self, outcome: Outcome) -> frozenset[int]:
        """Return the ids of this rank's parameters in groups that skip the step. Host syncs: none."""
        assert outcome.skips is not None
        if not bool(outcome.skips.any()):
            return frozenset()
        ids = (self._ids_by_slot[slot] for slot, skipped in enumerate(outcome.skips.tolist()) if skipped)
        return frozenset[int]().union(*ids)

    def _advance(
        self, optimizers: Sequence[Optimizer], outcome: Outcome, state: ScalerState | None, fuse: bool
    ) -> None:
        """Step optimizers as if they did not have the parameters of skipped groups."""
        # An overflow in any group lowers the scale, as an overflow in any of several optimizers does.
        step, overflow = partial(_step_without, skipped=self.skipped_ids(outcome)), outcome.overflow
        self.optimizers.advance(
            optimizers, outcome.coefs, outcome.skip, overflow=overflow, state=state, fuse=False, step=step
        )


def _step_without(optimizer: Optimizer, skipped: frozenset[int]) -> None:
    """Step an optimizer as if it did not have some of its parameters.

    Args:
        optimizer: an optimizer of any library.
        skipped: ids of the parameters.
    """
    params = parameters_of([optimizer])
    left_out = [param for param in params if id(param) in skipped] if skipped else []
    if not left_out:
        optimizer.step()
        return
    # An optimizer that has only skipped groups makes no step, as if each of them were trained alone.
    if all(param.grad is None for param in params if id(param) not in skipped):
        return
    grads = [param.grad for param in left_out]
    groups: list[tuple[dict[str, Any], Sequence[Tensor]]] = [
        (group, group["params"]) for group in optimizer.param_groups
    ]
    try:
        for param in left_out:
            param.grad = None
        for group, kept in groups:
            # An optimizer that is not torch's may move parameters without a gradient, by momentum or weight decay.
            group["params"] = [param for param in kept if id(param) not in skipped]
        optimizer.step()
    finally:
        for group, kept in groups:
            group["params"] = kept
        for param, grad in zip(left_out, grads, strict=True):
            param.grad = grad
