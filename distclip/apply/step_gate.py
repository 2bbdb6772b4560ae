"""Run functions before every step of an optimizer, once its gradients exist, and cancel steps.

torch calls the hooks of a step before the closure makes the gradients, and a hook cannot prevent the step. So a gate
wraps the closure, and replaces `optimizer.step` by a function that catches a cancelled step.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import NonFiniteError
from ..sharding.megatron import read_main_grad
from .grad_scaler import parameters_of

__all__ = [
    "StepGate",
    "StepListener",
    "closure_in",
    "gate_of",
    "hold_still",
    "is_of_torch",
    "release",
    "undone_on_error",
]

T = TypeVar("T")


class undone_on_error(Generic[T]):
    """Undo what a step within the block has changed, if an exception ends it.

    Args:
        undo: function that undoes the changes.
        before: argument of `undo`, and value of the `with` block.
        others: classes of exceptions that undo nothing.
    """

    __slots__ = ("_before", "_kept", "_undo")

    def __init__(self, undo: Callable[[T], None], before: T, *others: type[BaseException]) -> None:
        self._undo, self._before = undo, before
        # A step that a decision refuses or skips stays counted.
        self._kept: tuple[type[BaseException], ...] = (NonFiniteError, *others)

    def __enter__(self) -> T:
        return self._before

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and not isinstance(error, self._kept):
            self._undo(self._before)


class StepListener(Protocol):
    """Decides about the steps of optimizers."""

    def before_step(self, optimizer: Optimizer) -> bool:
        """Clip, and return whether to cancel the step. It is called when the gradients of the step exist."""
        ...

    def mark(self) -> Any:
        """Return the state that `undo` needs to forget everything that follows."""
        ...

    def undo(self, mark: Any) -> None:
        """Forget what has happened since `mark`, because an error has ended the step."""
        ...

    def after_step(self, optimizer: Optimizer) -> None:
        """Check a step that was made."""
        ...


Marks: TypeAlias = "list[tuple[StepListener, Any]]"
"""Listeners, each with the mark that it has returned."""


def _undo(marks: Marks) -> None:
    for listener, mark in marks:
        listener.undo(mark)


class _CancelledStep(BaseException):
    """Unwinds a step up to its gate. Not an Exception, so that no closure catches it."""

    def __init__(self, gate: StepGate, loss: Any) -> None:
        self.gate, self.loss = gate, loss


class StepGate:
    """Calls listeners in the steps of one optimizer. Use `gate_of`.

    Args:
        optimizer: the optimizer. No strong reference is kept.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.listeners: list[StepListener] = []
        self._depth = 0
        self._has_run = False
        self._install(optimizer)

    def _install(self, optimizer: Optimizer) -> None:
        """Replace `optimizer.step`, and register a hook for calls that bypass it."""
        reference = weakref.ref(optimizer)
        # A learning rate scheduler may have replaced `step` by a function that counts steps. None stands for the method
        # of the class.
        previous = vars(optimizer).get("step")
        has_hooks = "_optimizer_step_pre_hooks" in vars(optimizer)

        @wraps(type(optimizer).step)
        def step_of(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            call = partial(type(optimizer).step, optimizer) if previous is None else previous
            return self._step(optimizer, call, has_hooks, args, kwargs)

        @wraps(optimizer.step)
        def step(*args: Any, **kwargs: Any) -> Any:
            return step_of(reference(), *args, **kwargs)

        step.__signature__ = inspect.signature(optimizer.step)  # type: ignore[attr-defined]
        # `__wrapped__` would keep the optimizer alive. A scheduler that is created later reads `__func__`.
        del step.__wrapped__
        step.__func__ = step_of  # type: ignore[attr-defined]
        optimizer.step = step  # type: ignore[method-assign]
        if has_hooks:
            optimizer.register_step_pre_hook(self._before)

    def _step(self, optimizer: Any, call: Callable[..., Any], has_hooks: bool, args: Any, kwargs: Any) -> Any:
        if not self.listeners or self._depth:
            return call(*args, **kwargs)
        marks: Marks = [(listener, listener.mark()) for listener in self.listeners]
        # torch's optimizers change nothing before the closure returns, except LBFGS.
        may_move = isinstance(optimizer, LBFGS) or not is_of_torch(optimizer)
        closure = closure_in(args, kwargs)
        saved = _Snapshot(optimizer) if closure is not None and may_move else None
        self._depth, self._has_run = 1, False

        try:
            with undone_on_error(_undo, marks, _CancelledStep):
                if not has_hooks:
                    args, kwargs = self._before(optimizer, (optimizer, *args), kwargs) or ((optimizer, *args), kwargs)
                    args = args[1:]
                result = call(*args, **kwargs)
                for listener in self.listeners:
                    listener.after_step(optimizer)
                return result
        except _CancelledStep as cancelled:
            if cancelled.gate is not self:
                raise
            if saved is not None:
                saved.restore()
            return cancelled.loss
        finally:
            self._depth = 0

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Run the listeners, or let the closure run them. The signature is that of torch's hooks."""
        # A class whose step calls the step of its base class runs its hooks twice.
        if not self.listeners or (self._depth and self._has_run):
            return None
        self._has_run = True
        closure = closure_in(args[1:], kwargs)
        if closure is None:
            if not self._is_cancelled(optimizer):
                return None
            if self._depth:
                raise _CancelledStep(self, None)
            return _without_parameters(optimizer, args, kwargs)

        def evaluate(*closure_args: Any, **closure_kwargs: Any) -> Any:
            loss = closure(*closure_args, **closure_kwargs)
            if self._is_cancelled(optimizer) and self._depth:
                raise _CancelledStep(self, loss)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": evaluate}
        return (args[0], evaluate, *args[2:]), kwargs

    def _is_cancelled(self, optimizer: Optimizer) -> bool:
        # All of them run, because each may communicate with other ranks.
        return True in [listener.before_step(optimizer) for listener in list(self.listeners)]


_gates: weakref.WeakKeyDictionary[Optimizer, StepGate] = weakref.WeakKeyDictionary()


def gate_of(optimizer: Optimizer) -> StepGate:
    """Return the gate of an optimizer, and install it the first time."""
    if optimizer not in _gates:
        _gates[optimizer] = StepGate(optimizer)
    return _gates[optimizer]


class _Snapshot:
    """Values of the parameters and the state of an optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        params = parameters_of([optimizer])
        self._params = [(param, param.detach().clone()) for param in params]
        self._optimizer, self._states = optimizer, [(p, _copy(optimizer.state.get(p))) for p in params]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the values back."""
        for param, value in self._params:
            param.copy_(value)
        for param, state in self._states:
            if state is None:
                self._optimizer.state.pop(param, None)
            else:
                self._optimizer.state[param] = state


def _copy(state: Any) -> Any:
    """Copy the state of a parameter: tensors and lists, but not the tensors in a list."""
    if not isinstance(state, dict):
        return state
    copies = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    return {key: list(value) if isinstance(value, list) else value for key, value in copies.items()}


def closure_in(args: Sequence[Any], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """Return the closure among the arguments of an optimizer's step, or None."""
    found = kwargs.get("closure", args[0] if args else None)
    return found if callable(found) else None


def is_of_torch(optimizer: Any) -> bool:
    """Return whether torch defines the step, which then changes nothing without gradients."""
    return type(optimizer).__module__.split(".")[0] == "torch"


# Between a skipped `clip` and the next one, torch calls `_hold` before every optimizer step of the process.
_held: dict[int, tuple[weakref.ref[Any], frozenset[int]]] = {}
_handle: Any = None


def hold_still(owner: Any, tensors: Sequence[Tensor]) -> None:
    """Prevent steps of parameters without gradients, because their step is skipped.

    An optimizer may treat a missing gradient as zero, and move by momentum or weight decay.

    Args:
        owner: object that owns the hold, which ends when the object is deleted or by `release`.
        tensors: the parameters whose gradients were dropped.
    """
    global _handle
    _held[id(owner)] = weakref.ref(owner), frozenset(map(id, tensors))
    if _handle is None:
        _handle = register_optimizer_step_pre_hook(_hold)


def release(owner: Any) -> None:
    """End the hold of an owner, if there is one."""
    global _handle
    if _held and _held.pop(id(owner), None) is not None and not _held:
        _handle.remove()
        _handle = None


def _hold(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    for key, (reference, _) in _held.copy().items():
        if reference() is None:
            del _held[key]
    if is_of_torch(optimizer) or closure_in(args[1:], kwargs) or "param_groups" not in vars(optimizer):
        # A wrapper that has the groups of other optimizers steps these optimizers, which run hooks themselves.
        return None
    params = parameters_of([optimizer])
    held = frozenset[int]().union(*(ids for _, ids in _held.values()))
    if not held.issuperset(map(id, params)):
        # Parameters that are not held may have gradients, on this rank or on others.
        return None
    main_grads = [read_main_grad(param) for param in params]
    if any(param.grad is not None for param in params) or any(g is not None and bool(g.any()) for g in main_grads):
        return None
    return _without_parameters(optimizer, args, kwargs)


def _without_parameters(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    """Return arguments with which the step of an optimizer changes nothing, for a hook to return."""
    if is_of_torch(optimizer) or "param_groups" not in vars(optimizer):
        return None
    # The step runs on a stand-in without parameters, so that counters of the optimizer do not change either.
    stand_in = object.__new__(type(optimizer))
    vars(stand_in).update(vars(optimizer))
    stand_in.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
    stand_in.state = optimizer.state.copy()
    return (stand_in, *args[1:]), kwargs
