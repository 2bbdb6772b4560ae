"""Accelerate: `accelerator.clip_grad_norm_` as ever, with distclip's norm, policy and decision.

::

    import torch
    from accelerate import Accelerator
    from distclip import zclip
    from distclip.integrations.accelerate import patch

    accelerator = patch(Accelerator(gradient_accumulation_steps=2), zclip(cap=5.0))
    model = torch.nn.Linear(4, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for x in torch.ones(4, 3, 4, device=accelerator.device):
        with accelerator.accumulate(model):
            accelerator.backward(model(x).sum())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)  # by the policy; 1.0 is left out of account
            optimizer.step()
            optimizer.zero_grad()
    print(accelerator.distclip.report.as_dict())

What is wrong in Accelerate 1.15 and right here: with several optimizers under a GradScaler all but the first are
unscaled twice (silently); a bound of infinity turns all gradients into NaN where one is infinite.

All processes decide from one total, under DDP too: a NaN in one rank's gradients alone is seen by all, and what one
rank alone passes wrongly is refused by all.

Tested with DDP and FSDP2, on CPUs.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, wraps
from types import MethodType
from typing import Any

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
    named,
    world_comm,
)
from .deferred import Late, OnBind, check_policy
from .monkeypatch import Patches

__all__ = ["Patched", "patch", "unpatch"]


def patch(
    accelerator: Any,
    policy: Policy,
    *,
    on_nonfinite: OnNonFinite = "skip",
    max_skips: int | None = None,
    split_over: SplitOver = None,
    comm: Comm | None = None,
    on_bind: OnBind | None = None,
) -> Any:
    """Let `accelerator.clip_grad_norm_` clip all models of the accelerator by a policy.

    Works with DDP and FSDP2 as Accelerate prepares them, gradient accumulation, fp16. The call's `max_norm` and
    `norm_type` are left out of account: the policy has its own. Its parameters say nothing either, but are checked: a
    foreign one, or a list that lacks one with a gradient, is refused. While gradients are being accumulated the call
    does nothing and returns None. A step that is skipped loses its gradients; `accelerator.optimizer_step_was_skipped`
    says so, and prepared schedulers wait, as after an overflow. The policy's memory goes into `accelerator.save_state`.

    Args:
        accelerator: of Accelerate, before `prepare` or after it.
        policy: what to do, for example `distclip.global_norm(1.0)`.
        on_nonfinite, max_skips, split_over: see `GradClipper`.
        comm: who steps together, where that is not all processes. In Accelerate's `LocalSGD` each process has gradients
            of its own: write `comm=distclip.LocalComm()`.
        on_bind: called on every rank with the clipper at the first step, for example
            `lambda clipper: distclip.monitor.Recorder(clipper, "runs/one")`.

    Returns:
        The accelerator; `accelerator.distclip` is its `Patched`.

    Raises:
        ArgumentError: no policy; an accelerator that has one already, or leaves steps to DeepSpeed, Megatron or XLA.
            In the call: parameters as above; ranks that have not prepared the same number of models. Otherwise see
            `GradClipper.clip`.

    Collectives: none here. At the first clip, and at the first after another `prepare` (which every rank makes, or
    none), a gather and those of `GradClipper`; at each those of `GradClipper.clip`, over all processes: one all-reduce
    of (slots + 1) float64 numbers, under DDP too. Host syncs: those of `GradClipper.clip`.
    """
    check_policy(policy, "patch")
    if getattr(accelerator, "distclip", None) is not None:
        raise ArgumentError("patch: the accelerator has a policy already. Write unpatch(accelerator) first.")
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise ArgumentError(
            f"patch: under {kind} steps are not Accelerate's to clip. With DeepSpeed write "
            "distclip.integrations.deepspeed.attach(engine, policy), where engine is what accelerator.prepare returned."
        )
    accelerator.distclip = Patched(accelerator, Late(policy, split_over, on_nonfinite, max_skips, on_bind), comm)
    return accelerator


def unpatch(accelerator: Any) -> Any:
    """Give an accelerator back: from now on it clips as the call says.

    Returns:
        The accelerator.

    Raises:
        ArgumentError: it has not been patched.
    """
    patched = getattr(accelerator, "distclip", None)
    if not isinstance(patched, Patched):
        raise ArgumentError("unpatch: this accelerator has not been patched.")
    patched.restore()
    del accelerator.distclip
    return accelerator


class Patched:
    """An accelerator's clipper, and what it saw: `accelerator.distclip`.

    Args:
        accelerator: whose method is replaced.
        late: has the policy.
        comm: see `patch`.
    """

    def __init__(self, accelerator: Any, late: Late, comm: Comm | None = None) -> None:
        self._accelerator, self._late, self._comm = accelerator, late, comm
        self._patches, self._steps = Patches(), Patches()
        self._models: list[Any] = []
        self._optimizers: list[Any] = []
        self._pairs: list[tuple[str, Tensor]] = []
        self._due: dict[int, bool] = {}
        its_own = accelerator.clip_grad_norm_

        @wraps(its_own)
        def clip_grad_norm_(
            _: Any, parameters: Iterable[Tensor] | Tensor, max_norm: Any = None, norm_type: Any = 2
        ) -> Tensor | None:
            return self._clip(parameters)

        self._patches.put(accelerator, "clip_grad_norm_", MethodType(clip_grad_norm_, accelerator))
        accelerator.register_for_checkpointing(self)

    @property
    def clipper(self) -> GradClipper | None:
        """None before the first step."""
        return self._late.clipper

    @property
    def report(self) -> Report | None:
        """Of the last step; None before the first."""
        return self._late.report

    def state_dict(self) -> dict[str, Any]:
        """What the policy remembers; called by `accelerator.save_state`. Collectives: none."""
        return self._late.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where it was saved; called by `accelerator.load_state`. Collectives: none."""
        self._late.load_state_dict(state_dict)

    def restore(self) -> None:
        """See `unpatch`."""
        self._patches.restore()
        self._steps.restore()
        own = self._accelerator._custom_objects
        own[:] = [one for one in own if one is not self]

    def _clip(self, parameters: Iterable[Tensor] | Tensor) -> Tensor | None:
        accelerator = self._accelerator
        if not accelerator.sync_gradients:
            return None
        self._look()
        optimizers = [_raw(one) for one in accelerator._optimizers]
        failure = self._wrong([parameters] if isinstance(parameters, Tensor) else list(parameters))
        report = self._late.clip(optimizers, accelerator.scaler, FirstError(failure))
        self._due = dict.fromkeys(map(id, optimizers), self._late.skipped)
        return report.norm

    def _look(self) -> None:
        """Take hold of what has been prepared since the last time."""
        # After free_memory() a Trainer prepares its optimizer anew, and not the model, which it has wrapped already.
        models, optimizers = list(self._accelerator._models) or self._models, list(self._accelerator._optimizers)
        if self.clipper is None or not _same(models, self._models):
            comm = self._comm
            if comm is None and self._accelerator.num_processes > 1:
                # Accelerate keeps the module inside of DistributedDataParallel, which does not know whose copy it is.
                comm = world_comm()
            _check_prepared(gather_or_raise(comm or LocalComm(), None, len(models)))
            whole = models[0] if len(models) == 1 else nn.ModuleList(models)
            self._late.bind(whole, comm)
            self._models, self._pairs = models, named(whole)
        if not _same(optimizers, self._optimizers):
            self._steps.restore()
            self._optimizers = optimizers
            for one in optimizers:
                self._steps.put(one, "step", wraps(one.step)(partial(self._step, one, one.step)))

    def _step(self, optimizer: Any, its_step: Any, *args: Any, **kwargs: Any) -> Any:
        """A step of an AcceleratedOptimizer, which then calls `scaler.update()` whatever other optimizers there are."""
        skipped = self._due.pop(id(_raw(optimizer)), None) if optimizer.gradient_state.sync_gradients else None
        if skipped is not None and isinstance(optimizer.scaler, GradScaler) and optimizer.scaler.is_enabled():
            scaling = ScalerState(optimizer.scaler, [_raw(optimizer)])
            if scaling.scaled_optimizers():
                # Another one's update() has forgotten that this one's gradients are unscaled.
                assert self._late.found_inf is not None
                scaling.set_found_inf(self._late.found_inf.to(torch.float32))
        result = its_step(*args, **kwargs)
        if skipped is not None:
            optimizer._is_overflow = skipped
        return result

    def _wrong(self, passed: list[Tensor]) -> ArgumentError | None:
        """What there is to say against the parameters of a call."""
        ids, own = set(map(id, passed)), {id(param) for _, param in self._pairs}
        lacking = [name for name, param in self._pairs if param.grad is not None and id(param) not in ids]
        if not ids <= own:
            return ArgumentError(
                f"clip_grad_norm_: {len(ids - own)} of the parameters passed belong to no model that this accelerator "
                "has prepared. Write model = accelerator.prepare(model) first, and pass model.parameters()."
            )
        if lacking:
            return ArgumentError(
                f"clip_grad_norm_: {len(lacking)} parameters with gradients were not passed ({', '.join(lacking[:3])}"
                f"{', …' * (len(lacking) > 3)}), and the policy is for the whole. Pass model.parameters(), of all "
                "models; to treat parts differently write distclip.group_norm({…}), or exclude= of the policy."
            )
        return None


def _check_prepared(models: list[int]) -> None:
    """How many models each rank has prepared: all know it, and raise together."""
    if not any(models):
        raise ArgumentError(
            "clip_grad_norm_: the accelerator has prepared no model. Write accelerator.prepare(model) first."
        )
    if len(set(models)) > 1:
        raise ArgumentError(
            f"clip_grad_norm_: the ranks have prepared {models} models, in their order. A model that only some of them "
            "have would count in part: write accelerator.prepare(model) on every rank alike."
        )


def _raw(optimizer: Any) -> Any:
    """The torch optimizer inside."""
    while hasattr(optimizer, "optimizer") and hasattr(optimizer, "gradient_state"):
        optimizer = optimizer.optimizer
    return optimizer


def _same(one: list[Any], other: list[Any]) -> bool:
    """The very objects."""
    return list(map(id, one)) == list(map(id, other))
