"""Clip in Lightning's Trainer by a callback. Importing this module imports Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...extend import (
    ArgumentError,
    FirstError,
    GradClipper,
    LocalComm,
    OnNonFinite,
    Policy,
    Report,
    SplitOver,
    gather_or_raise,
    name_tensors,
    world_comm,
)
from ..attachment import check_policy
from ..deferred import DeferredClipper, OnBind, find_ids

if TYPE_CHECKING:
    # Both of Lightning's packages have a class Callback. Type checkers see that of `lightning`.
    from lightning.pytorch import Callback
else:
    from .base_callback import Callback

__all__ = ["GradientClipping"]


class GradientClipping(Callback):  # type: ignore[misc, unused-ignore]
    """Clip between the backward pass and the step of Lightning's Trainer.

    It works under any strategy and precision plugin except DeepSpeed's.

    ::

        from distclip.integrations.lightning import GradientClipping

        trainer = Trainer(strategy=FSDPStrategy(), callbacks=[GradientClipping(distclip.global_norm(1.0))])

    It logs `grad/norm` (before clipping, without the loss scale), `grad/coef`, `grad/clipped` and `grad/skipped` at
    every step. Its state is in the Trainer's checkpoints. With several optimizers (manual optimization) each has its
    own clipper over the parameters that it steps. A skipped step sets the gradients to None, so that parameters and
    optimizer stay unchanged. The Trainer and its schedulers count a skipped step.

    Args:
        policy: the policy, for example `distclip.global_norm(1.0)`.
        on_nonfinite: see `GradClipper`. A GradScaler finds its scale by non-finite steps, so if there is one, such
            steps are skipped and counted without a warning under any rule.
        max_skips: see `GradClipper`.
        split_over: see `GradClipper`.
        on_bind: called on every rank with each clipper when training starts, for example
            `lambda clipper: distclip.monitor.Recorder(clipper, "runs/one")`. Each step of this Recorder gets the loss
            of the last batch before it, the learning rate, and the batch's "ids" (or "id", "idx", "index"), if the
            batch is a dictionary with one of these keys.
        log: prefix of the names of the logged numbers. None logs nothing.

    Raises:
        ArgumentError: `policy` is not a policy. When training starts: the Trainer clips too, or uses DeepSpeed. Raised
            on every rank. In a step: see `GradClipper.clip`.

    Collectives: when training starts, a gather, and those of `GradClipper` for each optimizer. In a step, those of
    `GradClipper.clip` over all ranks of the Trainer: one all-reduce of a few float64 numbers, under DDP too. Host
    syncs: those of `GradClipper.clip`, and the reads of the Trainer's loggers.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        on_nonfinite: OnNonFinite = "skip",
        max_skips: int | None = None,
        split_over: SplitOver = None,
        on_bind: OnBind | None = None,
        log: str | None = "grad/",
    ) -> None:
        check_policy(policy, "GradientClipping")
        # Not a lambda, because strategies that start processes pickle the Trainer.
        self._make_deferred: Callable[[], DeferredClipper] = partial(
            DeferredClipper, policy, split_over, on_nonfinite, max_skips, on_bind
        )
        self._log = log
        # There is one per optimizer, and one before that, because the Trainer loads a checkpoint before it has
        # optimizers.
        self._deferred: list[DeferredClipper] = [self._make_deferred()]
        self._last_index = 0
        self._had_backward = False
        self._stepped: list[DeferredClipper] = []
        """Clippers of the optimizers that stepped in this batch."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the arguments and the clippers' states."""
        # The Trainer sets these methods of the module on its callbacks.
        return {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}

    @property
    def clipper(self) -> GradClipper | None:
        """Clipper of the first optimizer, or None before training starts."""
        return self._deferred[0].clipper

    @property
    def clippers(self) -> list[GradClipper | None]:
        """Clipper of each optimizer."""
        return [deferred.clipper for deferred in self._deferred]

    @property
    def report(self) -> Report | Any:
        """Report of the last step, or None before the first step."""
        return self._deferred[self._last_index].report

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        return "distclip.GradientClipping"

    def state_dict(self) -> dict[str, Any]:
        """Return the clippers' states by the index of their optimizer. Collectives: none."""
        return {str(i): deferred.state_dict() for i, deferred in enumerate(self._deferred)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the clippers' states. The Trainer calls it."""
        for i in range(len(state_dict)):
            self._deferred_at(i).load_state_dict(state_dict[str(i)])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Bind a clipper to the parameters of each optimizer."""
        errors = FirstError()
        with errors:
            _check(trainer)
        # A submodule of DistributedDataParallel does not show that it is replicated, so all ranks are passed here.
        comm = world_comm() if trainer.world_size > 1 else None
        gather_or_raise(comm or LocalComm(), errors.error, None)
        module = trainer.strategy.model
        params = name_tensors(module)
        for i, optimizer in enumerate(trainer.optimizers):
            stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
            steps_all = all(id(param) in stepped for _, param in params if param.requires_grad)
            # Only the module has the layouts of FSDP1, so it is passed instead of its parameters if possible.
            subset = [(name, param) for name, param in params if id(param) in stepped]
            self._deferred_at(i).bind(module if steps_all else subset, comm)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Note that the next step has gradients."""
        self._had_backward = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Clip the parameters that this optimizer steps next."""
        self._last_index = [id(known) for known in trainer.optimizers].index(id(optimizer))
        # If `training_step` has returned None, the precision plugin will not call its scaler.
        scaler = getattr(trainer.precision_plugin, "scaler", None) if self._had_backward else None
        self._had_backward = False
        deferred = self._deferred[self._last_index]
        report = deferred.clip(optimizer, scaler)
        # A scheduler changes the learning rate before the batch ends.
        deferred.note(optimizer)
        self._stepped.append(deferred)
        if self._log is not None:
            prefix = self._log if len(self._deferred) == 1 else f"{self._log}{self._last_index}/"
            numbers = {"norm": report.norm, "coef": report.coef, "clipped": report.clipped, "skipped": report.skipped}
            # Without a batch size, Lightning would look for it in the batch, and some batches raise. Steps have equal
            # weights.
            values = {f"{prefix}{name}": number.float() for name, number in numbers.items()}
            pl_module.log_dict(values, batch_size=1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the loss and the sample ids of a batch, if there is a Recorder."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # The Trainer has divided it by the number of batches per step.
            loss = loss.detach() * trainer.accumulate_grad_batches
        else:
            loss = None
        for deferred in self._stepped:
            deferred.note(loss=loss, ids=find_ids(batch))
        self._stepped.clear()

    def _deferred_at(self, i: int) -> DeferredClipper:
        while len(self._deferred) <= i:
            self._deferred.append(self._make_deferred())
        return self._deferred[i]


def _check(trainer: Any) -> None:
    if trainer.gradient_clip_val:
        raise ArgumentError(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}): together with GradientClipping, gradients would "
            "be clipped twice. Remove gradient_clip_val. For that bound use GradientClipping(distclip.global_norm("
            f"{trainer.gradient_clip_val}))."
        )
    if hasattr(trainer.strategy, "deepspeed_engine"):
        raise ArgumentError(
            "GradientClipping: a DeepSpeed engine clips inside its own step. In on_train_start call "
            "distclip.integrations.deepspeed.attach(trainer.strategy.deepspeed_engine, policy) instead."
        )
