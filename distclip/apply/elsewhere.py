"""Find calls that find no gradient, while an optimizer steps with gradients that nothing clips.

Either the parameters belong to another module: a copy, a module that was replaced, or another model. Or the gradients
are gone: an optimizer within backward has stepped and freed them, or zero_grad() came first.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import UnclippedStepWarning, warn_user
from ..sharding.parameters import is_frozen
from ..sharding.table import ShardTable
from .consumed import has_had_gradients, is_clipped_anywhere
from .grad_scaler import parameters_of

__all__ = ["warn_if_elsewhere"]

_MANY = 3
"""Number of calls without a gradient, each after a further optimizer step, before there is a warning."""

_CALLS = "_distclip_calls"
"""Attribute of a table's first parameter: number of its calls without a gradient, and of steps before the last one."""

_last_to_step: list[weakref.ref[Optimizer]] = []  # At most one.
_num_steps = 0
_handles: list[Any] = []


def warn_if_elsewhere(function: str, table: ShardTable, *, is_alone: bool = True, finds_own: bool = True) -> None:
    """Warn if calls find no gradient while an optimizer steps parameters that nothing clips.

    Args:
        function: name of the function that the user called.
        table: table of the parameters. No parameter has a gradient.
        is_alone: whether no other rank can have gradients of the table. Only then does the function look for another
            module.
        finds_own: warn also if the optimizer steps parameters of the table. A clipper checks that elsewhere.

    Collectives: none. Host syncs: none.
    """
    if not table.tensors or has_had_gradients(table) or all(map(is_frozen, table.tensors)):
        return
    # A clipper watches its parameters from the start.
    if finds_own and is_clipped_anywhere(table.tensors):
        return
    # The count is kept on a parameter, because functions that need no layouts make a new table in every call.
    attributes = vars(table.tensors[0])
    num_calls, at = attributes.get(_CALLS, (0, -1))
    if num_calls > _MANY or at == _num_steps:
        return
    if not _handles:
        # The hook is registered only now, because a program whose calls find gradients needs none.
        _handles.append(register_optimizer_step_post_hook(_remember))
    attributes[_CALLS] = num_calls + 1, _num_steps
    optimizer = _last_to_step[0]() if _last_to_step else None
    if num_calls + 1 < _MANY or optimizer is None:
        return
    params, ids = parameters_of([optimizer]), set(map(id, table.tensors))
    is_own = any(id(param) in ids for param in params)
    if not (finds_own if is_own else is_alone) or is_clipped_anywhere(params):
        return
    # The gradients of parameters in the table are gone by now.
    num_stepped = sum(param.grad is not None for param in params)
    if not is_own and not num_stepped:
        return
    attributes[_CALLS] = _MANY + 1, _num_steps
    name = type(optimizer).__name__
    warn_user(
        f"{function}: it has found no gradient in {_MANY} calls, and {name} has stepped these parameters each time, so "
        "that they move unclipped. Call it between backward() and the step, before zero_grad(). If the optimizer steps "
        "within backward, use GradClipper.in_backward with distclip.budget."
        if is_own
        else f"{function}: it has found no gradient in {_MANY} calls, and {name} steps {num_stepped} parameters of "
        "another module with gradients that nothing clips. Pass the parameters that the optimizer steps.",
        UnclippedStepWarning,
    )


@_disable_dynamo
def _remember(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Remember the optimizer that has stepped last, if it had gradients."""
    global _num_steps
    # The step of an optimizer without `param_groups` must not fail.
    if vars(optimizer).get("param_groups") and any(map(_has_gradient, parameters_of([optimizer]))):
        _num_steps += 1
        _last_to_step[:] = [weakref.ref(optimizer)]


def _has_gradient(param: Tensor) -> bool:
    return param.grad is not None
