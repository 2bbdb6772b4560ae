"""Find gradients that an optimizer has stepped before they are clipped.

A program that clips after `optimizer.step()` steps unclipped gradients, and then clips gradients that nothing reads any
more. Its norms and coefficients look right. So a hook after every step of any optimizer marks a few gradients that were
not clipped before, and a call that clips the same gradients finds the mark. See `by_hand` for steps without an
optimizer.

Two more orders of calls lose a clip. A step whose closure runs backward replaces the gradients that were clipped before
it. An optimizer that steps within backward may leave only gradients that were set to 0 in place.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..errors import UnclippedStepWarning, warn_user
from ..sharding.dtensor import local_of
from ..sharding.table import ShardTable
from .by_hand import are_steps_due, find_steps_by_hand, num_passes, watch_backward
from .step_gate import closure_in

__all__ = [
    "find_stepped",
    "has_had_gradients",
    "is_clipped_anywhere",
    "mark_clipped",
    "warn_of_late_clip",
    "watch_steps_of",
]

_MARK = "_distclip_mark"
"""Attribute of a gradient: its version when it was last clipped or stepped, and `_CLIPPED`, `_STEPPED` or `_LATE`."""

_WARNED = "_distclip_warned"
"""Attribute of a parameter that a warning has named."""

_WATCHED = "_distclip_watched"
"""Attribute of a parameter that is or was watched: its id. A new parameter may have the id of a deleted one."""

_UNMARKED = (None, None)

_EMPTIED = "_distclip_emptied"
"""Attribute of a gradient: number of calls in a row that found it stepped, not clipped, and set to 0."""

_CLIPPED, _STEPPED, _LATE = "clipped", "stepped after it was clipped", "stepped and not clipped"

_MAX_SAMPLE = 4
"""Number of gradients of one call that are checked."""

_MANY_EMPTIED = 3
"""Number of consecutive calls that find gradients set to 0 after a step, before there is a warning."""

_MAX_WATCHED = 64
"""Number of parameters of all calls whose gradients the hook checks."""

# These are ids only, because torch.utils.swap_tensors refuses a tensor with weak references. The number counts changes.
_watched: dict[int, None] = {}
_num_changes = 0
# Ids of the parameters that the last call watched, unless others were watched since.
_last_watched: list[int] = []
# Positions of watched parameters in an optimizer, as (group, index), and the key for which they were found.
_places: weakref.WeakKeyDictionary[Optimizer, tuple[tuple[int, ...], list[tuple[int, int]]]] = (
    weakref.WeakKeyDictionary()
)
_before: dict[int, int] = {}
"""Versions of gradients before the current step."""
_clipped_before: dict[int, tuple[Tensor, int, int]] = {}
"""Clipped gradients before the current step with a closure: gradient, version, number of backward passes."""
_replaced: dict[int, None] = {}
"""Ids of parameters whose clipped gradients a closure has replaced by others, which were then stepped."""
_stepped: dict[int, None] = {}
"""Ids of watched parameters whose gradients were stepped and not clipped, until the next call searches for them."""
_handles: list[Any] = []


def watch_steps_of(table: ShardTable) -> None:
    """Watch the steps of some parameters, before the first call. Collectives: none. Host syncs: none."""
    tensors = [tensor for tensor in table.tensors if tensor.requires_grad]
    for param in tensors[:: _stride(len(tensors))]:
        _watch(param)
        watch_backward(param)


def find_stepped(table: ShardTable) -> list[Tensor]:
    """Return some parameters whose gradients were stepped and never clipped.

    The function also watches the next steps of these parameters.

    Args:
        table: table of the parameters whose gradients the call clips.

    Collectives: none. Host syncs: none.
    """
    if _is_quiet(table):
        return []
    sample, grads = _sample(table)
    ids = list(map(id, sample))
    # Usually the last call has watched the same parameters.
    if _last_watched != ids or [vars(param).get(_WATCHED) for param in sample] != ids:
        for param in sample:
            _watch(param)
        _last_watched[:] = ids
    by_hand = find_steps_by_hand(sample)
    late = [param for param, grad in zip(sample, grads, strict=True) if _is_late(grad)]
    found = late or by_hand or (sample if _are_emptied(grads) else [])
    for key in ids:
        _stepped.pop(key, None)
    # Calls that find emptied gradients are counted, and the next one must continue or end the count.
    is_complete = len(sample) == len(table.metadata.sample or ()) > 0 and _EMPTIED not in vars(grads[0])
    table.metadata.quiet_since = _num_changes if is_complete else None
    return found


def _is_quiet(table: ShardTable) -> bool:
    """Return whether nothing has happened since the last call with a table that a search could find.

    The hooks record everything that a search finds, so that most calls need none.
    """
    positions = table.metadata.sample
    if positions is None or table.metadata.quiet_since != _num_changes:
        return False
    sample = [table.tensors[i] for i in positions]
    ids = list(map(id, sample))
    if are_steps_due(ids) or not _stepped.keys().isdisjoint(ids):
        return False
    # A program may have swapped the contents of all parameters.
    return vars(sample[0]).get(_WATCHED) == ids[0]


def has_had_gradients(table: ShardTable) -> bool:
    """Return whether a call that clips has found a gradient in this table before."""
    return table.metadata.sample is not None


def is_clipped_anywhere(params: Sequence[Tensor]) -> bool:
    """Return whether some of these parameters were watched in earlier calls, of any table."""
    return any(vars(param).get(_WATCHED) == id(param) for param in params)


def mark_clipped(table: ShardTable) -> None:
    """Mark the gradients of a table, because they have been clipped. Collectives: none. Host syncs: none."""
    for grad in _sample(table)[1]:
        if (version := _version_of(grad)) is not None:
            vars(grad)[_MARK] = version, _CLIPPED


def warn_of_late_clip(function: str, table: ShardTable, stepped: Sequence[Tensor]) -> None:
    """Warn if some gradients were stepped before they were clipped.

    Args:
        function: name of the function that the user called.
        table: table of the parameters.
        stepped: see `find_stepped`.
    """
    if not (stepped or _replaced):
        return
    sample, _ = _sample(table)
    replaced = [param for param in sample if _replaced.pop(id(param), ()) is None]
    found = stepped or replaced
    # A wrong order recurs in every step, and some parameters may show it later than others, so one warning is enough.
    if not found or any(vars(param).get(_WARNED) for param in sample):
        return
    vars(found[0])[_WARNED] = True
    ids = set(map(id, found))
    names = ", ".join([name for name, one in zip(table.names, table.tensors, strict=True) if id(one) in ids][:3])
    if stepped:
        warn_user(
            f"{function}: an optimizer, or a step by hand, has stepped with these gradients already ({names}), so that "
            "the step was not clipped. Call it between backward() and the step.",
            UnclippedStepWarning,
        )
    else:
        warn_user(
            f"{function}: the closure of the last optimizer step made other gradients than those that were clipped "
            f"before the step ({names}), so that the step was not clipped. Call it within the closure, after "
            "backward(), or GradClipper.attach(optimizer) once.",
            UnclippedStepWarning,
        )


def _sample(table: ShardTable) -> tuple[list[Tensor], list[Tensor]]:
    """Return a few parameters of a table that have a gradient, usually the same ones in every call.

    Returns:
        The parameters, and the gradient of each.
    """
    tensors, metadata = table.tensors, table.metadata
    positions: Sequence[int] = metadata.sample or ()
    # Reading the gradient of a DTensor takes as long as everything else here.
    grads = [tensors[i].grad for i in positions]
    if not positions or all(grad is None for grad in grads):
        with_grad = [i for i, tensor in enumerate(tensors) if tensor.grad is not None]
        positions = with_grad[:: _stride(len(with_grad))]
        metadata.sample, metadata.quiet_since = positions or metadata.sample, None
        grads = [tensors[i].grad for i in positions]
    only, sample, found = table.only, [], []
    for i, grad in zip(positions, grads, strict=True):
        if grad is not None and (only is None or id(tensors[i]) in only):
            sample.append(tensors[i])
            found.append(grad)
    return sample, found


def _stride(count: int) -> int:
    return max(1, -(-count // _MAX_SAMPLE))


def _watch(param: Tensor) -> None:
    global _num_changes
    key = id(param)
    if not _is_watched(param):
        _num_changes += 1
        _replaced.pop(key, None)
    _last_watched.clear()
    # The id moves to the end. A tensor that no longer exists may have left it at the front, where ids are removed
    # first.
    _watched.pop(key, None)
    _watched[key] = None
    vars(param)[_WATCHED] = key
    while len(_watched) > _MAX_WATCHED:
        old = next(iter(_watched))
        _watched.pop(old, None)
        _stepped.pop(old, None)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_remember_versions))
        _handles.append(register_optimizer_step_post_hook(_mark_stepped))


def _is_watched(param: Tensor) -> bool:
    return (key := id(param)) in _watched and vars(param).get(_WATCHED) == key


@_disable_dynamo
def _remember_versions(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Remember the versions of gradients before a step, because some optimizers write gradients in it."""
    # The first argument is the optimizer.
    has_closure = closure_in(args[1:], kwargs) is not None
    for key, grad, version in _gradients_of(optimizer):
        _before[key] = version
        if has_closure and vars(grad).get(_MARK) == (version, _CLIPPED):
            _clipped_before[key] = grad, version, num_passes(key)


