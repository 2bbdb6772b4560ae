"""`GradientClipping`, for Lightning's Trainer: importing this imports Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...extend import (
    ArgumentError,
    FirstError,
    LocalComm,
    OnNonFinite,
    Policy,
    Report,
    SplitOver,
    gather_or_raise,
    named,
    world_comm,
)
from ..deferred import Late, OnBind, check_policy

if TYPE_CHECKING:
    # The same class, whichever of its two packages is installed.
    class Callback: ...
else:
    from .installed import Callback

__all__ = ["GradientClipping"]


class GradientClipping(Callback):
    """Clips between backward and step, under any strategy and precision plugin of the Trainer but DeepSpeed's.

    ::

        from distclip.integrations.lightning import GradientClipping

        trainer = Trainer(strategy=FSDPStrategy(), callbacks=[GradientClipping(distclip.global_norm(1.0))])

    It logs `grad/norm` (before clipping, free of the loss scale), `grad/coef`, `grad/clipped` and `grad/skipped` at
    every step; its memory is in the Trainer's checkpoints. With several optimizers (manual optimization) each has a
    clipper of its own, over what it steps. A step that is skipped loses its gradients, so that it leaves parameters and
    optimizer as they are; the Trainer counts it, and so do schedulers.

    Args:
        policy: what to do, for example `distclip.global_norm(1.0)`.
        on_nonfinite: see `GradClipper`. With a GradScaler such steps are its way to find the scale: they are skipped
            and counted, without a warning, under any of the four.
        max_skips: see `GradClipper`.
        split_over: see `GradClipper`.
        on_bind: called on every rank with each clipper when training starts, for example
            `lambda clipper: distclip.monitor.Recorder(clipper, "runs/one")`.
        log: what the names of the logged numbers begin with; None to log nothing.

    Raises:
        ArgumentError: no policy. When training starts: a Trainer that clips too, or under DeepSpeed. In a step: see
            `GradClipper.clip`. On every rank.

    Collectives: when training starts a gather, and for each optimizer those of `GradClipper`; in a step those of
    `GradClipper.clip`, over all ranks of the Trainer: one all-reduce of (slots + 1) float64 numbers, under DDP too.
    Host syncs: the same, and what the Trainer's loggers read.
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
        self._new: Callable[[], Late] = lambda: Late(policy, split_over, on_nonfinite, max_skips, on_bind)
        self._log = log
        self._lates: list[Late] = [self._new()]
        self._last = self._lates[0]
        self._backward = False

    @property
    def clipper(self) -> Any:
        """The GradClipper of the first optimizer, from when training has started; None before."""
        return self._lates[0].clipper

    @property
    def clippers(self) -> list[Any]:
        """One for each optimizer."""
        return [late.clipper for late in self._lates]

    @property
    def report(self) -> Report | None:
        """Of the last step; None before the first."""
        return self._last.report

    @property
    def state_key(self) -> str:
        """Under which the memory is found in a checkpoint."""
        return "distclip.GradientClipping"

    def state_dict(self) -> dict[str, Any]:
        """What the clippers remember, by the place of their optimizer. Collectives: none."""
        return {str(i): late.state_dict() for i, late in enumerate(self._lates)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where it was saved; called by the Trainer."""
        for i in range(len(state_dict)):
            self._late(i).load_state_dict(state_dict[str(i)])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find out who holds what."""
        attempt = FirstError()
        attempt.run(_check, trainer)
        # A part of a module in DistributedDataParallel does not know whose copy it is.
        comm = world_comm() if trainer.world_size > 1 else None
        gather_or_raise(comm or LocalComm(), attempt.error, None)
        for i, optimizer in enumerate(trainer.optimizers):
            stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
            pairs = named(trainer.strategy.model)
            everything = all(id(param) in stepped for _, param in pairs if param.requires_grad)
            # What FSDP1 has cut, the module alone can tell.
            whole = trainer.strategy.model
            self._late(i).bind(whole if everything else [p for p in pairs if id(p[1]) in stepped], comm)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """There will be something to step."""
        self._backward = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Clip what this optimizer is about to step."""
        self._last = self._lates[[id(one) for one in trainer.optimizers].index(id(optimizer))]
        # Where `training_step` has returned None, the precision plugin is not going to ask its scaler.
        scaler = getattr(trainer.precision_plugin, "scaler", None) if self._backward else None
        self._backward = False
        report = self._last.clip(optimizer, scaler)
        if self._log is not None:
            prefix = self._log if len(self._lates) == 1 else f"{self._log}{self._lates.index(self._last)}/"
            numbers = {"norm": report.norm, "coef": report.coef, "clipped": report.clipped, "skipped": report.skipped}
            pl_module.log_dict({f"{prefix}{name}": number.float() for name, number in numbers.items()})

    def _late(self, i: int) -> Late:
        while len(self._lates) <= i:
            self._lates.append(self._new())
        return self._lates[i]


def _check(trainer: Any) -> None:
    if trainer.gradient_clip_val:
        raise ArgumentError(
            f"GradientClipping beside Trainer(gradient_clip_val={trainer.gradient_clip_val}): gradients would be "
            "clipped twice. Leave gradient_clip_val out; for that bound write GradientClipping(distclip.global_norm("
            f"{trainer.gradient_clip_val}))."
        )
    if hasattr(trainer.strategy, "deepspeed_engine"):
        raise ArgumentError(
            "GradientClipping under DeepSpeed: its engine clips inside of its own step. In on_train_start write "
            "distclip.integrations.deepspeed.attach(trainer.strategy.deepspeed_engine, policy) instead."
        )
