"""List the groups of a clipper, and rebuild its engine when a group is added or removed."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..comm import Comm, global_ranks
from ..comm.consensus import FirstError, gather_or_raise
from ..comm.discovery import uncovered_ranks
from ..errors import ArgumentError, LayoutError
from ..policies.checked import as_checked
from ..policies.isolated import REST, SEPARATOR, Isolated, check_group_policy, split_policy
from ..sharding.parameters import Named, Parameters, is_frozen, name_tensors
from ..sharding.split_over import SplitOver, split_axes
from ..sharding.table import ShardTable, parameter_table
from .engine import IsolatedEngine

__all__ = ["Groups"]


class Groups:
    """The groups of a clipper with isolate=True, which can build its engine.

    Args:
        parameters, policy, split_over, comm: see `GradClipper`.
        options: further arguments of `Engine.build`, in order.
    """

    def __init__(
        self, parameters: Parameters, policy: Any, split_over: SplitOver, comm: Comm | None, options: Sequence[Any]
    ) -> None:
        self._split_over, self._comm, self._options = split_over, comm, options
        self._module = weakref.ref(parameters) if isinstance(parameters, nn.Module) else None
        self.errors = FirstError()
        self._policies: dict[str, Any] = {REST: policy}
        self._members: dict[str, Named] = {}
        self._rest: Named = []
        with self.errors:
            patterns, self._policies = split_policy(policy)
            for name, one in self._policies.items():
                check_group_policy(name, one, None)
            self._members = {name: [] for name in patterns}
            for name in patterns:
                _check_name(name)
            for name, tensor in name_tensors(parameters):
                group = next((group for group, pattern in patterns.items() if re.search(pattern, name)), None)
                (self._rest if group is None else self._members[group]).append((name, tensor))

    @property
    def policies(self) -> dict[str, Any]:
        """Policy of each group, with that of `REST` last."""
        return dict(self._policies)

    def build(self, comm: Comm | None = None) -> IsolatedEngine:
        """Build the engine of these groups.

        Args:
            comm: communicator of the previous engine, so that the ranks need not find each other again.

        Raises, Collectives: see `Engine.build`. There is one more gather.
        """
        named = [
            *((f"{group}{SEPARATOR}{name}", tensor) for group, some in self._members.items() for name, tensor in some),
            *self._rest,
        ]
        module = None if self._module is None else self._module()
        policy = Isolated(self._policies, as_checked)
        parameters: Any = named if module is None else module
        engine = IsolatedEngine.build(
            parameters, policy, self._split_over, comm or self._comm, *self._options, named=named, errors=self.errors
        )
        _check_everywhere(engine)
        return engine

    def add(self, old: IsolatedEngine, groups: Mapping[str, Parameters], policy: Any, function: str) -> IsolatedEngine:
        """Add groups on all ranks together, and return the engine with them.

        Args:
            old: the engine so far.
            groups: {name: parameters}.
            policy: see `GradClipper.add_group`.
            function: function that the user called; the ranks check that it is the same.

        Raises, Collectives: see `GradClipper.add_group`. If it raises, nothing has changed.
        """
        _refuse_within_step(old, function)
        errors, changed, new = FirstError(), self._copy(), Named()
        policy = self._policies[REST] if policy is None else policy
        rest = changed._policies.pop(REST)
        with errors:
            old.refuse_between(function)
            for name, parameters in groups.items():
                _check_name(name)
                if name in changed._members:
                    raise ArgumentError(f"name={name!r}: the group exists already. Call remove_group({name!r}) first.")
                check_group_policy(name, policy, rest.spec.norm_type)
                members = name_tensors(parameters)
                changed._check_free(name, members)
                changed._members[name], changed._policies[name] = members, policy
                new += members
        old.calls.agree(f"GradClipper.{function}", errors)
        ids = {id(tensor) for _, tensor in new}
        changed._rest = [(key, tensor) for key, tensor in self._rest if id(tensor) not in ids]
        changed._policies[REST] = rest
        return self._replaced(changed, old, new)

    def remove(self, old: IsolatedEngine, name: str) -> IsolatedEngine:
        """Remove a group on all ranks together, and return the engine without it.

        Raises, Collectives: see `GradClipper.remove_group`. If it raises, nothing has changed.
        """
        _refuse_within_step(old, f"remove_group({name!r})")
        errors = FirstError()
        with errors:
            old.refuse_between(f"remove_group({name!r})")
            if name not in self._members:
                raise ArgumentError(f"name={name!r}: no such group. Use one of {list(self._members)}.")
        old.calls.agree(f"GradClipper.remove_group({name!r})", errors)
        changed = self._copy()
        del changed._members[name], changed._policies[name]
        return self._replaced(changed, old, [])

    def _copy(self) -> Groups:
        copy = object.__new__(Groups)
        vars(copy).update(vars(self))
        copy._policies, copy._members, copy.errors = dict(self._policies), dict(self._members), FirstError()
        return copy

    def _replaced(self, changed: Groups, old: IsolatedEngine, new: Named) -> IsolatedEngine:
        """Build the engine of changed groups, and give it the states and counters of the old one."""
        comm: Comm | None = old.comm
        if new or old.comm.size > 1:
            # Another communicator is only needed if new parameters are on ranks outside of the old one.
            table = ShardTable.empty()
            errors = FirstError()
            with errors:
                table = parameter_table(new, split_axes(changed._split_over, old.comm))
            is_wider = bool(uncovered_ranks(old.comm, table.groups, table.axes))
            is_wider = is_wider or (old.comm.size == 1 and bool(table.groups))
            if any(gather_or_raise(old.comm, errors.error, is_wider)):
                comm = None
        engine = changed.build(comm)
        vars(self).update(vars(changed))
        for name in engine.policy.policies:
            if name in old.policy.policies:
                values = old.policy.state_of(name, old.state)
                engine.state = engine.policy.with_state_of(name, engine.state, values)
                engine.counters[name] = old.counters[name]
        engine.observers, engine.undo_observers = old.observers, old.undo_observers
        engine.guard.log, engine.deferred.clip_rate = old.guard.log, old.deferred.clip_rate
        engine._observed_step, engine.token = old._observed_step, old.token
        if old.tensor_norms is not None:
            engine.measure_tensors()
        return engine

    def _check_free(self, name: str, members: Named) -> None:
        """Raise if a parameter belongs to another group."""
        if not members:
            return
        owner = {id(tensor): (group, key) for group, some in self._members.items() for key, tensor in some}
        for key, tensor in members:
            if id(tensor) in owner:
                group, theirs = owner[id(tensor)]
                raise ArgumentError(
                    f"parameters: {key} of group {name!r} is {theirs} of group {group!r} too, and would be "
                    f"clipped twice. Pass each parameter to one group, or call remove_group({group!r}) first."
                )
            if is_frozen(tensor):
                raise ArgumentError(
                    f"parameters: {key} of group {name!r} does not train (requires_grad=False), and a group has only "
                    "parameters that do. Pass [p for p in parameters if p.requires_grad]."
                )


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name or SEPARATOR in name or name == REST:
        raise ArgumentError(
            f"name={name!r:.80}: not a name for a group. Use text without {SEPARATOR!r} other than {REST!r}, which is "
            "the group of all other parameters."
        )


def _refuse_within_step(engine: IsolatedEngine, call: str) -> None:
    # This does not communicate, because a hook may call it on one rank, while the other ranks have no collective left
    # in their step.
    if engine.is_busy:
        raise ArgumentError(
            f"{call}: a step is being made, and it has decided about this group. Call it after the step."
        )


def _check_everywhere(engine: IsolatedEngine) -> None:
    """Raise on all ranks if a parameter of a group exists on some of its ranks only.

    Collectives: one gather.
    """
    table = engine.table
    own = {
        name: sorted(layout.members)
        for name, layout in zip(table.names, table.layouts, strict=True)
        if SEPARATOR in name
    }
    gathered = gather_or_raise(engine.comm, None, (own, bool(table.axes)))
    if any(has_axes for _, has_axes in gathered):
        # Stages and experts hold different parameters.
        return
    by_rank = dict(zip(global_ranks(engine.comm), (names for names, _ in gathered), strict=True))
    for rank, names in by_rank.items():
        for other, theirs in by_rank.items():
            for name, members in names.items():
                if name not in theirs and (not members or other in members):
                    group, _, param = name.partition(SEPARATOR)
                    raise LayoutError(
                        f"group {group!r}: {param} exists on rank {rank} and not on rank {other}. Pass the same "
                        "adapters on every rank, or declare split_over=mesh[...] if ranks hold different parameters."
                    )
