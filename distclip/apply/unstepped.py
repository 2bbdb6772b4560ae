"""Find gradients that are clipped, and that no optimizer steps.

They make the norm too large, so that the parameters that are stepped are clipped too much. Usual causes are an
optimizer of only a part of the model, a part that was meant to be frozen, and gradients of another network that were
not set to None. `GradClipper.step` gets its optimizers and raises. After `clip` and the functions, only the optimizer
steps that follow reveal this, so the first calls with each set of parameters are compared with those steps.

A parameter counts as stepped if an optimizer has it, or if it moves, because of a step by hand or because a copy is
written back.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import UnclippedStepWarning, warn_user
from ..sharding.dtensor import local_of
from ..sharding.table import ShardTable, TableMetadata
from .by_hand import first_elements
from .grad_scaler import parameters_of

__all__ = ["await_steps", "warn_if_unstepped"]

_MANY = 8
"""Number of consecutive calls without a step of some gradient, before there is a warning.

Networks that are trained in turn have fewer.
"""

_MAX_CALLS = 16
"""Number of calls of each table that are compared."""

_MAX_NAMED = 3
"""Number of parameters whose values are compared, and that the warning names."""

_MAX_OPTIMIZERS = 64
"""Number of optimizers that are remembered. With more, nothing is found."""


@dataclass(slots=True)
class _Waiting:
    """Gradients of a table that were clipped.

    Args:
        num_calls: number of calls so far.
        at: number of steps when the last call was made.
        with_grad: positions of the parameters whose gradients it has clipped.
        unstepped: positions of those that were not stepped after `num_missed` calls in a row.
        num_missed: see `unstepped`.
        values: first elements of some of these parameters before these calls.
    """

    num_calls: int = 0
    at: int = 0
    with_grad: list[int] = field(default_factory=list)
    unstepped: set[int] = field(default_factory=set)
    num_missed: int = 0
    values: dict[int, Tensor] = field(default_factory=dict)


_waiting: weakref.WeakKeyDictionary[TableMetadata, _Waiting] = weakref.WeakKeyDictionary()

# Optimizers that have stepped, by identity, and the number of steps of all optimizers when each stepped last.
_stepped: dict[int, tuple[weakref.ref[Optimizer], int]] = {}
_num_steps = 0
_handles: list[Any] = []


def await_steps(table: ShardTable) -> None:
    """Remember the gradients that a call has clipped. Collectives: none. Host syncs: none."""
    known = _waiting.get(table.metadata)
    if known is None:
        known = _waiting[table.metadata] = _Waiting()
    if known.num_calls >= _MAX_CALLS:
        return
    if not _handles:
        _handles.append(register_optimizer_step_post_hook(_remember))
    known.num_calls += 1
    known.at = _num_steps
    only = table.only
    known.with_grad = [
        i for i, one in enumerate(table.tensors) if one.grad is not None and (only is None or id(one) in only)
    ]


def warn_if_unstepped(function: str, table: ShardTable) -> None:
    """Warn if several calls have clipped gradients that no optimizer steps, while others are stepped.

    Args:
        function: name of the function that the user called.
        table: table of the parameters, before the call clips them.

    Collectives: none. Host syncs: two for each of a few parameters, if some are not stepped.
    """
    known = _waiting.get(table.metadata)
    if known is None or known.at == _num_steps or known.num_calls >= _MAX_CALLS:
        return
    tensors, ids = table.tensors, set(map(id, table.tensors))
    existing = [(one, at) for reference, at in _stepped.values() if (one := reference()) is not None]
    recent = [one for one, at in existing if at > known.at]
    stepped = {id(param) for one in recent for param in parameters_of([one])}
    known.at = _num_steps
    unstepped = {i for i in known.with_grad if id(tensors[i]) not in stepped}
    if len(unstepped) == len(known.with_grad):
        return  # Other optimizers.
    if not stepped <= ids or len(existing) >= _MAX_OPTIMIZERS:
        # The optimizers may step copies of parameters, which are then written back.
        known.num_calls = _MAX_CALLS
        return
    still = (known.unstepped or unstepped) & unstepped
    if still != known.unstepped:
        known.unstepped, known.num_missed = still, 0
        known.values = {i: first_elements(tensors[i]).clone() for i in sorted(still)[:_MAX_NAMED]}
    known.num_missed += 1
    if not still or known.num_missed < _MANY:
        return
    found = [i for i, old in known.values.items() if _is_idle(tensors[i], old)]
    if not found:
        known.unstepped = set()
        return
    known.num_calls = _MAX_CALLS
    names = ", ".join(table.names[i] for i in found)
    warn_user(
        f"{function}: no optimizer has stepped {names} after the last {_MANY} calls ({len(known.unstepped)} parameters "
        "in all), and the norm includes their gradients, so that the others are clipped too much. Pass the parameters "
        "that are stepped, or set requires_grad=False for the others.",
        UnclippedStepWarning,
    )


def _is_idle(param: Tensor, old: Tensor) -> bool:
    """Return whether a parameter with a gradient other than 0 has the same values as before."""
    now = first_elements(param)
    if param.grad is None or local_of(param.grad).is_meta or now.shape != old.shape:
        return False
    local = local_of(param.grad)
    return bool((local._values() if local.is_sparse else local).any()) and torch.equal(now, old)


@_disable_dynamo
def _remember(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Remember an optimizer that has stepped."""
    global _num_steps
    # The step of an optimizer without `param_groups` must not fail.
    if vars(optimizer).get("param_groups"):
        _num_steps += 1
        if id(optimizer) not in _stepped and len(_stepped) >= _MAX_OPTIMIZERS:
            for key in [key for key, (reference, _) in _stepped.items() if reference() is None]:
                del _stepped[key]
        if id(optimizer) in _stepped or len(_stepped) < _MAX_OPTIMIZERS:
            _stepped[id(optimizer)] = weakref.ref(optimizer), _num_steps
