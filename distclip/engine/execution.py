"""Apply a decision: scale the gradients and step the optimizers, or skip the step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..apply.consumed import mark_clipped
from ..apply.coverage import Coverage
from ..apply.declined import watch_steps
from ..apply.fused import supports_grad_scale
from ..apply.grad_scaler import ScalerState
from ..apply.optimizers import OptimizerSteps
from ..apply.scale import clamp_, scale_
from ..apply.step_gate import hold_still, release
from ..apply.unstepped import await_steps
from ..apply.updates import ScaledUpdates, scale_next_step
from ..devices import outside_modes
from ..errors import ArgumentError
from ..norms.spec import NormSpec
from ..outcome import Outcome
from ..sharding.shard import Shards
from ..sharding.table import ShardTable
from .deferred import LateErrors

__all__ = ["Execution", "ScalerRound"]


@dataclass(frozen=True)
class ScalerRound:
    """Decision that holds until `scaler.update()`.

    Args:
        round: identity of the round, see `ScalerState.round`.
        outcome: the decision.
        written: whether it was written into the gradients, or left to the kernels of the optimizers.
        was_scaled: whether the gradients carried the loss scale when they were measured.
    """

    round: object
    outcome: Outcome
    written: bool
    was_scaled: bool


class Execution:
    """Applies the decisions of one engine. No rank communicates here.

    Args:
        table: this rank's table.
        spec: norm spec of the policy.
        optimizers: steps them.
        coverage: compares their parameters with those of the table.
        late_errors: collects the errors that only this rank has.
        only_measures: whether the policy never clips.

    Attributes:
        round: the decision of an earlier call, for optimizers that step in other calls before `scaler.update()`.
        about_to_step: optimizers of the call. None if the caller has passed none.
    """

    def __init__(
        self,
        table: ShardTable,
        spec: NormSpec,
        optimizers: OptimizerSteps,
        coverage: Coverage,
        late_errors: LateErrors,
        only_measures: bool,
    ) -> None:
        self.table, self.optimizers, self.coverage = table, optimizers, coverage
        self.late_errors, self._only_measures = late_errors, only_measures
        self._limits_magnitudes = spec.limits_magnitudes
        # This is true if coefficients multiply what the step adds to parameters, and not the gradients.
        self._scales_updates = spec.moment_eps is not None
        self.round: ScalerRound | None = None
        # The references are weak, so that an optimizer that the caller has dropped does not stay alive.
        self._about_to_step: list[weakref.ref[Optimizer]] | None = None
        self._next_steps: Sequence[RemovableHandle] = ()

    @property
    def about_to_step(self) -> list[Optimizer] | None:
        """Optimizers of the call, see the class."""
        if self._about_to_step is None:
            return None
        return [optimizer for one in self._about_to_step if (optimizer := one()) is not None]

    def expect(self, optimizers: Sequence[Optimizer] | None) -> None:
        """Set the optimizers of a call, and cancel the scaling that the last call left for their next steps.

        Args:
            optimizers: this rank's optimizers. None if they are not known.
        """
        self.call_off()
        if optimizers is not None:
            self._about_to_step = list(map(weakref.ref, optimizers))

    def call_off(self) -> None:
        """Forget the optimizers of the last call, and cancel the scaling of their next steps."""
        for handle in self._next_steps:
            handle.remove()
        self._next_steps, self._about_to_step = (), None

    def release(self) -> None:
        """End the hold on parameters whose gradients were dropped."""
        release(self)

    def step(
        self,
        outcome: Outcome,
        optimizers: list[Optimizer],
        state: ScalerState | None,
        *,
        is_scaled: bool,
        was_scaled: bool,
    ) -> bool:
        """Write a decision into the gradients and step the optimizers, or skip.

        Args:
            outcome: the decision.
            optimizers: this rank's optimizers.
            state: state of the GradScaler.
            is_scaled: whether the gradients carry a loss scale.
            was_scaled: whether the gradients of all these optimizers do.

        Returns:
            Whether all optimizers have declined the step, which then happens on all ranks together.
        """
        # Fused optimizers apply one factor themselves, which saves a pass over gradients that must be multiplied
        # anyway. With a loss scale, an earlier check has already ensured that the parameters are the table's.
        written = self._written(outcome)
        fuse = (
            (is_scaled or outcome.skip.host is None)
            and outcome.limits is None
            and len(written.coefs) == 1
            and all(map(supports_grad_scale, optimizers))
            and (is_scaled or self.coverage.owns(optimizers))
        )
        if fuse:
            self._mark_clipped()
        elif not outcome.skip.host:
            self.write_(written, outcome.shards)
        # An optimizer may replace a parameter within its step, or decline to make it.
        watched = self.coverage.watch(optimizers)
        steps = None if outcome.skip.host or state is not None else watch_steps(optimizers)
        self._make_step(optimizers, outcome, state, watched, fuse=fuse, was_scaled=was_scaled)
        return steps is not None and steps.all_declined()

    def step_again(self, optimizers: Sequence[Optimizer], state: ScalerState) -> Outcome:
        """Step further optimizers by the decision of this round of the scaler.

        This call has no collective. If it raises, all ranks raise in the next round because of the gradients that this
        rank has not stepped, see `Coverage.begin_round`.

        Args:
            optimizers: this rank's optimizers.
            state: state of the GradScaler.

        Raises:
            ArgumentError: the decision does not hold for these optimizers; on this rank alone.
        """
        earlier = self.round
        assert earlier is not None
        outcome = earlier.outcome
        self.optimizers.check_owns(optimizers)
        if len(state.scaled_optimizers()) != (len(optimizers) if earlier.was_scaled else 0):
            raise ArgumentError(
                "scaler: an earlier call has clipped all of the clipper's gradients since the last scaler.update(), "
                f"and {'unscaled them' if earlier.was_scaled else 'found them unscaled'}. Call scaler.unscale_ for all "
                "optimizers before the first call or for none, or pass all of them: clipper.step([one, other], scaler)."
            )
        self.coverage.step_others(optimizers)
        fuse = not earlier.written and all(map(supports_grad_scale, optimizers))
        if not earlier.written and not fuse and not outcome.skip.host:
            # The earlier call has left the factor to the kernels of the optimizers that it stepped.
            with torch.no_grad():
                scale_(self.optimizers.shards_of(optimizers), self._written(outcome).factors)
        self._advance(optimizers, outcome, state, fuse)
        return outcome

    def write_or_drop(self, outcome: Outcome, state: ScalerState | None) -> None:
        """Write a decision into the gradients for a step of the caller, or drop those of a skipped step.

        Args:
            outcome: the decision.
            state: state of the GradScaler.
        """
        if state is not None:
            state.set_found_inf(outcome.overflow.on(outcome.coefs.device).to(torch.float32))
        if outcome.skip.host:
            # Without gradients, the caller's optimizer.step() changes nothing. The hold stops an optimizer that would
            # move parameters by its state alone.
            self.table.drop_gradients()
            hold_still(self, self.table.selected())
            return
        self.write_(self._written(outcome), outcome.shards)
        if not self._only_measures:
            await_steps(self.table)
        if self._scales_updates:
            pairs = [(one, self._scaled_updates(outcome, [one])) for one in self.about_to_step or ()]
            self._next_steps = scale_next_step([(one, scaled) for one, scaled in pairs if scaled is not None])

    def skipped_ids(self, outcome: Outcome) -> frozenset[int]:
        """Return the ids of this rank's parameters that skip the step.

        Host syncs: one on an accelerator, unless the host has read whether to skip the step.
        """
        return frozenset(map(id, self.table.tensors)) if outcome.skip.read() else frozenset()

    @outside_modes
    def write_(self, outcome: Outcome, shards: Shards) -> None:
        """Scale gradients, and clamp their elements if the outcome has limits.

        Collectives: none. Host syncs: none.
        """
        # The coefficients are read once for both the gradients and the report.
        if not outcome.scales_nothing:
            scale_(shards, outcome.factors)
        if outcome.limits is not None:
            clamp_(shards, *outcome.limits, magnitudes=self._limits_magnitudes)
        self._mark_clipped()

    def _mark_clipped(self) -> None:
        if not self._only_measures:
            mark_clipped(self.table)

    def _written(self, outcome: Outcome) -> Outcome:
        """Return the outcome with the coefficients that multiply gradients."""
        return replace(outcome, coefs=torch.ones_like(outcome.coefs[:1])) if self._scales_updates else outcome

    def _scaled_updates(self, outcome: Outcome, optimizers: Sequence[Optimizer]) -> ScaledUpdates | None:
        """Return the scaling of the parameter updates of the coming step, if the policy scales updates."""
        if not self._scales_updates or outcome.skip.host:
            return None
        coefs = outcome.coefs if outcome.tensor_norms is None else outcome.tensor_norms.expand(outcome.coefs)
        slots = [info.slot for info in self.table.metadata.infos(self.table.holders)]
        return ScaledUpdates(self.table.tensors, slots, coefs, optimizers)

    def _make_step(
        self,
        optimizers: list[Optimizer],
        outcome: Outcome,
        state: ScalerState | None,
        watched: list[Tensor | None] | None,
        *,
        fuse: bool,
        was_scaled: bool,
    ) -> None:
        """Step optimizers by a decision, check what they stepped, and end the call.

        Args:
            optimizers, outcome, state, was_scaled: see `step`.
            watched: see `Coverage.watch`.
            fuse: whether the optimizers apply the factor themselves.
        """
        self._advance(optimizers, outcome, state, fuse)
        if not outcome.skip.host:
            # This step has no further collective in which the other ranks could raise an error of this rank.
            with self.late_errors:
                self.coverage.check_kept(watched, optimizers)
        if state is not None:
            self._end_call(outcome, optimizers, state, written=not fuse, was_scaled=was_scaled)

    def _advance(
        self, optimizers: Sequence[Optimizer], outcome: Outcome, state: ScalerState | None, fuse: bool
    ) -> None:
        """Step optimizers by a decision, and scale the parameter updates if the policy does."""
        updates, written = self._scaled_updates(outcome, optimizers), self._written(outcome)
        self.optimizers.advance(
            optimizers,
            written.factors if fuse else written.coefs,
            outcome.skip,
            overflow=outcome.overflow,
            state=state,
            fuse=fuse,
        )
        if updates is not None:
            updates.apply_()

    def _end_call(
        self, outcome: Outcome, optimizers: list[Optimizer], state: ScalerState, *, written: bool, was_scaled: bool
    ) -> None:
        """Keep the decision for optimizers of the GradScaler's round that step in other calls.

        Args:
            outcome, optimizers, state, was_scaled: see `step`.
            written: whether the gradients have been multiplied already.
        """
        self.round = ScalerRound(state.round, outcome.without_gradients(), written, was_scaled)
        if outcome.skip.host is False:
            # In a skipped step, the caller need not step the other optimizers.
            self.coverage.await_others(optimizers)
