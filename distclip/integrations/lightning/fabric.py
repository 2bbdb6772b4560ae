"""Fabric: `clip_gradients`, in place of its own."""

from __future__ import annotations

from typing import Any

from ...extend import GradClipper, Report

__all__ = ["clip_gradients"]


def clip_gradients(fabric: Any, clipper: GradClipper, *optimizers: Any) -> Report:
    """Clip in place of `fabric.clip_gradients(model, optimizer, max_norm=…)`, before `optimizer.step()`.

    ::

        model, optimizer = fabric.setup(model, optimizer)
        clipper = distclip.GradClipper(model, distclip.zclip(cap=5.0), on_nonfinite="skip")
        for x, y in loader:
            fabric.backward(loss(model(x), y))
            report = clip_gradients(fabric, clipper, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        fabric.save("checkpoint", {"model": model, "optimizer": optimizer, "clipper": clipper})

    With a GradScaler of Fabric's precision, gradients are unscaled in the same pass, once, and the scaler learns what
    all ranks found: `optimizer.step()` then steps, or not, on all of them. A step that is to be skipped loses its
    gradients, so that it does nothing.

    Args:
        fabric: that has set up the model.
        clipper: over the module that `fabric.setup` returned; names in its memory are those of the bare module.
        optimizers: that step the clipper's parameters, as `fabric.setup` returned them.

    Returns:
        What was seen and done, as device scalars.

    Raises, Collectives, Host syncs: see `GradClipper.clip`.
    """
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    return clipper.clip([getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers], scaler)
