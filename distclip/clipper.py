"""`GradClipper`: a policy bound to a model, and to the optimizer's step; composition, no algorithm of its own."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .binding import bind, measure_tensors
from .checkpoint import policy_kind, restored, saved
from .comm import Comm
from .decision import Observer, Outcome
from .errors import ArgumentError
from .nonfinite.culprits import Incident, OnNonFinite, SkipCounter
from .policies import Policy
from .report import Report
from .sharding.parameters import Parameters
from .sharding.shard import ShardInfos, Shards
from .sharding.split_over import SplitOver
from .stepper import Stepper, several, write_

__all__ = ["GradClipper"]


class GradClipper:
    """A policy bound to the parameters of a model: who holds what is found out once, at construction.

    Args:
        parameters: see `clip_grad_norm_`. With a policy per tensor or row, a module or (name, parameter) pairs: names
            tell which pieces on different ranks belong together, and find what a checkpoint remembers.
        policy: what to do, for example `distclip.global_norm(1.0)`.
        split_over: see `clip_grad_norm_`.
        comm: see `clip_grad_norm_`.
        on_nonfinite: what to do about NaN and Inf, alike on all ranks wherever they are. "skip": the step leaves
            parameters, optimizer and the policy's memory as they are, and a `NonFiniteWarning` names the culprits.
            "raise": `NonFiniteError`, before any gradient is touched. "zero": set these elements to 0, warn, and
            clip the rest. "propagate": whatever follows from the numbers, as torch does. With a GradScaler such steps
            are its way to find the scale: they are skipped and counted, without a warning, under any of the four.
        max_skips: raise `TooManySkippedSteps` at so many skipped steps in a row, ≥ 1; None for never.
        flat_grads: lay the gradients of the first step out as views of one storage (for each dtype), so that a norm of
            all is one read whatever their number. They stay there as long as they are zeroed in place:
            `zero_grad(set_to_none=False)`. Gradients that share storages already (DDP, FSDP) stay where they are.

    Raises:
        ArgumentError, LayoutError, DisagreementError: see `clip_grad_norm_`; on every rank that takes part.

    Collectives: construct it on every rank that holds something of the model; ranks find each other through the store
    of torch.distributed, and then one gather, the only one with `comm`, tells them each other's parameters.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> from distclip import global_norm
    >>> clipper = GradClipper([("weight", weight)], global_norm(1.0))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clipper.step(optimizer).as_dict()
    {'norm': 5.0, 'coef': 0.199999960000008, 'clipped': True, 'finite': True, 'skipped': False}
    >>> weight.data
    tensor([-0.6000, -0.8000])
    """

    @torch.no_grad()
    def __init__(
        self,
        parameters: Parameters,
        policy: Policy,
        *,
        split_over: SplitOver = None,
        comm: Comm | None = None,
        on_nonfinite: OnNonFinite = "skip",
        max_skips: int | None = None,
        flat_grads: bool = False,
    ) -> None:
        self.policy = policy
        self._watch = SkipCounter(max_skips)
        self._judge = bind(parameters, policy, split_over, comm, on_nonfinite, self._watch, flat_grads)
        self._stepper = Stepper(self._judge)
        self._attached: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._turn: set[int] = set()
        self._busy = False

    @torch.no_grad()
    def rebind(
        self,
        parameters: Parameters,
        *,
        split_over: SplitOver = None,
        comm: Comm | None = None,
        flat_grads: bool = False,
    ) -> None:
        """Go on with other tensors that hold the same parameters, by their names: after the model was wrapped anew.

        What the policy remembers, counters and incidents stay.

        Args:
            parameters, split_over, comm, flat_grads: see `GradClipper`.

        Raises, Collectives: see `GradClipper`.

        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> from distclip import per_tensor_norm
        >>> clipper = GradClipper([("w", weight)], per_tensor_norm(1.0))
        >>> clipper.rebind([("w", weight.detach().double().requires_grad_())])
        >>> clipper.slots
        ('w',)
        """
        memory = self.state_dict()
        old = self._judge
        self._judge = bind(parameters, self.policy, split_over, comm, old.on_nonfinite, self._watch, flat_grads)
        self._judge.observers = old.observers
        if old.by_tensor is not None:
            measure_tensors(self._judge)
        self._stepper = Stepper(self._judge)
        self.load_state_dict(memory)

    @torch.no_grad()
    def measure_tensors(self) -> None:
        """From now on, reports have the norm of every parameter's gradient, whatever the policy asks for.

        They come out of the same all-reduce, which gets longer by a number for each; gradients are then read one by one
        also where they lie in one storage. Call it on every rank.

        Collectives: one gather, unless the policy is per tensor or row.

        >>> from distclip import global_norm
        >>> weight, bias = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        >>> clipper = GradClipper([("weight", weight), ("bias", bias)], global_norm(1.0))
        >>> clipper.measure_tensors()
        >>> weight.grad, bias.grad = torch.tensor([3.0]), torch.tensor([4.0])
        >>> clipper.tensors, clipper.clip().tensor_norms
        (('weight', 'bias'), tensor([3., 4.], dtype=torch.float64))
        """
        if self._judge.by_tensor is None:
            measure_tensors(self._judge)

    def observe(self, observer: Observer) -> None:
        """Have `observer(step, decision)` called at every step, on every rank, once its decision is made.

        For recorders (see `distclip.monitor`). It must not raise; if it communicates, all ranks need the same one.
        """
        self._judge.observers.append(observer)

    @_disable_dynamo
    @torch.no_grad()
    def decide(self, loss_scale: float | None = None, failure: Exception | None = None) -> Outcome:
        """Measure and decide, and leave it to the caller to `write_` the decision or to leave the step out.

        For owners of an optimizer that keep gradients in places of their own (see `distclip.integrations`).

        Args:
            loss_scale: what gradients are multiplied by; then a step that is not finite is skipped without a warning,
                as with a GradScaler. None if they are as they are.
            failure: what this rank found wrong on the way; every rank raises.

        Returns:
            What is to be done; `decision.skip_known` says whether to skip, and `decision.report()` is for the user.

        Raises, Collectives, Host syncs: see `clip`.
        """
        scale = None if loss_scale is None else torch.tensor(loss_scale, dtype=torch.float64)
        return self._judge.decide(failure, scale, scaled=scale is not None)

    @torch.no_grad()
    def write_(self, decision: Outcome, where: Sequence[int], grads: Sequence[Tensor]) -> None:
        """Write a decision into gradients that may lie elsewhere than where they were measured.

        Args:
            decision: of `decide`, not to be skipped.
            where: of which of the clipper's parameters, by position, they are the gradients.
            grads: local pieces of the shape that was measured, of any floating dtype.

        Collectives: none. Host syncs: none.
        """
        usual = self._judge.plan.arrangement.usual(self._judge.comm.size)
        write_(decision, Shards(ShardInfos(usual[i] for i in where), list(grads)))

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of what has a norm of its own, in the order of `Report.norms`; of rows, a name for each."""
        rows = self.policy.spec.per == "row"
        named = zip(self._judge.slots.names, self._judge.slots.counts, strict=True)
        return tuple(f"{name}[{i}]" if rows and n > 1 else name for name, n in named for i in range(n))

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the parameters, in the order of `Report.tensor_norms`; empty without `measure_tensors`."""
        return () if self._judge.by_tensor is None else self._judge.by_tensor.names

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of those that this rank has, or has a piece of."""
        return tuple(self._judge.plan.arrangement.names)

    def pieces(self) -> Shards:
        """This rank's pieces of the parameters themselves. Collectives and host syncs: none."""
        return self._judge.plan.weights(self._judge.comm.size)

    @property
    def measured_slots(self) -> int:
        """How many norms are added up over ranks."""
        return self._judge.measured_slots

    @property
    def comm(self) -> Comm:
        """Everybody concerned."""
        return self._judge.comm

    @property
    def incidents(self) -> Sequence[Incident]:
        """The last hundred steps that were not finite, and whose gradients were to blame; the same on every rank.

        Where the host is a step behind (see `step`), `state_dict()` brings it up to date.
        """
        return tuple(self._watch.incidents)

    @property
    def skipped(self) -> int:
        """How many steps were skipped, as far as the host knows (see `step`)."""
        return self._watch.skipped

    @_disable_dynamo
    def clip(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        scaler: GradScaler | None = None,
        *,
        failure: Exception | None = None,
    ) -> Report:
        """Measure, decide and apply, once, in place; call it after backward on every rank, before your own step.

        A step that is to be skipped loses its gradients (`.grad = None`, a `main_grad` becomes 0), so that an
        optimizer's step does nothing and accumulation starts afresh; `report.skipped` says so.

        Args:
            optimizer: that `scaler` will step, or several; without a scaler not needed.
            scaler: unscale in the same pass, unless `scaler.unscale_` has, and tell the scaler what all ranks have
                found: then `scaler.step(optimizer)` and `scaler.update()` are yours.
            failure: what this rank found wrong on the way; every rank raises.

        Returns:
            What was seen and done, as device scalars.

        Raises:
            ArgumentError: see `step`, with a scaler; on every rank.
            LayoutError: gradients that the policy cannot deal with; on every rank.
            PeerError: another rank failed, by itself or on an accelerator; there it may be found a step later.
            NonFiniteError, TooManySkippedSteps: see `on_nonfinite` and `max_skips`; on every rank, nothing is changed.

        Collectives: one all-reduce of (slots + 1) float64 numbers; see `clip_grad_norm_`. On a step that is not finite
        a gather more, and the first time with a scaler. Host syncs: one on an accelerator, unless
        `on_nonfinite="propagate"` and the policy leaves no step out, which is what a CUDA graph needs; see
        `clip_grad_norm_`.
        """
        return self._stepper.clip(optimizer, scaler, failure).report()

    @_disable_dynamo
    def step(self, optimizer: Optimizer | Iterable[Optimizer], scaler: GradScaler | None = None) -> Report:
        """Clip and step, or skip, on all ranks alike; call it after backward on every rank.

        A skipped step leaves parameters, optimizer state and step counters untouched, and gradients as they are: go on
        with `zero_grad()` as after any step. Whether a scheduler counts it is yours to say, by `report.skipped`.
        With gradient accumulation call it once, at the end; a NaN in any of the micro-batches skips all of them.

        Args:
            optimizer: what steps; several, if they share a loss (with a scaler also in a call each); none, on a rank
                that holds no parameters.
            scaler: unscale, clip and check in one pass, and tell the scaler what all ranks have found, so that its
                scale stays the same on each. Call `scaler.update()` yourself, once, after all optimizers have stepped.
                After `scaler.unscale_` gradients are not unscaled again.

        Returns:
            What was seen and done, as device scalars.

        Raises:
            ArgumentError: an optimizer that has stepped since the last `scaler.update()`, or (with a scaler) holds
                parameters that the clipper does not; float16 gradients with a scaler; on every rank.
            LayoutError, PeerError, NonFiniteError, TooManySkippedSteps: see `clip`.

        Collectives: those of `clip`; a gather the first time with these optimizers. Host syncs: on an accelerator one,
        as GradScaler has; none where all optimizers are fused and `on_nonfinite` is "skip" or "propagate": the device
        leaves the step out, and warnings, counters and `max_skips` follow one step later, on all ranks at the same.
        """
        self._busy = True
        try:
            return self._stepper.step(optimizer, scaler).report()
        finally:
            self._busy = False

    def attach(self, *optimizers: Optimizer) -> RemovableHandle:
        """Clip inside of every `optimizer.step()`, whoever calls it; of several optimizers, once for all of them.

        A step that is to be skipped loses its gradients, as in `clip`. Not together with a GradScaler, which would not
        let every rank come here: write `clipper.step(optimizer, scaler)`.

        Args:
            optimizers: that step the clipper's parameters, each once in a turn.

        Returns:
            A handle; `handle.remove()` detaches.

        Raises:
            ArgumentError: no optimizer, one that the clipper is attached to already; in a step, one with a GradScaler.

        Collectives and host syncs in a step: those of `clip`.

        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> from distclip import global_norm
        >>> handle = GradClipper([weight], global_norm(1.0)).attach(optimizer)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([-0.6000, -0.8000])
        >>> handle.remove()
        """
        if not optimizers or any(optimizer in self._attached for optimizer in several(optimizers)):
            raise ArgumentError(
                f"attach{optimizers!r:.80}: expected optimizers that the clipper is not attached to yet: it would clip "
                "twice in a step. Write handle = clipper.attach(optimizer) once, and handle.remove() before again."
            )
        self._attached.update(optimizers)
        handles = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]
        return _Attached(handles, self._attached, optimizers)

    def state_dict(self) -> dict[str, Any]:
        """What the clipper remembers, the same on every rank; a Stateful for torch.distributed.checkpoint.

        By the names of parameters, so that it fits another world size and another layout. Host syncs: one per tensor.
        """
        self._judge.settle()
        watch = self._watch
        counts = {
            "steps": watch.steps,
            "skipped": watch.skipped,
            "in_a_row": watch.in_a_row,
            "restarts": watch.restarts,
        }
        return {
            "rule": policy_kind(self.policy),
            "counts": {key: torch.tensor(count) for key, count in counts.items()},
            "state": saved(self._judge.state, self._judge.slots),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a clipper with the same kind of policy was saved.

        Args:
            state_dict: of `state_dict`; numbers of the policy may have changed, except its windows.

        Raises:
            ArgumentError: another kind of policy, or another window.
        """
        if state_dict["rule"] != policy_kind(self.policy):
            raise ArgumentError(
                f"the checkpoint remembers what {state_dict['rule']} knew, and the policy is "
                f"{policy_kind(self.policy)}: resume with the policy that the run was started with, or leave the "
                "clipper's state out."
            )
        self._judge.settle()
        self._judge.state = restored(self._judge.state, self._judge.slots, state_dict.get("state", {}))
        for key, count in state_dict["counts"].items():
            setattr(self._watch, key, int(count))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._busy:
            return
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            raise ArgumentError("an attached clipper and a GradScaler: write clipper.step(optimizer, scaler) instead.")
        # A new turn begins with the first optimizer that comes again.
        if not self._turn or id(optimizer) in self._turn:
            self._turn = set()
            self.clip()
        self._turn.add(id(optimizer))


class _Attached(RemovableHandle):
    """Several hooks, removed as one."""

    def __init__(
        self,
        handles: Sequence[RemovableHandle],
        attached: weakref.WeakSet[Optimizer],
        optimizers: Sequence[Optimizer],
    ) -> None:
        self._handles, self._all, self._own = handles, attached, weakref.WeakSet(optimizers)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._all -= self._own
