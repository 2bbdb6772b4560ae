"""Adapt BF16_Optimizer: ZeRO stage 1 that accumulates bfloat16 gradients in float32."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch.distributed as dist

from ..monkeypatch import MethodPatches
from .adapter import Adapter, Decide, Write, norm_signal
from .foreign import BF16Optimizer
from .stage_1_2 import overlaps

__all__ = ["BF16"]


class BF16(Adapter):
    """BF16_Optimizer.

    Each rank has all averaged gradients, and measures and clips its own partition of them.
    """

    optimizer: BF16Optimizer
    slices_alone = False

    def find_pieces(self) -> None:
        optimizer = self.optimizer
        for i, params in enumerate(optimizer.bf16_groups):
            process_group, weights = optimizer.real_dp_process_group[i], optimizer.fp32_groups_flat_partition[i]
            begin, size = dist.get_rank(process_group) * weights.numel(), weights.numel()
            offsets = list(accumulate((param.numel() for param in params), initial=0))[:-1]
            self.groups.append(
                [
                    self.piece(param, weights.narrow(0, at, n), process_group, start=start, offset=at)
                    for param, start, at, n in overlaps(params, offsets, begin, size)
                ]
            )

    def attach_grads(self) -> None:
        optimizer = self.optimizer
        for i, group in enumerate(self.groups):
            self.share_weights(i, optimizer.fp32_groups_flat_partition[i])
            for piece in group:
                self.set_grad(piece, piece.view_in(optimizer.fp32_groups_gradient_flat_partition[i]))

    def install(self, patches: MethodPatches, decide: Decide, write: Write) -> None:
        optimizer = self.optimizer

        def get_grads_for_norm(for_clipping: bool = False) -> Any:
            # DeepSpeed takes the norm of what this returns, and then asks again for the gradients to clip.
            if for_clipping:
                return []
            skip = decide()
            if not skip:
                for group, flat in zip(self.groups, optimizer.fp32_groups_gradient_flat_partition, strict=True):
                    write(group, [piece.view_in(flat) for piece in group])
            return [norm_signal(skip, optimizer.fp32_groups_gradients_flat[0].device)], {}

        patches.replace(optimizer, "get_grads_for_norm", get_grads_for_norm)
        # Otherwise DeepSpeed would add the norm up over tensor-parallel ranks.
        patches.replace(optimizer, "mpu", None)
