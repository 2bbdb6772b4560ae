"""A clipper's decision and the optimizers: who has already unscaled, who scales by itself, who steps.

Everything that calls for a collective depends only on what all ranks share: the program's order of calls, and what was
agreed on the first time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .apply.fused import fused_step, supports_grad_scale
from .apply.grad_scaler import ScalerState, initial_scale, parameters_of
from .apply.scale import clamp_, scale_
from .comm.consensus import FirstError, gather_or_raise
from .decision import Outcome
from .errors import ArgumentError, DisagreementError
from .judge import Judge
from .sharding.shard import Shards

__all__ = ["Stepper", "several", "write_"]


class Stepper:
    """Steps of optimizers by the decisions of a judge.

    Args:
        judge: what decides.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._met: list[tuple[tuple[weakref.ref[Any], ...], bool]] = []
        self._round: tuple[object, Outcome, bool, bool] | None = None

    @torch.no_grad()
    def clip(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        scaler: GradScaler | None,
        failure: Exception | None,
    ) -> Outcome:
        """See `GradClipper.clip`."""
        if isinstance(scaler, GradScaler) and not scaler.is_enabled():
            scaler = None
        if scaler is None:
            decision = self._judge.decide(failure, None)
        else:
            attempt = FirstError()
            attempt.error = failure
            optimizers = attempt.run(several, optimizer) or []
            self._meet(attempt, optimizers, scaler)
            scaling = attempt.run(ScalerState, scaler, optimizers)
            loss_scale = None if scaling is None else attempt.run(self._loss_scale, scaling, optimizers)
            decision = self._judge.decide(attempt.error, loss_scale, scaled=True)
            assert scaling is not None
            scaling.tell(decision.overflow.to(torch.float32))
        if not decision.skip_known:
            write_(decision, decision.measured.shards)
            return decision
        for tensor in self._judge.plan.tensors:
            tensor.grad = None
            if (main := getattr(tensor, "main_grad", None)) is not None:
                main.zero_()
        return decision

    def step(self, optimizer: Optimizer | Iterable[Optimizer], scaler: GradScaler | None) -> Outcome:
        """See `GradClipper.step`."""
        attempt = FirstError()
        optimizers = attempt.run(several, optimizer) or []
        if isinstance(scaler, GradScaler) and not scaler.is_enabled():
            scaler = None
        lazily = self._meet(attempt, optimizers, scaler) and self._judge.on_nonfinite in ("skip", "propagate")
        scaling = None if scaler is None else attempt.run(ScalerState, scaler, optimizers)
        if scaling is not None and self._round is not None and self._round[0] is scaling.round:
            _, decision, in_place, were_scaled = self._round
            self._check_known(optimizers)
            if len(scaling.scaled()) != (len(optimizers) if were_scaled else 0):
                raise ArgumentError(
                    "an earlier call has clipped all of the clipper's gradients since the last scaler.update(), and "
                    f"{'unscaled them itself' if were_scaled else 'found them unscaled'}: scaler.unscale_ is for all "
                    "optimizers before the first call, or for none. Write clipper.step([one, other], scaler)."
                )
            fold = not in_place and all(map(supports_grad_scale, optimizers))
            if not in_place and not fold and not decision.skip_known:
                # The earlier call has left them to its own optimizer's kernel.
                with torch.no_grad():
                    scale_(self._shards_of(optimizers), decision.factors)
            self._advance(optimizers, decision, scaling, fold)
            return decision
        were_scaled = scaling is not None and len(scaling.scaled()) == len(optimizers)
        with torch.no_grad():
            loss_scale = None if scaling is None else attempt.run(self._loss_scale, scaling, optimizers)
            decision = self._judge.decide(attempt.error, loss_scale, scaled=scaling is not None, wait=not lazily)
        fold = loss_scale is not None or decision.skip_known is None
        fold = fold and decision.limits is None and len(decision.coefs) == 1
        # With a loss scale it has been checked already that these are the clipper's.
        fold = (
            fold and all(map(supports_grad_scale, optimizers)) and (loss_scale is not None or self._knows(optimizers))
        )
        if not fold and not decision.skip_known:
            with torch.no_grad():
                write_(decision, decision.measured.shards)
        self._advance(optimizers, decision, scaling, fold)
        if scaling is not None:
            self._round = (scaling.round, decision.without_gradients(), not fold, were_scaled)
        return decision

    def _meet(self, attempt: FirstError, optimizers: Sequence[Optimizer], scaler: GradScaler | None) -> bool:
        """The first time with these optimizers and this scaler, agree with all ranks; whether all optimizers are fused.

        A rank may have no optimizer at all, or (a pipeline stage) a scaler that has seen no loss.
        """
        party = (*optimizers, *([] if scaler is None else [scaler]))
        for known, fused in self._met:
            if len(known) == len(party) and all(ref() is one for ref, one in zip(known, party, strict=True)):
                return fused
        if attempt.error is not None and self._met:
            return False  # the others may have met before: they will hear of it in the reduction
        scale, scaled = (None if scaler is None else attempt.run(initial_scale, scaler)) or (None, False)
        fuses = attempt.run(lambda: all(map(supports_grad_scale, optimizers))) or False
        told = gather_or_raise(self._judge.comm, attempt.error, (fuses, scale, scaled))
        if len({scale for _, scale, _ in told}) > 1:
            raise DisagreementError(
                f"the scalers of the ranks start at {[scale for _, scale, _ in told]}: write the same one on each."
            )
        if scaler is not None and not any(scaled for _, _, scaled in told):
            raise ArgumentError("the scaler has not scaled a loss on any rank: write scaler.scale(loss).backward().")
        self._met.append((tuple(map(weakref.ref, party)), all(fused for fused, _, _ in told)))
        return self._met[-1][1]

    def _loss_scale(self, scaling: ScalerState, optimizers: Sequence[Optimizer]) -> Tensor | None:
        self._check_known(optimizers)
        scaled = scaling.scaled()
        alike = len(scaled) in (0, len(optimizers)) and scaling.others_unscaled() == (not scaled)
        if not alike and not self._covered_by(optimizers):
            raise ArgumentError(
                "some of the clipper's gradients have been unscaled (scaler.unscale_) and others may have not, so that "
                "they have no norm together. Write clipper.step([one, other], scaler) with all optimizers."
            )
        if scaled:
            scaling.check_dtypes()
        if len(scaled) == len(optimizers) and self._judge.policy.spec.limits is None:
            return scaling.loss_scale
        if scaled:
            # In a pass of its own: elements are to be compared with bounds, or only some gradients carry the scale.
            every = len(scaled) == len(optimizers)
            shards = self._judge.plan.shards(self._judge.comm.size) if every else self._shards_of(scaled)
            scale_(shards, scaling.loss_scale.double().reciprocal())
        return None

    def _check_known(self, optimizers: Sequence[Optimizer]) -> None:
        if not self._knows(optimizers):
            raise ArgumentError(
                "with a scaler every parameter of the optimizer has to be unscaled here, and some are not the "
                "clipper's. Construct the clipper with all of them."
            )

    def _covered_by(self, optimizers: Sequence[Optimizer]) -> bool:
        ids = set(map(id, parameters_of(optimizers)))
        return all(id(tensor) in ids for tensor in self._judge.plan.tensors)

    def _knows(self, optimizers: Sequence[Optimizer]) -> bool:
        own = set(map(id, self._judge.plan.tensors))
        return all(id(param) in own for param in parameters_of(optimizers))

    def _advance(
        self, optimizers: Sequence[Optimizer], decision: Outcome, scaling: ScalerState | None, fold: bool
    ) -> None:
        """Step, or leave the step out; without `fold` the gradients have been scaled already."""
        found_inf = decision.skip.to(torch.float32)
        if scaling is not None:
            scaling.tell(decision.overflow.to(torch.float32))
        if decision.skip_known:
            pass
        elif fold:
            with fused_step(optimizers, decision.factors.reciprocal().float().view(()), found_inf):
                for optimizer in optimizers:
                    optimizer.step()
        else:
            for optimizer in optimizers:
                if decision.skip_known is None and supports_grad_scale(optimizer):
                    with fused_step([optimizer], None, found_inf):
                        optimizer.step()
                elif decision.skip_known is not None or not bool(decision.skip):
                    optimizer.step()
        if scaling is not None:
            scaling.stepped()

    def _shards_of(self, optimizers: Sequence[Optimizer]) -> Shards:
        ids = set(map(id, parameters_of(optimizers)))
        names = {name for name, tensor, _ in self._judge.plan.entries if id(tensor) in ids}
        shards = self._judge.plan.shards(self._judge.comm.size)
        return shards.where([i for i, name in enumerate(shards.places.names) if name in names])


def write_(decision: Outcome, shards: Shards) -> None:
    """Write a decision into gradients."""
    scale_(shards, decision.factors)
    if decision.limits is not None:
        clamp_(shards, *decision.limits)


def several(optimizer: Any) -> list[Optimizer]:
    """One optimizer or some, as a list.

    Raises:
        ArgumentError: it is neither.
    """
    many = isinstance(optimizer, Iterable) and not isinstance(optimizer, Tensor) and not hasattr(optimizer, "step")
    optimizers = list(optimizer) if many else [optimizer]
    if not all(hasattr(o, "step") and hasattr(o, "param_groups") for o in optimizers):
        raise ArgumentError(f"optimizer={optimizer!r:.80}: expected a torch.optim.Optimizer, or several of them.")
    return optimizers
