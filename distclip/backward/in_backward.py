"""Clip, step and free each gradient within backward, as soon as it exists.

A hook runs when a gradient is complete. Once all gradients of its unit exist, the unit is measured, its norm is summed
over ranks if necessary, the policy gives a coefficient, and the optimizer steps. Only the sum of the next unit waits
for that of the previous one. After the last gradient, one more all-reduce carries the errors of all ranks, and the
norms of the gradients that came too late for their unit.

Ranks must enter the same sums in the same order, even if some rank has no gradient for a unit. So in each backward,
each rank sends one message for each of its units, in the order of its hooks. A message names its unit. If ranks send
messages of different units at the same time, all of them detect it, and keep the gradients of these and all later
messages until the end of the backward.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..apply.grad_scaler import parameters_of
from ..apply.scale import scale_
from ..apply.step_gate import gate_of
from ..comm import start_sum
from ..comm.consensus import FirstError, gather_or_raise
from ..engine import Engine
from ..errors import ArgumentError, LayoutError, NonFiniteError
from ..nonfinite.culprits import Culprit, describe_culprits, gather_culprits
from ..outcome import Outcome, Report
from ..policies.description import describe
from ..policies.policy import Allocation, BackwardPolicy
from ..sharding.fsdp1 import is_flattened
from ..sharding.fsdp2 import before_reduction, param_groups
from ..sharding.megatron import read_main_grad
from ..sharding.shard import Shards
from .owners import Owners
from .units import Unit, Units

__all__ = ["InBackward"]

_FUNCTION = "GradClipper.in_backward"

_FUNCTIONS = torch.autograd.function.__file__
"""File of torch's functions whose backward is written in Python."""


@dataclass(eq=False)
class _Message:
    """Norms of a unit whose sum over ranks has started."""

    unit: Unit | None
    local: dict[int, float]
    numbers: Tensor
    is_complete: Callable[[], bool]
    wait: Callable[[], None]


class _Backward:
    """Norms, coefficients and gradients of one backward so far.

    Args:
        allocation: gives coefficients.
        num_slots: number of measured slots.
    """

    def __init__(self, allocation: Allocation, num_slots: int) -> None:
        self.allocation = allocation
        self.errors = FirstError()
        self.powers, self.kept = [0.0] * num_slots, [0.0] * num_slots
        # Ids of parameters whose gradients have arrived, and gradients that have not been stepped.
        self.fired: set[int] = set()
        self.held: dict[int, Tensor] = {}
        self.counts: dict[Unit, int] = {}
        self.pending: deque[_Message] = deque()
        self.num_sent = 0
        self.is_out_of_order = False
        # Each entry is a gradient that is not finite on this rank: (name, 1 if NaN, 1 if Inf).
        self.culprits: list[tuple[str, int, int]] = []
        self.tasks: set[int] = set()


