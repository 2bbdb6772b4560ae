"""Measure the norm of every parameter together with the norms that a policy needs, in one all-reduce.

The measured slots are then finer than the policy's: one for every parameter, or one for every row with a policy per
row. Both the policy's totals and the parameters' norms are computed from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..devices import device_constant
from ..sharding.shard import ShardInfo, ShardInfos
from .measure import sum_by_slot
from .reduce import Totals

__all__ = ["TensorNorms"]


@dataclass(frozen=True, slots=True)
class TensorNorms:
    """Relation between measured slots, the slots of a policy, and parameters.

    Args:
        names: parameter names, in the order of their norms.
        policy_slots: the policy's slot that each measured slot is part of. None if they are the same slots.
        parameters: the parameter that each measured slot is part of. None if each slot is a parameter.
        num_measured: number of measured slots.
        num_policy_slots: number of slots of the policy.

    >>> model = TensorNorms(("weight", "bias"), TensorNorms.index([0, 0]), None, 2, 1)
    >>> measured = Totals(torch.tensor([16.0, 9.0]))
    >>> model.for_policy(measured).norms, model.per_parameter(measured)
    (tensor([5.]), tensor([4., 3.]))
    """

    names: tuple[str, ...]
    policy_slots: ShardInfos | None
    parameters: ShardInfos | None
    num_measured: int
    num_policy_slots: int

    @staticmethod
    def index(parents: Iterable[int]) -> ShardInfos:
        """Return the index of measured slots by the coarser slot that each is part of."""
        return ShardInfos(ShardInfo("", slot=slot) for slot in parents)

    def for_policy(self, measured: Totals) -> Totals:
        """Return the totals by slot of the policy. Collectives: none. Host syncs: none."""
        if self.policy_slots is None:
            return measured
        index, num_slots = self.policy_slots, self.num_policy_slots
        # Sums of sums are the sums of the coarser slots, and maxima of maxima are their maxima.
        weight_powers = measured.weight_powers
        if weight_powers is not None:
            weight_powers = self._sum(weight_powers, index, measured, num_slots)
        update_powers, update_counts, update_rates = (
            None if vector is None else sum_by_slot(vector, index, 2.0, num_slots)
            for vector in (measured.update_powers, measured.update_counts, measured.update_rates)
        )
        return replace(
            measured,
            powers=self._sum(measured.powers, index, measured, num_slots),
            weight_powers=weight_powers,
            update_powers=update_powers,
            update_counts=update_counts,
            update_rates=update_rates,
        )

    def per_parameter(self, measured: Totals) -> Tensor:
        """Return the norm of every parameter, (parameters,) float64. Collectives: none. Host syncs: none."""
        if self.parameters is None:
            return measured.norms
        powers = self._sum(measured.powers, self.parameters, measured, len(self.names))
        return replace(measured, powers=powers).norms

    def expand(self, factors: Tensor) -> Tensor:
        """Return a factor for every measured slot, from one for every slot of the policy.

        Args:
            factors: (policy slots,). A single factor for everything, (1,), is returned as it is.
        """
        if self.policy_slots is None or len(factors) == 1:
            return factors
        return factors[device_constant(self.policy_slots.slots, factors.device, torch.int64)]

    @staticmethod
    def _sum(powers: Tensor, index: ShardInfos, totals: Totals, num_slots: int) -> Tensor:
        return sum_by_slot(powers, index, totals.norm_type, num_slots)
