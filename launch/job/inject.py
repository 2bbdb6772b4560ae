"""Corrupt a gradient on purpose, to test how a policy and on_nonfinite react."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from .mesh import to_local
from .models.recurrent import original_name
from .processes import RANK, WORLD_SIZE, gather

VALUES = {"nan": math.nan, "inf": math.inf}

ShardKey: TypeAlias = tuple[str, tuple[int, ...]]
"""Parameter name and the coordinates of one of its shards. Replicas of a shard have equal keys."""


def shard_key(module: nn.Module, name: str, parameter: Tensor) -> ShardKey:
    """Return the key of this rank's shard of a parameter."""
    if isinstance(parameter, DTensor):
        coordinates = zip(parameter.device_mesh.get_coordinate() or (), parameter.placements, strict=True)
        return original_name(name), tuple(i for i, placement in coordinates if placement.is_shard())
    return original_name(name), (RANK,) if isinstance(module, FullyShardedDataParallel) else ()


@dataclass(frozen=True)
class Inject:
    """Corruption of one gradient in one step: the config group `inject`.

    Args:
        kind: "nan" or "inf" overwrites the first element. "spike" multiplies the shard by `factor`.
        step: 1-based step.
        rank: rank whose shard is corrupted. Replicas of this shard on other ranks are corrupted too.
        parameter: regular expression. Among the parameters that the rank holds a shard of, the first one whose name
            matches is corrupted.
        factor: factor of a spike.
    """

    kind: str
    step: int
    rank: int
    parameter: str
    factor: float = 1.0

    def check(self, model: nn.Module, steps: range) -> None:
        """Exit if the run has no such step, rank or parameter. This does not communicate."""
        if self.kind not in (*VALUES, "spike"):
            raise SystemExit(f"inject.kind={self.kind}: unknown. Use nan, inf or spike")
        if self.step not in steps:
            raise SystemExit(f"inject.step={self.step}: not a step of this run. Use {steps[0]} to {steps[-1]}")
        if not 0 <= self.rank < WORLD_SIZE:
            raise SystemExit(f"inject.rank={self.rank}: this run has {WORLD_SIZE} rank(s). Use 0 to {WORLD_SIZE - 1}")
        names = [name for name, _ in model.named_parameters()]
        try:
            matches = any(re.search(self.parameter, name) for name in names)
        except re.error as error:
            raise SystemExit(
                f"inject.parameter={self.parameter}: not a regular expression ({error}). Use a part of a name"
            ) from None
        if not matches:
            raise SystemExit(
                f"inject.parameter={self.parameter}: matches no parameter. Use a part of one of {', '.join(names)}"
            )

    def select(self, gradients: Mapping[ShardKey, Callable[[], Tensor | None]]) -> Callable[[int], None]:
        """Return a function that takes a step and corrupts its gradient after the backward pass.

        Args:
            gradients: a getter for the gradient of each shard on this rank.

        Collectives: one gather.
        """
        keys = gather(list(gradients))[self.rank]
        key = next((key for key in keys if re.search(self.parameter, key[0])), None)
        if key is None:
            raise SystemExit(
                f"inject.parameter={self.parameter}: matches no shard on rank {self.rank}. "
                f"Use a part of one of {', '.join(name for name, _ in keys)}"
            )
        # Every replica is corrupted, as a reduction of gradients would give a bad number to every replica.
        get_gradient = gradients.get(key)

        @torch.no_grad()
        def corrupt(step: int) -> None:
            gradient = get_gradient() if step == self.step and get_gradient is not None else None
            if gradient is None:
                return
            shard = to_local(gradient)
            if self.kind == "spike":
                shard.mul_(self.factor)
            else:
                shard[(0,) * shard.ndim] = VALUES[self.kind]

        return corrupt