class InBackward:
    """Clips, steps and frees gradients within backward. Use `GradClipper.in_backward`.

    Args:
        engine: engine of the clipper.
        policy: policy of the clipper.
        optimizers: see `GradClipper.in_backward`.
    """

    def __init__(self, engine: Engine, policy: Any, optimizers: Any) -> None:
        errors = FirstError(engine.table.error)
        modules: list[DistributedDataParallel] = []
        with errors:
            self._policy = _check_policy(policy)
            _check_engine(engine)
            self._owners = Owners(optimizers)
            self._check_owned(engine)
            modules = _ddp_modules(engine.table.tensors)
        engine.calls.agree(_FUNCTION, errors)
        if engine.tensor_norms is None:
            engine.measure_tensors()
        averaged = frozenset(id(param) for module in modules for param in _managed(module))
        self._engine, self._comm = engine, engine.comm
        self._units = Units(engine.table, engine.comm, averaged)
        described = self._units.describe()
        gathered = gather_or_raise(engine.comm, errors.error, described)
        self._units.build([units for units, _ in gathered])
        self._sizes = [0] * engine.num_measured_slots
        for _, sizes in gathered:
            for slot, size in sizes.items():
                self._sizes[slot] = max(self._sizes[slot], size)
        tensor_norms = engine.tensor_norms
        assert tensor_norms is not None
        index = tensor_norms.policy_slots
        self._parents: Sequence[int] = range(engine.num_measured_slots) if index is None else index.slots
        excluded = engine.slots.excluded
        self._excluded = frozenset(i for i, slot in enumerate(self._parents) if excluded[slot : slot + 1] == (True,))
        self._backward: _Backward | None = None
        self._last_task = -1
        self._is_accumulating = self._is_stepping = False
        self._outcome: Outcome | None = None
        self._handles: list[Any] = []
        self._gates = [gate_of(optimizer) for optimizer in self._owners.optimizers]
        for gate in self._gates:
            gate.listeners.append(self)
        for tensor in engine.table.tensors:
            if tensor.requires_grad and id(tensor) not in averaged:
                self._handles.append(tensor.register_post_accumulate_grad_hook(self._on_gradient))  # type: ignore[no-untyped-call]
        self._averaged, self._is_removed = averaged, False
        groups = param_groups({id(tensor) for tensor in engine.table.tensors if tensor.requires_grad})
        self._undo = [before_reduction(group, self._before_reduction) for group in groups]
        for module in modules:
            _register_comm_hook(module, partial(self._on_bucket, weakref.ref(module)))

    @property
    def report(self) -> Report | Any:
        """Measurements of the last backward that stepped, see `Report`. None before the first one."""
        return None if self._outcome is None else self._outcome.report()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Accumulate the gradients of backward passes within the block, and make no step.

        The next backward after the block clips and steps the sum. FSDP2 and DDP have switches of this kind too,
        `set_requires_gradient_sync` and `no_sync`, which work without this one.
        """
        before, self._is_accumulating = self._is_accumulating, True
        try:
            yield
        finally:
            self._is_accumulating = before

    def remove(self) -> None:
        """Stop stepping within backward. The caller steps the optimizers again."""
        for handle in self._handles:
            handle.remove()
        for gate in self._gates:
            gate.listeners.remove(self)
        for undo in self._undo:
            undo()
        self._handles, self._gates, self._undo, self._is_removed = [], [], [], True

    @property
    def is_removed(self) -> bool:
        """True after `remove`."""
        return self._is_removed

    # ---- Steps of the caller ----

    def before_step(self, optimizer: Optimizer) -> bool:
        """Cancel a step that the caller's hooks start, because this object makes it."""
        if self._is_stepping:
            return False
        with_grad = [p for p in parameters_of([optimizer]) if p.grad is not None and self._owners.has(p)]
        if torch._C._current_graph_task_id() == -1:
            if with_grad and not self._is_accumulating:
                raise ArgumentError(
                    "optimizer: step() was called outside of backward with gradients, and the clipper steps within "
                    "backward, so that these would move unclipped. Leave out optimizer.step(), or call handle.remove()."
                )
            return False
        if not self._is_accumulating and any(id(param) in self._averaged for param in with_grad):
            raise ArgumentError(
                "optimizer: hooks of the program step it before DDP has averaged its gradients. Remove these hooks: "
                "clipper.in_backward steps it after that."
            )
        for param in with_grad:
            self._on_gradient(param)
        return True

    def mark(self) -> None:
        """Return nothing, because `undo` needs nothing."""

    def undo(self, mark: Any) -> None:
        """Leave everything as it is: a parameter that has been stepped stays so."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Leave everything as it is."""

    # ---- Gradients ----

    @torch.no_grad()
    def _on_gradient(self, param: Tensor) -> None:
        """Take the gradient of a parameter, and step its unit if the gradient is the last one of the unit."""
        if self._is_accumulating or param.grad is None:
            return
        backward = self._enter()
        with backward.errors:
            self._take(backward, param)
            unit = self._units.by_param[id(param)]
            backward.counts[unit] = backward.counts.get(unit, 0) + 1
            if backward.counts[unit] == len(unit.params):
                self._send(backward, unit)
        if len(backward.fired) == self._num_training and _is_nested():
            # The graph around this one may have no hook that could mark the end of the backward.
            self._end(backward)

    @torch.no_grad()
    def _on_bucket(self, reference: Any, _: object, bucket: Any) -> torch.futures.Future[Tensor]:
        """Average, clip and step the gradients of a DDP bucket, as DDP's communication hook."""
        module: DistributedDataParallel = reference()
        buffer: Tensor = bucket.buffer()
        buffer.div_(module.process_group.size())
        work: Any = torch.distributed.all_reduce(buffer, group=module.process_group, async_op=True)
        future: torch.futures.Future[Any] = work.get_future()
        if self._is_removed or self._is_accumulating:
            return future.then(lambda done: done.value()[0])
        backward = self._enter()
        with backward.errors:
            work.wait()
            params = [param for param in bucket.parameters() if self._units.has(param)]
            grads = {id(p): g for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)}
            for param in params:
                param.grad = grads[id(param)]
                self._take(backward, param)
            unit = self._units.bucket(params)
            self._decide(backward, unit, *self._measure(backward, unit))
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done

    @property
    def _num_training(self) -> int:
        return len(self._units.by_param) + len(self._averaged)

    def _enter(self) -> _Backward:
        """Return the backward that runs now, and register a callback for its end."""
        task = torch._C._current_graph_task_id()
        if self._backward is not None and (task == self._last_task or task in self._backward.tasks):
            return self._backward
        if self._backward is not None and task > self._last_task and not _is_nested():
            # A new backward has begun, and the last one has not been ended: either an exception has stopped it, or all
            # of its hooks ran in graphs within it.
            if self._backward.tasks:
                self._abandon(self._backward)
            else:
                self._end(self._backward)
        if self._backward is None:
            engine = self._engine
            allocation = self._policy.allocate(engine.state, self._sizes, self._parents)
            self._backward = _Backward(allocation, engine.num_measured_slots)
        self._last_task = max(self._last_task, task)
        self._backward.tasks.add(task)
        Variable._execution_engine.queue_callback(partial(self._on_end, self._backward, task, self._needs_two_stages))
        return self._backward

    @property
    def _needs_two_stages(self) -> bool:
        # DDP writes its buckets to the gradients in a callback that runs after the first one.
        return bool(self._averaged)

    def _on_end(self, backward: _Backward, task: int, again: bool) -> None:
        """End the backward, unless its graph is only a part of another one, as that of a checkpoint is."""
        if again:
            Variable._execution_engine.queue_callback(partial(self._on_end, backward, task, False))
            return
        backward.tasks.discard(task)
        if backward is not self._backward:
            return
        if _is_nested():
            with backward.errors, torch.no_grad():
                self._receive(backward, wait=True)
            return
        self._end(backward)

    def _take(self, backward: _Backward, param: Tensor) -> None:
        grad, param.grad = param.grad, None
        assert grad is not None
        if id(param) in backward.fired:
            raise LayoutError(
                f"in_backward: a parameter of shape {tuple(param.shape)} got its gradient in two parts within one "
                "backward, because several checkpoints with use_reentrant=True use it. Pass use_reentrant=False."
            )
        backward.fired.add(id(param))
        backward.held[id(param)] = grad

    def _measure(self, backward: _Backward, unit: Unit) -> tuple[Shards, dict[int, float]]:
        """Measure the gradients of a unit that this rank holds."""
        held = [param for param in unit.params if id(param) in backward.held]
        for param in held:
            param.grad = backward.held[id(param)]
        try:
            shards, powers = unit.measure()
        finally:
            for param in held:
                # The measurement replaces a gradient that shares memory by a copy.
                if param.grad is not None:
                    backward.held[id(param)] = param.grad
                param.grad = None
        for info in shards.infos:
            if not _is_finite(powers[info.slot]):
                is_nan = powers[info.slot] != powers[info.slot]
                backward.culprits.append((info.name, int(is_nan), int(not is_nan)))
        return shards, powers

    def _send(self, backward: _Backward, unit: Unit) -> None:
        """Measure a unit, and step it or start to sum its norms over ranks."""
        self._receive(backward, wait=unit.is_managed)
        local: dict[int, float] = {}
        if unit.needs_sum and backward.errors.error is not None:
            # The other ranks wait for the message of a rank that has failed.
            self._begin(backward, unit, local)
            return
        failed = FirstError()
        with failed:
            shards, local = self._measure(backward, unit)
            if not unit.needs_sum:
                self._decide(backward, unit, shards, local)
        backward.errors.add(failed.error)
        if unit.needs_sum:
            self._begin(backward, unit, local)

    def _begin(self, backward: _Backward, unit: Unit | None, local: dict[int, float]) -> None:
        numbers = self._units.message(unit, local)
        backward.num_sent += 1
        backward.pending.append(_Message(unit, local, numbers, *start_sum(self._comm, numbers)))

    def _receive(self, backward: _Backward, *, wait: bool) -> None:
        """Step the units whose norms have been summed.

        Args:
            backward: the backward pass that runs.
            wait: whether to wait for all messages that have been sent. Otherwise this rank must not wait: another rank
                that has no gradient for a unit may be waiting for this rank in a collective of the model.
        """
        while backward.pending and (wait or backward.pending[0].is_complete()):
            message = backward.pending.popleft()
            message.wait()
            numbers = message.numbers.tolist()
            backward.is_out_of_order |= numbers[-1] != 0
            if message.unit is None or backward.is_out_of_order:
                continue
            powers = dict(zip(message.unit.slots, numbers, strict=False))
            if backward.errors.error is None:
                with backward.errors:
                    shards = self._read(backward, message.unit)
                    self._decide(backward, message.unit, shards, powers)

    @torch.no_grad()
    def _before_reduction(self) -> None:
        """Step the previous unit, so that its shards are free when FSDP2 makes those of the next one.

        The sum of its norms could overlap with the backward of the next unit.
        """
        backward = self._backward
        if backward is None or torch._C._current_graph_task_id() not in backward.tasks:
            return
        # If a pending unit is not managed, a rank without a gradient for it may be waiting for this rank in the
        # reduction.
        if all(message.unit is not None and message.unit.is_managed for message in backward.pending):
            with backward.errors:
                self._receive(backward, wait=True)

    def _read(self, backward: _Backward, unit: Unit) -> Shards:
        """Return the gradients of a unit that was measured before."""
        held = [param for param in unit.params if id(param) in backward.held]
        for param in held:
            param.grad = backward.held[id(param)]
        shards = unit.table.gradients()
        for param in held:
            param.grad = None
        return shards

    def _decide(self, backward: _Backward, unit: Unit, shards: Shards, powers: dict[int, float]) -> None:
        """Clip and step a unit whose norms are known."""
        coefs = self._coefficients(backward, unit.slots, powers)
        self._apply(backward, unit.params, shards, coefs)

    def _coefficients(
        self, backward: _Backward, slots: Iterable[int], powers: dict[int, float]
    ) -> dict[int, float | None]:
        """Return the coefficient of each slot, None for a gradient that is not finite."""
        coefs: dict[int, float | None] = {}
        for slot in slots:
            power = powers.get(slot, 0.0)
            backward.powers[slot] += power
            if not _is_finite(power):
                # Its part of the budget remains for the other gradients.
                backward.allocation.take(slot, 0.0)
                coefs[slot] = None
                continue
            coef = 1.0 if slot in self._excluded else backward.allocation.take(slot, power)
            backward.kept[slot] += coef * coef * power
            coefs[slot] = coef
        return coefs

    def _apply(
        self, backward: _Backward, params: Sequence[Tensor], shards: Shards, coefs: dict[int, float | None]
    ) -> None:
        """Scale gradients, step their parameters, and free the gradients."""
        held = [param for param in params if id(param) in backward.held]
        for param in held:
            param.grad = backward.held.pop(id(param))
        # The shards are in the order of the parameters with a gradient.
        by_param = {id(p): shard for p, shard in zip(held, shards, strict=True)} if len(held) == len(shards) else {}
        for param in held:
            shard = by_param[id(param)]
            coef = coefs[shard.slot]
            if coef is None:
                param.grad = None
            elif coef != 1.0:
                factor = torch.tensor([coef], dtype=torch.float64)
                scale_(Shards.of([replace(shard, slot=0)]), factor.to(shard.grad.device))
        self._is_stepping = True
        try:
            self._owners.step(held)
        finally:
            self._is_stepping = False

    # ---- The end of a backward ----

    @torch.no_grad()
    def _end(self, backward: _Backward) -> None:
        """Step late gradients, share the errors of all ranks, and update the policy."""
        engine = self._engine
        self._backward, errors = None, backward.errors
        step = engine.counter.steps + 1
        with errors:
            self._receive(backward, wait=True)
        # Every rank sends one message for each unit, even if it has no gradients for some.
        while self._comm.size > 1 and backward.num_sent < len(self._units.all):
            self._begin(backward, None, {})
        with errors:
            self._receive(backward, wait=True)
        late: list[tuple[Unit, Shards]] = []
        powers = torch.zeros(engine.num_measured_slots, dtype=torch.float64)
        with errors:
            for unit in self._units.all:
                if any(id(param) in backward.held for param in unit.params):
                    shards, local = self._measure(backward, unit)
                    late.append((unit, shards))
                    for slot, power in local.items():
                        powers[slot] += power
        for param in self._owners.params():
            # DDP has written its buckets to the gradients again.
            if id(param) in self._averaged:
                param.grad = None
        try:
            totals = engine.calls.add_powers(_FUNCTION, powers, errors)
        except BaseException:
            self._abandon(backward)
            raise
        # All ranks clip all of these, because the allocation must stay equal on all ranks.
        sums = dict(enumerate(totals.powers.tolist()))
        coefs = self._coefficients(backward, [i for i in reversed(range(len(sums))) if sums[i] != 0], sums)
        failed = FirstError()
        with failed:
            for unit, shards in late:
                self._apply(backward, unit.params, shards, coefs)
            self._is_stepping = True
            self._owners.finish()
        self._is_stepping = False
        engine.counter.steps = step
        measured = replace(totals, powers=torch.tensor(backward.powers, dtype=torch.float64))
        kept = torch.tensor(backward.kept, dtype=torch.float64)
        self._outcome = engine.conclude(step, measured, kept)
        if failed.error is not None:
            raise failed.error
        self._count(step, backward)

    def _count(self, step: int, backward: _Backward) -> None:
        engine = self._engine
        if all(map(_is_finite, backward.powers)):
            engine.counter.record_update()
            return
        culprits = gather_culprits(backward.culprits, self._comm)
        if engine.on_nonfinite == "raise":
            _refuse(step, culprits)
        engine.counter.record_skipped_tensors(step, culprits)

    def _abandon(self, backward: _Backward) -> None:
        """Drop a backward that an error has ended, and its gradients."""
        backward.held.clear()
        self._owners.forget()
        self._backward = None

    def _check_owned(self, engine: Engine) -> None:
        """Raise unless the optimizers step the clipper's parameters.

        Raises:
            ArgumentError: see above.
        """
        own = {id(tensor) for tensor in engine.table.tensors}
        for optimizer in self._owners.optimizers:
            if not any(id(param) in own for param in parameters_of([optimizer])):
                raise ArgumentError(
                    f"optimizers: {type(optimizer).__name__} steps none of the clipper's parameters. Construct the "
                    "clipper with the parameters that are stepped, or leave this optimizer out."
                )
        foreign = [param for param in self._owners.params() if id(param) not in own]
        if foreign and not engine.coverage.partial:
            raise ArgumentError(
                f"optimizers: they step {len(foreign)} parameters that the clipper does not have, the first of shape "
                f"{tuple(foreign[0].shape)}. Construct the clipper with all of them, or with partial=True."
            )
        pairs = zip(engine.table.names, engine.table.tensors, strict=True)
        missing = [name for name, tensor in pairs if tensor.requires_grad and not self._owners.has(tensor)]
        if missing:
            raise ArgumentError(
                f"optimizers: none of them steps {', '.join(missing[:3])}{' …' * (len(missing) > 3)}. Pass all "
                "optimizers: clipper.in_backward([one, other]), or construct the clipper without these parameters."
            )


