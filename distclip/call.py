"""One call from plan to totals: the place that keeps every rank in the same collectives, whatever happens to one.

Whatever a rank finds wrong, before or while it measures, is kept; it still enters the reduction and says so there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from .comm import Comm
from .comm.consensus import FirstError, raise_gathered, wire_of
from .comm.discovery import check_covered, resolve_comm, uncovered_ranks, widened
from .devices import host_reads_free
from .errors import PeerError
from .norms.measure import Evidence, measure
from .norms.partial_grads import settle
from .norms.reduce import Totals, reduce
from .sharding import Plan
from .sharding.shard import Shard, Shards

__all__ = ["Measured", "agree", "total"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a call knows once everything is added up.

    Args:
        shards: this rank's pieces.
        totals: of all ranks.
        wide: whether some gradient is float64.
        passed: how many tensors this rank passed.
        each: what this rank measured of each of its gradients.
        fine: totals by slots of their own, where more is measured than the policy is shown in `totals`.
    """

    shards: Shards
    totals: Totals
    wide: bool
    passed: int
    each: tuple[Evidence, ...] = ()
    fine: Totals | None = None

    @property
    def norm(self) -> Tensor:
        """0-d float64 on the gradients' device."""
        return self.totals.norm

    @property
    def outside(self) -> Tensor | bool:
        """0-d bool, on a CPU a bool: some element of the whole gradient lies outside of the policy's bounds."""
        return self.totals.outside > 0

    @property
    def peer_failed(self) -> Tensor | None:
        """0-d bool: another rank failed, and this one has not waited to learn it. None where all would have raised."""
        stop = self.totals.stop
        return stop > 0 if isinstance(stop, Tensor) else None

    @property
    def sound(self) -> Tensor:
        """0-d bool: everything is finite, and no rank failed."""
        return self._unless_failed(self.totals.finite)

    def learn(self, fact: Tensor) -> bool:
        """A fact that all ranks share, on the host.

        Args:
            fact: 0-d bool.

        Raises:
            PeerError: another rank failed; on every rank but that one, which has raised already.

        Host syncs: one, on a device; another where the answer is no.
        """
        if bool(self._unless_failed(fact)):
            return True
        failed = self.peer_failed
        if failed is not None and bool(failed):
            raise PeerError("another rank failed in this call, and says why itself; no gradient was changed here.")
        return False

    def guard(self, coefs: Tensor) -> Tensor:
        """`coefs`, or 1 where no gradient is to be touched, because another rank failed."""
        failed = self.peer_failed
        return coefs if failed is None else torch.where(failed, 1.0, coefs)

    def presented(self) -> Tensor:
        """The norm as the caller gets it: float32; float64 where a gradient is, or the host knows that float32 would
        not hold it."""
        norm = self.norm
        if self.wide or (host_reads_free(norm.device) and torch.finfo(torch.float32).max < float(norm) < math.inf):
            return norm
        return norm.to(torch.float32)

    def _unless_failed(self, fact: Tensor) -> Tensor:
        stop = self.totals.stop
        return fact & (stop == 0) if isinstance(stop, Tensor) else fact


def agree(plan: Plan, comm: Comm | None, attempt: FirstError) -> Comm:
    """The communicator of a plan: `comm`, or the one that its meshes and axes call for.

    Args:
        plan: of this rank.
        comm: given by the caller; whether it covers the plan is left in `attempt`.
        attempt: what this rank found wrong so far. All ranks of a first call without `comm` raise it here; otherwise it
            is for what comes next (`meet`, `total`) to let them all raise.

    Collectives: none over `comm`; otherwise see `resolve_comm`.
    """
    attempt.add(plan.failure)
    return resolve_comm(plan.groups, plan.axes, comm, attempt)


def total(
    plan: Plan,
    norm_type: float,
    comm: Comm,
    failure: Exception | None = None,
    inspect: Callable[[Shard], Tensor] | None = None,
    slots: int = 1,
    weights: bool = False,
) -> Measured:
    """Measure the gradients that exist now and add them up over everybody concerned.

    Args:
        plan: of this rank.
        norm_type: p.
        comm: everybody concerned.
        failure: what this rank found wrong so far.
        inspect: see `measure`.
        slots: how many norms there are; the plan's `places` say whose is which.
        weights: measure the parameters too.

    Raises:
        What this rank, or the lowest other rank, found wrong: on every rank, where it may be read without a host sync;
        elsewhere what this rank did, and the others find `Measured.peer_failed`.

    Collectives: one all-reduce over `comm`; more if a rank failed, came with a wider mesh, or holds summands
    (`settle`).
    """
    attempt = FirstError(failure or plan.failure)
    shards = attempt.run(plan.shards, comm.size) or Shards.of(())
    device = _device(plan, shards)
    parameters = (attempt.run(plan.weights, comm.size) or ()) if weights else None
    partials = attempt.run(measure, shards, norm_type, device, inspect, slots, parameters)
    partials = partials or measure((), norm_type, device, None, slots, () if weights else None)
    wider = comm.covers_holders and bool(uncovered_ranks(comm, plan.groups, plan.axes))
    if not comm.covers_holders:
        attempt.run(check_covered, comm, plan.groups, plan.axes)  # no wider one can be agreed on
    stop = wider or partials.pending or attempt.error is not None
    totals = reduce(partials, norm_type, comm, stop=stop)
    if not _flags_matter(plan, comm, device):
        # Nobody waits for the flags here: who failed raises, and the others touch nothing (`guard`, `learn`).
        if attempt.error is not None:
            raise attempt.error
        return Measured(shards, totals, partials.wide, len(plan.tensors), partials.each)
    if totals.stop > 0:
        told = comm.gather_objects(wire_of(attempt.error) or wider)
        if any(isinstance(said, tuple) for said in told):
            raise_gathered(attempt.error, told, comm)
        if any(told):
            return total(plan, norm_type, widened(comm, plan.groups, plan.axes), None, inspect, slots, weights)
        totals = settle(totals, plan, shards, comm, device)
    if isinstance(totals.stop, Tensor):
        totals = replace(totals, stop=0)  # it has been read
    return Measured(shards, totals, bool(totals.wide), len(plan.tensors), partials.each)


def _flags_matter(plan: Plan, comm: Comm, device: torch.device) -> bool:
    """Whether to read the flags on the host: a fact that all ranks have alike. On a CPU that costs nothing.

    Through a communicator of the caller's they are always read: some of its ranks may hold nothing, and know nothing of
    what others hold.
    """
    return host_reads_free(device) or not comm.covers_holders or bool(plan.axes) or plan.may_be_partial


def _device(plan: Plan, shards: Shards) -> torch.device:
    """Where the norm goes: to the gradients."""
    if shards.grads:
        return shards.grads[0].device
    return plan.tensors[0].device if plan.tensors else torch.device("cpu")
