"""Attach a policy to a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...extend import ArgumentError, FirstError, GradClipper, OnNonFinite, Policy, gather_or_raise, world_comm
from .. import attachment as base
from ..attachment import bind, check_not_attached, check_policy
from .adapter import Adapter, Piece
from .bf16 import BF16
from .stage_0 import HalfPrecision, SinglePrecision
from .stage_1_2 import Stages12
from .stage_3 import Stage3

if TYPE_CHECKING:
    from .foreign import Engine

__all__ = ["Attachment", "attach"]

_ADAPTERS: dict[str, type[Adapter]] = {
    "DeepSpeedZeroOptimizer_Stage3": Stage3,
    "DeepSpeedZeroOptimizer": Stages12,
    "BF16_Optimizer": BF16,
    "FP16_Optimizer": HalfPrecision,
    "FP16_UnfusedOptimizer": HalfPrecision,
    "Optimizer": SinglePrecision,
}
"""Adapter by the name of the optimizer's class or of a base class. Names do not require importing DeepSpeed."""


def attach(
    engine: Any,
    policy: Policy | GradClipper,
    *,
    on_nonfinite: OnNonFinite | None = None,
    max_skips: int | None = None,
) -> Attachment:
    """Replace DeepSpeed's own clipping in `engine.step()` by a policy.

    Works with ZeRO stages 0 to 3 in float32, bfloat16 and float16, gradient accumulation, an optimizer on the CPU, and
    DeepSpeed's experts. A policy per tensor or row gets whole parameters, wherever partitions cut them. The
    `gradient_clipping` of the engine's config is ignored. `engine.get_global_grad_norm()` is the norm before clipping,
    without the loss scale. A skipped step counts in `engine.skipped_steps`, and the engine's learning-rate scheduler
    does not step. The loss scale backs off only if the step is non-finite.

    Args:
        engine: the engine that `deepspeed.initialize` returned, with an optimizer.
        policy: the policy, for example `distclip.global_norm(1.0)`. Or a clipper, which keeps its policy, rules and
            state and is rebound to the engine's gradients.
        on_nonfinite: see `GradClipper`; "skip" by default. With float16, the loss scaler finds its scale by non-finite
            steps, so they are skipped and counted without a warning.
        max_skips: see `GradClipper`.

    Returns:
        The attachment, with the clipper and the report of each step. It is `engine.distclip` too.

    Raises:
        ArgumentError: the engine has no optimizer, is attached already, or has an optimizer that distclip does not
            know; or a clipper was passed together with `on_nonfinite` or `max_skips`. Raised on every rank. In a step:
            see `GradClipper.clip`.

    Collectives: gathers and all-reduces, so call it on every rank. A step has one all-reduce of a few float64 numbers,
    instead of those of DeepSpeed's norm and overflow check. Host syncs: one per step, as in DeepSpeed.
    """
    comm, errors = world_comm(), FirstError()
    adapter: Adapter | None = None
    with errors:
        _check(engine, policy, on_nonfinite, max_skips)
        adapter = _make_adapter(engine, policy.policy if isinstance(policy, GradClipper) else policy)
    slices = gather_or_raise(comm, errors.error, [] if adapter is None else adapter.slices)
    assert adapter is not None
    adapter.declare_replicas(slices)
    params = [(piece.name, piece.stand_in) for piece in adapter.pieces]
    clipper = bind(policy, params, adapter.topology.split_over, comm, on_nonfinite or "skip", max_skips)
    return Attachment(engine, clipper, adapter)


