"""Clip the gradients of a model at every step: `GradClipper`, the facade over `Engine`."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .apply.declined import StepWatch, watch_steps
from .apply.grad_scaler import parameters_of
from .apply.optimizers import as_list
from .apply.step_gate import gate_of
from .apply.turns import Turns
from .backward import InBackward
from .checkpoint import VERSION, check_state_dict, pack_state, policy_kind, unpack_counts, unpack_state, upgrade
from .comm import Comm
from .comm.consensus import FirstError
from .devices import outside_fake_mode
from .engine import Engine
from .errors import ArgumentError, DistclipError, UnclippedStepWarning, warn_user
from .graphs import GraphPlan, is_tracing, leave_graph, reason_against_clip, reason_against_step
from .graphs import clip as clip_in_graph
from .graphs import step as step_in_graph
from .nonfinite.culprits import Incident
from .nonfinite.rules import OnNonFinite
from .nonfinite.skip_counter import SkipCounter
from .norms.watch import Watched
from .outcome import Observer, Outcome, Report
from .policies import NormPolicy, Policy
from .policies.description import describe
from .policies.validation import check_flags
from .replicas.incidents import ReplicaIncident
from .replicas.rules import Replicas
from .sharding.description import describe_layouts
from .sharding.parameters import Parameters, name_tensors
from .sharding.shard import Shards
from .sharding.split_over import SplitOver
from .sharding.table import ShardTable
from .tenants import GroupCounts, Groups, IsolatedEngine, group_state_dict, load_groups

__all__ = ["GradClipper"]


InitT = TypeVar("InitT", bound=Callable[..., None])


def _explain_arguments(init: InitT) -> InitT:
    """Run a constructor under no_grad, and explain what to pass if it gets arguments of torch's functions."""

    @wraps(init)
    def wrapper(self: GradClipper, *args: Any, **kwargs: Any) -> None:
        if not kwargs.keys().isdisjoint({"max_norm", "norm_type", "clip_value", "foreach"}):
            given = ", ".join(f"{name}={value!r:.40}" for name, value in kwargs.items() if name != "parameters")
            policy = f"value({kwargs['clip_value']!r})" if "clip_value" in kwargs else "global_norm(1.0)"
            if "max_norm" in kwargs:
                p = f", norm_type={kwargs['norm_type']!r}" if kwargs.get("norm_type", 2) != 2 else ""
                policy = f"global_norm({kwargs['max_norm']!r}{p})"
            raise ArgumentError(
                f"GradClipper({given}): a clipper takes a policy, which has the bound. Use GradClipper(model, "
                f"distclip.{policy})."
            )
        if "policy" not in kwargs and len(args) < 2:
            raise ArgumentError("GradClipper: no policy. Use GradClipper(model, distclip.global_norm(1.0)).")
        with torch.no_grad():
            init(self, *args, **kwargs)

    return wrapper  # type: ignore[return-value]


