"""`attach`: a clipper and an engine of DeepSpeed, held together until `detach`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ...extend import (
    ArgumentError,
    FirstError,
    GradClipper,
    OnNonFinite,
    Outcome,
    Policy,
    Report,
    gather_or_raise,
    world_comm,
)
from ..monkeypatch import Patches
from .adapter import Hold, Piece
from .bf16 import BF16
from .stage_0 import HalfPrecision, SinglePrecision
from .stage_1_2 import Stage12
from .stage_3 import Stage3

__all__ = ["Attachment", "attach", "detach"]

_ATTRIBUTE = "_distclip_attachment"

_HOLDS: dict[str, type[Hold]] = {
    "DeepSpeedZeroOptimizer_Stage3": Stage3,
    "DeepSpeedZeroOptimizer": Stage12,
    "BF16_Optimizer": BF16,
    "FP16_Optimizer": HalfPrecision,
    "FP16_UnfusedOptimizer": HalfPrecision,
    "Optimizer": SinglePrecision,
}
"""By the name of the class, or of one that it derives from: DeepSpeed is not imported to find out."""


def attach(
    engine: Any,
    policy: Policy | GradClipper,
    *,
    on_nonfinite: OnNonFinite | None = None,
    max_skips: int | None = None,
) -> Attachment:
    """Let `engine.step()` use distclip's norm, policy and non-finite decision in place of DeepSpeed's own.

    Works with ZeRO stage 0, 1, 2 and 3 in float32, bfloat16 and float16, gradient accumulation, an optimizer on the
    CPU, and DeepSpeed's experts; a policy per tensor or row sees whole parameters, wherever partitions cut them. The
    `gradient_clipping` of the engine's config is left out of account. `engine.get_global_grad_norm()` is the norm
    before clipping, free of the loss scale. A step that is left out counts in `engine.skipped_steps` and holds the
    engine's learning-rate scheduler; only one that is not finite makes the loss scale back off.

    Args:
        engine: what `deepspeed.initialize` returned, with an optimizer.
        policy: what to do, for example `distclip.global_norm(1.0)`. Or a clipper, with its policy, rule and memory: it
            is bound to the engine's gradients from now on.
        on_nonfinite: see `GradClipper`; "skip" if not given. With float16 such steps are the loss scaler's way to find
            its scale: they are skipped and counted, without a warning.
        max_skips: see `GradClipper`.

    Returns:
        What has the clipper and, after each step, its report.

    Raises:
        ArgumentError: an engine that has no optimizer, is attached already, or has an optimizer that keeps its
            gradients where distclip does not know them; a rule beside a clipper that has its own. In a step: see
            `GradClipper.clip`. On every rank.

    Collectives: call it on every rank; two gathers. In a step one all-reduce of (slots + 1) float64 numbers, in place
    of those of DeepSpeed's norm and overflow check. Host syncs: one in a step, as DeepSpeed has.
    """
    attempt = FirstError()
    attempt.run(_check, engine, policy, on_nonfinite, max_skips)
    own = policy.policy if isinstance(policy, GradClipper) else policy
    hold = attempt.run(lambda: _held(engine, own.spec.needs_weights))
    everybody = world_comm()
    gather_or_raise(everybody, attempt.error, None)
    assert hold is not None
    named = [(piece.name, piece.tensor) for piece in hold.pieces]
    if isinstance(policy, GradClipper):
        policy.rebind(named, split_over=hold.ranks.split_over, comm=everybody)
        clipper = policy
    else:
        clipper = GradClipper(
            named,
            policy,
            split_over=hold.ranks.split_over,
            comm=everybody,
            on_nonfinite=on_nonfinite or "skip",
            max_skips=max_skips,
        )
    attachment = Attachment(engine, clipper, hold)
    setattr(engine, _ATTRIBUTE, attachment)
    return attachment


def detach(engine: Any) -> None:
    """Give an engine back: from its next step on it clips as its own config says.

    Raises:
        ArgumentError: nothing is attached to it.
    """
    attachment = getattr(engine, _ATTRIBUTE, None)
    if not isinstance(attachment, Attachment):
        raise ArgumentError("detach: nothing is attached to this engine.")
    attachment.detach()


class Attachment:
    """An engine and the clipper that decides its steps: what `attach` returns.

    Args:
        engine: of DeepSpeed.
        clipper: over the pieces of `hold`.
        hold: where the engine's optimizer is taken hold of.
    """

    def __init__(self, engine: Any, clipper: GradClipper, hold: Hold) -> None:
        self.clipper = clipper
        self.report: Report | None = None
        """Of the last step; None before the first."""
        self.held = tuple(piece.name for piece in hold.pieces)
        """The parameters of which this rank holds a piece."""
        self._engine, self._hold = engine, hold
        self._decision: Outcome | None = None
        self._patches = Patches()
        hold.take(self._patches, self._decide, self._write)
        optimizer = engine.optimizer
        its_step = optimizer.step

        @wraps(its_step)
        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            return self._step(its_step, *args, **kwargs)

        # A method that carries what they have noted on it, as torch's learning-rate schedulers expect.
        self._patches.put(optimizer, "step", MethodType(step, optimizer))
        if hasattr(optimizer, "_update_scale"):
            self._patches.put(optimizer, "_update_scale", partial(self._update_scale, optimizer._update_scale))

    def gradients(self) -> dict[str, Tensor]:
        """This rank's pieces of the gradients as they are, by parameter name, to be read or written.

        After the backward pass of the last micro-batch, before the step; multiplied by the loss scale. Slices of
        flattened parameters are 1-D, of any floating dtype. Collectives: none. Host syncs: none.
        """
        self._hold.look()
        found = {piece.name: piece.tensor.main_grad for piece in self._hold.pieces}  # type: ignore[attr-defined]
        self._hold.let_go()
        return {name: grad for name, grad in found.items() if grad is not None}

    def detach(self) -> None:
        """See `detach`."""
        self._patches.restore()
        self._hold.let_go()
        if getattr(self._engine, _ATTRIBUTE, None) is self:
            delattr(self._engine, _ATTRIBUTE)

    @torch.no_grad()
    def _decide(self) -> Outcome:
        attempt = FirstError()
        attempt.run(self._hold.look)
        decision = self.clipper.decide(self._hold.loss_scale, attempt)
        self.report = decision.report()
        # DeepSpeed frees gradients group by group in its step: nothing here may keep them alive.
        self._decision = decision.without_gradients()
        self._hold.let_go()
        return self._decision

    def _write(self, pieces: Sequence[Piece], grads: Sequence[Tensor]) -> None:
        assert self._decision is not None
        self.clipper.write_(self._decision, [piece.index for piece in pieces], grads)

    def _step(self, its_step: Any, *args: Any, **kwargs: Any) -> Any:
        """A step, and its norm where the engine looks for it."""
        self._decision = None
        result = its_step(*args, **kwargs)
        if self.report is not None:
            self._engine.optimizer._global_grad_norm = self.report.norm
        self._decision = None
        return result

    def _update_scale(self, its_own: Any, skipped: bool) -> None:
        """A step that the policy leaves out says nothing about the loss scale."""
        decision = self._decision
        its_own(decision.overflow.read() if skipped and decision is not None else skipped)


def _held(engine: Any, weights: bool) -> Hold:
    """Its optimizer.

    Raises:
        ArgumentError: nobody knows.
    """
    optimizer = engine.optimizer
    kind = next((_HOLDS[c.__name__] for c in type(optimizer).__mro__ if c.__name__ in _HOLDS), None)
    for unknown, is_so in (
        (f"an optimizer of class {type(optimizer).__name__}", kind is None),
        ("a pipeline", bool(getattr(engine, "pipeline_parallelism", False))),
        ("ZenFlow", bool(getattr(optimizer, "zenflow", False))),
        ("Muon", bool(getattr(optimizer, "use_muon", False) or getattr(optimizer, "_uses_muon", False))),
        ("an optimizer on NVMe", bool(getattr(optimizer, "swap_optimizer", False))),
        (
            "float16 torch_autocast",
            getattr(optimizer, "torch_autocast_gradscaler", None) is not None
            or getattr(engine, "torch_autocast_z0_gradscaler", None) is not None,
        ),
        (
            "legacy fusion",
            bool(getattr(optimizer, "fused_adam_legacy", False) or getattr(optimizer, "fused_lamb_legacy", False)),
        ),
    ):
        if is_so:
            raise ArgumentError(
                f"attach: the engine has {unknown}, and where that keeps its gradients is not known here. Leave it "
                "out, or write gradient_clipping into DeepSpeed's config instead of attach."
            )
    assert kind is not None
    return kind(engine, weights)


def _check(engine: Any, policy: Any, on_nonfinite: Any, max_skips: Any) -> None:
    if not (hasattr(engine, "optimizer") and hasattr(engine, "module") and hasattr(engine, "get_global_grad_norm")):
        raise ArgumentError(
            f"engine={type(engine).__name__}: expected what deepspeed.initialize returned first. "
            "Write engine, *_ = deepspeed.initialize(…); attach(engine, policy)."
        )
    if not hasattr(engine.optimizer, "step") or not hasattr(engine.optimizer, "param_groups"):
        raise ArgumentError("attach: the engine has no optimizer to step. Give deepspeed.initialize one.")
    if getattr(engine, _ATTRIBUTE, None) is not None:
        raise ArgumentError("attach: the engine has a policy already. Write detach(engine) first.")
    if isinstance(policy, GradClipper) and (on_nonfinite is not None or max_skips is not None):
        raise ArgumentError(
            "attach: a clipper has its own on_nonfinite and max_skips. Write them where it is constructed."
        )
