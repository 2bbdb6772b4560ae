"""Compare the parameters that optimizers step with those that a clipper measures, in every step.

A parameter that the clipper does not have moves unclipped, and a gradient that no optimizer steps makes the norm too
large. Both come from parameters that were created again after the clipper (`load_state_dict(assign=True)`, `to_empty`,
`fully_shard`), were added later (`add_param_group`, adapters), or belong to another model.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..devices import is_fake
from ..errors import ArgumentError, UnclippedStepWarning, warn_user
from ..sharding.dtensor import local_of
from ..sharding.parameters import is_frozen, name_tensors
from ..sharding.shard import Shards
from ..sharding.table import ShardTable
from .grad_scaler import parameters_of

__all__ = ["Coverage", "needs_closure"]

_grad_of = attrgetter("grad")

_MAX_WALKS = 16
"""Number of times that the module is searched for new parameters because the number of gradients has changed."""

_MANY = 3
"""Number of calls in a row without a gradient after which there is a warning."""


@dataclass(frozen=True, slots=True)
class _Comparison:
    """The parameters of some optimizers, compared with those of the table.

    Args:
        ids: identities of all their parameters.
        needs_closure: class of the first of them that needs a closure, or None.
        foreign: their parameters that are not in the table.
        unstepped: tensors of the table that none of them steps.
    """

    ids: list[int]
    needs_closure: str | None
    foreign: list[Tensor]
    unstepped: list[Tensor]


class Coverage:
    """Checks that optimizers step exactly what a clipper measures.

    A step compares the identities of all parameters, and looks further only if one of them has changed.

    Args:
        table: parameters of this rank.
        partial: whether the clipper has only a part of the parameters on purpose.
        module: module that the caller passed, or None. No strong reference is kept.
        is_copy: whether the clipper was copied, perhaps without its model.
    """

    def __init__(self, table: ShardTable, *, partial: bool, module: nn.Module | None, is_copy: bool = False) -> None:
        self._table, self.partial, self._is_copy = table, partial, is_copy
        self._module = None if module is None else weakref.ref(module)
        self._ids = set(map(id, table.tensors))
        self._known: dict[tuple[int, ...], _Comparison] = {}
        # Parameters whose optimizers are still to come in this round of a GradScaler, and the round.
        self._awaited: list[Tensor] = []
        self._round: object = None
        self._num_gradients = -1
        self._num_walks = 0
        self._num_steps = 0
        self._has_warned = False
        # Versions and some values of some parameters, in the last calls without a gradient.
        self._calls_without: list[list[tuple[int, Tensor]]] = []
        table.inspect = self.inspect

    def of_copy(self, table: ShardTable, memo: dict[int, Any]) -> Coverage:
        """Return the checks of a copied table.

        Args:
            table: copy of the table.
            memo: copies by the identities of what was copied, see `copy.deepcopy`.
        """
        module = None if self._module is None else memo.get(id(self._module()))
        return Coverage(table, partial=self.partial, module=module, is_copy=True)

    def check(self, optimizers: Sequence[Optimizer], *, all_now: bool) -> None:
        """Raise unless the optimizers step exactly what is measured.

        Args:
            optimizers: this rank's optimizers in one call.
            all_now: whether this call must step every gradient. With a GradScaler, further calls may step others.

        Raises:
            ArgumentError: see above. An optimizer needs a closure, or steps within backward.

        Collectives: none. Host syncs: none, unless a gradient belongs to no optimizer.
        """
        self._check(optimizers, all_now=all_now, is_attached=False)

    def _check(self, optimizers: Sequence[Optimizer], *, all_now: bool, is_attached: bool) -> None:
        known = self._comparison(optimizers)
        if known.needs_closure is not None and not is_attached:
            raise ArgumentError(
                f"optimizer={known.needs_closure}: its step needs a closure, which makes the gradients within it. Call "
                "clipper.attach(optimizer) once, and optimizer.step(closure) in place of clipper.step(optimizer)."
            )
        if not self.partial and not _lack_gradients(known.foreign):
            self._refuse_foreign([param for param in known.foreign if param.grad is not None], optimizers)
        if all_now and not _lack_gradients(known.unstepped):
            self.check_stepped(self.waiting(optimizers))

    def owns(self, optimizers: Sequence[Optimizer]) -> bool:
        """Return whether all parameters of the optimizers are in the table."""
        return not self._comparison(optimizers).foreign

    def is_covered(self, optimizers: Sequence[Optimizer]) -> bool:
        """Return whether the optimizers step all tensors of the table."""
        return not self._comparison(optimizers).unstepped

    def check_attached(self, optimizers: Sequence[Optimizer]) -> None:
        """Raise unless attached optimizers step exactly what is measured, see `check`."""
        self._check(optimizers, all_now=True, is_attached=True)

    def waiting(self, optimizers: Sequence[Optimizer]) -> list[Tensor]:
        """Return the parameters with a non-zero gradient that the optimizers do not step.

        Host syncs: one per gradient of a parameter that they do not step.
        """
        known = self._known.get(tuple(map(id, optimizers)))
        if known is None or _lack_gradients(known.unstepped):
            return []
        found = [param for param in known.unstepped if param.grad is not None]
        # An optimizer that steps float32 copies, or copies on a CPU, creates the gradients of the copies in its step.
        kinds = {(param.dtype, param.device) for param in found}
        if any(param.grad is None and (param.dtype, param.device) not in kinds for param in known.foreign):
            return []
        return [param for param in found if not _is_zero(param.grad)]

    def check_stepped(self, unstepped: Sequence[Tensor]) -> None:
        """Raise if there are parameters with gradients that no optimizer steps.

        Raises:
            ArgumentError: see above.
        """
        if unstepped:
            raise ArgumentError(
                f"optimizer: it does not step {self._names(unstepped)}, whose gradients the clipper would measure too. "
                "Pass all optimizers that step now, as in clipper.step([one, other]). Construct a clipper for each of "
                "several optimizers that step in turn, or call attach with all of them. Set the gradients of other "
                "parameters to None first, or construct the clipper without them."
            )

    def begin_round(self, round_: object) -> None:
        """Begin a round of a GradScaler, unless it has begun already.

        Args:
            round_: identity of the round, see `ScalerState.round`.

        Raises:
            ArgumentError: gradients of the last round were measured and never stepped.
        """
        if round_ is not self._round:
            awaited, self._awaited, self._round = self._awaited, [], round_
            self.check_stepped(awaited)

    def await_others(self, optimizers: Sequence[Optimizer]) -> None:
        """Expect that further calls of this round step the gradients that these optimizers do not step."""
        self._awaited = self.waiting(optimizers)

    def step_others(self, optimizers: Sequence[Optimizer]) -> None:
        """Record that a further call of this round steps these optimizers."""
        if self._awaited:
            stepped = set(map(id, parameters_of(optimizers)))
            self._awaited = [param for param in self._awaited if id(param) not in stepped]

    def watch(self, optimizers: Sequence[Optimizer]) -> list[Tensor | None] | None:
        """Return the gradients before a step of the optimizers, or None in a step that is not checked.

        An optimizer that creates gradients in its step does so from the start, or from some step on. So the first steps
        are checked, and then fewer and fewer.
        """
        self._num_steps += 1
        if self._num_steps > _MANY and self._num_steps & (self._num_steps - 1):
            return None
        return list(map(_grad_of, parameters_of(optimizers)))

    def check_kept(self, before: list[Tensor | None] | None, optimizers: Sequence[Optimizer]) -> None:
        """Warn if optimizers have stepped with other gradients than those that were clipped.

        Args:
            before: see `watch`.
            optimizers: optimizers that have stepped.

        Host syncs: none, unless a gradient has been replaced.
        """
        if before is None or self._has_warned:
            return
        params = parameters_of(optimizers)
        pairs = zip(params, before, strict=True) if len(params) == len(before) else ()
        made = [param for param, old in pairs if param.grad is not old and _is_other(param.grad, old)]
        if made:
            self._has_warned = True
            warn_user(
                f"optimizer={', '.join(type(one).__name__ for one in optimizers)}: its step makes other gradients "
                f"({self._names(made)}), and they are not those that were clipped. Clip within that step, or call "
                "clipper.attach with the optimizer that it steps in the end.",
                UnclippedStepWarning,
            )

    def inspect(self, shards: Shards) -> None:
        """Search the module for parameters that are new since the clipper was constructed.

        Every call passes its gradients here. A search takes as long as `named_parameters`, so it is made only in the
        first call and when the number of gradients changes.

        Args:
            shards: the gradients of this rank.

        Raises:
            ArgumentError: a parameter of the module has a gradient and is not the clipper's.
        """
        if len(shards.grads) == self._num_gradients:
            return
        self._num_gradients = len(shards.grads)
        module = None if self._module is None else self._module()
        if module is None or self.partial or self._num_walks >= _MAX_WALKS:
            return
        self._num_walks += 1
        foreign = [p for _, p in name_tensors(module) if id(p) not in self._ids and p.grad is not None]
        if foreign:
            # It raises in every call until the clipper is bound to the new parameters.
            self._num_gradients, self._num_walks = -1, 0
            self._refuse_foreign(foreign, [])

    def record_call(self, num_gradients: int) -> None:
        """Warn if several calls in a row have found no gradient, although the parameters change.

        A clipper that was copied without its model has parameters that no optimizer steps. So its first call warns.

        Args:
            num_gradients: number of gradients of this rank.
        """
        is_copy, self._is_copy = self._is_copy, False
        if is_copy and not num_gradients and not all(map(is_frozen, self._table.tensors)):
            warn_user(
                "copy.deepcopy: the first call of a copied clipper finds no gradient. A copy made without the model "
                "clips copies of the parameters that no optimizer steps. Copy both together, as in "
                "copy.deepcopy((model, clipper)), or construct a clipper and load_state_dict(clipper.state_dict()).",
                UnclippedStepWarning,
            )
        # Under FakeTensorMode no gradient is measured.
        if num_gradients or not self._table.tensors or any(map(is_fake, self._table.tensors[:1])):
            self._calls_without.clear()
            return
        if len(self._calls_without) > _MANY:
            return  # It has warned.
        tensors = self._table.tensors
        sample = [local_of(tensor) for tensor in tensors[:: -(-len(tensors) // 16)] if not is_lazy(tensor)]
        self._calls_without.append([(one._version, one.detach().flatten()[:64].clone()) for one in sample])
        if len(self._calls_without) >= _MANY and _differ(self._calls_without[0], self._calls_without[-1]):
            self._calls_without += [[]] * _MANY
            warn_user(
                f"the clipper has found no gradient in {_MANY} calls in a row, and its parameters change, so that they "
                "are stepped unclipped. Usual causes: an optimizer steps within backward; zero_grad() or the step came "
                "before the clipper; gradient synchronization is switched off (no_sync); the parameters were created "
                "again after the clipper. Call the clipper between backward() and the step, or clipper.rebind(model).",
                UnclippedStepWarning,
            )
        elif len(self._calls_without) >= _MANY:
            del self._calls_without[0]

    def _comparison(self, optimizers: Sequence[Optimizer]) -> _Comparison:
        """Return the comparison of these optimizers, and renew it if their parameters have changed."""
        key, params = tuple(map(id, optimizers)), parameters_of(optimizers)
        ids = list(map(id, params))
        known = self._known.get(key)
        if known is None or known.ids != ids:
            needing = next((type(one).__name__ for one in optimizers if needs_closure(one)), None)
            foreign, stepped = [param for param in params if id(param) not in self._ids], set(ids)
            unstepped = [tensor for tensor in self._table.tensors if id(tensor) not in stepped]
            known = _Comparison(ids, needing, foreign, unstepped)
            while len(self._known) >= 64:
                self._known.pop(next(iter(self._known)))
            self._known[key] = known
        return known

    def _refuse_foreign(self, foreign: Sequence[Tensor], optimizers: Sequence[Optimizer]) -> None:
        module = None if self._module is None else self._module()
        known = set(self._table.names)
        named = {} if module is None else {id(param): name for name, param in name_tensors(module)}
        for optimizer in optimizers:
            for i, group in enumerate(optimizer.param_groups):
                names = group.get("param_names") or [f"parameter {j} of group {i}" for j in range(len(group["params"]))]
                named |= {id(p): n for n, p in zip(names, group["params"], strict=True) if id(p) not in named}
        described = [f"{named.get(id(param), 'a parameter')} {tuple(param.shape)}" for param in foreign]
        text = _enumerate(described)
        if any(named.get(id(param)) in known for param in foreign):
            raise ArgumentError(
                f"optimizer: it steps parameters that the clipper does not have, because they were created again after "
                f"the clipper: {text}. load_state_dict(assign=True), to_empty, fully_shard and wrappers do so. Call "
                "clipper.rebind(model) after it, or construct the clipper after it."
            )
        raise ArgumentError(
            f"optimizer: it steps parameters that the clipper does not have, and would move unclipped: {text}. "
            "Construct the clipper with all parameters that are stepped, or call clipper.rebind(model) after some "
            "were added or created again. Pass partial=True to the clipper to clip a part on purpose."
        )

    def _names(self, params: Iterable[Tensor]) -> str:
        ids = set(map(id, params))
        pairs = zip(self._table.names, self._table.tensors, strict=True)
        return _enumerate([name for name, tensor in pairs if id(tensor) in ids])


def _lack_gradients(params: list[Tensor]) -> bool:
    return not params or all(map(is_, map(_grad_of, params), repeat(None)))


def _is_zero(grad: Tensor | None) -> bool:
    """Return whether a gradient is zero on this rank, as `zero_grad(set_to_none=False)` leaves it."""
    assert grad is not None
    local = local_of(grad)
    return local.device.type != "meta" and not bool((local._values() if local.is_sparse else local).any())


def _is_other(new: Tensor | None, old: Tensor | None) -> bool:
    """Return whether a gradient that was replaced in a step has other values."""
    if new is None or (old is None and _is_zero(new)):
        return False
    if old is None or new.shape != old.shape or new.layout != old.layout:
        return True
    if new.is_sparse:
        return not torch.equal(new.coalesce().to_dense(), old.coalesce().to_dense())
    one, two = local_of(new), local_of(old).to(new.device)
    return not torch.allclose(one.to(two.dtype), two, rtol=1e-2, equal_nan=True)


def _differ(before: Sequence[tuple[int, Tensor]], after: Sequence[tuple[int, Tensor]]) -> bool:
    """Return whether some values have changed. A version changes even if zero is added."""
    pairs = zip(before, after, strict=True)
    return any(old[0] != new[0] and not torch.equal(old[1], new[1]) for old, new in pairs)


def needs_closure(optimizer: Optimizer) -> bool:
    try:
        closure = inspect.signature(optimizer.step).parameters.get("closure")
    except (TypeError, ValueError):
        return False
    return (
        closure is not None
        and closure.default is inspect.Parameter.empty
        and closure.kind
        in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        )
    )


def _enumerate(words: Sequence[str]) -> str:
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")
