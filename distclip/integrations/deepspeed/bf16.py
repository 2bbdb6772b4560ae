"""BF16_Optimizer: ZeRO stage 1 that accumulates bfloat16 gradients in float32; each rank has all of them, averaged."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch.distributed as dist

from ..monkeypatch import Patches
from .adapter import Decide, Hold, Write, go_on, skipped
from .stage_1_2 import overlaps

__all__ = ["BF16"]


class BF16(Hold):
    """The partition that a rank steps is a part of its whole gradients: only that is measured and clipped."""

    def find(self) -> None:
        own = self.optimizer
        for i, params in enumerate(own.bf16_groups):
            process_group, master = own.real_dp_process_group[i], own.fp32_groups_flat_partition[i]
            begin, size = dist.get_rank(process_group) * master.numel(), master.numel()
            offsets = list(accumulate((param.numel() for param in params), initial=0))[:-1]
            self.groups.append(
                [
                    self.piece(param, master.narrow(0, at, n), process_group, start=start, offset=at)
                    for param, start, at, n in overlaps(params, offsets, begin, size)
                ]
            )

    def look(self) -> None:
        own = self.optimizer
        for i, group in enumerate(self.groups):
            self.renew(i, own.fp32_groups_flat_partition[i])
            for piece in group:
                self.lay(piece, piece.of(own.fp32_groups_gradient_flat_partition[i]))

    def take(self, patches: Patches, decide: Decide, write: Write) -> None:
        own = self.optimizer

        def measure(for_clipping: bool = False) -> Any:
            """In place of the gradients DeepSpeed gets one number, whose norm it takes, and nothing to clip."""
            if for_clipping:
                return []
            decision = decide()
            if not skipped(decision):
                for group, flat in zip(self.groups, own.fp32_groups_gradient_flat_partition, strict=True):
                    write(group, [piece.of(flat) for piece in group])
            return [go_on(decision, own.fp32_groups_gradients_flat[0].device)], {}

        patches.put(own, "get_grads_for_norm", measure)
        patches.put(own, "mpu", None)
