"""What ranks tell each other of a step that stood out: whose samples, and where its norm lay."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .step_buffer import Step

__all__ = ["Told", "merged"]


@dataclass(frozen=True, slots=True)
class Told:
    """One rank's word.

    Args:
        ids: of its samples.
        power: the power sum of all that is on it, with the loss scale in it.
        largest: the name and power sum of its largest gradient; None where it has none.
    """

    ids: tuple[Any, ...]
    power: float
    largest: tuple[str, float] | None

    @classmethod
    def of(cls, step: Step) -> Told:
        """This rank's. Host syncs: some."""
        return cls(tuple(step.ids_on_host()), step.power_here(), step.largest())


def merged(
    told: Sequence[Told], ranks: Sequence[int], power_sum: Tensor, parameters: Collection[str]
) -> dict[str, Any]:
    """What all ranks' words come to, as fields of a line.

    Args:
        told: by every rank, in order.
        ranks: their numbers.
        power_sum: 0-d, of the whole gradient.
        parameters: names that mean one; gradients that were read together have none.

    >>> import torch
    >>> one, two = Told((7,), 1.0, ("weight", 1.0)), Told((7, 8), 3.0, ("bias", 2.0))
    >>> merged([one, two], [4, 6], torch.tensor(4.0), {"weight", "bias"})
    {'ids': [7, 8], 'worst': {'rank': 6, 'tensor': 'bias', 'share': 0.5}}
    """
    fields: dict[str, Any] = {}
    if ids := list(dict.fromkeys(sample for each in told for sample in each.ids)):
        fields["ids"] = ids
    if not math.isfinite(whole := float(power_sum)):
        return fields
    worst = max(range(len(told)), key=lambda i: told[i].power)
    # Ranks with copies differ by nothing.
    apart = told[worst].power - min(each.power for each in told) > 1e-9 * told[worst].power
    if (largest := told[worst].largest) is not None:
        name, power = largest
        fields["worst"] = {
            "rank": ranks[worst] if apart else None,
            "tensor": name if name in parameters else None,
            "share": power / whole if whole else None,
        }
    return fields