class GradClipper:
    """Clip the gradients of a model by a policy.

    The clipper finds the layout of the parameters once, at construction.

    Args:
        parameters: see `clip_grad_norm_`. With a policy per tensor or row, pass a module or (name, parameter) pairs,
            because names identify the shards of one parameter on different ranks, and its state in a checkpoint.
        policy: decides how much to clip, for example `distclip.global_norm(1.0)`.
        split_over: see `clip_grad_norm_`.
        comm: see `clip_grad_norm_`.
        on_nonfinite: what happens to a step with NaN or Inf on any rank; all ranks do the same. "skip": the step leaves
            parameters, optimizer and the policy's state unchanged, and a `NonFiniteWarning` names the culprits.
            "raise": raise `NonFiniteError` before any gradient changes. "zero": set these elements to 0, warn, and clip
            the others. "propagate": compute with the numbers as they are, as torch does. A GradScaler needs such steps
            to find its scale, so with a scaler all four rules skip and count them without a warning.
        max_skips: number of consecutive skipped steps, ≥ 1, at which `TooManySkippedSteps` is raised. None for never.
        flat_grads: move the gradients of the first step into one storage per dtype, as views, so that they are read as
            one tensor. They stay there as long as they are zeroed in place: `zero_grad(set_to_none=False)`. Gradients
            that share a storage already (DDP, FSDP) are not moved.
        partial: the clipper has only some of the parameters that its optimizers step, and the others move unclipped.
            Without `partial`, such a step raises.
        replicas: what happens if a gradient or a parameter that several ranks hold differs between them. "warn": a
            `ReplicaWarning` names the tensor, the ranks and the size of the difference. "raise": `ReplicaError`, before
            any gradient changes. "repair": overwrite the replicas that differ with those of the majority, and raise if
            there is no majority. "off": compare nothing. Gradients are compared in every step, parameters once in 64
            steps. See docs/replicas.md.
        isolate: clip each group of parameters as if it were trained alone, for adapters that share a step. Each group
            has its own norm, bound, policy state, non-finite steps, skips, counters and `max_skips`, still with one
            all-reduce. The groups are those of a policy with per="group", and those added by `add_group`. `policy`
            applies to all other parameters, and is the default for `add_group`. `NormPolicy(isolate=True)` means the
            same. See docs/tenants.md.

    Raises:
        ArgumentError, LayoutError, DisagreementError: see `clip_grad_norm_`; on every rank that takes part.

    Collectives: construct it on every rank that has parameters of the model. The ranks find each other through the
    store of torch.distributed, unless `comm` is given. A few all-reduces exchange the distinct descriptions of their
    parameters.

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

    @_explain_arguments
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
        partial: bool = False,
        replicas: Replicas = "warn",
        isolate: bool = False,
    ) -> None:
        self.policy = policy
        self._counter = SkipCounter(max_skips)
        self._groups: Groups | None = None
        self._plan: GraphPlan | None = None
        self._reasons: list[str] = []
        options = (on_nonfinite, self._counter, flat_grads, partial, replicas)
        self._engine: Engine
        errors = FirstError()
        with errors:
            check_flags(isolate=isolate)
        if (isolate and errors.error is None) or (type(policy) is NormPolicy and policy.isolate):
            self._groups = Groups(parameters, policy, split_over, comm, options)
            self._use(self._groups.build())
        else:
            self._engine = Engine.build(parameters, policy, split_over, comm, *options, errors=errors)
        self._turns = Turns()
        self._is_stepping = False
        self._in_backward: InBackward | None = None
        self._plan_graphs()

    def describe(self) -> str:
        """Return the policy, and how this rank's tensors are spread over the ranks, in one line.

        `distclip.audit` verifies the layout that this line describes.

        Collectives: none. Host syncs: none.

        >>> from distclip import global_norm
        >>> GradClipper(torch.nn.Linear(2, 2), global_norm(1.0)).describe()
        'global_norm(1.0): 2 tensors; no communication'
        """
        table = self._engine.table
        return f"{describe(self.policy)}: {describe_layouts(table.layouts, table.axes, self.comm.size)}"

    def __repr__(self) -> str:
        return f"GradClipper({self.describe()})"

    def __getstate__(self) -> Any:
        raise TypeError(
            "GradClipper: cannot be pickled, because it belongs to the tensors and the process groups of its process. "
            "Save state_dict(), and construct a clipper with the same policy in each process."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> GradClipper:
        # A model and its clipper can be copied together within a process. A clipper copied without its model warns in
        # its first call.
        clipper = memo[id(self)] = object.__new__(type(self))
        # The hooks of an attached clipper belong to its optimizers, and copies of these optimizers have no hooks.
        kept = {key: value for key, value in self.__dict__.items() if key not in ("_turns", "_in_backward")}
        clipper.__dict__.update(copy.deepcopy(kept, memo), _turns=Turns(), _in_backward=None)
        clipper._engine.forget_original(memo)
        if self._turns.optimizers or self._is_in_backward:
            warn_user(
                "copy.deepcopy: the copy of an attached clipper is attached to no optimizer. Call attach on the copy "
                "with the optimizers that it clips for.",
                UnclippedStepWarning,
            )
        return clipper

    @torch.no_grad()
    def rebind(
        self,
        parameters: Parameters,
        *,
        split_over: SplitOver = None,
        comm: Comm | None = None,
        flat_grads: bool = False,
    ) -> None:
        """Continue with new tensors for the same parameters, after the model was wrapped again.

        The parameters are found by name. The policy's state, the counters and the incidents are kept.

        Args:
            parameters, split_over, comm, flat_grads: see `GradClipper`.

        Raises: see `GradClipper`.
            DisagreementError: another rank makes a different call, such as its next step; on every rank.

        Collectives: one all-reduce of the size of a step's, over the ranks that the clipper had so far, and those of
            `GradClipper`. Call it on every rank.

        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> from distclip import per_tensor_norm
        >>> clipper = GradClipper([("w", weight)], per_tensor_norm(1.0))
        >>> clipper.rebind([("w", weight.detach().double().requires_grad_())])
        >>> clipper.slots
        ('w',)
        """
        if self._groups is not None:
            raise ArgumentError(
                "rebind: a clipper with isolate=True has the parameters of its groups. Call remove_group and add_group "
                "with the new parameters."
            )
        old, errors = self._engine, FirstError()
        with errors:
            old.refuse_between("rebind")
        # This comes before the ranks look for a communicator of the new parameters, because each rank may start from a
        # different one.
        old.calls.agree_to_end("GradClipper.rebind", comm, errors)
        state_dict = self.state_dict()
        options = old.on_nonfinite, self._counter, flat_grads, old.coverage.partial, old.replicas
        engine = Engine.build(parameters, self.policy, split_over, comm, *options)
        engine.guard.log = old.guard.log
        engine.observers, engine.undo_observers = old.observers, old.undo_observers
        engine.deferred.clip_rate = old.deferred.clip_rate
        if old.tensor_norms is not None:
            engine.measure_tensors()
        if old.spec.moment_eps is not None and engine.spec.moment_eps is None:
            engine.measure_updates()
        self._engine = engine
        self.load_state_dict(state_dict)
        self._plan_graphs()

    @torch.no_grad()
    def add_group(self, name: str, parameters: Parameters, policy: Policy | None = None) -> None:
        """Add a group to a clipper with isolate=True, on all ranks together.

        The other groups keep their states and counters. The ranks need not find each other again, unless the parameters
        are on ranks that had no parameters of the clipper before. The slot of the group has the group's name, and its
        parameters are named "name/parameter" in reports, warnings and the recorder.

        Args:
            name: name of the group, without "/".
            parameters: parameters of the group, see `GradClipper`. All of them must train.
            policy: policy of the group, for a single norm (per="model"). None for the policy of the clipper. All groups
                share one norm type.

        Raises:
            ArgumentError: the clipper has no isolate=True, the name is taken, a parameter belongs to another group or
                does not train, the policy is not for a single norm, or a step is in progress; on every rank.
            LayoutError: a parameter exists on some ranks only; on every rank.
            DisagreementError: the ranks add different groups or policies, or another rank calls a different function;
                on every rank. Nothing changes in that case.

        Collectives: a small all-reduce and six gathers. Host syncs: one on an accelerator.

        >>> from distclip import global_norm, zclip
        >>> clipper = GradClipper([], global_norm(1.0), isolate=True)
        >>> clipper.add_group("alice", [torch.nn.Parameter(torch.zeros(2))])
        >>> clipper.add_group("bob", [torch.nn.Parameter(torch.zeros(2))], zclip(cap=1.0))
        >>> clipper.slots
        ('alice', 'bob', 'rest')
        """
        groups, engine = self._isolated("add_group")
        self._use(groups.add(engine, {name: parameters}, policy, f"add_group({name!r})"))

    @torch.no_grad()
    def add_groups(self, groups: Mapping[str, Parameters], policy: Policy | None = None) -> None:
        """Add several groups at once, in the time of one `add_group`.

        Args:
            groups: {name: parameters}, in the same order on every rank.
            policy: see `add_group`.

        Raises, Collectives, Host syncs: see `add_group`.

        >>> from distclip import global_norm
        >>> clipper = GradClipper([], global_norm(1.0), isolate=True)
        >>> clipper.add_groups({name: [torch.nn.Parameter(torch.zeros(2))] for name in ("alice", "bob")})
        >>> clipper.slots
        ('alice', 'bob', 'rest')
        """
        tenants, engine = self._isolated("add_groups")
        self._use(tenants.add(engine, groups, policy, f"add_groups({list(groups)!r:.200})"))

    @torch.no_grad()
    def remove_group(self, name: str) -> None:
        """Remove a group and its state from a clipper with isolate=True, on all ranks together.

        Args:
            name: name of a group, from `add_group` or from the policy.

        Raises:
            ArgumentError: there is no such group, or a step is in progress; on every rank.
            DisagreementError: see `add_group`.

        Collectives, host syncs: see `add_group`.

        >>> from distclip import global_norm
        >>> clipper = GradClipper([], global_norm(1.0), isolate=True)
        >>> clipper.add_group("alice", [torch.nn.Parameter(torch.zeros(2))])
        >>> clipper.remove_group("alice")
        >>> clipper.slots
        ('model',)
        """
        groups, engine = self._isolated("remove_group")
        self._use(groups.remove(engine, name))

    @property
    def groups(self) -> dict[str, GroupCounts]:
        """Counters of each group with isolate=True, the same on every rank. Empty without it."""
        if self._groups is None:
            return {}
        counters = self._isolated("groups")[1].counters
        return {name: counters[name] for name in counters.names}

    def _isolated(self, function: str) -> tuple[Groups, IsolatedEngine]:
        engine: Any = self._engine
        if self._groups is None:
            raise ArgumentError(f"{function}: the clipper has no isolate=True. Pass isolate=True to GradClipper.")
        return self._groups, engine

    def _use(self, engine: IsolatedEngine) -> None:
        self._engine, self.policy = engine, engine.policy

    def step(
        self,
        optimizer: Optimizer | Iterable[Optimizer],
        scaler: GradScaler | None = None,
        *,
        watch: Watched | None = None,
    ) -> Report:
        """Clip and step, or skip, on all ranks together. Call it after backward on every rank.

        A skipped step leaves parameters, optimizer state, step counters and gradients unchanged. Call `zero_grad()`
        after it as after any step. `report.skipped` tells a scheduler whether the step counts. With gradient
        accumulation, call it once, after the last micro-batch; a NaN in any micro-batch skips the whole step.

        Args:
            optimizer: the optimizer that steps, or several that share a loss. With a scaler, several may also be passed
                one per call. A rank without parameters passes an empty list.
            scaler: unscale, clip and check in one pass, and give the scaler the found_inf of all ranks, so that its
                scale stays equal on all ranks. Call `scaler.update()` once, after all optimizers have stepped.
                Gradients that `scaler.unscale_` has unscaled are not unscaled again.
            watch: scalars to reduce in the same all-reduce, at most 16: {"loss": loss} for the mean over the ranks that
                have one, {"tokens": (n, "sum")} or {"slowest": (seconds, "max")}. A value is None on a rank that has
                none. The names must be the same on all ranks. A value that is non-finite on any rank makes the step
                non-finite.

        Returns:
            The measurements and the decision, as device scalars.

        Raises:
            ArgumentError: an optimizer steps a parameter that has a gradient and is not in the clipper (unless
                `partial`), or no optimizer steps a parameter of the clipper that has a gradient; an optimizer needs a
                closure, or has stepped since the last `scaler.update()`; a gradient is float16 with a scaler; `step` is
                called in a hook within backward; on every rank.
            LayoutError, PeerError, NonFiniteError, TooManySkippedSteps, DisagreementError: see `clip`.

        Collectives: those of `clip`, and a gather in the first call with these optimizers.
        Host syncs: one on an accelerator, as with a GradScaler. None if all optimizers are fused and `on_nonfinite` is
        "skip" or "propagate": the device skips the step, and warnings, counters and `max_skips` follow one step later,
        on all ranks in the same step.

        >>> from distclip import global_norm
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = GradClipper([("weight", weight)], global_norm(1.0))
        >>> loss = (weight * torch.tensor([3.0, 4.0])).sum()
        >>> loss.backward()
        >>> clipper.step(torch.optim.SGD([weight], lr=1.0), watch={"loss": loss, "tokens": (2, "sum")}).watch
        {'loss': tensor(0., dtype=torch.float64), 'tokens': tensor(2., dtype=torch.float64)}
        """
        if is_tracing():
            reason = reason_against_clip(self._plan, self._reasons) or reason_against_step(optimizer, scaler)
            if reason is None and self._plan is not None:
                return step_in_graph(self._engine, self._plan, optimizer, watch)
            leave_graph(f"GradClipper.step: {reason}")
        return self._step(optimizer, scaler, watch)

    @_disable_dynamo
    def _step(
        self, optimizer: Optimizer | Iterable[Optimizer], scaler: GradScaler | None, watch: Watched | None
    ) -> Report:
        self._count_graphs()
        self._is_stepping = True
        try:
            error = _step_within_backward() or self._refuse_in_backward("step")
            return self._engine.step(optimizer, scaler, watch, error=error).report()
        finally:
            self._is_stepping = False

    @_disable_dynamo
    def start(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        scaler: GradScaler | None = None,
        *,
        watch: Watched | None = None,
    ) -> None:
        """Begin a step that `finish` ends. Call it when the last gradient is ready.

        The clipper measures the gradients and begins their all-reduce, which runs while the program does other work,
        such as computing metrics or loading the next batch. `step` is `start` followed by `finish`. With the inf-norm,
        `finish` makes one more all-reduce.

        Args:
            optimizer: the optimizer that is passed to `finish`. If it is given here, an error with it on any rank is
                raised on all ranks in this step. With None, `finish` checks it: a rank with an error raises there
                alone, and the others raise in the next step.
            scaler: the scaler that is passed to `finish`. It requires `optimizer`.
            watch: see `step`.

        Raises:
            ArgumentError: the last step was started and not finished; see also `step`. A rank with an error raises it
                here, and the others raise it in `finish`.
            DisagreementError: see `clip`.

        Collectives: one all-reduce, which is asynchronous over process groups and MPI. Any other communicator without a
            method `start_sum` runs it in a thread, see `distclip.comm.start_sum`.
        Host syncs: see `step`; none before `finish`.

        >>> from distclip import global_norm
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper, optimizer = GradClipper([weight], global_norm(1.0)), torch.optim.SGD([weight], lr=1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clipper.start(watch={"loss": 2.0})
        >>> clipper.finish(optimizer).as_dict()["loss"]
        2.0
        """
        self._count_graphs()
        self._engine.start(optimizer, scaler, watch)

    @_disable_dynamo
    def finish(self, optimizer: Optimizer | Iterable[Optimizer], scaler: GradScaler | None = None) -> Report:
        """Clip and step, or skip, by the norms that `start` has begun to measure.

        Between `start` and `finish`, no gradient may be written and no other method of the clipper may be called. A
        rank that raises between them continues with its next step. That step raises on all ranks, and the steps after
        it work.

        Args:
            optimizer, scaler: see `step`.

        Returns:
            The measurements and the decision, as device scalars.

        Raises:
            ArgumentError: no step was started; on every rank. A gradient was written since `start`; on those ranks
                only, where nothing changes. The others raise `DisagreementError` in the next step.
            LayoutError, PeerError, NonFiniteError, TooManySkippedSteps, DisagreementError: see `clip`.

        Collectives: see `clip`, except the all-reduce that `start` has begun. Host syncs: see `step`.
        """
        self._is_stepping = True
        try:
            return self._engine.finish(optimizer, scaler).report()
        finally:
            self._is_stepping = False

    def clip(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        scaler: GradScaler | None = None,
        *,
        only: Parameters | None = None,
        errors: FirstError | None = None,
        watch: Watched | None = None,
    ) -> Report:
        """Clip the gradients in place. Call it after backward on every rank, before your own optimizer step.

        A skipped step drops its gradients (`.grad = None`, `main_grad` becomes 0), so that an optimizer's step changes
        nothing and accumulation starts from 0. Until the next call, the steps of optimizers that are not torch's do
        nothing without gradients, because momentum or weight decay could move their parameters. `report.skipped` is
        true for such a step.

        Args:
            optimizer: the optimizer that `scaler` will step, or several. Not needed without a scaler.
            scaler: unscale in the same pass, unless `scaler.unscale_` already has, and give the scaler the found_inf of
                all ranks. The caller still calls `scaler.step(optimizer)` and `scaler.update()`.
            only: the subset of the clipper's parameters to measure and clip, in any form that `parameters` takes, the
                same on every rank. None for all.
            errors: errors that this rank has collected already. Every rank raises the first one.
            watch: see `step`.

        Returns:
            The measurements and the decision, as device scalars.

        Raises:
            ArgumentError: see `step`, with a scaler; a watched value that is not a scalar, or too many of them; on
                every rank.
            DisagreementError: the ranks make different calls, or watch different scalars; on every rank.
            LayoutError: the policy cannot clip a gradient; on every rank.
            PeerError: another rank failed with an exception that distclip does not define, or failed on an accelerator,
                where the other ranks may raise one step later.
            NonFiniteError, TooManySkippedSteps: see `on_nonfinite` and `max_skips`; on every rank, before anything
                changes.

        Collectives: one all-reduce of one float64 number per slot and a few more, see `clip_grad_norm_`. A gather in a
        non-finite step, and in the first call with a scaler. Another all-reduce in the first call with these names of
        watched scalars.
        Host syncs: one on an accelerator, unless `on_nonfinite="propagate"` and the policy never skips a step, which is
        what a CUDA graph needs; see `clip_grad_norm_`.
        """
        if is_tracing():
            reason = reason_against_clip(self._plan, self._reasons)
            if scaler is not None or only is not None or errors is not None:
                reason = "inside a graph it takes no scaler, only= and errors="
            if reason is None and self._plan is not None:
                return clip_in_graph(self._engine, self._plan, watch)
            leave_graph(f"GradClipper.clip: {reason}")
        return self._clip(optimizer, scaler, only, errors, watch)

    @_disable_dynamo
    def _clip(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        scaler: GradScaler | None,
        only: Parameters | None,
        errors: FirstError | None,
        watch: Watched | None,
    ) -> Report:
        self._count_graphs()
        errors, ids = errors or FirstError(), None
        errors.add(self._refuse_in_backward("clip"))
        if only is not None:
            with errors:
                ids = self._ids_of(only)
        return self._engine.clip(optimizer, scaler, errors, ids, watch).report()

    def discard(self) -> None:
        """Forget the last decision, because the step was not made.

        If the optimizer declines a step and the policy keeps its decision, the policy's state includes a norm that
        belongs to no update, and replicas drift apart. So call this after `clip` or `decide` if the step is not made.
        It restores the policy's state, the counters and the incidents to those before the call, and a recorder leaves
        the step out. The gradients stay clipped. Call it on every rank or on none.

        `step` and attached optimizers call it themselves if the optimizer is a wrapper that did not step its inner
        optimizer.

        Raises:
            ArgumentError: there was no decision since the last `discard`, `load_state_dict` or `rebind`.

        Collectives: none. Host syncs: none.

        >>> from distclip import ema
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> clipper = GradClipper([weight], ema())
        >>> before = clipper.state_dict()
        >>> weight.grad = torch.tensor([3.0])
        >>> report = clipper.clip()
        >>> clipper.discard()
        >>> clipper.steps, str(clipper.state_dict()) == str(before)
        (0, True)
        """
        self._engine.discard()

    def attach(self, *optimizers: Optimizer, watch: Callable[[], Watched] | None = None) -> RemovableHandle:
        """Clip within every `optimizer.step()`, or after the closure in every `optimizer.step(closure)`.

        Several optimizers that share a loss are clipped together, before the first of them steps. Optimizers that step
        in turn, each after its own backward pass, are clipped one by one: gradients that were clipped together with
        another optimizer's, and never stepped, are left out from the next turn on. If the clipper skips a step, the
        optimizer does not step, and its gradients are dropped, as in `clip`. With a GradScaler, use
        `clipper.step(optimizer, scaler)` instead, because the scaler would keep some ranks from calling
        `optimizer.step()`.

        Args:
            optimizers: the optimizers of the clipper's parameters. All ranks step them in the same order, and equally
                often.
            watch: returns the scalars to watch, see `step`. It is called before every clip, and after the closure.

        Returns:
            A handle; `handle.remove()` detaches.

        Raises:
            ArgumentError: no optimizer, or one that the clipper is attached to already; in a step: see `step`, a
                GradScaler, or a step within backward, when other gradients do not exist yet.

        Collectives and host syncs in a step: those of `clip`, for every evaluation of a closure. With several
        optimizers, two more small all-reduces per step, and two more host syncs on an accelerator.

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
        attached = set(map(id, self._turns.optimizers))
        if not optimizers or any(id(optimizer) in attached for optimizer in as_list(optimizers)):
            raise ArgumentError(
                f"attach{optimizers!r:.80}: no optimizer, or one that the clipper is attached to already, so that it "
                "would clip twice in a step. Call handle = clipper.attach(optimizer) once, and handle.remove() before "
                "the next call."
            )
        if (error := self._refuse_in_backward("attach")) is not None:
            raise error
        self._turns.add(optimizers)
        return _Attached(_Listener(self, watch), self._turns, optimizers)

    @torch.no_grad()
    def in_backward(self, optimizers: Any) -> InBackward:
        """Clip and step each parameter within backward, as soon as its gradient exists, and free the gradient.

        `loss.backward()` is the whole step from now on: leave out `optimizer.step()` and `zero_grad()`. At any moment
        only the gradients of one tensor (of one unit under FSDP2, of one bucket under DDP) are alive. The program may
        keep hooks that step the same optimizers: the clipper makes these steps for them.

        A gradient that is non-finite on any rank is dropped on all ranks, its parameter does not move, and a
        `NonFiniteWarning` names the parameter. The other parameters are stepped. `clipper.skipped` counts such steps.

        Args:
            optimizers: the optimizers of all of the clipper's parameters: one, several, or a mapping to optimizers, for
                example {param: torch.optim.AdamW([param])}. torch's optimizers step parameter by parameter, even if
                they have many. An optimizer of another library steps once all of its parameters have gradients.

        Returns:
            A handle: `handle.report` has the measurements of the last backward, `handle.accumulate()` is a context in
            which backward steps nothing, and `handle.remove()` detaches.

        Raises:
            ArgumentError: the policy needs all norms at once (use `budget` or `lagged`); an optimizer owns none of the
                clipper's parameters, or no optimizer owns one of them; on_nonfinite is "zero" or "propagate"; on every
                rank. Later, on one rank: `optimizer.step()` is called outside of backward while there are gradients.
            LayoutError: the ranks have different parameters (pipeline stages); FSDP1 or Megatron parameters; a partial
                gradient; on every rank. An error within a backward is raised at its end, when other parameters have
                already been stepped.
            NonFiniteError, TooManySkippedSteps: at the end of a backward, see `on_nonfinite` and `max_skips`.

        Collectives: two gathers. In a backward: one asynchronous all-reduce for each unit whose shards are on several
        ranks, while the next unit's backward runs, and one all-reduce at the end.
        Host syncs: one for each unit on an accelerator.

        >>> from distclip import budget
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = GradClipper([("weight", weight)], budget(1.0))
        >>> handle = clipper.in_backward(torch.optim.SGD([weight], lr=1.0))
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> weight.data, weight.grad
        (tensor([-0.6000, -0.8000]), None)
        >>> handle.report.as_dict()["norm"]
        5.0
        >>> handle.remove()
        """
        if self._turns.optimizers or self._is_in_backward:
            raise ArgumentError(
                "in_backward: the clipper is attached to optimizers already, so that it would clip twice. Call "
                "handle.remove() first."
            )
        self._in_backward = InBackward(self._engine, self.policy, optimizers)
        return self._in_backward

    @property
    def _is_in_backward(self) -> bool:
        return self._in_backward is not None and not self._in_backward.is_removed

    def _refuse_in_backward(self, function: str) -> ArgumentError | None:
        """Return the error for a call while the clipper steps within backward, or None."""
        if not self._is_in_backward:
            return None
        return ArgumentError(
            f"{function}: the clipper steps within backward since in_backward, which leaves no gradients to clip. "
            f"Leave out clipper.{function}, or call handle.remove() first."
        )

    @torch.no_grad()
    def measure_tensors(self) -> None:
        """Add the norm of every parameter's gradient to the reports from now on, with any policy.

        The norms come from the same all-reduce, which grows by one number per parameter. Gradients that share a storage
        are then read one by one. Call it on every rank.

        Collectives: one gather, unless the policy is per tensor or row.

        >>> from distclip import global_norm
        >>> weight, bias = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        >>> clipper = GradClipper([("weight", weight), ("bias", bias)], global_norm(1.0))
        >>> clipper.measure_tensors()
        >>> weight.grad, bias.grad = torch.tensor([3.0]), torch.tensor([4.0])
        >>> clipper.tensors, clipper.clip().tensor_norms
        (('weight', 'bias'), tensor([3., 4.], dtype=torch.float64))
        """
        self._engine.refuse_between("measure_tensors")
        if self._engine.tensor_norms is None:
            self._engine.measure_tensors()
            self._plan_graphs()

    @torch.no_grad()
    def measure_updates(self) -> None:
        """Compare gradients with Adam's second moments from now on, with any policy, in the same all-reduce.

        `Report.update_rms` has the root mean square of g / √v, see `update_clip`. It is NaN in a step whose optimizer
        is not known, such as `clip()` without one. Call it on every rank.

        Raises:
            ArgumentError: the policy is per row, has an inf-norm, or isolates groups; on every rank.

        Collectives: one all-reduce of the size of a step's. The all-reduce of a step grows by two numbers per slot.

        >>> from distclip import global_norm
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> clipper, optimizer = GradClipper([weight], global_norm(1e3)), torch.optim.AdamW([weight], betas=(0.9, 0.99))
        >>> clipper.measure_updates()
        >>> for size in (1.0, 1.0, 10.0):
        ...     weight.grad = torch.tensor([size])
        ...     print(round(float(clipper.step(optimizer).update_rms), 1))
        nan
        1.0
        1.7
        """
        self._engine.refuse_between("measure_updates")
        if self._groups is not None:
            raise ArgumentError(
                "measure_updates: groups with isolate=True are decided about alone. Use a clipper without isolate=True."
            )
        if self._engine.spec.moment_eps is None:
            self._engine.measure_updates()
            self._plan_graphs()

    def agree(self, function: str) -> None:
        """Check that every rank of the clipper calls the same function, before it communicates.

        Recorders and integrations call it first. Without it, a rank that calls the function alone would enter one
        collective, while the other ranks enter that of their next step.

        Args:
            function: name for the error message.

        Raises:
            DisagreementError: another rank calls a different function; on every rank.

        Collectives: one all-reduce of the size of a step's, none for a single rank. Host syncs: one on an accelerator.

        >>> from distclip import global_norm
        >>> GradClipper(torch.nn.Linear(2, 1), global_norm(1.0)).agree("save")
        """
        if self.comm.size > 1:
            self._engine.calls.agree(function, FirstError())

    def observe(self, observer: Observer, *, undo: Callable[[int], None] | None = None) -> None:
        """Call `observer(outcome)` at every step, on every rank.

        The call comes after the decision, and before any gradient is written. For recorders, see `distclip.monitor`.
        The observer must not raise. If it communicates, add it on all ranks.

        Args:
            observer: the function.
            undo: called with the number of the last completed step, if an exception ended a later step that was already
                observed. It may run on one rank only, so it must not communicate.
        """
        self._engine.observers.append(observer)
        if undo is not None:
            self._engine.undo_observers.append(undo)
        self._plan_graphs()

    def capturable(self) -> bool | list[str]:
        """Return True if a step can be captured in a graph, or the reasons why not.

        A graph of `torch.compile(fullgraph=True)` or of `make_fx` contains the whole call of `clip` or `step`: norms,
        one functional all-reduce, the policy and its state, the non-finite check, the skip and the counters. `step`
        needs a fused AdamW, Adam or SGD that has made one step. In a graph the ranks compare neither their calls nor
        replicas, there are no warnings, and `clip` sets the gradients of a skipped step to 0.

        Returns:
            True, or a list of reasons, each of which states what to change.

        Collectives: none. Host syncs: none.

        >>> from distclip import global_norm
        >>> GradClipper(torch.nn.Linear(2, 1), global_norm(1.0)).capturable()
        True
        >>> GradClipper(torch.nn.Linear(2, 1), global_norm(1.0), on_nonfinite="raise").capturable()
        ['on_nonfinite="raise" needs the host in the same step: use "skip" or "propagate"']
        """
        self._plan_graphs()
        return self._reasons or True

    @outside_fake_mode
    def _plan_graphs(self) -> None:
        """Prepare the graph of a step, and collect the reasons why a step cannot be captured."""
        self._count_graphs()
        self._plan = None
        self._reasons = ["isolated groups skip steps one by one, which the host decides"]
        if self._groups is not None:
            return
        try:
            self._plan = GraphPlan(self._engine)
            self._reasons = self._plan.reasons(self._engine)
        except DistclipError as error:
            # A step outside of a graph raises it on all ranks.
            self._reasons = [str(error)]

    def _count_graphs(self) -> None:
        """Count the steps that graphs have made."""
        if self._plan is None or not self._plan.has_run:
            return
        counter, (steps, skipped, in_a_row) = self._counter, self._plan.take_counts()
        counter.in_a_row = in_a_row + (counter.in_a_row if in_a_row == steps else 0)
        counter.steps, counter.skipped = counter.steps + steps, counter.skipped + skipped

    @_disable_dynamo
    def decide(
        self, loss_scale: float | None = None, errors: FirstError | None = None, *, watch: Watched | None = None
    ) -> Outcome:
        """Measure and decide, and leave it to the caller to `write_` the outcome or to skip the step.

        This is for integrations whose optimizers keep gradients elsewhere, see `distclip.extend`.

        Args:
            loss_scale: factor that the gradients carry. With a loss scale, a non-finite step is skipped without a
                warning, as with a GradScaler. None if they carry none.
            errors: errors that this rank has collected already. Every rank raises the first one.
            watch: see `step`.

        Returns:
            The outcome. `outcome.skip.read()` returns whether to skip the step, and `outcome.report()` is for the user.
            With isolate=True, `outcome.skip` is true only if all groups skip, and `skipped_parameters` returns the
            names of the parameters whose groups skip.

        Raises, Collectives, Host syncs: see `clip`.
        """
        scale = None if loss_scale is None else torch.tensor(loss_scale, dtype=torch.float64)
        return self._engine.decide(errors or FirstError(), scale, expect_overflow=scale is not None, watch=watch)

    def write_(self, outcome: Outcome, positions: Sequence[int], grads: Sequence[Tensor]) -> None:
        """Write an outcome into gradients, which may be stored elsewhere than those that were measured.

        Args:
            outcome: result of `decide` for a step that is not skipped.
            positions: index of each gradient's parameter among those of the clipper.
            grads: local gradients of the shape that was measured, of any floating dtype. Those of a group that skips
                the step, with isolate=True, become 0.

        Collectives: none. Host syncs: none.
        """
        self._engine.execution.write_(outcome, self._engine.table.shards_at(positions, grads))
        if outcome.skips is not None:
            skipped = set(self.skipped_parameters(outcome))
            for position, grad in zip(positions, grads, strict=True):
                if self._engine.table.names[position] in skipped:
                    grad.zero_()

    def skipped_parameters(self, outcome: Outcome) -> tuple[str, ...]:
        """Return the names of this rank's parameters that a step must leave as they are.

        An optimizer whose state contains earlier gradients would move them even by a gradient of 0.

        Args:
            outcome: outcome of `decide`.

        Collectives: none. Host syncs: one on an accelerator, unless the host has read whether to skip the step.

        >>> from distclip import global_norm
        >>> clipper = GradClipper([], global_norm(1.0), isolate=True)
        >>> alice, bob = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        >>> clipper.add_groups({"alice": [alice], "bob": [bob]})
        >>> alice.grad, bob.grad = torch.ones(1), torch.tensor([float("inf")])
        >>> clipper.skipped_parameters(clipper.decide(loss_scale=8.0))
        ('bob/parameters[0]',)
        """
        table, skipped = self._engine.table, self._engine.execution.skipped_ids(outcome)
        return tuple(name for name, tensor in zip(table.names, table.tensors, strict=True) if id(tensor) in skipped)

    @property
    def slots(self) -> tuple[str, ...]:
        """Slot names, in the order of `Report.norms`. With per="row", one name per row."""
        by_row, slots = self._engine.spec.per == "row", self._engine.slots
        pairs = zip(slots.names, slots.counts, strict=True)
        return tuple(f"{name}[{i}]" if by_row and n > 1 else name for name, n in pairs for i in range(n))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Parameter names, in the order of `Report.tensor_norms`. Empty without `measure_tensors`."""
        return () if self._engine.tensor_norms is None else self._engine.tensor_norms.names

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that this rank has, or has a shard of."""
        return tuple(self._engine.table.names)

    @property
    def table(self) -> ShardTable:
        """Parameters of this rank with their layouts."""
        return self._engine.table

    def pieces(self) -> Shards:
        """Return this rank's shards of the parameters themselves. Collectives: none. Host syncs: none."""
        return self._engine.table.weights()

    @property
    def measured_slots(self) -> int:
        """Number of norms in the all-reduce."""
        return self._engine.num_measured_slots

    @property
    def comm(self) -> Comm:
        """Communicator over all ranks that take part."""
        return self._engine.comm

    @property
    def step_comm(self) -> Comm:
        """Communicator of a step: `comm`, or this rank alone while DDP joins uneven inputs (`DDP.join`)."""
        return self._engine.step_comm

    @property
    def incidents(self) -> Sequence[Incident | ReplicaIncident]:
        """Non-finite steps, and steps whose replicas differed, with the culprits: the last hundred of each.

        They are the same on every rank. On an accelerator they may lack the last step (see `step`), until
        `state_dict()` brings them up to date.
        """
        return tuple(sorted((*self._engine.guard.log.incidents, *self._counter.incidents), key=lambda one: one.step))

    @property
    def steps(self) -> int:
        """Number of calls of `clip`, `step` and `decide` so far, including those in graphs."""
        self._count_graphs()
        return self._counter.steps

    @property
    def token(self) -> str:
        """Text that identifies this clipper among all clippers of the job, the same on every rank."""
        return self._engine.token

    @property
    def skipped(self) -> int:
        """Number of skipped steps, as far as the host has read them (see `step`)."""
        self._count_graphs()
        return self._counter.skipped

    def state_dict(self, group: str | None = None) -> dict[str, Any]:
        """Return the policy's state and the counters, the same on every rank.

        The state is keyed by parameter names, so that it can be loaded with another world size and another layout.
        Together with `load_state_dict` it makes the clipper a Stateful of torch.distributed.checkpoint.

        Args:
            group: with isolate=True, the name of the only group to save, whose state can be loaded into a group of any
                clipper. None for everything.

        Returns:
            {"version": int, "rule": kind of policy, "counts": {name: 0-d tensor}, "state": {slot name: {key: tensor}}}.

        Host syncs: one per tensor.
        """
        self._count_graphs()
        self._engine.deferred.raise_due()
        if group is not None:
            return group_state_dict(self._isolated("state_dict")[1], group)
        if self._groups is not None:
            engine = self._isolated("state_dict")[1]
            return {
                "version": VERSION,
                "rule": policy_kind(self.policy),
                "counts": {name: torch.tensor(count) for name, count in self._counts().items()},
                "groups": {name: group_state_dict(engine, name) for name in engine.counters.names},
            }
        return {
            "version": VERSION,
            "rule": policy_kind(self.policy),
            "counts": {name: torch.tensor(count) for name, count in self._counts().items()},
            "state": pack_state(self._engine.state, self._engine.slots),
        }

    def load_state_dict(self, state_dict: dict[str, Any], group: str | None = None) -> None:
        """Continue from the saved state of a clipper with the same kind of policy.

        Args:
            state_dict: result of `state_dict`. The policy's numbers may have changed, except for its windows.
            group: with isolate=True, the name of the group into which to load the state of one group.

        Raises:
            ArgumentError: another kind of policy or another window; an unknown or missing key; a tensor of another
                shape or dtype; a value that no step of the policy can produce, such as NaN. Nothing is loaded in that
                case.
        """
        self._engine.refuse_between("load_state_dict")
        self._count_graphs()
        if self._groups is not None or group is not None:
            counts = load_groups(self._isolated("load_state_dict")[1], state_dict, group, self._counts().keys())
            self._counter.steps = counts.get("steps", self._counter.steps)
            self._counter.skipped = counts.get("skipped", self._counter.skipped)
            self._counter.in_a_row = counts.get("in_a_row", self._counter.in_a_row)
            self._engine.forget_undo()
            return
        current = upgrade(state_dict)
        check_state_dict(current, self.policy)
        self._engine.deferred.raise_due()
        state = unpack_state(self._engine.state, self._engine.slots, current["state"], self._engine.policy)
        counts = unpack_counts(current["counts"], self._counts().keys())
        self._engine.state = state
        self._counter.steps, self._counter.skipped = counts["steps"], counts["skipped"]
        self._counter.in_a_row = counts["in_a_row"]
        clip_rate = self._engine.deferred.clip_rate
        clip_rate.restarts = counts["restarts"]
        clip_rate.exploded = int(state["exploded_warmups"].sum()) if "exploded_warmups" in state else 0
        self._engine.forget_undo()

    def _counts(self) -> dict[str, int]:
        counter = self._counter
        return {
            "steps": counter.steps,
            "skipped": counter.skipped,
            "in_a_row": counter.in_a_row,
            "restarts": self._engine.deferred.clip_rate.restarts,
        }

    def _ids_of(self, only: Parameters) -> frozenset[int]:
        """Return the ids of some of the clipper's parameters.

        Raises:
            ArgumentError: one of them is not the clipper's.
        """
        known = set(map(id, self._engine.table.tensors))
        named = name_tensors(only, "only")
        if foreign := [name for name, tensor in named if id(tensor) not in known]:
            raise ArgumentError(
                f"only: {foreign[0]} is not a parameter of the clipper. Pass some of the parameters that it was "
                "constructed with."
            )
        return frozenset(id(tensor) for _, tensor in named)

    def _clip_before_step(self, optimizer: Optimizer, watch: Callable[[], Watched] | None) -> bool:
        """Clip before an attached optimizer steps, and return whether to skip its step."""
        engine, turns, errors = self._engine, self._turns, FirstError()
        watched: Watched | None = None
        with errors:
            watched = None if watch is None else watch()
        with errors:
            if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
                raise ArgumentError(
                    "attach: a GradScaler steps the optimizer of an attached clipper. Call clipper.step(optimizer, "
                    "scaler) instead."
                )
            if torch._C._current_graph_task_id() != -1:
                raise ArgumentError(
                    "attach: the optimizer of an attached clipper steps within backward, before the norm of all "
                    "gradients can be known. Call clipper.in_backward(optimizers) with the policy distclip.budget or "
                    "distclip.lagged instead, or step after backward."
                )
            engine.coverage.check_attached(turns.optimizers)
        chosen: list[Optimizer] | None = turns.optimizers
        only = None
        if len(turns.optimizers) > 1:
            comm = engine.step_comm
            if comm.size > 1:
                engine.calls.agree(f"GradClipper.attach, step of optimizer {turns.index(optimizer)}", errors)
            elif errors.error is not None:
                raise errors.error
            chosen = turns.to_clip(optimizer, comm)
            if chosen is None:
                return turns.was_skipped(optimizer)
            only = frozenset(map(id, parameters_of(chosen)))
        if turns.end_decision() and engine.can_discard:
            self.discard()
        skipped = bool(engine.clip(chosen, None, errors, only, watched).skip.host)
        if len(turns.optimizers) > 1:
            turns.record(chosen or [], skipped=skipped)
        if not skipped:
            turns.begin_decision(chosen or [])
        return skipped


def _step_within_backward() -> ArgumentError | None:
    """Return the error for a step in a hook of backward, when other gradients do not exist yet, or None."""
    # Callbacks at the end of a backward belong to no node, and may step.
    if torch._C._current_graph_task_id() == -1 or torch._C._current_autograd_node() is None:
        return None
    return ArgumentError(
        "step: it was called in a hook within backward, before the norm of all gradients can be known. Call "
        "clipper.in_backward(optimizers) with the policy distclip.budget or distclip.lagged instead, or step after "
        "backward."
    )


class _Listener:
    """Clips before the steps of attached optimizers.

    Args:
        clipper: the clipper.
        watch: returns the scalars to watch. None for none.
    """

    def __init__(self, clipper: GradClipper, watch: Callable[[], Watched] | None = None) -> None:
        self._clipper, self._watch = clipper, watch
        self._watched: list[Tensor | None] | None = None
        self._steps: StepWatch | None = None

    def before_step(self, optimizer: Optimizer) -> bool:
        """Clip, and return whether to cancel the step."""
        if self._clipper._is_stepping:
            return False
        self._stop()
        skipped = self._clipper._clip_before_step(optimizer, self._watch)
        if not skipped:
            self._watched = self._clipper._engine.coverage.watch([optimizer])
            self._steps = watch_steps([optimizer])
        return skipped

    def after_step(self, optimizer: Optimizer) -> None:
        """Warn if the optimizer has stepped with other gradients than the clipped ones."""
        self._clipper._engine.coverage.check_kept(self._watched, [optimizer])
        declined = self._steps is not None and self._steps.all_declined()
        if self._clipper._turns.end_step(optimizer, declined=declined):
            # All ranks have made the same decision, and all their optimizers have declined the step.
            self._clipper.discard()
        self._stop()

    def mark(self) -> Any:
        """Return the state of the clipper before a step."""
        return self._clipper._engine.trace()

    def undo(self, mark: Any) -> None:
        """Restore the state from before a step that an error has ended."""
        self._stop()
        self._clipper._engine.restore(mark)

    def _stop(self) -> None:
        if self._steps is not None:
            self._steps.stop()
        self._watched = self._steps = None


class _Attached(RemovableHandle):
    """Handle of an attached clipper, for all optimizers of one call.

    Args:
        listener: clips.
        turns: all optimizers of the clipper.
        optimizers: those of the call.
    """

    def __init__(self, listener: _Listener, turns: Turns, optimizers: Sequence[Optimizer]) -> None:
        self._listener, self._turns = listener, turns
        self._gates = [gate_of(optimizer) for optimizer in optimizers]
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        for gate in self._gates:
            gate.listeners.append(listener)

    def remove(self) -> None:
        """Detach the clipper."""
        for gate in self._gates:
            gate.listeners.remove(self._listener)
        self._gates = []
        self._turns.remove([one for reference in self._optimizers if (one := reference()) is not None])
