"""Defer to the next call what a step must not wait for: host reads, and errors that one rank has alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .. import devices
from ..comm import Comm
from ..comm.consensus import FirstError
from ..errors import PeerError, warn_user
from ..nonfinite.culprits import gather_culprits, suspect_nonfinite
from ..nonfinite.rules import NonFiniteRule
from ..nonfinite.skip_counter import SkipCounter
from ..norms.per_tensor import PerTensorChecksums, PerTensorPowers
from ..outcome import Outcome
from ..policies import State
from ..policies.restart import ClipRate
from ..replicas.guard import ReplicaGuard

__all__ = ["DeferredReads", "LateErrors", "Unread"]


@dataclass(frozen=True)
class Unread:
    """Device values of a step whose host read is deferred to the next step, to avoid a sync."""

    step: int
    values: Tensor
    wait: Callable[[], None]
    per_tensor_powers: tuple[PerTensorPowers, ...]
    per_tensor_checksums: tuple[PerTensorChecksums, ...] | None
    quiet: bool


class CountsSteps(Protocol):
    """Part of an engine that counting its steps needs."""

    state: State
    counter: SkipCounter
    guard: ReplicaGuard
    rule: NonFiniteRule

    @property
    def on_host(self) -> bool:
        """True if the host reads totals without a sync."""

    @property
    def step_comm(self) -> Comm:
        """Communicator of a step."""


class DeferredReads:
    """Count a step and warn about it, at once or during the next step.

    A step is counted at once if the host reads its values without a sync.

    Args:
        engine: the engine that makes the steps.
    """

    def __init__(self, engine: CountsSteps) -> None:
        self._engine = engine
        self.unread: Unread | None = None
        self.clip_rate = ClipRate(partial(warn_user, is_printed=engine.counter.prints))

    def record(self, outcome: Outcome, checksums: tuple[PerTensorChecksums, ...] | None, *, quiet: bool) -> None:
        """Count a step that the host has not found to be non-finite.

        Args:
            outcome: outcome of the step.
            checksums: checksums of the gradients, if the host has yet to read whether replicas differ. Otherwise None.
            quiet: do not warn about a non-finite step.

        Host syncs: none on an accelerator.
        """
        totals, coefs, state = outcome.totals, outcome.coefs, self._engine.state
        suspects = (*outcome.per_tensor_powers, *totals.watch.local)
        if self._engine.on_host and not state:
            self._count(outcome.step, totals.finite.read(), outcome.skip.read(), suspects, quiet)
            return
        if devices.is_capturing():
            # The host takes no part in the replays of a graph.
            return
        device = coefs.device
        # The warning is about norms. With update_clip, the RMS is close to its bound in a steady run.
        counts = bool(state) and "max_coefs" not in state
        clipped = ((coefs < 1) | outcome.skip.on(device)).to(coefs.dtype).mean() * counts
        restarts = state["restarts"].sum() if "restarts" in state else coefs.new_zeros(())
        exploded = state["exploded_warmups"].sum() if "exploded_warmups" in state else coefs.new_zeros(())
        facts = (totals.failed, totals.finite, outcome.skip, outcome.replicas_differ)
        on_device = (*(fact.on(device) for fact in facts), clipped, restarts, exploded)
        values = torch.stack([value.to(coefs.dtype) for value in on_device])
        values, wait = devices.copy_to_host_async(values)
        self.unread = Unread(outcome.step, values, wait, suspects, checksums, quiet)
        if self._engine.on_host:
            self.raise_due()

    def raise_due(self) -> None:
        """Read the values of the last step that the host has not read.

        Raises:
            TooManySkippedSteps: on every rank.
            PeerError: a rank failed in the last step; on all other ranks.

        Host syncs: one on an accelerator, for a step that has ended long ago.
        """
        unread = self.unread
        if unread is None or devices.is_capturing():
            return
        self.unread = None
        unread.wait()
        failed, finite, skipped, differ, clipped, restarts, exploded = unread.values.tolist()
        if failed:
            # The failed rank has not counted the step either.
            self._engine.counter.steps = unread.step - 1
            raise PeerError(
                f"another rank failed in step {unread.step}, or made another call; its own traceback has the reason. "
                "This rank changed no gradient in that step."
            )
        if differ and unread.per_tensor_checksums is not None:
            self._engine.guard.resolve_late(unread.step, unread.per_tensor_checksums, self._engine.step_comm)
        if finite:
            self.clip_rate.record(unread.step, clipped, int(restarts), int(exploded))
        self._count(unread.step, bool(finite), bool(skipped), unread.per_tensor_powers, unread.quiet)

    def _count(
        self,
        step: int,
        finite: bool,
        skipped: bool,
        per_tensor_powers: tuple[PerTensorPowers, ...],
        quiet: bool,
    ) -> None:
        counter, engine = self._engine.counter, self._engine
        if finite and skipped:
            counter.record_policy_skip(step)
        elif finite:
            counter.record_update()
        elif engine.rule.leaves_step_out or quiet:
            culprits = gather_culprits(suspect_nonfinite(per_tensor_powers), engine.step_comm)
            counter.record_skip(step, culprits, expected=quiet)


class LateErrors:
    """Keep errors that only this rank has, until all ranks can raise them together in the next call.

    So all ranks stay in the same step. Such an error is a warning that a filter turns into an error, or comes from a
    user's function after the all-reduce.

    Args:
        is_alone: returns whether this rank makes its steps without other ranks.
    """

    def __init__(self, is_alone: Callable[[], bool]) -> None:
        self._is_alone = is_alone
        self._errors = FirstError()

    def __enter__(self) -> None:
        """Keep an error of the block. A rank that is alone raises it at once."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        # A rank that is alone cannot get out of step with others.
        if not isinstance(error, Exception) or self._is_alone():
            return False
        self._errors.add(error)
        return True

    def add(self, error: Exception) -> None:
        """Keep an error."""
        self._errors.add(error)

    def take(self) -> BaseException | None:
        """Return the first error since the last call, if there is one."""
        if (error := self._errors.error) is not None:
            self._errors = FirstError()
        return error