@_disable_dynamo
def _mark_stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Mark the gradients of watched parameters that an optimizer has just stepped."""
    for key, grad, now in _gradients_of(optimizer):
        before = _before.pop(key, now)
        if key in _clipped_before:
            _note_replaced(key, grad)
        then, mark = vars(grad).get(_MARK, (before, _LATE))
        # An attached clipper clips after `_remember_versions`, so that its mark has a later version.
        if then < before:
            mark = _LATE
        elif mark == _CLIPPED:
            mark = _STEPPED
        vars(grad)[_MARK] = now, mark
        if mark == _LATE:
            _stepped[key] = None


def _note_replaced(key: int, grad: Tensor) -> None:
    """Note a gradient that has replaced a clipped one in a closure and was not clipped itself.

    Args:
        key: id of the parameter.
        grad: its gradient after the step.
    """
    old, version, passes = _clipped_before.pop(key)
    marked = vars(grad).get(_MARK)
    was_clipped_again = marked is not None and (grad is not old or marked[0] > version)
    # An optimizer may write gradients too, but it runs no backward pass.
    if num_passes(key) > passes and not was_clipped_again:
        _replaced[key] = None


def _gradients_of(optimizer: Optimizer) -> list[tuple[int, Tensor, int]]:
    """Return the id of each watched parameter of an optimizer, its gradient, and the gradient's version."""
    # The step of an optimizer without `param_groups` must not fail.
    if not _watched or not vars(optimizer).get("param_groups"):
        return []
    found, groups = [], optimizer.param_groups
    for group, index in _places_of(optimizer):
        # A step can be made without some parameters, which are put back after it.
        params = groups[group]["params"]
        if index < len(params) and _is_watched(param := params[index]):
            grad = param.grad
            if grad is not None and (version := _version_of(grad)) is not None:
                found.append((id(param), grad, version))
    return found


