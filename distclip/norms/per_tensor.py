"""Hold one rank's measurements of single gradients, to find one that is not finite or differs between replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..sharding.shard import ShardInfos

__all__ = ["PerTensorChecksums", "PerTensorPowers"]

PerTensorChecksums: TypeAlias = tuple[ShardInfos, Tensor, Tensor]
"""Metadata of n gradients, with their power sums and checksums."""


class PerTensorPowers(NamedTuple):
    """Power sums of n local gradients.

    Args:
        names: of the parameters.
        powers: (n,), those of whole gradients, or those of the slots of all gradients, one gradient after another.
        counts: number of slots of each gradient, one for each row or for the whole gradient. None for whole gradients.

    >>> by_row = PerTensorPowers(("w", "b"), torch.tensor([1.0, 2.0, 4.0]), (2, 1))
    >>> by_row.sums(), by_row.any(by_row.powers > 3)
    (tensor([3., 4.]), tensor([False,  True]))
    """

    names: tuple[str, ...]
    powers: Tensor
    counts: tuple[int, ...] | None = None

    def first(self, count: int) -> PerTensorPowers:
        """Return those of the first gradients."""
        counts = None if self.counts is None else self.counts[:count]
        return PerTensorPowers(self.names[:count], self.powers[: count if counts is None else sum(counts)], counts)

    def sums(self) -> Tensor:
        """Return the power sum of each gradient, (n,)."""
        return self.powers if self.counts is None else torch.stack([rows.sum() for rows in self._split(self.powers)])

    def any(self, marked: Tensor) -> Tensor:
        """Return for each gradient whether one of its power sums is marked, (n,) bool."""
        return marked if self.counts is None else torch.stack([rows.any() for rows in self._split(marked)])

    def _split(self, values: Tensor) -> Sequence[Tensor]:
        # The values are split here and not when measured, because few steps need those of single gradients.
        return torch.split(values, list(self.counts or ()))
