"""Clip under torchft, so that replica groups that fail and come back keep the same policy state as the others.

::

    import torch
    from distclip import ema
    from distclip.integrations.torchft import attach

    def make_optimizer(manager, model):
        from torchft import Optimizer

        optimizer = Optimizer(manager, torch.optim.AdamW(model.parameters()))
        attach(optimizer, ema(), model)
        return optimizer

The loop stays as it is: `optimizer.zero_grad()`, backward, `optimizer.step()`. torchft averages the gradients over the
replica groups of the quorum. Every group then has the same gradients and decides by itself. Only the ranks within a
group communicate, so the quorum may change at any step.

`optimizer.step()` first asks the manager whether the step takes place. Then it decides, steps, and keeps the policy's
state. If the manager declines the step, nothing changes. A group that heals gets the policy's state together with the
weights, before it decides. Without this order, a policy's state includes steps that were never made. In torchft 0.2
with `clipper.clip()` before `optimizer.step()`, the coefficients of replicas drift apart after the first step that
fails.

Tested with torchft 0.2 on CPUs: `python tests/integrations/torchft/kills.py` kills replicas at random.
"""

from __future__ import annotations

import warnings
from functools import wraps
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..extend import (
    ArgumentError,
    Comm,
    GradClipper,
    OnNonFinite,
    Parameters,
    Policy,
    SplitOver,
)
from . import attachment as base
from .attachment import check_not_attached, check_policy, detach

__all__ = ["Attachment", "attach", "detach"]


def attach(
    optimizer: Any,
    policy: Policy | GradClipper,
    parameters: Parameters | None = None,
    *,
    on_nonfinite: OnNonFinite = "skip",
    max_skips: int | None = None,
    split_over: SplitOver = None,
    comm: Comm | None = None,
    key: str = "distclip",
) -> Attachment:
    """Clip in every step that the manager of a torchft optimizer commits.

    Call it on every rank of every replica group, before the first `optimizer.zero_grad()`. A replica that heals loads
    the policy's state with the manager's other state, so it must have the same attachments.

    Args:
        optimizer: `torchft.Optimizer(manager, optimizer)`.
        policy: for example `distclip.ema()`, or the caller's clipper.
        parameters: see `GradClipper`. Of torchft's DistributedDataParallel, the model inside is used. None for the
            parameters of the optimizer, which have no names. With a policy per tensor, row or group, pass the model.
            Ignored for a clipper.
        on_nonfinite, max_skips, split_over: see `GradClipper`. Ignored for a clipper.
        comm: the ranks of this replica group. None to find them as `GradClipper` does. Ignored for a clipper.
        key: name of the policy's state in the manager's state. Optimizers with the same manager need different keys.

    Returns:
        The attachment, with the clipper and the report of the last committed step. It is `optimizer.distclip` too.

    Raises:
        ArgumentError: `optimizer` is no optimizer of torchft or has a policy already; `policy` is no policy; `key` is
            taken. In a step: a closure was passed. Otherwise see `GradClipper.step`.

    Collectives: those of `GradClipper` here, and those of `GradClipper.step` in a committed step, within the replica
    group. Host syncs: those of `GradClipper.step`.
    """
    if not all(hasattr(optimizer, name) for name in ("manager", "optim", "param_groups")):
        raise ArgumentError(
            f"attach: optimizer={optimizer!r:.80}: not an optimizer of torchft. Pass torchft.Optimizer(manager, "
            "optimizer)."
        )
    if not isinstance(policy, GradClipper):
        check_policy(policy, "attach")
    check_not_attached(optimizer)
    manager = optimizer.manager
    if key in manager._user_state_dicts:
        raise ArgumentError(
            f"attach: key={key!r}: the manager has a state of this name already. Pass another key for each optimizer."
        )
    if isinstance(policy, GradClipper):
        clipper = policy
    else:
        clipper = GradClipper(
            _parameters_of(optimizer, parameters),
            policy,
            split_over=split_over,
            comm=comm,
            on_nonfinite=on_nonfinite,
            max_skips=max_skips,
        )
    return Attachment(optimizer, clipper, key)


class Attachment(base.Attachment):
    """A policy that clips or skips the committed steps of a torchft optimizer.

    Args:
        optimizer: the optimizer of torchft.
        clipper: the clipper of its parameters, within the replica group.
        key: see `attach`.
    """

    def __init__(self, optimizer: Any, clipper: GradClipper, key: str) -> None:
        super().__init__([optimizer], clipper)
        self._optimizer, self._manager, self._key = optimizer, optimizer.manager, key
        self._is_short = False
        original = optimizer.step

        @wraps(original)
        def step(_: Any, closure: Any = None) -> None:
            self._step(closure)

        self._patches.replace(optimizer, "step", MethodType(step, optimizer))
        self._manager.register_state_dict_fn(key, self.load_state_dict, self.state_dict)

    def detach(self) -> None:
        """Restore torchft's own step, and remove the policy's state from the manager's."""
        super().detach()
        for states in (self._manager._user_state_dicts, self._manager._load_state_dict_fns):
            states.pop(self._key, None)

    def _step(self, closure: Any) -> None:
        if closure is not None:
            raise ArgumentError("step: torchft's optimizers take no closure. Call optimizer.step() after backward.")
        clipper, manager = self._clipper, self._manager
        assert clipper is not None
        # The manager heals in this call, and the policy must decide from the state that was loaded.
        if manager.should_commit():
            self._is_short = False
            self._report = clipper.step(self._optimizer.optim)
            return
        num_replicas, needed = manager.num_participants(), manager._min_replica_size
        if num_replicas < needed and not self._is_short:
            self._is_short = True
            warnings.warn(
                f"torchft: the quorum has {num_replicas} replica{'s' * (num_replicas != 1)}, and min_replica_size="
                f"{needed}, so that no step is made. Start more replicas, or use a smaller min_replica_size.",
                RuntimeWarning,
                stacklevel=3,
            )


def _parameters_of(optimizer: Any, parameters: Parameters | None) -> Parameters:
    """Return the parameters to clip."""
    if parameters is None:
        return [param for group in optimizer.param_groups for param in group["params"]]
    if isinstance(parameters, DistributedDataParallel):
        # torchft's class has a process group that torch.distributed does not have.
        module: nn.Module = parameters.module
        return module
    return parameters
