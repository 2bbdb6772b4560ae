"""Run one step of isolated groups: one all-reduce for all, and a verdict, a skip and counters for each group."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..comm.consensus import FirstError
from ..devices import Fact, as_fact
from ..engine import Engine, begin
from ..errors import NonFiniteWarning, TooManySkippedSteps, warn_user
from ..nonfinite.culprits import (
    Culprit,
    Incident,
    count_nonfinite,
    describe_culprits,
    gather_culprits,
    suspect_nonfinite,
    zero_nonfinite_,
)
from ..nonfinite.rules import Skip, Zero
from ..nonfinite.skip_counter import POLICY_SKIPS, describe_skip, too_many_skips
from ..norms.measure import Partials
from ..norms.reduce import Totals
from ..outcome import Outcome
from ..policies.isolated import Isolated
from ..sharding.shard import Shards
from .counts import GroupCounters
from .execution import IsolatedExecution

__all__ = ["IsolatedEngine"]


class IsolatedEngine(Engine):
    """Engine of groups that share nothing but the all-reduce.

    Attributes:
        counters: steps and skipped steps of each group.
        is_busy: True within a step, when groups must not change.
    """

    policy: Isolated

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counters = GroupCounters(self.policy.policies)
        self.is_busy = False
        self._due: list[TooManySkippedSteps] = []
        self._marks = self.counters.columns

    def _make_execution(self) -> IsolatedExecution:
        return IsolatedExecution(
            self.table,
            self.spec,
            self.optimizers,
            self.coverage,
            self.late_errors,
            self._only_measures,
            slots=self.slots,
            raise_too_many=self._raise_too_many,
        )

    def _clip(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        scaler: GradScaler | None,
        errors: FirstError,
        watch: Any,
        before: Any,
    ) -> Outcome:
        outcome = super()._clip(optimizer, scaler, errors, watch, before)
        self._raise_too_many()
        return outcome

    def _prepare(self, errors: FirstError, function: str, loss_scale: Tensor | None, watch: Any) -> None:
        # Since the last call, the caller of `decide` has stepped the other groups.
        self._raise_too_many()
        super()._prepare(errors, function, loss_scale, watch)

    def _decide(
        self,
        errors: FirstError,
        loss_scale: Tensor | None,
        before: Any,
        *,
        expect_overflow: bool,
        function: str,
        watch: Any,
        overlap: bool,
    ) -> Generator[Shards, bool, Outcome]:
        """Decide about each group, see `Engine.decide`.

        Collectives: those of `Engine.decide`. Host syncs: one on an accelerator.
        """
        self._prepare(errors, function, loss_scale, watch)
        step, rule = self.counter.steps + 1, Skip(expected=True) if expect_overflow else self.rule
        measuring = self._start_measuring(errors, loss_scale, function, overlap=overlap)
        yield begin(measuring)
        shards, partials, measured, totals = self._finish_measuring(measuring, loss_scale)
        # An accelerator's host has not read yet whether a rank has failed.
        totals.read(Fact(True))
        self.counter.steps = step

        # Differences between replicas are resolved for all groups together.
        differ = totals.replicas_differ
        if differ.host is not False and totals.read(differ):
            resolution = self.guard.resolve(step, shards, self.step_comm)
            differ = as_fact(resolution.differ)
            if resolution.repaired:
                shards, partials, measured, totals = self._measure_all(FirstError(), loss_scale, function)

        # Groups may be non-finite. All ranks read the same norms, so they enter the same collectives.
        culprits: dict[int, tuple[Culprit, ...]] = {}
        finite = self._finite(totals)
        if rule.leaves_step_out and not bool(finite.all()):
            culprits = self._gather_culprits(shards, totals)
            everyone = tuple(culprit for some in culprits.values() for culprit in some)
            if self.on_nonfinite == "raise" and not expect_overflow:
                self.counter.refuse(step, everyone)
            if type(rule) is Zero and everyone and totals.watch.finite.read():
                zero_nonfinite_(shards)
                self.counter.record_zeroed(step, everyone)
                shards, partials, measured, totals = self._measure_all(FirstError(), loss_scale, function)
                finite, culprits = self._finite(totals), {}

        # The policies decide from norms that all ranks share.
        device = totals.powers.device
        state = {key: value.to(device) for key, value in self.state.items()}
        usable = finite if rule.leaves_step_out else torch.ones_like(finite)
        verdicts, self.state = self.policy.decide_each(totals, state, finite, usable)
        skips = (verdicts.skips & finite) | ~usable
        coefs = torch.where(skips, 1.0, verdicts.coefs)
        present = (totals.norms > 0) | ~finite
        all_skipped = self._count(step, finite, skips, present, culprits, quiet=expect_overflow)

        outcome = Outcome(
            step,
            totals,
            coefs,
            as_fact(all_skipped),
            as_fact(bool(culprits)),
            verdicts.bounds,
            None,
            shards,
            partials.per_tensor_powers,
            measured,
            self.tensor_norms,
            differ,
            skips,
        )
        return self._publish(outcome, before)

    def trace(self) -> Any:
        """Return the state that a step changes, see `Engine.trace`."""
        self._marks = self.counters.columns
        return super().trace()

    def restore(self, before: Any) -> None:
        """Restore the trace from before a step that an exception has ended."""
        super().restore(before)
        self.counters.columns = self._marks
        self._due = []

    @contextmanager
    def _undone_on_error(self, before: Any = None) -> Iterator[Any]:
        self.is_busy = True
        try:
            with super()._undone_on_error(before) as kept:
                yield kept
        finally:
            self.is_busy = False

    def _measure_all(
        self, errors: FirstError, loss_scale: Tensor | None, function: str
    ) -> tuple[Shards, Partials, Totals, Totals]:
        shards, partials, measured, totals = self._measure(errors, loss_scale, function)
        # An accelerator's host has not read yet whether a rank has failed.
        totals.read(Fact(True))
        return shards, partials, measured, totals

    @staticmethod
    def _finite(totals: Totals) -> Tensor:
        finite = totals.powers.isfinite()
        finite = finite if totals.weight_powers is None else finite & totals.weight_powers.isfinite()
        # A watched scalar belongs to all groups.
        return finite & totals.watch.finite.read()

    def _gather_culprits(self, shards: Shards, totals: Totals) -> dict[int, tuple[Culprit, ...]]:
        """Gather the non-finite gradients of all ranks, by slot."""
        slots = {name: slot for name, (slot, _) in self.slots.by_name.items()}
        # Other ranks may have parameters that this rank does not have, so the slot is sent with the name.
        local = [(f"{slots.get(name, 0)} {name}", nans, infs) for name, nans, infs in count_nonfinite(shards)]
        for name, nans, infs in suspect_nonfinite(totals.watch.local):
            local += [(f"{slot} {name}", nans, infs) for slot in range(self.slots.total)]
        by_slot: dict[int, tuple[Culprit, ...]] = {}
        for culprit in gather_culprits(local, self.step_comm):
            slot, _, name = culprit.name.partition(" ")
            found = Culprit(name, culprit.nans, culprit.infs, culprit.ranks)
            by_slot[int(slot)] = (*by_slot.get(int(slot), ()), found)
        return by_slot

    def _count(
        self,
        step: int,
        finite: Tensor,
        skips: Tensor,
        present: Tensor,
        culprits: dict[int, tuple[Culprit, ...]],
        *,
        quiet: bool,
    ) -> bool:
        """Count the step in every group that has a gradient, and return whether all of them skip it."""
        are_finite, are_skipped, are_present = torch.stack([finite, skips, present]).tolist()
        # A group without a gradient takes no part in the step.
        skipped, num_present = self.counters.record(are_present, are_skipped), sum(are_present)
        names = self.counters.names if skipped else ()
        for slot in skipped:
            counts, is_finite, found = self.counters[names[slot]], are_finite[slot], culprits.get(slot, ())
            if not is_finite:
                self.counter.incidents.append(Incident(step, "skip", found))
            reason = POLICY_SKIPS if is_finite else describe_skip(found)
            if error := too_many_skips(step, counts.in_a_row, self.counter.max_skips, reason):
                # The other groups make their step first.
                self._due.append(TooManySkippedSteps(f"group {names[slot]!r}: {error}"))
            elif not (is_finite or quiet):
                warn_user(
                    f"step {step} was skipped in group {names[slot]!r} ({counts.skipped} in total): "
                    f"{describe_culprits(found)}.",
                    NonFiniteWarning,
                    is_printed=self.counter.prints,
                )
        all_skipped: bool = num_present > 0 and len(skipped) == num_present
        self.counter.skipped += all_skipped
        self.counter.in_a_row = self.counter.in_a_row + 1 if all_skipped else 0
        return all_skipped

    def _raise_too_many(self) -> None:
        due, self._due = self._due, []
        if due:
            raise due[0]