def _is_finite(power: float) -> bool:
    """Return whether a squared norm is neither NaN nor Inf."""
    return power - power == 0


def _check_policy(policy: Any) -> BackwardPolicy:
    """Return the policy if it can clip within backward.

    Raises:
        ArgumentError: it cannot.
    """
    if not isinstance(policy, BackwardPolicy):
        raise ArgumentError(
            f"policy={describe(policy)}: it needs the norms of all gradients, and within backward they do not exist "
            "yet. Use distclip.budget(max_norm), or distclip.lagged(policy, budget=max_norm)."
        )
    spec = policy.spec
    if not spec.has_only_tensor_norms:
        raise ArgumentError(
            f"policy={describe(policy)}: in_backward measures Euclidean norms of tensors, and the policy needs others. "
            "Use distclip.budget(max_norm)."
        )
    return policy


def _check_engine(engine: Engine) -> None:
    """Raise if a clipper cannot step within backward, because of its options or parameters.

    Raises:
        ArgumentError, LayoutError: see above.
    """
    if engine.on_nonfinite not in ("skip", "raise"):
        raise ArgumentError(
            f"on_nonfinite={engine.on_nonfinite!r}: in_backward skips the parameters whose gradients are not finite. "
            'Use on_nonfinite="skip", or "raise".'
        )
    if engine.table.flat_grads:
        raise ArgumentError("flat_grads=True: it keeps all gradients, and in_backward frees them. Leave it out.")
    for name, tensor in zip(engine.table.names, engine.table.tensors, strict=True):
        if is_flattened(tensor) or read_main_grad(tensor) is not None:
            raise LayoutError(
                f"{name} is a parameter of FSDP1 or of Megatron, whose gradient is not complete in the hooks of a "
                "backward. Use fully_shard (FSDP2), or clipper.step(optimizer)."
            )


