"""Find steps that were made by hand before the gradients are clipped.

No hook runs after `param -= lr * param.grad`. But such a step writes the parameter after the backward pass, and it adds
a multiple of the gradient. So a hook of the backward pass keeps a few elements of a few parameters. If the elements of
a parameter have changed by the time of the call, they are compared with the result of such a step.

Other code may write parameters at that point: it replaces them by their average, restores them after a perturbation,
clamps, rounds, loads or initializes them. None of these changes equals a multiple of the gradient up to the rounding of
the parameter. Later steps of rules with a state, such as Adam, are not found. On an accelerator the host would have to
wait for the elements, so they are compared only if the version of the parameter has changed. Writes through
`param.data` do not change the version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .. import devices
from ..sharding.dtensor import local_of

__all__ = ["are_steps_due", "find_steps_by_hand", "first_elements", "num_passes", "watch_backward"]

_NUM_CALLS = 4
"""Number of calls that check a parameter. A few are enough, because a wrong order recurs in every step."""

_MAX_PASSES = 64
"""Number of backward passes that are watched, in case there are few calls or none."""

_NUM_ELEMENTS = 64
"""Number of elements of a parameter that are compared."""

_MAX_WATCHED = 64
"""Number of parameters of all calls that have a hook."""

_LOOKED_AT = "_distclip_looked_at"
"""Attribute of a parameter that needs no more checks: its id, so that a copied attribute does not count."""


@dataclass(slots=True)
class _Record:
    """Parameter after its last backward pass.

    Args:
        handle: handle of the hook.
        num_calls: number of calls that have checked the parameter so far.
        num_passes: number of backward passes so far.
        version: see `_version_of`. None before the first backward pass, and after a call.
        values: its first elements.
    """

    handle: Any
    num_calls: int = 0
    num_passes: int = 0
    version: int | None = None
    values: Tensor | None = None

    def is_of(self, param: Tensor) -> bool:
        """Return whether the record is this parameter's, and not that of a deleted one with the same id."""
        return self.handle.id in (param._post_accumulate_grad_hooks or ())


# The keys are ids, because torch.utils.swap_tensors refuses a tensor with weak references.
_records: dict[int, _Record] = {}


def watch_backward(param: Tensor) -> None:
    """Watch the next backward passes of a parameter. Collectives: none. Host syncs: none."""
    known = _records.get(id(param))
    if vars(param).get(_LOOKED_AT) == id(param) or (known is not None and known.is_of(param)):
        return
    local = local_of(param)
    if not (param.requires_grad and param.is_leaf):
        return
    if type(local) not in (Tensor, torch.nn.Parameter) or local.device.type == "meta" or local.is_inference():
        return
    # A deleted tensor with the same id may have left a record, at an older position in the order.
    _records.pop(id(param), None)
    record = _records[id(param)] = _Record(None)
    record.handle = param.register_post_accumulate_grad_hook(_remember)  # type: ignore[no-untyped-call]
    while len(_records) > _MAX_WATCHED:
        _records.pop(next(iter(_records))).handle.remove()


def num_passes(key: int) -> int:
    """Return the number of backward passes of a parameter that were watched.

    Args:
        key: id of the parameter.
    """
    record = _records.get(key)
    return 0 if record is None else record.num_passes


def are_steps_due(ids: Sequence[int]) -> bool:
    """Return whether `find_steps_by_hand` has something to check.

    Args:
        ids: of the parameters.
    """
    return any((record := _records.get(key)) is not None and record.version is not None for key in ids)


def find_steps_by_hand(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the parameters that have moved along their gradients since the backward pass.

    The function also watches the next backward passes of these parameters.

    Args:
        params: parameters with a gradient.

    Collectives: none. Host syncs: none, unless a parameter was written since the backward pass.
    """
    written = []
    for param in params:
        if vars(param).get(_LOOKED_AT) == id(param):
            continue
        record = _records.get(id(param))
        if record is None or not record.is_of(param):
            watch_backward(param)
            continue
        if record.version is None:
            continue
        version = _version_of(param)
        if record.version != version or devices.host_reads_free(local_of(param).device):
            written.append((param, record.values))
        # Further calls may follow the same backward pass.
        record.version, record.values = None, None
        record.num_calls += 1
        if record.num_calls == _NUM_CALLS:
            record.handle.remove()
            del _records[id(param)]
            vars(param)[_LOOKED_AT] = id(param)
    return [param for param, values in written if _is_step(param, values)]


@_disable_dynamo
def _remember(param: Tensor) -> None:
    """Record the version and the first elements of a parameter after its backward pass."""
    record = _records.get(id(param))
    if record is None or record.num_passes >= _MAX_PASSES or devices.is_capturing():
        return
    record.num_passes += 1
    record.version, record.values = _version_of(param), first_elements(param).clone()


def _version_of(param: Tensor) -> int:
    """Return a number that grows with every write, except those through `param.data`."""
    # An operator on a DTensor changes the version of the DTensor, and one on its local tensor that of the local tensor.
    return param._version + local_of(param)._version


def first_elements(tensor: Tensor) -> Tensor:
    """Return a view of the first elements of a tensor on this rank, which show whether it was written."""
    return local_of(tensor).detach().reshape(-1)[:_NUM_ELEMENTS]


def _is_step(param: Tensor, old: Tensor | None) -> bool:
    """Return whether a parameter p has become p - a g - b p or p - a sign(g) - b p, for its gradient g.

    Args:
        param: the parameter.
        old: its first elements after the backward pass.
    """
    grad = param.grad
    if grad is None or old is None or local_of(grad).layout is not torch.strided:
        return False
    now, grad = first_elements(param), first_elements(grad)
    if not now.shape == grad.shape == old.shape or not now.is_floating_point():
        return False
    eps = torch.finfo(now.dtype).eps
    then, after, slope = (one.to("cpu", torch.float64) for one in (old, now, grad))
    moved = after - then
    if not bool(moved.any()) or not bool((moved.isfinite() & slope.isfinite()).all()):
        return False
    # If all elements have one magnitude, too many other changes are proportional to the gradient.
    sizes = slope[slope != 0].abs()
    if len(sizes) < 2 or float(sizes.max()) < 1.001 * float(sizes.min()):
        return False
    # A step is exact up to the rounding of the parameter and of the learning rate, and up to the constant that Adam
    # adds.
    allowed = 2 * eps * (then.abs() + after.abs()) + max(4 * eps, 1e-6) * moved.abs() + 1e-30
    if float(moved.norm()) < 20 * float(allowed.norm()):
        return False
    # Code that scales a parameter, or sets it to 0, uses no gradient.
    if _residual(moved, [then])[0].norm() < 0.1 * moved.norm():
        return False
    # With decay there are two unknowns, and with fewer elements any change would fit.
    bases = [[slope]] + ([[slope, then], [slope.sign(), then]] if len(sizes) >= 8 else [])
    for basis in bases:
        residual, factors = _residual(moved, basis)
        if float(factors[0]) < 0 and bool((residual.abs() <= 4 * allowed).all()):
            return True
    return False


def _residual(moved: Tensor, basis: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    columns = [one for one in basis if bool(one.any())]
    if not columns:
        return moved, moved.new_zeros(1)
    # The columns get equal lengths, so that none is negligible.
    norms = torch.stack([one.norm() for one in columns])
    matrix = torch.stack(columns, 1) / norms
    factors = torch.linalg.lstsq(matrix, moved.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    return moved - matrix @ factors, factors
