"""Norms of every parameter beside those that a policy asks for, out of the same all-reduce.

There is then a slot for every parameter, or with a policy per row for every row. The policy is shown its own slots,
which follow from these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..devices import device_constant
from ..sharding.shard import ShardInfo, ShardInfos
from .measure import joined
from .reduce import Totals

__all__ = ["ByTensor"]


@dataclass(frozen=True, slots=True)
class ByTensor:
    """How the slots that are measured, those of a policy and those of parameters belong together.

    Args:
        names: of the parameters, in the order of their norms.
        within: which of the policy's slots each measured one is part of; None where they are the same.
        parameters: likewise, of which parameter.
        slots: how many are measured.
        policy_slots: how many the policy has.

    >>> two_of_one = ByTensor(("weight", "bias"), ByTensor.places([0, 0]), None, 2, 1)
    >>> totals = Totals(torch.tensor([16.0, 9.0]), 2.0, 0, 0, 0)
    >>> two_of_one.shown(totals).norms, two_of_one.norms(totals)
    (tensor([5.]), tensor([4., 3.]))
    """

    names: tuple[str, ...]
    within: ShardInfos | None
    parameters: ShardInfos | None
    slots: int
    policy_slots: int

    @staticmethod
    def places(slots: Iterable[int]) -> ShardInfos:
        """Of measured slots, by the slot of another kind that each is part of."""
        return ShardInfos(ShardInfo("", slot=slot) for slot in slots)

    def shown(self, totals: Totals) -> Totals:
        """What the policy is to see of totals by measured slot."""
        if self.within is None:
            return totals
        weight = totals.weight
        if weight is not None:
            weight = joined(weight, self.within, totals.norm_type, self.policy_slots)
        value = joined(totals.value, self.within, totals.norm_type, self.policy_slots)
        return replace(totals, value=value, weight=weight)

    def norms(self, totals: Totals) -> Tensor:
        """(parameters,) float64, from totals by measured slot."""
        if self.parameters is None:
            return totals.norms
        value = joined(totals.value, self.parameters, totals.norm_type, len(self.names))
        return replace(totals, value=value).norms

    def spread(self, factors: Tensor) -> Tensor:
        """A factor for every measured slot, from one for every slot of the policy's; one for all stays one."""
        if self.within is None or len(factors) == 1:
            return factors
        return factors[device_constant(self.within.slots, factors.device, torch.int64)]
