"""Clip the gradients of a Trainer of Hugging Face's transformers by any policy, instead of `max_grad_norm`.

::

    import torch
    from distclip import zclip
    from distclip.integrations.transformers import attach
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Linear):
        def forward(self, x):
            return {"loss": super().forward(x).square().sum()}

    args = TrainingArguments("trained", max_steps=4, logging_steps=1, report_to=[])
    trainer = Trainer(model=Model(4, 2), args=args, train_dataset=[{"x": torch.randn(4)} for _ in range(16)])
    attachment = attach(trainer, zclip(cap=1.0))
    trainer.train()  # or train(resume_from_checkpoint=True)
    print(attachment.report.as_dict())

This integration fixes an error of transformers 5. With max_grad_norm=0, which turns clipping off, the call that logs
the norm turns all gradients into NaN if one of them is infinite.

Tested under DDP, FSDP2 and tensor parallelism, on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..extend import ArgumentError, GradClipper, OnNonFinite, Policy, Report, SplitOver
from . import accelerate, deepspeed
from . import attachment as base
from .attachment import check_not_attached, check_policy, detach
from .deferred import DeferredClipper, OnBind, find_ids
from .monkeypatch import MethodPatches

__all__ = ["Attachment", "DeepSpeedAttachment", "attach", "detach"]

TrainerT = TypeVar("TrainerT")

_FILE = "distclip.pt"


def attach(
    trainer: Any,
    policy: Policy,
    *,
    on_nonfinite: OnNonFinite = "skip",
    max_skips: int | None = None,
    split_over: SplitOver = None,
    on_bind: OnBind | None = None,
) -> Attachment | DeepSpeedAttachment:
    """Clip in a Trainer, or in a class that derives from it, by a policy.

    Works with everything that `accelerate.attach` works with, including gradient accumulation and fp16. `max_grad_norm`
    is ignored, even if it is 0. Pass `distclip.global_norm(float("inf"))` to clip nothing. `grad_norm` in the logs is
    distclip's norm before clipping, without the loss scale. The logs also get `grad_coef`, and `grad_skipped`, the
    number of skipped steps so far. A skipped step changes neither the model nor the optimizer nor the scheduler.
    Checkpoints have the policy's state in a file `distclip.pt`.

    Under DeepSpeed (`TrainingArguments(deepspeed=...)`, ZeRO 0 to 3) the policy is attached to the engine when training
    starts, see `distclip.integrations.deepspeed.attach`, and `gradient_clipping` of its config is ignored too.

    If the Trainer makes another Accelerator, as each trial of `hyperparameter_search` does, the policy is attached to
    the new one. Each trial has a new model, so it starts with a new clipper, without the history of the previous trial.

    Args:
        trainer: a Trainer of transformers, before `train`.
        policy: the policy, for example `distclip.global_norm(1.0)`.
        on_nonfinite, max_skips, split_over, on_bind: see `distclip.integrations.accelerate.attach`.

    Returns:
        The attachment, with the clipper and the report of each step. It is `trainer.distclip` and
        `trainer.accelerator.distclip` too.

    Raises:
        ArgumentError: `trainer` is not a Trainer, or is one of an older version of transformers. Otherwise see
            `distclip.integrations.accelerate.attach`.

    Collectives, Host syncs: see `distclip.integrations.accelerate.attach`.
    """
    if not hasattr(trainer, "_get_grad_norm") or not hasattr(trainer, "_load_optimizer_and_scheduler"):
        raise ArgumentError(
            f"trainer={type(trainer).__name__}: expected a Trainer of transformers ≥ 5.18. In your own loop call "
            "distclip.integrations.accelerate.attach(accelerator, policy)."
        )
    if trainer.is_deepspeed_enabled:
        if split_over is not None:
            raise ArgumentError("attach: split_over is not for DeepSpeed, whose process groups are known. Omit it.")
        check_policy(policy, "attach")
        check_not_attached(trainer)
        return DeepSpeedAttachment(trainer, policy, on_nonfinite, max_skips, on_bind)
    accelerate.check(trainer.accelerator, policy)
    return Attachment(trainer, DeferredClipper(policy, split_over, on_nonfinite, max_skips, on_bind))


def patch(trainer: TrainerT, policy: Policy, **options: Any) -> TrainerT:
    """Call `attach`, and return the Trainer. It is the name that `attach` had before version 0.1.

    Args:
        trainer, policy, options: see `attach`.
    """
    attach(trainer, policy, **options)
    return trainer


class Attachment(accelerate.Attachment):
    """A policy that clips or skips the steps of a Trainer.

    Args:
        trainer: the Trainer.
        deferred: the deferred clipper, which has the policy.
    """

    def __init__(self, trainer: Any, deferred: DeferredClipper) -> None:
        super().__init__(trainer.accelerator, deferred, None, [trainer.accelerator, trainer])
        # With several meshes the Trainer would clip by another function than accelerator.clip_grad_norm_.
        self._patches.replace(trainer, "_has_mixed_mesh_grads", lambda model: False)
        _patch_trainer(self, self._patches, trainer)
        _follow_accelerators(self._patches, trainer, self._follow)
        if deferred.may_note:
            self._collect_ids(trainer)

    def _collect_ids(self, trainer: Any) -> None:
        training_step = trainer.training_step

        @wraps(training_step)
        def step_and_note(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            ids = find_ids(inputs)
            self._ids.append(ids.tolist() if isinstance(ids, torch.Tensor) else list(ids or []))
            return training_step(model, inputs, *args, **kwargs)

        self._patches.replace(trainer, "training_step", step_and_note)

    def _follow(self, trainer: Any) -> None:
        if trainer.accelerator is not self._accelerator:
            self.move(trainer.accelerator, trainer.model.parameters())


class DeepSpeedAttachment(base.Attachment):
    """A policy that clips or skips the steps of a Trainer under DeepSpeed.

    The Trainer makes its engine when training starts, and the policy is attached to it then.

    Args:
        trainer: the Trainer.
        policy: the policy.
        on_nonfinite, max_skips, on_bind: see `attach`.
    """

    def __init__(
        self,
        trainer: Any,
        policy: Policy,
        on_nonfinite: OnNonFinite,
        max_skips: int | None,
        on_bind: OnBind | None,
    ) -> None:
        super().__init__([trainer.accelerator, trainer], None)
        self._policy, self._on_bind = policy, on_bind
        self._options: dict[str, Any] = {"on_nonfinite": on_nonfinite, "max_skips": max_skips}
        self._accelerator_patches = MethodPatches()
        self._engine: Any = None
        self._model: Any = None
        self._of_engine: base.Attachment | None = None
        self._pending_state: dict[str, Any] = {}
        self._use(trainer)
        _patch_trainer(self, self._patches, trainer)
        _follow_accelerators(self._patches, trainer, self._follow)

    def _use(self, trainer: Any) -> None:
        """Attach to each engine that the Trainer's current accelerator makes."""
        self._accelerator = accelerator = trainer.accelerator
        prepare = accelerator._prepare_deepspeed

        @wraps(prepare)
        def prepare_and_attach(*args: Any, **kwargs: Any) -> Any:
            prepared = prepare(*args, **kwargs)
            wrapper = accelerator.deepspeed_engine_wrapped
            if wrapper is not None and wrapper.engine is not self._engine and wrapper.engine.optimizer is not None:
                self._attach_to_engine(wrapper.engine, trainer.model)
            return prepared

        self._accelerator_patches.replace(accelerator, "_prepare_deepspeed", prepare_and_attach)

    def _attach_to_engine(self, engine: Any, model: Any) -> None:
        self._engine, self._model, clipper = engine, model, self.clipper
        if clipper is not None:
            self._of_engine = deepspeed.attach(engine, clipper)
            return
        self._of_engine = deepspeed.attach(engine, self._policy, **self._options)
        self.load_state_dict(self._pending_state)
        if self._on_bind is not None and self.clipper is not None:
            self._on_bind(self.clipper)

    def _follow(self, trainer: Any) -> None:
        if trainer.accelerator is self._accelerator:
            return
        self._replace_owner(self._accelerator, trainer.accelerator)
        self._accelerator_patches.restore()
        if self._of_engine is not None and trainer.model is not self._model:
            self._of_engine, self._pending_state = None, {}
        self._engine = self._model = None
        self._use(trainer)

    @property
    def clipper(self) -> GradClipper | None:
        """Clipper of the engine, or None before training starts."""
        return None if self._of_engine is None else self._of_engine.clipper

    @property
    def report(self) -> Report | Any:
        """Report of the last step, or None before the first step."""
        return None if self._of_engine is None else self._of_engine.report

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the policy's state, now or when training starts. Collectives: none."""
        self._pending_state = state_dict
        super().load_state_dict(state_dict)

    def detach(self) -> None:
        """Restore DeepSpeed's own clipping."""
        super().detach()
        self._accelerator_patches.restore()
        if self._of_engine is not None:
            self._of_engine.detach()


