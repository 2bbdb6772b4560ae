"""Find calls that clip the parameters of another module than the one that is trained.

Such a call finds no gradient: its parameters are those of a copy, of a module that was replaced, or a list of another
model. Meanwhile an optimizer steps other parameters, which nothing clips.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import UnclippedStepWarning, warn_user
from ..sharding.parameters import is_frozen
from ..sharding.table import ShardTable, TableMetadata
from .consumed import has_had_gradients, is_clipped_anywhere
from .grad_scaler import parameters_of

__all__ = ["warn_if_elsewhere"]

_MANY = 3
"""Number of calls without a gradient, each after another step of an optimizer, until there is a warning."""

_num_calls: weakref.WeakKeyDictionary[TableMetadata, tuple[int, int]] = weakref.WeakKeyDictionary()
"""Number of calls without a gradient by table, and number of steps when the last one was made."""

_last_to_step: list[weakref.ref[Optimizer]] = []  # At most one.
_num_steps = 0
_handles: list[Any] = []


def warn_if_elsewhere(function: str, table: ShardTable) -> None:
    """Warn if calls find no gradient while an optimizer steps parameters that nothing clips.

    Args:
        function: that the user called.
        table: of the parameters. No parameter has a gradient.

    Collectives: none. Host syncs: none.
    """
    num_calls, at = _num_calls.get(table.metadata, (0, -1))
    if num_calls > _MANY or at == _num_steps or has_had_gradients(table) or all(map(is_frozen, table.tensors)):
        return
    if not _handles:
        # Only from now on: a program whose calls find gradients needs no hook.
        _handles.append(register_optimizer_step_post_hook(_remember))
    _num_calls[table.metadata] = num_calls + 1, _num_steps
    optimizer = _last_to_step[0]() if _last_to_step else None
    if num_calls + 1 < _MANY or optimizer is None:
        return
    params, ids = parameters_of([optimizer]), set(map(id, table.tensors))
    num_stepped = sum(param.grad is not None for param in params)
    if not num_stepped or any(id(param) in ids for param in params) or is_clipped_anywhere(params):
        return
    _num_calls[table.metadata] = _MANY + 1, _num_steps
    warn_user(
        f"{function}: it has found no gradient in {_MANY} calls, and {type(optimizer).__name__} steps {num_stepped} "
        "parameters of another module with gradients that nothing clips. Pass the parameters that the optimizer steps.",
        UnclippedStepWarning,
    )


@_disable_dynamo
def _remember(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Remember the optimizer that has stepped last."""
    global _num_steps
    # The step of an optimizer that shows its parameters in another way must not fail.
    if vars(optimizer).get("param_groups"):
        _num_steps += 1
        _last_to_step[:] = [weakref.ref(optimizer)]
