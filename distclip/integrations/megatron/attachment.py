"""`attach`: a clipper and an optimizer of Megatron-core, held together until `detach`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import nn

from ...extend import ArgumentError, FirstError, GradClipper, OnNonFinite, Policy, Report, gather_or_raise, world_comm
from ..monkeypatch import Patches
from .parameters import Groups, Part, by_one_name, leaves, names_of, parts_of

__all__ = ["Attachment", "attach", "detach"]

_ATTRIBUTE = "_distclip_attachment"


def attach(
    optimizer: Any,
    policy: Policy,
    *,
    model: nn.Module | Iterable[nn.Module] | None = None,
    pg_collection: Any = None,
    on_nonfinite: OnNonFinite = "skip",
    max_skips: int | None = None,
) -> Attachment:
    """Let `optimizer.step()` use distclip's norm, policy and non-finite decision in place of Megatron's own.

    Works with FP32Optimizer, Float16OptimizerWithFloat16Params and DistributedOptimizer, and chains of them, under
    tensor, pipeline, expert and data parallelism, with loss scaling; a policy per tensor or row sees whole parameters,
    wherever a distributed optimizer cuts them. A tied embedding is one parameter, by its name on the first stage.
    `config.clip_grad` is left out of account.
    `step()` returns what it always has: (True, norm, zeros), or (False, None, None) for a step that is left out. Only
    one that is not finite makes loss scales back off, and then all of a chain alike.

    Args:
        optimizer: what `megatron.core.optimizer.get_megatron_optimizer` returned; also where a rank has no parameters.
        policy: what to do, for example `distclip.global_norm(1.0)`.
        model: its modules, which have the names of parameters: needed by policies per group, tensor or row.
        pg_collection: the groups of the job, `tp`, `pp`, `ep`, `expt_tp`, `dp_cp` and `expt_dp`, where they are not
            those of `megatron.core.parallel_state`.
        on_nonfinite: see `GradClipper`. With a loss scale such steps are its way to find itself: they are skipped and
            counted, without a warning.
        max_skips: see `GradClipper`.

    Returns:
        What has the clipper and, after each step, its report.

    Raises:
        ArgumentError: no optimizer of Megatron's; one that is attached already, or keeps its gradients elsewhere
            (layer-wise, precision-aware, Megatron-FSDP); a policy that goes by names without `model`, or one that
            lacks parameters; loss scales on some ranks only. In a step: see `GradClipper.clip`. On every rank.

    Collectives: call it on every rank; two gathers. In a step one all-reduce of (slots + 1) float64 numbers over all
    ranks, in place of those of Megatron's norm and overflow check. Host syncs: in a step the host waits for the
    gradients once, and then reads a few numbers.
    """
    attempt = FirstError()
    everybody = world_comm()
    found = attempt.run(leaves, optimizer)
    attempt.run(_check, optimizer, policy, model)
    groups = attempt.run(Groups, pg_collection)
    parts = attempt.run(_parts, found, groups, model, policy) or []
    num_replicas = [(part.name, part.original) for part in parts if part.original is not None and model is not None]
    told = gather_or_raise(everybody, attempt.error, (bool(_scalers(found or [])), num_replicas))
    scaled = [has for has, _ in told]
    if len(set(scaled)) > 1:
        raise ArgumentError(
            f"attach: the optimizers of ranks {[r for r, has in enumerate(scaled) if not has]} have no loss scale and "
            "those of other ranks do. On a rank without parameters pass what get_megatron_optimizer makes of them."
        )
    assert found is not None and groups is not None
    parts = by_one_name(parts, [num_replicas for _, num_replicas in told])
    clipper = GradClipper(
        [(part.name, part.stand_in) for part in parts],
        policy,
        split_over=groups.split_over,
        comm=everybody,
        on_nonfinite=on_nonfinite,
        max_skips=max_skips,
    )
    attachment = Attachment(optimizer, clipper, found, parts)
    setattr(optimizer, _ATTRIBUTE, attachment)
    return attachment


def detach(optimizer: Any) -> None:
    """Give an optimizer back: from its next step on it clips as its own config says.

    Raises:
        ArgumentError: nothing is attached to it.
    """
    attachment = getattr(optimizer, _ATTRIBUTE, None)
    if not isinstance(attachment, Attachment):
        raise ArgumentError("detach: nothing is attached to this optimizer.")
    attachment.detach()


class Attachment:
    """An optimizer and the clipper that decides its steps: what `attach` returns.

    Args:
        optimizer: of Megatron.
        clipper: over the stand-ins of `parts`.
        leaves: the optimizers that it consists of.
        parts: what they step on this rank.
    """

    def __init__(self, optimizer: Any, clipper: GradClipper, leaves: list[Any], parts: list[Part]) -> None:
        self.clipper = clipper
        self.report: Report | None = None
        """Of the last step; None before the first."""
        self._optimizer, self._leaves, self._parts = optimizer, leaves, parts
        self._weights = clipper.policy.spec.needs_weights
        self._scalers = _scalers(leaves)
        self._patches = Patches()
        self._patches.put(optimizer, "step", MethodType(lambda _: self._step(), optimizer))

    def detach(self) -> None:
        """See `detach`."""
        self._patches.restore()
        if getattr(self._optimizer, _ATTRIBUTE, None) is self:
            delattr(self._optimizer, _ATTRIBUTE)

    @torch.no_grad()
    def _step(self) -> tuple[bool, float | None, float | None]:
        """Megatron's own step, with one decision in place of its overflow check, norm and clipping."""
        attempt = FirstError()
        attempt.run(self._look)
        try:
            # A chain multiplies the loss by the scale of its first optimizer.
            scale = float(self._scalers[0].scale) if self._scalers else None
            decision = self.clipper.decide(scale, attempt)
            self.report = decision.report()
            if self._scalers:
                overflow = decision.overflow.read()
                for scaler in self._scalers:
                    scaler.update(overflow)
            if decision.skip.host:
                return False, None, None
            there = [(i, part.own.grad) for i, part in enumerate(self._parts) if part.own.grad is not None]
            self.clipper.write_(decision, [i for i, _ in there], [grad for _, grad in there])
        finally:
            for part in self._parts:
                part.let_go()
        counted = bool(getattr(self._leaves[0].config, "log_num_zeros_in_grad", False)) if self._leaves else False
        zeros = self._optimizer.count_zeros() if counted else None
        return bool(self._optimizer.step_with_ready_grads()), float(self.report.norm), zeros

    def _look(self) -> None:
        for leaf in self._leaves:
            if hasattr(leaf, "_copy_model_grads_to_main_grads") and not leaf.is_stub_optimizer:
                leaf._copy_model_grads_to_main_grads()
            elif not hasattr(leaf, "_copy_model_grads_to_main_grads"):
                leaf.prepare_grads()  # in float32 a matter of attributes alone
        for part in self._parts:
            part.look(self._weights)


def _scalers(leaves: list[Any]) -> list[Any]:
    return [leaf.grad_scaler for leaf in leaves if getattr(leaf, "grad_scaler", None) is not None]


def _parts(found: list[Any] | None, groups: Groups | None, model: Any, policy: Any) -> list[Part]:
    if found is None or groups is None:
        return []
    weights = policy.spec.needs_weights
    names = {} if model is None else names_of(model)
    parts = [part for leaf in found for part in parts_of(leaf, groups, names, weights)]
    if model is None:
        return [replace(part, name=f"optimizer.parameters[{i}]") for i, part in enumerate(parts)]
    return parts


def _check(optimizer: Any, policy: Any, model: Any) -> None:
    if getattr(optimizer, _ATTRIBUTE, None) is not None:
        raise ArgumentError("attach: the optimizer has a policy already. Write detach(optimizer) first.")
    per = getattr(policy, "per", "model")
    if model is None and (per != "model" or getattr(policy, "exclude", ())):
        raise ArgumentError(
            f'attach: a policy with per="{per}" or exclude= goes by the names of parameters, which the optimizer does '
            "not know. Write attach(optimizer, policy, model=model_chunks)."
        )
