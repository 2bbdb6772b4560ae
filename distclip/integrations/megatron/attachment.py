"""Attach a policy to an optimizer of Megatron-core."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from ...extend import ArgumentError, FirstError, GradClipper, OnNonFinite, Policy, gather_or_raise, world_comm
from .. import attachment as base
from ..attachment import bind, check_not_attached, check_policy
from .parameters import Groups, Piece, flatten_chain, layer_wise_in, names_of, pieces_of, share_names

if TYPE_CHECKING:
    from .foreign import LossScaler, Optimizer

__all__ = ["Attachment", "attach"]


def attach(
    optimizer: Any,
    policy: Policy,
    *,
    model: nn.Module | Iterable[nn.Module] | None = None,
    pg_collection: Any = None,
    on_nonfinite: OnNonFinite = "skip",
    max_skips: int | None = None,
) -> Attachment:
    """Replace Megatron's own clipping in `optimizer.step()` by a policy.

    Works with FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer and LayerWiseDistributedOptimizer
    (that of Muon), and with chains of them, under tensor, pipeline, expert and data parallelism, including
    Megatron-FSDP, and with loss scaling. A policy per tensor or row gets whole parameters, wherever a distributed
    optimizer or Megatron-FSDP cuts them. If the optimizer is precision-aware, a policy that reads weights gets those of
    the model, because TransformerEngine keeps the float32 copies. A tied embedding counts as one parameter, with its
    name on the first stage. `config.clip_grad` is ignored. `step()` returns (True, norm, zeros) as usual, or (False,
    None, None) for a skipped step. Loss scales back off only if the step is non-finite, and then all scales of a chain
    do so together.

    Args:
        optimizer: what `megatron.core.optimizer.get_megatron_optimizer` returned, even on a rank without parameters.
        policy: the policy, for example `distclip.global_norm(1.0)`.
        model: the modules of this rank, which have the names of the parameters. Policies per group, tensor or row need
            the names.
        pg_collection: the process groups `tp`, `pp`, `ep`, `expt_tp`, `dp_cp` and `expt_dp`. None for those of
            `megatron.core.parallel_state`.
        on_nonfinite: see `GradClipper`. With a loss scale, the scaler finds its scale by non-finite steps, so they are
            skipped and counted without a warning.
        max_skips: see `GradClipper`.

    Returns:
        The attachment, with the clipper and the report of each step. It is `optimizer.distclip` too.

    Raises:
        ArgumentError: `optimizer` is not Megatron's, or is attached already; the policy needs names and `model` is
            missing or incomplete; some ranks have a loss scale and others do not. Raised on every rank. In a step: see
            `GradClipper.clip`.

    Collectives: gathers and all-reduces, so call it on every rank. A step has one all-reduce of a few float64 numbers
    over all ranks, instead of those of Megatron's norm and overflow check. Host syncs: in a step the host waits for the
    gradients once, and then reads a few numbers.
    """
    comm, errors = world_comm(), FirstError()
    leaves: list[Any] = []
    pieces: list[Piece] = []
    split_over: dict[str, Any] = {}
    with errors:
        leaves = flatten_chain(optimizer)
        _check(optimizer, policy, model)
        layer_wise = layer_wise_in(optimizer)
        groups = Groups(pg_collection, bool(layer_wise))
        split_over = groups.split_over
        pieces = _find_pieces(
            leaves, groups, model, policy, {id(leaf) for one in layer_wise for leaf in flatten_chain(one)}
        )
    tied = [(p.name, p.is_original) for p in pieces if p.is_original is not None and model is not None]
    gathered = gather_or_raise(comm, errors.error, (bool(_scalers(leaves)), tied))
    scaled = [has_scale for has_scale, _ in gathered]
    if len(set(scaled)) > 1:
        raise ArgumentError(
            f"attach: the optimizers of ranks {[rank for rank, has_scale in enumerate(scaled) if not has_scale]} have "
            "no loss scale and those of other ranks do. On a rank without parameters pass what get_megatron_optimizer "
            "returns for it."
        )
    pieces = share_names(pieces, [tied for _, tied in gathered])
    params = [(piece.name, piece.stand_in) for piece in pieces]
    clipper = bind(policy, params, split_over, comm, on_nonfinite, max_skips)
    return Attachment(optimizer, clipper, leaves, pieces)


class Attachment(base.Attachment):
    """A policy that clips or skips the steps of an optimizer.

    Args:
        optimizer: the optimizer, which may be a chain.
        clipper: a clipper over the stand-ins of `pieces`.
        leaves: the optimizers of the chain.
        pieces: the parameters that they step on this rank.
    """

    def __init__(
        self, optimizer: Optimizer, clipper: GradClipper, leaves: list[Optimizer], pieces: list[Piece]
    ) -> None:
        super().__init__([optimizer], clipper)
        self._optimizer, self._leaves, self._pieces = optimizer, leaves, pieces
        self._weights = clipper.policy.spec.needs_weights
        self._scalers = _scalers(leaves)
        # Before Megatron-core 0.18 the replaced method gathers the parameters after the step, unless the forward pass
        # does.
        self._gathers = [
            one
            for one in layer_wise_in(optimizer)
            if "step_with_ready_grads" not in vars(type(one)) and not getattr(one, "async_allgather", False)
        ]
        self._patches.replace(optimizer, "step", MethodType(lambda _: self._step(), optimizer))

    @property
    def clipper(self) -> GradClipper:
        """Clipper over this rank's pieces of the parameters."""
        assert self._clipper is not None
        return self._clipper

    def _step(self) -> tuple[bool, float | None, float | None]:
        """Step as Megatron does, with one decision instead of its overflow check, norm and clipping."""
        errors = FirstError()
        with errors:
            self._attach_grads()
        try:
            # A chain multiplies the loss by the scale of its first optimizer.
            skip = self._decide(errors, float(self._scalers[0].scale) if self._scalers else None)
            for scaler in self._scalers:
                scaler.update(self._overflowed())
            if skip:
                return False, None, None
            with_grad = [(i, grad) for i, piece in enumerate(self._pieces) if (grad := piece.grad) is not None]
            self._write([i for i, _ in with_grad], [grad for _, grad in with_grad])
        finally:
            for piece in self._pieces:
                piece.drop_grad()
        assert self.report is not None
        logs_zeros = bool(self._leaves) and bool(getattr(self._leaves[0].config, "log_num_zeros_in_grad", False))
        zeros = self._optimizer.count_zeros() if logs_zeros else None
        success = bool(self._optimizer.step_with_ready_grads())
        for one in self._gathers:
            one.allgather_params()
        return success, float(self.report.norm), zeros

    def _attach_grads(self) -> None:
        for leaf in self._leaves:
            if not hasattr(leaf, "_copy_model_grads_to_main_grads"):
                leaf.prepare_grads()  # in float32 this only sets attributes
            elif not leaf.is_stub_optimizer:
                leaf._copy_model_grads_to_main_grads()
        for piece in self._pieces:
            piece.attach_grad(self._weights)


def _scalers(leaves: list[Optimizer]) -> list[LossScaler]:
    scalers = (getattr(leaf, "grad_scaler", None) for leaf in leaves)
    return [scaler for scaler in scalers if scaler is not None]


def _find_pieces(
    leaves: list[Optimizer], groups: Groups, model: Any, policy: Policy, layer_wise_ids: set[int]
) -> list[Piece]:
    names, weights = {} if model is None else names_of(model), policy.spec.needs_weights
    pieces = [p for leaf in leaves for p in pieces_of(leaf, groups, names, weights, id(leaf) in layer_wise_ids)]
    if model is None:
        return [replace(piece, name=f"optimizer.parameters[{i}]") for i, piece in enumerate(pieces)]
    return pieces


def _check(optimizer: Any, policy: Any, model: Any) -> None:
    check_not_attached(optimizer)
    check_policy(policy, "attach")
    if model is None and (policy.spec.per != "model" or policy.spec.exclude):
        raise ArgumentError(
            f'attach: a policy with per="{policy.spec.per}" or exclude= uses parameter names, which the optimizer '
            "does not have. Call attach(optimizer, policy, model=model_chunks)."
        )
