"""Find the non-finite gradients, and the ranks that hold them.

The decision to skip a step needs none of this, because the totals of such a step are non-finite on every rank. Names
and counts are gathered only in such a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..comm import Comm, global_ranks
from ..norms.per_tensor import PerTensorPowers
from ..sharding.shard import Shard, Shards, coalesce_, element_values, stored_values

__all__ = [
    "Culprit",
    "Incident",
    "count_nonfinite",
    "describe_culprits",
    "gather_culprits",
    "suspect_nonfinite",
    "zero_nonfinite_",
]


@dataclass(frozen=True, slots=True)
class Culprit:
    """A gradient with elements that are not finite.

    Args:
        name: parameter name.
        nans: number of NaN elements on all `ranks` together.
        infs: number of infinite elements on all `ranks` together.
        ranks: global ranks that hold them, as counted by torch.distributed or MPI. Empty for a process that clips
            without other ranks.

    >>> print(Culprit("head.weight", nans=1, infs=2, ranks=(3,)))
    head.weight (1 NaN and 2 Inf on rank 3)
    """

    name: str
    nans: int
    infs: int
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        counts = [f"{n} {kind}" for n, kind in ((self.nans, "NaN"), (self.infs, "Inf")) if n]
        on = f" on rank{'s' * (len(self.ranks) > 1)} {', '.join(map(str, self.ranks))}" if self.ranks else ""
        return f"{self.name} ({' and '.join(counts)}{on})"


@dataclass(frozen=True, slots=True)
class Incident:
    """A step whose gradients were not finite.

    Args:
        step: 1-based index of the clipper call.
        action: what the clipper did: "skip", "zero" or "raise".
        culprits: the gradients that were not finite. Empty if every element is finite and only the norm overflows.
    """

    step: int
    action: str
    culprits: tuple[Culprit, ...]

    def as_fields(self) -> dict[str, Any]:
        """Return the fields of a line in the log."""
        num_elements = sum(culprit.nans + culprit.infs for culprit in self.culprits)
        return {"nonfinite": num_elements, "culprits": [asdict(culprit) for culprit in self.culprits]}


def count_nonfinite(shards: Iterable[Shard]) -> list[tuple[str, int, int]]:
    """Count the non-finite elements of this rank's gradients.

    Args:
        shards: this rank's shards.

    Returns:
        (name, number of NaN, number of Inf) of every gradient that has any.

    Host syncs: two per gradient.
    """
    counts = []
    for shard in shards:
        values = element_values(shard.grad)
        nans, infs = int(values.isnan().sum()), int(values.isinf().sum())
        if nans or infs:
            counts.append((shard.name, nans, infs))
    return counts


def suspect_nonfinite(per_tensor_powers: Iterable[PerTensorPowers]) -> list[tuple[str, int, int]]:
    """Find non-finite gradients from their power sums alone, after the gradients have been freed.

    Args:
        per_tensor_powers: this rank's power sums.

    Returns:
        (name, 1 if any NaN, 1 if any Inf) of every gradient that is not finite.

    Host syncs: one per element of the argument.
    """
    suspects = []
    for one in per_tensor_powers:
        has_nan, has_inf = one.any(one.powers.isnan()), one.any(one.powers.isinf())
        counts = torch.stack([has_nan, has_inf], dim=1).tolist()
        suspects += [
            (name, int(nan), int(inf)) for name, (nan, inf) in zip(one.names, counts, strict=True) if nan or inf
        ]
    return suspects


def gather_culprits(local: list[tuple[str, int, int]], comm: Comm) -> tuple[Culprit, ...]:
    """Gather the non-finite gradients of all ranks.

    Args:
        local: (name, number of NaN, number of Inf) of this rank's gradients.
        comm: all ranks that take part.

    Returns:
        One culprit per name, the same on every rank.

    Collectives: one gather over `comm`.
    """
    culprits: dict[str, Culprit] = {}
    ranks = global_ranks(comm) if comm.size > 1 else (None,)
    for rank, counts in zip(ranks, comm.gather_objects(local), strict=True):
        for name, nans, infs in counts:
            known = culprits.get(name, Culprit(name, 0, 0, ()))
            holders = known.ranks if rank is None else (*known.ranks, rank)
            culprits[name] = Culprit(name, known.nans + nans, known.infs + infs, holders)
    return tuple(culprits.values())


def describe_culprits(culprits: Sequence[Culprit]) -> str:
    """Describe whether elements are non-finite, or only their norm."""
    if not culprits:
        return (
            "the norm overflowed: every element is finite, but the sum of their powers exceeds float64 (use a smaller "
            "norm_type, or inf)"
        )
    more = f" and {len(culprits) - 5} more" if len(culprits) > 5 else ""
    return f"elements are not finite in {', '.join(map(str, culprits[:5]))}{more}"


@torch.inference_mode()
def zero_nonfinite_(shards: Iterable[Shard]) -> None:
    """Set the elements that are not finite to 0 in place. Collectives: none. Host syncs: none."""
    shards = Shards.of(shards)
    coalesce_(shards.grads)
    for values in map(stored_values, shards.grads):
        values.masked_fill_(~values.isfinite(), 0)
