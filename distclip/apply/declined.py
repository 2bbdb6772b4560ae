"""Find out whether optimizers have made the step that they were called for.

A wrapper may decline a step: torchft's does so if a replica has failed, a mixed-precision wrapper after an overflow.
Its own `step` still returns normally, so a policy would continue from a step that did not take place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.optim import Optimizer

from ..sharding.dtensor import local_of
from .grad_scaler import parameters_of

__all__ = ["StepWatch", "watch_steps"]

_MAX_PARAMETERS = 8
"""Number of parameters whose versions are compared, in case a wrapper steps them without its inner optimizer."""


class StepWatch:
    """Watches the steps of optimizers that contain other optimizers.

    Args:
        inner: for each optimizer of the caller, the optimizers in it that torch's hooks can watch. Empty for an
            optimizer that makes its steps itself.
        optimizers: the caller's optimizers.
    """

    def __init__(self, inner: Sequence[Sequence[Optimizer]], optimizers: Sequence[Optimizer]) -> None:
        self._inner = inner
        self._stepped: set[int] = set()
        self._handles = [one.register_step_post_hook(self._record) for several in inner for one in several]
        params = [param for param in parameters_of(optimizers) if param.grad is not None][:_MAX_PARAMETERS]
        self._tensors = [*params, *map(local_of, params)]
        self._versions = [tensor._version for tensor in self._tensors]

    def all_declined(self) -> bool:
        """Stop watching, and return whether no optimizer has made its step."""
        self.stop()
        if any(not several for several in self._inner) or self._stepped:
            return False
        return self._versions == [tensor._version for tensor in self._tensors]

    def stop(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _record(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped.add(id(optimizer))


def watch_steps(optimizers: Sequence[Optimizer]) -> StepWatch | None:
    """Watch the next steps of optimizers, or return None if none of them contains another one.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    >>> class Wrapper(torch.optim.Optimizer):
    ...     def __init__(self, optimizer):
    ...         self.inner, self.param_groups = optimizer, optimizer.param_groups
    ...     def step(self, closure=None):
    ...         pass
    >>> wrapper = Wrapper(optimizer)
    >>> watch = watch_steps([wrapper])
    >>> wrapper.step()
    >>> watch.all_declined(), watch_steps([optimizer])
    (True, None)
    """
    inner = [list(_inner_optimizers(optimizer, depth=3)) for optimizer in optimizers]
    return StepWatch(inner, optimizers) if any(inner) else None


def _inner_optimizers(optimizer: Any, depth: int) -> Iterator[Optimizer]:
    """Yield the optimizers with torch's hooks in the attributes of another one, and those nested deeper."""
    for value in list(getattr(optimizer, "__dict__", {}).values()):
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, Optimizer) and one is not optimizer:
                if "_optimizer_step_post_hooks" in vars(one):
                    yield one
                elif depth:
                    yield from _inner_optimizers(one, depth - 1)
