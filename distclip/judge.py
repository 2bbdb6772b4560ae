"""From gradients to a decision: measure, let the policy decide, and deal with what is not finite.

Whatever depends on a number is decided from the totals, which all ranks have alike, so that all of them take the same
branch, into the same collectives. On CPU the host reads them at once. Elsewhere it waits only where it must; otherwise
it learns of a step while it makes the next one, again at the same place on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from .apply.scale import outside
from .call import Measured, total
from .comm import Comm
from .decision import Observer, Outcome
from .devices import host_reads_free
from .errors import PeerError
from .nonfinite.culprits import OnNonFinite, SkipCounter, blame, counted, suspect_nonfinite, zero_
from .norms.by_tensor import ByTensor
from .norms.measure import Evidence
from .policies import Policy, State
from .sharding import Plan
from .sharding.slots import Slots

__all__ = ["Judge"]


@dataclass(frozen=True)
class _Later:
    """What the host will read of a step when it makes the next one."""

    step: int
    numbers: Tensor
    ready: Callable[[], None]
    each: tuple[Evidence, ...]
    quiet: bool


class Judge:
    """A policy with its memory, over the gradients of a plan.

    Args:
        plan: of this rank.
        comm: everybody concerned.
        policy: what to decide.
        slots: what has a norm of its own.
        on_nonfinite: see `GradClipper`.
        watch: counts and warns.
    """

    def __init__(
        self, plan: Plan, comm: Comm, policy: Policy, slots: Slots, on_nonfinite: OnNonFinite, watch: SkipCounter
    ) -> None:
        self.plan, self.comm, self.policy, self.slots = plan, comm, policy, slots
        self.on_nonfinite, self.watch = on_nonfinite, watch
        self.state: State = policy.init(slots.total, torch.device("cpu"))
        self.by_tensor: ByTensor | None = None
        self.observers: list[Observer] = []
        self._later: _Later | None = None

    @cached_property
    def on_host(self) -> bool:
        """Whether totals are on the host anyway: a fact of the communicator, so the same on all of its ranks."""
        if self.comm.device is None:
            return all(host_reads_free(tensor.device) for tensor in self.plan.tensors)
        return host_reads_free(self.comm.device)

    @property
    def measured_slots(self) -> int:
        """How many norms are added up over ranks: the policy's, or finer ones."""
        return self.slots.total if self.by_tensor is None else self.by_tensor.slots

    def decide(
        self, failure: Exception | None, loss_scale: Tensor | None, *, scaled: bool = False, wait: bool = True
    ) -> Outcome:
        """Measure, decide, and handle what is not finite; no gradient is written yet, save by "zero".

        Args:
            failure: what this rank found wrong so far.
            loss_scale: what gradients are multiplied by, 0-d.
            scaled: a GradScaler is in use: what is not finite is skipped, and no surprise.
            wait: the host has to know whether to skip.

        Raises:
            NonFiniteError, TooManySkippedSteps: on every rank.

        Collectives: those of `total`; on a step that is not finite a gather, and with "zero" those of `total` again.
        """
        self.settle()
        self.watch.steps += 1
        measured = self._measure(failure, loss_scale)
        skips = scaled or self.on_nonfinite != "propagate"
        wait = wait or self.on_host
        finite = measured.learn(measured.totals.finite) if wait and skips else None
        if finite is False:
            measured, finite = self._handle(measured, loss_scale, scaled)
        # Asked for once, where the device itself is to leave the step out.
        sound = measured.sound if finite is None and skips else None
        totals = measured.totals
        self.state = {key: value.to(totals.value.device) for key, value in self.state.items()}
        verdict, moved = self.policy.decide(totals, self.state)
        if sound is not None:
            moved = {key: torch.where(sound, value, self.state[key]) for key, value in moved.items()}
        if finite is not False:
            self.state = moved
        coefs = verdict.coefs
        if any(self.slots.excluded):
            coefs = torch.where(_mask(self.slots.excluded, self.slots.counts, coefs.device), 1.0, coefs)
        overflow = ~totals.finite if skips else torch.zeros_like(totals.finite)
        by_policy = verdict.skip
        skip = overflow if by_policy is None else overflow | (by_policy & totals.finite)
        if sound is not None:
            skip = skip | ~sound
            known, coefs = None, torch.where(skip, 1.0, coefs)
        else:
            known = finite is False or (by_policy is not None and bool(skip))
            # What is known to be finite is known to be of ranks that did not fail.
            coefs = torch.ones_like(coefs) if known else coefs if finite else measured.guard(coefs)
        limits, bounds = verdict.limits, verdict.bounds
        decision = Outcome(measured, coefs, limits, skip, known, overflow, bounds, self.by_tensor)
        if finite is not False:
            self._count(decision, scaled)
        for observer in self.observers:
            observer(self.watch.steps, decision)
        return decision

    def settle(self) -> None:
        """Read what the host has not read yet of the last step.

        Raises:
            TooManySkippedSteps: on every rank.
            PeerError: a rank failed in it; on every other one.
        """
        later = self._later
        if later is None or _capturing():
            return
        self._later = None
        later.ready()
        failed, *numbers = later.numbers.tolist()
        if failed:
            raise PeerError(
                f"another rank failed in step {later.step}, and says why itself; this one changed no gradient."
            )
        self._take_note(later, *numbers)

    def _take_note(self, later: _Later, finite: float, skipped: float, clipped: float, restarts: float) -> None:
        """Count and warn."""
        if finite:
            self.watch.went_well(clipped, int(restarts))
            if skipped:
                self.watch.leave_out(later.step)
            else:
                self.watch.in_a_row = 0
        elif self.on_nonfinite != "propagate" or later.quiet:
            self.watch.skip(later.step, blame(suspect_nonfinite(later.each), self.comm), later.quiet)

    def _measure(self, failure: Exception | None, loss_scale: Tensor | None) -> Measured:
        spec = self.policy.spec
        inspect = None
        if spec.limits is not None:
            low, high = spec.limits
            scale = 1.0 if loss_scale is None else float(loss_scale)
            inspect = partial(outside, low=low * scale, high=high * scale)
        weights = spec.needs_weights
        measured = total(self.plan, spec.norm_type, self.comm, failure, inspect, self.measured_slots, weights)
        if loss_scale is not None:
            measured = replace(measured, totals=replace(measured.totals, loss_scale=loss_scale))
        if self.by_tensor is None:
            return measured
        return replace(measured, totals=self.by_tensor.shown(measured.totals), fine=measured.totals)

    def _handle(self, measured: Measured, loss_scale: Tensor | None, scaled: bool) -> tuple[Measured, bool]:
        """A step that is not finite, known to be so by the host of every rank; and what it is after that."""
        step = self.watch.steps
        culprits = blame(counted(measured.shards), self.comm)
        if self.on_nonfinite == "raise" and not scaled:
            self.watch.refuse(step, culprits)
        if self.on_nonfinite == "zero" and not scaled and culprits:
            zero_(measured.shards)
            self.watch.zeroed(step, culprits)
            measured = self._measure(None, loss_scale)
            if measured.learn(measured.totals.finite):
                return measured, True
            culprits = ()
        self.watch.skip(step, culprits, scaled)
        return measured, False

    def _count(self, decision: Outcome, scaled: bool) -> None:
        """Take note of a step: now, or when the next one is made."""
        totals, coefs = decision.measured.totals, decision.coefs
        later = _Later(self.watch.steps, coefs, lambda: None, decision.measured.each, scaled)
        if self.on_host and not self.state:
            self._take_note(later, bool(totals.finite), bool(decision.skip), 0.0, 0.0)
            return
        if _capturing():
            # The host takes no part in a replay.
            return
        often = ((coefs != 1) | decision.skip).to(coefs.dtype).mean() * bool(self.state)
        restarts = self.state["restarts"].sum() if "restarts" in self.state else coefs.new_zeros(())
        failed = decision.measured.peer_failed
        facts = (totals.finite, decision.skip, often, restarts)
        numbers = torch.stack([x.to(coefs.dtype) for x in (coefs.new_zeros(()) if failed is None else failed, *facts)])
        if numbers.device.type == "cuda":
            numbers = numbers.to("cpu", non_blocking=True)
            later = replace(later, ready=torch.cuda.current_stream().record_event().synchronize)
        self._later = replace(later, numbers=numbers)
        if self.on_host:
            self.settle()


def _capturing() -> bool:
    """Whether a CUDA graph is being recorded."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=16)
def _mask(excluded: tuple[bool, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """(slots,): it travels to the device once, not every step."""
    return torch.tensor(excluded).repeat_interleave(torch.tensor(counts)).to(device)
