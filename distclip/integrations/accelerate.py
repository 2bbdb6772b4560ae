"""Clip the gradients of an Accelerator's models by any policy, in `accelerator.clip_grad_norm_`.

::

    import torch
    from accelerate import Accelerator
    from distclip import zclip
    from distclip.integrations.accelerate import attach

    accelerator = Accelerator(gradient_accumulation_steps=2)
    attachment = attach(accelerator, zclip(cap=1.0))
    model = torch.nn.Linear(4, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for x in torch.ones(4, 3, 4, device=accelerator.device):
        with accelerator.accumulate(model):
            accelerator.backward(model(x).sum())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)  # clips by the policy and ignores 1.0
            optimizer.step()
            optimizer.zero_grad()
    print(attachment.report.as_dict())

All processes decide from one norm, under DDP too. Every rank sees a NaN in one rank's gradients, and every rank raises
if one rank passes a wrong argument.

This integration fixes two errors of Accelerate 1.15:

- With several optimizers under a GradScaler, all except the first are silently unscaled twice.
- A bound of infinity turns all gradients into NaN if one of them is infinite.

Tested with DDP and FSDP2, on CPUs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial, wraps
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from ..extend import (
    ArgumentError,
    Comm,
    FirstError,
    GradClipper,
    LocalComm,
    OnNonFinite,
    Policy,
    Report,
    ScalerState,
    SplitOver,
    gather_or_raise,
    name_tensors,
    world_comm,
)
from . import attachment as base
from .attachment import check_not_attached, check_policy, detach
from .deferred import DeferredClipper, OnBind
from .monkeypatch import MethodPatches

__all__ = ["Attachment", "attach", "detach"]

AcceleratorT = TypeVar("AcceleratorT")

_MAX_BATCHES = 1024
"""Maximum number of batches whose losses and sample ids are kept, in case a program never clips."""


def attach(
    accelerator: Any,
    policy: Policy,
    *,
    on_nonfinite: OnNonFinite = "skip",
    max_skips: int | None = None,
    split_over: SplitOver = None,
    comm: Comm | None = None,
    on_bind: OnBind | None = None,
) -> Attachment:
    """Clip all models of an accelerator by a policy, in `accelerator.clip_grad_norm_`.

    Works with DDP and FSDP2 as Accelerate prepares them, with gradient accumulation and with fp16. The call's
    `max_norm` and `norm_type` are ignored, because the policy has its own. The call clips the models whose parameters
    it is passed, so that several models can train in turn. It raises if a parameter belongs to no prepared model, or if
    a parameter of such a model has a gradient and is missing from the list. While gradients are accumulated, the call
    does nothing and returns None. A skipped step sets the gradients to None, `accelerator.optimizer_step_was_skipped`
    is True, and prepared schedulers do not step, as after an overflow. `accelerator.save_state` saves the policy's
    state.

    Args:
        accelerator: an Accelerator, before or after `prepare`.
        policy: the policy, for example `distclip.global_norm(1.0)`.
        on_nonfinite, max_skips, split_over: see `GradClipper`.
        comm: the ranks that step together. None for all processes. In Accelerate's `LocalSGD` each process has its own
            gradients, so pass `comm=distclip.LocalComm()`.
        on_bind: called on every rank with the clipper at the first step, for example
            `lambda clipper: distclip.monitor.Recorder(clipper, "runs/one")`.

    Returns:
        The attachment, with the clipper and the report of each step. It is `accelerator.distclip` too.

    Raises:
        ArgumentError: `accelerator` is no Accelerator, or `policy` is no policy; the accelerator has a policy already,
            or leaves its steps to DeepSpeed, Megatron or XLA. In the call: wrong parameters; ranks that have prepared
            different numbers of models. Otherwise see `GradClipper.clip`.

    Collectives: none here. The first clip, and the first clip after another `prepare` (on every rank or on none), has a
    gather and those of `GradClipper`. Each clip has those of `GradClipper.clip` over all processes: one all-reduce of a
    few float64 numbers, under DDP too. Host syncs: those of `GradClipper.clip`.
    """
    check(accelerator, policy)
    return Attachment(
        accelerator, DeferredClipper(policy, split_over, on_nonfinite, max_skips, on_bind), comm, [accelerator]
    )


def patch(accelerator: AcceleratorT, policy: Policy, **options: Any) -> AcceleratorT:
    """Call `attach`, and return the accelerator. It is the name that `attach` had before version 0.1.

    Args:
        accelerator, policy, options: see `attach`.
    """
    attach(accelerator, policy, **options)
    return accelerator


def check(accelerator: Any, policy: Policy) -> None:
    """Raise if a policy cannot be attached to an accelerator.

    Raises:
        ArgumentError: see `attach`.
    """
    check_policy(policy, "attach")
    check_not_attached(accelerator)
    check_kind(accelerator)


def check_kind(accelerator: Any) -> None:
    """Raise if the object is no Accelerator, or leaves its steps to another library.

    Raises:
        ArgumentError: see above.
    """
    distributed_type = getattr(accelerator, "distributed_type", None)
    if distributed_type is None:
        raise ArgumentError(
            f"attach: accelerator={type(accelerator).__name__}: expected an accelerate.Accelerator. Without Accelerate "
            "call distclip.GradClipper(model, policy)."
        )
    kind = str(getattr(distributed_type, "value", distributed_type))
    if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise ArgumentError(
            f"attach: Accelerate does not clip under {kind}. With DeepSpeed call "
            "distclip.integrations.deepspeed.attach(engine, policy) with the engine that accelerator.prepare returns."
        )


class Attachment(base.Attachment):
    """A policy that clips or skips the steps of an accelerator's optimizers.

    Args:
        accelerator: the accelerator.
        deferred: the deferred clipper, which has the policy.
        comm: see `attach`.
        owners: the objects that `detach` takes.
    """

    def __init__(self, accelerator: Any, deferred: DeferredClipper, comm: Comm | None, owners: Sequence[Any]) -> None:
        super().__init__(owners, None)
        self._deferred, self._comm = deferred, comm
        self._accelerator_patches, self._step_patches = MethodPatches(), MethodPatches()
        self._models: list[Any] = []
        self._optimizers: list[Any] = []
        self._params: list[tuple[str, Tensor]] = []
        self._by_model: list[set[int]] = []
        self._skips: dict[int, bool] = {}
        # These are of the batches since the last step. Accelerate does not see sample ids, but a subclass may.
        self._losses: deque[Tensor] = deque(maxlen=_MAX_BATCHES)
        self._ids: deque[list[Any]] = deque(maxlen=_MAX_BATCHES)
        self._use(accelerator)

    @property
    def clipper(self) -> GradClipper | None:
        """Clipper over all prepared models, or None before the first step."""
        return self._deferred.clipper

    @property
    def report(self) -> Report | Any:
        """Report of the last step, or None before the first step."""
        return self._deferred.report

    def state_dict(self) -> dict[str, Any]:
        """Return the policy's state. `accelerator.save_state` calls it. Collectives: none."""
        return self._deferred.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the policy's state. `accelerator.load_state` calls it. Collectives: none."""
        self._deferred.load_state_dict(state_dict)

    def detach(self) -> None:
        """Restore the accelerator's own clipping, and remove the policy's state from its checkpoints."""
        super().detach()
        self._leave()

    def move(self, accelerator: Any, next_params: Iterable[Tensor]) -> None:
        """Clip in another accelerator, which replaces the current one.

        Call it on every rank. Collectives: none.

        Args:
            accelerator: the new accelerator.
            next_params: the parameters of the model that trains next. The policy's state is kept if it is the same
                model. Another model starts with a new clipper and without history.

        Raises:
            ArgumentError: the new accelerator cannot be attached to, see `attach`.
        """
        check_kind(accelerator)
        self._replace_owner(self._accelerator, accelerator)
        self._leave()
        self._use(accelerator)
        known_ids = {id(param) for _, param in self._params}
        if known_ids.isdisjoint(map(id, next_params)):
            # The old model must not stay alive.
            self._models, self._params, self._by_model = [], [], []
            if self.clipper is not None:
                self._deferred.restart()

    def _use(self, accelerator: Any) -> None:
        """Replace the clipping of an accelerator, and add the policy's state to its checkpoints."""
        self._accelerator = accelerator
        original = accelerator.clip_grad_norm_

        @wraps(original)
        def clip_grad_norm_(
            _: Any, parameters: Iterable[Tensor] | Tensor, max_norm: Any = None, norm_type: Any = 2
        ) -> Tensor | None:
            return self._clip(parameters)

        self._accelerator_patches.replace(accelerator, "clip_grad_norm_", MethodType(clip_grad_norm_, accelerator))
        accelerator.register_for_checkpointing(self)
        if self._deferred.may_note:
            self._collect_losses(accelerator)

    def _collect_losses(self, accelerator: Any) -> None:
        backward = accelerator.backward

        @wraps(backward)
        def backward_and_note(_: Any, loss: Any, **kwargs: Any) -> None:
            if isinstance(loss, Tensor) and loss.numel() == 1:
                # Each batch of an accumulated step contributes equally to its loss.
                self._losses.append(loss.detach() / accelerator.gradient_accumulation_steps)
            backward(loss, **kwargs)

        self._accelerator_patches.replace(accelerator, "backward", MethodType(backward_and_note, accelerator))

    def _leave(self) -> None:
        """Undo `_use`, and restore the steps of the optimizers."""
        self._accelerator_patches.restore()
        self._step_patches.restore()
        self._optimizers = []
        self._skips.clear()
        custom_objects = self._accelerator._custom_objects
        custom_objects[:] = [registered for registered in custom_objects if registered is not self]

    def _clip(self, parameters: Iterable[Tensor] | Tensor) -> Tensor | None:
        accelerator = self._accelerator
        if not accelerator.sync_gradients:
            return None
        self._bind_prepared()
        optimizers = [_unwrap(optimizer) for optimizer in accelerator._optimizers]
        errors, passed = FirstError(), list[Tensor]()
        with errors:
            passed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        ids = self._ids_of_models(passed)
        with errors:
            self._check_passed(passed, ids)
        # This is done after an error too, because these optimizers determine which collectives follow.
        optimizers = [optimizer for optimizer in optimizers if _steps_any(optimizer, ids)]
        only = [param for _, param in self._params if id(param) in ids]
        report = self._deferred.clip(
            optimizers, accelerator.scaler, errors, None if len(only) == len(self._params) else only
        )
        self._skips |= dict.fromkeys(map(id, optimizers), self._deferred.skipped)
        loss, sample_ids = sum(self._losses) if self._losses else None, [one for ids in self._ids for one in ids]
        self._losses.clear()
        self._ids.clear()
        self._deferred.note(next(iter(optimizers), None), loss=loss, ids=sample_ids or None)
        return report.norm

    def _bind_prepared(self) -> None:
        """Bind the clipper to models, and patch optimizers, that were prepared since the last call."""
        # After free_memory() a Trainer prepares its optimizer again, but not the model, which it has wrapped already.
        models, optimizers = list(self._accelerator._models) or self._models, list(self._accelerator._optimizers)
        if self.clipper is None or not _same_objects(models, self._models):
            comm = self._comm
            if comm is None and self._accelerator.num_processes > 1:
                # Accelerate keeps the module inside DistributedDataParallel, which does not show that it is replicated.
                comm = world_comm()
            _check_prepared(gather_or_raise(comm or LocalComm(), None, len(models)))
            module = models[0] if len(models) == 1 else nn.ModuleList(models)
            self._deferred.bind(module, comm)
            self._models, self._params = models, name_tensors(module)
            self._by_model = [{id(param) for _, param in name_tensors(model)} for model in models]
        if not _same_objects(optimizers, self._optimizers):
            self._step_patches.restore()
            self._optimizers = optimizers
            for optimizer in optimizers:
                step = wraps(optimizer.step)(partial(self._step, optimizer, optimizer.step))
                self._step_patches.replace(optimizer, "step", step)

    def _step(self, optimizer: Any, optimizer_step: Any, *args: Any, **kwargs: Any) -> Any:
        """Step an AcceleratedOptimizer, which then calls `scaler.update()` even if there are other optimizers."""
        skip = self._skips.pop(id(_unwrap(optimizer)), None) if optimizer.gradient_state.sync_gradients else None
        if skip is not None and isinstance(optimizer.scaler, GradScaler) and optimizer.scaler.is_enabled():
            scaler_state = ScalerState(optimizer.scaler, [_unwrap(optimizer)])
            if scaler_state.scaled_optimizers():
                # The update() of another optimizer has deleted the record that these gradients are unscaled.
                assert self._deferred.found_inf is not None
                scaler_state.set_found_inf(self._deferred.found_inf.to(torch.float32))
        result = optimizer_step(*args, **kwargs)
        if skip is not None:
            optimizer._is_overflow = skip
        return result

    def _ids_of_models(self, passed: list[Tensor]) -> set[int]:
        """Return the ids of all parameters of the models whose parameters were passed, or of all models."""
        passed_ids = set(map(id, passed))
        # A parameter that models share does not show which of them is meant. A model's other parameters do.
        shared = {id_ for i, one in enumerate(self._by_model) for other in self._by_model[:i] for id_ in one & other}
        chosen = [ids for ids in self._by_model if not passed_ids.isdisjoint((ids - shared) or ids)]
        return set[int]().union(*(chosen or self._by_model))

    def _check_passed(self, passed: list[Tensor], ids: set[int]) -> None:
        """Raise if the parameters of a call are not those of whole models.

        Raises:
            ArgumentError: a parameter of no prepared model was passed, or one with a gradient is missing.
        """
        passed_ids, known_ids = set(map(id, passed)), {id(param) for _, param in self._params}
        missing = [n for n, p in self._params if id(p) in ids and p.grad is not None and id(p) not in passed_ids]
        if not passed_ids <= known_ids:
            raise ArgumentError(
                f"clip_grad_norm_: {len(passed_ids - known_ids)} of the parameters passed belong to no model that this "
                "accelerator has prepared. Call model = accelerator.prepare(model) first, and pass model.parameters()."
            )
        if missing:
            raise ArgumentError(
                f"clip_grad_norm_: {len(missing)} parameters with gradients were not passed ({', '.join(missing[:3])}"
                f"{', …' * (len(missing) > 3)}), but the policy clips all of them. Pass model.parameters() of all "
                "models. To treat parts differently, use distclip.group_norm({…}) or the policy's exclude=."
            )


def _check_prepared(num_models: list[int]) -> None:
    """Raise if the ranks have not prepared the same number of models. Every rank passes the same list."""
    if not any(num_models):
        raise ArgumentError(
            "clip_grad_norm_: the accelerator has prepared no model. Call accelerator.prepare(model) first."
        )
    if len(set(num_models)) > 1:
        raise ArgumentError(
            f"clip_grad_norm_: the ranks have prepared {num_models} models, by rank. The norm of a model that only "
            "some ranks have would be incomplete. Call accelerator.prepare(model) on every rank."
        )


def _unwrap(optimizer: Any) -> Any:
    """Return the torch optimizer inside an AcceleratedOptimizer."""
    while hasattr(optimizer, "optimizer") and hasattr(optimizer, "gradient_state"):
        optimizer = optimizer.optimizer
    return optimizer


def _steps_any(optimizer: Any, ids: set[int]) -> bool:
    return any(id(param) in ids for group in optimizer.param_groups for param in group["params"])


def _same_objects(left: list[Any], right: list[Any]) -> bool:
    return list(map(id, left)) == list(map(id, right))
