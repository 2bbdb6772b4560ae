"""Clip the gradients of a Trainer of Hugging Face's transformers by any policy, in place of `max_grad_norm`.

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

from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..extend import ArgumentError, OnNonFinite, Policy, SplitOver
from . import accelerate
from .attachment import detach
from .deferred import DeferredClipper, OnBind

__all__ = ["Attachment", "attach", "detach"]

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
) -> Attachment:
    """Clip in a Trainer, or in a class that derives from it, by a policy.

    Works with everything that `accelerate.attach` works with, gradient accumulation and fp16. `max_grad_norm` is
    ignored, even 0. Pass `distclip.global_norm(float("inf"))` to clip nothing. `grad_norm` in the logs is distclip's
    norm before clipping, without the loss scale. The logs also get `grad_coef`, and `grad_skipped`, the number of
    skipped steps so far. A skipped step changes neither the model nor the optimizer nor the scheduler. Checkpoints
    have the policy's state in a file `distclip.pt`.

    Args:
        trainer: a Trainer of transformers, before `train`.
        policy: the policy, for example `distclip.global_norm(1.0)`.
        on_nonfinite, max_skips, split_over, on_bind: see `distclip.integrations.accelerate.attach`.

    Returns:
        The attachment, with the clipper and the report of each step. It is `trainer.distclip` and
        `trainer.accelerator.distclip` too.

    Raises:
        ArgumentError: `trainer` is not a Trainer, or that of an older transformers. Otherwise see
            `distclip.integrations.accelerate.attach`.

    Collectives, Host syncs: see `distclip.integrations.accelerate.attach`.
    """
    if not hasattr(trainer, "_get_grad_norm") or not hasattr(trainer, "_load_optimizer_and_scheduler"):
        raise ArgumentError(
            f"trainer={type(trainer).__name__}: expected a Trainer of transformers ≥ 5.18. In your own loop call "
            "distclip.integrations.accelerate.attach(accelerator, policy)."
        )
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
    """A policy that decides the steps of a Trainer.

    Args:
        trainer: the Trainer.
        deferred: has the policy.
    """

    def __init__(self, trainer: Any, deferred: DeferredClipper) -> None:
        super().__init__(trainer.accelerator, deferred, None, [trainer.accelerator, trainer])
        trainer_save, trainer_load, trainer_log = (
            trainer._save_optimizer_and_scheduler,
            trainer._load_optimizer_and_scheduler,
            trainer.log,
        )

        @wraps(trainer_save)
        def save(output_dir: str) -> None:
            trainer_save(output_dir)
            state = self.state_dict()
            if trainer.args.should_save:
                torch.save(state, Path(output_dir) / _FILE)

        @wraps(trainer_load)
        def load(checkpoint: str | None) -> None:
            trainer_load(checkpoint)
            if checkpoint is not None and (file := Path(checkpoint) / _FILE).exists():
                self.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

        @wraps(trainer_log)
        def log(logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            if "grad_norm" in logs and self.clipper is not None and self.report is not None:
                logs = {**logs, "grad_coef": float(self.report.coef), "grad_skipped": self.clipper.skipped}
            trainer_log(logs, *args, **kwargs)

        # With several meshes the Trainer would clip by another function than accelerator.clip_grad_norm_.
        self._patches.replace(trainer, "_has_mixed_mesh_grads", lambda model: False)
        self._patches.replace(trainer, "_save_optimizer_and_scheduler", save)
        self._patches.replace(trainer, "_load_optimizer_and_scheduler", load)
        self._patches.replace(trainer, "log", log)
