"""Run one step: shards -> norms -> policy -> non-finite rule -> gradients and optimizers.

No other package contains all stages. `Engine.decide` runs the stages in order up to the decision, and `Engine.step` and
`Engine.clip` apply the decision. A step can be split in two at its all-reduce: `Engine.start` measures and begins the
all-reduce, and `Engine.finish` ends the step. All decisions follow from totals, which all ranks share bit for bit, so
that every rank takes the same branch into the same collectives.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .. import devices
from ..apply.consumed import find_stepped, warn_of_late_clip, watch_steps_of
from ..apply.elsewhere import warn_if_elsewhere
from ..apply.grad_scaler import ScalerState, enabled
from ..apply.optimizers import OptimizerSteps, as_list
from ..apply.step_gate import undone_on_error
from ..apply.unstepped import warn_if_unstepped
from ..apply.writes import GradientWrites
from ..comm import Comm, LocalComm
from ..comm.consensus import FirstError
from ..comm.discovery import global_rank
from ..devices import (
    ALWAYS,
    NEVER,
    Fact,
    as_fact,
    device_constant,
    outside_fake_mode,
    outside_modes,
    without_autograd,
)
from ..errors import ArgumentError, warn_user
from ..nonfinite.culprits import count_nonfinite, gather_culprits, suspect_nonfinite
from ..nonfinite.rules import RULES, OnNonFinite, Skip
from ..nonfinite.skip_counter import SkipCounter
from ..norms.measure import Partials
from ..norms.moments import SecondMoments
from ..norms.reduce import Totals
from ..norms.spec import NormSpec
from ..norms.tensor_norms import TensorNorms
from ..norms.watch import NO_WATCH
from ..outcome import Observer, Outcome
from ..policies import Policy, State
from ..policies.checked import as_checked
from ..policies.fixed import bounds_nothing
from ..replicas import rules as replica_rules
from ..replicas.described import compare_split
from ..replicas.guard import ReplicaGuard
from ..replicas.incidents import ReplicaLog
from ..replicas.rules import Replicas
from ..replicas.unlinked import compare_tensors
from ..sharding.ddp import is_joining
from ..sharding.parameters import Named, Parameters, is_frozen
from ..sharding.shard import Shards
from ..sharding.slots import ParamInfo, assign_slots, describe_params, exchange_params, parent_slots
from ..sharding.split_over import SplitOver
from .arguments import Passed, check_passed
from .calls import Calls
from .deferred import DeferredReads, LateErrors, Unread
from .execution import Execution, ScalerRound
from .measuring import NO_SHARDS, Measuring, measure_all_ranks
from .setup import Setup, set_up
from .stages import begin, complete

__all__ = ["Engine"]

EngineT = TypeVar("EngineT", bound="Engine")


class Engine:
    """Clip the gradients of a table by a policy, and keep the policy's state.

    Args:
        setup: facts that the ranks have agreed on.
        policy: decides about the norms.
        on_nonfinite: rule for steps that are not finite, see `GradClipper`.
        counter: counts steps and skipped steps.
    """

    def __init__(self, setup: Setup, policy: Policy, on_nonfinite: OnNonFinite, counter: SkipCounter) -> None:
        self.table, self.comm, self.slots, self.spec = setup.table, setup.comm, setup.slots, setup.spec
        self.coverage, self.replicas, self.token = setup.coverage, setup.replicas, setup.token
        self._ddp_modules, self._compares_tensors = setup.ddp_modules, setup.compares_tensors
        self._compares_split = setup.compares_split
        self.policy = as_checked(policy)
        self.on_nonfinite, self.rule, self.counter = on_nonfinite, RULES[on_nonfinite], counter
        # All ranks emit the same warnings, and one of them prints them.
        counter.prints = self.comm.rank == 0
        self.guard = ReplicaGuard(self.table, replica_rules.RULES[self.replicas], ReplicaLog())
        self.guard.log.prints = counter.prints

        # The attributes from here on change from step to step.
        self.state: State = self.policy.init(self.slots.total, torch.device("cpu"))
        self.tensor_norms: TensorNorms | None = None
        self.observers: list[Observer] = []
        self.undo_observers: list[Callable[[int], None]] = []
        self._observed_step = 0
        # These are the user's scalars in the current call.
        self._watch = NO_WATCH
        # This is the step between `start` and `finish`.
        self.started: _Started | None = None
        # `discard` restores this state from before the last decision.
        self._undo: _Trace | None = None

        self.deferred, self.late_errors = DeferredReads(self), LateErrors(self.is_alone)
        self.calls = Calls(self)
        self._only_measures = bounds_nothing(policy)
        if not self._only_measures:
            watch_steps_of(self.table)
        self.optimizers = self._optimizer_steps()
        self.execution = self._make_execution()

    @classmethod
    @outside_fake_mode
    def build(
        cls: type[EngineT],
        parameters: Parameters,
        policy: Policy,
        split_over: SplitOver,
        comm: Comm | None,
        on_nonfinite: OnNonFinite,
        counter: SkipCounter,
        flat_grads: bool,
        partial: bool = False,
        replicas: Replicas = "warn",
        *,
        named: Named | None = None,
        errors: FirstError | None = None,
    ) -> EngineT:
        """Build the engine of a `GradClipper` from its arguments.

        Args:
            counter: counts steps and skipped steps; it has `max_skips`.
            parameters, policy, split_over, comm, on_nonfinite, flat_grads, partial, replicas: see `GradClipper`.
            named: the parameters under other names. None for those of `parameters`.
            errors: errors that this rank has collected already.

        Raises:
            ArgumentError, LayoutError, DisagreementError: see `GradClipper`; on every rank.

        Collectives: two small all-reduces, two more with norms per group, tensor or row, and a gather with groups by
            reference. A few more if ranks hold different parameters (see `exchange_texts`). Without `comm`, the ranks
            find each other through the store of torch.distributed first.
        """
        setup = set_up(
            parameters,
            policy,
            split_over,
            comm,
            on_nonfinite,
            counter.max_skips,
            flat_grads,
            partial,
            replicas,
            named,
            errors or FirstError(),
        )
        return cls(setup, policy, on_nonfinite, counter)

    def _optimizer_steps(self) -> OptimizerSteps:
        return OptimizerSteps(self.table, self.comm, self.calls.agree, self.is_on_host, self.coverage)

    def _make_execution(self) -> Execution:
        """Return the object that applies the decisions."""
        return Execution(self.table, self.spec, self.optimizers, self.coverage, self.late_errors, self._only_measures)

    @cached_property
    def on_host(self) -> bool:
        """True if the host reads totals without a sync. The communicator determines it, so all ranks agree."""
        if self.comm.device is not None:
            return devices.host_reads_free(self.comm.device)
        # A frozen parameter may be on any device, even on the meta device.
        return all(devices.host_reads_free(tensor.device) for tensor in self.table.tensors if not is_frozen(tensor))

    def is_on_host(self) -> bool:
        """Return `on_host`."""
        return self.on_host

    def forget_original(self, memo: dict[int, Any]) -> None:
        """Replace identities of tensors by those of their copies, after this engine was copied.

        Args:
            memo: see `copy.deepcopy`.
        """
        # A copy may be made within a round of the scaler.
        scaler_round = self.execution.round
        self.coverage = self.coverage.of_copy(self.table, memo)
        self.optimizers = self._optimizer_steps()
        self.execution = self._make_execution()
        self.execution.round = scaler_round

    @property
    def step_comm(self) -> Comm:
        """Communicator of a step: all ranks that take part, or this rank alone while DDP joins uneven inputs."""
        return LocalComm() if self._ddp_modules and is_joining(self._ddp_modules) else self.comm

    def is_alone(self) -> bool:
        """Return whether this rank makes its steps without other ranks."""
        return self.step_comm.size == 1

    @property
    def num_measured_slots(self) -> int:
        """Number of norms in the all-reduce: those of the policy, or finer ones."""
        return self.slots.total if self.tensor_norms is None else self.tensor_norms.num_measured

    def step(
        self,
        optimizer: Optimizer | Iterable[Optimizer],
        scaler: GradScaler | None,
        watch: Any = None,
        *,
        error: Exception | None = None,
    ) -> Outcome:
        """Clip and step, or skip, see `GradClipper.step`.

        Args:
            optimizer, scaler, watch: see `GradClipper.step`.
            error: error that this rank has already, for all ranks to raise.
        """
        with self._undone_on_error() as before:
            stages = self._step(optimizer, scaler, watch, FirstError(error), before, overlap=False)
            begin(stages)
            return complete(stages, (None, scaler))

    def start(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        scaler: GradScaler | None,
        watch: Any,
        *,
        error: Exception | None = None,
    ) -> None:
        """Measure, and begin the all-reduce of a step, see `GradClipper.start`.

        Args:
            optimizer, scaler, watch: see `GradClipper.start`.
            error: error that this rank has already, for all ranks to raise.
        """
        errors = FirstError(error)
        with self._undone_on_error() as before:
            stages = self._step(optimizer, scaler, watch, errors, before, overlap=True)
            begin(stages)
            self.started = _Started(stages, before)
        if errors.error is not None:
            # The other ranks read in `finish` that this rank has failed.
            self.finish(None, scaler)

    def finish(self, optimizer: Optimizer | Iterable[Optimizer] | None, scaler: GradScaler | None) -> Outcome:
        """Complete the step that `start` has begun, see `GradClipper.finish`."""
        started, self.started = self.started, None
        if started is None:
            error = ArgumentError("finish: no step was started on this rank. Call clipper.start() after backward.")
            self.start(None, None, None, error=error)
            raise error
        with self._undone_on_error(started.before):
            return complete(started.stages, (optimizer, scaler))

    def _step(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        scaler: GradScaler | None,
        watch: Any,
        errors: FirstError,
        before: _Trace,
        *,
        overlap: bool,
    ) -> Generator[None, Passed | None, Outcome]:
        """Run all stages of a step, and yield once the all-reduce has begun.

        The caller sends it the arguments of `finish`, or None to complete the collectives and step nothing.

        Args:
            optimizer, scaler, watch: arguments of `start`.
            errors: this rank's errors so far.
            before: state before the step.
            overlap: yield before the all-reduce is complete, and refuse gradients that are written until then.
        """
        optimizers: list[Optimizer] | None = None
        if optimizer is not None or not overlap:
            with errors:
                optimizers = as_list(optimizer)
        used, function = optimizers or [], "GradClipper.step"
        self._expect(optimizers)
        scaler, state, loss_scale = enabled(scaler), None, None
        if scaler is not None and optimizer is None:
            error = ArgumentError("scaler: it scales by optimizer. Call clipper.start(optimizer, scaler).")
            errors.add(error)
        # The host need not wait for the norms if the optimizers of all ranks can skip on the device.
        all_fused = False
        if optimizers is not None or scaler is not None:
            are_known = errors.error is None and (scaler is None or isinstance(scaler, GradScaler))
            all_fused = self.optimizers.compare_first(used, scaler, errors, are_known=are_known)
        if scaler is not None:
            with errors:
                state = ScalerState(scaler, used)
        earlier = self.execution.round
        if state is not None and earlier is not None and earlier.round is state.round:
            # An earlier call since the last scaler.update() has already made the decision for all gradients.
            passed = yield
            return earlier.outcome if passed is None else self.execution.step_again(used, state)
        was_scaled = state is not None and len(state.scaled_optimizers()) == len(used)
        if state is not None:
            with errors:
                self.coverage.begin_round(state.round)
                loss_scale = self.optimizers.loss_scale(used, state, unscale_first=self.spec.limits is not None)
        if optimizers is not None:
            with errors:
                self.coverage.check(used, all_now=state is None)

        # Stages 1 and 2, and the beginning of 3.
        is_scaled = state is not None
        decision = self._decide(
            errors, loss_scale, before, expect_overflow=is_scaled, function=function, watch=watch, overlap=overlap
        )
        shards = _begin_decision(decision)
        writes = GradientWrites(self.table, shards) if overlap else None
        passed = yield
        if passed is None:
            return _finish_decision(decision, must_read=not all_fused or self.rule.needs_host)

        # The end of stage 3, and stages 4 and 5. This rank raises an error that it has alone once it has made all
        # collectives.
        late = FirstError()
        if writes is not None:
            with late:
                writes.check()
        if optimizers is None:
            optimizers, all_fused = self._compare_last(passed, errors, late)
        with late:
            check_passed(passed, optimizers, has_scaler=state is not None)
        outcome = _finish_decision(decision, must_read=not all_fused or self.rule.needs_host)
        if late.error is not None:
            raise late.error

        # 6. Write and step, or skip.
        declined = self.execution.step(
            outcome, optimizers, state, is_scaled=loss_scale is not None, was_scaled=was_scaled
        )
        if declined:
            # All ranks have made the same decision, and all their optimizers have declined the step.
            self.discard()
            return replace(outcome, skip=ALWAYS)
        if self._undo is None and state is None and not outcome.skip.host:
            raise ArgumentError(
                "optimizer: it has loaded another state into the clipper within its step, after the clipper had "
                "decided. With torchft, call distclip.integrations.torchft.attach(optimizer, policy) instead."
            )
        return outcome

    def _compare_last(self, passed: Passed, errors: FirstError, late: FirstError) -> tuple[list[Optimizer], bool]:
        """Compare the optimizers of `finish` with those of the other ranks, because `start` had none.

        Args:
            passed: arguments of `finish`.
            errors: this rank's errors before the all-reduce.
            late: this rank's errors since then, to which further ones are added.

        Returns:
            The optimizers, and whether those of all ranks are fused.
        """
        optimizers: list[Optimizer] = []
        all_fused = False
        with late:
            optimizers = as_list(passed[0])
        # If the other ranks make this comparison, they also raise an error of `start` in it.
        known = FirstError(errors.error or late.error)
        with late:
            all_fused = self.optimizers.compare_first(optimizers, None, known, are_known=known.error is None)
        with late:
            self.coverage.check(optimizers, all_now=True)
        return optimizers, all_fused

    def _expect(self, optimizers: Sequence[Optimizer] | None) -> None:
        """Set the optimizers of a call, because it may read their second moments.

        Args:
            optimizers: this rank's optimizers. None if they are not known.
        """
        self.execution.expect(optimizers if self.spec.moment_eps is not None else None)

    @without_autograd
    def clip(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        scaler: GradScaler | None,
        errors: FirstError,
        only: frozenset[int] | None = None,
        watch: Any = None,
    ) -> Outcome:
        """Clip in place, or drop the gradients of a skipped step, see `GradClipper.clip`.

        Args:
            optimizer, scaler, errors, watch: see `GradClipper.clip`.
            only: ids of the parameters whose gradients are clipped. None for all.
        """
        with self._undone_on_error() as before:
            self.table.only = only
            try:
                return self._clip(optimizer, scaler, errors, watch, before)
            finally:
                self.table.only = None

    def _clip(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        scaler: GradScaler | None,
        errors: FirstError,
        watch: Any,
        before: _Trace,
    ) -> Outcome:
        scaler, state, loss_scale = enabled(scaler), None, None
        optimizers: list[Optimizer] | None = None
        invalid = FirstError()
        if optimizer is not None or scaler is not None:
            with invalid:
                optimizers = as_list(optimizer)
        errors.add(invalid.error)
        self._expect(optimizers)
        if scaler is not None:
            used = optimizers or []
            are_known = invalid.error is None and isinstance(scaler, GradScaler)
            self.optimizers.compare_first(used, scaler, errors, are_known=are_known)
            with errors:
                state = ScalerState(scaler, used)
                loss_scale = self.optimizers.loss_scale(used, state, unscale_first=self.spec.limits is not None)

        # Stages 1 to 5.
        is_scaled, function = scaler is not None, "GradClipper.clip"
        decision = self._decide(
            errors, loss_scale, before, expect_overflow=is_scaled, function=function, watch=watch, overlap=False
        )
        _begin_decision(decision)
        outcome = _finish_decision(decision, must_read=True)

        # 6. Scale in place, or drop the gradients, so that the caller's optimizer.step() changes nothing.
        self.execution.write_or_drop(outcome, state)
        return outcome

    def _undone_on_error(self, before: _Trace | None = None) -> AbstractContextManager[_Trace]:
        """Undo what the step within the block has changed, if an exception ends it.

        Args:
            before: state before the step. None for the state now.
        """
        if before is None:
            # An error in this step must not undo what is still due from the last step.
            self._abandon()
            self.deferred.raise_due()
            before = self.trace()
        return undone_on_error(self.restore, before)

    def _abandon(self) -> None:
        """Complete a step that was started and never finished, without stepping the optimizers.

        All ranks raise the error in this call. The other ranks may have finished the step, so this rank makes the
        collectives of the decision and continues from the same state.
        """
        started, self.started = self.started, None
        if started is None:
            return
        with FirstError():
            complete(started.stages, None)
        if self.is_alone():
            self.restore(started.before)
        self.late_errors.add(
            ArgumentError(
                "start: the last step was started on this rank and not finished. Call clipper.finish(optimizer) once "
                "after each clipper.start()."
            )
        )

    def refuse_between(self, function: str) -> None:
        """Raise if a step was started and not finished.

        Raises:
            ArgumentError: see above.
        """
        if self.started is not None:
            raise ArgumentError(
                f"{function}: a step was started, and it would be finished with other state. Call it after "
                "clipper.finish(optimizer)."
            )

    def trace(self) -> _Trace:
        """Return the state that a step changes, apart from gradients, parameters and optimizers."""
        counter, deferred = self.counter, self.deferred
        counts = counter.steps, counter.skipped, counter.in_a_row
        clip_rate = deferred.clip_rate.trace()
        return _Trace(self.state, self.calls.last_coefs, self.execution.round, deferred.unread, counts, clip_rate)

    def restore(self, before: _Trace) -> None:
        """Restore the trace from before a step that an exception has ended, or that was not made."""
        self.state, self.calls.last_coefs, self.execution.round = before.state, before.last_coefs, before.scaler_round
        self.deferred.unread = before.unread
        self.deferred.clip_rate.restore(before.clip_rate)
        self._undo = None
        self.execution.call_off()
        counter = self.counter
        was_observed = self._observed_step > before.counts[0]
        counter.steps, counter.skipped, counter.in_a_row = before.counts
        while counter.incidents and counter.incidents[-1].step > counter.steps:
            counter.incidents.pop()
        if was_observed:
            self._observed_step = counter.steps
            for undo in self.undo_observers:
                undo(counter.steps)

    @property
    def can_discard(self) -> bool:
        """True if there is a decision to forget, see `discard`."""
        return self._undo is not None

    def discard(self) -> None:
        """Forget the last decision, see `GradClipper.discard`."""
        self.refuse_between("discard")
        if self._undo is None:
            raise ArgumentError(
                "discard: there is no decision since the last call of discard, load_state_dict or rebind. Call it once "
                "after clip() or decide(), if the step was not made."
            )
        self.restore(self._undo)

    def forget_undo(self) -> None:
        """Prevent `discard`, because another state has been loaded."""
        self._undo = None

    def decide(
        self,
        errors: FirstError,
        loss_scale: Tensor | None = None,
        *,
        expect_overflow: bool = False,
        must_read: bool = True,
        function: str = "GradClipper.decide",
        watch: Any = None,
    ) -> Outcome:
        """Measure, decide, and handle non-finite gradients.

        Only the rule "zero" and a repair of replicas write gradients here.

        Args:
            errors: this rank's errors so far. All ranks raise them together.
            loss_scale: factor that the gradients carry, 0-d. None for 1.
            expect_overflow: a GradScaler is in use, so that non-finite steps are skipped without a warning.
            must_read: whether the host must read in this step whether to skip it.
            function: name of the function that the user called; the ranks check that they all called it.
            watch: scalars of the user, see `GradClipper.step`.

        Returns:
            The outcome, the same on every rank.

        Raises:
            NonFiniteError, TooManySkippedSteps: on every rank.

        Collectives: see `measure_all_ranks`. In a step that the host has found to be non-finite, a gather of the
        culprits, and with "zero" those of `measure_all_ranks` again.
        Host syncs: one on an accelerator with `must_read`, unless the rule is "propagate" and the policy never skips.
        """
        # `step` and `clip` do the same before they take their trace.
        self._abandon()
        self.deferred.raise_due()
        decision = self._decide(
            errors,
            loss_scale,
            self.trace(),
            expect_overflow=expect_overflow,
            function=function,
            watch=watch,
            overlap=False,
        )
        _begin_decision(decision)
        return _finish_decision(decision, must_read=must_read)

    def _decide(
        self,
        errors: FirstError,
        loss_scale: Tensor | None,
        before: _Trace,
        *,
        expect_overflow: bool,
        function: str,
        watch: Any,
        overlap: bool,
    ) -> Generator[Shards, bool, Outcome]:
        """Run the stages of `decide`, and yield this rank's shards once the all-reduce has begun.

        The caller sends it whether the host must read in this step whether to skip it.

        Args:
            errors, loss_scale, expect_overflow, function, watch: see `decide`.
            before: state before the step.
            overlap: yield before the all-reduce is complete.
        """
        # 0. All ranks now do what the last step has postponed.
        self._prepare(errors, function, loss_scale, watch)
        step, rule = self.counter.steps + 1, Skip(expected=True) if expect_overflow else self.rule

        # 1.-3. This rank's shards, their power sums, and ONE all-reduce. A step in which a rank fails does not count.
        measuring = self._start_measuring(errors, loss_scale, function, overlap=overlap)
        must_read = yield begin(measuring)
        shards, partials, measured, totals = self._finish_measuring(measuring, loss_scale)
        self.counter.steps = step

        # 5a. If replicas differ, and the host must read this or reads it without a sync: warn, repair or raise.
        differ, is_resolved = totals.replicas_differ, False
        if differ.host is not False and (self.on_host or self.guard.rule.needs_host):
            if differ.host is None and totals.read(totals.finite & ~differ):
                # One host sync instead of two.
                totals.finite.host, differ.host = True, False
            is_resolved = True
            if totals.read(differ):
                resolution = self.guard.resolve(step, shards, self.step_comm)
                differ = as_fact(resolution.differ)
                if resolution.repaired:
                    shards, partials, measured, totals = self._measure(FirstError(), loss_scale, function)

        # 5b. If the step is non-finite, and the host must read this or reads it without a sync: skip it, repair or
        # raise. The hosts of all ranks read it or none does, even if some ranks offload gradients to a CPU.
        is_counted = False
        if rule.leaves_step_out and (must_read or self.on_host) and not totals.read(totals.finite):
            is_counted = True
            suspects = count_nonfinite(shards) + suspect_nonfinite(totals.watch.local)
            culprits = gather_culprits(suspects, self.step_comm)
            if rule is RULES["zero"] and not totals.watch.finite.read():
                # A non-finite loss cannot be repaired.
                rule = RULES["skip"]
            if rule.resolve(step, shards, culprits, self.counter):
                shards, partials, measured, totals = self._measure(FirstError(), loss_scale, function)
                is_counted = not totals.read(totals.finite)
                if is_counted:
                    # Every element is finite now, but the norm overflows.
                    self.counter.record_skip(step, (), expected=expect_overflow)

        # 4. The policy decides about norms that all ranks share. No rank communicates.
        device = totals.powers.device
        state = {key: devices.move(value, device) for key, value in self.state.items()}
        verdict, new_state = self.policy.decide(totals, state)
        coefs = verdict.coefs
        if any(self.slots.excluded):
            coefs = torch.where(self._excluded(coefs.device), 1.0, coefs)

        # 5c. Skip a step that is non-finite, that the policy skips, or in which a rank failed. Where the host has not
        # read these facts, tensors on the device do it. A skipped step leaves the policy's state unchanged.
        usable = totals.finite & ~totals.failed if rule.leaves_step_out else ALWAYS
        self.state = {key: usable.select(value, state[key]) for key, value in new_state.items()}
        overflow = ~totals.finite if rule.leaves_step_out else NEVER
        skip = ~usable
        if verdict.skip is not None:
            skip = skip | (Fact(verdict.skip) & totals.finite)
            if usable.host is not None:
                skip.read()
        if not rule.leaves_step_out:
            coefs = totals.mask_if_failed(coefs)
        if skip.host is not False:
            coefs = skip.select(torch.ones_like(coefs), coefs)

        outcome = Outcome(
            step,
            totals,
            coefs,
            skip,
            overflow,
            verdict.bounds,
            verdict.limits,
            shards,
            partials.per_tensor_powers,
            measured,
            self.tensor_norms,
            differ,
        )
        if not is_counted:
            # All ranks agree on whether the step still needs to be counted.
            checksums = None if is_resolved or differ.host is False else partials.per_tensor_checksums
            self.deferred.record(outcome, checksums, quiet=expect_overflow)
        return self._publish(outcome, before)

    def _publish(self, outcome: Outcome, before: _Trace | None) -> Outcome:
        """Keep a decision for the next step and for `discard`, and call the observers.

        Args:
            outcome: the decision.
            before: state before the step. None if the step cannot be discarded.
        """
        self.calls.last_coefs, self._observed_step, self._undo = outcome.coefs, outcome.step, before
        for observe in self.observers:
            self._observe(observe, outcome)
        return outcome

    def measure_tensors(self) -> None:
        """Measure the norm of every parameter from now on, in addition to the norms that the policy needs.

        Collectives: one gather, unless the policy is per tensor or row.
        """
        slots, spec = self.slots, self.spec
        if spec.per in ("tensor", "row"):
            # The policy's slots are parameters already, or their rows.
            rows = [i for i, count in enumerate(slots.counts) for _ in range(count)]
            parameters = TensorNorms.index(rows) if spec.per == "row" else None
            self.tensor_norms = TensorNorms(slots.names, None, parameters, slots.total, slots.total)
            return
        errors = FirstError(self.table.error)
        self.calls.agree("GradClipper.measure_tensors", errors)
        params: list[ParamInfo] = []
        per_tensor = NormSpec(per="tensor")
        with errors:
            params = describe_params(self.table, global_rank(self.comm), per_tensor, None)
        gathered, own = exchange_params(self.comm, errors.error, params)
        finer = assign_slots(gathered, own, per_tensor)
        parents = TensorNorms.index(parent_slots(gathered, spec))
        self.table.assign_slots(finer.by_name, finer.frozen)
        self.tensor_norms = TensorNorms(finer.names, parents, None, finer.total, slots.total)

    def measure_updates(self) -> None:
        """Compare gradients with second moments from now on, see `GradClipper.measure_updates`."""
        errors = FirstError(self.table.error)
        with errors:
            if self.spec.per == "row" or math.isinf(self.spec.norm_type):
                raise ArgumentError(
                    f"measure_updates: the policy has per={self.spec.per!r} and norm_type={self.spec.norm_type}. Use a "
                    "policy per model, group or tensor with norm_type=2.0."
                )
        self.calls.agree("GradClipper.measure_updates", errors)
        self.spec = replace(self.spec, moment_eps=1e-8)

    def _measure(
        self, errors: FirstError, loss_scale: Tensor | None, function: str
    ) -> tuple[Shards, Partials, Totals, Totals]:
        """Run stages 1 to 3, and return the totals by measured slot and by policy slot."""
        measuring = self._start_measuring(errors, loss_scale, function, overlap=False)
        begin(measuring)
        return self._finish_measuring(measuring, loss_scale)

    def _start_measuring(
        self, errors: FirstError, loss_scale: Tensor | None, function: str, *, overlap: bool
    ) -> Measuring:
        spec, call = self.spec, self.calls.describe(function, loss_scale, self._watch)
        if spec.limits is not None and loss_scale is not None:
            # The gradients carry the loss scale, so the limits must carry it too.
            low, high = spec.limits
            spec = replace(spec, limits=(low * float(loss_scale), high * float(loss_scale)))
        moments, about_to_step = None, self.execution.about_to_step
        if spec.moment_eps is not None and self.policy.spec.moment_eps is not None and about_to_step is None:
            errors.add(
                ArgumentError(
                    f"{function}: the policy reads the second moments of the optimizer that is about to step. Use "
                    "clipper.step(optimizer), clipper.start(optimizer), clipper.attach(optimizer), or "
                    "clipper.clip(optimizer)."
                )
            )
        elif spec.moment_eps is not None:
            moments = SecondMoments(about_to_step or [], spec.moment_eps, loss_scale, self.is_alone())
        return measure_all_ranks(
            self.table,
            spec,
            self.step_comm,
            errors,
            call,
            self.guard,
            self.num_measured_slots,
            self.counter.steps,
            self._watch,
            moments=moments,
            overlap=overlap,
        )

    def _finish_measuring(
        self, measuring: Measuring, loss_scale: Tensor | None
    ) -> tuple[Shards, Partials, Totals, Totals]:
        shards, partials, totals = complete(measuring, None)
        with self.late_errors:
            self.coverage.record_call(len(shards.grads))
            if not shards.grads and not self._only_measures and (self.table.is_complete or self.is_alone()):
                warn_if_elsewhere("GradClipper", self.table, finds_own=False)
        if self._compares_tensors:
            self._compares_tensors = not compare_tensors("GradClipper", self.table, self.comm, may_call_alone=False)
        if self._compares_split:
            with self.late_errors:
                self._compares_split = not compare_split("GradClipper", self.table, shards)
        if loss_scale is not None:
            totals = replace(totals, loss_scale=loss_scale)
        return shards, partials, totals, totals if self.tensor_norms is None else self.tensor_norms.for_policy(totals)

    def _observe(self, observe: Observer, outcome: Outcome) -> None:
        # An error must not end the step on this rank, because the other ranks continue theirs.
        try:
            observe(outcome)
        except Exception as error:
            with self.late_errors:
                warn_user(
                    f"observer={observe!r:.100}: it raised {error!r:.200} in step {outcome.step}, which went on. "
                    "Pass a function that does not raise.",
                    RuntimeWarning,
                )

    def _prepare(self, errors: FirstError, function: str, loss_scale: Tensor | None, watch: Any) -> None:
        """Add the late errors of the last step, and end the hold on the parameters that it skipped.

        Args:
            errors: this rank's errors, to which those that it had alone after its last all-reduce are added.
            function, loss_scale, watch: see `decide`.

        Collectives: one all-reduce the first time with these names of watched scalars.
        """
        errors.add(self.late_errors.take())
        # A new backward pass has replaced the gradients that a skipped step dropped.
        self.execution.release()
        self._watch = self.calls.agree_on_watch(watch, function, loss_scale, errors)
        if not self._only_measures:
            with errors:
                warn_of_late_clip(function, self.table, find_stepped(self.table))
                warn_if_unstepped(function, self.table)

    @without_autograd
    def conclude(self, step: int, measured: Totals, kept_powers: Tensor) -> Outcome:
        """Update the policy's state and call the observers after a step that was clipped piece by piece.

        Args:
            step: 1-based index of the step.
            measured: totals by measured slot, before clipping.
            kept_powers: (measured slots,), squared norms after clipping.

        Collectives: none. Host syncs: none on a CPU.
        """
        totals, kept = measured, replace(measured, powers=kept_powers)
        if self.tensor_norms is not None:
            totals, kept = self.tensor_norms.for_policy(measured), self.tensor_norms.for_policy(kept)
        device = totals.powers.device
        state = {key: value.to(device) for key, value in self.state.items()}
        _, self.state = self.policy.decide(totals, state)
        ratio = (kept.powers / totals.powers).sqrt()
        coefs = ratio.where(totals.powers.isfinite() & (totals.powers > 0), 1.0)
        outcome = Outcome(
            step, totals, coefs, NEVER, ~totals.finite, None, None, NO_SHARDS, (), measured, self.tensor_norms
        )
        return self._publish(outcome, None)

    def _excluded(self, device: torch.device) -> Tensor:
        """Return a mask of the slots that are measured and never clipped, (slots,) bool."""
        return device_constant(self.slots.excluded_by_slot, device, torch.bool)


@outside_modes
def _begin_decision(decision: Generator[Shards, bool, Outcome]) -> Shards:
    """Run `Engine._decide` until the all-reduce has begun, and return this rank's shards."""
    return begin(decision)


@outside_modes
def _finish_decision(decision: Generator[Shards, bool, Outcome], *, must_read: bool) -> Outcome:
    """Run `Engine._decide` from the all-reduce to its end."""
    return complete(decision, must_read)


class _Trace(NamedTuple):
    """State that a step changes, apart from gradients, parameters and optimizers."""

    state: State
    last_coefs: Tensor | None
    scaler_round: ScalerRound | None
    unread: Unread | None
    counts: tuple[int, int, int]
    clip_rate: tuple[int, int, deque[float], bool]


class _Started(NamedTuple):
    """Step between `start` and `finish`.

    Args:
        stages: stages of the step, which have already begun the all-reduce.
        before: state before the step.
    """

    stages: Generator[None, Passed | None, Outcome]
    before: _Trace