def _refuse(step: int, culprits: tuple[Culprit, ...]) -> NoReturn:
    raise NonFiniteError(
        f"step {step}: {describe_culprits(culprits)}. These parameters were not stepped, the others were. Use "
        'on_nonfinite="skip" to go on.'
    )


def _ddp_modules(tensors: Sequence[Tensor]) -> list[DistributedDataParallel]:
    """Return the DDP modules that manage some of the tensors."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    ids = set(map(id, tensors))
    # The caller may have passed parameters, which do not show that DDP averages their gradients.
    found = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    return [module for module in found if any(id(param) in ids for param in _managed(module))]


def _managed(module: DistributedDataParallel) -> list[Tensor]:
    ignored = module.parameters_to_ignore
    named = module.module.named_parameters()
    return [param for name, param in named if name not in ignored and param.requires_grad]


def _register_comm_hook(module: DistributedDataParallel, hook: Callable[..., Any]) -> None:
    """Register a communication hook of DDP.

    Raises:
        ArgumentError: DDP has one already.
    """

    def distclip_in_backward(state: object, bucket: Any) -> torch.futures.Future[Tensor]:
        done: torch.futures.Future[Tensor] = hook(state, bucket)
        return done

    # DDP checks these annotations.
    distclip_in_backward.__annotations__ = {
        "bucket": torch._C._distributed_c10d.GradBucket,
        "return": torch.futures.Future[torch.Tensor],
    }
    try:
        module.register_comm_hook(None, distclip_in_backward)
    except RuntimeError as error:
        raise ArgumentError(
            f"DistributedDataParallel: it has a communication hook already ({error!s:.100}), and in_backward needs one "
            "to step after the average. Leave out register_comm_hook."
        ) from None


def _is_nested() -> bool:
    """Return whether the graph that runs now is a part of another one: checkpoint(use_reentrant=True)."""
    frame: FrameType | None = sys._getframe(1)
    in_graph = False
    while frame is not None:
        code = frame.f_code
        if code.co_name == "_engine_run_backward":
            in_graph = True
        elif in_graph and code.co_name == "apply" and code.co_filename == _FUNCTIONS:
            # This is a function of the outer graph, and the inner graph runs in its backward.
            return True
        frame = frame.f_back
    return False
