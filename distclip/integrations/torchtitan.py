"""Clip in torchtitan's Trainer by any policy, or replace its `clip_grad_norm_`.

To leave torchtitan's files as they are, write a separate module, here my_run.py::

    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    from distclip import zclip
    from distclip.integrations.torchtitan import clipped

    def llama3_zclip():
        return clipped(llama3_debugmodel(), zclip(cap=1.0))

Then run `torchrun ... -m torchtitan.train --module my_run --config llama3_zclip`, with any of torchtitan's options. If
the program constructs the Trainer itself, call `attach(trainer, zclip(cap=1.0))` afterwards.

For a fixed norm, a function with torchtitan's signature is enough::

    from torchtitan.distributed import utils as dist_utils

    from distclip.integrations.torchtitan import clip_grad_norm_

    dist_utils.clip_grad_norm_ = clip_grad_norm_  # before the Trainer runs; it reads the attribute at every step

Tested with torchtitan 0.3, whose debug model trains on CPUs in `tests/integrations/torchtitan`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import wraps
from importlib import import_module
from types import new_class
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor

from ..extend import ArgumentError, GradClipper, OnNonFinite, Policy, name_tensors
from ..extend import clip_grad_norm_ as _clip_grad_norm_
from . import attachment as base
from .attachment import check_not_attached, check_policy, detach
from .deferred import OnBind

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Attachment", "attach", "clip_grad_norm_", "clipped", "detach"]

ConfigT = TypeVar("ConfigT")

_KEY = "distclip"
"""Name of the policy's state in torchtitan's checkpoints."""


def clipped(
    config: ConfigT,
    policy: Policy,
    *,
    on_nonfinite: OnNonFinite = "skip",
    max_skips: int | None = None,
    on_bind: OnBind | None = None,
) -> ConfigT:
    """Return a copy of a torchtitan config whose Trainer clips by a policy.

    torchtitan's command line can change its fields as before.

    Args:
        config: the config of a Trainer, for example `llama3_debugmodel()`.
        policy, on_nonfinite, max_skips, on_bind: see `attach`.

    Returns:
        A config whose class derives from that of `config`. Its `build()` makes a Trainer, whose class derives from the
        Trainer class of `config`, and attaches the policy.

    Raises:
        ArgumentError: `config` is no config of a Trainer; `policy` is no policy.
    """
    check_policy(policy, "clipped")
    trainer_class = getattr(type(config), "_owner", None)
    if trainer_class is None or not hasattr(trainer_class, "train_step"):
        raise ArgumentError(
            f"clipped: config={config!r:.80}: not the config of a torchtitan Trainer. Pass "
            "torchtitan.models.llama3.config_registry.llama3_debugmodel(), for example."
        )
    # This is what a dataclass `class Config(type(config))` in a class body does.
    config_class: Any = dataclass(kw_only=True, slots=True)(new_class("Config", (type(config),)))

    def init(self: Any, config: Any) -> None:
        trainer_class.__init__(self, config)
        attach(self, policy, on_nonfinite=on_nonfinite, max_skips=max_skips, on_bind=on_bind)

    # The class body's "Config" makes torchtitan connect the two classes.
    members = {"Config": config_class, "__init__": init, "__doc__": "Trainer with a policy attached."}
    new_class(f"Clipped{trainer_class.__name__}", (trainer_class,), exec_body=lambda body: body.update(members))
    values: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(config)}  # type: ignore[arg-type]
    return cast(ConfigT, config_class(**values))


def attach(
    trainer: Any,
    policy: Policy,
    *,
    on_nonfinite: OnNonFinite = "skip",
    max_skips: int | None = None,
    on_bind: OnBind | None = None,
) -> Attachment:
    """Clip in a torchtitan Trainer by a policy.

    `training.max_norm` is ignored. `grad_norm` in the logs is distclip's norm before clipping, and the metrics also get
    `distclip/coef`, and `distclip/skipped`, the number of skipped steps so far. A skipped step leaves the model and the
    optimizers as they are, and counts as a step of the run and of the schedule. The policy's state is in torchtitan's
    checkpoints as "distclip". To load a checkpoint that was saved without it, pass
    `--checkpoint.exclude_from_loading distclip`.

    Args:
        trainer: a torchtitan Trainer, or one of a derived class, before `train` is called.
        policy: the policy, for example `distclip.zclip(cap=1.0)`.
        on_nonfinite, max_skips: see `GradClipper`.
        on_bind: called on every rank with the clipper, for example
            `lambda clipper: distclip.monitor.Recorder(clipper, "runs/one")`.

    Returns:
        The attachment, with the clipper and the report of each step. It is `trainer.distclip` too.

    Raises:
        ArgumentError: `trainer` is no Trainer of torchtitan, or has a policy already; `policy` is no policy. Otherwise
            see `GradClipper`.

    Collectives: those of `GradClipper` here. A step has those of `GradClipper.clip` instead of torchtitan's. Host
    syncs: those of `GradClipper.clip`.
    """
    if not all(hasattr(trainer, name) for name in ("train_step", "model_parts", "parallel_dims", "checkpointer")):
        raise ArgumentError(
            f"trainer={type(trainer).__name__}: not a Trainer of torchtitan ≥ 0.3 that is constructed. Use "
            "distclip.integrations.torchtitan.clipped(config, policy) for a config."
        )
    check_policy(policy, "attach")
    check_not_attached(trainer)
    clipper = GradClipper(
        [pair for part in trainer.model_parts for pair in name_tensors(part)],
        policy,
        split_over=trainer.parallel_dims.get_optional_mesh("pp"),
        on_nonfinite=on_nonfinite,
        max_skips=max_skips,
    )
    attachment = Attachment(trainer, clipper)
    if on_bind is not None:
        on_bind(clipper)
    return attachment


class Attachment(base.Attachment):
    """A policy that clips or skips the steps of a torchtitan Trainer.

    Args:
        trainer: the Trainer.
        clipper: the clipper of all its model parts.
    """

    def __init__(self, trainer: Any, clipper: GradClipper) -> None:
        super().__init__([trainer], clipper)
        self._trainer = trainer
        self._kept: list[tuple[Tensor, Tensor]] = []
        train_step, log = trainer.train_step, trainer.metrics_processor.log

        @wraps(train_step)
        def clip_in_step(*args: Any, **kwargs: Any) -> Any:
            # The step calls this module's function, and so do other Trainers of the process.
            module: Any = import_module("torchtitan.distributed.utils")
            original, module.clip_grad_norm_ = module.clip_grad_norm_, self._clip
            try:
                return train_step(*args, **kwargs)
            finally:
                module.clip_grad_norm_ = original
                for param, grad in self._kept:
                    param.grad = grad
                self._kept = []

        @wraps(log)
        def log_with_coef(*args: Any, **kwargs: Any) -> Any:
            if self.report is not None:
                own = {"distclip/coef": float(self.report.coef), "distclip/skipped": clipper.skipped}
                kwargs["extra_metrics"] = {**(kwargs.get("extra_metrics") or {}), **own}
            return log(*args, **kwargs)

        self._patches.replace(trainer, "train_step", clip_in_step)
        self._patches.replace(trainer.metrics_processor, "log", log_with_coef)
        if self._saves():
            trainer.checkpointer.states[_KEY] = self

    def detach(self) -> None:
        """Restore torchtitan's own clipping, and remove the policy's state from its checkpoints."""
        super().detach()
        if self._saves():
            self._trainer.checkpointer.states.pop(_KEY, None)

    def _saves(self) -> bool:
        # Without checkpoints, torchtitan's checkpointer has no states.
        return hasattr(self._trainer.checkpointer, "states")

    def _clip(self, parameters: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Clip instead of torchtitan's function. The clipper has the parameters, so the arguments are ignored."""
        assert self._clipper is not None
        grads: list[tuple[Tensor, Tensor]] = []
        if not self._trainer.config.training.disable_cuda_graphs:
            params = [param for part in self._trainer.model_parts for param in part.parameters()]
            grads = [(param, param.grad) for param in params if param.grad is not None]
        self._report = self._clipper.clip()
        # A CUDA graph of the backward pass writes into these gradients, and a skipped step drops them.
        self._kept = [(param, grad) for param, grad in grads if param.grad is None]
        return self._report.norm


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    pp_mesh: DeviceMesh | None = None,
    ep_enabled: bool = False,
) -> Tensor:
    r"""Clip the norm of the whole gradient of a model, with the signature of torchtitan 0.3.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{max\_norm}{\lVert g \rVert_p + 10^{-6}}\right)

    It is also correct where torchtitan's function raises, hangs or is wrong: plain parameters next to DTensors,
    DTensors on several meshes, one mesh with an "ep" axis, stages whose gradients differ in dtype, a rank of a stage
    without a gradient, fp16 gradients whose squares overflow, a parameter that is listed twice.

    Args:
        parameters: the parameters of this rank's stage, or of its model parts together. May be empty with `pp_mesh`.
        max_norm: see `distclip.clip_grad_norm_`.
        norm_type: see `distclip.clip_grad_norm_`.
        error_if_nonfinite: see `distclip.clip_grad_norm_`. Raises on the ranks of all stages.
        foreach: False scales gradients one by one. None and True use the fastest kernel.
        pp_mesh: the mesh of the pipeline stages. Pass it on every rank or on none.
        ep_enabled: ignored, because placements show which parameters are experts.

    Returns:
        The norm before clipping, 0-d, float32 or wider for any dtype of the gradients, the same bits on every rank.

    Raises, Collectives, Host syncs: see `distclip.clip_grad_norm_`, called with `split_over=pp_mesh`.

    Source: the signature is that of `torchtitan.distributed.utils.clip_grad_norm_`.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], max_norm=1.0, foreach=True)
    tensor(5.)
    >>> weight.grad
    tensor([0.6000, 0.8000])
    """
    # torchtitan's Trainer passes foreach=True for speed. For distclip it would mean torch's foreach kernels.
    foreach = None if foreach else foreach
    return _clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach, split_over=pp_mesh)