def _places_of(optimizer: Optimizer) -> list[tuple[int, int]]:
    """Return the positions of watched parameters in an optimizer, found again if their number changes."""
    groups = optimizer.param_groups
    key = len(groups), len(groups[0]["params"]), len(groups[-1]["params"]), _num_changes
    known = _places.get(optimizer)
    if known is None or known[0] != key:
        pairs = ((i, j, param) for i, group in enumerate(groups) for j, param in enumerate(group["params"]))
        known = _places[optimizer] = key, [(i, j) for i, j, param in pairs if _is_watched(param)]
    return known[1]


def _is_late(grad: Any) -> bool:
    version, mark = vars(grad).get(_MARK, _UNMARKED)
    return bool(mark == _LATE and version == _version_of(grad))


def _are_emptied(grads: Sequence[Tensor]) -> bool:
    """Return whether several calls have found gradients that were stepped unclipped, then set to 0.

    Args:
        grads: some gradients of a call.

    Host syncs: one per gradient, if all of them were written after a step that was not clipped.
    """
    first = vars(grads[0]) if grads else {}
    count = first.pop(_EMPTIED, 0) + 1
    # Usually the gradient was clipped.
    if first.get(_MARK, _UNMARKED)[1] != _LATE:
        return False
    if any(vars(grad).get(_MARK, _UNMARKED)[1] != _LATE for grad in grads) or any(map(_has_values, grads)):
        return False
    first[_EMPTIED] = count
    return bool(count == _MANY_EMPTIED)


def _has_values(grad: Tensor) -> bool:
    """Return whether a gradient may have an element other than 0 on this rank."""
    local = local_of(grad)
    return local.layout is not torch.strided or local.is_meta or bool(local.any())


def _version_of(grad: Tensor | None) -> int | None:
    """Return a number that changes with every write, or None for a gradient without one."""
    if grad is None:
        return None
    local = local_of(grad)
    return None if local.is_inference() else local._version
