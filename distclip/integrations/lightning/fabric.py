"""Clip in Lightning Fabric, instead of Fabric's own `clip_gradients`."""

from __future__ import annotations

from typing import Any

from ...extend import GradClipper, Report

__all__ = ["clip_gradients"]


def clip_gradients(fabric: Any, clipper: GradClipper, *optimizers: Any) -> Report:
    """Clip instead of `fabric.clip_gradients(model, optimizer, max_norm=…)`, before `optimizer.step()`.

    ::

        model, optimizer = fabric.setup(model, optimizer)
        clipper = distclip.GradClipper(model, distclip.zclip(cap=1.0), on_nonfinite="skip")
        for x, y in loader:
            fabric.backward(loss(model(x), y))
            report = clip_gradients(fabric, clipper, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        fabric.save("checkpoint", {"model": model, "optimizer": optimizer, "clipper": clipper})

    With the GradScaler of a Fabric precision, gradients are unscaled once, in the same pass, and the scaler gets the
    found_inf of all ranks. `optimizer.step()` then steps on every rank or on none. A skipped step sets the gradients to
    None, so that `optimizer.step()` does nothing.

    Args:
        fabric: the Fabric that has set up the model.
        clipper: a clipper over the module that `fabric.setup` returned. Its state has the parameter names of the module
            without Fabric's wrapper.
        optimizers: the optimizers that step the clipper's parameters, as `fabric.setup` returned them.

    Returns:
        The report of this step, as device scalars.

    Raises, Collectives, Host syncs: see `GradClipper.clip`.
    """
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    return clipper.clip([getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers], scaler)
