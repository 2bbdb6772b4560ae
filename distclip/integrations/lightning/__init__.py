"""Lightning: a callback for the Trainer, and a line for Fabric.

::

    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel
    from distclip import zclip
    from distclip.integrations.lightning import GradientClipping

    clipping = GradientClipping(zclip(cap=5.0), on_nonfinite="skip")
    trainer = Trainer(max_steps=3, callbacks=[clipping])  # no gradient_clip_val: it would clip once more
    trainer.fit(BoringModel())
    print(clipping.report.as_dict())

The Trainer itself refuses to clip by norm under FSDP, and throws the norm away under the other strategies; Fabric's
`clip_gradients` forgets `error_if_nonfinite` under FSDP, and steps with what is not finite. Here both clip by any
policy under DDP, FSDP and FSDP2 (ModelParallelStrategy), with gradient accumulation and the GradScaler of "16-mixed".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .fabric import clip_gradients

if TYPE_CHECKING:
    from .callback import GradientClipping

__all__ = ["GradientClipping", "clip_gradients"]


def __getattr__(name: str) -> Any:
    # A callback derives from Lightning's: it is imported when somebody wants one, not before.
    if name == "GradientClipping":
        from .callback import GradientClipping

        return GradientClipping
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
