"""Set up a clipper on all ranks together: find the ranks that take part, compare what they hold, and assign slots."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..apply.coverage import Coverage
from ..comm import Comm
from ..comm.consensus import FirstError
from ..comm.discovery import global_rank, resolve_comm
from ..comm.ranks import Axis
from ..nonfinite.rules import OnNonFinite
from ..norms.spec import NormSpec
from ..policies import Policy
from ..policies.description import describe
from ..policies.validation import check_flags
from ..replicas.described import undescribed_stages
from ..replicas.rules import Replicas
from ..replicas.unlinked import compare_tensors, is_unlinked
from ..sharding.ddp import ddp_modules
from ..sharding.exchange import exchange_setup
from ..sharding.members import Members, resolve_groups
from ..sharding.parameters import Named, Parameters
from ..sharding.slots import ParamInfo, SlotMap, assign_slots, describe_params, exchange_params
from ..sharding.split_over import SplitOver, split_axes
from ..sharding.table import ShardTable, parameter_table, warn_if_nothing_trains
from .arguments import check_arguments
from .measuring import covering

__all__ = ["Setup", "set_up"]


@dataclass(frozen=True)
class Setup:
    """Hold the facts that the ranks of a clipper have agreed on before its first step.

    Args:
        table: parameters of this rank, with their layouts.
        comm: all ranks that take part.
        slots: slots of the norms.
        spec: norm spec of the policy, with names instead of references to parameters.
        coverage: compares the parameters with those of optimizers.
        replicas: rule for replicas that differ, see `GradClipper`.
        token: text that is equal on all ranks of this clipper, and differs from that of any other clipper.
        ddp_modules: DDP modules that may join uneven inputs.
        compares_tensors: whether ranks that no communicator connects to this rank may still report that their tensors
            differ.
        compares_split: whether other ranks may still show that `split_over=` is wrong, see `compare_split`.
    """

    table: ShardTable
    comm: Comm
    slots: SlotMap
    spec: NormSpec
    coverage: Coverage
    replicas: Replicas
    token: str
    ddp_modules: Sequence[weakref.ref[Any]]
    compares_tensors: bool
    compares_split: bool


def set_up(
    parameters: Parameters,
    policy: Policy,
    split_over: SplitOver,
    comm: Comm | None,
    on_nonfinite: OnNonFinite,
    max_skips: int | None,
    flat_grads: bool,
    partial: bool,
    replicas: Replicas,
    named: Named | None,
    errors: FirstError,
) -> Setup:
    """Set up a clipper. All ranks that take part raise the errors of any rank together.

    Args:
        parameters, policy, split_over, comm, on_nonfinite, max_skips, flat_grads, partial, replicas: see `GradClipper`.
        named: the parameters under other names. None for those of `parameters`.
        errors: errors that this rank has collected already.

    Raises, Collectives: see `Engine.build`.
    """
    # A rank with an error takes part in all collectives below, until one of them lets all ranks raise it.
    with errors:
        check_arguments(policy, on_nonfinite, max_skips, replicas)
        check_flags(flat_grads=flat_grads, partial=partial)
    axes: tuple[Axis, ...] = ()
    with errors:
        axes = split_axes(split_over, comm)
    table = ShardTable.empty(axes)
    with errors:
        table = parameter_table(parameters, axes, named)
    is_derived = comm is None
    comm = resolve_comm(table.groups, table.axes, comm, errors, table.num_reached)

    # Arguments must be the same on all ranks. The exchange also finds the ranks that hold a parameter, which its layout
    # alone may not show.
    arguments = ""
    with errors:
        # The policy is a user's object, whose `repr` can raise.
        arguments = f"{describe(policy)}, on_nonfinite={on_nonfinite!r}, max_skips={max_skips}, replicas={replicas!r}"
    errors.add(table.error)
    # A communicator of an earlier call may be too small for the meshes of this one.
    comm = covering(comm, table, errors)
    token = exchange_setup(table, comm, errors.error, arguments)

    # Slots must be the same on all ranks too, and depend on the parameters of all ranks.
    module = parameters if isinstance(parameters, nn.Module) else None
    slots, spec = SlotMap(), policy.spec
    if any(type(pattern) is Members for pattern in spec.groups.values()):
        # The policy has references to parameters, and the engine has the names of these parameters on all ranks.
        spec = replace(spec, groups=resolve_groups(spec.groups, table, comm, errors))
    if spec.per != "model" or spec.exclude or spec.needs_weights:
        params: list[ParamInfo] = []
        with errors:
            params = describe_params(table, global_rank(comm), spec, module)
        slots = assign_slots(*exchange_params(comm, errors.error, params), spec)
    table.assign_slots(slots.by_name, slots.frozen)
    table.flat_grads = flat_grads
    warn_if_nothing_trains(parameters, table)

    # Every step compares the optimizers with the parameters of this rank alone.
    coverage = Coverage(table, partial=partial, module=module)
    joining = ddp_modules(module) if module is not None and table.is_complete else ()
    # Ranks that no communicator connects compare names and shapes through the store, without waiting.
    compares_tensors = False
    checks = is_derived and replicas != "off"
    compares_split = checks and (bool(axes) or undescribed_stages(table) is not None)
    if checks and not table.is_complete and is_unlinked(table, comm):
        compares_tensors = not compare_tensors("GradClipper", table, comm, may_call_alone=False)
    return Setup(table, comm, slots, spec, coverage, replicas, token, joining, compares_tensors, compares_split)
