"""The Trainer of Hugging Face's transformers: any policy in place of `max_grad_norm`.

::

    import torch
    from distclip import zclip
    from distclip.integrations.transformers import patch
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Linear):
        def forward(self, x):
            return {"loss": super().forward(x).square().sum()}

    args = TrainingArguments("trained", max_steps=4, logging_steps=1, report_to=[])
    trainer = Trainer(model=Model(4, 2), args=args, train_dataset=[{"x": torch.randn(4)} for _ in range(16)])
    patch(trainer, zclip(cap=5.0)).train()  # or train(resume_from_checkpoint=True)
    print(trainer.accelerator.distclip.report.as_dict())

What is wrong in transformers 5 and right here: with max_grad_norm=0, which is to turn clipping off, its way to log the
norm turns all gradients into NaN where one is infinite. Tested under DDP, FSDP2 and tensor parallelism, on CPUs.
"""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import torch

from ..extend import ArgumentError, OnNonFinite, Policy, SplitOver
from . import accelerate
from .deferred import OnBind
from .monkeypatch import Patches

__all__ = ["patch", "unpatch"]

_ATTRIBUTE = "_distclip_patches"

_FILE = "distclip.pt"


def patch(
    trainer: Any,
    policy: Policy,
    *,
    on_nonfinite: OnNonFinite = "skip",
    max_skips: int | None = None,
    split_over: SplitOver = None,
    on_bind: OnBind | None = None,
) -> Any:
    """Let a Trainer, or what derives from it, clip by a policy.

    Works with what `accelerate.patch` does, gradient accumulation, fp16. `max_grad_norm` is left out
    of account, 0 too: write `distclip.global_norm(float("inf"))` to clip nothing. `grad_norm` in the logs is distclip's
    norm before clipping, free of the loss scale; beside it there are `grad_coef`, and `grad_skipped`, the number of
    steps left out so far. These leave the model, the optimizer and the scheduler as they are. Checkpoints have the
    policy's memory in a file `distclip.pt`.

    Args:
        trainer: of transformers, before `train`.
        policy: what to do, for example `distclip.global_norm(1.0)`.
        on_nonfinite, max_skips, split_over, on_bind: see `distclip.integrations.accelerate.patch`.

    Returns:
        The trainer; `trainer.accelerator.distclip` has the clipper and the last report.

    Raises:
        ArgumentError: no Trainer, or one of transformers < 5.3; otherwise see `distclip.integrations.accelerate.patch`.

    Collectives, Host syncs: see `distclip.integrations.accelerate.patch`.
    """
    if not hasattr(trainer, "_get_grad_norm") or not hasattr(trainer, "_load_optimizer_and_scheduler"):
        raise ArgumentError(
            f"patch: {type(trainer).__name__} has no place where gradients are clipped. Pass a Trainer of transformers "
            "≥ 5.18; in a loop of your own write distclip.integrations.accelerate.patch(accelerator, policy)."
        )
    accelerate.patch(
        trainer.accelerator,
        policy,
        on_nonfinite=on_nonfinite,
        max_skips=max_skips,
        split_over=split_over,
        on_bind=on_bind,
    )
    patched, patches = trainer.accelerator.distclip, Patches()
    its_save, its_load, its_log = (
        trainer._save_optimizer_and_scheduler,
        trainer._load_optimizer_and_scheduler,
        trainer.log,
    )

    @wraps(its_save)
    def save(output_dir: str) -> None:
        its_save(output_dir)
        memory = patched.state_dict()
        if trainer.args.should_save:
            torch.save(memory, Path(output_dir) / _FILE)

    @wraps(its_load)
    def load(checkpoint: str | None) -> None:
        its_load(checkpoint)
        if checkpoint is not None and (file := Path(checkpoint) / _FILE).exists():
            patched.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    @wraps(its_log)
    def log(logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "grad_norm" in logs and patched.report is not None:
            logs = {**logs, "grad_coef": float(patched.report.coef), "grad_skipped": patched.clipper.skipped}
        its_log(logs, *args, **kwargs)

    # Different meshes are nothing special here: there is one way, by way of accelerator.clip_grad_norm_.
    patches.put(trainer, "_has_mixed_mesh_grads", lambda model: False)
    patches.put(trainer, "_save_optimizer_and_scheduler", save)
    patches.put(trainer, "_load_optimizer_and_scheduler", load)
    patches.put(trainer, "log", log)
    setattr(trainer, _ATTRIBUTE, patches)
    return trainer


def unpatch(trainer: Any) -> Any:
    """Give a trainer back: from now on it clips by `max_grad_norm`.

    Returns:
        The trainer.

    Raises:
        ArgumentError: it has not been patched.
    """
    patches = getattr(trainer, _ATTRIBUTE, None)
    if not isinstance(patches, Patches):
        raise ArgumentError("unpatch: this trainer has not been patched.")
    accelerate.unpatch(trainer.accelerator)
    patches.restore()
    delattr(trainer, _ATTRIBUTE)
    return trainer