class Attachment(base.Attachment):
    """A policy that clips or skips the steps of an engine.

    Args:
        engine: the engine.
        clipper: a clipper over the pieces of `adapter`.
        adapter: the adapter of the engine's optimizer.
    """

    def __init__(self, engine: Engine, clipper: GradClipper, adapter: Adapter) -> None:
        super().__init__([engine], clipper)
        self._adapter = adapter
        self.held = tuple(piece.name for piece in adapter.pieces)
        """Names of the parameters that this rank has a piece of."""
        optimizer = engine.optimizer
        adapter.install(self._patches, self._measure, self._write_pieces)
        optimizer_step = optimizer.step

        @wraps(optimizer_step)
        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            self._outcome = None
            result = optimizer_step(*args, **kwargs)
            if self.report is not None:
                # `engine.get_global_grad_norm()` reads the norm here.
                optimizer._global_grad_norm = self.report.norm
            self._outcome = None
            return result

        # torch's learning-rate schedulers expect a method, and read attributes that they have set on it.
        self._patches.replace(optimizer, "step", MethodType(step, optimizer))
        if hasattr(optimizer, "_update_scale"):
            update_scale = optimizer._update_scale
            # A finite step that the policy skips must not move the loss scale.
            self._patches.replace(optimizer, "_update_scale", lambda skip: update_scale(self._backs_off(skip)))

    @property
    def clipper(self) -> GradClipper:
        """Clipper over this rank's pieces of the parameters."""
        assert self._clipper is not None
        return self._clipper

    def gradients(self) -> dict[str, Tensor]:
        """Return this rank's pieces of the current gradients by parameter name, to read or write.

        Call it after the backward pass of the last micro-batch and before the step. The gradients carry the loss scale,
        and have any floating dtype. Slices of flattened parameters are 1-D. Collectives: none. Host syncs: none.
        """
        self._adapter.attach_grads()
        grads = {piece.name: piece.stand_in.main_grad for piece in self._adapter.pieces}  # type: ignore[attr-defined]
        self._adapter.drop_grads()
        return {name: grad for name, grad in grads.items() if grad is not None}

    def detach(self) -> None:
        """Restore DeepSpeed's own clipping, which follows the engine's config."""
        super().detach()
        self._adapter.drop_grads()

    def _measure(self) -> bool:
        errors = FirstError()
        with errors:
            self._adapter.attach_grads()
        skip = self._decide(errors, self._adapter.loss_scale)
        self._adapter.drop_grads()
        return skip

    def _write_pieces(self, pieces: Sequence[Piece], grads: Sequence[Tensor]) -> None:
        self._write([piece.index for piece in pieces], grads)

    def _backs_off(self, skip: bool) -> bool:
        return self._overflowed() if skip and self._outcome is not None else skip


def _make_adapter(engine: Any, policy: Policy) -> Adapter:
    """Return the adapter of an engine's optimizer.

    Raises:
        ArgumentError: there is none.
    """
    optimizer = engine.optimizer
    adapter = next((_ADAPTERS[c.__name__] for c in type(optimizer).__mro__ if c.__name__ in _ADAPTERS), None)
    for feature, present in (
        (f"an optimizer of class {type(optimizer).__name__}", adapter is None),
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
        if present:
            raise ArgumentError(
                f"attach: the engine has {feature}, which keeps gradients where distclip cannot find them. Turn it off "
                "in the engine's config, or set gradient_clipping there instead of calling attach."
            )
    assert adapter is not None
    return adapter(engine, policy.spec.needs_weights)


def _check(engine: Any, policy: Any, on_nonfinite: Any, max_skips: Any) -> None:
    if not (hasattr(engine, "optimizer") and hasattr(engine, "module") and hasattr(engine, "get_global_grad_norm")):
        raise ArgumentError(
            f"engine={type(engine).__name__}: expected the engine that deepspeed.initialize returns first. "
            "Call engine, *_ = deepspeed.initialize(…), and attach(engine, policy)."
        )
    if not hasattr(engine.optimizer, "step") or not hasattr(engine.optimizer, "param_groups"):
        raise ArgumentError("attach: the engine has no optimizer to step. Pass one to deepspeed.initialize.")
    check_not_attached(engine)
    if not isinstance(policy, GradClipper):
        check_policy(policy, "attach")
    elif on_nonfinite is not None or max_skips is not None:
        raise ArgumentError(
            "attach: a clipper has its own on_nonfinite and max_skips. Pass them where it is constructed."
        )
