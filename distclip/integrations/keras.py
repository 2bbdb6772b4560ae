"""Clip in a Keras 3 optimizer on the torch backend by any policy, in `fit` and in a custom loop.

::

    import os

    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    import numpy as np
    from distclip import zclip
    from distclip.integrations.keras import attach

    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    attachment = attach(model.optimizer, zclip(cap=1.0))  # in place of clipnorm, clipvalue and global_clipnorm
    model.fit(np.ones((8, 4)), np.ones(8), verbose=0)
    print(attachment.report.as_dict())

Keras itself never skips a step, and does not report its clipping. Its `clipnorm` clips each variable, as
`distclip.per_tensor_norm` does, its `global_clipnorm` is `NormPolicy(Fixed(c))`, and its `clipvalue` is
`distclip.value`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..extend import ArgumentError, Comm, GradClipper, OnNonFinite, Policy, SplitOver, world_comm
from . import attachment as base
from .attachment import check_not_attached, check_policy, detach

__all__ = ["Attachment", "attach", "detach"]


def attach(
    optimizer: Any,
    policy: Policy,
    *,
    on_nonfinite: OnNonFinite = "skip",
    max_skips: int | None = None,
    split_over: SplitOver = None,
    comm: Comm | None = None,
) -> Attachment:
    """Clip in every update of a Keras optimizer, instead of Keras's clipping.

    The policy replaces `clipnorm`, `clipvalue` and `global_clipnorm`, even if they are set. With
    `gradient_accumulation_steps` it clips the mean of the gradients once per update. A skipped step changes neither the
    variables nor the slots of the optimizer, and `optimizer.iterations` counts it. `model.save` does not save the
    policy's state: save `attachment.state_dict()`.

    Args:
        optimizer: a Keras 3 optimizer on the torch backend, or a LossScaleOptimizer around it.
        policy: for example `distclip.global_norm(1.0)`.
        on_nonfinite, max_skips, split_over: see `GradClipper`.
        comm: the ranks that step together. None for all ranks of torch.distributed.

    Returns:
        The attachment, with the clipper after the first update, and the report of the last one. It is
        `optimizer.distclip` too.

    Raises:
        ArgumentError: `optimizer` is no Keras optimizer on the torch backend, or has a policy already; `policy` is no
            policy. In an update: see `GradClipper.clip`.

    Collectives: those of `GradClipper` in the first update, and in each update those of `GradClipper.clip`. Host syncs:
    those of `GradClipper.clip`.
    """
    inner = vars(optimizer).get("inner_optimizer", optimizer)
    if not hasattr(inner, "_backend_apply_gradients") or not hasattr(inner, "_clip_gradients"):
        raise ArgumentError(
            f"attach: optimizer={optimizer!r:.80}: not an optimizer of Keras 3. Pass model.optimizer after compile. "
            "For an optimizer of torch call distclip.GradClipper(model, policy).attach(optimizer)."
        )
    check_policy(policy, "attach")
    check_not_attached(inner)
    options = {"on_nonfinite": on_nonfinite, "max_skips": max_skips, "split_over": split_over, "comm": comm}
    return Attachment([optimizer] if inner is optimizer else [optimizer, inner], policy, options)


class Attachment(base.Attachment):
    """A policy that clips or skips the updates of a Keras optimizer.

    Args:
        owners: the optimizer, preceded by the LossScaleOptimizer around it if there is one.
        policy: the policy.
        options: further arguments of `GradClipper`.
    """

    def __init__(self, owners: list[Any], policy: Policy, options: dict[str, Any]) -> None:
        super().__init__(owners, None)
        self._policy, self._options = policy, options
        self._variables: list[Any] = []
        self._pending_state: dict[str, Any] = {}
        self._skips = False
        optimizer = owners[-1]
        apply_gradients, update = optimizer._backend_apply_gradients, optimizer._backend_update_step
        decay = optimizer._apply_weight_decay

        def apply_with_policy(grads: Any, trainable_variables: Any) -> None:
            self._variables = list(trainable_variables)
            apply_gradients(grads, trainable_variables)

        def update_unless_skipped(*args: Any, **kwargs: Any) -> None:
            if not self._skips:
                update(*args, **kwargs)

        def decay_unless_skipped(*args: Any, **kwargs: Any) -> None:
            if not self._skips:
                decay(*args, **kwargs)

        self._patches.replace(optimizer, "_backend_apply_gradients", apply_with_policy)
        self._patches.replace(optimizer, "_clip_gradients", self._clip)
        self._patches.replace(optimizer, "_apply_weight_decay", decay_unless_skipped)
        self._patches.replace(optimizer, "_backend_update_step", update_unless_skipped)

    def state_dict(self) -> dict[str, Any]:
        """Return the clipper's state, or the state that was loaded for it. Collectives: none."""
        return self._pending_state if self._clipper is None else self._clipper.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the clipper's state, now or in the first update. Collectives: none.

        Raises:
            ArgumentError: see `GradClipper.load_state_dict`.
        """
        self._pending_state = state_dict
        super().load_state_dict(state_dict)

    def _clip(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """Clip in place, and return the gradients. This replaces the optimizer's method."""
        clipper = self._bound()
        params = [variable.value for variable in self._variables]
        # Accumulated gradients and those of a custom loop are not in `.grad`.
        before = [param.grad for param in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else grad.detach()
        try:
            self._report = clipper.clip()
            self._skips = bool(self._report.skipped)
            return list(grads) if self._skips else [param.grad for param in params]
        finally:
            for param, grad in zip(params, before, strict=True):
                param.grad = grad

    def _bound(self) -> GradClipper:
        if self._clipper is None:
            variables = self._owners[-1]._trainable_variables
            comm = self._options["comm"] or world_comm()
            pairs = [(variable.path, variable.value) for variable in variables]
            self._clipper = GradClipper(pairs, self._policy, **{**self._options, "comm": comm})
            if self._pending_state:
                self._clipper.load_state_dict(self._pending_state)
        return self._clipper
