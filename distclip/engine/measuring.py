"""Measure a call on all ranks: this rank's shards, their power sums, and the sums over all ranks.

Functions and clippers share these stages.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import TypeAlias

from .. import devices
from ..comm import Comm
from ..comm.agreement import Call, unequal_calls
from ..comm.consensus import FirstError
from ..comm.discovery import (
    call_counter,
    is_mixed,
    raise_in_first_call,
    rejoined,
    uncovered_ranks,
    widened,
    widens_as_before,
)
from ..comm.distinct import any_rank
from ..comm.process_group import MisplacedError
from ..devices import NEVER
from ..errors import DisagreementError, LayoutError
from ..norms.measure import Partials, measure, measure_updates
from ..norms.memory import read_gradients, read_weights
from ..norms.moments import SecondMoments
from ..norms.partial_grads import reduce_partial_grads
from ..norms.reduce import Totals, gather_facts, start_reduce
from ..norms.replica_sums import add_sums
from ..norms.spec import NormSpec
from ..norms.watch import NO_WATCH, Watch
from ..replicas.guard import ReplicaGuard
from ..sharding.exchange import exchange_layouts, knows_holders
from ..sharding.shard import Shards
from ..sharding.table import ShardTable
from .stages import run

__all__ = ["Measuring", "covering", "measure_all_ranks"]

NO_SHARDS = Shards.of(())

Measuring: TypeAlias = Generator[Shards, None, tuple[Shards, Partials, Totals]]
"""Stages 1 to 3 of a call, split where the all-reduce has begun."""


def measure_all_ranks(
    table: ShardTable,
    spec: NormSpec,
    comm: Comm,
    errors: FirstError,
    call: Call,
    guard: ReplicaGuard,
    num_slots: int = 1,
    step: int = 0,
    watch: Watch = NO_WATCH,
    *,
    moments: SecondMoments | None = None,
    overlap: bool = False,
) -> Measuring:
    """Run stages 1 to 3 of a call: find this rank's shards, measure them, and sum over all ranks.

    Args:
        table: this rank's table.
        spec: the norm to measure, the same on all ranks.
        comm: all ranks that take part.
        errors: this rank's errors so far.
        call: the ranks check that they all make this call.
        guard: compares replicas.
        num_slots: number of norms.
        step: 1-based index of the clipper call, which selects the parameters to compare.
        watch: scalars of the user.
        moments: second moments of the optimizers that are about to step, if the spec has `moment_eps`.
        overlap: yield before the all-reduce is complete, if the backend can do so.

    Yields:
        The shards of this rank, once the all-reduce has begun.

    Returns:
        The shards and partials of this rank, and the totals.

    Raises:
        DistclipError: the first error of this rank, or of the lowest other rank with one. It is raised on every rank if
            the host reads the facts. Otherwise the failed rank raises, and the others get totals with `failed`.
        DisagreementError: the ranks make different calls; on the same ranks as above.

    Collectives: those of `reduce`. Only if a rank is in a special situation (it has failed, is uncovered, has new
        layouts or partial gradients): a gather, and then those of `reduce_partial_grads`, or a gather of the layouts
        and all of these again, or all of these again over a wider communicator.
    Host syncs: none on an accelerator, or one if the ranks may hold different things (`split_over`, `comm`, partial
        gradients).
    """
    errors.add(table.error)
    table.world_size = comm.size

    # 1. Find the shards of this rank.
    shards = weights = NO_SHARDS
    knows = True
    with errors:
        knows = knows_holders(table, comm)
        shards = read_gradients(table, comm)
        if spec.needs_weights:
            weights = read_weights(table, comm)
    device = shards.grads[0].device if shards.grads else table.device

    # 2. Measure them: power sums in float64. A rank that has failed contributes nothing, but it takes part.
    partials = None
    if errors.error is None:
        with errors:
            compares = guard.rule.compares and comm.size > 1
            partials = measure(shards, spec, device, num_slots, weights, guard.rounded if compares else None)
            if moments is not None:
                tensors = table.tensors_with_gradient() if shards.grads else ()
                measure_updates(partials, shards, tensors, moments, device)
            if compares and (parameter_sums := guard.parameter_sums(step)):
                partials.replica_sums = add_sums(partials.replica_sums, parameter_sums)
    if partials is None:
        partials = Partials.empty(spec, device, num_slots)
    # A cached communicator may be too small for a mesh that this rank uses for the first time. One check is enough,
    # because the groups and axes of a table never change.
    if comm.covers_holders and table.metadata.covering_ranks is not comm.ranks:
        partials.uncovered = bool(uncovered_ranks(comm, table.groups, table.axes))
        table.metadata.covering_ranks = None if partials.uncovered else comm.ranks
    partials.widens_anew = partials.uncovered and not widens_as_before(comm, table.groups, table.axes)
    partials.new_layouts = not knows
    partials.fp64_anywhere = table.fp64_anywhere(partials.has_fp64)

    # 3. ONE all-reduce, of the power sums and of a check that all ranks are in the same situation, which determines the
    # collectives that follow. The host reads the check if this costs nothing, or if the ranks may differ: a rank of a
    # caller's communicator may have no parameters. The device that decides this is the communicator's, which all ranks
    # share, because some ranks may offload gradients to a CPU.
    is_free = devices.host_reads_free(device if comm.device is None else comm.device)
    read_facts = is_free or not comm.covers_holders or bool(table.axes) or table.may_be_partial or guard.reads_now
    read_facts = read_facts or is_mixed(comm)
    if (partials.uncovered or partials.new_layouts) and not read_facts:
        errors.add(_joined_too_late(table))
    partials.call, partials.failed, partials.watch = call, errors.error is not None, watch

    def measure_again(misplaced: MisplacedError) -> tuple[Shards, Partials, Totals]:
        other = _placed(misplaced, errors)
        same_call = replace(call, counter=call_counter(other).next())
        return run(
            measure_all_ranks(table, spec, other, errors, same_call, guard, num_slots, step, watch, moments=moments)
        )

    measured_again = None
    try:
        # The norm is the same on all ranks of a clipper, because they have compared their policies.
        read_totals = start_reduce(
            partials, spec, comm, read_facts=read_facts, overlap=overlap, is_same_norm=not guard.at_once
        )
    except MisplacedError as misplaced:
        measured_again = measure_again(misplaced)
    yield shards
    if measured_again is None:
        try:
            totals = read_totals()
        except MisplacedError as misplaced:
            measured_again = measure_again(misplaced)
    if measured_again is not None:
        return measured_again
    if not read_facts:
        # The host of this rank may read for free what other hosts do not read, but must not act on it.
        if errors.error is not None:
            raise errors.error
        if totals.same_call.host is False:
            # Only the hosts of ranks that reduce by a maximum have read it.
            raise unequal_calls(call.function, "this call")
        if guard.at_once:
            totals.replicas_differ = NEVER
            if not (devices.is_capturing() or totals.powers.is_meta):
                call.counter.defer(call.function, totals.failed.on(totals.powers.device))
        return shards, partials, totals
    if not totals.needs_attention:
        return shards, partials, totals

    # These are the rare paths. Every rank has read the same check, so every rank takes them.
    are_alike = totals.same_call.host is not False
    if not are_alike:
        totals = gather_facts(totals, partials, spec, errors.error, comm)
        table.remember_fp64(partials.has_fp64, anywhere=totals.has_fp64.read())
    if errors.error is not None:
        # Every rank has an error here, its own or that of another rank.
        raise errors.error
    if totals.uncovered.host:
        as_before = are_alike and not partials.widens_anew
        wider = widened(comm, table.groups, table.axes, table.num_reached, as_before=as_before)
        call = replace(call, counter=call_counter(wider).next())
        return run(measure_all_ranks(table, spec, wider, errors, call, guard, num_slots, step, watch, moments=moments))
    if totals.new_layouts.host:
        # Any rank may have counted the replicas wrongly.
        exchange_layouts(table, comm)
        return run(measure_all_ranks(table, spec, comm, errors, call, guard, num_slots, step, watch, moments=moments))
    if totals.has_partial_grads.host:
        totals = reduce_partial_grads(totals, table, shards, spec, comm, device)
    return shards, partials, totals


def _joined_too_late(table: ShardTable) -> LayoutError:
    """Return the error for a new mesh when the hosts of other ranks do not wait for this rank."""
    return LayoutError(
        f"{table.names[0]} or another parameter is on a mesh that was in no earlier call, and that reaches only a part "
        "of the ranks. Other ranks without a new mesh do not wait for the answer on an accelerator. Pass "
        "comm=distclip.comm.ProcessGroupComm(torch.distributed.group.WORLD), or make a GradClipper after the change."
    )


def covering(comm: Comm, table: ShardTable, errors: FirstError) -> Comm:
    """Return a communicator that covers the meshes of all of its ranks: `comm`, or a wider one.

    Args:
        comm: the communicator that the ranks begin with.
        table: this rank's table.
        errors: this rank's errors. One is added if this rank has begun with a larger communicator than its peers.

    Collectives: an all-reduce (maximum) of one number, and those of `widened` if the communicator is too small.
    """
    may_widen = comm.covers_holders
    while True:
        table.world_size = comm.size
        try:
            if not any_rank(comm, may_widen and bool(uncovered_ranks(comm, table.groups, table.axes))):
                return comm
            comm = widened(comm, table.groups, table.axes, table.num_reached)
        except MisplacedError as misplaced:
            comm, may_widen = _placed(misplaced, errors), misplaced.comm is None


def _placed(misplaced: MisplacedError, errors: FirstError) -> Comm:
    """Return the communicator to continue with, after this rank has left the group of another one.

    Args:
        misplaced: error of this rank.
        errors: this rank's errors, to which the error is added that all ranks of a smaller communicator raise if they
            wait for this rank.
    """
    if misplaced.comm is None and misplaced.first_call is None:
        return rejoined(misplaced.left)
    error = DisagreementError(str(misplaced))
    errors.add(error)
    if misplaced.first_call is not None:
        raise_in_first_call(misplaced.first_call, errors.error or error)
    assert misplaced.comm is not None
    return misplaced.comm
