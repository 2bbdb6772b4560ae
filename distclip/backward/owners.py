"""Step single parameters of an optimizer, without its other parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..apply.coverage import needs_closure
from ..apply.grad_scaler import parameters_of
from ..apply.optimizers import as_list
from ..apply.step_gate import is_of_torch
from ..errors import ArgumentError

__all__ = ["Owners"]


class Owners:
    """The optimizers of the parameters that are stepped within backward.

    torch's optimizers step some of their parameters and leave the others. An optimizer of another library may have
    values that all of its parameters share, so it steps once, when all of their gradients exist.

    Args:
        optimizers: an optimizer, several, or a mapping whose values are optimizers, for example from parameters.

    Raises:
        ArgumentError: one of them is no optimizer, needs a closure, or shares a parameter with another one.
    """

    def __init__(self, optimizers: Any) -> None:
        listed = as_list(list(optimizers.values()) if isinstance(optimizers, Mapping) else optimizers)
        self.optimizers = list({id(one): one for one in listed}.values())
        self._groups: dict[int, tuple[Optimizer, dict[str, Any]]] = {}
        for optimizer in self.optimizers:
            if needs_closure(optimizer):
                raise ArgumentError(
                    f"optimizers: {type(optimizer).__name__} needs a closure, which makes all gradients within its "
                    "step. Call clipper.attach(optimizer) instead."
                )
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if id(param) in self._groups:
                        raise ArgumentError(
                            f"optimizers: two of them, or two groups, step one parameter of shape "
                            f"{tuple(param.shape)}, which would move twice. Pass each parameter to one optimizer."
                        )
                    self._groups[id(param)] = optimizer, group
        # These are the optimizers that step once, and the parameters whose clipped gradients wait for that step.
        self._waiting = {id(one): [] for one in self.optimizers if not is_of_torch(one)}  # type: dict[int, list[Tensor]]
        self._num_params = {id(one): len(parameters_of([one])) for one in self.optimizers}

    def has(self, param: Tensor) -> bool:
        """Return whether an optimizer steps a parameter."""
        return id(param) in self._groups

    def params(self) -> list[Tensor]:
        """Return the parameters of all optimizers."""
        return parameters_of(self.optimizers)

    def step(self, params: Sequence[Tensor]) -> None:
        """Step parameters that have clipped gradients, and drop these gradients.

        Args:
            params: parameters. The gradient of one that must not move is None.
        """
        for optimizer, own in self._by_optimizer(params):
            waiting = self._waiting.get(id(optimizer))
            if waiting is None:
                _step_only(optimizer, self._groups, [param for param in own if param.grad is not None])
                _drop(own)
                continue
            waiting += own
            if len(waiting) == self._num_params[id(optimizer)]:
                self._step_whole(optimizer)

    def finish(self) -> None:
        """Step the optimizers that still wait for gradients of other parameters, at the end of a backward."""
        for optimizer in self.optimizers:
            if self._waiting.get(id(optimizer)):
                self._step_whole(optimizer)

    def forget(self) -> None:
        """Drop the gradients that wait, because an error has ended the backward."""
        for waiting in self._waiting.values():
            _drop(waiting)
            waiting.clear()

    def _step_whole(self, optimizer: Optimizer) -> None:
        """Step an optimizer of another library once, unless a gradient of its parameters was not finite."""
        waiting = self._waiting[id(optimizer)]
        # It may treat a missing gradient as zero, and move the parameter.
        if all(param.grad is not None for param in waiting):
            optimizer.step()
        _drop(waiting)
        waiting.clear()

    def _by_optimizer(self, params: Iterable[Tensor]) -> list[tuple[Optimizer, list[Tensor]]]:
        found: dict[int, tuple[Optimizer, list[Tensor]]] = {}
        for param in params:
            optimizer = self._groups[id(param)][0]
            found.setdefault(id(optimizer), (optimizer, []))[1].append(param)
        return list(found.values())


def _step_only(
    optimizer: Optimizer, owners: Mapping[int, tuple[Optimizer, dict[str, Any]]], params: Sequence[Tensor]
) -> None:
    """Step some parameters of an optimizer.

    This uses its parameter groups, which a scheduler may have changed.
    """
    if not params:
        return
    by_group: dict[int, tuple[dict[str, Any], list[Tensor]]] = {}
    for param in params:
        group = owners[id(param)][1]
        by_group.setdefault(id(group), (group, []))[1].append(param)
    all_groups, saved = optimizer.param_groups, [(group, group["params"]) for group, _ in by_group.values()]
    try:
        optimizer.param_groups = [group for group, _ in by_group.values()]
        for group, own in by_group.values():
            group["params"] = own
        optimizer.step()
    finally:
        for group, own in saved:
            group["params"] = own
        optimizer.param_groups = all_groups


def _drop(params: Iterable[Tensor]) -> None:
    for param in params:
        param.grad = None
