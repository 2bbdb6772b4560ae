"""Run one step of isolated groups: one all-reduce, and a verdict, a skip and counters for each group."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..apply.grad_scaler import ScalerState, parameters_of
from ..apply.step_gate import hold_still
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
        self._ids_by_slot = self._find_ids()

    def _find_ids(self) -> list[set[int]]:
        slots: list[set[int]] = [set() for _ in self.policy.policies]
        for name, tensor in zip(self.table.names, self.table.tensors, strict=True):
            slot, _ = self.slots.by_name.get(name, (0, None))
            slots[slot].add(id(tensor))
        return slots

    def forget_original(self, memo: dict[int, Any]) -> None:
        super().forget_original(memo)
        self._ids_by_slot = self._find_ids()

    def _carry_out(
        self,
        outcome: Outcome,
        optimizers: list[Optimizer],
        state: ScalerState | None,
        *,
        is_scaled: bool,
        was_scaled: bool,
    ) -> Outcome:
        """Write the decision into the gradients, and step the groups that do not skip, see `Engine`."""
        if not outcome.skip.host:
            self.write_(outcome, outcome.shards)
        skipped = self.skipped_ids(outcome)
        watched = None if outcome.skip.host or skipped else self.coverage.watch(optimizers)
        self._advance_without(skipped, optimizers, outcome, state)
        if not outcome.skip.host:
            with self._raised_late():
                self.coverage.check_kept(watched, optimizers)
        if state is not None:
            self._end_call(outcome, optimizers, state, written=True, was_scaled=was_scaled)
        self._raise_too_many()
        return outcome

    def _advance(
        self, optimizers: Sequence[Optimizer], outcome: Outcome, state: ScalerState | None, fuse: bool
    ) -> None:
        self._advance_without(self.skipped_ids(outcome), optimizers, outcome, state)

    def _advance_without(
        self, skipped: frozenset[int], optimizers: Sequence[Optimizer], outcome: Outcome, state: ScalerState | None
    ) -> None:
        """Step optimizers as if they did not have the parameters with these ids."""
        # The scale follows the overflow of any group, as the scale of several optimizers follows that of any of them.
        step, overflow = partial(_step_without, skipped=skipped), outcome.overflow
        self.optimizers.advance(
            optimizers, outcome.coefs, outcome.skip, overflow=overflow, state=state, fuse=False, step=step
        )

    def _clip(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        scaler: GradScaler | None,
        errors: FirstError,
        watch: Any,
    ) -> Outcome:
        outcome = super()._clip(optimizer, scaler, errors, watch)
        self._raise_too_many()
        return outcome

    def _write_or_drop(self, outcome: Outcome, state: ScalerState | None) -> None:
        if state is not None:
            # The caller's `scaler.step` makes the step of the groups that are finite.
            overflow = outcome.overflow.on(outcome.coefs.device).to(torch.float32)
            state.set_found_inf(overflow * outcome.skip.read(), elsewhere=overflow)
        if not outcome.skip.host:
            self.write_(outcome, outcome.shards)
        if skipped := self.skipped_ids(outcome):
            # An optimizer's step must not move what is skipped, nor by what it remembers of earlier gradients.
            selected = skipped if self.table.only is None else skipped & self.table.only
            self.table.only = frozenset(selected)
            self.table.drop_gradients()
            hold_still(self, self.table.selected())

    def _prepare(self, errors: FirstError, function: str, loss_scale: Tensor | None, watch: Any) -> Any:
        # The caller of `decide` has stepped the other groups since then.
        self._raise_too_many()
        return super()._prepare(errors, function, loss_scale, watch)

    def _decide(
        self,
        errors: FirstError,
        loss_scale: Tensor | None,
        *,
        expect_overflow: bool,
        function: str,
        watch: Any,
        overlap: bool,
    ) -> Generator[Shards, bool, Outcome]:
        """Decide about each group, see `Engine.decide`.

        Collectives: those of `Engine.decide`. Host syncs: on an accelerator one.
        """
        before = self._prepare(errors, function, loss_scale, watch)
        step, rule = self.counter.steps + 1, Skip(expected=True) if expect_overflow else self.rule
        measuring = self._start_measuring(errors, loss_scale, function, overlap=overlap)
        yield begin(measuring)
        shards, partials, measured, totals = self._finish_measuring(measuring, loss_scale)
        # An accelerator's host has not read yet whether a rank has failed.
        totals.read(Fact(True))
        self.counter.steps = step

        # Replicas that differ, in all groups together.
        differ = totals.replicas_differ
        if differ.host is not False and totals.read(differ):
            resolution = self.guard.resolve(step, shards, self.step_comm)
            differ = as_fact(resolution.differ)
            if resolution.repaired:
                shards, partials, measured, totals = self._measure_all(FirstError(), loss_scale, function)

        # Groups that are not finite. All ranks read the same norms, and so enter the same collectives.
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

        # The policies decide about norms that all ranks share.
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
        """Restore the trace from before a step, because an exception has ended the step."""
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
        # Other ranks may have parameters that this one does not have, so that the slot travels with the name.
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
        # A tenant without a gradient takes no part in the step.
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

    def skipped_ids(self, outcome: Outcome) -> frozenset[int]:
        """Return the ids of this rank's parameters in groups that skip the step."""
        assert outcome.skips is not None
        if not bool(outcome.skips.any()):
            return frozenset()
        ids = (self._ids_by_slot[slot] for slot, skipped in enumerate(outcome.skips.tolist()) if skipped)
        return frozenset[int]().union(*ids)

    def _raise_too_many(self) -> None:
        due, self._due = self._due, []
        if due:
            raise due[0]


def _step_without(optimizer: Optimizer, skipped: frozenset[int]) -> None:
    """Step an optimizer as if it did not have some of its parameters.

    Args:
        optimizer: of any library.
        skipped: ids of the parameters.
    """
    params = parameters_of([optimizer])
    left_out = [param for param in params if id(param) in skipped] if skipped else []
    if not left_out:
        optimizer.step()
        return
    # An optimizer of skipped groups alone makes no step, as if each of them were trained alone.
    if all(param.grad is None for param in params if id(param) not in skipped):
        return
    grads = [param.grad for param in left_out]
    groups: list[tuple[dict[str, Any], Sequence[Tensor]]] = [
        (group, group["params"]) for group in optimizer.param_groups
    ]
    try:
        for param in left_out:
            param.grad = None
        for group, kept in groups:
            # An optimizer that is not torch's may move parameters without a gradient, by momentum or weight decay.
            group["params"] = [param for param in kept if id(param) not in skipped]
        optimizer.step()
    finally:
        for group, kept in groups:
            group["params"] = kept
        for param, grad in zip(left_out, grads, strict=True):
            param.grad = grad
