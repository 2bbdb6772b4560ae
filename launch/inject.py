"""Something bad put into the gradient on purpose, to see what a policy makes of it."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from layout import local
from models import bare
from processes import RANK, WORLD, gathered

VALUES = {"nan": math.nan, "inf": math.inf}
Key = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Inject:
    """At one step, to the first parameter with the pattern in its name that a rank holds a piece of."""

    kind: str
    step: int
    rank: int
    parameter: str
    factor: float = 1.0

    def check(self, model: nn.Module, steps: range) -> None:
        """What can't be is refused before any process waits."""
        if self.kind not in (*VALUES, "spike"):
            raise SystemExit(f"inject.kind={self.kind}: write nan, inf or spike")
        if self.step not in steps:
            raise SystemExit(f"inject.step={self.step}: write one of the steps {steps[0]} to {steps[-1]}")
        if not 0 <= self.rank < WORLD:
            raise SystemExit(f"inject.rank={self.rank} of {WORLD} rank(s): write 0 to {WORLD - 1}")
        names = [name for name, _ in model.named_parameters()]
        try:
            found = any(re.search(self.parameter, name) for name in names)
        except re.error as error:
            raise SystemExit(f"inject.parameter={self.parameter}: {error}") from None
        if not found:
            raise SystemExit(f"inject.parameter={self.parameter} is in no name: the model has {', '.join(names)}")

    def aim(self, pieces: Mapping[Key, Callable[[], Tensor | None]]) -> Callable[[int], None]:
        """What to call with the step after every backward, given how to look up this rank's pieces of the gradient.

        Every copy of the piece is hit, as by a bad number that a reduction of gradients hands out.
        """
        there = gathered(list(pieces))[self.rank]
        key = next((key for key in there if re.search(self.parameter, key[0])), None)
        if key is None:
            raise SystemExit(
                f"inject.parameter={self.parameter} is in no name of what rank {self.rank} holds: "
                f"{', '.join(name for name, _ in there)}"
            )
        target = pieces.get(key)

        @torch.no_grad()
        def strike(step: int) -> None:
            found = target() if step == self.step and target is not None else None
            if found is not None:
                grad = local(found)
                if self.kind == "spike":
                    grad.mul_(self.factor)
                else:
                    grad[(0,) * grad.ndim] = VALUES[self.kind]

        return strike


def key(module: nn.Module, name: str, parameter: Tensor) -> Key:
    """The same on ranks that hold copies of one piece."""
    if isinstance(parameter, DTensor):
        here = zip(parameter.device_mesh.get_coordinate() or (), parameter.placements, strict=True)
        return bare(name), tuple(at for at, placement in here if placement.is_shard())
    return bare(name), (RANK,) if isinstance(module, FullyShardedDataParallel) else ()