def _patch_trainer(attachment: base.Attachment, patches: MethodPatches, trainer: Any) -> None:
    """Add the policy's state to the checkpoints of a Trainer, and the coefficient to its logs."""
    trainer_save, trainer_load = trainer._save_optimizer_and_scheduler, trainer._load_optimizer_and_scheduler
    trainer_log = trainer.log

    @wraps(trainer_save)
    def save(output_dir: str) -> None:
        trainer_save(output_dir)
        state = attachment.state_dict()
        if trainer.args.should_save:
            torch.save(state, Path(output_dir) / _FILE)

    @wraps(trainer_load)
    def load(checkpoint: str | None) -> None:
        trainer_load(checkpoint)
        if checkpoint is not None and (file := Path(checkpoint) / _FILE).exists():
            attachment.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    @wraps(trainer_log)
    def log(logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "grad_norm" in logs and attachment.clipper is not None and attachment.report is not None:
            logs = {**logs, "grad_coef": float(attachment.report.coef), "grad_skipped": attachment.clipper.skipped}
        trainer_log(logs, *args, **kwargs)

    patches.replace(trainer, "_save_optimizer_and_scheduler", save)
    patches.replace(trainer, "_load_optimizer_and_scheduler", load)
    patches.replace(trainer, "log", log)


def _follow_accelerators(patches: MethodPatches, trainer: Any, follow: Callable[[Any], None]) -> None:
    """Call `follow` with the Trainer wherever it may have made another accelerator."""
    create, inner_training_loop = trainer.create_accelerator_and_postprocess, trainer._inner_training_loop

    @wraps(create)
    def create_and_follow() -> None:
        create()
        follow(trainer)

    @wraps(inner_training_loop)
    def train(*args: Any, **kwargs: Any) -> Any:
        # A class that derives from the Trainer may have assigned an accelerator.
        follow(trainer)
        return inner_training_loop(*args, **kwargs)

    patches.replace(trainer, "create_accelerator_and_postprocess", create_and_follow)
    patches.replace(trainer, "_inner_training_loop", train)
