"""Choose the gradients to clip before one of several attached optimizers steps.

Optimizers that share a loss are clipped together, by their common norm, before the first of them steps. Optimizers that
step in turn, each after its own backward pass, are clipped one by one. Both cases can look the same at the first step,
so the first clip includes all new gradients. From then on, a clip leaves out the gradients that were never stepped, and
those of an optimizer that has stepped while the present one had no new gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..comm import Comm
from ..devices import accumulation_dtype
from ..sharding.dtensor import local_of
from ..sharding.megatron import read_main_grad
from .grad_scaler import parameters_of

__all__ = ["Turns"]

_SEEN = "_distclip_version"
"""Attribute of a gradient that has been clipped: its version at that time. A new gradient has no such attribute."""


class Turns:
    """Remembers which gradients of several optimizers have been clipped. All ranks make the same choices."""

    def __init__(self) -> None:
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._forget()

    def _forget(self) -> None:
        # Pairs (optimizer that stepped, optimizer whose gradients of the same backward were not stepped).
        self._separate: set[tuple[int, int]] = set()
        # Optimizers that were clipped together with another one and have not stepped since, and that other one.
        self._clipped_with: dict[int, int] = {}
        self._skipped: dict[int, bool] = {}
        # Optimizers whose last clip was of their gradients alone.
        self._alone: set[int] = set()
        # Optimizers that the last decision is for, and those of them that have declined. None once one has stepped.
        self._deciding: tuple[set[int], set[int]] | None = None

    def add(self, optimizers: Iterable[Optimizer]) -> None:
        """Add optimizers, on every rank in the same order."""
        self._optimizers += map(weakref.ref, optimizers)

    def remove(self, optimizers: Iterable[Optimizer]) -> None:
        """Remove optimizers, and forget the past steps of the others."""
        ids = set(map(id, optimizers))
        self._optimizers = [weakref.ref(one) for one in self.optimizers if id(one) not in ids]
        self._forget()

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers, in order."""
        return [one for reference in self._optimizers if (one := reference()) is not None]

    def index(self, optimizer: Optimizer) -> int:
        """Return the position of an optimizer."""
        return [one is optimizer for one in self.optimizers].index(True)

    def to_clip(self, optimizer: Optimizer, comm: Comm) -> list[Optimizer] | None:
        """Return the optimizers whose gradients to clip before a step of one of them.

        Args:
            optimizer: the one that steps.
            comm: the ranks that step together. All of them step this optimizer.

        Returns:
            The optimizers, the same on every rank. None if the gradients of `optimizer` have been clipped already.

        Collectives: one all-reduce. Host syncs: one on an accelerator.
        """
        optimizers = self.optimizers
        facts = [float(any(map(_is_new, _gradients([one])))) for one in optimizers]
        device = comm.device or torch.device("cpu")
        counts = torch.tensor(facts, dtype=accumulation_dtype(device), device=device)
        comm.sum_(counts)
        is_new = [count > 0 for count in counts.tolist()]
        own = self.index(optimizer)
        for other, new in enumerate(is_new):
            # Its gradients were clipped with those of an optimizer that stepped, and were replaced before their own
            # optimizer stepped.
            if new and other in self._clipped_with:
                self._separate.add((self._clipped_with.pop(other), other))
        self._clipped_with.pop(own, None)
        if not is_new[own]:
            return None
        for i, new in enumerate(is_new):
            # Two networks that are trained in turn each step while the other has no new gradients.
            if new and i != own and i in self._alone:
                self._separate.add((own, i))
        chosen = [i for i, new in enumerate(is_new) if i == own or (new and (own, i) not in self._separate)]
        self._alone.discard(own)
        if is_new.count(True) == 1:
            self._alone.add(own)
        self._clipped_with |= {i: own for i in chosen if i != own}
        return [optimizers[i] for i in chosen]

    def record(self, optimizers: Sequence[Optimizer], *, skipped: bool) -> None:
        """Record that the gradients of these optimizers have been clipped, or dropped."""
        ids = set(map(id, optimizers))
        for i, one in enumerate(self.optimizers):
            if id(one) in ids:
                self._skipped[i] = skipped
        for grad in _gradients(optimizers):
            vars(grad)[_SEEN] = _version(grad)

    def begin_decision(self, optimizers: Sequence[Optimizer]) -> None:
        """Begin to note which of these optimizers make the step of the last decision."""
        ids = set(map(id, optimizers))
        self._deciding = {i for i, one in enumerate(self.optimizers) if id(one) in ids}, set()

    def end_step(self, optimizer: Optimizer, *, declined: bool) -> bool:
        """Note whether an optimizer has made its step.

        Returns:
            Whether the last decision has no effect, because all optimizers that it is for have declined their steps.
        """
        if self._deciding is None or not declined:
            self._deciding = None
            return False
        decided, have_declined = self._deciding
        have_declined.add(self.index(optimizer))
        if decided <= have_declined:
            self._deciding = None
            return True
        return False

    def end_decision(self) -> bool:
        """End the last decision, and return whether optimizers have declined it and none has stepped."""
        deciding, self._deciding = self._deciding, None
        return deciding is not None and bool(deciding[1])

    def was_skipped(self, optimizer: Optimizer) -> bool:
        """Return whether the last decision about the gradients of an optimizer skipped its step."""
        return self._skipped.get(self.index(optimizer), False)


def _gradients(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    grads = [read_main_grad(param) if param.grad is None else param.grad for param in parameters_of(optimizers)]
    return [grad for grad in grads if grad is not None]


def _is_new(grad: Tensor) -> bool:
    return bool(vars(grad).get(_SEEN) != _version(grad))


def _version(grad: Tensor) -> int:
    # Operations on a DTensor write its local tensor.
    return local_of(grad)._version
