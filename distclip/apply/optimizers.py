"""Step optimizers: check what the caller passed, unscale gradients, step or skip."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..comm import Comm
from ..comm.consensus import FirstError, gather_or_raise
from ..devices import Fact
from ..errors import ArgumentError, DisagreementError, short_repr
from ..norms.memory import read_gradients
from ..sharding.shard import Shards
from ..sharding.table import ShardTable
from .coverage import Coverage
from .fused import fused_step, supports_grad_scale
from .grad_scaler import ScalerState, initial_scale, parameters_of
from .scale import scale_

__all__ = ["OptimizerSteps", "as_list"]


def as_list(optimizer: Any) -> list[Optimizer]:
    """Return one optimizer, or several, as a list.

    Raises:
        ArgumentError: the argument is neither, or contains an optimizer twice.
    """
    is_one = isinstance(optimizer, Tensor | str | bytes) or hasattr(optimizer, "step")
    several = isinstance(optimizer, Iterable) and not is_one
    optimizers = list(optimizer) if several else [optimizer]
    if not all(hasattr(one, "step") and hasattr(one, "param_groups") for one in optimizers):
        raise ArgumentError(
            f"optimizer={short_repr(optimizer)}: not a torch.optim.Optimizer. Pass an optimizer, or a list of "
            "optimizers."
        )
    if len(set(map(id, optimizers))) < len(optimizers):
        raise ArgumentError("optimizer: the list has one optimizer twice, which would step twice. Pass each one once.")
    return optimizers


def _step(optimizer: Optimizer) -> None:
    optimizer.step()


class OptimizerSteps:
    """Step the optimizers of the parameters in a table.

    Args:
        table: this rank's table.
        comm: all ranks that take part.
        agree: checks that every rank calls a function that is about to gather, see `Calls.agree`.
        on_host: returns whether the host reads totals without a sync, see `Engine.on_host`.
        coverage: compares the optimizers' parameters with those of the table.
    """

    def __init__(
        self,
        table: ShardTable,
        comm: Comm,
        agree: Callable[[str, FirstError], None],
        on_host: Callable[[], bool],
        coverage: Coverage,
    ) -> None:
        self._table, self._comm, self._agree, self._on_host = table, comm, agree, on_host
        self._coverage = coverage
        # The keys are the ids of the optimizers and the scaler. The values are references, which remove the entry once
        # one of these is deleted, and whether every rank's optimizers are fused.
        self._known: dict[tuple[int, ...], tuple[list[weakref.ref[Any]], bool]] = {}
        self._has_compared = False

    def compare_first(
        self, optimizers: Sequence[Optimizer], scaler: Any, errors: FirstError, *, are_known: bool
    ) -> bool:
        """Compare optimizers and scaler with the other ranks, the first time that they are used together.

        A rank may have no optimizer at all, or, as a pipeline stage, a scaler that has scaled no loss.

        Args:
            optimizers: this rank's optimizers.
            scaler: an enabled GradScaler, or None.
            errors: this rank's errors; all ranks raise them together.
            are_known: whether the caller passed valid optimizers, which then determine whether the ranks compare.

        Returns:
            Whether all optimizers of all ranks apply factors themselves, see `supports_grad_scale`.

        Raises:
            DisagreementError: the scalers start at different scales; on all ranks.
            ArgumentError: the scaler has scaled no loss on any rank; on all ranks.

        Collectives: an all-reduce and a gather the first time, otherwise none. Always none on a CPU without a scaler.
        """
        # A host that reads for free does not need fused optimizers, so only the scalers are compared then.
        on_host = self._on_host()
        used = [*([] if on_host else optimizers), *([] if scaler is None else [scaler])]
        if not used and on_host:
            return False
        key = tuple(map(id, used))
        if key in self._known:
            return self._known[key][1]
        if not are_known and self._has_compared:
            # The other ranks may have compared their optimizers already, so they read the error in the next all-reduce.
            return False
        self._agree("GradClipper.step with a new optimizer or scaler", errors)
        scale, has_scaled, fused = None, False, False
        with errors:
            if scaler is not None:
                scale, has_scaled = initial_scale(scaler)
            fused = all(map(supports_grad_scale, optimizers))
        gathered = gather_or_raise(self._comm, errors.error, (fused, scale, has_scaled))
        if len({scale for _, scale, _ in gathered}) > 1:
            raise DisagreementError(
                f"scaler: init_scale differs between ranks, {[scale for _, scale, _ in gathered]}. Use the same "
                "GradScaler arguments on every rank."
            )
        if scaler is not None and not any(has_scaled for _, _, has_scaled in gathered):
            raise ArgumentError("scaler: it has not scaled a loss on any rank. Call scaler.scale(loss).backward().")

        def forget(_: object) -> None:
            self._known.pop(key, None)

        self._has_compared = True
        self._known[key] = [weakref.ref(one, forget) for one in used], all(fused for fused, _, _ in gathered)
        return self._known[key][1]

    @torch.no_grad()
    def loss_scale(self, optimizers: Sequence[Optimizer], state: ScalerState, *, unscale_first: bool) -> Tensor | None:
        """Return the factor that all gradients carry, or unscale them and return None.

        Args:
            optimizers: this rank's optimizers.
            state: state of the scaler.
            unscale_first: unscale the gradients before they are measured, because elements are compared with limits.

        Returns:
            0-d, or None for gradients that carry no scale (any more).

        Raises:
            ArgumentError: the optimizers step parameters that are not the clipper's, only some gradients carry the
                scale, or gradients are float16.

        Collectives: none. Host syncs: none.
        """
        self.check_owns(optimizers)
        scaled = state.scaled_optimizers()
        all_scaled = len(scaled) == len(optimizers)
        uniform = (all_scaled or not scaled) and state.others_unscaled() == (not scaled)
        if not uniform and not self._coverage.is_covered(optimizers):
            raise ArgumentError(
                "optimizer: scaler.unscale_ has unscaled some of the clipper's gradients, and others may still carry "
                "the scale, so that they have no common norm. Pass all optimizers: clipper.step([one, other], scaler)."
            )
        if scaled:
            state.check_dtypes()
        if all_scaled and not unscale_first:
            return state.loss_scale
        if scaled:
            # This is an extra pass over the gradients. It is needed if only some of them carry the scale, or for
            # limits.
            shards = read_gradients(self._table) if all_scaled else self.shards_of(scaled)
            scale_(shards, state.loss_scale.double().reciprocal())
        return None

    def advance(
        self,
        optimizers: Sequence[Optimizer],
        factors: Tensor,
        skip: Fact,
        *,
        overflow: Fact,
        state: ScalerState | None,
        fuse: bool,
        step: Callable[[Optimizer], object] = _step,
    ) -> None:
        """Step the optimizers, or skip the step.

        Args:
            optimizers: this rank's optimizers.
            factors: factors of the gradients. They are used with `fuse` only, because otherwise they have been applied
                already.
            skip: whether the step is skipped.
            overflow: whether a gradient of any rank is not finite.
            state: state of the scaler, if there is one.
            fuse: let the optimizers' kernels apply the factor.
            step: function that steps one optimizer, if its kernel does not decide whether to skip.

        Collectives: none.
        Host syncs: one on an accelerator if the host has not read `skip` and an optimizer is not fused.
        """
        stages, num_stepped = [], 0
        if state is not None:
            stages = state.stages()
            state.set_found_inf(overflow.on(factors.device).to(torch.float32))
            if not fuse:
                # The gradients have been unscaled in place, even if a step fails below.
                stages = state.stages()
        try:
            if skip.host:
                pass
            elif fuse:
                found_inf = skip.on(factors.device).to(torch.float32)
                with fused_step(optimizers, factors.reciprocal().float().view(()), found_inf):
                    for optimizer in optimizers:
                        optimizer.step()
                        num_stepped += 1
            else:
                for optimizer in optimizers:
                    if skip.host is None and supports_grad_scale(optimizer):
                        with fused_step([optimizer], None, skip.on(factors.device).to(torch.float32)):
                            optimizer.step()
                    elif not skip.read():
                        step(optimizer)
                    num_stepped += 1
        except BaseException:
            if state is not None:
                state.restore(stages, num_stepped)
            raise
        if state is not None:
            state.mark_stepped()

    def check_owns(self, optimizers: Sequence[Optimizer]) -> None:
        """Raise if an optimizer steps parameters that are not in the table.

        Raises:
            ArgumentError: see above.
        """
        if not self._coverage.owns(optimizers):
            raise ArgumentError(
                "optimizer: it steps parameters that the clipper does not have, and the clipper cannot unscale them. "
                "Construct the clipper with all parameters of the optimizer."
            )

    def shards_of(self, optimizers: Sequence[Optimizer]) -> Shards:
        """Return this rank's gradients of the optimizers' parameters. Collectives: none. Host syncs: none."""
        ids = set(map(id, parameters_of(optimizers)))
        shards = read_gradients(self._table)
        # Positions are compared and not names, because two parameters may share a name.
        owned = [id(tensor) in ids for tensor in self._table.tensors_with_gradient()]
        return shards.where([i for i, is_owned in enumerate(owned) if is_owned and i < len(shards)])
