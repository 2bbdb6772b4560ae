"""Clip by any policy in Lightning: a callback for the Trainer, a function for Fabric.

::

    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel
    from distclip import zclip
    from distclip.integrations.lightning import GradientClipping

    clipping = GradientClipping(zclip(cap=1.0), on_nonfinite="skip")
    trainer = Trainer(max_steps=3, callbacks=[clipping])  # without gradient_clip_val, which would clip again
    trainer.fit(BoringModel())
    print(clipping.report.as_dict())

Both work under DDP, FSDP and FSDP2 (ModelParallelStrategy), with gradient accumulation and the GradScaler of
"16-mixed". Lightning's own clipping is limited there:

- The Trainer refuses to clip by norm under FSDP, and discards the norm under the other strategies.
- Fabric's `clip_gradients` ignores `error_if_nonfinite` under FSDP, and steps with non-finite gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .fabric import clip_gradients

if TYPE_CHECKING:
    from .callback import GradientClipping

__all__ = ["GradientClipping", "clip_gradients"]


def __getattr__(name: str) -> Any:
    # The callback derives from Lightning's class, so its module imports Lightning. It is imported only on first use.
    if name == "GradientClipping":
        from .callback import GradientClipping

        return GradientClipping
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
